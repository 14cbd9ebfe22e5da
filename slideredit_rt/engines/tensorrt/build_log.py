"""Types that a plan computes in, read from the log of its builder: those of GEMM operands and of stored weights.

With detailed profiling verbosity, the log has a section "Layers:" with a line per layer after fusion: type, inputs, constants
and outputs with their dtypes, and the ONNX nodes that it came from. This needs no GPU. The format is that of TensorRT-RTX 1.7.
"""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from slideredit_rt.errors import SliderEditError

_LINE = re.compile(r"Name: (?P<name>.*?), LayerType: (?P<kind>\w+), (?P<tensors>.*?), TacticName: .*?Metadata: (?P<nodes>.*)$")
_SECTION = re.compile(r"(Inputs|Constants|Outputs): \[(.*?)\](?=, (?:Constants|Outputs): \[|$)")
_TENSOR = re.compile(r"Dimensions: \[([-\d,]*)\].*?Datatype: (\w+)")
_NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
_GEMMS = ("gemm", "runtime_fusion")
"""Types of the layers that multiply matrices. A layer of another type may stem from the same node: its scales or its bias."""
_STORED = {"fp8": "FP8", "int8": "Int8", "int4": "Int4", "nvfp4": "FP4E2M1"}
"""The log's names of the types that weights are stored in."""


@dataclass(frozen=True)
class Operand:
    """A tensor of a layer: dimensions, −1 for those that are not known before the call, and the log's name of its type."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def is_matrix(self) -> bool:
        """True if two or more axes are longer than 1, as those of weights are and those of a channel's scales are not."""
        return sum(size != 1 for size in self.shape) >= 2


@dataclass(frozen=True)
class Layer:
    """A layer of a plan.

    Attributes:
        kind: Type, such as `gemm`.
        inputs: Tensors that it reads from other layers.
        constants: Weights and scales.
        nodes: Names of the ONNX nodes that it was made from.
    """

    kind: str
    inputs: tuple[Operand, ...]
    constants: tuple[Operand, ...]
    nodes: tuple[str, ...]

    def multiplies(self, dtype: str) -> bool:
        """Return whether it is a GEMM with a matrix operand of a type."""
        return self.kind in _GEMMS and any(o.dtype == dtype and o.is_matrix for o in (*self.inputs, *self.constants))


@dataclass(frozen=True)
class PlanTypes:
    """Types of a plan, for `slideredit-rt inspect`.

    Attributes:
        gemms: Number of GEMMs by the types of their matrix operands, such as `FP8 × FP8`.
        weights: Bytes of constants by their type.
    """

    gemms: dict[str, int]
    weights: dict[str, int]


_BITS = {"FP4E2M1": 4, "Int4": 4, "FP8": 8, "Int8": 8, "BFloat16": 16, "Half": 16, "Float": 32, "Int32": 32, "Int64": 64}


def read_layers(log: Iterable[str]) -> list[Layer]:
    """Return the layers that a builder's log describes, in order; those of every target, one after the other.

    Args:
        log: Lines of the log.
    """
    layers = []
    for line in log:
        if (found := _LINE.match(line.rstrip())) is None:
            continue
        sections = {name: _operands(content) for name, content in _SECTION.findall(found["tensors"])}
        nodes = tuple(_NODE.findall(found["nodes"]))
        layers.append(Layer(found["kind"], sections.get("Inputs", ()), sections.get("Constants", ()), nodes))
    return layers


def _operands(section: str) -> tuple[Operand, ...]:
    return tuple(
        Operand(tuple(int(size) for size in sizes.split(",") if size), dtype) for sizes, dtype in _TENSOR.findall(section)
    )


def plan_types(layers: Iterable[Layer]) -> PlanTypes:
    """Count GEMMs and weights by their types."""
    gemms: collections.Counter[str] = collections.Counter()
    weights: collections.Counter[str] = collections.Counter()
    for layer in layers:
        if layer.kind in _GEMMS:
            matrices = [operand.dtype for operand in (*layer.inputs, *layer.constants) if operand.is_matrix] or ["vectors"]
            gemms[" × ".join(sorted(set(matrices)) if len(set(matrices)) > 1 else matrices[:1] * 2)] += 1
        for constant in layer.constants:
            weights[constant.dtype] += math.prod(constant.shape) * _BITS.get(constant.dtype, 8) // 8
    return PlanTypes(dict(gemms), dict(weights))


def check_precisions(layers: Iterable[Layer], precisions: Mapping[str, str], title: str) -> None:
    """Check that every quantised projection is computed from its stored weight.

    Args:
        layers: Layers of the plan, of all targets.
        precisions: Name of the precision of each quantised projection, by its name in the transformer.
        title: Name of the builder, for the message.

    Raises:
        SliderEditError: A projection is computed from a wider copy of its weight, or the log does not say how it is computed.
    """
    computing: dict[str, list[Layer]] = {name: [] for name in precisions}
    for layer in layers:
        for node in layer.nodes:
            if layer.kind in _GEMMS and node.endswith("/base") and (name := node.removesuffix("/base")) in computing:
                computing[name].append(layer)
    if unknown := next((name for name, found in computing.items() if not found), None):
        raise SliderEditError(
            f"the build log of {title} does not say how {unknown} is computed, so its precision cannot be checked; report this "
            "with the build's versions"
        )
    stored = {name: _STORED[precision] for name, precision in precisions.items()}
    wider = [name for name, found in computing.items() if not all(layer.multiplies(stored[name]) for layer in found)]
    if wider:
        name = wider[0]
        others = f" (and {len(wider) - 1} others)" if len(wider) > 1 else ""
        raise SliderEditError(
            f"{title} would multiply with a wider copy of the {precisions[name]} weight of {name}{others}, made again in every "
            "step; allow more than one batch size with --batch, use --dtype bfloat16, or keep the linear with quantize --keep"
        )
