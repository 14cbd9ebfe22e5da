"""Plain PyTorch expressions of the masked low-rank update. CPU tensors run them, and tests compare the kernels with them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def masked_lora_linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, row_scale: Tensor
) -> Tensor:
    """Compute `x Wᵀ + bias + row_scale · (x Aᵀ) Bᵀ`. Rows whose scale is 0 get the frozen projection, bit for bit.

    In a bank of G adapters, the A matrices are stacked, the B matrices are concatenated along their columns, and each member
    has its own scale in each row.

    Args:
        x: `[..., S, K]`, floating point.
        weight: `[N, K]`, in the dtype of `x`.
        bias: `[N]`, or None.
        lora_a: `[R, K]`, in any floating dtype.
        lora_b: `[N, R]`, with LoRA's `lora_alpha / r` already folded in.
        row_scale: `[..., S]`, float32. For a bank, `[..., S, G]` where G divides R; member g scales the rows g·R/G to
            (g + 1)·R/G of `lora_a`.

    Returns:
        `[..., S, N]` in the dtype of `x`. The update is computed and added in float32 (float64 for float64 inputs).
    """
    return _updated(F.linear(x, weight, bias), x, lora_a, lora_b, row_scale)


def masked_lora_update_reference(y: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, row_scale: Tensor) -> Tensor:
    """Compute `y + row_scale · (x Aᵀ) Bᵀ`. Rows whose scale is 0 keep their bits.

    `y` is `[..., S, N]` in the dtype of `x`. The other arguments are those of `masked_lora_linear_reference`.
    """
    return _updated(y, x, lora_a, lora_b, row_scale)


def masked_lora_update_reference_(y: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, row_scale: Tensor) -> Tensor:
    """Compute `y += row_scale · (x Aᵀ) Bᵀ` in place and return `y`. Rows whose scale is 0 keep their bits.

    `y` is `[..., S, N]` in the dtype of `x`. The other arguments are those of `masked_lora_linear_reference`.
    """
    return y.copy_(_updated(y, x, lora_a, lora_b, row_scale))


def scaled_low_rank(x: Tensor, lora_a: Tensor, row_scale: Tensor) -> Tensor:
    """Return `row_scale · (x Aᵀ)`, `[..., S, R]`. Each member's columns use its own scale; all arguments share a dtype."""
    low = F.linear(x, lora_a)
    members = member_scales(row_scale, x)
    scaled: Tensor = low.unflatten(-1, (members.shape[-1], -1)) * members.unsqueeze(-1)
    return scaled.flatten(-2)


def member_scales(row_scale: Tensor, x: Tensor) -> Tensor:
    """Return `row_scale` as `[..., S, G]`, where G is 1 for a single adapter."""
    return row_scale if row_scale.ndim == x.ndim else row_scale.unsqueeze(-1)


def _updated(y: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, row_scale: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    update = F.linear(scaled_low_rank(x.to(wide), lora_a.to(wide), row_scale.to(wide)), lora_b.to(wide))
    active = (member_scales(row_scale, x) != 0).any(dim=-1, keepdim=True)
    # torch.where instead of y + 0 · update, because an inactive row may hold NaN or infinity.
    return torch.where(active, (y.to(wide) + update).to(x.dtype), y)
