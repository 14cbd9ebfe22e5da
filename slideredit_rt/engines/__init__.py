"""Engines: a backbone with slider inputs, behind one protocol, executed by a backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor

from slideredit_rt.engines.inductor import open_inductor
from slideredit_rt.engines.manifest import Manifest, read_manifest
from slideredit_rt.engines.onnxruntime import OnnxRuntimeEngine
from slideredit_rt.engines.tensorrt.engine import PACKAGES, RuntimeOptions, open_tensorrt
from slideredit_rt.errors import SliderEditError

__all__ = ["BACKENDS", "Engine", "Manifest", "RuntimeOptions", "open_engine", "read_manifest"]


class Engine(Protocol):
    """A backbone that runs one denoising step. Any number of threads may call it at the same time."""

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """One prediction.

        Args:
            inputs: the tensors that the manifest lists, `alpha` and `token_mask` among them.

        Returns:
            `[B, image_rows, C]`, valid until the same thread's next call with the same shapes.
        """
        ...


BACKENDS: dict[str, Callable[..., Engine]] = {
    "inductor": open_inductor,
    "onnxruntime": OnnxRuntimeEngine,
    "tensorrt": open_tensorrt,
    "tensorrt-rtx": open_tensorrt,
}


MAX_THREADS = 1024
"""More than a machine has cores. A backend starts all of them at once, and the system may refuse."""


def open_engine(folder: Path, *, threads: int | None = None, options: RuntimeOptions | None = None) -> tuple[Manifest, Engine]:
    """Check an engine folder and load it into its backend.

    Args:
        folder: written by `slideredit-rt build`.
        threads: CPU threads of the backend; None leaves the choice to it.
        options: of the TensorRT backends; None takes their defaults.

    Raises:
        SliderEditError: a damaged engine, one that cannot run here, or options that its backend does not have.
    """
    if threads is not None and not 1 <= threads <= MAX_THREADS:
        raise SliderEditError(
            f"{threads} CPU threads were asked for; give 1 to {MAX_THREADS}, or leave the choice to the backend"
        )
    manifest = read_manifest(folder)
    if manifest.backend not in BACKENDS:
        raise SliderEditError(f"engine {str(folder)!r} needs the backend {manifest.backend!r}; known: {', '.join(BACKENDS)}")
    if options is None:
        return manifest, BACKENDS[manifest.backend](folder, manifest, threads=threads)
    if manifest.backend not in PACKAGES:
        raise SliderEditError(
            f"engine {str(folder)!r} runs in {manifest.backend}, which takes neither a weight budget nor a choice of "
            "CUDA graphs; leave these options out"
        )
    return manifest, open_tensorrt(folder, manifest, threads=threads, options=options)
