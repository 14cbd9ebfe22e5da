"""Quantised projections as `torch.compile` takes them: standard operators in place of the opaque `quantized_linear`.

| base | activations | weight | product |
|---|---|---|---|
| fp8 | rounded to E4M3 | stays in E4M3 | `torch._scaled_mm`, accumulated in float32 |
| fp8 without activations, int8, int4 | as they are | dequantised to the dtype of the activations in every call | `linear` |

Only FP8 products can be faster than those of 16 bits. The other forms save memory, not time: a dequantised weight lives for one
product. (torch's `_weight_int8pack_mm` would avoid it, but on CUDA it takes float32 only and does not use tensor cores.) The
low-rank update is added in place, from the rows that are not rounded.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from slideredit_rt.kernels import masked_lora_update_
from slideredit_rt.modules import LowRank, MaskedLoRAQuantizedLinear, SliderBackbone
from slideredit_rt.quantization.linear import QuantizedLinear, quantized_linears
from slideredit_rt.quantization.precisions import PARTS, PRECISIONS, to_fp8

_ALIGNMENT = 16
"""GPUs multiply FP8 matrices whose sizes are multiples of this."""


class _CompiledLinear(nn.Module):
    """The tensors of a quantised linear, which are shared with it. Subclasses project `[..., K]` to a new `[..., N]`."""

    weight: Tensor
    weight_scale: Tensor
    weight_scale_2: Tensor | None
    input_scale: Tensor | None

    def __init__(self, linear: QuantizedLinear) -> None:
        super().__init__()
        for name in PARTS:
            self.register_buffer(name, getattr(linear, name))
        self.bias = linear.bias
        self.precision = linear.precision


def _stored(x: Tensor) -> Tensor:
    """Return a contiguous matrix that the compiler stores once. Otherwise, it may compute `x` again for each product."""
    x = x.contiguous()
    return x.as_strided(x.shape, x.stride())


class FP8Linear(_CompiledLinear):
    """FP8 activations times FP8 weights, with a scale for all activations and one per output channel.

    Args:
        linear: Linear that `takes` accepts.
    """

    input_scale: Tensor
    one: Tensor

    def __init__(self, linear: QuantizedLinear) -> None:
        super().__init__(linear)
        self.register_buffer("one", torch.ones_like(self.weight_scale[0]))

    @staticmethod
    def takes(linear: QuantizedLinear) -> bool:
        """Return whether a linear has FP8 activations, and sizes that GPUs multiply."""
        aligned = linear.in_features % _ALIGNMENT == 0 and linear.out_features % _ALIGNMENT == 0
        return linear.precision == "fp8" and linear.activations and aligned

    def forward(self, x: Tensor) -> Tensor:
        """Project `[..., K]` to `[..., N]`, in the dtype of `x`."""
        rounded = _stored(to_fp8(x.flatten(0, -2).float() / self.input_scale))
        # GPUs can apply a scale per channel in the product, but all of them do so only for a bfloat16 result.
        product = self.scaled_product if x.is_cuda and x.dtype == torch.bfloat16 else self.product_then_scale
        return product(rounded, x.dtype).view(*x.shape[:-1], -1)

    def scaled_product(self, rounded: Tensor, dtype: torch.dtype) -> Tensor:
        """Multiply, scale and add the bias in one operator.

        Args:
            rounded: Activations, E4M3 `[M, K]`.
            dtype: Dtype of the result, `[M, N]`; bfloat16 on a GPU.
        """
        rows, channels = _stored(self.input_scale.expand(len(rounded), 1)), self.weight_scale.reshape(1, -1)
        bias = None if self.bias is None else self.bias.to(dtype)
        return torch._scaled_mm(rounded, self.weight.t(), scale_a=rows, scale_b=channels, bias=bias, out_dtype=dtype)

    def product_then_scale(self, rounded: Tensor, dtype: torch.dtype) -> Tensor:
        """Multiply to float32, then scale and add the bias. Arguments are those of `scaled_product`, with any dtype."""
        scale, weight = self.input_scale, self.weight.t()
        y = torch._scaled_mm(rounded, weight, scale_a=scale, scale_b=self.one, out_dtype=torch.float32) * self.weight_scale
        return (y if self.bias is None else y + self.bias).to(dtype)


class DequantisedLinear(_CompiledLinear):
    """A product with the weight that the stored parts stand for, and with rounded activations if the linear has them.

    Args:
        linear: Linear of any precision.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Project `[..., K]` to `[..., N]`, in the dtype of `x`."""
        form, parts = PRECISIONS[self.precision], {name: getattr(self, name) for name in PARTS}
        weight = form.dequantise({name: part for name, part in parts.items() if part is not None}).to(x.dtype)
        if self.input_scale is not None:
            x = form.fake_quantise(x.float(), self.input_scale).to(x.dtype)
        return F.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))


class UpdatedLinear(LowRank, nn.Module):
    """A projection with a masked low-rank update, which is added in place.

    Args:
        linear: Projection whose result is a new contiguous tensor.
        adapted: Adapted linear with the update.
    """

    def __init__(self, linear: nn.Module, adapted: MaskedLoRAQuantizedLinear) -> None:
        super().__init__()
        self.linear = linear
        self.rows, self.scales = adapted.rows, adapted.scales
        self.share_low_rank(adapted)

    def forward(self, x: Tensor) -> Tensor:
        """Project `[B, S, K]` to `[B, S, N]`."""
        row_scale, y = self.scales.of(self.rows), self.linear(x)
        return y if row_scale is None else masked_lora_update_(y, x, *self.low_rank(), row_scale)


@torch.no_grad()
def prepare_quantised(backbone: SliderBackbone) -> None:
    """Replace the quantised linears of a backbone by forms for the compiler, in place. They cannot be removed afterwards.

    Args:
        backbone: Backbone on its device, whose A and B have the dtype of the arithmetic.
    """
    transformer: Any = backbone.transformer
    linears = quantized_linears(transformer)
    for block_class in transformer._repeated_blocks:
        blocks = [module for module in transformer.modules() if type(module).__name__ == block_class]
        share_input_scales([quantized_linears(block) for block in blocks])
    if linears:
        backbone.release_linears()
    for name, linear in linears.items():
        parent, _, child = name.rpartition(".")
        form: nn.Module = FP8Linear(linear) if FP8Linear.takes(linear) else DequantisedLinear(linear)
        if isinstance(linear, MaskedLoRAQuantizedLinear):
            form = UpdatedLinear(form, linear)
        setattr(transformer.get_submodule(parent), child, form)


def share_input_scales(blocks: list[dict[str, QuantizedLinear]]) -> None:
    """Let linears whose input scales are equal use one tensor, by which the compiler knows that they round alike.

    They have to be equal in all blocks of a class. Otherwise, a block that shares other tensors would be compiled separately.

    Args:
        blocks: The quantised linears of each block, by name.
    """
    groups = defaultdict(list)
    for name in dict.fromkeys(name for block in blocks for name in block):
        scales = [block[name].input_scale if name in block else None for block in blocks]
        if any(scale is not None for scale in scales):
            groups[tuple(None if scale is None else scale.item() for scale in scales)].append(name)
    for block in blocks:
        for first, *others in groups.values():
            for name in others:
                if first in block:
                    block[name].input_scale = block[first].input_scale


class ShareEqualNodes(CustomGraphPass):
    """Compiler pass that computes equal expressions once.

    Without it, Inductor rounds the common input of a query, a key and a value three times.
    """

    def __call__(self, graph: fx.Graph) -> None:
        """Replace nodes that repeat an earlier one, in place."""
        seen: dict[tuple[Any, str, str], fx.Node] = {}
        for node in list(graph.nodes):
            if not _is_pure(node):
                continue
            # As text, in which 1, 1.0 and True differ. Nodes have unique names.
            first = seen.setdefault((node.target, repr(node.args), repr(node.kwargs)), node)
            if first is not node:
                node.replace_all_uses_with(first)
                graph.erase_node(node)

    def uuid(self) -> Any:
        """Identify the pass in the compiler's cache."""
        return get_hash_for_files((__file__,))


def _is_pure(node: fx.Node) -> bool:
    target = node.target
    return (
        isinstance(target, torch._ops.OpOverload)
        and target.namespace in ("aten", "prims")
        and not target._schema.is_mutable
        and torch.Tag.nondeterministic_seeded not in target.tags
    )
