"""Lanes: encoding and decoding on a CUDA stream beside the steps, in order and with priority to the steps.

CUDA's streams and events are replaced by ones that know which work they have waited for, so that every use of a tensor can be
checked. Values are computed on the CPU. `tests/test_gpu.py` has the same on a GPU.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from slideredit_rt.editor import SliderEditor
from slideredit_rt.engines.cuda import Lane
from slideredit_rt.serving import batch
from slideredit_rt.serving import service as serving
from slideredit_rt.serving.batch import Batch, Row
from slideredit_rt.serving.requests import EditRequest, Partial
from slideredit_rt.serving.service import EditService
from slideredit_rt.sliders import Slider

GPU = torch.device("cuda", 0)


class Event:
    """A point in a stream: for each stream, how much of its work has run by then."""

    def __init__(self, done: dict[Stream, int]) -> None:
        self.done = dict(done)


class Stream:
    """A stream that counts its work and knows which work of other streams comes before its next."""

    def __init__(self, device: torch.device, priority: int = 0) -> None:
        self.device, self.priority = device, priority
        self.done: dict[Stream, int] = {self: 0}

    def run(self) -> None:
        self.done[self] += 1

    def wait_event(self, event: Event) -> None:
        for stream, count in event.done.items():
            self.done[stream] = max(self.done.get(stream, 0), count)

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(Event(other.done))

    def record_event(self) -> Event:
        return Event(self.done)


class Cuda:
    """The part of `torch.cuda` that lanes use.

    Attributes:
        default: Stream of threads that entered none.
        kept: Streams for which a tensor's memory is kept, by the address of the memory.
        writers: Stream, and count of its work, that wrote a tensor, by the address of its memory.
        problems: What was used too early, or without keeping its memory.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.default = Stream(GPU)
        self.kept: dict[int, set[Stream]] = {}
        self.writers: dict[int, tuple[Tensor, Stream, int]] = {}
        self.problems: list[str] = []
        self._local = threading.local()

        def record_stream(tensor: Tensor, stream: Stream) -> None:
            self.kept.setdefault(address(tensor), set()).add(stream)

        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: self.current)
        monkeypatch.setattr(torch.cuda, "stream", self._enter)
        monkeypatch.setattr(torch.Tensor, "record_stream", record_stream)

    @property
    def current(self) -> Stream:
        stream: Stream = getattr(self._local, "stream", self.default)
        return stream

    @contextmanager
    def _enter(self, stream: Stream) -> Iterator[None]:
        before, self._local.stream = self.current, stream
        try:
            yield
        finally:
            self._local.stream = before

    def wrote(self, *tensors: Tensor) -> None:
        """Note that the current stream has written tensors."""
        stream = self.current
        stream.run()
        for tensor in tensors:
            # Kept alive, so that no other tensor gets its address.
            self.writers[address(tensor)] = (tensor, stream, stream.done[stream])

    def read(self, what: str, *tensors: Tensor) -> None:
        """Check that the current stream may read tensors."""
        reader = self.current
        for tensor in tensors:
            _, writer, count = self.writers[address(tensor)]
            if writer is reader:
                continue
            if reader.done.get(writer, 0) < count:
                self.problems.append(f"{what} may run before the work that it reads")
            if reader not in self.kept.get(address(tensor), set()):
                self.problems.append(f"the memory that {what} reads may be used again before")


def address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    return Cuda(monkeypatch)


def test_a_lane_orders_what_it_takes_in_both_directions(cuda: Cuda) -> None:
    steps, codec = Lane(GPU, urgent=True), Lane(GPU)
    for giver, taker in ((codec, steps), (steps, codec)):
        tensor = torch.zeros(3)
        with giver.work():
            cuda.wrote(tensor)
            mark = giver.mark()
        with taker.work():
            cuda.read("a lane", tensor)
            assert len(cuda.problems) == 2, "it waits for nothing by itself"
            taker.take(mark, [tensor])
            cuda.problems.clear()
            cuda.read("a lane", tensor)
    assert cuda.problems == []
    assert cuda.current is cuda.default


