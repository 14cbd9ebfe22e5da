"""Engines: backbones with slider inputs, executed by a backend behind one protocol."""

from __future__ import annotations

from pathlib import Path

import torch

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
    "check_run",
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


def check_run(folder: Path, manifest: Manifest, run: RunSettings) -> torch.device:
    """Check that an engine can be run as the settings say, before anything is loaded; return its device.

    Args:
        folder: Engine folder, for the message.
        manifest: Manifest of the folder.
        run: Device, offload and options of the backend.

    Raises:
        SliderEditError: The backend is unknown or does not take these options, the device does not exist or cannot run the
            engine, or there is nothing to offload from it.
    """
    backend = _backend_of(folder, manifest)
    if run.options is not None:
        backend.check_run_options(run.options)
    device = backend.choose_device(manifest, run)
    run.check_offload(device)
    if run.offload == "all" or backend.weight_budget(run.options) is not None:
        backend.check_streaming(manifest)
    return device


def _backend_of(folder: Path, manifest: Manifest) -> Backend:
    if manifest.backend not in BACKENDS:
        raise SliderEditError(f"engine {str(folder)!r} needs the backend {manifest.backend!r}; known: {', '.join(BACKENDS)}")
    return BACKENDS[manifest.backend]


def open_engine(folder: Path, run: RunSettings | None = None, manifest: Manifest | None = None) -> tuple[Manifest, Engine]:
    """Check an engine folder and load it into its backend.

    Args:
        folder: Folder written by `slideredit-rt build`.
        run: Device, threads and options of the backend; None uses the defaults. `offload` is not used here.
        manifest: Manifest from `read_manifest`; None reads and checks the folder.

    Raises:
        SliderEditError: The engine is damaged or cannot run here, or its backend does not take these options.
    """
    run = run or RunSettings()
    manifest = manifest or read_manifest(folder)
    backend = _backend_of(folder, manifest)
    if run.options is not None:
        backend.check_run_options(run.options)
    return manifest, backend.open(folder, manifest, run)
