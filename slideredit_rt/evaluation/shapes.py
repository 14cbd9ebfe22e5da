"""The benchmark's scenes and scorer where the truth is exact: the shapes world."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slideredit_rt.evaluation.systems import Case
from slideredit_rt.training.shapes_evaluation import scene_image
from slideredit_rt.training.shapes_world import SHAPES, SIZE, Example, Scene, held_out_examples, measure, render, response


@dataclass(frozen=True)
class Scores:
    """What one picture shows.

    Attributes:
        attributes: how far each swept instruction was carried out, in its order.
        elsewhere: distance to the source where no swept instruction acts; lower is better.
    """

    attributes: tuple[float, ...]
    elsewhere: float


def shapes_cases(count: int, sliders: int, seed: int) -> dict[str, tuple[Case, Example]]:
    """`count` held-out scenes whose prompts have `sliders` instructions, all of them swept; by name.

    Args:
        seed: of the scenes. The benchmark takes 1, its search for ranges 2; 0 is what `make marks` reports on.
    """
    cases = {}
    for index, example in enumerate(held_out_examples(count, sliders, seed)):
        name = f"scene-{seed}-{sliders}-{index:03d}"
        texts = tuple(i.text for i in example.instructions)
        cases[name] = (Case(name, scene_image(example), example.prompt, texts, index), example)
    return cases


def untouched(example: Example) -> Tensor:
    """Bool `[SIZE, SIZE]`: the pixels that no instruction of the example may change."""
    centre = torch.arange(SIZE) + 0.5
    y, x = centre[:, None], centre[None, :]
    scene: Scene = example.scene
    distance = {}
    for name in SHAPES:
        shape = scene.shape(name)
        dx, dy = (x - shape.x).abs() / shape.radius, (y - shape.y).abs() / shape.radius
        distance[name] = torch.hypot(dx, dy) if name == "circle" else torch.maximum(dx, dy)
    free = torch.ones(SIZE, SIZE, dtype=torch.bool)
    for subject in {i.subject for i in example.instructions}:
        if subject == "background":
            # A shape's outermost pixels are mixed with the background.
            free &= (distance["circle"] < 0.8) | (distance["square"] < 0.8)
        else:
            # The same window as the measurer's: a shape made larger, and larger again.
            free &= distance[subject] > 1.65
    return free


def score_shapes(example: Example, images: Tensor) -> list[Scores]:
    """Measure pictures `[N, 3, SIZE, SIZE]` in [0, 1].

    `attributes` are the exact measurer's responses: 0 as in the source, 1 exactly as asked. `elsewhere` is the root mean
    squared difference to the source, in [0, 1] pixel units, over the pixels that no instruction may change.
    """
    free = untouched(example)
    source = render([example.scene])[0][:, free]
    measured = measure(images, [example.scene] * len(images))
    apart = (images[:, :, free] - source).square().flatten(1).mean(1).sqrt().tolist()
    return [
        Scores(tuple(response(m, i, example.scene) for i in example.instructions), distance)
        for m, distance in zip(measured, apart, strict=True)
    ]


def source_scores(examples: Sequence[Example]) -> list[Scores]:
    """The scores of the source pictures themselves: 0 up to the measurer's own error."""
    return [score_shapes(e, render([e.scene]))[0] for e in examples]
