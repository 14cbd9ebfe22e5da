"""Validation of an engine call's inputs, with the same messages for every backend, and its output buffers."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from slideredit_rt.adapters.inputs import is_adapter_input
from slideredit_rt.engines.manifest import Manifest
from slideredit_rt.engines.shapes import ShapeCache
from slideredit_rt.errors import OutOfDeviceMemory, SliderEditError
from slideredit_rt.families import Backbone, Reader

_SLIDERS = ("alpha", "token_mask")


def check_request(manifest: Manifest, inputs: Mapping[str, Tensor], *, reading: bool = False) -> dict[str, int]:
    """Check a call's inputs against the manifest.

    Args:
        manifest: Manifest of the engine; `inputs` gives names, dtypes and shapes, `ranges` or `reading_ranges` or else
            `max_batch` and `max_sliders` give the limits.
        inputs: Tensors by name, on any device.
        reading: True for a call that reads source images.

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
    compiled = manifest.reading_ranges if reading else manifest.ranges
    limits = compiled or {"batch": [1, 1, manifest.max_batch], "sliders": [1, 1, manifest.max_sliders]}
    for axis, size in sizes.items():
        low, _, high = limits.get(axis, [size] * 3)
        if not low <= size <= high:
            raise SliderEditError(
                f"the engine was built for {low} to {high} in the axis {axis!r}, got {size}; rebuild it with a wider range"
            )
    return sizes


def as_reader(engine: Backbone, family: str) -> Reader:
    """Return an engine that reads source images.

    Args:
        engine: Engine, or eager backbone.
        family: Name of its family.

    Raises:
        SliderEditError: It cannot read source images.
    """
    if not isinstance(engine, Reader):
        raise SliderEditError(
            f"a {family} base reads its source images in a call of its own, which this engine does not have; build the engine "
            "from this base again"
        )
    return engine


def reading_request(manifest: Manifest, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the inputs of a call that reads source images, with all sliders off.

    Args:
        manifest: Manifest of the engine.
        inputs: Result of `Family.read_inputs`, with the adapter inputs of an engine that has them.
    """
    sizes = {"batch": 1, "sliders": 1, "text_rows": inputs["encoder_hidden_states"].shape[1]}
    sizes["rows"] = sizes["text_rows"] + inputs["hidden_states"].shape[1]
    device = inputs["hidden_states"].device
    request = {}
    for spec in manifest.inputs:
        dtype = getattr(torch, spec.dtype)
        off = spec.name in _SLIDERS
        request[spec.name] = (
            torch.zeros(spec.resolve(sizes), dtype=dtype, device=device) if off else inputs[spec.name].to(dtype)
        )
    return request


class InputBuffers:
    """Fixed buffers for the inputs of one set of shapes, besides adapter inputs (see `AdapterBuffers`).

    Keys and values of source images are large and stay the same during an edit. They are copied only if a call gets another
    tensor than the call before, or one that torch has changed since.

    Args:
        manifest: Manifest of the engine.
        sizes: Size of each named axis.
        allocate: Function that returns a tensor of a shape and a dtype, as torch names it.

    Attributes:
        tensors: Buffers by the names of inputs.
    """

    def __init__(
        self, manifest: Manifest, sizes: Mapping[str, int], allocate: Callable[[tuple[int, ...], str], Tensor]
    ) -> None:
        own = [spec for spec in manifest.inputs if not is_adapter_input(spec.name)]
        self.tensors = {spec.name: allocate(spec.resolve(sizes), spec.dtype) for spec in own}
        self._lasting = {spec.name for spec in manifest.inputs if "references" in spec.shape}
        self._copied: dict[str, tuple[weakref.ref[Tensor], int]] = {}

    def fill(self, inputs: Mapping[str, Tensor]) -> None:
        """Copy the inputs of a call. Pad the sliders with alpha 0 and empty masks."""
        for name, buffer in self.tensors.items():
            value = inputs[name]
            if name in _SLIDERS:
                sliders = value.shape[1]
                buffer[:, :sliders].copy_(value)
                buffer[:, sliders:].zero_()
            elif name not in self._lasting or value.is_inference():  # torch does not count changes of inference tensors
                buffer.copy_(value)
            elif not self._holds(name, value):
                buffer.copy_(value)
                self._copied[name] = weakref.ref(value), value._version

    def _holds(self, name: str, value: Tensor) -> bool:
        copied, version = self._copied.get(name, (None, 0))
        return copied is not None and copied() is value and version == value._version


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
