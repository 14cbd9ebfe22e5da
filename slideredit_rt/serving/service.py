"""EditService: a queue in front of an editor, whose requests share engine calls."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor

from slideredit_rt.editor import SliderEditor, broken_rows, not_finite
from slideredit_rt.engines.cuda import Lane, Pace
from slideredit_rt.errors import OutOfDeviceMemory, SliderEditError
from slideredit_rt.serving.adapter_folder import AdapterFolder
from slideredit_rt.serving.batch import Batch, Row, make_rows
from slideredit_rt.serving.cache import Caching, EncodingCache
from slideredit_rt.serving.job import Job, Ticket, outcome_of
from slideredit_rt.serving.latents import Latents, take_followers
from slideredit_rt.serving.requests import (
    Cancelled,
    Closed,
    DeadlineExceeded,
    EditRequest,
    EngineFailure,
    NoMemory,
    Observer,
    Partial,
    QueueFull,
    Stats,
)
from slideredit_rt.serving.scheduler import Scheduler
from slideredit_rt.settings import check_seed
from slideredit_rt.strength import check_strength

T = TypeVar("T")

PREVIEWS_COME = 10.0
"""Seconds after a preview in which another one is expected."""

_CACHING = Caching()
_log = logging.getLogger(__name__)


class EditService:
    """Thread-safe service that runs edits with continuous batching per denoising step; a context manager.

    One thread steps the engine while another encodes and decodes; on a GPU, each has a stream of its own, and steps have
    priority. Each image is a row with its own latents, schedule and step.
    Rows of the same shape and adapter share engine calls, whatever their sliders, strengths and step counts; `Scheduler` has
    their order.
    The result equals that of `SliderEditor.render` for the same request alone. Deadlines and cancellations take effect at the
    next step boundary.

    Args:
        editor: The editor, which nothing else may use until the service is closed.
        max_queue: Most images that wait for their first step, counted separately for previews and full edits; also the most
            images of a request.
        caching: Settings of what is kept between requests.
        max_batch: Most rows in a step; None takes the engine's.
        step_batching: Share steps between requests; otherwise they run one after the other.
        observer: Receives the service's events.
        adapters: Adapters that requests can choose, for an engine with adapter inputs; None if there is no choice.

    Raises:
        SliderEditError: `max_queue` or `max_batch` is out of range, the engine does not take single images, or there are
            adapters to choose but no adapter inputs.
    """

    def __init__(
        self,
        editor: SliderEditor,
        *,
        max_queue: int = 64,
        caching: Caching = _CACHING,
        max_batch: int | None = None,
        step_batching: bool = True,
        observer: Observer | None = None,
        adapters: AdapterFolder | None = None,
    ) -> None:
        if max_queue < 1:
            raise SliderEditError(f"max_queue is {max_queue}; give at least 1")
        if editor.min_batch > 1:
            raise SliderEditError(
                f"the engine's smallest batch is {editor.min_batch}, but a server also steps single images; rebuild it with "
                f"--batch 1,{editor.min_batch},{editor.max_batch}"
            )
        max_batch = editor.max_batch if max_batch is None else max_batch
        if not 1 <= max_batch <= editor.max_batch:
            raise SliderEditError(f"max_batch is {max_batch}; give 1 to {editor.max_batch}, the engine's largest batch")
        if adapters is not None and editor.adapters is None:
            raise SliderEditError(
                f"the engine contains its adapter, so it cannot run those in {str(adapters.folder)!r}; build one with "
                "--adapter-inputs, or leave out --adapters"
            )
        self.editor = editor
        self.adapters = adapters
        self.max_queue = max_queue
        self.max_batch = max_batch
        self.observer = observer or Observer()
        self._cache = EncodingCache(caching.max_bytes, self.observer.cache)
        self._latents = Latents(self._cache if caching.latents and caching.max_bytes else None)
        self._scheduler = Scheduler(max_batch, step_batching=step_batching)
        self._pace = Pace(editor.device)
        self._steps, self._codec = Lane(editor.device, urgent=True), Lane(editor.device)
        # Guards all attributes from here to `_step_seconds`.
        self._changed = threading.Condition()
        self._jobs: dict[Future[Any], Job[Any]] = {}
        self._to_encode: dict[bool, deque[Job[Any]]] = {True: deque(), False: deque()}
        self._to_decode: list[Row] = []
        self._partials: dict[Row, tuple[int, Tensor, Any]] = {}
        self._last_preview = -math.inf
        self._closing = self._stopped = False
        self._outcomes: Counter[str] = Counter()
        self._batch_sizes: Counter[int] = Counter()
        self._step_seconds = 0.0
        # Used by the stepping thread only.
        self._batches: dict[tuple[Row, ...], Batch] = {}
        self._threads = [
            threading.Thread(target=self._guard, args=(loop,), name=f"slideredit-{name}", daemon=True)
            for name, loop in (("steps", self._make_steps), ("pipeline", self._run_pipeline))
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> EditService:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def submit(self, request: EditRequest, on_partial: Callable[[Partial], None] | None = None) -> Ticket[list[Image.Image]]:
        """Queue a request.

        Args:
            request: The edit.
            on_partial: Called from a thread of the service with each partial image; must return quickly.

        Raises:
            QueueFull: Too many images wait.
            Closed: The service was closed.
            SliderEditError: The input is bad. Errors that only encoding reveals are raised by the future instead.
        """
        return self._submit(request, self.editor.to_images, list, on_partial)

    def submit_tensor(self, request: EditRequest) -> Ticket[Tensor]:
        """Queue a request like `submit`, but with a float32 `[N, 3, H, W]` result in [0, 1], as from `render_tensor`."""
        return self._submit(request, torch.unbind, torch.stack, None)

    def _submit(
        self,
        request: EditRequest,
        convert: Callable[[Tensor], Sequence[Any]],
        collect: Callable[[list[Any]], T],
        on_partial: Callable[[Partial], None] | None,
    ) -> Ticket[T]:
        try:
            self._check(request)
            steps = self.editor.number_of_steps(request.settings)
            job = Job(request, request.seeds, steps, convert, collect, on_partial)
            with self._changed:
                if self._closing:
                    raise Closed("the service is shutting down and accepts no requests; try another server")
                self._check_room(job)
                job.future.add_done_callback(self._retire)
                self._jobs[job.future] = job
                self._to_encode[request.interactive].append(job)
                if request.interactive:
                    self._last_preview = job.submitted
                self._changed.notify_all()
        except SliderEditError:
            with self._changed:
                self._outcomes["refused"] += 1
            self.observer.finished("refused", len(request.strengths), request.interactive, 0.0)
            raise
        return Ticket(job)

    def _check(self, request: EditRequest) -> None:
        """Raise on errors that show without encoding."""
        count = len(request.strengths)
        if not 1 <= count <= self.max_queue:
            raise SliderEditError(f"{count} images were requested; request 1 to {self.max_queue}")
        for strengths in request.strengths:
            if len(strengths) != len(request.sliders):
                raise SliderEditError(
                    f"{list(strengths)} has {len(strengths)} strength(s), but there are {len(request.sliders)} slider(s); "
                    "give one per slider"
                )
            for slider, strength in zip(request.sliders, strengths, strict=True):
                check_strength(slider.instruction, strength)
        check_seed(request.seeds[-1])
        self._check_adapter(request)
        if request.timeout is not None and not (math.isfinite(request.timeout) and request.timeout > 0):
            raise SliderEditError(f"timeout is {request.timeout} seconds; give a positive number, or None")
        if request.partial_every < 0:
            raise SliderEditError(f"partial_every is {request.partial_every}; give 0 or more steps")

    def _editor_of(self, request: EditRequest) -> SliderEditor:
        """Return the editor with the adapter that a request chooses, which is read if it is not on the device."""
        if request.adapter is None:
            return self.editor
        assert self.adapters is not None  # checked on submission
        return self.editor.use_adapter(self.adapters.path(request.adapter))

    def _check_adapter(self, request: EditRequest) -> None:
        if request.adapter is None:
            self.editor.check_adapter()
        elif self.adapters is None:
            raise SliderEditError(
                f"the request chooses the adapter {request.adapter[:80]!r}, but this server has no folder of adapters; leave "
                "adapter out, or start the server with --adapters"
            )
        else:
            self.adapters.path(request.adapter)

    def _check_room(self, job: Job[Any]) -> None:
        interactive, count = job.request.interactive, len(job.seeds)
        ahead = [other for other in self._jobs.values() if other.request.interactive >= interactive]
        waiting = sum(other.waiting for other in ahead if other.request.interactive == interactive)
        excess = waiting + count - self.max_queue
        if excess <= 0:
            return
        # Estimate the time until enough of the images ahead have finished.
        rows_stepped = sum(rows * steps for rows, steps in self._batch_sizes.items())
        seconds = self._step_seconds / rows_stepped if rows_stepped else 0.0
        images = sum(len(other.seeds) for other in ahead)
        retry_after = max(1.0, seconds * sum(other.remaining for other in ahead) * excess / images)
        raise QueueFull(
            f"the queue has no room for {count} more: {waiting} of at most {self.max_queue} images wait; try again later",
            retry_after,
        )

    def close(self, *, drain: bool = True, timeout: float | None = None) -> None:
        """Reject new requests and stop both threads. Idempotent.

        Args:
            drain: Finish accepted requests first instead of cancelling them.
            timeout: Seconds after which the remaining requests are cancelled; None waits for all.
        """
        with self._changed:
            self._closing = True
            if drain:
                self._changed.wait_for(lambda: not self._jobs, timeout)
            left = list(self._jobs.values())
        for job in left:
            job.fail(Cancelled("the service was closed before the request finished"))
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()
        self._cache.clear()

    @property
    def closed(self) -> bool:
        """True once the service rejects new requests."""
        return self._closing

    def stats(self) -> Stats:
        """Return a snapshot of the service."""
        with self._changed:
            queued = sum(job.waiting for job in self._jobs.values())
            running = sum(len(job.seeds) - job.waiting - len(job.images) for job in self._jobs.values())
            outcomes, batch_sizes, step_seconds = dict(self._outcomes), dict(self._batch_sizes), self._step_seconds
        cache = self._cache
        kept = (dict(cache.hits), dict(cache.misses), cache.sizes(), len(cache))
        return Stats(queued, running, outcomes, batch_sizes, step_seconds, *kept)

    def _retire(self, future: Future[Any]) -> None:
        """Remove a job whose future is resolved. Called exactly once per job."""
        outcome = outcome_of(future)
        with self._changed:
            job = self._jobs.pop(future)
            job.rows = []  # rows reference their job, which would make a reference cycle
            self._outcomes[outcome] += 1
            self._changed.notify_all()
        seconds = time.monotonic() - job.submitted
        self.observer.finished(outcome, len(job.seeds), job.request.interactive, seconds)

    def _guard(self, loop: Callable[[], None]) -> None:
        """Run a thread's loop; if it raises, close the service and fail all requests."""
        try:
            loop()
        except BaseException as error:
            _log.exception("the edit service stopped")
            with self._changed:
                self._closing = self._stopped = True
                left = list(self._jobs.values())
                self._changed.notify_all()
            for job in left:
                job.fail(EngineFailure(f"the edit service stopped ({type(error).__name__}: {error}); restart it"))

    def _beside_previews(self) -> bool:
        return time.monotonic() - self._last_preview < PREVIEWS_COME

    # Engine steps.

    def _make_steps(self) -> None:
        with self._steps.work():
            while self._make_step():
                pass

    def _make_step(self) -> bool:
        """Wait for rows and step some of them once. Return False if the service has stopped."""
        with self._changed:
            expired: list[Job[Any]] = []
            while not expired and not self._stopped:
                now = time.monotonic()
                expired = [job for job in self._jobs.values() if job.deadline <= now]
                self._scheduler.discard(lambda row: row.done or row.owner.future.done())
                if len(self._scheduler) or expired:
                    break
                self._batches.clear()
                deadline = min((job.deadline for job in self._jobs.values()), default=math.inf)
                self._changed.wait(None if deadline == math.inf else deadline - now)
            if self._stopped:
                return False
            rows = [] if expired else self._scheduler.next_rows(beside_previews=self._beside_previews())
        for job in expired:
            job.fail(DeadlineExceeded(f"the images were not ready within {job.request.timeout:g} seconds"))
        if rows:
            self._step(rows)
        return True

    def _step(self, rows: list[Row]) -> None:
        started = time.perf_counter()
        wanted = [self._wants_partial(row) for row in rows]
        try:
            clean = self._batch_of(rows).advance(estimate=any(wanted))
            mark = self._steps.mark() if any(wanted) or any(row.done for row in rows) else None
            self._latents.keep_first_steps(rows, self._steps)
            self._pace.step()
        except Exception as error:
            self._fail(rows, "the engine failed in a step", error)
            return
        seconds = time.perf_counter() - started
        with self._changed:
            self._batch_sizes[len(rows)] += 1
            self._step_seconds += seconds
            for index, row in enumerate(rows):
                if row.done:
                    self._partials.pop(row, None)
                    row.made = mark
                    self._to_decode.append(row)
                elif clean is not None and wanted[index]:
                    self._partials[row] = row.step, clean[index : index + 1], mark
            self._scheduler.add(take_followers(rows))
            self._changed.notify_all()
        self.observer.step(len(rows), seconds, rows[0].interactive)

    def _batch_of(self, rows: list[Row]) -> Batch:
        """Return the batch of these rows; reuse the one from their last step together."""
        key = tuple(rows)
        if key not in self._batches:
            # Drop the batches of rows that are done or now step in another batch.
            gone = {*rows, *(row for old in self._batches for row in old if row.done or row.owner.future.done())}
            self._batches = {old: batch for old, batch in self._batches.items() if gone.isdisjoint(old)}
            for row in rows:
                self._steps.take(row.made, row.tensors)
                row.made = None
            self._batches[key] = Batch(rows[0].editor, rows)
        return self._batches[key]

    def _wants_partial(self, row: Row) -> bool:
        job: Job[Any] = row.owner
        every, step = job.request.partial_every, row.step + 1
        return job.on_partial is not None and every > 0 and step % every == 0 and step < row.steps

    def _fail(self, rows: Sequence[Row], what: str, error: Exception) -> None:
        _log.error("%s", what, exc_info=error)
        for job in {row.owner for row in rows}:
            job.fail(_failure(what, error))
        _free_memory(error)

    # Encoding and decoding.

    @torch.no_grad()
    def _run_pipeline(self) -> None:
        with self._codec.work():
            while (task := self._wait_for_task()) is not None:
                task()
                # Release its images before waiting for the next task.
                del task

    def _wait_for_task(self) -> Callable[[], None] | None:
        """Wait for the next task; return None if the service has stopped."""
        with self._changed:
            while not self._stopped:
                if (task := self._next_task()) is not None:
                    return task
                self._changed.wait()
        return None

    def _next_task(self) -> Callable[[], None] | None:
        """Return the next task: decode previews, encode previews, decode full edits, show partial images, encode full edits."""
        self._to_decode = [row for row in self._to_decode if not row.owner.future.done()]
        self._partials = {row: part for row, part in self._partials.items() if not row.owner.future.done()}
        for interactive in (True, False):
            if first := next((row for row in self._to_decode if row.interactive == interactive), None):
                rows = self._together(first, self._to_decode)
                self._to_decode = [row for row in self._to_decode if row not in rows]
                return partial(self._finish, rows)
            if interactive and (job := self._next_job(interactive=True)) is not None:
                return partial(self._encode, job)
        if self._partials:
            rows = self._together(next(iter(self._partials)), list(self._partials))
            return partial(self._show, [(row, *self._partials.pop(row)) for row in rows])
        job = self._next_job(interactive=False)
        return None if job is None else partial(self._encode, job)

    def _next_job(self, *, interactive: bool) -> Job[Any] | None:
        queue = self._to_encode[interactive]
        while queue and queue[0].future.done():
            queue.popleft()
        return queue.popleft() if queue else None

    def _together(self, first: Row, rows: Sequence[Row]) -> list[Row]:
        """Return `first` and other rows that can be decoded with it."""
        others = (row for row in rows if row is not first and row.key == first.key and row.interactive == first.interactive)
        return [first, *others][: self._scheduler.limit(interactive=first.interactive, beside_previews=self._beside_previews())]

    def _encode(self, job: Job[Any]) -> None:
        request, started = job.request, time.perf_counter()
        try:
            editor = self._editor_of(request)
            prepared = editor.prepare(request.image, request.sliders, request.settings, remember=self._cache)
            rows = make_rows(
                editor, prepared, request.strengths, job.seeds, job.steps, owner=job, interactive=request.interactive
            )
        except Exception as error:
            if isinstance(error, SliderEditError) and not _is_memory(error):
                job.fail(error)
                return
            _log.error("a request could not be encoded", exc_info=error)
            job.fail(_failure("the request could not be encoded", error))
            _free_memory(error)
            return
        self.observer.encoded(time.perf_counter() - started)
        mark = self._codec.mark()
        for row in rows:
            row.made = mark
        ready = self._latents.resume(rows)
        with self._changed:
            if job.future not in self._jobs:
                return
            job.rows = rows
            self._scheduler.add(ready)
            self._to_decode += [row for row in rows if row.done]
            self._changed.notify_all()

    def _decode(self, rows: Sequence[Row], latents: Sequence[Tensor], marks: Sequence[Any], *, preview: bool) -> Tensor | None:
        """Decode several rows into `[B, 3, H, W]`; on an error, fail their jobs and return None.

        Args:
            rows: Rows of the same size.
            latents: Latents to decode for each row.
            marks: Mark of the work that wrote the latents of each row.
            preview: Use the editor's preview decoder, if it has one.
        """
        started = time.perf_counter()
        try:
            for one, mark in zip(latents, marks, strict=True):
                self._codec.take(mark, [one])
            pixels = self.editor.decode(torch.cat(list(latents)), rows[0].height, rows[0].width, preview=preview).cpu()
        except Exception as error:
            self._fail(rows, "images could not be decoded", error)
            return None
        self.observer.decoded(len(rows), time.perf_counter() - started)
        return pixels

    def _finish(self, rows: list[Row]) -> None:
        pixels = self._decode(rows, [row.latents for row in rows], [row.made for row in rows], preview=rows[0].interactive)
        if pixels is None:
            return
        broken = broken_rows(pixels)
        for place, (row, image) in enumerate(zip(rows, pixels, strict=True)):
            job: Job[Any] = row.owner
            if place in broken:
                self._latents.forget(row)
                names = [slider.instruction for slider in job.request.sliders]
                job.fail(not_finite(names, job.request.strengths[row.index]))
                continue
            self._latents.keep_result(row, self._codec)
            with self._changed:
                job.images[row.index] = job.convert(image[None])[0]
            if len(job.images) == len(job.seeds):
                job.complete()

    def _show(self, parts: list[tuple[Row, int, Tensor, Any]]) -> None:
        rows, steps, latents, marks = zip(*parts, strict=True)
        pixels = self._decode(rows, latents, marks, preview=True)
        if pixels is None:
            return
        # Skip broken previews of the result; only the last step decides whether a request fails.
        broken = broken_rows(pixels)
        whole = [place for place in range(len(parts)) if place not in broken]
        for place, image in zip(whole, self.editor.to_images(pixels[whole]), strict=True):
            row, step = rows[place], steps[place]
            job: Job[Any] = row.owner
            if job.on_partial is None or job.future.done():
                continue
            try:
                job.on_partial(Partial(row.index, step, row.steps, image))
            except Exception:
                _log.exception("the on_partial callback of a request failed")


def _is_memory(error: Exception) -> bool:
    return isinstance(error, OutOfDeviceMemory | torch.OutOfMemoryError)


def _failure(what: str, error: Exception) -> SliderEditError:
    """Return the error of a request that failed for a reason other than bad input."""
    if _is_memory(error):
        failure: SliderEditError = NoMemory("the server's GPU is out of memory for a batch with this edit; try again later")
    else:
        failure = EngineFailure(f"{what} ({type(error).__name__}: {error}); other requests are not affected")
    failure.__cause__ = error
    return failure


def _free_memory(error: Exception) -> None:
    """Return the memory of a failed call to the GPU. Tracebacks refer to its tensors."""
    part: BaseException | None = error
    while part is not None:
        part.__traceback__ = None
        part = part.__cause__ or part.__context__
    if _is_memory(error):
        _log.error("start the server with a smaller --max-batch or with --offload encoders to use less GPU memory")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
