"""CUDA streams and graphs for engines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


class CudaDevice:
    """A CUDA device: a stream that can be captured, and graph capture.

    Args:
        device: GPU with its number; None takes the current one.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device or torch.device("cuda", torch.cuda.current_device())
        self.name = torch.cuda.get_device_name(self.device)
        self.own = self._last = torch.cuda.Stream(self.device)

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
        with torch.cuda.stream(stream):
            yield stream.cuda_stream
        if stream != caller:
            caller.wait_stream(stream)

    @contextmanager
    def between(self) -> Iterator[None]:
        """Let what is enqueued on `own` run after the caller's stream so far, and before what the caller enqueues next."""
        caller = torch.cuda.current_stream(self.device)
        self.own.wait_stream(caller)
        yield
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
