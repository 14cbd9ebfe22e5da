"""Lowerings of quantised projections: replacements of the `slideredit::QuantizedLinear` nodes of a traced graph.

Each node is a complete projection, `y = q(x) Wᵀ + bias`. Its inputs in order: x `[B, S, K]`; weight, weight_scale,
weight_scale_2 and input_scale as `slideredit_rt.quantization.precisions` stores them, the last two where the precision has
them; bias `[N]` or none.

- `qdq`: the weight and the rounded activations as QuantizeLinear and DequantizeLinear nodes before a MatMul. TensorRT fuses
  them into GEMMs of the precision; what it did is read from its log (`slideredit_rt.engines.tensorrt.build_log`). Weights stay
  where they lie in the checkpoint.
- `nbits`: ONNX Runtime's `MatMulNBits`, which computes with 8-bit activations. Its weights have another layout.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor

from slideredit_rt.export.nodes import (
    DOMAIN,
    QUANTIZED_LINEAR,
    Builder,
    constant,
    every_input,
    present,
    projection_name,
    replace_node,
    size_of,
)
from slideredit_rt.quantization.precisions import PRECISIONS, Part

_OPSETS = {"fp8": 21, "int8": 21, "int4": 21, "nvfp4": 23}
"""The first opset whose DequantizeLinear has what the stored form needs: blocks, INT4, FLOAT4E2M1."""
_PACKED = {"int4": ir.DataType.INT4, "nvfp4": ir.DataType.FLOAT4E2M1}
"""ONNX type of the weights that a checkpoint stores as bytes of two values."""
_EXTENSIONS = ("trt", "com.microsoft")
"""Domains of TensorRT's and ONNX Runtime's own operators."""
_FP4_BLOCK = 16
_FP8_SCALES = int(ir.DataType.FLOAT8E4M3FN)
_NBITS_BLOCKS = (128, 64, 32, 16)
_NBITS_ACCURACY = 4
"""MatMulNBits' `accuracy_level` for 8-bit integer activations, scaled per block."""
_BITS = {"int8": 8, "int4": 4}


@dataclass(frozen=True)
class Conversion:
    """Change of a stored tensor for an engine.

    Attributes:
        part: Dtype and shape of the result.
        convert: Function of the stored tensor that returns the result.
    """

    part: Part
    convert: Callable[[Tensor], Tensor]


class Form(ABC):
    """One way to express quantised projections in a graph.

    Attributes:
        name: Name in `Backend.quantised`.
    """

    name: ClassVar[str]

    @abstractmethod
    def conversion(self, precision: str, name: str, stored: Part, k: int, dtype: torch.dtype) -> Conversion | None:
        """Return how a part of a projection has to be converted; None for a part that stays where it lies.

        Args:
            precision: Name of the precision.
            name: Name of the part, one of `slideredit_rt.quantization.precisions.PARTS`.
            stored: Dtype and shape of the part in the checkpoint.
            k: Input features of the projection.
            dtype: Dtype of the graph.
        """

    @abstractmethod
    def replace(self, graph: ir.Graph, node: ir.Node, precision: str) -> None:
        """Replace a node. The GEMM of the projection is named after it, with the ending `/base`."""


