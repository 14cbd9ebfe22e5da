"""Engines: backbones with slider inputs, executed by a backend behind one protocol."""

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
"""Largest accepted number of CPU threads, more than the cores of any machine. Backends start all threads at once."""


def get_backend(name: str) -> Backend:
    """Return the backend named `name`.

    Raises:
        SliderEditError: there is no such backend.
    """
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
        folder: folder written by `slideredit-rt build`.
        threads: CPU threads of the backend; None lets the backend choose.
        options: run options, an instance of the backend's `run_options`; None uses its defaults.
        placement: device to run on; None lets the backend choose.

    Raises:
        SliderEditError: the engine is damaged or cannot run here, or its backend does not take these options.
    """
    if threads is not None and not 1 <= threads <= MAX_THREADS:
        raise SliderEditError(
            f"cannot use {threads} CPU threads; pass 1 to {MAX_THREADS}, or omit it to let the backend choose"
        )
    manifest = read_manifest(folder)
    backend = BACKENDS.get(manifest.backend)
    if backend is None:
        raise SliderEditError(f"engine {str(folder)!r} needs the backend {manifest.backend!r}; known: {', '.join(BACKENDS)}")
    if options is not None:
        backend.check_run_options(options)
    return manifest, backend.open(folder, manifest, threads=threads, options=options, placement=placement)
