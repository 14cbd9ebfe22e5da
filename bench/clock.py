"""Times on a device, and what the host and the compiler did meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch._dynamo.utils import counters


class Clock:
    """The wall clock, read while the device is idle.

    Args:
        device: Device that is waited for.

    Attributes:
        cuda: True for a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda = device.type == "cuda"

    def now(self) -> float:
        """Block until the device is idle, and return the time in seconds."""
        if self.cuda:
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def seconds(self, call: Callable[[], object]) -> float:
        """Return the seconds of one call, with the device idle before and after."""
        start = self.now()
        call()
        return self.now() - start

    def forget_peak(self) -> None:
        """Start a new measurement of the peak of device memory."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_gib(self) -> float | None:
        """Return the device memory that tensors held at most, in GiB; None on a CPU."""
        return torch.cuda.max_memory_allocated(self.device) / 2**30 if self.cuda else None


def compiled_graphs() -> int:
    """Return the number of graphs that dynamo has captured in this process."""
    return int(counters["stats"]["unique_graphs"])
