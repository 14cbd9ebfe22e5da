"""The tensors of a call: whether they are what an engine takes, the same sentences for every backend, and its output."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import torch
from torch import Tensor

from slideredit_rt.engines.manifest import Manifest
from slideredit_rt.engines.shapes import ShapeCache
from slideredit_rt.errors import SliderEditError


def check_request(manifest: Manifest, inputs: Mapping[str, Tensor]) -> dict[str, int]:
    """Compare a call's tensors with the manifest.

    Args:
        manifest: its `inputs` give names, dtypes and shapes; its `ranges`, or `max_batch` and `max_sliders`, the limits.
        inputs: on any device.

    Returns:
        The size of each named axis.

    Raises:
        SliderEditError: a tensor is missing, has another dtype or layout, contradicts another one, or is outside the limits.
    """
    sizes: dict[str, int] = {}
    for spec in manifest.inputs:
        tensor = inputs.get(spec.name)
        if tensor is None:
            raise SliderEditError(f"engine input {spec.name!r} is missing; it takes {[s.name for s in manifest.inputs]}")
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
                f"the engine was built for {low} to {high} in the axis {axis!r}, got {size}; build it with more room"
            )
    return sizes


class Outputs(threading.local):
    """One thread's output tensors, one for each set of shapes: no other thread writes them, and they stay where they are.

    Args:
        most: sets of shapes; the least recently used goes first.
    """

    def __init__(self, most: int) -> None:
        self._tensors: ShapeCache[Tensor] = ShapeCache(most)

    def of(self, manifest: Manifest, sizes: Mapping[str, int], inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the output for a call, on the device of its inputs, to be filled before another thread's turn comes.

        Called on the caller's CUDA stream, to which its memory then belongs: the engine's stream waits for that one and the
        other way round.

        Args:
            manifest: the engine's.
            sizes: from `check_request`.
            inputs: of the call.

        Raises:
            SliderEditError: the device's memory is used up.
        """
        spec, device = manifest.outputs[0], inputs[manifest.inputs[0].name].device
        shape = spec.resolve(sizes)
        try:
            return self._tensors.get(
                (shape, device), lambda: torch.empty(shape, dtype=getattr(torch, spec.dtype), device=device)
            )
        except torch.OutOfMemoryError:
            raise SliderEditError(
                f"the GPU has no memory left for the sizes {dict(sizes)}; use a smaller batch or resolution"
            ) from None
