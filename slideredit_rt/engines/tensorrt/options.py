"""Build and run options of TensorRT and TensorRT-RTX."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

HardwareCompatibility = Literal["none", "ampere_plus", "same_compute_capability"]


@dataclass(frozen=True)
class TensorRTOptions:
    """Build options.

    Attributes:
        targets: Compute capabilities that the engine will run on, such as `sm89`. TensorRT-RTX only; None means `sm86`, `sm89`
            and `sm120`. TensorRT builds for this machine's GPU.
        resolution: Usual width and height of a square image, in pixels.
        max_text_rows: Most text rows of a prompt; None takes the family's usual number.
        optimization_level: Optimization level of the builder, 0 to 5; None keeps its default.
        workspace_mib: Limit of the builder's scratch memory on the device, in MiB; None keeps its default.
        weight_streaming: Allow the runtime to keep a part of the weights in host memory.
        version_compatible: Let later TensorRT versions of the same major run the engine. TensorRT only.
        hardware_compatibility: Let other GPUs run the engine: `ampere_plus` or `same_compute_capability`. TensorRT only.
        timing_cache: File with timings of earlier builds, read if it exists and written after the build. TensorRT only.
    """

    targets: tuple[str, ...] | None = None
    resolution: int = 1024
    max_text_rows: int | None = None
    optimization_level: int | None = None
    workspace_mib: int | None = None
    weight_streaming: bool = False
    version_compatible: bool = False
    hardware_compatibility: HardwareCompatibility = "none"
    timing_cache: Path | None = None


@dataclass(frozen=True)
class RuntimeOptions:
    """Run options.

    Attributes:
        weight_budget: Bytes of weights to keep on the GPU; the rest is streamed from host memory in every step. `auto` fits
            them to the free memory, None keeps all. The plan must have been built with weight streaming.
        cuda_graphs: Replay one captured CUDA graph per set of shapes.
        specialization: Time at which TensorRT-RTX compiles kernels for a new set of shapes: `lazy` in the background while
            general kernels run, `eager` before the first step, or `none`.
        max_contexts: Number of sets of shapes to keep ready; the least recently used is dropped first.
    """

    weight_budget: int | Literal["auto"] | None = None
    cuda_graphs: bool = True
    specialization: Literal["lazy", "eager", "none"] = "lazy"
    max_contexts: int = 8
