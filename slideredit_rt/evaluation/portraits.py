"""Dataset of held-out people of the portraits world, whose edits are measured exactly."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from slideredit_rt.evaluation.dataset import SEEDS, Case, Phase, Scores
from slideredit_rt.portraits.measurer import Reader, read_jointly
from slideredit_rt.portraits.world import INSTRUCTIONS, Example, Instruction, held_out_examples, portrait_image, render


class PortraitsPeople:
    """Held-out people and the exact scorers `response` and `elsewhere` (see `score_portraits`).

    Args:
        known: Instructions that the prompts are made of.
        seeds: Seed of the people of each phase.
    """

    def __init__(self, known: Sequence[Instruction] = INSTRUCTIONS, seeds: dict[Phase, int] = SEEDS) -> None:
        self.known, self.seeds = known, seeds
        self.examples: dict[str, Example] = {}

    def cases(self, phase: Phase, count: int, sliders: int) -> list[Case]:
        seed, found = self.seeds[phase], []
        for index, example in enumerate(held_out_examples(count, sliders, seed, self.known)):
            found.append(self.add(f"person-{seed}-{sliders}-{index:03d}", example, index))
        return found

    def add(self, name: str, example: Example, seed: int = 0) -> Case:
        """Make a case of an example, so that its edits can be scored.

        Args:
            name: Name of the case.
            example: Person and instructions.
            seed: Seed of the initial noise.
        """
        self.examples[name] = example
        return Case(name, portrait_image(example), example.prompt, tuple(i.text for i in example.instructions), seed)

    def source_scores(self, case: Case) -> Scores:
        example = self.examples[case.name]
        return score_portraits(example, render(example.people))[0]

    def score(self, case: Case, images: Tensor) -> list[Scores]:
        return score_portraits(self.examples[case.name], images)


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
