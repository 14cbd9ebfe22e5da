"""The shapes world: scenes in which the correct result of every edit is known.

A scene is a plain grey background with one circle and one square, and an instruction changes one attribute of it. Scenes are
drawn from numbers, so the correct edit is known exactly and images can be measured. Slider quality can be checked without
human judgement.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Tensor

from slideredit_rt.errors import SliderEditError

SIZE = 64
"""Side of a rendered image in pixels."""

SHAPES = ("circle", "square")

ATTRIBUTES = (*(f"{shape} {kind}" for shape in SHAPES for kind in ("colour", "area")), "background")
"""Attributes that instructions change. Two instructions on the same attribute contradict each other."""

# Channels stay within [0.15, 0.92] so that strengths above 1 remain visible.
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.85, 0.20, 0.20),
    "green": (0.20, 0.70, 0.25),
    "blue": (0.20, 0.30, 0.85),
    "yellow": (0.85, 0.80, 0.20),
    "purple": (0.60, 0.20, 0.75),
    "orange": (0.90, 0.55, 0.15),
    "cyan": (0.20, 0.80, 0.85),
    "white": (0.92, 0.92, 0.92),
}
BACKGROUNDS = {"dark": 0.20, "bright": 0.75}
SIZES = {"larger": 1.35, "smaller": 0.70}
_SOURCE_BACKGROUND = (0.40, 0.58)
_RADIUS = (7.0, 10.0)
# Shapes do not touch even when both are exaggerated beyond "larger".
_CLEARANCE = 1.5


@dataclass(frozen=True)
class Shape:
    """A circle of radius `radius`, or a square of side 2 · `radius`, centred at `x`, `y`. All lengths are in pixels."""

    x: float
    y: float
    radius: float
    colour: tuple[float, float, float]


@dataclass(frozen=True)
class Scene:
    """A scene: the grey level of the background in [0, 1] and the two shapes."""

    background: float
    circle: Shape
    square: Shape

    def shape(self, name: str) -> Shape:
        return self.circle if name == "circle" else self.square


@dataclass(frozen=True)
class Instruction:
    """The instruction `make the {subject} {change}`, where `subject` is circle, square or background."""

    subject: str
    change: str

    @property
    def text(self) -> str:
        return f"make the {self.subject} {self.change}"

    @property
    def attribute(self) -> str:
        """Attribute that it changes, one of `ATTRIBUTES`."""
        if self.subject == "background":
            return "background"
        return f"{self.subject} {'area' if self.change in SIZES else 'colour'}"

    def apply(self, scene: Scene) -> Scene:
        """Return the correct edit of `scene`."""
        if self.subject == "background":
            return replace(scene, background=BACKGROUNDS[self.change])
        shape = scene.shape(self.subject)
        if self.change in SIZES:
            changed = replace(shape, radius=shape.radius * SIZES[self.change])
        else:
            changed = replace(shape, colour=COLOURS[self.change])
        return replace(scene, circle=changed) if self.subject == "circle" else replace(scene, square=changed)


ALL_INSTRUCTIONS: tuple[Instruction, ...] = tuple(
    [Instruction(shape, change) for shape in SHAPES for change in (*COLOURS, *SIZES)]
    + [Instruction("background", change) for change in BACKGROUNDS]
)


@dataclass(frozen=True)
class Example:
    """A source scene, the instructions to apply to it and the correct result."""

    scene: Scene
    instructions: tuple[Instruction, ...]

    @property
    def prompt(self) -> str:
        return " and ".join(i.text for i in self.instructions)

    @property
    def target(self) -> Scene:
        scene = self.scene
        for instruction in self.instructions:
            scene = instruction.apply(scene)
        return scene


def draw_scene(rng: random.Random) -> Scene:
    """Draw a random scene, in which the shapes do not overlap even after both are made larger."""
    while True:
        radii = [rng.uniform(*_RADIUS) for _ in SHAPES]
        reach = [r * _CLEARANCE for r in radii]
        (cx, cy), (sx, sy) = [(rng.uniform(m, SIZE - m), rng.uniform(m, SIZE - m)) for m in reach]
        if max(abs(cx - sx), abs(cy - sy)) > sum(reach) + 1:
            break
    colours = [rng.choice(list(COLOURS.values())) for _ in SHAPES]
    return Scene(
        background=rng.uniform(*_SOURCE_BACKGROUND),
        circle=Shape(cx, cy, radii[0], colours[0]),
        square=Shape(sx, sy, radii[1], colours[1]),
    )


def draw_example(rng: random.Random, count: int, known: Sequence[Instruction] = ALL_INSTRUCTIONS) -> Example:
    """Draw a random scene with instructions on different attributes, each of which changes the scene.

    Args:
        rng: Random number generator.
        count: Number of instructions. The result has fewer if `known` changes fewer attributes of the scene.
        known: Instructions to draw from.
    """
    while True:
        scene = draw_scene(rng)
        usable: dict[str, list[Instruction]] = {}
        for instruction in known:
            if instruction.apply(scene) != scene:
                usable.setdefault(instruction.attribute, []).append(instruction)
        if usable:
            break
    # Use the order of ATTRIBUTES, so that a seed gives the same examples for any order of `known`.
    attributes = rng.sample([a for a in ATTRIBUTES if a in usable], min(count, len(usable)))
    return Example(scene, tuple(rng.choice(usable[a]) for a in attributes))


def held_out_examples(number: int, count: int, seed: int = 0, known: Sequence[Instruction] = ALL_INSTRUCTIONS) -> list[Example]:
    """Return `number` examples of `count` instructions each. They are reproducible by `seed` and no recipe trains on them."""
    rng = random.Random(f"held-out/{seed}/{count}")
    return [draw_example(rng, count, known) for _ in range(number)]


def find_instruction(text: str) -> Instruction:
    """Return the instruction of the world with the text `text`.

    Raises:
        SliderEditError: The text is not an instruction of the world.
    """
    found = next((i for i in ALL_INSTRUCTIONS if i.text == text), None)
    if found is None:
        raise SliderEditError(
            f"{text!r} is not an instruction of the shapes world; write one such as {ALL_INSTRUCTIONS[0].text!r}"
        )
    return found


def coverage(scenes: Sequence[Scene]) -> Tensor:
    """Return the share of each pixel covered by circle and square, float32 `[N, 2, SIZE, SIZE]`, with one-pixel soft edges."""
    centre = torch.arange(SIZE, dtype=torch.float32) + 0.5
    y, x = centre[:, None], centre[None, :]
    covers = []
    for name in SHAPES:
        numbers = torch.tensor([(s.shape(name).x, s.shape(name).y, s.shape(name).radius) for s in scenes])
        px, py, radius = numbers[:, :, None, None].unbind(1)
        dx, dy = (x - px).abs(), (y - py).abs()
        if name == "circle":
            covers.append((radius - torch.hypot(dx, dy) + 0.5).clamp(0, 1))
        else:
            covers.append((radius - dx + 0.5).clamp(0, 1) * (radius - dy + 0.5).clamp(0, 1))
    return torch.stack(covers, dim=1)


def render(scenes: Iterable[Scene]) -> Tensor:
    """Render scenes as float32 `[N, 3, SIZE, SIZE]` in [0, 1]."""
    scenes = list(scenes)
    image = torch.tensor([s.background for s in scenes])[:, None, None, None].expand(-1, 3, SIZE, SIZE)
    for name, cover in zip(SHAPES, coverage(scenes).unbind(1), strict=True):
        colour = torch.tensor([s.shape(name).colour for s in scenes])[:, :, None, None]
        image = image + cover[:, None] * (colour - image)
    return image


def scene_image(example: Example) -> Image.Image:
    """Render the source scene of an example as an image with 8 bits per channel."""
    pixels = (render([example.scene])[0].permute(1, 2, 0) * 255).round().to(torch.uint8)
    return Image.fromarray(pixels.numpy())
