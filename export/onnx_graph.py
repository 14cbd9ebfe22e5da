"""The ONNX graph of a slider backbone: standard operators plus one `slideredit::MaskedLoRALinear` node per adapted linear.

The module `lowering` replaces these nodes before the graph is written.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnx
import onnxscript
import torch
from torch.export import Dim

from slideredit_rt.export.lowering import DOMAIN, LINEAR
from slideredit_rt.modules import SliderBackbone

OPSET = 20


def _schema() -> onnx.defs.OpSchema:
    parameter, optional = onnx.defs.OpSchema.FormalParameter, onnx.defs.OpSchema.FormalParameterOption.Optional
    names = ("x", "weight", "bias", "lora_a", "lora_b", "row_scale")
    kinds = [
        parameter(n, "S" if n == "row_scale" else "T", **({"param_option": optional} if n == "bias" else {})) for n in names
    ]
    floats = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]
    constraints = [("T", floats, "the backbone's dtype"), ("S", ["tensor(float)"], "float32")]
    return onnx.defs.OpSchema(LINEAR, DOMAIN, 1, inputs=kinds, outputs=[parameter("y", "T")], type_constraints=constraints)


_linear = onnxscript.values.Op(onnxscript.values.Opset(DOMAIN, 1), LINEAR, _schema())


def _translate(x, weight, bias, lora_a, lora_b, row_scale):  # type: ignore[no-untyped-def]
    return _linear(x, weight, bias, lora_a, lora_b, row_scale)


def _dynamic_shapes(backbone: SliderBackbone, config: Any) -> dict[str, dict[int, Any]]:
    dims = {name: Dim(name, min=1) for name in ("batch", "text_rows", "image_rows", "sliders")}
    # A sum of two dimensions cannot be declared, so the exporter has to derive it from the graph.
    dims["rows"] = Dim.DYNAMIC
    specs = backbone.family.input_specs(config) + backbone.slider_specs()
    return {s.name: {i: dims[axis] for i, axis in enumerate(s.shape) if isinstance(axis, str)} for s in specs}


def example_inputs(
    backbone: SliderBackbone, config: Any, batch: int, text_rows: int, image_rows: int, sliders: int, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Make random backbone inputs with random alphas and masks.

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
    specs = [*backbone.family.input_specs(config), *backbone.slider_specs()]
    device = next(backbone.parameters()).device
    inputs = {spec.name: inputs[spec.name].to(device) for spec in specs}
    with _quiet_exporter():
        program = _export(backbone, config, inputs)
    assert program is not None
    return program


def _export(backbone: SliderBackbone, config: Any, inputs: dict[str, torch.Tensor]) -> torch.onnx.ONNXProgram | None:
    return torch.onnx.export(
        backbone.eval(),
        kwargs={"inputs": inputs},
        dynamo=True,
        optimize=False,
        opset_version=OPSET,
        input_names=list(inputs),
        output_names=[backbone.family.output_spec(config).name],
        dynamic_shapes={"inputs": _dynamic_shapes(backbone, config)},
        custom_translation_table={torch.ops.slideredit.masked_lora_linear.default: _translate},
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
