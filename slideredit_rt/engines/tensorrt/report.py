"""What a TensorRT plan takes and holds once it is on a GPU."""

from __future__ import annotations

import collections
import json
from importlib import import_module
from pathlib import Path
from typing import Any

from slideredit_rt.engines.manifest import Manifest
from slideredit_rt.engines.tensorrt.engine import PACKAGES, open_tensorrt


def engine_report(folder: Path, manifest: Manifest) -> dict[str, Any]:
    """Load a plan onto the current CUDA device and describe it (see `describe_plan`).

    Args:
        folder: with `model.engine`.
        manifest: of that folder.

    Raises:
        SliderEditError: it cannot run here: no GPU or another one, package missing or of another version, damaged plan.
    """
    with open_tensorrt(folder, manifest) as engine:
        return describe_plan(import_module(PACKAGES[manifest.backend]), engine.plan)


def describe_plan(trt: Any, plan: Any) -> dict[str, Any]:
    """Memory and layers of a deserialized plan.

    Args:
        trt: the module `tensorrt` or `tensorrt_rtx`.
        plan: its `ICudaEngine`.

    Returns:
        `weight_bytes`, and `streamable_weight_bytes` of them that need not stay in device memory; `context_bytes`, the device
        memory of an execution context at the profile's largest sizes; `layers`, how many after fusion; `layer_types`, how many
        of each, empty for a plan that was built without detailed profiling verbosity and tells nothing but names.
    """
    information = json.loads(plan.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON))
    types = [layer["LayerType"] for layer in information.get("Layers", []) if isinstance(layer, dict)]
    return {
        "weight_bytes": plan.get_engine_stat(trt.EngineStat.TOTAL_WEIGHTS_SIZE),
        "streamable_weight_bytes": plan.streamable_weights_size,
        "context_bytes": plan.get_device_memory_size_for_profile_v2(0),
        "layers": plan.num_layers,
        "layer_types": dict(collections.Counter(types)),
    }
