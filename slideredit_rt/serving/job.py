"""A request on its way through an edit service, and the ticket of the one who waits for it."""

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
from slideredit_rt.serving.requests import Cancelled, DeadlineExceeded, EditRequest, EngineFailure, Outcome, Partial

T = TypeVar("T")


@dataclass(eq=False)
class Job(Generic[T]):
    """A request on its way: waiting for its encoding, then rows, then decoded images."""

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
        """Images without a step."""
        return sum(row.step == 0 for row in self.rows) if self.rows else len(self.seeds)

    @property
    def remaining(self) -> int:
        """Steps that all its images have still to make."""
        return sum(row.steps - row.step for row in self.rows) if self.rows else self.steps * len(self.seeds)

    def complete(self) -> None:
        """All images are there. Of several attempts to end a job the first one counts."""
        with suppress(InvalidStateError):
            self.future.set_result(self.collect([self.images[index] for index in range(len(self.seeds))]))

    def fail(self, error: Exception) -> None:
        # Tracebacks keep frames, and those keep this job, in a cycle until the collector comes by.
        for part in (error, error.__cause__):
            if part is not None:
                part.__traceback__ = None
        with suppress(InvalidStateError):
            self.future.set_exception(error)


def outcome_of(future: Future[Any]) -> Outcome:
    """How the request of a settled future ended."""
    if future.cancelled():
        return "cancelled"
    error = future.exception()
    kinds: dict[type[BaseException], Outcome] = {Cancelled: "cancelled", DeadlineExceeded: "deadline", EngineFailure: "failed"}
    return "completed" if error is None else kinds.get(type(error), "refused")


class Ticket(Generic[T]):
    """A submitted request.

    Attributes:
        future: its images; or a `SliderEditError`: bad input, `DeadlineExceeded`, `Cancelled`, `EngineFailure`. Cancelling the
            future is as good as `cancel`.
    """

    def __init__(self, job: Job[T]) -> None:
        self._job = job
        self.future: Future[T] = job.future

    def cancel(self) -> None:
        """Give up: the future raises `Cancelled` at once, and the request's rows leave at the next step boundary."""
        self._job.fail(Cancelled("the request was cancelled"))
