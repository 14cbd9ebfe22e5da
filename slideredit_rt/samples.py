"""Images of each embedded world with instructions for them: what the page edits first, and what commands edit by default."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from slideredit_rt.assets import DEFAULT_WORLD, world_of


@dataclass(frozen=True)
class Sample:
    """Images to edit.

    Attributes:
        draw: Function that renders a number of different images.
        instructions: Two instructions for them.
    """

    draw: Callable[[int], list[Image.Image]]
    instructions: tuple[str, str]

    def open(self) -> Image.Image:
        """Return the first image."""
        return self.draw(1)[0]


def _scenes(number: int) -> list[Image.Image]:
    from slideredit_rt.shapes.world import held_out_examples, scene_image

    return [scene_image(example) for example in held_out_examples(number, 1)]


def _people(number: int) -> list[Image.Image]:
    from slideredit_rt.portraits.world import held_out_examples, portrait_image

    return [portrait_image(example) for example in held_out_examples(number, 1)]


SAMPLES: dict[str, Sample] = {
    "portraits": Sample(_people, ("make the person smile", "make the hair red")),
    "shapes": Sample(_scenes, ("make the circle red", "make the background dark")),
}
"""Samples by world."""


def sample_of(base: str | Path) -> Sample:
    """Return the sample of the world of a base; for bases that are not embedded, that of the default world."""
    return SAMPLES[world_of(base) or DEFAULT_WORLD]
