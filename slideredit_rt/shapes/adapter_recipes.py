"""Training recipes of the shipped adapters, concept sliders, attribute offsets and few-step LoRA for the embedded editor."""

from __future__ import annotations

import random
from collections.abc import Sequence

from torch import Tensor

from slideredit_rt.families import Kind
from slideredit_rt.shapes.world import ALL_INSTRUCTIONS, Instruction, draw_example, render
from slideredit_rt.training.attribute_offsets import OffsetConfig
from slideredit_rt.training.concepts import ConceptConfig
from slideredit_rt.training.few_step import FewStepConfig
from slideredit_rt.training.suppression import SuppressionConfig


class ShapesData:
    """Random scenes with one to three instructions each.

    Args:
        known: Instructions to draw from.
    """

    def __init__(self, known: Sequence[Instruction] = ALL_INSTRUCTIONS) -> None:
        self.known = known

    def draw(self, rng: random.Random, batch: int) -> tuple[Tensor, list[list[str]]]:
        examples = [draw_example(rng, rng.choice((1, 2, 2, 3)), self.known) for _ in range(batch)]
        return render(e.scene for e in examples), [[i.text for i in e.instructions] for e in examples]


class BalancedShapes:
    """Random scenes with one instruction each, in which all instructions are equally frequent.

    Args:
        known: Instructions to draw from.
    """

    def __init__(self, known: Sequence[Instruction] = ALL_INSTRUCTIONS) -> None:
        self.known = known

    def draw(self, rng: random.Random, batch: int) -> tuple[Tensor, list[list[str]]]:
        rounds = -(-batch // len(self.known))
        chosen = rng.sample([*self.known] * rounds, batch)
        examples = [draw_example(rng, 1, [instruction]) for instruction in chosen]
        return render(e.scene for e in examples), [[i.text for i in e.instructions] for e in examples]


def adapter_recipe(kind: Kind) -> SuppressionConfig:
    """Return the settings of the shipped adapter of this kind, `shapes-st` or `shapes-gst`."""
    return SuppressionConfig(
        kind=kind,
        target="remaining" if kind == "st" else "neutral",
        rank=16 if kind == "st" else 4,
        alpha_sampling="uniform",
        timestep_sampling="uniform",
        steps=600,
        batch=32,
        learning_rate=2e-3,
        schedule="cosine",
    )


def concepts_recipe() -> ConceptConfig:
    """Return the settings of `shapes-concepts`, with one member per instruction of the world."""
    return ConceptConfig(
        attributes=tuple(i.text for i in ALL_INSTRUCTIONS),
        rank=4,
        steps=1000,
        batch=22,
        learning_rate=2e-3,
        schedule="cosine",
    )


def offsets_recipe() -> OffsetConfig:
    """Return the settings of `shapes-offsets`, with one vector per instruction of the world.

    Each vector gets 40 examples per step, as published.
    """
    return OffsetConfig(
        attributes=tuple(i.text for i in ALL_INSTRUCTIONS), steps=100, batch=880, learning_rate=0.1, schedule="cosine"
    )


def few_step_recipe() -> FewStepConfig:
    """Return the settings of `shapes-turbo`."""
    return FewStepConfig(few_steps=4, substeps=4, rank=16, steps=360, batch=8, learning_rate=1e-3, schedule="cosine")
