"""`QuantizedLinear`, a linear whose weight is stored in one of the precisions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from slideredit_rt.kernels.quantized import quantized_linear
from slideredit_rt.quantization.config import QuantizedLayer
from slideredit_rt.quantization.precisions import PARTS, Part, Precision, get_precision

_INTEGERS = {1: torch.uint8, 4: torch.int32}


def stored_parts(precision: Precision, n: int, k: int, *, activations: bool) -> dict[str, Part]:
    """Return dtypes and shapes of all parts of a linear from `k` to `n` features, `input_scale` included."""
    scale = {"input_scale": Part(torch.float32, ())} if activations else {}
    return precision.layout(n, k) | scale


class QuantizedLinear(nn.Module):
    """A frozen linear with a quantised weight: `y = q(x) Wᵀ + bias`.

    Its parts are buffers under the names of `slideredit_rt.quantization.precisions.PARTS`; those that its precision lacks are
    None. Their dtypes are part of the format, so `.to(dtype)` converts the bias only.

    Args:
        in_features: K.
        out_features: N.
        precision: Name of the precision.
        bias: Give it a bias.
        activations: Quantise activations, which needs an `input_scale`.
        device: Device of the tensors, whose values are not initialised.
        dtype: Dtype of the bias.

    Attributes:
        in_features: K.
        out_features: N.
        precision: Name of the precision.
        activations: True if activations are quantised.

    Raises:
        SliderEditError: The precision is unknown.
    """

    weight: Tensor
    weight_scale: Tensor
    weight_scale_2: Tensor | None
    input_scale: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        precision: str,
        *,
        bias: bool = True,
        activations: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.precision = precision
        self.activations = activations
        parts = stored_parts(get_precision(precision), out_features, in_features, activations=activations)
        for name in PARTS:
            part = parts.get(name)
            self.register_buffer(name, None if part is None else torch.empty(part.shape, dtype=part.dtype, device=device))
        empty = torch.empty(out_features, device=device, dtype=dtype) if bias else None
        self.bias = None if empty is None else nn.Parameter(empty, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Project `[..., K]` to `[..., N]`, in the dtype of `x`."""
        return quantized_linear(
            x, self.weight, self.weight_scale, self.weight_scale_2, self.input_scale, self.bias, self.precision
        )

    def share(self, other: QuantizedLinear) -> None:
        """Use the tensors of another linear of the same sizes and precision."""
        for name in PARTS:
            setattr(self, name, getattr(other, name))
        self.bias = other.bias

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # Conversions of a module skip integers, so the parts pass as integers of the same size: they move, but keep their bits.
        parts = {name: self._buffers.pop(name) for name in PARTS}
        try:
            return super()._apply(fn, recurse)
        finally:
            for name, part in parts.items():
                moved = None if part is None else fn(part.view(_INTEGERS[part.element_size()])).view(part.dtype)
                self._buffers[name] = moved

    def extra_repr(self) -> str:
        """Describe the module when it is printed."""
        activations = ", activations" if self.activations else ""
        return f"{self.in_features}, {self.out_features}, {self.precision}{activations}, bias={self.bias is not None}"


def quantize_linears(model: nn.Module, layers: Mapping[str, QuantizedLayer]) -> None:
    """Replace linears of a model by `QuantizedLinear` modules on the `meta` device.

    Args:
        model: Model on the `meta` device, changed in place.
        layers: Format of each linear, by name.

    Raises:
        ValueError: The model has no such linear, or it cannot be stored in that precision.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name, layer in layers.items():
        if name not in linears:
            raise ValueError(f"its quantization_config names {name}, which is not a linear of the model")
        linear, parent, child = linears[name], *name.rpartition(".")[::2]
        if not get_precision(layer.precision).takes(linear.in_features):
            raise ValueError(f"its quantization_config stores {name} with {linear.in_features} inputs as {layer.precision}")
        quantized = QuantizedLinear(
            linear.in_features,
            linear.out_features,
            layer.precision,
            bias=linear.bias is not None,
            activations=layer.activations,
            device="meta",
        )
        setattr(model.get_submodule(parent), child, quantized.eval())


def quantized_linears(model: nn.Module) -> dict[str, QuantizedLinear]:
    """Return the quantised linears of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def quantized_parts(model: nn.Module) -> dict[str, tuple[QuantizedLinear, str]]:
    """Return, by its name in the state dict, each part of a quantised linear: the linear and the part's own name."""
    return {
        f"{name}.{part}": (linear, part)
        for name, linear in quantized_linears(model).items()
        for part, _ in linear.named_buffers(recurse=False)
    }
