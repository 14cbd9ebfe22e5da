"""Job (a request while a service runs it) and Ticket (the handle that its submitter holds)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from torch import Tensor

from slideredit_rt.serving.batch import Row
from slideredit_rt.serving.requests import Cancelled, DeadlineExceeded, EditRequest, EngineFailure, NoMemory, Outcome, Partial

T = TypeVar("T")


@dataclass(eq=False)
class Job(Generic[T]):
    """A request while a service runs it: first waiting to be encoded, then rows, then decoded images."""

    request: EditRequest
    seeds: tuple[int, ...]
    steps: int
    convert: Callable[[Tensor], Sequence[Any]]
    collect: Callable[[list[Any]], T]
    on_partial: Callable[[Partial], None] | None
    future: Future[T] = field(default_factory=Future)
    submitted: float = field(default_factory=time.monotonic)
    rows: list[Row] = field(default_factory=list)
    images: dict[int, Any] = field(default_factory=dict)

    @property
    def deadline(self) -> float:
        return math.inf if self.request.timeout is None else self.submitted + self.request.timeout

    @property
    def waiting(self) -> int:
        """Number of images that have not made a step."""
        if not self.rows:
            return len(self.seeds)
        return sum(row.step == row.begin and row.index not in self.images for row in self.rows)

    @property
    def remaining(self) -> int:
        """Number of steps left, over all images."""
        return sum(row.steps - row.step for row in self.rows) if self.rows else self.steps * len(self.seeds)

    def complete(self) -> None:
        """Resolve the future with all images. The first of several attempts to end a job counts."""
        with suppress(InvalidStateError):
            self.future.set_result(self.collect([self.images[index] for index in range(len(self.seeds))]))

    def fail(self, error: Exception) -> None:
        # A traceback references frames that reference this job, a cycle that would live until the next garbage collection.
        for part in (error, error.__cause__):
            if part is not None:
                part.__traceback__ = None
        with suppress(InvalidStateError):
            self.future.set_exception(error)


def outcome_of(future: Future[Any]) -> Outcome:
    """Return how the request of a resolved future ended."""
    if future.cancelled():
        return "cancelled"
    error = future.exception()
    kinds: dict[type[BaseException], Outcome] = {
        Cancelled: "cancelled",
        DeadlineExceeded: "deadline",
        EngineFailure: "failed",
        NoMemory: "failed",
    }
    return "completed" if error is None else kinds.get(type(error), "refused")


class Ticket(Generic[T]):
    """Handle of a submitted request.

    Attributes:
        future: Resolves to the images, or raises a `SliderEditError`: bad input, `DeadlineExceeded`, `Cancelled`,
            `NoMemory` or `EngineFailure`. Cancelling the future has the same effect as `cancel`.
    """

    def __init__(self, job: Job[T]) -> None:
        self._job = job
        self.future: Future[T] = job.future

    def cancel(self) -> None:
        """Cancel the request: the future raises `Cancelled` at once, and its rows are dropped at the next step boundary."""
        self._job.fail(Cancelled("the request was cancelled"))