class QDQ(Form):
    """Standard nodes around a MatMul."""

    name = "qdq"

    def __init__(self) -> None:
        self._rounded: dict[tuple[ir.Value, str, float], ir.Value] = {}
        self._vectors = 0

    def conversion(self, precision: str, name: str, stored: Part, k: int, dtype: torch.dtype) -> Conversion | None:
        # The dtype of its scale is that of what DequantizeLinear returns.
        if stored.dtype != torch.float32 or dtype == torch.float32:
            return None
        return Conversion(Part(dtype, stored.shape), lambda tensor: tensor.to(dtype))

    def replace(self, graph: ir.Graph, node: ir.Node, precision: str) -> None:
        x, weight, weight_scale, weight_scale_2, input_scale, bias = every_input(node, 6)
        x, weight, weight_scale = present([x, weight, weight_scale])
        build, k = Builder(projection_name(node)), size_of(x, -1)
        if precision in _PACKED:
            _retype(weight, _PACKED[precision], (size_of(weight, 0), k))
        if input_scale is not None:
            # Projections of the same rows share the rounded activations.
            key = (x, precision, _scalar(input_scale))
            if key not in self._rounded:
                self._rounded[key] = _ACTIVATIONS[precision](graph, build, x, input_scale)
            x = self._rounded[key]
        elif len(x.shape or ()) == 2:
            x = self._own_input(graph, build, x)
        scale = weight_scale
        if weight_scale_2 is not None:
            scale = build("DequantizeLinear", [weight_scale, weight_scale_2], "weight_scale")
        blocked = len(weight_scale.shape or ()) == 2
        attributes = {"axis": 1, "block_size": k // size_of(weight_scale, 1)} if blocked else {"axis": 0}
        wide = build("DequantizeLinear", [weight, scale], "weight", attributes)
        y = build("MatMul", [x, build.transposed(wide, "weight_transposed")], "base")
        replace_node(graph, node, build, y if bias is None else build("Add", [y, bias], "bias"))

    def _own_input(self, graph: ir.Graph, build: Builder, x: ir.Value) -> ir.Value:
        """Give a projection of one vector per batch item, as modulation is, an input of its own.

        TensorRT-RTX 1.7 would join the modulations of all blocks, because they read the same vector, and expand their weights
        to 16 bits in every step. The input is limited to a bound that no value reaches, another one for each projection.
        """
        assert x.dtype is not None
        bound = np.array(ml_dtypes.finfo(x.dtype.numpy()).max, x.dtype.numpy())
        for _ in range(self._vectors):
            bound = np.nextafter(bound, np.zeros_like(bound))
        self._vectors += 1
        return _like(build("Min", [x, constant(graph, bound, f"bound_{self._vectors}")], "input"), x)


class NBits(Form):
    """ONNX Runtime's operator for integer weights with blocks of input features."""

    name = "nbits"

    def conversion(self, precision: str, name: str, stored: Part, k: int, dtype: torch.dtype) -> Conversion | None:
        n, bits, block = stored.shape[0], _BITS[precision], self._block(precision, k)
        blocks = -(-k // block)
        if name == "weight":
            shape = (n, blocks, block * bits // 8)
            filling = (blocks * block - k) * bits // 8
            return Conversion(Part(torch.uint8, shape), lambda t: F.pad(_unsigned(t, bits), (0, filling)).reshape(shape))
        # One scale per channel is the same scale in every block.
        return Conversion(Part(torch.float32, (n, blocks)), lambda tensor: tensor.reshape(n, -1).expand(n, blocks))

    @staticmethod
    def _block(precision: str, k: int) -> int:
        scales = PRECISIONS[precision].layout(1, k)["weight_scale"].shape
        return (
            k // scales[1] if len(scales) == 2 else next((size for size in _NBITS_BLOCKS if k % size == 0), _NBITS_BLOCKS[-1])
        )

    def replace(self, graph: ir.Graph, node: ir.Node, precision: str) -> None:
        x, weight, weight_scale, _, _, bias = every_input(node, 6)
        x, weight, weight_scale = present([x, weight, weight_scale])
        build, bits = Builder(projection_name(node)), _BITS[precision]
        attributes = {
            "K": size_of(x, -1),
            "N": size_of(weight, 0),
            "bits": bits,
            "block_size": size_of(weight, 2) * 8 // bits,
            "accuracy_level": _NBITS_ACCURACY,
        }
        y = build("MatMulNBits", [x, weight, weight_scale], "base", attributes, domain="com.microsoft")
        replace_node(graph, node, build, y if bias is None else build("Add", [y, bias], "bias"))


FORMS: dict[str, type[Form]] = {form.name: form for form in (QDQ, NBits)}


def lower_quantised(model: ir.Model, forms: Mapping[str, Form]) -> None:
    """Replace the quantised projections of a traced graph, in place.

    Args:
        model: Result of `onnx_graph.trace`, whose initializers refer to converted parts.
        forms: Form to give them, by the name of their precision.
    """
    nodes = [node for node in model.graph if node.domain == DOMAIN and node.op_type == QUANTIZED_LINEAR]
    for node in nodes:
        precision = node.attributes["precision"].as_string()
        forms[precision].replace(model.graph, node, precision)
        model.opset_imports[""] = max(model.opset_imports[""], _OPSETS[precision])
    model.opset_imports.update({node.domain: 1 for node in model.graph if node.domain in _EXTENSIONS})
    for name in [name for name, value in model.graph.initializers.items() if not value.uses()]:
        del model.graph.initializers[name]


def _round_to_fp8(graph: ir.Graph, build: Builder, x: ir.Value, scale: ir.Value) -> ir.Value:
    zero = constant(graph, np.zeros((), ir.DataType.FLOAT8E4M3FN.numpy()), "fp8_zero")
    rounded = build("QuantizeLinear", [x, scale, zero], "activations_fp8")
    return _like(build("DequantizeLinear", [rounded, scale], "activations"), x)


def _round_to_fp4(graph: ir.Graph, build: Builder, x: ir.Value, scale: ir.Value) -> ir.Value:
    """Round to blocks of E2M1 with an FP8 scale that TensorRT computes from each block."""
    attributes = {"axis": -1, "block_size": _FP4_BLOCK, "scale_type": _FP8_SCALES}
    rounded, scales = build.with_outputs(2, "TRT_FP4DynamicQuantize", [x, scale], "activations_fp4", attributes, domain="trt")
    wide = build("DequantizeLinear", [scales, scale], "activation_scales")
    blocks = {"axis": -1, "block_size": _FP4_BLOCK}
    return _like(build("DequantizeLinear", [rounded, wide], "activations", blocks), x)


_ACTIVATIONS = {"fp8": _round_to_fp8, "nvfp4": _round_to_fp4}


def _like(value: ir.Value, other: ir.Value) -> ir.Value:
    value.type, value.shape = other.type, other.shape
    return value


def _scalar(value: ir.Value) -> float:
    assert value.const_value is not None
    return float(value.const_value.numpy())


def _unsigned(stored: Tensor, bits: int) -> Tensor:
    """Return two's complement integers as unsigned ones, larger by 128 or 8; two 4-bit values share a byte."""
    return stored.view(torch.uint8) ^ (0x80 if bits == 8 else 0x88)


def _retype(value: ir.Value, dtype: ir.DataType, shape: tuple[int, ...]) -> None:
    """Read an initializer's bytes as another type."""
    stored = value.const_value
    assert isinstance(stored, ir.ExternalTensor)
    value.type, value.shape = ir.TensorType(dtype), ir.Shape(shape)
    value.const_value = ir.ExternalTensor(
        stored.location,
        stored.offset,
        stored.length,
        dtype,
        shape=ir.Shape(shape),
        name=stored.name,
        base_dir=stored.base_dir,
    )
