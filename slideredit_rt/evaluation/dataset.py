"""What the benchmark runs on: images with instructions, and scorers that say what an edit of them shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from PIL import Image
from torch import Tensor

Phase = Literal["search", "bench"]
"""`search`: cases on which each system's range is chosen. `bench`: the others, which the report is about."""


@dataclass(frozen=True)
class Case:
    """One edit of the benchmark.

    Attributes:
        name: tells it from the others; file-name safe.
        image: source image, RGB.
        prompt: holds every instruction.
        instructions: the swept ones, one knob each.
        seed: of the initial noise, the same for every system.
    """

    name: str
    image: Image.Image
    prompt: str
    instructions: tuple[str, ...]
    seed: int


@dataclass(frozen=True)
class Scores:
    """What one image shows.

    Attributes:
        attributes: by scorer, how much of each swept instruction the image shows, in the case's order.
        distances: by scorer, distance to the source; lower is better. None where it cannot be told, as without a face.
    """

    attributes: Mapping[str, tuple[float, ...]]
    distances: Mapping[str, float | None]


class Dataset(Protocol):
    """Images to edit, and their scorers; the same scorers for every case."""

    def cases(self, phase: Phase, count: int, sliders: int) -> Sequence[Case]:
        """`count` cases whose prompts have `sliders` instructions, all of them swept; the same ones in every call.

        Raises:
            SliderEditError: there are not so many.
        """
        ...

    def source_scores(self, case: Case) -> Scores:
        """Scores of the image as it is before the edit."""
        ...

    def score(self, case: Case, images: Tensor) -> Sequence[Scores]:
        """Scores of edits of a case, float32 `[N, 3, H, W]` in [0, 1]."""
        ...
