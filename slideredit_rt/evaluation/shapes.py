"""Dataset of held-out scenes of the shapes world, whose edits are measured exactly."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from slideredit_rt.evaluation.dataset import SEEDS, Case, Phase, Scores
from slideredit_rt.shapes.measurer import measure, response, untouched
from slideredit_rt.shapes.world import ALL_INSTRUCTIONS, Example, Instruction, held_out_examples, render, scene_image


class ShapesScenes:
    """Held-out scenes and the exact scorers `response` and `elsewhere` (see `score_shapes`).

    Args:
        known: Instructions that the prompts are made of.
        seeds: Seed of the scenes of each phase.
    """

    def __init__(self, known: Sequence[Instruction] = ALL_INSTRUCTIONS, seeds: dict[Phase, int] = SEEDS) -> None:
        self.known, self.seeds = known, seeds
        self.examples: dict[str, Example] = {}

    def cases(self, phase: Phase, count: int, sliders: int) -> list[Case]:
        seed, found = self.seeds[phase], []
        for index, example in enumerate(held_out_examples(count, sliders, seed, self.known)):
            found.append(self.add(f"scene-{seed}-{sliders}-{index:03d}", example, index))
        return found

    def add(self, name: str, example: Example, seed: int = 0) -> Case:
        """Make a case of an example, so that its edits can be scored.

        Args:
            name: Name of the case.
            example: Scene and instructions.
            seed: Seed of the initial noise.
        """
        self.examples[name] = example
        return Case(name, scene_image(example), example.prompt, tuple(i.text for i in example.instructions), seed)

    def source_scores(self, case: Case) -> Scores:
        example = self.examples[case.name]
        return score_shapes(example, render([example.scene]))[0]

    def score(self, case: Case, images: Tensor) -> list[Scores]:
        return score_shapes(self.examples[case.name], images)


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
