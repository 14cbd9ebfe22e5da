"""What a build and a run of TensorRT and TensorRT-RTX can be told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

HardwareCompatibility = Literal["none", "ampere_plus", "same_compute_capability"]


@dataclass(frozen=True)
class TensorRTOptions:
    """What a build can be told.

    Attributes:
        targets: compute capabilities such as `sm89` that the engine will run on. TensorRT-RTX only, (`sm86`, `sm89`, `sm120`)
            if None; TensorRT builds for the card at hand.
        resolution: usual width and height of the image, in pixels, for a square one.
        max_text_rows: most text rows of a prompt; None takes the family's usual ones.
        optimization_level: the builder's, 0 to 5; None leaves its default.
        workspace_mib: limit of the builder's scratch memory on the device; None leaves its default.
        weight_streaming: allow the runtime to keep part of the weights in host memory.
        version_compatible: later TensorRT versions of the same major run the engine. TensorRT only.
        hardware_compatibility: other cards run the engine, too: `ampere_plus` or `same_compute_capability`. TensorRT only.
        timing_cache: file of earlier builds' measurements, read if it exists and written after the build. TensorRT only.
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
    """How a TensorRT engine is run.

    Attributes:
        weight_budget: bytes of weights that stay on the GPU while the rest is streamed from host memory in every step; `auto`
            fits them to the free memory, None keeps them all. The plan must have been built with weight streaming.
        cuda_graphs: replay one captured CUDA graph per set of shapes.
        specialization: when TensorRT-RTX compiles kernels for a new set of shapes: `lazy` in the background while general ones
            run, `eager` before the first step, or `none`.
        max_contexts: sets of shapes that stay ready; the least recently used goes first.
    """

    weight_budget: int | Literal["auto"] | None = None
    cuda_graphs: bool = True
    specialization: Literal["lazy", "eager", "none"] = "lazy"
    max_contexts: int = 8
