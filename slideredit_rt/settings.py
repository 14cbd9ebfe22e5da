"""EditSettings: how an image is edited, the same value in the Python API, the command line and the HTTP API."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from numbers import Integral
from typing import TypedDict

from slideredit_rt.errors import SliderEditError

SEEDS = range(-(2**63), 2**64)
"""What torch's generator takes."""


def check_seed(seed: int) -> None:
    """Refuse a seed that torch's generator does not take."""
    if not isinstance(seed, Integral) or int(seed) not in SEEDS:
        raise SliderEditError(f"the seed is {seed!r}; give a whole number from −2⁶³ to 2⁶⁴ − 1")


@dataclass(frozen=True)
class EditSettings:
    """How an image is edited, apart from the image and its sliders.

    Attributes:
        prompt: holds every instruction; composed from them with " and " when not given. A GST adapter scales the whole prompt
            with one slider, which may name any part of it; in a bank, one slider per member. A slider of a GST bank that is
            called like a member, and names none, need not stand in the prompt, which must then be given.
        seed: of the initial noise.
        steps: denoising steps; None takes the family's default.
        guidance_scale: of the guidance that the backbone has as an input; None takes the family's default.
        true_cfg_scale: of classifier-free guidance with a negative pass, in which no slider acts; None takes the family's
            default, 1 leaves the pass out.
        negative_prompt: of that pass; None takes the family's default.

    Raises:
        SliderEditError: a seed that torch's generator does not take, no step, or a scale that is not finite.
    """

    prompt: str | None = None
    seed: int = 0
    steps: int | None = None
    guidance_scale: float | None = None
    true_cfg_scale: float | None = None
    negative_prompt: str | None = None

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if self.steps is not None and self.steps < 1:
            raise SliderEditError(f"{self.steps} denoising steps were asked for; give at least 1")
        for name, scale in (("guidance scale", self.guidance_scale), ("true-CFG scale", self.true_cfg_scale)):
            if scale is not None and not math.isfinite(scale):
                raise SliderEditError(f"{name} is {scale}; give a finite number")


class EditOptions(TypedDict, total=False):
    """The fields of `EditSettings` as keyword arguments."""

    prompt: str | None
    seed: int
    steps: int | None
    guidance_scale: float | None
    true_cfg_scale: float | None
    negative_prompt: str | None


def merge(settings: EditSettings | None, given: EditOptions) -> EditSettings:
    """The settings, or the defaults, with the fields that were given by name in place of theirs.

    Raises:
        SliderEditError: as `EditSettings`.
        TypeError: a name that is none of its fields.
    """
    return replace(EditSettings() if settings is None else settings, **given)
