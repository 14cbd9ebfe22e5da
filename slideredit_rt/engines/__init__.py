"""Engines: a backbone with slider inputs, behind one protocol, executed by a backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor

from slideredit_rt.engines.manifest import Manifest, read_manifest
from slideredit_rt.engines.onnxruntime import OnnxRuntimeEngine
from slideredit_rt.engines.tensorrt import TensorRTEngine
from slideredit_rt.errors import SliderEditError

__all__ = ["BACKENDS", "Engine", "Manifest", "open_engine", "read_manifest"]


class Engine(Protocol):
    """A backbone that runs one denoising step."""

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """One prediction.

        Args:
            inputs: the tensors that the manifest lists, `alpha` and `token_mask` among them.

        Returns:
            `[B, image_rows, C]`, valid until the next call with the same shapes.
        """
        ...


BACKENDS: dict[str, Callable[..., Engine]] = {"onnxruntime": OnnxRuntimeEngine, "tensorrt-rtx": TensorRTEngine}


def open_engine(folder: Path, *, threads: int | None = None) -> tuple[Manifest, Engine]:
    """Check an engine folder and load it into its backend.

    Args:
        folder: written by `slideredit-rt build`.
        threads: CPU threads of the backend; None leaves the choice to it.
    """
    manifest = read_manifest(folder)
    if manifest.backend not in BACKENDS:
        raise SliderEditError(f"engine {str(folder)!r} needs the backend {manifest.backend!r}; known: {', '.join(BACKENDS)}")
    return manifest, BACKENDS[manifest.backend](folder, manifest, threads=threads)
