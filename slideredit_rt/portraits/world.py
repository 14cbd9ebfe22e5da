"""The portraits world: people whose appearance instructions change, with the correct result of every edit.

A person is a row of parameters (`person`), and an instruction moves some of them, in proportion to its
strength. Instructions of different attributes move different parameters, so edits commute.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import torch
from PIL import Image
from torch import Tensor

from slideredit_rt.errors import SliderEditError
from slideredit_rt.portraits.drawing import LAYERS, SIZE, render, render_with_layers
from slideredit_rt.portraits.person import COLUMN, PARAMETERS, RANGES, USUAL, colour_columns, draw_people

__all__ = [
    "ATTRIBUTES",
    "INSTRUCTIONS",
    "LAYERS",
    "PARAMETERS",
    "SIZE",
    "Example",
    "Instruction",
    "applicable",
    "draw_people",
    "edit",
    "find_instruction",
    "held_out_examples",
    "portrait_image",
    "render",
    "render_with_layers",
    "sample_instructions",
]


@dataclass(frozen=True)
class Instruction:
    """An instruction in words.

    Attributes:
        text: The instruction as it stands in a prompt.
        attribute: Group of parameters that it changes. Two instructions on the same attribute contradict each other.
        towards: Parameters and the values that they have at strength 1.
        by: Parameters and what strength 1 adds to them.
        beyond: Parameters and what a strength of 2 adds to the edit. The default is what strength 1 adds to most people.
    """

    text: str
    attribute: str
    towards: dict[str, float] = field(default_factory=dict, hash=False)
    by: dict[str, float] = field(default_factory=dict, hash=False)
    beyond: dict[str, float] = field(default_factory=dict, hash=False)


def _tint(text: str, kind: str, colour: tuple[float, float, float], beyond: tuple[float, float, float]) -> Instruction:
    """Return an instruction that gives `kind` a colour, and changes it by `beyond` for each unit of strength above 1."""
    names = PARAMETERS[colour_columns(kind)]
    attribute = "hair colour" if kind == "hair" else kind
    return Instruction(text, attribute, dict(zip(names, colour, strict=True)), beyond=dict(zip(names, beyond, strict=True)))


def _expression(curve: float, opened: float, stretch: float, brows: tuple[float, float], squint: float) -> dict[str, float]:
    return {
        "mouth_curve": curve,
        "mouth_open": opened,
        "mouth_stretch": stretch,
        "brow_raise": brows[0],
        "brow_slant": brows[1],
        "squint": squint,
    }


INSTRUCTIONS: tuple[Instruction, ...] = (
    Instruction("make the person smile", "expression", _expression(5.0, 5.0, 0.22, (0.8, 0.0), 0.2)),
    Instruction("make the person sad", "expression", _expression(-2.4, 0.0, -0.10, (0.6, 0.34), 0.15)),
    Instruction(
        "make the person surprised", "expression", _expression(0.4, 7.5, -0.36, (3.6, 0.0), -0.3), beyond={"mouth_stretch": 0.0}
    ),
    Instruction("make the person older", "age", by={"age": 1.0}),
    _tint("make the hair red", "hair", (0.74, 0.24, 0.13), (0.20, -0.04, -0.05)),
    _tint("make the hair blond", "hair", (0.90, 0.74, 0.40), (0.14, 0.22, 0.26)),
    _tint("make the hair black", "hair", (0.12, 0.11, 0.13), (-0.10, -0.09, -0.08)),
    _tint("make the hair grey", "hair", (0.70, 0.70, 0.72), (0.30, 0.30, 0.30)),
    Instruction("make the hair longer", "hair length", by={"hair_length": 0.45}),
    Instruction("make the hair curly", "curl", towards={"curl": 1.1}),
    Instruction("make the eyes bigger", "eye size", by={"eye_scale": 0.32}),
    Instruction("make the eyes closed", "eyelids", towards={"lids": 1.0}, beyond={"lids": 0.4}),
    Instruction("make the skin tanned", "skin", by={"tan": 0.8}),
    Instruction("add blush", "blush", by={"blush": 1.0}),
    Instruction("add a beard", "beard", towards={"beard": 1.0}),
    Instruction("add glasses", "glasses", towards={"glasses": 1.0}),
    Instruction("add sunglasses", "glasses", towards={"glasses": 1.0, "dark_lenses": 1.0}),
    Instruction("add a hat", "hat", towards={"hat": 1.0}),
    _tint("make the clothes red", "clothes", (0.78, 0.20, 0.20), (0.24, -0.16, -0.14)),
    _tint("make the clothes green", "clothes", (0.24, 0.56, 0.30), (-0.16, 0.20, -0.12)),
    _tint("make the background blue", "background", (0.36, 0.56, 0.84), (-0.24, -0.16, 0.20)),
    _tint("make the background dark", "background", (0.20, 0.20, 0.24), (-0.20, -0.20, -0.22)),
    _tint("make the background bright", "background", (0.91, 0.91, 0.89), (0.06, 0.06, 0.08)),
)
"""All instructions, in the order of the columns of strengths."""

ATTRIBUTES: tuple[str, ...] = tuple(dict.fromkeys(i.attribute for i in INSTRUCTIONS))

# Smallest change of each parameter that can be seen. An instruction applies to a person
# if it makes a change of 1 in these units.
_VISIBLE = {
    "mouth_curve": 2.0,
    "mouth_open": 2.5,
    "brow_raise": 2.0,
    "hair_length": 0.3,
    "curl": 0.5,
    "eye_scale": 0.15,
    "lids": 0.5,
    "age": 0.5,
    "tan": 0.4,
    "blush": 0.5,
    "beard": 0.5,
    "glasses": 0.5,
    "hat": 0.5,
}
_VISIBLE_COLOUR = 0.16


def _visible(name: str) -> float:
    if name.endswith(("_red", "_green", "_blue")):
        return 1 / _VISIBLE_COLOUR
    return 1 / _VISIBLE[name] if name in _VISIBLE else 0.0


@cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return what the instructions do to the parameters, three tensors `[I, P]`: `replaced`, `added` and `beyond`.

    Strength 1 changes parameters by `added - replaced * parameters`, and each further unit by `beyond`.
    """
    replaced, added, beyond = torch.zeros(3, len(INSTRUCTIONS), len(PARAMETERS)).unbind(0)
    for row, instruction in enumerate(INSTRUCTIONS):
        for name, value in instruction.towards.items():
            replaced[row, COLUMN[name]] = 1
            added[row, COLUMN[name]] = value
            beyond[row, COLUMN[name]] = instruction.beyond.get(name, value - USUAL.get(name, 0.0))
        for name, value in instruction.by.items():
            added[row, COLUMN[name]] = beyond[row, COLUMN[name]] = value
    return replaced.to(device), added.to(device), beyond.to(device)


