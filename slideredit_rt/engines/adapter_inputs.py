"""Engines that take their adapter as inputs: an engine with the tensors of one adapter, and buffers that hold them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from slideredit_rt.adapters.inputs import is_adapter_input
from slideredit_rt.engines.backend import Engine
from slideredit_rt.engines.manifest import Manifest
from slideredit_rt.engines.request import as_reader
from slideredit_rt.errors import SliderEditError


class AdaptedEngine:
    """An engine with adapter inputs together with one adapter, behind the protocol of an engine that contains it.

    It does not copy or load anything: engines of several adapters share the engine that they run.

    Args:
        engine: Engine with adapter inputs.
        manifest: Manifest of the engine.
        tensors: Input tensors of the adapter on the engine's device, which never change (see `AdapterInputs.pack`). None
            stands for no adapter; every call is then an error.

    Attributes:
        runs: The engine that it runs.
    """

    def __init__(self, engine: Engine, manifest: Manifest, tensors: Mapping[str, Tensor] | None) -> None:
        self.runs = engine
        self.manifest = manifest
        self._tensors = tensors

    @property
    def device(self) -> torch.device:
        """Device of the engine."""
        return self.runs.device

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Predict one step (see `slideredit_rt.engines.Engine`).

        Raises:
            SliderEditError: No adapter was chosen, or the engine refuses the call.
        """
        return self.runs({**inputs, **self._adapter()})

    def read(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Read source images with all sliders off (see `slideredit_rt.families.Reader`).

        The result is the same for every adapter, but the engine cannot be called without the tensors of one.

        Raises:
            SliderEditError: No adapter was chosen, or the engine cannot read source images.
        """
        return as_reader(self.runs, self.manifest.family).read({**inputs, **self._adapter()})

    def _adapter(self) -> Mapping[str, Tensor]:
        if self._tensors is None:
            raise no_adapter()
        return self._tensors


def no_adapter() -> SliderEditError:
    """Make the error for an edit without an adapter."""
    return SliderEditError(
        "the engine takes its adapter as an input and has no default; choose one: --adapter, `adapter` in a request, or "
        "SliderEditor.use_adapter"
    )


class AdapterBuffers:
    """Device memory for the adapter inputs of an engine that copies its inputs, shared by all sets of shapes.

    An adapter is copied when another one was used before, not in every step. Not thread-safe.

    Args:
        manifest: Manifest of the engine; without adapter inputs there are no buffers.
        device: Device of the engine.
    """

    def __init__(self, manifest: Manifest, device: torch.device) -> None:
        specs = [spec for spec in manifest.inputs if is_adapter_input(spec.name)]
        self.tensors = {spec.name: torch.zeros(spec.resolve({}), device=device) for spec in specs}
        self._held: dict[str, Tensor] = {}

    def fill(self, inputs: Mapping[str, Tensor]) -> None:
        """Copy the adapter inputs of a call that the buffers do not hold yet. Their contents must never change."""
        for name, buffer in self.tensors.items():
            # Compare objects: memory at the same address may belong to another adapter by now.
            if self._held.get(name) is not inputs[name]:
                buffer.copy_(inputs[name])
                self._held[name] = inputs[name]
