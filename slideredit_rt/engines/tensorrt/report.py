"""What a TensorRT plan takes and holds once it is on a GPU."""

from __future__ import annotations

import collections
import json
from typing import Any


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
