"""Operators of the `slideredit` namespace: eager, autograd, `torch.compile`, `torch.export`.

On CPU tensors they run the reference, on CUDA tensors the path that `dispatch.json` names for the card and shape. The Triton
kernels know one scale per row: a bank of adapters (`row_scale` `[..., S, G]`) runs the reference on CUDA tensors, too.
`masked_lora_linear` is one opaque node, so that an exporter can give it a body of its own; the `…_triton` operators that
write whole outputs are transparent to the compiler.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from slideredit_rt.kernels.arguments import check_linear, check_qkv, check_update, empty_projection, empty_qkv
from slideredit_rt.kernels.reference import (
    masked_lora_linear_reference,
    masked_lora_qkv_reference,
    masked_lora_update_reference_,
    scaled_low_rank,
)


def _cuda_paths() -> Any:
    """Imported on the first CUDA call: Triton exists on Linux only, and importing it takes a second."""
    from slideredit_rt.kernels import triton_ops

    return triton_ops


def _runs_reference(x: Tensor, row_scale: Tensor) -> bool:
    return not x.is_cuda or x.dtype == torch.float64 or row_scale.ndim == x.ndim


@torch.library.custom_op("slideredit::masked_lora_linear", mutates_args=())
def _masked_lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, row_scale: Tensor
) -> Tensor:
    if _runs_reference(x, row_scale):
        return masked_lora_linear_reference(x, weight, bias, lora_a, lora_b, row_scale)
    y: Tensor = _cuda_paths().linear_by_dispatch(x, weight, bias, lora_a, lora_b, row_scale)
    return y


_masked_lora_linear.register_fake(empty_projection)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, lora_a, lora_b, row_scale = inputs
    ctx.save_for_backward(x, weight, lora_a, lora_b, row_scale)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, lora_a, lora_b, row_scale = ctx.saved_tensors
    needs_x, _, _, needs_a, needs_b, _ = ctx.needs_input_grad
    wide = torch.promote_types(x.dtype, torch.float32)
    wide_grad, wide_x, wide_a, scale = grad.to(wide), x.to(wide), lora_a.to(wide), row_scale.to(wide)
    # The same expression forwards and backwards: a row's gradient is scaled per member on its way through A and B.
    through_b = scaled_low_rank(wide_grad, lora_b.to(wide).T, scale)
    grad_x = grad @ weight + (through_b @ wide_a).to(grad.dtype) if needs_x else None
    grad_a = (through_b.flatten(0, -2).T @ wide_x.flatten(0, -2)).to(lora_a.dtype) if needs_a else None
    low = scaled_low_rank(wide_x, wide_a, scale) if needs_b else None
    grad_b = None if low is None else (wide_grad.flatten(0, -2).T @ low.flatten(0, -2)).to(lora_b.dtype)
    return grad_x, None, None, grad_a, grad_b, None


_masked_lora_linear.register_autograd(_backward, setup_context=_save_for_backward)


@torch.library.custom_op("slideredit::masked_lora_update_", mutates_args=("y",))
def _masked_lora_update_(y: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, row_scale: Tensor) -> None:
    if _runs_reference(x, row_scale):
        masked_lora_update_reference_(y, x, lora_a, lora_b, row_scale)
    else:
        _cuda_paths().masked_lora_update_triton_(y, x, lora_a, lora_b, row_scale)


@torch.library.custom_op("slideredit::masked_lora_qkv", mutates_args=())
def _masked_lora_qkv(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    row_scale: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    if _runs_reference(x, row_scale):
        return masked_lora_qkv_reference(x, weights, biases, lora_as, lora_bs, row_scale)
    q, k, v = _cuda_paths().qkv_by_dispatch(x, weights, biases, lora_as, lora_bs, row_scale)
    return q, k, v


_masked_lora_qkv.register_fake(empty_qkv)


def masked_lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, row_scale: Tensor
) -> Tensor:
    """A frozen projection plus a low-rank update scaled per row (shapes and dtypes of `masked_lora_linear_reference`).

    Gradients flow to `x`, `lora_a` and `lora_b`; the projection and the scales are constants.

    Raises:
        SliderEditError: shapes or dtypes that do not belong together.
    """
    check_linear(x, weight, bias, lora_a, lora_b, row_scale)
    y: Tensor = _masked_lora_linear(x, weight, bias, lora_a, lora_b, row_scale)
    return y


def masked_lora_update_(y: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, row_scale: Tensor) -> Tensor:
    """Add a low-rank update to the active rows of `y` in place (shapes of `masked_lora_update_reference_`); returns `y`.

    For inference: no gradients.

    Raises:
        SliderEditError: shapes or dtypes that do not belong together.
    """
    check_update(y, x, lora_a, lora_b, row_scale)
    _masked_lora_update_(y, x, lora_a, lora_b, row_scale)
    return y


def masked_lora_qkv(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    row_scale: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value projections of the same rows, of equal sizes and ranks. For inference: no gradients.

    Raises:
        SliderEditError: shapes or dtypes that do not belong together.
    """
    check_qkv(x, weights, biases, lora_as, lora_bs, row_scale)
    q, k, v = _masked_lora_qkv(x, weights, biases, lora_as, lora_bs, row_scale)
    return q, k, v
