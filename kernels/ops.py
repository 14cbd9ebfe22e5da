"""Operators of the `slideredit` namespace for eager mode, autograd, `torch.compile` and `torch.export`.

On CPU tensors the operators run the reference, on CUDA tensors the vendor's GEMM and the update kernels.
`masked_lora_linear` is an opaque node, which an exporter can replace with its own subgraph. The `…_triton` operators that
write whole outputs are transparent to the compiler.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from slideredit_rt.kernels.arguments import check_linear, check_update, empty_projection
from slideredit_rt.kernels.reference import (
    masked_lora_linear_reference,
    masked_lora_update_reference,
    masked_lora_update_reference_,
    scaled_low_rank,
)


def _triton() -> Any:
    """Import the Triton operators on the first CUDA call: Triton is Linux-only and takes a second to import."""
    from slideredit_rt.kernels import triton_ops

    return triton_ops


def _runs_reference(x: Tensor) -> bool:
    # The kernels have no float64, which only gradient checks use.
    return not x.is_cuda or x.dtype == torch.float64


@torch.library.custom_op("slideredit::masked_lora_linear", mutates_args=())
def _masked_lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, row_scale: Tensor
) -> Tensor:
    if _runs_reference(x):
        return masked_lora_linear_reference(x, weight, bias, lora_a, lora_b, row_scale)
    y: Tensor = _triton().linear_then_update(x, weight, bias, lora_a, lora_b, row_scale)
    return y


_masked_lora_linear.register_fake(empty_projection)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, lora_a, lora_b, row_scale = inputs
    ctx.save_for_backward(x, weight, lora_a, lora_b, row_scale)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, lora_a, lora_b, row_scale = ctx.saved_tensors
    needs_x, _, _, needs_a, needs_b, _ = ctx.needs_input_grad
    grad_x, grad_a, grad_b = _low_rank_gradients(grad, (x, lora_a, lora_b, row_scale), (needs_x, needs_a, needs_b))
    return None if grad_x is None else grad @ weight + grad_x, None, None, grad_a, grad_b, None


def _low_rank_gradients(
    grad: Tensor, saved: tuple[Tensor, Tensor, Tensor, Tensor], needed: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of `row_scale · (x Aᵀ) Bᵀ` with respect to x, A and B, None where they are not needed."""
    x, lora_a, lora_b, row_scale = saved
    needs_x, needs_a, needs_b = needed
    wide = torch.promote_types(x.dtype, torch.float32)
    wide_grad, wide_x, wide_a, scale = grad.to(wide), x.to(wide), lora_a.to(wide), row_scale.to(wide)
    # The backward pass scales each row's gradient per member, with the same expression as the forward pass.
    through_b = scaled_low_rank(wide_grad, lora_b.to(wide).T, scale)
    grad_x = (through_b @ wide_a).to(grad.dtype) if needs_x else None
    grad_a = (through_b.flatten(0, -2).T @ wide_x.flatten(0, -2)).to(lora_a.dtype) if needs_a else None
    low = scaled_low_rank(wide_x, wide_a, scale) if needs_b else None
    grad_b = None if low is None else (wide_grad.flatten(0, -2).T @ low.flatten(0, -2)).to(lora_b.dtype)
    return grad_x, grad_a, grad_b


_masked_lora_linear.register_autograd(_backward, setup_context=_save_for_backward)


@torch.library.custom_op("slideredit::masked_lora_update_", mutates_args=("y",))
def _masked_lora_update_(y: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, row_scale: Tensor) -> None:
    if _runs_reference(x):
        masked_lora_update_reference_(y, x, lora_a, lora_b, row_scale)
    else:
        _triton()._masked_lora_update_triton_(y, x, lora_a, lora_b, row_scale)


@torch.library.custom_op("slideredit::masked_lora_update", mutates_args=())
def _masked_lora_update(y: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, row_scale: Tensor) -> Tensor:
    if _runs_reference(x):
        return masked_lora_update_reference(y, x, lora_a, lora_b, row_scale)
    updated = y.clone(memory_format=torch.contiguous_format)
    _triton()._masked_lora_update_triton_(updated, x, lora_a, lora_b, row_scale)
    return updated


