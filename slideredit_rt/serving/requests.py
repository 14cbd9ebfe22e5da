"""What goes into an edit service and what comes out: requests, partial images, errors, figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from PIL import Image

from slideredit_rt.errors import SliderEditError
from slideredit_rt.settings import EditSettings
from slideredit_rt.sliders import Slider

Outcome = Literal["completed", "refused", "failed", "cancelled", "deadline"]
"""How a request ended: `refused` for bad input or a full queue, `failed` where the engine or a decoder did."""


class QueueFull(SliderEditError):
    """The queue has no room for a request; `retry_after` seconds from now it is expected to have it."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DeadlineExceeded(SliderEditError):
    """A request's time was up before its images were ready."""


class Cancelled(SliderEditError):
    """A request was cancelled."""


class Closed(SliderEditError):
    """The service takes no more requests."""


class EngineFailure(SliderEditError):
    """Something other than bad input kept a request from its images."""


@dataclass(frozen=True, eq=False)
class EditRequest:
    """One source image or several, one prompt, and one image per setting of its sliders.

    Attributes:
        image: the image to edit, RGB; several for a base that takes them. Not to be changed while the request runs.
        sliders: instructions; their own strengths do not count.
        strengths: one per slider, for each image: n images, or a sweep.
        settings: of the edit.
        consecutive_seeds: the noise of the images has the seeds seed, seed + 1, …; without it, all have the settings' seed.
        interactive: a preview, which goes before full edits.
        timeout: seconds from the submission to the deadline; None waits for ever.
        partial_every: steps from one partial image to the next; 0 makes none.
    """

    image: Image.Image | Sequence[Image.Image]
    sliders: tuple[Slider, ...]
    strengths: tuple[tuple[float, ...], ...]
    settings: EditSettings = field(default_factory=EditSettings)
    consecutive_seeds: bool = False
    interactive: bool = False
    timeout: float | None = None
    partial_every: int = 0

    @property
    def seeds(self) -> tuple[int, ...]:
        """Of the noise of each image."""
        return tuple(self.settings.seed + index * self.consecutive_seeds for index in range(len(self.strengths)))


@dataclass(frozen=True)
class Partial:
    """What image `index` of a request is expected to become, after `step` of `steps` steps."""

    index: int
    step: int
    steps: int
    image: Image.Image


class Observer:
    """Told what happens in a service; override what is of interest. Called from several threads; must return at once, and
    raise nothing.

    Nothing here tells a request's words or images.
    """

    def step(self, rows: int, seconds: float, interactive: bool) -> None:
        """An engine call was made for `rows` images; a step with a negative pass counts as one."""

    def encoded(self, seconds: float) -> None:
        """A request was encoded, from the cache or afresh."""

    def decoded(self, images: int, seconds: float) -> None:
        """Images were decoded together, final or partial."""

    def cache(self, kind: str, hit: bool) -> None:
        """An encoding (`images`, `tokens` or `text`) was looked for."""

    def finished(self, outcome: Outcome, images: int, interactive: bool, seconds: float) -> None:
        """A request ended, `seconds` after its submission."""


@dataclass(frozen=True)
class Stats:
    """A service at one moment. Counts are since it began.

    Attributes:
        queued: images that have not made a step yet.
        running: images that have, and are not decoded yet.
        outcomes: number of requests by `Outcome`.
        batch_sizes: number of engine steps by their rows.
        step_seconds: time in engine steps.
        cache_hits, cache_misses: by kind of encoding.
        cache_bytes, cache_entries: kept now.
    """

    queued: int
    running: int
    outcomes: dict[str, int]
    batch_sizes: dict[int, int]
    step_seconds: float
    cache_hits: dict[str, int]
    cache_misses: dict[str, int]
    cache_bytes: int
    cache_entries: int
