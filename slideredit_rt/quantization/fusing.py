"""Permanent LoRAs, which are added to the weights before these are quantised: `W + scale · B A`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from slideredit_rt.adapters import load_adapter
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


@dataclass(frozen=True)
class Updates:
    """Low-rank updates of a transformer's weights.

    Attributes:
        pairs: A `[R, K]` and B `[N, R]` of each linear, float32, with scales folded into B; several for several LoRAs.
        ignored: Linears of text encoders that the LoRAs also update, which are not fused.
    """

    pairs: dict[str, list[tuple[Tensor, Tensor]]]
    ignored: tuple[str, ...] = ()

    def apply(self, module: str, weight: Tensor) -> Tensor:
        """Return a linear's weight, `[N, K]`, with its updates added."""
        for a, b in self.pairs.get(module, ()):
            weight = torch.addmm(weight, b.to(weight), a.to(weight))
        return weight


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
    for lora in loras:
        adapter = load_adapter(lora.source, family, mixed_dtypes=True)
        if adapter.members:
            raise SliderEditError(f"LoRA {adapter.source!r} is a bank of sliders; pass the file of one member to fuse it")
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
    return Updates(pairs, tuple(ignored))