@_masked_lora_update.register_fake
def _(y: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, row_scale: Tensor) -> Tensor:
    return y.new_empty(y.shape)


def _save_update(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _update_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    _, needs_x, needs_a, needs_b, _ = ctx.needs_input_grad
    return grad, *_low_rank_gradients(grad, ctx.saved_tensors, (needs_x, needs_a, needs_b)), None


_masked_lora_update.register_autograd(_update_backward, setup_context=_save_update)


def masked_lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, row_scale: Tensor
) -> Tensor:
    """Compute `x Wᵀ + bias + row_scale · (x Aᵀ) Bᵀ`, a frozen projection plus a low-rank update scaled per row.

    A row whose scale is 0 gets the frozen projection, bit for bit. Gradients flow to `x`, `lora_a` and `lora_b`; the
    projection and the scales are constants.

    Args:
        x: `[..., S, K]`; float32, bfloat16 or float16, and float64 for gradient checks.
        weight: `[N, K]`, in the dtype of `x`.
        bias: `[N]`, or None.
        lora_a: `[R, K]`, in any floating dtype. On CUDA, each adapter's rank is 1 to 128.
        lora_b: `[N, R]`, with LoRA's `lora_alpha / r` already folded in.
        row_scale: `[..., S]`, float32; `[..., S, G]` for a bank of G adapters of rank R / G.

    Returns:
        `[..., S, N]` in the dtype of `x`.

    Raises:
        SliderEditError: Shapes, dtypes or devices do not match.

    Example:
        >>> import torch
        >>> from slideredit_rt import kernels
        >>> x, weight = torch.randn(2, 8, 64), torch.randn(32, 64)
        >>> lora_a, lora_b = torch.randn(16, 64), torch.randn(32, 16)
        >>> row_scale = torch.zeros(2, 8)
        >>> row_scale[:, 2:5] = 0.5  # three active rows per sequence
        >>> kernels.masked_lora_linear(x, weight, None, lora_a, lora_b, row_scale).shape
        torch.Size([2, 8, 32])
    """
    check_linear(x, weight, bias, lora_a, lora_b, row_scale)
    y: Tensor = _masked_lora_linear(x, weight, bias, lora_a, lora_b, row_scale)
    return y


def masked_lora_update(y: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, row_scale: Tensor) -> Tensor:
    """Compute `y + row_scale · (x Aᵀ) Bᵀ` beside any projection, such as a quantised one.

    Rows whose scale is 0 keep the bits of `y`. Gradients flow to `y`, `x`, `lora_a` and `lora_b`; the scales are constants.

    Args:
        y: `[..., S, N]`, in the dtype of `x`.
        x: `[..., S, K]`, floating point.
        lora_a: `[R, K]`, in any floating dtype.
        lora_b: `[N, R]`, with LoRA's `lora_alpha / r` already folded in.
        row_scale: `[..., S]`, float32; `[..., S, G]` for a bank of G adapters.

    Returns:
        `[..., S, N]` in the dtype of `x`.

    Raises:
        SliderEditError: Shapes, dtypes or devices do not match.
    """
    check_update(y, x, lora_a, lora_b, row_scale)
    updated: Tensor = _masked_lora_update(y, x, lora_a, lora_b, row_scale)
    return updated


def masked_lora_update_(y: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, row_scale: Tensor) -> Tensor:
    """Compute `y += row_scale · (x Aᵀ) Bᵀ` in place on the rows whose scale is not 0, and return `y`.

    Other rows of `y` keep their bits. The operator has no gradients.

    Args:
        y: `[..., S, N]`, contiguous, in the dtype of `x`.
        x: `[..., S, K]`, floating point.
        lora_a: `[R, K]`, in any floating dtype.
        lora_b: `[N, R]`, with LoRA's `lora_alpha / r` already folded in.
        row_scale: `[..., S]`, float32; `[..., S, G]` for a bank of G adapters.

    Returns:
        The tensor `y`.

    Raises:
        SliderEditError: Shapes, dtypes or devices do not match, or `y` is not contiguous.
    """
    check_update(y, x, lora_a, lora_b, row_scale, in_place=True)
    _masked_lora_update_(y, x, lora_a, lora_b, row_scale)
    return y
