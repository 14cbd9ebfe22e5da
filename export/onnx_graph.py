"""The ONNX graph of a slider backbone: standard operators plus one `slideredit::MaskedLoRA` node per adapted linear.

The node is an ONNX local function. A runtime that does not know it runs its body; a TensorRT plugin can take its place.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import onnxscript
import torch
from onnxscript import opset20 as op
from torch.export import Dim

from slideredit_rt.modules import SliderBackbone

DOMAIN = "slideredit"
OPSET = 20
MODEL_FILE = "model.onnx"
WEIGHTS_FILE = "model.onnx.data"
_T = onnxscript.onnx_types.TensorType
_slideredit = onnxscript.values.Opset(DOMAIN, 1)


@onnxscript.script(_slideredit, default_opset=op)
def MaskedLoRA(y: _T, x: _T, lora_a: _T, lora_b: _T, row_scale: _T) -> _T:  # type: ignore  # noqa: N802
    """`y + row_scale · (x Aᵀ) Bᵀ`; y `[B, S, N]`, x `[B, S, K]`, A `[R, K]`, B `[N, R]`, row_scale float32 `[B, S]`."""
    low = op.MatMul(x, op.Transpose(lora_a, perm=[1, 0]))
    scale = op.Unsqueeze(row_scale, op.Constant(value_ints=[-1]))
    # Scaling the R-wide product instead of the N-wide one costs R/N of the multiplications.
    scaled = op.CastLike(op.Mul(op.CastLike(low, scale), scale), lora_b)
    update = op.MatMul(scaled, op.Transpose(lora_b, perm=[1, 0]))
    return op.Add(y, op.CastLike(update, y))  # type: ignore[no-any-return]


def _schema() -> onnx.defs.OpSchema:
    names = ("y", "x", "lora_a", "lora_b", "row_scale")
    parameter = onnx.defs.OpSchema.FormalParameter
    kinds = [parameter(name, "S" if name == "row_scale" else "T") for name in names]
    floats = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]
    constraints = [("T", floats, "the backbone's dtype"), ("S", ["tensor(float)"], "float32")]
    outputs = [parameter("output", "T")]
    return onnx.defs.OpSchema("MaskedLoRA", DOMAIN, 1, inputs=kinds, outputs=outputs, type_constraints=constraints)


_masked_lora_node = onnxscript.values.Op(_slideredit, "MaskedLoRA", _schema())


def _translate(x, weight, bias, lora_a, lora_b, row_scale):  # type: ignore[no-untyped-def]
    y = op.MatMul(x, op.Transpose(weight, perm=[1, 0]))
    if bias is not None:
        y = op.Add(y, bias)
    return _masked_lora_node(y, x, lora_a, lora_b, row_scale)


def _dynamic_shapes(backbone: SliderBackbone, config: Any) -> dict[str, dict[int, Any]]:
    dims = {name: Dim(name, min=1) for name in ("batch", "text_rows", "image_rows", "sliders")}
    # A sum of two dimensions cannot be declared; the exporter derives it from the graph.
    dims["rows"] = Dim.DYNAMIC
    specs = backbone.family.input_specs(config) + backbone.slider_specs()
    return {s.name: {i: dims[axis] for i, axis in enumerate(s.shape) if isinstance(axis, str)} for s in specs}


def example_inputs(
    backbone: SliderBackbone, config: Any, batch: int, text_rows: int, image_rows: int, sliders: int, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Random backbone inputs with random alphas and masks in which each row belongs to at most one slider."""
    generator = torch.Generator().manual_seed(seed)
    inputs = backbone.family.random_inputs(config, batch, text_rows, image_rows, generator)
    sizes = {"batch": batch, "sliders": sliders, "text_rows": text_rows, "rows": text_rows + image_rows}
    for spec in backbone.slider_specs():
        shape = spec.resolve(sizes)
        if spec.name == "alpha":
            inputs["alpha"] = torch.rand(shape, generator=generator) * 2 - 1
        else:
            owner = torch.randint(0, sliders + 1, (batch, 1, shape[2]), generator=generator)
            inputs["token_mask"] = owner == torch.arange(sliders)[None, :, None]
    return inputs


def trace(backbone: SliderBackbone, config: Any, *, optimize: bool = True) -> torch.onnx.ONNXProgram:
    """The backbone as an ONNX program whose batch, text rows, image rows and sliders are dynamic.

    Args:
        backbone: with or without an adapter, its weights real or on the `meta` device.
        config: the transformer's configuration.
        optimize: let the exporter fold constants; it cannot without the weights' values.

    Returns:
        A program without the body of `MaskedLoRA`, which `add_body` puts in: functions do not survive an optimiser.
    """
    # Sizes that differ from each other, so that tracing cannot mistake one axis for another.
    inputs = example_inputs(backbone, config, batch=2, text_rows=11, image_rows=24, sliders=3)
    specs = [*backbone.family.input_specs(config), *backbone.slider_specs()]
    device = next(backbone.parameters()).device
    inputs = {spec.name: inputs[spec.name].to(device) for spec in specs}
    program = torch.onnx.export(
        backbone.eval(),
        kwargs={"inputs": inputs},
        dynamo=True,
        optimize=optimize,
        opset_version=OPSET,
        input_names=list(inputs),
        output_names=[backbone.family.output_spec(config).name],
        dynamic_shapes={"inputs": _dynamic_shapes(backbone, config)},
        custom_translation_table={torch.ops.slideredit.masked_lora_linear.default: _translate},
        verbose=False,
    )
    assert program is not None
    return program


def add_body(model: onnx_ir.Model) -> None:
    """Give the `slideredit::MaskedLoRA` nodes of a model their body."""
    body = onnx_ir.serde.deserialize_function(MaskedLoRA.to_function_proto())
    model.functions[body.identifier()] = body
    model.opset_imports[DOMAIN] = 1


def export_onnx(backbone: SliderBackbone, config: Any, folder: Path) -> list[str]:
    """Write `model.onnx` and its weights as external data into `folder`.

    Args:
        backbone: float32, on the CPU; with or without an adapter.
        config: the transformer's configuration.
        folder: an existing folder.

    Returns:
        The names of the files written. Batch, text rows, image rows and sliders are dynamic in the graph.
    """
    program = trace(backbone, config)
    if backbone.kind is not None:
        add_body(program.model)
    path = folder / MODEL_FILE
    program.save(path, external_data=True)
    onnx.checker.check_model(path)
    return [path.name, WEIGHTS_FILE]
