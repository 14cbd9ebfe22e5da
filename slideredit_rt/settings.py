"""`EditSettings`, the settings of an edit that the Python API, the command line and the HTTP API share."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from numbers import Integral
from typing import TypedDict

from slideredit_rt.errors import SliderEditError

SEEDS = range(-(2**63), 2**64)
"""Seeds that torch's generator accepts."""


def check_seed(seed: int) -> None:
    """Check that torch's generator accepts a seed.

    Raises:
        SliderEditError: the seed is not a whole number from −2⁶³ to 2⁶⁴ − 1.
    """
    if not isinstance(seed, Integral) or int(seed) not in SEEDS:
        raise SliderEditError(f"the seed is {seed!r}; pass a whole number from −2⁶³ to 2⁶⁴ − 1")


@dataclass(frozen=True)
class EditSettings:
    """Settings of an edit besides the image and the sliders.

    Attributes:
        prompt: text that contains every instruction; None joins the instructions with " and ". A GST adapter scales the whole
            prompt with one slider, which can name any part of it, or one slider per member of a bank. A slider of a GST bank
            that is named after a member and has no `adapter` need not be in the prompt, but then a prompt is required.
        seed: seed of the initial noise.
        steps: denoising steps; None takes the family's default.
        guidance_scale: scale of the embedded guidance, which is an input of the backbone; None takes the family's default.
        true_cfg_scale: scale of classifier-free guidance with a negative pass, in which sliders are off; None takes the
            family's default, 1 runs without the pass.
        negative_prompt: prompt of the negative pass; None takes the family's default.

    Raises:
        SliderEditError: the seed is out of range, there are no steps, or a scale is not finite.
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
            raise SliderEditError(f"the number of denoising steps is {self.steps}; pass at least 1")
        for name, scale in (("guidance scale", self.guidance_scale), ("true-CFG scale", self.true_cfg_scale)):
            if scale is not None and not math.isfinite(scale):
                raise SliderEditError(f"the {name} is {scale}; pass a finite number")


class EditOptions(TypedDict, total=False):
    """Keyword arguments that replace fields of `EditSettings`."""

    prompt: str | None
    seed: int
    steps: int | None
    guidance_scale: float | None
    true_cfg_scale: float | None
    negative_prompt: str | None


def merge(settings: EditSettings | None, given: EditOptions) -> EditSettings:
    """Replace fields of settings.

    Args:
        settings: settings to change; None takes the defaults.
        given: new values of fields, by name.

    Raises:
        SliderEditError: a value is invalid (see `EditSettings`).
        TypeError: a name is not a field.
    """
    return replace(EditSettings() if settings is None else settings, **given)
