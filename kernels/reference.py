"""Plain expressions of the masked low-rank update, written to be read: what CPU tensors run and tests compare with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def masked_lora_linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, row_scale: Tensor
) -> Tensor:
    """`x Wᵀ + bias + row_scale · (x Aᵀ) Bᵀ`; rows of `row_scale` 0 get the frozen projection, bit for bit.

    With a bank of G adapters, their A's stacked and their B's side by side, every member has a scale of its own in each row.

    Args:
        x: `[..., S, K]`, floating point.
        weight: `[N, K]`, same dtype as `x`.
        bias: `[N]` or None.
        lora_a: `[R, K]`, any floating dtype.
        lora_b: `[N, R]`, LoRA's own `lora_alpha / r` already folded in.
        row_scale: `[..., S]`, float32. For a bank `[..., S, G]` where G divides R: member g scales the rows g·R/G to
            (g + 1)·R/G of `lora_a`.

    Returns:
        `[..., S, N]` in the dtype of `x`. The update is computed and added in float32 (float64 for float64 inputs).
    """
    return _updated(F.linear(x, weight, bias), x, lora_a, lora_b, row_scale)


def masked_lora_update_reference_(y: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, row_scale: Tensor) -> Tensor:
    """`y += row_scale · (x Aᵀ) Bᵀ` in place on the rows whose scale is not 0; the others keep their bits. Returns `y`.

    Args:
        y: `[..., S, N]`, dtype of `x`.
        x, lora_a, lora_b, row_scale: as in `masked_lora_linear_reference`.
    """
    return y.copy_(_updated(y, x, lora_a, lora_b, row_scale))


def masked_lora_qkv_reference(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    row_scale: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Three projections of the same rows, each as `masked_lora_linear_reference`."""
    q, k, v = (masked_lora_linear_reference(x, weights[i], biases[i], lora_as[i], lora_bs[i], row_scale) for i in range(3))
    return q, k, v


def scaled_low_rank(x: Tensor, lora_a: Tensor, row_scale: Tensor) -> Tensor:
    """`row_scale · (x Aᵀ)`, `[..., S, R]`, each member's columns by its own scale; arguments of the same dtype."""
    low = F.linear(x, lora_a)
    members = member_scales(row_scale, x)
    scaled: Tensor = low.unflatten(-1, (members.shape[-1], -1)) * members.unsqueeze(-1)
    return scaled.flatten(-2)


def member_scales(row_scale: Tensor, x: Tensor) -> Tensor:
    """`row_scale` as `[..., S, G]`; a single adapter is a bank of one."""
    return row_scale if row_scale.ndim == x.ndim else row_scale.unsqueeze(-1)


def _updated(y: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, row_scale: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    update = F.linear(scaled_low_rank(x.to(wide), lora_a.to(wide), row_scale.to(wide)), lora_b.to(wide))
    active = (member_scales(row_scale, x) != 0).any(dim=-1, keepdim=True)
    # Not y + 0 · update: an inactive row may hold a NaN or an infinity.
    return torch.where(active, (y.to(wide) + update).to(x.dtype), y)
