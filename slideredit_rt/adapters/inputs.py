"""`AdapterInputs`: the inputs of an engine that takes its adapter as tensors instead of containing it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from slideredit_rt.adapters.adapter import Adapter
from slideredit_rt.adapters.matching import check_rows, standard_linears
from slideredit_rt.errors import OutOfDeviceMemory, SliderEditError
from slideredit_rt.families import Family, Kind, TensorSpec


def is_adapter_input(name: str) -> bool:
    """Return whether the input of an engine belongs to its adapter."""
    return name.startswith(("lora_a.", "lora_b."))


@dataclass(frozen=True)
class AdapterInputs:
    """Layout of the adapter inputs of an engine.

    Linears of the same size share an input: `lora_a.<K>`, `[linears, R, K]`, stacks the A of all linears with K input
    features, and `lora_b.<N>`, `[linears, N, R]`, the B of all linears with N output features, in the order of `modules`.
    They are float32 for any dtype of the engine. An adapter of a lower rank, or of fewer linears, is filled up with zeros,
    which changes nothing.

    Attributes:
        kind: Kind of the adapters, `st` or `gst`.
        max_rank: R, the largest rank of an adapter.
        modules: Output and input features, (N, K), of each linear that an adapter can update, by name.
    """

    kind: Kind
    max_rank: int
    modules: Mapping[str, tuple[int, int]]

    @classmethod
    def of_adapter(cls, adapter: Adapter, max_rank: int | None = None) -> AdapterInputs:
        """Return inputs for adapters of the same kind and linears as `adapter`.

        Args:
            adapter: Single adapter, fitted to its base.
            max_rank: Largest rank; None takes the adapter's.

        Raises:
            SliderEditError: The adapter is a bank, or its rank is higher than `max_rank`.
        """
        sizes = {name: (len(b), a.shape[1]) for name, (a, b) in adapter.pairs.items()}
        inputs = cls(adapter.kind, adapter.rank if max_rank is None else max_rank, sizes)
        inputs.check(adapter)
        return inputs

    @classmethod
    def of_targets(cls, kind: Kind, family: Family, transformer: nn.Module, max_rank: int) -> AdapterInputs:
        """Return inputs for the linears that adapters of a kind are trained on (see `Family.targets`).

        Args:
            kind: `st` or `gst`.
            family: Family of the transformer.
            transformer: diffusers transformer, may be on the `meta` device.
            max_rank: Largest rank.
        """
        linears = standard_linears(kind, family, transformer)
        return cls(kind, max_rank, {name: (linear.out_features, linear.in_features) for name, linear in linears.items()})

    @cached_property
    def _stacks(self) -> dict[str, list[str]]:
        """Modules of each input, in order."""
        stacks: defaultdict[str, list[str]] = defaultdict(list)
        for part, axis in (("a", 1), ("b", 0)):
            for name, size in self.modules.items():
                stacks[f"lora_{part}.{size[axis]}"].append(name)
        return dict(stacks)

    def specs(self) -> list[TensorSpec]:
        """Return names and shapes of the inputs."""
        found = []
        for key, names in self._stacks.items():
            part, size = key.removeprefix("lora_").split(".")
            shape = (self.max_rank, int(size)) if part == "a" else (int(size), self.max_rank)
            found.append(TensorSpec(key, "float32", (len(names), *shape)))
        return found

    @property
    def bytes(self) -> int:
        """Size of the input tensors of one adapter, which is the same for all."""
        return sum(math.prod(spec.resolve({})) for spec in self.specs()) * torch.float32.itemsize

    def blank(self) -> Adapter:
        """Return an adapter of zeros that fills the inputs."""
        pairs = {name: (torch.zeros(self.max_rank, k), torch.zeros(n, self.max_rank)) for name, (n, k) in self.modules.items()}
        return Adapter("", self.kind, self.max_rank, pairs, "adapter inputs")

    def check(self, adapter: Adapter, family: Family | None = None) -> None:
        """Check that an engine with these inputs can run an adapter.

        Args:
            adapter: Adapter of the engine's family.
            family: Family of the engine; None if the adapter was fitted to its base.

        Raises:
            SliderEditError: It is a bank, of another kind, trained on another base, of a higher rank, or it updates a linear
                without inputs.
        """
        if adapter.members:
            raise SliderEditError(
                f"adapter {adapter.source!r} is a bank, but adapter inputs take one adapter at a time; pass one, or build an "
                "engine that contains the bank"
            )
        if adapter.kind != self.kind:
            raise SliderEditError(
                f"adapter {adapter.source!r} is {adapter.kind}, but the engine's adapter inputs are for {self.kind}; use an "
                f"adapter of that kind, or build an engine with --adapter-inputs --kind {adapter.kind}"
            )
        if family is not None:
            check_rows(adapter, family)
        for name, (a, b) in adapter.pairs.items():
            if name not in self.modules:
                raise SliderEditError(
                    f"adapter {adapter.source!r} updates {name}, which has no adapter input in the engine; build one with "
                    "--adapter-inputs and this adapter"
                )
            if (len(b), a.shape[1]) != self.modules[name]:
                n, k = self.modules[name]
                raise SliderEditError(
                    f"adapter {adapter.source!r} has a {len(b)}×{a.shape[1]} update for {name}, which is {n}×{k} in the "
                    "engine; use an adapter that was trained on this base"
                )
        if adapter.rank > self.max_rank:
            raise SliderEditError(
                f"adapter {adapter.source!r} has rank {adapter.rank}, but the engine's adapter inputs take at most "
                f"{self.max_rank}; build an engine with --max-rank {adapter.rank}"
            )

    def pack(self, adapter: Adapter, device: torch.device) -> dict[str, Tensor]:
        """Return the input tensors of an adapter that passes `check`, on a device.

        Raises:
            OutOfDeviceMemory: The device has no memory left for them.
        """
        packed = {spec.name: torch.zeros(spec.resolve({})) for spec in self.specs()}
        for key, names in self._stacks.items():
            for row, name in enumerate(names):
                if name in adapter.pairs:
                    a, b = adapter.pairs[name]
                    if key.startswith("lora_a."):
                        packed[key][row, : len(a)] = a
                    else:
                        packed[key][row, :, : b.shape[1]] = b
        try:
            return {name: tensor.to(device) for name, tensor in packed.items()}
        except torch.OutOfMemoryError:
            raise OutOfDeviceMemory(
                f"the GPU is out of memory for the {math.ceil(self.bytes / 2**20)} MiB of adapter {adapter.source!r}; free "
                "some, or keep fewer adapters on it: serve --adapters-mib, or `adapters.max_bytes` of an editor"
            ) from None

    def unpack(self, inputs: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor]]:
        """Return views of A `[R, K]` and B `[N, R]` of each linear in the input tensors, converted to a dtype."""
        rows = {
            (key, name): stack[row]
            for key, names in self._stacks.items()
            for stack in [inputs[key].to(dtype)]
            for row, name in enumerate(names)
        }
        return {name: (rows[f"lora_a.{k}", name], rows[f"lora_b.{n}", name]) for name, (n, k) in self.modules.items()}

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "max_rank": self.max_rank, "modules": {name: list(s) for name, s in self.modules.items()}}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> AdapterInputs:
        """Return the layout described by `to_json`."""
        return cls(data["kind"], data["max_rank"], {name: (n, k) for name, (n, k) in data["modules"].items()})
