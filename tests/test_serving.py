"""The service: every image as it is alone, whoever shares the engine call; order, bounds, endings, and nothing lost."""

from __future__ import annotations

import copy
import gc
import random
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from http_server import waited_for
from PIL import Image
from qwen_checkpoint import qwen_adapter, random_image, save_tiny_checkpoint
from torch import Tensor

from slideredit_rt.adapters import load_adapter, save_adapter
from slideredit_rt.editor import SliderEditor
from slideredit_rt.errors import OutOfDeviceMemory, SliderEditError
from slideredit_rt.families import Family
from slideredit_rt.families.flux_kontext import FluxKontext
from slideredit_rt.serving import (
    Cancelled,
    Closed,
    DeadlineExceeded,
    EditRequest,
    EditService,
    EngineFailure,
    NoMemory,
    Observer,
    Outcome,
    Partial,
    QueueFull,
    Ticket,
)
from slideredit_rt.serving.cache import Caching, EncodingCache, size_of
from slideredit_rt.serving.faults import fault_of
from slideredit_rt.serving.scheduler import BACKGROUND_EVERY
from slideredit_rt.settings import EditSettings
from slideredit_rt.sliders import Slider

RED, DARK = Slider("make the circle red"), Slider("make the background dark")
WAIT = 60.0  # seconds, which no test needs


class Gate:
    """An engine that makes as many calls as it is let, and tells the alphas and timesteps of each."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.alphas: list[list[float]] = []
        self.timesteps: list[list[float]] = []
        self.fail: Exception | None = None
        self._permits = threading.Semaphore(0)
        self._stands = threading.Condition()
        self._arrived = 0

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        with self._stands:
            self._arrived += 1
            self._stands.notify_all()
        self._permits.acquire()
        with self._stands:
            self.alphas.append([round(a, 4) for a in inputs["alpha"].flatten(1)[:, 0].tolist()])
            self.timesteps.append(inputs["timestep"].tolist())
        if self.fail is not None:
            raise self.fail
        output: Tensor = self.engine(inputs)
        return output

    def stand(self) -> None:
        """Wait until a call stands here."""
        with self._stands:
            assert self._stands.wait_for(lambda: self._arrived == len(self.alphas) + 1, WAIT)

    def let(self, calls: int = 1_000_000) -> None:
        """Let calls pass; if they are few, wait until the one after them has come."""
        after = len(self.alphas) + calls + 1
        self._permits.release(calls)
        if calls < 1000:
            with self._stands:
                assert self._stands.wait_for(lambda: self._arrived == after, WAIT)

    @property
    def sizes(self) -> list[int]:
        return [len(alphas) for alphas in self.alphas]


class Recorder(Observer):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, bool]] = []
        self.outcomes: list[Outcome] = []
        self.lookups: Counter[tuple[str, bool]] = Counter()
        self.encodings = 0
        self._told = threading.Condition()

    def _tell(self, change: Callable[[], object]) -> None:
        with self._told:
            change()
            self._told.notify_all()

    def step(self, rows: int, seconds: float, interactive: bool) -> None:
        self._tell(lambda: self.steps.append((rows, interactive)))

    def encoded(self, seconds: float) -> None:
        self._tell(lambda: setattr(self, "encodings", self.encodings + 1))

    def cache(self, kind: str, hit: bool) -> None:
        self._tell(lambda: self.lookups.update([(kind, hit)]))

    def finished(self, outcome: Outcome, images: int, interactive: bool, seconds: float) -> None:
        self._tell(lambda: self.outcomes.append(outcome))

    def wait(self, condition: Callable[[], bool]) -> None:
        with self._told:
            assert self._told.wait_for(condition, WAIT)


@pytest.fixture
def editor(st_editor: SliderEditor) -> SliderEditor:
    """The ST editor, whose engine may be replaced."""
    return copy.copy(st_editor)


@pytest.fixture
def gate(editor: SliderEditor) -> Iterator[Gate]:
    gate = Gate(editor.engine)
    editor.engine = gate
    yield gate
    gate.let()


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def serve(editor: SliderEditor, recorder: Recorder) -> Iterator[Callable[..., EditService]]:
    """Makes services that are closed after the test; no thread of theirs is left."""
    services: list[EditService] = []

    def make(**options: Any) -> EditService:
        services.append(EditService(editor, observer=recorder, **options))
        return services[-1]

    yield make
    if isinstance(editor.engine, Gate):
        editor.engine.let()
    for service in services:
        service.close(drain=False)
    assert not [t for t in threading.enumerate() if t.name.startswith("slideredit-")]


def edit(image: Image.Image, *strengths: float, sliders: tuple[Slider, ...] = (RED,), **options: Any) -> EditRequest:
    """One image per strength of the first slider, the others at 1; the options are fields of the request or of its settings."""
    every = tuple((s, *(1.0 for _ in sliders[1:])) for s in strengths)
    own = {name: options.pop(name) for name in [*options] if name in {field.name for field in fields(EditRequest)}}
    return EditRequest(image, sliders, every, EditSettings(**{"steps": 2} | options), **own)


def alone(editor: SliderEditor, request: EditRequest) -> Tensor:
    """The images of a request as the editor makes them, one by one."""
    images = []
    for strengths, seed in zip(request.strengths, request.seeds, strict=True):
        prepared = editor.prepare(request.image, request.sliders, request.settings, seed=seed)
        images.append(editor.render_tensor(prepared, [strengths]))
    return torch.cat(images)


def submit_all(service: EditService, gate: Gate, recorder: Recorder, *requests: EditRequest) -> list[Ticket[Tensor]]:
    """Submit requests and wait until they are encoded, while the engine stands still in the first one's first step."""
    before = recorder.encodings
    tickets = []
    for request in requests:
        tickets.append(service.submit_tensor(request))
        gate.stand()
    recorder.wait(lambda: recorder.encodings == before + len(requests))
    return tickets


