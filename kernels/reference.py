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

    Args:
        x: `[..., S, K]`, floating point.
        weight: `[N, K]`, same dtype as `x`.
        bias: `[N]` or None.
        lora_a: `[R, K]`, any floating dtype.
        lora_b: `[N, R]`, LoRA's own `lora_alpha / r` already folded in.
        row_scale: `[..., S]`, float32.

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


def _updated(y: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, row_scale: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    scale = row_scale.to(wide).unsqueeze(-1)
    update = F.linear(F.linear(x.to(wide), lora_a.to(wide)), lora_b.to(wide))
    # Not y + 0 · update: an inactive row may hold a NaN or an infinity.
    return torch.where(scale != 0, (y.to(wide) + scale * update).to(x.dtype), y)
