"""Types at the interface of an edit service: requests, partial images, errors, observers and statistics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from PIL import Image

from slideredit_rt.errors import SliderEditError
from slideredit_rt.settings import EditSettings
from slideredit_rt.sliders import Slider
from slideredit_rt.strength import Strength

Outcome = Literal["completed", "refused", "failed", "cancelled", "deadline"]
"""Result of a request: `refused` means bad input or a full queue, `failed` an error in the engine or in decoding."""


class QueueFull(SliderEditError):
    """The queue has no room for a request. It is expected to have room in `retry_after` seconds."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DeadlineExceeded(SliderEditError):
    """A request's images were not ready before its deadline."""


class Cancelled(SliderEditError):
    """A request was cancelled."""


class Closed(SliderEditError):
    """The service is closed and accepts no requests."""


class NoMemory(SliderEditError):
    """The device was out of memory for a request; other requests continue."""


class EngineFailure(SliderEditError):
    """A request failed for a reason other than bad input."""


@dataclass(frozen=True, eq=False)
class EditRequest:
    """Edit of one source image (or several) with one prompt; makes one image per setting of the sliders.

    Attributes:
        image: RGB image to edit, or several if the base takes them. Must not change while the request runs.
        sliders: Instructions. Their own strengths are ignored.
        strengths: One strength per slider, for each image to make.
        settings: Settings of the edit.
        consecutive_seeds: Use the seeds seed, seed + 1, … for the images instead of the same one for all.
        interactive: True for a preview. Previews run before full edits.
        timeout: Seconds from submission to deadline; None sets no deadline.
        partial_every: Steps between partial images; 0 makes none.
        adapter: Name of the adapter to use, for an engine with adapter inputs; None takes the engine's default.
    """

    image: Image.Image | Sequence[Image.Image]
    sliders: tuple[Slider, ...]
    strengths: tuple[tuple[Strength, ...], ...]
    settings: EditSettings = field(default_factory=EditSettings)
    consecutive_seeds: bool = False
    interactive: bool = False
    timeout: float | None = None
    partial_every: int = 0
    adapter: str | None = None

    @property
    def seeds(self) -> tuple[int, ...]:
        """Noise seed of each image."""
        return tuple(self.settings.seed + index * self.consecutive_seeds for index in range(len(self.strengths)))


@dataclass(frozen=True)
class Partial:
    """Estimate of image `index` of a request after `step` of `steps` steps."""

    index: int
    step: int
    steps: int
    image: Image.Image


class Observer:
    """Base class of observers, whose methods a service calls as things happen. By default they do nothing.

    The methods are called from several threads. They must return quickly and must not raise. They never receive text or images
    of requests.
    """

    def step(self, rows: int, seconds: float, interactive: bool) -> None:
        """Record an engine step of `rows` images. A step with a negative pass counts once."""

    def encoded(self, seconds: float) -> None:
        """Record that a request was encoded, with or without the cache."""

    def decoded(self, images: int, seconds: float) -> None:
        """Record that images, final or partial, were decoded together."""

    def cache(self, kind: str, hit: bool) -> None:
        """Record a cache lookup of an encoding (`images`, `tokens` or `text`) or of latents (`first_steps` or `latents`)."""

    def finished(self, outcome: Outcome, images: int, interactive: bool, seconds: float) -> None:
        """Record that a request ended, `seconds` after its submission."""


@dataclass(frozen=True)
class Stats:
    """Snapshot of a service. Counts start with the service.

    Attributes:
        queued: Images waiting for their first step.
        running: Images between their first step and their decoding.
        outcomes: Number of requests by `Outcome`.
        batch_sizes: Number of engine steps by batch size.
        step_seconds: Total time in engine steps.
        cache_hits, cache_misses: Lookups by kind of encoding or latents.
        cache_bytes_by_kind: Current size of the cache by kind.
        cache_entries: Current number of values in the cache.
    """

    queued: int
    running: int
    outcomes: dict[str, int]
    batch_sizes: dict[int, int]
    step_seconds: float
    cache_hits: dict[str, int]
    cache_misses: dict[str, int]
    cache_bytes_by_kind: dict[str, int]
    cache_entries: int

    @property
    def cache_bytes(self) -> int:
        """Current size of the cache."""
        return sum(self.cache_bytes_by_kind.values())
