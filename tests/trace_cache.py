"""Traces that the tests of a run share: a trace takes seconds, and most engines that they build have the same structure."""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor, from_torch_dtype, to_torch_dtype

from slideredit_rt.modules import SliderBackbone

ON_META = "meta"  # stands in a stored graph for the file of a weight that has no values


def structure(backbone: SliderBackbone, config: Any) -> str:
    """A digest of everything that a trace depends on within one run: modules, shapes, dtypes and devices, but no values."""
    described = {
        "family": backbone.family.name,
        # Without the class, the version and the path of the checkpoint.
        "config": {name: value for name, value in dict(config).items() if not name.startswith("_")},
        "modules": str(backbone),
        "adapted": list(backbone.adapted),
        "sliders": [repr(spec) for spec in backbone.slider_specs()],
        "state": [(name, [*t.shape], str(t.dtype), t.device.type) for name, t in backbone.state_dict(keep_vars=True).items()],
    }
    return hashlib.sha256(json.dumps(described, default=repr).encode()).hexdigest()


def store(model: ir.Model, file: Path) -> None:
    """Write a traced graph; weights on the `meta` device keep their dtype and shape."""
    for name, value in model.graph.initializers.items():
        raw = getattr(value.const_value, "raw", None)
        if isinstance(raw, torch.Tensor) and raw.is_meta:
            shape, dtype = ir.Shape(raw.shape), from_torch_dtype(raw.dtype)
            value.const_value = ir.ExternalTensor(ON_META, None, None, dtype, shape=shape, name=name)
    temporary = file.with_suffix(".part")
    temporary.write_bytes(ir.serde.serialize_model(model).SerializeToString())
    temporary.rename(file)


def restore(file: Path) -> ir.Model:
    """Read what `store` wrote, its weights on the `meta` device again."""
    model = ir.serde.deserialize_model(onnx.ModelProto.FromString(file.read_bytes()))
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and tensor.location == ON_META:
            on_meta = torch.empty(tensor.shape.numpy(), dtype=to_torch_dtype(tensor.dtype), device="meta")
            value.const_value = TorchTensor(on_meta, name=name)
    return model


class TraceCache:
    """Traces each structure once and keeps the graphs in a folder that the processes of a run share."""

    def __init__(self, folder: Path, trace: Callable[[SliderBackbone, Any], Any]) -> None:
        self.folder, self.trace = folder, trace

    def __call__(self, backbone: SliderBackbone, config: Any) -> Any:
        file = self.folder / f"{structure(backbone, config)}.onnx"
        # A process that needs the same trace waits for it.
        with file.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not file.exists():
                store(self.trace(backbone, config).model, file)
        return SimpleNamespace(model=restore(file))