def assert_each_as_alone(editor: SliderEditor, requests: list[EditRequest], tickets: list[Ticket[Tensor]]) -> None:
    # All of them first: what is made alone goes through the same engine.
    results = [ticket.future.result(WAIT) for ticket in tickets]
    for request, result in zip(requests, results, strict=True):
        assert (result - alone(editor, request)).abs().max() <= 1e-5


class TestBatching:
    def test_rows_of_any_sliders_steps_seeds_and_shapes_are_what_each_is_alone(
        self, editor: SliderEditor, gate: Gate, recorder: Recorder, serve: Callable[..., EditService], scene: Image.Image
    ) -> None:
        wide = scene.resize((128, 64))
        requests = [
            edit(scene, 0.2, steps=5),
            edit(scene, 1.4, 0.1, sliders=(RED, DARK), steps=2, seed=3, consecutive_seeds=True),
            edit(scene, 0.7, sliders=(DARK,), steps=3, seed=5, guidance_scale=2.0),
            edit(wide, 0.3, sliders=(DARK, RED), steps=3),
            edit(wide, 0.9, prompt="make the circle red now", steps=2, seed=9),
        ]
        tickets = submit_all(serve(), gate, recorder, *requests)
        gate.let()
        results = [ticket.future.result(WAIT) for ticket in tickets]
        # The first row went ahead alone; from then on calls are shared by the rows that agree in shape, at steps of their own.
        assert max(gate.sizes) == 4
        assert gate.sizes.count(2) >= 2
        assert any(len(set(timesteps)) > 2 for timesteps in gate.timesteps)
        for request, result in zip(requests, results, strict=True):
            assert (result - alone(editor, request)).abs().max() <= 1e-5
        assert [request.seeds for request in requests[1:3]] == [(3, 4), (5,)]

    def test_a_row_that_is_not_finite_fails_its_own_request_and_no_other(
        self, editor: SliderEditor, gate: Gate, recorder: Recorder, serve: Callable[..., EditService], scene: Image.Image
    ) -> None:
        requests = [edit(scene, 0.2, steps=3), edit(scene, 0.5, 1e20, steps=3, partial_every=1), edit(scene, 0.7, steps=3)]
        service, shown = serve(), list[Partial]()
        tickets = [service.submit_tensor(requests[0])]
        gate.stand()
        broken = service.submit(requests[1], shown.append)
        tickets.append(service.submit_tensor(requests[2]))
        recorder.wait(lambda: recorder.encodings == 3)
        gate.let()
        with pytest.raises(SliderEditError, match=r"'make the circle red' at strength 1e\+20 produced NaN or inf") as error:
            broken.future.result(WAIT)
        assert not isinstance(error.value, EngineFailure)
        assert fault_of(error.value).status == 422
        assert max(gate.sizes) == 4, "all of them made steps together"
        assert_each_as_alone(editor, [requests[0], requests[2]], tickets)
        assert {partial.index for partial in shown} <= {0}
        assert Counter(recorder.outcomes) == {"completed": 2, "refused": 1}

    def test_a_strength_beyond_float32_is_bad_input(self, serve: Callable[..., EditService], scene: Image.Image) -> None:
        with pytest.raises(SliderEditError, match="which exceeds float32"):
            serve().submit(edit(scene, 1e39)).future.result(WAIT)

    def test_images_are_those_of_render(
        self, editor: SliderEditor, serve: Callable[..., EditService], scene: Image.Image
    ) -> None:
        request = edit(scene, 0.0, 0.5, 1.0, seed=1)
        images = serve().submit(request).future.result(WAIT)
        expected = editor.render(editor.prepare(scene, [RED], seed=1), request.strengths, steps=2)
        assert [i.tobytes() for i in images] == [i.tobytes() for i in expected]

    def test_a_row_joins_at_the_next_step_and_leaves_when_it_is_done(
        self, editor: SliderEditor, gate: Gate, recorder: Recorder, serve: Callable[..., EditService], scene: Image.Image
    ) -> None:
        service = serve()
        first = edit(scene, 0.9, steps=4)
        tickets = submit_all(service, gate, recorder, first)
        gate.let(1)
        second = edit(scene, 0.8, steps=1, seed=2)
        tickets += submit_all(service, gate, recorder, second)
        gate.let()
        assert_each_as_alone(editor, [first, second], tickets)
        # The second call was under way when the second request came.
        assert gate.alphas[:4] == [[0.1], [0.1], [0.1, 0.2], [0.1]]

    def test_inputs_are_laid_out_once_for_rows_that_stay_together(
        self, editor: SliderEditor, serve: Callable[..., EditService], scene: Image.Image
    ) -> None:
        engine, pointers = editor.engine, []

        def record(inputs: Mapping[str, Tensor]) -> Tensor:
            pointers.append(tuple(tensor.data_ptr() for tensor in inputs.values()))
            return engine(inputs)

        editor.engine = record
        serve().submit(edit(scene, 0.2, 0.4, steps=5)).future.result(WAIT)
        assert len(pointers) == 5
        assert len(set(pointers)) == 1

    def test_without_step_batching_one_request_follows_the_other(
        self, editor: SliderEditor, gate: Gate, recorder: Recorder, serve: Callable[..., EditService], scene: Image.Image
    ) -> None:
        requests = [edit(scene, 0.9, 0.8), edit(scene, 0.7, steps=3), edit(scene, 0.6)]
        tickets = submit_all(serve(step_batching=False), gate, recorder, *requests)
        gate.let()
        assert_each_as_alone(editor, requests, tickets)
        assert gate.alphas[:7] == [[0.1, 0.2]] * 2 + [[0.3]] * 3 + [[0.4]] * 2

    def test_a_bank_keeps_each_members_strengths(self, tmp_path: Path, scene: Image.Image) -> None:
        save_adapter(load_adapter("shapes-st"), tmp_path / "other.safetensors")
        bank = SliderEditor.from_pretrained("shapes-kontext", ["shapes-st", str(tmp_path / "other.safetensors")])
        one, other = (Slider(RED.instruction, adapter=name) for name in bank.members)
        requests = [
            edit(scene, 0.3, sliders=(one,)),
            edit(scene, 0.6, sliders=(other, Slider(DARK.instruction, adapter=one.adapter))),
        ]
        bank.engine = gate = Gate(bank.engine)
        recorder = Recorder()
        with EditService(bank, observer=recorder) as service:
            tickets = submit_all(service, gate, recorder, edit(scene, 1.0, sliders=(one,), steps=1), *requests)[1:]
            gate.let()
            assert_each_as_alone(bank, requests, tickets)
        assert 2 in gate.sizes

    def test_qwen_shares_both_passes_among_prompts_of_a_length(self, tmp_path: Path) -> None:
        base = save_tiny_checkpoint(tmp_path / "base")
        editor = SliderEditor.from_pretrained(base, qwen_adapter(base))
        one = Slider("make the circle red")
        requests = [
            edit(random_image(), 0.3, sliders=(one,), seed=1, steps=3),
            edit(random_image(), 1.5, sliders=(one,), seed=2, true_cfg_scale=2.5),
            edit(random_image(seed=1), 0.0, sliders=(Slider("make the square blue"), Slider("add a small hat"))),
            edit(random_image(), 0.4, sliders=(one,), true_cfg_scale=1.0),
        ]
        editor.engine = gate = Gate(editor.engine)
        recorder = Recorder()
        with EditService(editor, observer=recorder) as service:
            tickets = submit_all(service, gate, recorder, edit(random_image(), 1.0, sliders=(one,), steps=2), *requests)[1:]
            gate.let()
            assert_each_as_alone(editor, requests, tickets)
            assert recorder.lookups["text", True] > 0
        # The first two share calls; another length, and a request without a negative pass, have calls of their own.
        assert {rows for rows, _ in recorder.steps} >= {1, 2}
        assert max(rows for rows, _ in recorder.steps) <= 3


