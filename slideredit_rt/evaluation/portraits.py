"""Dataset of held-out people of the portraits world, whose edits are measured exactly."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image
from torch import Tensor

from slideredit_rt.evaluation.dataset import SEEDS, Phase, Scores
from slideredit_rt.evaluation.held_out import HeldOutExamples
from slideredit_rt.portraits.measurer import Reader, read_jointly
from slideredit_rt.portraits.world import INSTRUCTIONS, Example, Instruction, held_out_examples, portrait_image, render


class PortraitsPeople(HeldOutExamples[Example]):
    """Held-out people and the exact scorers `response` and `elsewhere` (see `score_portraits`).

    Args:
        known: Instructions that the prompts are made of.
        seeds: Seed of the people of each phase.
    """

    noun = "person"

    def __init__(self, known: Sequence[Instruction] = INSTRUCTIONS, seeds: dict[Phase, int] = SEEDS) -> None:
        super().__init__(seeds)
        self.known = known

    def draw(self, count: int, sliders: int, seed: int) -> list[Example]:
        return held_out_examples(count, sliders, seed, self.known)

    def image(self, example: Example) -> Image.Image:
        return portrait_image(example)

    def source(self, example: Example) -> Tensor:
        return render(example.people)

    def score_example(self, example: Example, images: Tensor) -> list[Scores]:
        return score_portraits(example, images)


def score_portraits(example: Example, images: Tensor) -> list[Scores]:
    """Score images `[N, 3, SIZE, SIZE]` in [0, 1].

    `response` is 0 for the source and 1 for the exact edit. `elsewhere` is the root mean squared difference to the exact
    drawing, in units of [0, 1] pixel values, over the pixels that no instruction changes; None if there are no such pixels.
    """
    responses = read_jointly(example, images).tolist()
    drift = Reader(example).drift(images)
    apart: list[float | None] = [None] * len(images) if drift is None else drift.tolist()
    return [
        Scores({"response": tuple(response)}, {"elsewhere": distance})
        for response, distance in zip(responses, apart, strict=True)
    ]
