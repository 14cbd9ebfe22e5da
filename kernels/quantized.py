"""The quantised projection `slideredit::quantized_linear`: one opaque operator for all precisions.

It runs the reference on every device. Engines replace the node with their own form of the precision.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from slideredit_rt.errors import SliderEditError
from slideredit_rt.quantization.precisions import PRECISIONS, Part, get_precision


def quantized_linear_reference(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_scale_2: Tensor | None,
    input_scale: Tensor | None,
    bias: Tensor | None,
    precision: str,
) -> Tensor:
    """Compute `quantized_linear` in float32 (float64 for float64 inputs), and round once to the dtype of `x`."""
    form = PRECISIONS[precision]
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if input_scale is not None:
        wide = form.fake_quantise(wide, input_scale)
    dequantised = _dequantised(weight, weight_scale, weight_scale_2, precision).to(wide.dtype)
    return F.linear(wide, dequantised, None if bias is None else bias.to(wide.dtype)).to(x.dtype)


def _dequantised(weight: Tensor, weight_scale: Tensor, weight_scale_2: Tensor | None, precision: str) -> Tensor:
    parts = {"weight": weight, "weight_scale": weight_scale}
    return PRECISIONS[precision].dequantise(parts if weight_scale_2 is None else parts | {"weight_scale_2": weight_scale_2})


@torch.library.custom_op("slideredit::quantized_linear", mutates_args=())
def _quantized_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_scale_2: Tensor | None,
    input_scale: Tensor | None,
    bias: Tensor | None,
    precision: str,
) -> Tensor:
    return quantized_linear_reference(x, weight, weight_scale, weight_scale_2, input_scale, bias, precision)


@_quantized_linear.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_scale_2: Tensor | None,
    input_scale: Tensor | None,
    bias: Tensor | None,
    precision: str,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, weight_scale, weight_scale_2, _, _, precision = inputs
    ctx.precision, ctx.dtype = precision, x.dtype
    ctx.save_for_backward(weight, weight_scale, weight_scale_2)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
    weight, weight_scale, weight_scale_2 = ctx.saved_tensors
    dequantised = _dequantised(weight, weight_scale, weight_scale_2, ctx.precision).to(wide.dtype)
    return (wide @ dequantised).to(ctx.dtype), None, None, None, None, None, None


_quantized_linear.register_autograd(_backward, setup_context=_save_for_backward)


def quantized_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_scale_2: Tensor | None,
    input_scale: Tensor | None,
    bias: Tensor | None,
    precision: str,
) -> Tensor:
    """Compute `q(x) Wᵀ + bias`, where W is the weight that the stored parts stand for and q rounds activations.

    Gradients flow to `x` as if its values were not rounded.

    Args:
        x: `[..., K]`, floating point.
        weight: Stored weight with N rows; see `slideredit_rt.quantization.precisions` for dtypes and shapes.
        weight_scale: Scales of the weight.
        weight_scale_2: Scalar that multiplies the scales, for nvfp4; None for others.
        input_scale: Scalar scale of the activations, float32; None leaves them as they are.
        bias: `[N]` in any floating dtype, or None.
        precision: Name of the precision.

    Returns:
        `[..., N]` in the dtype of `x`.

    Raises:
        SliderEditError: The precision is unknown, or parts do not fit it or `x`.
    """
    form = get_precision(precision)
    layout = form.layout(weight.shape[0], x.shape[-1])
    if form.quantises_activations and input_scale is not None:
        layout = layout | {"input_scale": Part(torch.float32, ())}
    parts = {"weight": weight, "weight_scale": weight_scale, "weight_scale_2": weight_scale_2, "input_scale": input_scale}
    for name, part in parts.items():
        if (part is None) == (name in layout):
            raise SliderEditError(f"{name} is {part}, but {precision} {'needs' if part is None else 'lacks'} one")
        if part is not None and (part.dtype, tuple(part.shape)) != (layout[name].dtype, layout[name].shape):
            raise SliderEditError(
                f"{name} is {part.dtype} {tuple(part.shape)}; an {precision} projection of x with shape {tuple(x.shape)} needs "
                f"{layout[name].dtype} {layout[name].shape}"
            )
    y: Tensor = _quantized_linear(x, weight, weight_scale, weight_scale_2, input_scale, bias, precision)
    return y
