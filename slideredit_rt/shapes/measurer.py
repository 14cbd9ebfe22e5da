"""Exact measurement of edited scenes, and the pixels that an edit must leave unchanged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slideredit_rt.shapes.world import SHAPES, SIZE, SIZES, Example, Instruction, Scene, Shape


def area(name: str, shape: Shape) -> float:
    """Return the exact area of a shape in square pixels."""
    return math.pi * shape.radius**2 if name == "circle" else 4 * shape.radius**2


_WINDOW = 1.65
"""Largest distance from a shape's centre, in radii, that an edit may reach, even when "larger" is exaggerated."""


def _radii_away(scene: Scene, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return each pixel's distance from the centre of each shape, `[SIZE, SIZE]`, in radii: 1 is the outline."""
    centre = torch.arange(SIZE, dtype=dtype) + 0.5
    y, x = centre[:, None], centre[None, :]
    distance = {}
    for name in SHAPES:
        shape = scene.shape(name)
        dx, dy = (x - shape.x).abs() / shape.radius, (y - shape.y).abs() / shape.radius
        distance[name] = torch.hypot(dx, dy) if name == "circle" else torch.maximum(dx, dy)
    return distance


@dataclass(frozen=True)
class Measurement:
    """Measurements of a rendered image, at the positions of the shapes in its source scene.

    Attributes:
        background: Grey level of the background.
        colour: Mean RGB of each shape's core.
        area: Soft area of each shape in square pixels. A pixel counts in proportion to how far its colour is from the
            background towards the core's colour.
        position: Soft centroid (x, y) of each shape.
    """

    background: float
    colour: dict[str, tuple[float, float, float]]
    area: dict[str, float]
    position: dict[str, tuple[float, float]]


def measure(images: Tensor, scenes: Sequence[Scene]) -> list[Measurement]:
    """Measure edited images.

    Args:
        images: Images, float `[N, 3, SIZE, SIZE]` in [0, 1].
        scenes: N source scenes, which give the positions of the shapes, because edits never move a shape.

    Raises:
        ValueError: The shape of `images` is wrong.
    """
    if images.shape[1:] != (3, SIZE, SIZE) or len(images) != len(scenes):
        raise ValueError(f"expected {len(scenes)} images of [3, {SIZE}, {SIZE}], got {tuple(images.shape)}")
    centre = torch.arange(SIZE, dtype=torch.float64) + 0.5
    y, x = centre[:, None].expand(SIZE, SIZE), centre[None, :].expand(SIZE, SIZE)
    result = []
    for image, scene in zip(images.double(), scenes, strict=True):
        distance = _radii_away(scene, torch.float64)
        outside = (distance["circle"] > 1.7) & (distance["square"] > 1.7)
        background = image[:, outside].median(dim=1).values
        colour, areas, position = {}, {}, {}
        for name in SHAPES:
            core = image[:, distance[name] < 0.45].mean(dim=1)
            towards = core - background
            window = distance[name] < _WINDOW
            cover = ((image - background[:, None, None]) * towards[:, None, None]).sum(0) / towards.square().sum().clamp_min(
                1e-6
            )
            cover = torch.where(window, cover, 0).clamp(-0.2, 1.2)
            total = cover.sum().clamp_min(1e-6)
            red, green, blue = core.tolist()
            colour[name] = (red, green, blue)
            areas[name] = cover.sum().item()
            position[name] = ((cover * x).sum().div(total).item(), (cover * y).sum().div(total).item())
        result.append(Measurement(background.mean().item(), colour, areas, position))
    return result


def response(measured: Measurement, instruction: Instruction, scene: Scene) -> float:
    """Return how far an instruction was carried out on `scene`: 0 for the source, 1 for the exact edit, above 1 beyond it."""
    target = instruction.apply(scene)
    if instruction.subject == "background":
        return (measured.background - scene.background) / (target.background - scene.background)
    before, after = scene.shape(instruction.subject), target.shape(instruction.subject)
    if instruction.change in SIZES:
        start, end = area(instruction.subject, before), area(instruction.subject, after)
        return (measured.area[instruction.subject] - start) / (end - start)
    step = [b - a for a, b in zip(before.colour, after.colour, strict=True)]
    moved = [m - a for a, m in zip(before.colour, measured.colour[instruction.subject], strict=True)]
    return sum(s * m for s, m in zip(step, moved, strict=True)) / sum(s * s for s in step)


def untouched(example: Example) -> Tensor:
    """Return the pixels that no instruction of the example may change, bool `[SIZE, SIZE]`."""
    distance = _radii_away(example.scene, torch.float32)
    free = torch.ones(SIZE, SIZE, dtype=torch.bool)
    for subject in {i.subject for i in example.instructions}:
        if subject == "background":
            # The outermost pixels of a shape are blended with the background.
            free &= (distance["circle"] < 0.8) | (distance["square"] < 0.8)
        else:
            free &= distance[subject] > _WINDOW
    return free