@cache
def _limits(device: torch.device) -> tuple[Tensor, ...]:
    """Return the smallest and the largest value of each parameter, two tensors `[P]`."""
    return torch.tensor(list(RANGES.values()), device=device).unbind(1)


def applicable(people: Tensor) -> Tensor:
    """Return whether each instruction changes each person enough to see, bool `[N, I]`.

    Args:
        people: Parameters, `[N, P]`.
    """
    replaced, added, _ = _tables(people.device)
    weight = people.new_tensor([_visible(name) for name in PARAMETERS])
    change = (added - replaced * people[:, None]) * weight
    seen = change.square().sum(-1) > 1
    # Faces with long lashes grow no beard, dark skin does not get visibly darker, and longer hair would leave the image.
    barred = {
        "beard": people[:, COLUMN["lashes"]] > 0.5,
        "skin": people[:, COLUMN["skin_green"]] < 0.42,
        "hair length": people[:, COLUMN["hair_length"]] > 0.7,
    }
    never = torch.zeros_like(barred["beard"])
    return seen & ~torch.stack([barred.get(i.attribute, never) for i in INSTRUCTIONS], dim=1)


def edit(people: Tensor, strengths: Tensor) -> Tensor:
    """Return edited people, `[N, P]`.

    Args:
        people: Parameters, `[N, P]`.
        strengths: Strength of each instruction, `[N, I]`: 0 leaves a person as it is, 1 is the edit, values between are on the
            way and values above 1 go beyond it.
    """
    replaced, added, beyond = _tables(people.device)
    low, high = _limits(people.device)
    within = strengths.clamp(max=1)
    moved = people + within @ added - people * (within @ replaced) + (strengths - within) @ beyond
    return moved.clamp(low, high)


