"""An image of each embedded world with instructions for it, which the server's page edits first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from slideredit_rt.assets import DEFAULT_WORLD, WORLDS, base_of, is_embedded, resolve_base


@dataclass(frozen=True)
class Sample:
    """An image to edit.

    Attributes:
        open: Function that renders the image.
        instructions: Two instructions for it.
    """

    open: Callable[[], Image.Image]
    instructions: tuple[str, str]


def _scene() -> Image.Image:
    from slideredit_rt.shapes.world import held_out_examples, scene_image

    return scene_image(held_out_examples(1, 1)[0])


def _person() -> Image.Image:
    from slideredit_rt.portraits.world import held_out_examples, portrait_image

    return portrait_image(held_out_examples(1, 1)[0])


SAMPLES: dict[str, Sample] = {
    "shapes": Sample(_scene, ("make the circle red", "make the background dark")),
    "portraits": Sample(_person, ("make the person smile", "make the hair red")),
}
"""Samples by world."""


def world_of(base: str | Path) -> str | None:
    """Return the embedded world of a base, None for any other base.

    Args:
        base: Folder of the base.
    """
    shipped = (world for world in WORLDS if is_embedded(base_of(world)))
    return next((world for world in shipped if Path(base) == resolve_base(base_of(world))), None)


def sample_of(base: str | Path) -> Sample:
    """Return the sample of the world of a base; for bases that are not embedded, that of the default world."""
    return SAMPLES[world_of(base) or DEFAULT_WORLD]
