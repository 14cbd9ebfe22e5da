"""Validation of an engine call's inputs, with the same messages for every backend, and its output buffers."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import torch
from torch import Tensor

from slideredit_rt.engines.manifest import Manifest
from slideredit_rt.engines.shapes import ShapeCache
from slideredit_rt.errors import OutOfDeviceMemory, SliderEditError


def check_request(manifest: Manifest, inputs: Mapping[str, Tensor]) -> dict[str, int]:
    """Check a call's inputs against the manifest.

    Args:
        manifest: Manifest of the engine; `inputs` gives names, dtypes and shapes, `ranges` or else `max_batch` and
            `max_sliders` give the limits.
        inputs: Tensors by name, on any device.

    Returns:
        The size of each named axis.

    Raises:
        SliderEditError: A tensor is missing, has the wrong dtype or layout, contradicts another one, or exceeds the limits.
    """
    sizes: dict[str, int] = {}
    for spec in manifest.inputs:
        tensor = inputs.get(spec.name)
        if tensor is None:
            raise SliderEditError(f"engine input {spec.name!r} is missing; expected {[s.name for s in manifest.inputs]}")
        if tensor.dtype != getattr(torch, spec.dtype) or tensor.ndim != len(spec.shape) or not tensor.is_contiguous():
            raise SliderEditError(
                f"engine input {spec.name!r} must be contiguous {spec.dtype} {list(spec.shape)}, "
                f"got {tensor.dtype} {list(tensor.shape)}"
            )
        for axis, size in zip(spec.shape, tensor.shape, strict=True):
            if (axis if isinstance(axis, int) else sizes.setdefault(axis, size)) != size:
                raise SliderEditError(
                    f"engine input {spec.name!r} has shape {list(tensor.shape)}, expected {list(spec.shape)} with {sizes}"
                )
    if "rows" in sizes and sizes["rows"] != sizes["text_rows"] + sizes["image_rows"]:
        raise SliderEditError(
            f"engine input 'token_mask' covers {sizes['rows']} rows, expected {sizes['text_rows']} text rows "
            f"and {sizes['image_rows']} image rows"
        )
    limits = manifest.ranges or {"batch": [1, 1, manifest.max_batch], "sliders": [1, 1, manifest.max_sliders]}
    for axis, size in sizes.items():
        low, _, high = limits.get(axis, [size] * 3)
        if not low <= size <= high:
            raise SliderEditError(
                f"the engine was built for {low} to {high} in the axis {axis!r}, got {size}; rebuild it with a wider range"
            )
    return sizes


def reading_request(manifest: Manifest, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the inputs of a call that reads source images, with all sliders off.

    Args:
        manifest: Manifest of the engine.
        inputs: Result of `Family.read_inputs`, with the adapter inputs of an engine that has them.
    """
    sizes = {"batch": 1, "sliders": 1, "text_rows": inputs["encoder_hidden_states"].shape[1]}
    sizes["rows"] = sizes["text_rows"] + inputs["hidden_states"].shape[1]
    device = inputs["hidden_states"].device
    off = {
        spec.name: torch.zeros(spec.resolve(sizes), dtype=getattr(torch, spec.dtype), device=device)
        for spec in manifest.inputs
        if spec.name in ("alpha", "token_mask")
    }
    return {**inputs, **off}


class Outputs(threading.local):
    """Output tensors of one thread, one for each set of shapes. Their addresses are fixed and no other thread writes them.

    Args:
        most: Number of sets of shapes to keep; the least recently used is dropped first.
    """

    def __init__(self, most: int) -> None:
        self._tensors: ShapeCache[Tensor] = ShapeCache(most)

    def of(self, manifest: Manifest, sizes: Mapping[str, int], inputs: Mapping[str, Tensor], index: int = 0) -> Tensor:
        """Return the output tensor for a call, on the device of its inputs. The caller fills it before releasing its lock.

        Call it on the caller's CUDA stream, so that the memory belongs to that stream; the engine's stream waits for it and
        vice versa.

        Args:
            manifest: Manifest of the engine.
            sizes: Result of `check_request`.
            inputs: Inputs of the call.
            index: Index of the output in the manifest.

        Raises:
            SliderEditError: The device is out of memory.
        """
        spec, device = manifest.outputs[index], inputs[manifest.inputs[0].name].device
        shape = spec.resolve(sizes)
        try:
            return self._tensors.get(
                (shape, device), lambda: torch.empty(shape, dtype=getattr(torch, spec.dtype), device=device)
            )
        except torch.OutOfMemoryError:
            raise OutOfDeviceMemory(
                f"the GPU is out of memory for the sizes {dict(sizes)}; use a smaller batch or resolution"
            ) from None
