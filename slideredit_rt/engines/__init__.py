"""Engines: a backbone with slider inputs, behind one protocol, executed by a backend."""

from __future__ import annotations

from pathlib import Path

from slideredit_rt.engines.backend import Backend, BuildSettings, Engine
from slideredit_rt.engines.inductor import Inductor
from slideredit_rt.engines.manifest import Manifest, read_manifest
from slideredit_rt.engines.onnxruntime import OnnxRuntime
from slideredit_rt.engines.tensorrt import RuntimeOptions, TensorRT, TensorRTRTX
from slideredit_rt.errors import SliderEditError
from slideredit_rt.placement import Placement

__all__ = [
    "BACKENDS",
    "Backend",
    "BuildSettings",
    "Engine",
    "Manifest",
    "RuntimeOptions",
    "get_backend",
    "open_engine",
    "read_manifest",
]

_ALL: tuple[Backend, ...] = (
    Inductor(),
    OnnxRuntime(),
    TensorRT(),
    TensorRTRTX(),
)
BACKENDS: dict[str, Backend] = {backend.name: backend for backend in _ALL}

MAX_THREADS = 1024
"""More than a machine has cores. A backend starts all of them at once, and the system may refuse."""


def get_backend(name: str) -> Backend:
    """Return the backend called `name`."""
    if name not in BACKENDS:
        raise SliderEditError(f"unknown backend {name!r}; known: {', '.join(BACKENDS)}")
    return BACKENDS[name]


def open_engine(
    folder: Path,
    *,
    threads: int | None = None,
    options: RuntimeOptions | None = None,
    placement: Placement | None = None,
) -> tuple[Manifest, Engine]:
    """Check an engine folder and load it into its backend.

    Args:
        folder: written by `slideredit-rt build`.
        threads: CPU threads of the backend; None leaves the choice to it.
        options: of the TensorRT backends; None takes their defaults.
        placement: the device; None takes the one that the backend prefers.

    Raises:
        SliderEditError: a damaged engine, one that cannot run here, or options that its backend does not have.
    """
    if threads is not None and not 1 <= threads <= MAX_THREADS:
        raise SliderEditError(
            f"{threads} CPU threads were asked for; give 1 to {MAX_THREADS}, or leave the choice to the backend"
        )
    manifest = read_manifest(folder)
    backend = BACKENDS.get(manifest.backend)
    if backend is None:
        raise SliderEditError(f"engine {str(folder)!r} needs the backend {manifest.backend!r}; known: {', '.join(BACKENDS)}")
    if options is not None and (backend.run_options is None or not isinstance(options, backend.run_options)):
        raise SliderEditError(
            f"engine {str(folder)!r} runs in {manifest.backend}, which takes neither a weight budget nor a choice of "
            "CUDA graphs; leave these options out"
        )
    return manifest, backend.open(folder, manifest, threads=threads, options=options, placement=placement)
