"""The ONNX graph of a slider backbone: standard operators plus nodes of this package.

These are one `slideredit::MaskedLoRALinear` node per adapted linear, one `QuantizedLinear` node per quantised one, and one
`MaskedLoRAUpdate` node beside a quantised linear that is adapted. The modules `lowering` and `quantised` replace them before
the graph is written.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import onnx
import onnxscript
import torch
from torch import nn
from torch.export import Dim

from slideredit_rt.adapters.inputs import is_adapter_input
from slideredit_rt.export.nodes import DOMAIN, LINEAR, QUANTIZED_LINEAR, UPDATE
from slideredit_rt.modules import SliderBackbone

OPSET = 20


_FLOATS = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]
_TYPES = {
    "T": (_FLOATS, "the backbone's dtype"),
    "S": (["tensor(float)"], "float32"),
    "Q": (["tensor(float8e4m3fn)", "tensor(int8)", "tensor(uint8)"], "a stored weight"),
    "R": (["tensor(float)", "tensor(float8e4m3fn)"], "scales of a stored weight"),
}
"""Types of inputs by the letter that schemas use, and their descriptions."""
_LOW_RANK = {"lora_a": "T", "lora_b": "T", "row_scale": "S"}
_PARTS = {"weight": "Q", "weight_scale": "R", "weight_scale_2": "S", "input_scale": "S"}


def _operator(name: str, inputs: dict[str, str], *, optional: Collection[str] = (), attributes: Collection[str] = ()) -> Any:
    """Define a node with one output of the first input's type.

    Args:
        name: Type of the node.
        inputs: Type of each input, a key of `_TYPES`, by name.
        optional: Inputs that may be left out.
        attributes: Names of attributes, all strings.
    """
    parameter, left_out = onnx.defs.OpSchema.FormalParameter, onnx.defs.OpSchema.FormalParameterOption.Optional
    string = onnx.defs.OpSchema.AttrType.STRING
    schema = onnx.defs.OpSchema(
        name,
        DOMAIN,
        1,
        inputs=[parameter(n, kind, **({"param_option": left_out} if n in optional else {})) for n, kind in inputs.items()],
        outputs=[parameter("y", "T")],
        type_constraints=[(letter, *_TYPES[letter]) for letter in dict.fromkeys(inputs.values())],
        attributes=[onnx.defs.OpSchema.Attribute(attribute, string) for attribute in attributes],
    )
    return onnxscript.values.Op(onnxscript.values.Opset(DOMAIN, 1), name, schema)


_linear = _operator(LINEAR, {"x": "T", "weight": "T", "bias": "T", **_LOW_RANK}, optional=["bias"])
_update = _operator(UPDATE, {"y": "T", "x": "T", **_LOW_RANK})
_quantized = _operator(
    QUANTIZED_LINEAR,
    {"x": "T", **_PARTS, "bias": "T"},
    optional=["weight_scale_2", "input_scale", "bias"],
    attributes=["precision"],
)


def _translate_linear(x, weight, bias, lora_a, lora_b, row_scale):  # type: ignore[no-untyped-def]
    return _linear(x, weight, bias, lora_a, lora_b, row_scale)


def _translate_update(y, x, lora_a, lora_b, row_scale):  # type: ignore[no-untyped-def]
    return _update(y, x, lora_a, lora_b, row_scale)


def _translate_quantized(x, weight, weight_scale, weight_scale_2, input_scale, bias, precision):  # type: ignore[no-untyped-def]
    return _quantized(x, weight, weight_scale, weight_scale_2, input_scale, bias, precision=precision)


_TRANSLATIONS: dict[Any, Callable[..., Any]] = {
    torch.ops.slideredit.masked_lora_linear.default: _translate_linear,
    torch.ops.slideredit.masked_lora_update.default: _translate_update,
    torch.ops.slideredit.quantized_linear.default: _translate_quantized,
}


def _dynamic_shapes(backbone: SliderBackbone, config: Any) -> dict[str, dict[int, Any]]:
    specs = backbone.family.input_specs(config) + backbone.slider_specs()
    dims: dict[str, Any] = {axis: Dim(axis, min=1) for spec in specs for axis in spec.shape if isinstance(axis, str)}
    # A sum of two dimensions cannot be declared, so the exporter has to derive it from the graph.
    dims["rows"] = Dim.DYNAMIC
    return {s.name: {i: dims[axis] for i, axis in enumerate(s.shape) if isinstance(axis, str)} for s in specs}


def example_inputs(
    backbone: SliderBackbone, config: Any, batch: int, text_rows: int, image_rows: int, sliders: int, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Make random backbone inputs with random alphas, masks and adapter inputs.

    Each row belongs to at most one slider. For a bank, whose members may share rows, it belongs to any number of sliders.

    Args:
        backbone: Backbone with or without an adapter.
        config: Configuration of the transformer.
        batch: B.
        text_rows: Number of text rows.
        image_rows: Number of image rows.
        sliders: K.
        seed: Seed of the random numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs = backbone.family.random_inputs(config, batch, text_rows, image_rows, generator)
    sizes = {"batch": batch, "sliders": sliders, "text_rows": text_rows, "rows": text_rows + image_rows}
    for spec in backbone.slider_specs():
        shape = spec.resolve(sizes)
        if spec.name == "alpha":
            inputs["alpha"] = torch.rand(shape, generator=generator) * 2 - 1
        elif is_adapter_input(spec.name):
            inputs[spec.name] = 0.1 * torch.randn(shape, generator=generator)
        elif backbone.members:
            inputs["token_mask"] = torch.rand(shape, generator=generator) < 0.5
        else:
            owner = torch.randint(0, sliders + 1, (batch, 1, shape[2]), generator=generator)
            inputs["token_mask"] = owner == torch.arange(sliders)[None, :, None]
    return inputs


def trace(backbone: SliderBackbone, config: Any) -> torch.onnx.ONNXProgram:
    """Trace the backbone to an ONNX program with dynamic batch, text rows, image rows and sliders.

    Args:
        backbone: Backbone with or without an adapter, with real weights or on the `meta` device.
        config: Configuration of the transformer.

    Returns:
        The traced program. Constants are not folded, because that needs the weights' values, and its slider nodes are not
        lowered.
    """
    # All sizes differ, so that tracing cannot confuse the axes.
    inputs = example_inputs(backbone, config, batch=2, text_rows=11, image_rows=24, sliders=3)
    parameter = next(backbone.transformer.parameters())
    dtype = str(parameter.dtype).removeprefix("torch.")
    specs = [*backbone.family.input_specs(config, dtype), *backbone.slider_specs()]
    inputs = {spec.name: inputs[spec.name].to(parameter.device, getattr(torch, spec.dtype)) for spec in specs}
    with _quiet_exporter():
        program = _export(backbone, config, inputs)
    assert program is not None
    return program


class _Graph(nn.Module):
    """A backbone with all outputs of its family. The parameters have the same names as the backbone's."""

    def __init__(self, backbone: SliderBackbone) -> None:
        super().__init__()
        self.transformer = backbone.transformer
        self.outputs = backbone.outputs

    def forward(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return self.outputs(inputs)


def _export(backbone: SliderBackbone, config: Any, inputs: dict[str, torch.Tensor]) -> torch.onnx.ONNXProgram | None:
    return torch.onnx.export(
        _Graph(backbone.eval()),
        kwargs={"inputs": inputs},
        dynamo=True,
        optimize=False,
        opset_version=OPSET,
        input_names=list(inputs),
        output_names=[spec.name for spec in backbone.family.output_specs(config)],
        dynamic_shapes={"inputs": _dynamic_shapes(backbone, config)},
        custom_translation_table=_TRANSLATIONS,
        verbose=False,
    )


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Hide the exporter's warnings about packages that are not used here."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
