"""Datasets of the benchmark: images with instructions, and scores of their edits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from PIL import Image
from torch import Tensor

Phase = Literal["search", "bench"]
"""`search`: cases on which each system's range is chosen. `bench`: separate cases, on which the report is based."""

SEEDS: dict[Phase, int] = {"bench": 1, "search": 2}
"""Seeds of the benchmark's scenes in the embedded worlds."""
CALIBRATION_SEEDS: dict[Phase, int] = {"bench": 3, "search": 4}
"""Seeds of the scenes for `slideredit-rt adapter calibrate`, which must differ from those of the benchmark."""
MARKS_SEEDS: dict[Phase, int] = {"bench": 0}
"""Seeds of the scenes of `make marks`."""


@dataclass(frozen=True)
class Case:
    """One edit of the benchmark.

    Attributes:
        name: Unique name that can be part of a file name.
        image: Source image, RGB.
        prompt: Prompt that contains every instruction.
        instructions: Swept instructions, one knob each.
        seed: Seed of the initial noise, the same for every system.
    """

    name: str
    image: Image.Image
    prompt: str
    instructions: tuple[str, ...]
    seed: int


@dataclass(frozen=True)
class Scores:
    """Scores of one image.

    Attributes:
        attributes: Score of each swept instruction by each scorer, in the case's order; higher means more of the edit.
        distances: Distance to the source by each scorer; lower is better. None where it is undefined, such as ArcFace's
            without a face.
    """

    attributes: Mapping[str, tuple[float, ...]]
    distances: Mapping[str, float | None]


class Dataset(Protocol):
    """Images to edit and their scorers. Every case has the same scorers."""

    def cases(self, phase: Phase, count: int, sliders: int) -> Sequence[Case]:
        """Return `count` cases whose prompts have `sliders` instructions, all of them swept. Every call returns the same.

        Raises:
            SliderEditError: The dataset has fewer cases.
        """
        ...

    def source_scores(self, case: Case) -> Scores:
        """Return the scores of the source image."""
        ...

    def score(self, case: Case, images: Tensor) -> Sequence[Scores]:
        """Return the scores of edits of a case. `images` is float32 `[N, 3, H, W]` in [0, 1]."""
        ...