def sample_instructions(people: Tensor, counts: Tensor, generator: torch.Generator, known: Tensor | None = None) -> Tensor:
    """Draw instructions of different attributes that apply to the people.

    Args:
        people: Parameters, `[N, P]`.
        counts: Number of instructions of each person, integers `[N]`.
        generator: Random number generator. It draws on its own device.
        known: Instructions to draw from, bool `[I]`; None takes all.

    Returns:
        Strengths, float32 `[N, I]`: 1 for the drawn instructions and 0 for the others.
    """
    scores = torch.rand(len(people), len(INSTRUCTIONS), generator=generator, device=generator.device).to(people.device)
    usable = applicable(people) if known is None else applicable(people) & known.to(people.device)
    scores = torch.where(usable, scores, -1.0)
    group = torch.tensor([ATTRIBUTES.index(i.attribute) for i in INSTRUCTIONS], device=people.device).expand(len(people), -1)
    best = scores.new_full((len(people), len(ATTRIBUTES)), -1.0).scatter_reduce(1, group, scores, "amax")
    scores = torch.where((scores == best.gather(1, group)) & (scores >= 0), scores, -1.0)
    rank = scores.argsort(dim=1, descending=True).argsort(dim=1)
    return ((rank < counts.to(people.device)[:, None]) & (scores >= 0)).to(people.dtype)


@dataclass(frozen=True, eq=False)
class Example:
    """A person and the instructions to apply.

    Attributes:
        people: Parameters of the person, float32 `[1, P]`.
        instructions: Instructions of different attributes.
    """

    people: Tensor
    instructions: tuple[Instruction, ...]

    @property
    def prompt(self) -> str:
        return " and ".join(i.text for i in self.instructions)

    @property
    def strengths(self) -> Tensor:
        """Strengths of the complete edit, float32 `[1, I]`."""
        return torch.tensor([[float(i in self.instructions) for i in INSTRUCTIONS]])

    @property
    def target(self) -> Tensor:
        """Parameters of the correct result, float32 `[1, P]`."""
        return edit(self.people, self.strengths)


def held_out_examples(number: int, count: int, seed: int = 0, known: Sequence[Instruction] = INSTRUCTIONS) -> list[Example]:
    """Return `number` examples of `count` instructions each. They are reproducible by `seed`, and no recipe trains on them.

    The seed of their generator has bit 62 set, and recipes use small seeds. People to whom too few instructions apply are left
    out.

    Args:
        number: Number of examples.
        count: Number of instructions. Examples have fewer if `known` has fewer attributes.
        seed: Seed of the examples.
        known: Instructions to draw from, at least one.
    """
    generator = torch.Generator().manual_seed(random.Random(f"held-out/{seed}/{count}").getrandbits(62) | 1 << 62)
    allowed = torch.tensor([i in known for i in INSTRUCTIONS])
    count = min(count, len({i.attribute for i in known}))
    examples: list[Example] = []
    while len(examples) < number:
        people = draw_people(number, generator)
        strengths = sample_instructions(people, torch.full((number,), count), generator, allowed)
        examples += [
            Example(person[None], tuple(i for i, one in zip(INSTRUCTIONS, chosen, strict=True) if one))
            for person, chosen in zip(people, strengths.tolist(), strict=True)
            if sum(chosen) == count
        ]
    return examples[:number]


def find_instruction(text: str) -> Instruction:
    """Return the instruction of the world with the text `text`.

    Raises:
        SliderEditError: The text is not an instruction of the world.
    """
    found = next((i for i in INSTRUCTIONS if i.text == text), None)
    if found is None:
        raise SliderEditError(
            f"{text!r} is not an instruction of the portraits world; write one such as {INSTRUCTIONS[0].text!r}"
        )
    return found


def portrait_image(example: Example) -> Image.Image:
    """Render the source person of an example as an image with 8 bits per channel."""
    pixels = (render(example.people)[0].permute(1, 2, 0) * 255).round().to(torch.uint8)
    return Image.fromarray(pixels.numpy())
