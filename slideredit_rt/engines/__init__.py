"""Engines: backbones with slider inputs, executed by a backend behind one protocol."""

from __future__ import annotations

from pathlib import Path

from slideredit_rt.engines.backend import Backend, BuildSettings, Engine
from slideredit_rt.engines.inductor import Inductor
from slideredit_rt.engines.manifest import Manifest, read_manifest
from slideredit_rt.engines.onnxruntime import OnnxRuntime
from slideredit_rt.engines.tensorrt import RuntimeOptions, TensorRT, TensorRTRTX
from slideredit_rt.errors import SliderEditError
from slideredit_rt.settings import RunSettings

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


def get_backend(name: str) -> Backend:
    """Return the backend named `name`.

    Raises:
        SliderEditError: There is no such backend.
    """
    if name not in BACKENDS:
        raise SliderEditError(f"unknown backend {name!r}; known: {', '.join(BACKENDS)}")
    return BACKENDS[name]


def open_engine(folder: Path, run: RunSettings | None = None) -> tuple[Manifest, Engine]:
    """Check an engine folder and load it into its backend.

    Args:
        folder: Folder written by `slideredit-rt build`.
        run: Device, threads and options of the backend; None uses the defaults.

    Raises:
        SliderEditError: The engine is damaged or cannot run here, or its backend does not take these options.
    """
    run = run or RunSettings()
    manifest = read_manifest(folder)
    backend = BACKENDS.get(manifest.backend)
    if backend is None:
        raise SliderEditError(f"engine {str(folder)!r} needs the backend {manifest.backend!r}; known: {', '.join(BACKENDS)}")
    if run.options is not None:
        backend.check_run_options(run.options)
    return manifest, backend.open(folder, manifest, run)
