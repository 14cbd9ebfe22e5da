"""Dataset of held-out scenes of the shapes world, whose edits are measured exactly."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image
from torch import Tensor

from slideredit_rt.evaluation.dataset import SEEDS, Phase, Scores
from slideredit_rt.evaluation.held_out import HeldOutExamples
from slideredit_rt.shapes.measurer import measure, response, untouched
from slideredit_rt.shapes.world import ALL_INSTRUCTIONS, Example, Instruction, held_out_examples, render, scene_image


class ShapesScenes(HeldOutExamples[Example]):
    """Held-out scenes and the exact scorers `response` and `elsewhere` (see `score_shapes`).

    Args:
        known: Instructions that the prompts are made of.
        seeds: Seed of the scenes of each phase.
    """

    noun = "scene"

    def __init__(self, known: Sequence[Instruction] = ALL_INSTRUCTIONS, seeds: dict[Phase, int] = SEEDS) -> None:
        super().__init__(seeds)
        self.known = known

    def draw(self, count: int, sliders: int, seed: int) -> list[Example]:
        return held_out_examples(count, sliders, seed, self.known)

    def image(self, example: Example) -> Image.Image:
        return scene_image(example)

    def source(self, example: Example) -> Tensor:
        return render([example.scene])

    def score_example(self, example: Example, images: Tensor) -> list[Scores]:
        return score_shapes(example, images)


def score_shapes(example: Example, images: Tensor) -> list[Scores]:
    """Score images `[N, 3, SIZE, SIZE]` in [0, 1].

    `response` is 0 for the source and 1 for the exact edit. `elsewhere` is the root mean squared difference to the source, in
    units of [0, 1] pixel values, over the pixels that no instruction may change; None if there are no such pixels.
    """
    free = untouched(example)
    source = render([example.scene])[0][:, free]
    measured = measure(images, [example.scene] * len(images))
    apart: list[float | None] = [None] * len(images)
    if free.any():
        apart = (images[:, :, free] - source).square().flatten(1).mean(1).sqrt().tolist()
    return [
        Scores({"response": tuple(response(m, i, example.scene) for i in example.instructions)}, {"elsewhere": distance})
        for m, distance in zip(measured, apart, strict=True)
    ]
