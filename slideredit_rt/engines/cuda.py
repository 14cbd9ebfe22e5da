"""CUDA streams and graphs for engines."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

_URGENT = -1
"""Priority of streams with denoising steps: their kernels start before waiting ones of other streams, whose priority is 0."""


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Make a GPU the current one: kernels, plans and graphs go to the current GPU, whatever their tensors are on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class Pace:
    """Keeps the host at most one step ahead of a GPU, so that new requests, deadlines and cancellations take effect in time.

    Without it, the host would enqueue all steps of an edit at once. On a CPU it does nothing.

    Args:
        device: Device of the steps.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._previous: torch.cuda.Event | None = None

    def step(self) -> None:
        """Mark the end of a step that was enqueued on the current stream, and wait for the step before it."""
        if self._cuda:
            event = torch.cuda.Event()
            event.record()
            if self._previous is not None:
                self._previous.synchronize()
            self._previous = event


class Lane:
    """A CUDA stream for one kind of work, which runs beside other lanes. Nothing here makes the host wait.

    A lane that needs tensors of another one takes them with a mark of the work that made them. On a CPU, where work is done
    when a call returns, a lane does nothing.

    Args:
        device: Device of the work.
        urgent: Start this lane's kernels before those of other lanes.
    """

    def __init__(self, device: torch.device, *, urgent: bool = False) -> None:
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device, priority=_URGENT if urgent else 0)
            # Weights were loaded on the caller's stream.
            self._stream.wait_stream(torch.cuda.current_stream(device))

    def work(self) -> AbstractContextManager[Any]:
        """Enqueue a thread's work on this lane."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def mark(self) -> torch.cuda.Event | None:
        """Return a mark of the work that was enqueued on this lane so far."""
        return None if self._stream is None else self._stream.record_event()

    def take(self, mark: torch.cuda.Event | None, tensors: Iterable[Tensor]) -> None:
        """Let what is enqueued on this lane from now on use tensors of another lane.

        Args:
            mark: Mark of the other lane, made after the work that writes the tensors; None on a CPU.
            tensors: Tensors whose memory must not be used again before this lane's work with them has run, even if
                all references to them are dropped earlier.
        """
        if self._stream is None or mark is None:
            return
        self._stream.wait_event(mark)
        for tensor in tensors:
            tensor.record_stream(self._stream)


class CudaDevice:
    """A CUDA device: a stream that can be captured, and graph capture.

    Args:
        device: GPU with its number; None takes the current one.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device or torch.device("cuda", torch.cuda.current_device())
        self.name = torch.cuda.get_device_name(self.device)
        self.own = self._last = torch.cuda.Stream(self.device, priority=_URGENT)

    @contextmanager
    def stream(self) -> Iterator[int]:
        """Yield the handle of the caller's stream, ordered after all earlier calls, because contexts share scratch memory.

        The default stream cannot be captured. A stream of the engine's own replaces it, and the default stream waits for it.
        """
        caller = torch.cuda.current_stream(self.device)
        stream = self.own if caller == torch.cuda.default_stream(self.device) else caller
        for earlier in {caller, self._last} - {stream}:
            stream.wait_stream(earlier)
        self._last = stream
        try:
            with torch.cuda.device(self.device), torch.cuda.stream(stream):
                yield stream.cuda_stream
        finally:
            if stream != caller:
                caller.wait_stream(stream)

    @contextmanager
    def between(self) -> Iterator[None]:
        """Let what is enqueued on `own` run after the caller's stream so far, and before what the caller enqueues next."""
        caller = torch.cuda.current_stream(self.device)
        self.own.wait_stream(caller)
        try:
            yield
        finally:
            caller.wait_stream(self.own)

    def capture(self, enqueue: Callable[[int], object]) -> Callable[[], None]:
        """Capture the work that `enqueue(stream)` launches; return a function that replays it on the current stream."""
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            enqueue(stream.cuda_stream)
        return graph.replay

    def wait(self) -> None:
        """Block until all enqueued work has finished."""
        self._last.synchronize()
