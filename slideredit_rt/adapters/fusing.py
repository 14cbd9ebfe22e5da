"""Permanent LoRAs, which are added to the weights of a transformer: `W + scale · B A`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slideredit_rt.adapters.adapter import Adapter
from slideredit_rt.adapters.reading import load_adapter
from slideredit_rt.assets import from_anywhere
from slideredit_rt.errors import SliderEditError
from slideredit_rt.families import Family


@dataclass(frozen=True)
class Fused:
    """A LoRA to fuse.

    Attributes:
        source: File, PEFT folder or embedded name, in any format of adapters.
        scale: Factor of the update.

    Raises:
        SliderEditError: The scale is zero or not finite.
    """

    source: str | Path
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale) or self.scale == 0:
            raise SliderEditError(f"LoRA {str(self.source)!r} has scale {self.scale:g}; pass a number such as 1 or 0.8")

    def load(self, family: Family) -> Adapter:
        """Read the LoRA, with its own scale.

        Args:
            family: Family of the transformer to fuse it into.

        Raises:
            SliderEditError: It cannot be read, updates no linear, or is a bank.
        """
        adapter = load_adapter(self.source, family, mixed_dtypes=True)
        if adapter.members:
            raise SliderEditError(f"LoRA {adapter.source!r} is a bank of sliders; pass the file of one member to fuse it")
        return adapter


@dataclass(frozen=True)
class Updates:
    """Low-rank updates of a transformer's weights.

    Attributes:
        pairs: A `[R, K]` and B `[N, R]` of each linear, float32, with scales folded into B; several for several LoRAs.
        ignored: Linears of text encoders that the LoRAs also update, which are not fused.
        loras: Description of each LoRA: its `source`, `scale`, `fingerprint` (SHA-256 of its names and values, see
            `Adapter.fingerprint`) and number of `modules`.
    """

    pairs: dict[str, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    loras: tuple[dict[str, Any], ...] = ()

    def apply(self, module: str, weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Add a linear's updates to its weight, in float32.

        Args:
            module: Name of the linear.
            weight: Its weight, `[N, K]`.
            dtype: Dtype of the result; None keeps the weight's.

        Raises:
            SliderEditError: The result is not finite.
        """
        wide = weight.float()
        for a, b in self.pairs.get(module, ()):
            wide = torch.addmm(wide, b.to(wide), a.to(wide))
        result = wide.to(dtype or weight.dtype)
        if not all(bound.isfinite() for bound in result.aminmax()):
            raise SliderEditError(f"{module}.weight holds NaN or infinity after fusing; download the base or the LoRA again")
        return result

    def fuse_into(self, transformer: nn.Module) -> None:
        """Add the updates to the weights of a loaded transformer, in place.

        Raises:
            SliderEditError: A resulting weight is not finite.
        """
        for name in self.pairs:
            linear = transformer.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            linear.weight.data = self.apply(name, linear.weight.data)


def read_updates(loras: Sequence[Fused], family: Family, transformer: nn.Module) -> Updates:
    """Read LoRAs and check that they fit a transformer.

    Args:
        loras: LoRAs to fuse; they may update any linear of the transformer.
        family: Family of the transformer.
        transformer: Transformer, may be on the `meta` device.

    Raises:
        SliderEditError: A LoRA cannot be read, is a bank, or updates a linear that the transformer lacks or that has another
            size.
    """
    linears = {name: m for name, m in transformer.named_modules() if isinstance(m, nn.Linear)}
    pairs: dict[str, list[tuple[Tensor, Tensor]]] = {}
    ignored: list[str] = []
    described = []
    for lora in loras:
        adapter = lora.load(family)
        for name, (a, b) in adapter.pairs.items():
            linear = linears.get(name)
            if linear is None or (b.shape[0], a.shape[1]) != (linear.out_features, linear.in_features):
                what = "lacks" if linear is None else f"has with {linear.out_features}×{linear.in_features} weights"
                raise SliderEditError(
                    f"LoRA {adapter.source!r} has a {b.shape[0]}×{a.shape[1]} update for {name}, which this base {what}; "
                    "pass a LoRA that was trained on it"
                )
            pairs.setdefault(name, []).append((a, b * lora.scale))
        ignored += adapter.ignored
        described.append(
            {
                "source": from_anywhere(lora.source),
                "scale": float(lora.scale),
                "fingerprint": adapter.fingerprint,
                "modules": len(adapter.pairs),
            }
        )
    return Updates(pairs, tuple(ignored), tuple(described))