class TestOrder:
    def test_within_a_shape_first_come_first_served(
        self, gate: Gate, recorder: Recorder, serve: Callable[..., EditService], scene: Image.Image
    ) -> None:
        service = serve(max_batch=2)
        tickets = submit_all(service, gate, recorder, *(edit(scene, 0.9 - i / 10, steps=2) for i in range(4)))
        gate.let()
        for ticket in tickets:
            ticket.future.result(WAIT)
        # The first call was under way with one row when the others came; a free place goes to who waits longest.
        assert gate.alphas == [[0.1], [0.1, 0.2], [0.2, 0.3], [0.3, 0.4], [0.4]]

    def test_shapes_take_turns(
        self, gate: Gate, recorder: Recorder, serve: Callable[..., EditService], scene: Image.Image
    ) -> None:
        wide = scene.resize((128, 64))
        requests = [edit(scene, 0.9, steps=3), edit(scene, 0.8, steps=3), edit(wide, 0.7, steps=3)]
        tickets = submit_all(serve(), gate, recorder, *requests)
        gate.let()
        for ticket in tickets:
            ticket.future.result(WAIT)
        # The first call was under way when the others came.
        assert gate.alphas == [[0.1], [0.1, 0.2], [0.3], [0.1, 0.2], [0.3], [0.2], [0.3]]

    def test_a_preview_goes_before_full_edits_which_go_on_afterwards(
        self, editor: SliderEditor, gate: Gate, recorder: Recorder, serve: Callable[..., EditService], scene: Image.Image
    ) -> None:
        service = serve()
        full = edit(scene, 0.9, 0.8, steps=4)
        tickets = submit_all(service, gate, recorder, full)
        gate.let(1)
        preview = edit(scene, 0.5, steps=3, interactive=True)
        tickets += submit_all(service, gate, recorder, preview)
        gate.let()
        assert_each_as_alone(editor, [full, preview], tickets)
        assert gate.alphas[:7] == [[0.1, 0.2]] * 2 + [[0.5]] * 3 + [[0.1, 0.2]] * 2

    def test_previews_do_not_starve_full_edits(
        self, gate: Gate, recorder: Recorder, serve: Callable[..., EditService], scene: Image.Image
    ) -> None:
        service = serve()
        preview = edit(scene, 0.5, steps=2 * BACKGROUND_EVERY + 3, interactive=True)
        tickets = submit_all(service, gate, recorder, preview, edit(scene, 0.9, steps=3))
        gate.let()
        for ticket in tickets:
            ticket.future.result(WAIT)
        full = [index for index, alphas in enumerate(gate.alphas) if alphas == [0.1]]
        # The preview's first step was made before the full edit came.
        assert full == [1 + BACKGROUND_EVERY, 2 + 2 * BACKGROUND_EVERY, len(gate.alphas) - 1]

    def test_full_edits_run_in_smaller_batches_while_previews_come(
        self, gate: Gate, recorder: Recorder, serve: Callable[..., EditService], scene: Image.Image
    ) -> None:
        service = serve(max_batch=8)
        tickets = submit_all(service, gate, recorder, edit(scene, *(i / 10 for i in range(8)), steps=2))
        gate.let(1)
        tickets += submit_all(service, gate, recorder, edit(scene, 0.5, steps=1, interactive=True))
        gate.let()
        for ticket in tickets:
            ticket.future.result(WAIT)
        assert recorder.steps[:3] == [(8, False), (8, False), (1, True)]