def test_a_mark_does_not_cover_later_work(cuda: Cuda) -> None:
    steps, codec = Lane(GPU, urgent=True), Lane(GPU)
    tensor = torch.zeros(3)
    with codec.work():
        mark = codec.mark()
        cuda.wrote(tensor)
    with steps.work():
        steps.take(mark, [tensor])
        cuda.read("a step", tensor)
    assert cuda.problems == ["a step may run before the work that it reads"]


def test_steps_have_priority_and_weights_are_there(cuda: Cuda) -> None:
    cuda.wrote()
    streams = []
    for urgent in (True, False):
        with Lane(GPU, urgent=urgent).work():
            streams.append(cuda.current)
    assert [stream.priority for stream in streams] == [-1, 0]
    assert [stream.done[cuda.default] for stream in streams] == [1, 1], "both run after what loaded the weights"


def test_on_a_cpu_a_lane_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("Stream", "stream", "current_stream", "Event"):
        monkeypatch.setattr(torch.cuda, name, None)
    lane = Lane(torch.device("cpu"), urgent=True)
    with lane.work():
        assert lane.mark() is None
        lane.take(None, [torch.zeros(1)])


class Watched(EditService):
    """An edit service on fake lanes that checks what each of its threads reads."""

    cuda: Cuda

    def _decode(self, rows: Any, latents: Any, marks: Any, *, preview: bool) -> Any:
        decode = self.editor.decode

        def checked(together: Tensor, *size: int, preview: bool) -> Tensor:
            self.cuda.read("decoding", *latents)
            return decode(together, *size, preview=preview)

        vars(self.editor)["decode"] = checked
        try:
            return super()._decode(rows, latents, marks, preview=preview)
        finally:
            del vars(self.editor)["decode"]


def test_a_served_edit_keeps_its_lanes_in_order(
    cuda: Cuda, engines: dict[str, Path], scene: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Lane] = []
    used: dict[str, set[Stream]] = {"encode": set(), "step": set()}

    def lane(device: torch.device, **options: Any) -> Lane:
        made.append(Lane(GPU, **options))
        return made[-1]

    def make_rows(*args: Any, **options: Any) -> list[Row]:
        rows = real_rows(*args, **options)
        used["encode"].add(cuda.current)
        cuda.wrote(*(tensor for row in rows for tensor in row.tensors))
        return rows

    def gather(fresh: Batch, editor: SliderEditor, rows: Any) -> None:
        cuda.read("a step", *(tensor for row in rows for tensor in row.tensors))
        real_gather(fresh, editor, rows)

    def advance(stepped: Batch, *, estimate: bool = False) -> Tensor | None:
        clean = real_advance(stepped, estimate=estimate)
        used["step"].add(cuda.current)
        cuda.wrote(*(row.latents for row in stepped.rows), *([] if clean is None else [clean]))
        return clean

    real_rows, real_gather, real_advance = batch.make_rows, Batch.__init__, Batch.advance
    monkeypatch.setattr(serving, "Lane", lane)
    monkeypatch.setattr(serving, "make_rows", make_rows)
    monkeypatch.setattr(Batch, "__init__", gather)
    monkeypatch.setattr(Batch, "advance", advance)
    Watched.cuda = cuda
    editor = SliderEditor.from_engine(engines["st"])
    request = EditRequest(image=scene, sliders=(Slider("make the circle red"),), strengths=((0.25,), (1.25,)), partial_every=1)
    partials: list[Partial] = []
    with Watched(editor) as service:
        tickets = [service.submit(request, on_partial=partials.append) for _ in range(3)]
        assert all(len(ticket.future.result(120)) == 2 for ticket in tickets)
    assert cuda.problems == []
    assert partials
    with made[0].work():
        steps = cuda.current
    with made[1].work():
        codec = cuda.current
    assert used == {"encode": {codec}, "step": {steps}}
    assert (steps.priority, codec.priority) == (-1, 0)
