"""`slideredit::masked_lora_linear` as a torch operator: eager, autograd, `torch.compile`, `torch.export`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from slideredit_rt.kernels.reference import masked_lora_linear_reference


@torch.library.custom_op("slideredit::masked_lora_linear", mutates_args=())
def _masked_lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, row_scale: Tensor
) -> Tensor:
    return masked_lora_linear_reference(x, weight, bias, lora_a, lora_b, row_scale)


@_masked_lora_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, row_scale: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, lora_a, lora_b, row_scale = inputs
    ctx.save_for_backward(x, weight, lora_a, lora_b, row_scale)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, lora_a, lora_b, row_scale = ctx.saved_tensors
    wide = torch.promote_types(x.dtype, torch.float32)
    scaled = grad.to(wide) * row_scale.to(wide).unsqueeze(-1)
    through_b = scaled @ lora_b.to(wide)
    grad_x = (grad @ weight + (through_b @ lora_a.to(wide)).to(grad.dtype)) if ctx.needs_input_grad[0] else None
    wide_x = x.to(wide).flatten(0, -2)
    grad_a = (through_b.flatten(0, -2).T @ wide_x).to(lora_a.dtype)
    grad_b = (scaled.flatten(0, -2).T @ (wide_x @ lora_a.to(wide).T)).to(lora_b.dtype)
    return grad_x, None, None, grad_a, grad_b, None


_masked_lora_linear.register_autograd(_backward, setup_context=_save_for_backward)


def masked_lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, row_scale: Tensor
) -> Tensor:
    """A frozen projection plus a low-rank update scaled per row (shapes and dtypes of `masked_lora_linear_reference`).

    Gradients flow to `x`, `lora_a` and `lora_b`; the projection and the scales are constants.
    """
    y: Tensor = _masked_lora_linear(x, weight, bias, lora_a, lora_b, row_scale)
    return y