class TestEndings:
    def test_a_full_queue_refuses_and_says_when_to_come_back(
        self, gate: Gate, recorder: Recorder, serve: Callable[..., EditService], scene: Image.Image
    ) -> None:
        service = serve(max_queue=4)
        tickets = submit_all(service, gate, recorder, edit(scene, 0.1, 0.2, 0.3))
        with pytest.raises(QueueFull, match=": 3 of at most 4 images wait") as refused:
            service.submit(edit(scene, 0.1, 0.2))
        assert refused.value.retry_after >= 1
        # Another image still fits, and previews have a queue of their own.
        tickets += submit_all(service, gate, recorder, edit(scene, 0.4), edit(scene, 0.1, 0.2, interactive=True))
        assert service.stats().queued == 6
        gate.let()
        for ticket in tickets:
            ticket.future.result(WAIT)
        service.submit(edit(scene, 0.1, 0.2)).future.result(WAIT)
        service.close()
        assert service.stats().outcomes == {"completed": 4, "refused": 1}

    def test_time_to_come_back_grows_with_the_work_ahead(
        self, gate: Gate, recorder: Recorder, serve: Callable[..., EditService], scene: Image.Image
    ) -> None:
        service = serve(max_queue=1)
        submit_all(service, gate, recorder, edit(scene, 0.1, steps=100_000))
        gate.let(3)
        submit_all(service, gate, recorder, edit(scene, 0.1, steps=100_000))
        with pytest.raises(QueueFull) as refused:
            service.submit(edit(scene, 0.2))
        assert refused.value.retry_after > 60

    def test_a_deadline_acts_between_steps(
        self, gate: Gate, recorder: Recorder, serve: Callable[..., EditService], scene: Image.Image
    ) -> None:
        service = serve()
        late, other = submit_all(service, gate, recorder, edit(scene, 0.9, timeout=0.2), edit(scene, 0.8))
        time.sleep(0.3)
        gate.let()
        with pytest.raises(DeadlineExceeded, match=r"within 0\.2 seconds"):
            late.future.result(WAIT)
        other.future.result(WAIT)
        assert gate.alphas == [[0.1], [0.2], [0.2]]

    @pytest.mark.parametrize("how", ["ticket", "future"])
    def test_cancelling_frees_the_rows_at_the_next_step(
        self, gate: Gate, recorder: Recorder, serve: Callable[..., EditService], scene: Image.Image, how: str
    ) -> None:
        service = serve(max_batch=1)
        gone, other = submit_all(service, gate, recorder, edit(scene, 0.9, steps=50), edit(scene, 0.8))
        gate.let(2)
        if how == "ticket":
            gone.cancel()
        else:
            assert gone.future.cancel()
        with pytest.raises((Cancelled, CancelledError)):
            gone.future.result(0)
        gate.let()
        other.future.result(WAIT)
        assert gate.alphas == [[0.1]] * 3 + [[0.2]] * 2
        service.close()
        assert service.stats().outcomes == {"cancelled": 1, "completed": 1}

    def test_an_engine_that_fails_takes_only_the_requests_of_that_call(
        self, gate: Gate, recorder: Recorder, serve: Callable[..., EditService], scene: Image.Image
    ) -> None:
        service = serve()
        wide = edit(scene.resize((128, 64)), 0.8)
        broken, other = submit_all(service, gate, recorder, edit(scene, 0.9), wide)
        gate.fail = RuntimeError("the device is gone")
        gate.let(1)
        with pytest.raises(EngineFailure, match="the device is gone"):
            broken.future.result(WAIT)
        gate.fail = None
        gate.let()
        other.future.result(WAIT)
        service.submit(edit(scene, 0.9)).future.result(WAIT)

    @pytest.mark.parametrize(
        "error", [torch.OutOfMemoryError("CUDA out of memory"), OutOfDeviceMemory("the GPU is out of memory for batch 4")]
    )
    def test_running_out_of_memory_takes_only_the_requests_of_that_call(
        self,
        error: Exception,
        gate: Gate,
        recorder: Recorder,
        serve: Callable[..., EditService],
        scene: Image.Image,
    ) -> None:
        service = serve()
        large, other = submit_all(service, gate, recorder, edit(scene, 0.9), edit(scene.resize((128, 64)), 0.8))
        gate.fail = error
        gate.let(1)
        with pytest.raises(NoMemory, match="out of memory for a batch with this edit; try again later") as refused:
            large.future.result(WAIT)
        fault = fault_of(refused.value)
        assert (fault.status, fault.code, fault.headers) == (503, "out_of_memory", {"Retry-After": "1"})
        gate.fail = None
        gate.let()
        other.future.result(WAIT)
        service.close()  # outcomes are counted after a future is resolved
        assert service.stats().outcomes == {"failed": 1, "completed": 1}

    def test_a_decoder_that_fails_takes_only_the_requests_it_was_given(
        self, editor: SliderEditor, serve: Callable[..., EditService], scene: Image.Image
    ) -> None:
        class Broken(FluxKontext):
            def decode(self, pipeline: Any, latents: Tensor, height: int, width: int) -> Tensor:
                raise MemoryError("no room")

        family, editor.family = editor.family, Broken()
        service = serve()
        with pytest.raises(EngineFailure, match=r"could not be decoded .*no room"):
            service.submit(edit(scene, 0.9)).future.result(WAIT)
        editor.family = family
        service.submit(edit(scene, 0.9)).future.result(WAIT)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"strengths": ()}, "0 images"),
            ({"strengths": ((1.0,),) * 65}, "65 images"),
            ({"strengths": ((1.0, 1.0),)}, "2 strength"),
            ({"strengths": ((float("nan"),),)}, "strength nan"),
            (
                {"strengths": ((1.0,),) * 2, "settings": EditSettings(seed=2**64 - 1), "consecutive_seeds": True},
                "seed is 18446744073709551616",
            ),
            ({"timeout": 0.0}, "timeout is 0.0"),
            ({"partial_every": -1}, "partial_every is -1"),
        ],
    )
    def test_bad_input_is_refused_at_once(
        self, serve: Callable[..., EditService], scene: Image.Image, change: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(SliderEditError, match=message):
            serve().submit(EditRequest(**dict[str, Any](image=scene, sliders=(RED,), strengths=((1.0,),)) | change))

    def test_bad_input_that_only_encoding_tells_comes_through_the_future(
        self, serve: Callable[..., EditService], scene: Image.Image
    ) -> None:
        service = serve()
        with pytest.raises(SliderEditError, match="nowhere"):
            service.submit(edit(scene, 0.5, prompt="make the square blue")).future.result(WAIT)
        service.close()
        assert service.stats().outcomes == {"refused": 1}

    def test_what_is_over_is_forgotten_without_the_garbage_collector(
        self, gate: Gate, serve: Callable[..., EditService], scene: Image.Image
    ) -> None:
        service = serve(caching=Caching(0))
        service.submit_tensor(edit(scene, 1.0))
        gate.stand()
        words = (Slider("say nothing of it"),)
        requests = [edit(scene.copy(), 1.0), edit(scene.copy(), 1.0), edit(scene.copy(), 1.0, prompt="else", sliders=words)]
        images = [weakref.ref(request.image) for request in requests]
        gc.collect()
        gc.disable()
        try:
            completed, cancelled, refused = [service.submit_tensor(request) for request in requests]
            del requests
            cancelled.cancel()
            gate.let()
            assert completed.future.result(WAIT).shape[0] == 1
            for ticket in (cancelled, refused):
                assert isinstance(ticket.future.exception(WAIT), SliderEditError)
            del ticket, completed, cancelled, refused
            assert waited_for(lambda: not any(image() for image in images), 5)
        finally:
            gc.enable()

    def test_closing_finishes_what_was_accepted(
        self, recorder: Recorder, serve: Callable[..., EditService], scene: Image.Image
    ) -> None:
        service = serve()
        tickets = [service.submit(edit(scene, 0.5, 0.6)) for _ in range(3)]
        service.close()
        assert all(len(ticket.future.result(0)) == 2 for ticket in tickets)
        with pytest.raises(Closed):
            service.submit(edit(scene, 0.5))

    @pytest.mark.parametrize("options", [{"drain": False}, {"timeout": 0.1}])
    def test_closing_in_a_hurry_cancels(
        self, gate: Gate, recorder: Recorder, serve: Callable[..., EditService], scene: Image.Image, options: dict[str, Any]
    ) -> None:
        service = serve()
        tickets = submit_all(service, gate, recorder, edit(scene, 0.5, steps=50), edit(scene, 0.6, steps=50))
        threading.Timer(0.3, gate.let).start()
        service.close(**options)
        for ticket in tickets:
            with pytest.raises(Cancelled, match="closed"):
                ticket.future.result(0)
        assert len(gate.alphas) == 1


class TestPartialImages:
    def test_they_come_in_order_and_near_the_result(self, serve: Callable[..., EditService], scene: Image.Image) -> None:
        parts: list[Partial] = []
        ticket = serve().submit(edit(scene, 0.0, 1.0, steps=9, partial_every=4), parts.append)
        final = ticket.future.result(WAIT)
        assert {(p.index, p.step, p.steps) for p in parts} <= {(i, s, 9) for i in (0, 1) for s in (4, 8)}
        assert [p.step for p in parts if p.index == 0] == sorted(p.step for p in parts if p.index == 0)
        assert parts

        def distance(part: Partial) -> float:
            pixels = [
                torch.frombuffer(bytearray(i.tobytes()), dtype=torch.uint8).float() for i in (part.image, final[part.index])
            ]
            return float((pixels[0] - pixels[1]).abs().mean())

        # Noise is about 70 away.
        assert max(map(distance, parts)) < 10

    def test_a_function_that_fails_spoils_nothing(self, serve: Callable[..., EditService], scene: Image.Image) -> None:
        def fail(part: Partial) -> None:
            raise ValueError("the reader is gone")

        assert len(serve().submit(edit(scene, 0.5, steps=3, partial_every=1), fail).future.result(WAIT)) == 1


class TestCache:
    def lookups(self, recorder: Recorder) -> dict[str, list[int]]:
        """Hits and misses by kind since the last question."""
        counts = {k: [recorder.lookups[k, True], recorder.lookups[k, False]] for k in ("images", "tokens", "text")}
        recorder.lookups.clear()
        return counts

    def test_what_is_the_same_is_not_encoded_again(
        self, recorder: Recorder, serve: Callable[..., EditService], scene: Image.Image
    ) -> None:
        service = serve(caching=Caching(latents=False))

        def run(image: Image.Image, *strengths: float, **options: Any) -> dict[str, list[int]]:
            service.submit(edit(image, *strengths, **{"steps": 1} | options)).future.result(WAIT)
            return self.lookups(recorder)

        assert run(scene, 0.1) == {"images": [0, 1], "tokens": [0, 1], "text": [0, 1]}
        # A drag, another seed and another guidance; the same pixels in another object.
        everything = {"images": [1, 0], "tokens": [1, 0], "text": [1, 0]}
        assert run(scene, 0.2, seed=4, guidance_scale=2.0) == everything
        assert run(scene.copy(), 0.2) == everything
        # A new prompt encodes no image, a new image no prompt.
        assert run(scene, 0.1, sliders=(DARK,)) == {"images": [1, 0], "tokens": [0, 1], "text": [0, 1]}
        assert run(scene.rotate(180), 0.1) == {"images": [0, 1], "tokens": [1, 0], "text": [1, 0]}
        stats = service.stats()
        assert stats.cache_entries == 6
        assert stats.cache_hits == {"images": 3, "tokens": 3, "text": 3}

    def test_a_service_without_a_cache_encodes_everything(
        self, recorder: Recorder, serve: Callable[..., EditService], scene: Image.Image
    ) -> None:
        service = serve(caching=Caching(0))
        for _ in range(2):
            service.submit(edit(scene, 0.1, steps=1)).future.result(WAIT)
        assert self.lookups(recorder) == {"images": [0, 2], "tokens": [0, 2], "text": [0, 2]}
        assert service.stats().cache_bytes == 0

    def test_the_least_recently_used_value_leaves_when_the_bound_is_reached(self) -> None:
        value = torch.zeros(1000)
        size = size_of(value) + size_of(("k", 0))
        cache = EncodingCache(3 * size + 100)
        for number in (0, 1, 2, 0, 3):
            cache(("k", number), lambda: value.clone())
        assert cache.bytes <= cache.max_bytes
        made: list[int] = []
        for number in (0, 2, 3, 1):
            cache(("k", number), lambda n=number: made.append(n) or value.clone())  # type: ignore[misc, func-returns-value]
        assert made == [1]
        assert cache.bytes <= cache.max_bytes
        assert len(cache) == 3
        # What is larger than everything is handed on, and drives nothing out.
        cache(("k", "large"), lambda: torch.zeros(10_000))
        assert len(cache) == 3

    def test_a_view_counts_as_the_memory_it_holds_and_shared_memory_once(self) -> None:
        large = torch.zeros(1000)
        assert size_of(large[:1]) == 4000
        assert size_of({"a": large, "b": large.view(10, 100)}) < 4500


class Quick(FluxKontext):
    """Decodes by showing the latents."""

    def decode(self, pipeline: Any, latents: Tensor, height: int, width: int) -> Tensor:
        return latents[:, :3, :4].clone()


def test_thousands_of_requests_and_cancellations_lose_and_double_nothing(
    editor: SliderEditor, recorder: Recorder, serve: Callable[..., EditService], scene: Image.Image
) -> None:
    """An engine without velocity and a decoder that shows the latents: an image is its seed's noise, or somebody else's."""
    family: Family = Quick()
    editor.family, editor.engine = family, lambda inputs: torch.zeros_like(inputs["hidden_states"])
    images = [scene, scene.resize((128, 64))]
    noise = {
        (number, seed): Quick().decode(None, family.draw_noise(editor.pipeline, *size, seed), 0, 0)[0]
        for number, size in enumerate([(64, 64), (48, 88)])
        for seed in range(8)
    }
    service, choice = serve(max_queue=40), random.Random(5)
    settled: Counter[int] = Counter()

    def settled_once(index: int, future: object) -> None:
        settled.update([index])

    tickets: list[tuple[Ticket[Tensor], int, tuple[int, ...]]] = []
    submissions = 2000
    for _ in range(submissions):
        number, count = choice.randrange(2), choice.randint(1, 3)
        seed = choice.randrange(6)
        request = edit(
            images[number],
            *[1.0] * count,
            seed=seed,
            consecutive_seeds=True,
            steps=choice.randint(1, 4),
            interactive=choice.random() < 0.3,
            timeout=choice.choice([None, None, 0.001]),
        )
        try:
            ticket = service.submit_tensor(request)
        except QueueFull:
            time.sleep(0.001)
            continue
        ticket.future.add_done_callback(partial(settled_once, len(tickets)))
        tickets.append((ticket, number, request.seeds))
        if choice.random() < 0.4:
            victim = choice.choice(tickets[-20:])[0]
            choice.choice([victim.cancel, victim.future.cancel])()
    service.close()
    assert set(settled.values()) == {1}
    assert len(settled) == len(tickets)
    completed = 0
    for ticket, number, seeds in tickets:
        if not ticket.future.cancelled() and ticket.future.exception() is None:
            completed += 1
            assert torch.equal(ticket.future.result(), torch.stack([noise[number, seed] for seed in seeds]))
    stats = service.stats()
    assert sum(stats.outcomes.values()) == submissions == len(recorder.outcomes)
    assert stats.outcomes["completed"] == completed > 100
    assert set(stats.outcomes) == {"completed", "cancelled", "deadline", "refused"}
    assert (stats.queued, stats.running) == (0, 0)
