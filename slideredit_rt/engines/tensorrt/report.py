"""Memory and layers of a TensorRT plan on a GPU."""

from __future__ import annotations

import collections
import json
from typing import Any


def describe_plan(trt: Any, plan: Any) -> dict[str, Any]:
    """Describe the memory and layers of a deserialized plan.

    Args:
        trt: The module `tensorrt` or `tensorrt_rtx`.
        plan: The plan's `ICudaEngine`.

    Returns:
        `weight_bytes`, all weights; `streamable_weight_bytes`, the part that need not stay in device memory; `context_bytes`,
        the device memory of an execution context at the profiles' largest sizes; `layers`, their number after fusion;
        `layer_types`, the number by type, empty for a plan that was built without detailed profiling verbosity.
    """
    information = json.loads(plan.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON))
    types = [layer["LayerType"] for layer in information.get("Layers", []) if isinstance(layer, dict)]
    return {
        "weight_bytes": plan.get_engine_stat(trt.EngineStat.TOTAL_WEIGHTS_SIZE),
        "streamable_weight_bytes": plan.streamable_weights_size,
        "context_bytes": max(map(plan.get_device_memory_size_for_profile_v2, range(plan.num_optimization_profiles))),
        "layers": plan.num_layers,
        "layer_types": dict(collections.Counter(types)),
    }
