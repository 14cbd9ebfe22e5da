"""Argument checks of the operators, which run before a launch, and their output shapes for tracing."""

from __future__ import annotations

import torch
from torch import Tensor

from slideredit_rt.errors import SliderEditError

MAX_RANK = 128


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise SliderEditError(message)


def _check_low_rank(x: Tensor, n: int, lora_a: Tensor, lora_b: Tensor, row_scale: Tensor) -> None:
    k, rank = x.shape[-1], lora_a.shape[0]
    _require(
        lora_a.shape == (rank, k) and lora_b.shape == (n, rank),
        f"lora_a {tuple(lora_a.shape)} and lora_b {tuple(lora_b.shape)} do not fit a projection from {k} to {n}; "
        f"pass [R, {k}] and [{n}, R]",
    )
    bank = row_scale.ndim == x.ndim
    _require(
        row_scale.shape[: x.ndim - 1] == x.shape[:-1] and row_scale.ndim <= x.ndim,
        f"row_scale has shape {tuple(row_scale.shape)}; pass one scale per row of x, {tuple(x.shape[:-1])}, "
        "or, for a bank of adapters, one per row and member",
    )
    _require(
        not bank or (row_scale.shape[-1] > 0 and rank % row_scale.shape[-1] == 0),
        f"row_scale has {row_scale.shape[-1] if bank else 1} members, which do not divide a rank of {rank} evenly; "
        "pad each member of the bank with zeros to the largest rank",
    )
    _require(
        row_scale.dtype == torch.promote_types(x.dtype, torch.float32) or row_scale.dtype == torch.float32,
        f"row_scale is {row_scale.dtype}; pass float32, because 16 bits would round the strengths",
    )
    own = rank // row_scale.shape[-1] if bank else rank
    _require(1 <= own <= MAX_RANK or not x.is_cuda, f"rank {own} is outside the kernels' range 1 to {MAX_RANK}")
    for name, tensor in (("lora_a", lora_a), ("lora_b", lora_b), ("row_scale", row_scale)):
        _require(tensor.device == x.device, f"{name} is on {tensor.device} and x on {x.device}; move them to one device")


def _check_projection(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    _require(
        weight.ndim == 2 and weight.shape[1] == x.shape[-1],
        f"weight has shape {tuple(weight.shape)}; pass [N, {x.shape[-1]}] for x of shape {tuple(x.shape)}",
    )
    _require(weight.dtype == x.dtype, f"weight is {weight.dtype} and x is {x.dtype}; pass both in the same dtype")
    _require(
        bias is None or bias.shape == (weight.shape[0],),
        f"bias has shape {None if bias is None else tuple(bias.shape)}; pass [{weight.shape[0]}]",
    )


def check_one_scale_per_row(x: Tensor, row_scale: Tensor) -> None:
    """Raise `SliderEditError` for a bank of adapters, which only the update kernel supports."""
    _require(
        row_scale.ndim < x.ndim,
        f"row_scale has shape {tuple(row_scale.shape)}, one scale per member of a bank; this kernel takes one per row. "
        "Use masked_lora_update_triton_ or the operators without _triton",
    )


def check_linear(x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, row_scale: Tensor) -> None:
    """Raise `SliderEditError` unless these are valid arguments of `masked_lora_linear`."""
    _check_projection(x, weight, bias)
    _check_low_rank(x, weight.shape[0], lora_a, lora_b, row_scale)


def check_update(y: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, row_scale: Tensor, *, in_place: bool = False) -> None:
    """Raise `SliderEditError` unless these are valid arguments of `masked_lora_update`, or of its in-place form."""
    _require(
        y.shape[:-1] == x.shape[:-1] and y.dtype == x.dtype,
        f"y is {y.dtype} {tuple(y.shape)} and x is {x.dtype} {tuple(x.shape)}; pass tensors with the same rows and dtype",
    )
    _require(
        y.is_contiguous() or not in_place,
        "y is not contiguous; the in-place update needs a contiguous y, such as y.contiguous()",
    )
    _check_low_rank(x, y.shape[-1], lora_a, lora_b, row_scale)


def empty_projection(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, row_scale: Tensor
) -> Tensor:
    """Return an uninitialised `[..., S, N]`, the output that a compiler traces with."""
    return x.new_empty(*x.shape[:-1], weight.shape[0])
