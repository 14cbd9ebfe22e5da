"""Plain expressions of the masked low-rank update, written to be read."""

from __future__ import annotations

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
    y = F.linear(x, weight, bias)
    wide = torch.promote_types(x.dtype, torch.float32)
    update = F.linear(F.linear(x.to(wide), lora_a.to(wide)), lora_b.to(wide))
    return (y.to(wide) + row_scale.to(wide).unsqueeze(-1) * update).to(x.dtype)
