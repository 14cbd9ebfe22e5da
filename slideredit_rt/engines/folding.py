"""The folded form of an adapted backbone for torch: the update is extra inner columns of the frozen GEMM.

`[x | s·xAᵀ] · [W | B]ᵀ` costs one GEMM with a few more inner columns, where a separate update would read and write `y` again.
Projections of the same rows share a module, so a query, a key and a value take one GEMM and one low-rank product. It is the
torch counterpart of the lowering `folded` in `slideredit_rt.export.lowering`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slideredit_rt.modules import MaskedLoRALinear, SliderBackbone

_ALIGNMENT = {"cuda": 64, "cpu": 8}
"""Columns of the operands, extra ones included, are a multiple of this. GPUs read 128 bytes at a time, 64 values of 16 bits."""


class FoldedLoRALinear(nn.Module):
    """One or more adapted projections of the same rows as one GEMM: `y = [x | s·xAᵀ] · [W | B]ᵀ + bias`.

    `[W | B]` is laid out once. The stacked A's share one low-rank product; each projection has zeros in the columns of the
    others. A row of scale 0 agrees with the frozen projection to rounding, not bit for bit.

    Args:
        linears: Adapted projections with equal inner sizes, on the same device and in the same dtype.
        members: Number of adapters in a bank; 0 without a bank.
    """

    def __init__(self, linears: Sequence[MaskedLoRALinear], members: int = 0) -> None:
        super().__init__()
        first = linears[0]
        self.rows, self.scales = first.rows, first.scales
        self.in_features = first.in_features
        ranks = [len(linear.lora_A) for linear in linears]
        unit = _ALIGNMENT[first.weight.device.type]
        columns = -(-(self.in_features + sum(ranks)) // unit) * unit - self.in_features
        weight, start = first.weight.new_zeros(sum(linear.out_features for linear in linears), self.in_features + columns), 0
        lora_a, column = first.weight.new_zeros(columns, self.in_features), 0
        for linear, rank in zip(linears, ranks, strict=True):
            block = weight[start : start + linear.out_features]
            block[:, : self.in_features] = linear.weight
            block[:, self.in_features + column : self.in_features + column + rank] = linear.lora_B
            lora_a[column : column + rank] = linear.lora_A
            start, column = start + linear.out_features, column + rank
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.lora_A = nn.Parameter(lora_a, requires_grad=False)
        biases: list[Tensor] = [weight.new_zeros(m.out_features) if m.bias is None else m.bias for m in linears]
        biased = any(linear.bias is not None for linear in linears)
        self.bias = nn.Parameter(torch.cat(biases), requires_grad=False) if biased else None
        # The member of a bank that each column belongs to. The padding's member does not matter.
        owners = [slot // (rank // members) for rank in ranks for slot in range(rank)] if members else []
        owners += [0] * (columns - len(owners)) if members else []
        self.register_buffer("owners", torch.tensor(owners, device=weight.device) if members else None)
        self.owners: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        """Project `[B, S, K]` to `[B, S, N]`, the outputs of the projections one after the other."""
        row_scale = self.scales.of(self.rows)
        if row_scale is None:
            return F.linear(x, self.weight[:, : self.in_features], self.bias)
        scale = row_scale.unsqueeze(-1) if self.owners is None else row_scale[..., self.owners]
        low = F.linear(x, self.lora_A)
        return F.linear(torch.cat([x, (low * scale).to(x.dtype)], dim=-1), self.weight, self.bias)


@torch.no_grad()
def fold(backbone: SliderBackbone) -> None:
    """Replace the adapted projections of a backbone by folded ones, in place. They cannot be removed afterwards.

    The projections that an attention can compute as one (`Family.joint_projections`) become one module where the adapter
    updates all of them; the others are folded one by one. The weights of a projection are released as soon as they are copied.

    Args:
        backbone: Backbone with an adapter, whose A and B have the dtype of the weights.
    """
    released = backbone.release_linears()
    transformer, adapted = backbone.transformer, {n: m for n, m in released.items() if isinstance(m, MaskedLoRALinear)}
    for parent in sorted({name.rpartition(".")[0] for name in adapted}):
        attention: Any = transformer.get_submodule(parent)
        joint = _joint_projections(attention, parent, backbone.family.joint_projections, adapted)
        for name, parts in joint.items():
            linears = [adapted.pop(f"{parent}.{part}") for part in parts]
            for part in parts:
                delattr(attention, part)
            attention.add_module(name, FoldedLoRALinear(linears, len(backbone.members)))
        if joint:
            attention.fused_projections = True  # diffusers' name: the attention then calls the joint projections
    for name in list(adapted):
        parent, _, child = name.rpartition(".")
        folded = FoldedLoRALinear([adapted.pop(name)], len(backbone.members))
        setattr(transformer.get_submodule(parent), child, folded)


def _joint_projections(
    attention: nn.Module, parent: str, joint: Mapping[str, Sequence[str]], adapted: Mapping[str, MaskedLoRALinear]
) -> dict[str, Sequence[str]]:
    """Return the joint projections of an attention and their parts; none unless all of them are adapted."""
    own = {name: parts for name, parts in joint.items() if all(hasattr(attention, part) for part in parts)}
    whole = all(f"{parent}.{part}" in adapted for parts in own.values() for part in parts)
    return own if whole else {}
