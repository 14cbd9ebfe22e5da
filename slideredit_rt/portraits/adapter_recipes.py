"""Training recipes of adapters, concept sliders and attribute offsets for the portraits editor."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

import torch
from torch import Tensor

from slideredit_rt.families import Kind
from slideredit_rt.portraits.world import INSTRUCTIONS, applicable, draw_people, find_instruction, render, sample_instructions
from slideredit_rt.shapes import adapter_recipes as shapes
from slideredit_rt.training.attribute_offsets import OffsetConfig
from slideredit_rt.training.concepts import ConceptConfig
from slideredit_rt.training.few_step import FewStepConfig
from slideredit_rt.training.suppression import SuppressionConfig

# Numbers of instructions in an example, all equally frequent.
_COUNTS = (1, 2, 2, 3)
_CPU = torch.device("cpu")


def _known(texts: Sequence[str] | None) -> list[int]:
    """Return the columns of instructions, of all if `texts` is None."""
    return list(range(len(INSTRUCTIONS))) if texts is None else [INSTRUCTIONS.index(find_instruction(text)) for text in texts]


class PortraitsData:
    """Random people with one to three instructions each. They are drawn on the CPU and rendered on a device.

    Args:
        texts: Instructions to draw from; None takes all.
        device: Device of the images.
    """

    def __init__(self, texts: Sequence[str] | None = None, device: torch.device = _CPU) -> None:
        self.known, self.device = torch.zeros(len(INSTRUCTIONS), dtype=torch.bool), device
        self.known[_known(texts)] = True

    def draw(self, rng: random.Random, batch: int) -> tuple[Tensor, list[list[str]]]:
        generator, found = torch.Generator().manual_seed(rng.getrandbits(48)), []
        people = draw_people(4 * batch, generator)
        counts = torch.tensor(rng.choices(_COUNTS, k=len(people)))
        chosen = sample_instructions(people, counts, generator, self.known)
        usable = chosen.any(dim=1).nonzero()[:batch, 0]
        for row in chosen[usable]:
            texts = [INSTRUCTIONS[i].text for i in row.nonzero()[:, 0].tolist()]
            rng.shuffle(texts)
            found.append(texts)
        return render(people[usable].to(self.device)), found


class BalancedPortraits:
    """Random people with one instruction each, in which all instructions are equally frequent.

    Args:
        texts: Instructions to draw from; None takes all.
        device: Device of the images.
    """

    def __init__(self, texts: Sequence[str] | None = None, device: torch.device = _CPU) -> None:
        self.known, self.device = _known(texts), device

    def draw(self, rng: random.Random, batch: int) -> tuple[Tensor, list[list[str]]]:
        rounds = -(-batch // len(self.known))
        chosen = rng.sample(self.known * rounds, batch)
        people = draw_people(16 * batch, torch.Generator().manual_seed(rng.getrandbits(48)))
        fits = applicable(people).view(16, batch, -1)[:, torch.arange(batch), chosen]
        # The first of sixteen people whom the instruction changes.
        first = fits.int().argmax(dim=0)
        people = people.view(16, batch, -1)[first, torch.arange(batch)]
        return render(people.to(self.device)), [[INSTRUCTIONS[i].text] for i in chosen]


def adapter_recipe(kind: Kind) -> SuppressionConfig:
    """Return the settings of the shipped adapter of this kind, `portraits-st` or `portraits-gst`."""
    return dataclasses.replace(shapes.adapter_recipe(kind), steps=500)


def concepts_recipe() -> ConceptConfig:
    """Return the settings of `portraits-concepts`, with one member per instruction of the world."""
    return ConceptConfig(
        attributes=tuple(i.text for i in INSTRUCTIONS),
        rank=4,
        steps=1000,
        batch=len(INSTRUCTIONS),
        learning_rate=2e-3,
        schedule="cosine",
    )


def offsets_recipe() -> OffsetConfig:
    """Return the settings of `portraits-offsets`, with one vector per instruction of the world.

    Each vector gets 40 examples per step, as published.
    """
    attributes = tuple(i.text for i in INSTRUCTIONS)
    return OffsetConfig(attributes=attributes, steps=100, batch=40 * len(attributes), learning_rate=0.1, schedule="cosine")


def few_step_recipe() -> FewStepConfig:
    """Return the settings of `portraits-turbo`."""
    return FewStepConfig(few_steps=4, substeps=7, rank=16, steps=400, batch=16, learning_rate=1e-3, schedule="cosine")
