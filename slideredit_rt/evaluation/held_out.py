"""Cases made of the held-out examples of an embedded world."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

from PIL import Image
from torch import Tensor

from slideredit_rt.evaluation.dataset import Case, Phase, Scores


class _Instruction(Protocol):
    @property
    def text(self) -> str: ...


class _Example(Protocol):
    @property
    def prompt(self) -> str: ...

    @property
    def instructions(self) -> Sequence[_Instruction]: ...


E = TypeVar("E", bound=_Example)


class HeldOutExamples(ABC, Generic[E]):
    """Dataset of the held-out examples of a world. A subclass draws, renders and scores them.

    Args:
        seeds: Seed of the examples of each phase.

    Attributes:
        noun: Word for an example, with which the names of cases begin.
        examples: Example of each case, by the name of the case.
    """

    noun: str

    def __init__(self, seeds: dict[Phase, int]) -> None:
        self.seeds = seeds
        self.examples: dict[str, E] = {}

    @abstractmethod
    def draw(self, count: int, sliders: int, seed: int) -> Sequence[E]:
        """Return `count` examples with `sliders` instructions each."""

    @abstractmethod
    def image(self, example: E) -> Image.Image:
        """Return the source image of an example."""

    @abstractmethod
    def source(self, example: E) -> Tensor:
        """Return the exact drawing of the source, float32 `[1, 3, SIZE, SIZE]` in [0, 1]."""

    @abstractmethod
    def score_example(self, example: E, images: Tensor) -> list[Scores]:
        """Score images `[N, 3, SIZE, SIZE]` in [0, 1]."""

    def cases(self, phase: Phase, count: int, sliders: int) -> list[Case]:
        seed = self.seeds[phase]
        drawn = self.draw(count, sliders, seed)
        return [self.add(f"{self.noun}-{seed}-{sliders}-{index:03d}", example, index) for index, example in enumerate(drawn)]

    def add(self, name: str, example: E, seed: int = 0) -> Case:
        """Make a case of an example, so that its edits can be scored.

        Args:
            name: Name of the case.
            example: Example.
            seed: Seed of the initial noise.
        """
        self.examples[name] = example
        return Case(name, self.image(example), example.prompt, tuple(i.text for i in example.instructions), seed)

    def source_scores(self, case: Case) -> Scores:
        example = self.examples[case.name]
        return self.score_example(example, self.source(example))[0]

    def score(self, case: Case, images: Tensor) -> list[Scores]:
        return self.score_example(self.examples[case.name], images)
