"""Steps before `slider_start` are made once for all positions of the sliders, and edits made before are not made again."""

from __future__ import annotations

import base64
import copy
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from http_server import listening, waited_for
from PIL import Image
from torch import Tensor

from slideredit_rt import cli
from slideredit_rt.denoising import fill_batch, frozen_steps
from slideredit_rt.editor import SliderEditor
from slideredit_rt.engines import read_manifest
from slideredit_rt.errors import SliderEditError
from slideredit_rt.serving import EditRequest, EditService, QueueFull
from slideredit_rt.serving.app import create_app
from slideredit_rt.serving.cache import Caching
from slideredit_rt.serving.metrics import Metrics
from slideredit_rt.settings import EditDefaults, EditSettings
from slideredit_rt.sliders import Slider

RED, DARK = Slider("make the circle red"), Slider("make the background dark")
BOTH = f"{RED.instruction} and {DARK.instruction}"
WAIT = 60.0  # seconds, which no test needs


@pytest.fixture
def editor(st_editor: SliderEditor) -> SliderEditor:
    """The ST editor, whose engine and limits may be replaced."""
    return copy.copy(st_editor)


@pytest.fixture
def calls(editor: SliderEditor) -> list[list[float]]:
    """The alphas of the first slider in every engine call."""
    engine, seen = editor.engine, list[list[float]]()

    def note(inputs: Mapping[str, Tensor]) -> Tensor:
        seen.append([round(a, 4) for a in inputs["alpha"].flatten(1)[:, 0].tolist()])
        return engine(inputs)

    editor.engine = note
    return seen


@pytest.fixture
def serve(editor: SliderEditor) -> Iterator[Callable[..., EditService]]:
    services: list[EditService] = []

    def make(**options: Any) -> EditService:
        services.append(EditService(editor, **options))
        return services[-1]

    yield make
    for service in services:
        service.close(drain=False)


def edit(image: Image.Image, *strengths: float, sliders: tuple[Slider, ...] = (RED,), **options: Any) -> EditRequest:
    """One image per strength of the first slider: 6 steps, with sliders from the fourth step."""
    own = {name: options.pop(name) for name in ("consecutive_seeds", "timeout") if name in options}
    every = tuple((s, *(1.0 for _ in sliders[1:])) for s in strengths)
    settings = EditSettings(**(dict[str, Any](prompt=BOTH, steps=6, slider_start=0.5) | options))
    return EditRequest(image, sliders, every, settings, **own)


def result_of(service: EditService, request: EditRequest) -> Tensor:
    return service.submit_tensor(request).future.result(WAIT)


class TestEditor:
    @pytest.mark.parametrize(
        ("start", "steps", "frozen"),
        [(0, 12, 0), (1 / 8, 12, 1), (1 / 4, 12, 3), (3 / 8, 12, 4), (0.5, 12, 6), (0.07, 100, 7), (0.99, 4, 3), (0.9, 1, 0)],
    )
    def test_the_steps_that_end_by_the_start_are_the_base_models(self, start: float, steps: int, frozen: int) -> None:
        assert frozen_steps(start, steps) == frozen

    def test_positions_share_the_steps_before_the_start(
        self, editor: SliderEditor, calls: list[list[float]], scene: Image.Image
    ) -> None:
        prepared = editor.prepare(scene, [RED], prompt=BOTH)
        editor.max_batch = 2
        editor.render_tensor(prepared, [[0.0], [0.5], [1.5]], steps=4, slider_start=0.5)
        assert calls == [[0.0], [0.0], [1.0, 0.5], [1.0, 0.5], [-0.5], [-0.5]]

    def test_shared_steps_fill_the_smallest_batch_of_an_engine(
        self, editor: SliderEditor, calls: list[list[float]], scene: Image.Image
    ) -> None:
        prepared = editor.prepare(scene, [RED], prompt=BOTH)
        expected = editor.render_tensor(prepared, [[0.0], [1.5]], steps=2, slider_start=0.5)
        calls.clear()
        editor.min_batch = 2
        found = editor.render_tensor(prepared, [[0.0], [1.5]], steps=2, slider_start=0.5)
        assert calls == [[0.0, 0.0], [1.0, -0.5]]
        assert (found - expected).abs().max() <= 1e-5

    def test_a_last_batch_below_the_smallest_of_an_engine_is_filled(
        self, editor: SliderEditor, calls: list[list[float]], scene: Image.Image
    ) -> None:
        """An engine refuses batches outside its range, and the rows that fill one change no result."""
        accepts, strengths = editor.engine, [[0.0], [0.5], [1.0], [1.25], [1.5]]
        prepared = editor.prepare(scene, [RED], prompt=BOTH)
        alone = torch.cat([editor.render_tensor(prepared, [setting], steps=2) for setting in strengths])
        calls.clear()

        def refuse_small(inputs: Mapping[str, Tensor]) -> Tensor:
            assert 2 <= len(inputs["alpha"]) <= 4
            return accepts(inputs)

        editor.engine, editor.min_batch, editor.max_batch = refuse_small, 2, 4
        found = editor.render_tensor(prepared, strengths, steps=2)
        assert calls == [[1.0, 0.5, 0.0, -0.25]] * 2 + [[-0.5, -0.5]] * 2
        assert found.shape == alone.shape
        assert (found - alone).abs().max() <= 1e-5
        assert (editor.render_tensor(prepared, strengths[2:3], steps=2) - alone[2:3]).abs().max() <= 1e-5

    @pytest.mark.parametrize("shape", [(3, 2, 1), (3, 2, 2, 4)], ids=["one adapter", "a bank"])
    def test_the_last_row_fills_a_batch_and_a_large_enough_one_stays(self, shape: tuple[int, ...]) -> None:
        alphas = torch.rand(shape)
        assert torch.equal(fill_batch(alphas, 4, dim=1), torch.cat([alphas, alphas[:, 1:], alphas[:, 1:]], dim=1))
        assert torch.equal(fill_batch(alphas, 2, dim=1), alphas)
        assert torch.equal(fill_batch(alphas, 1, dim=1), alphas)

    def test_shared_steps_are_those_of_each_position_bit_for_bit(self, editor: SliderEditor, scene: Image.Image) -> None:
        prepared = editor.prepare(scene, [RED], prompt=BOTH, slider_start=0.5)
        strengths = [[0.0], [0.5], [1.0], [1.5]]
        together = editor.render_tensor(prepared, strengths, steps=4)
        # Batches of different sizes may round differently, so the comparison has one row in every engine call.
        editor.max_batch = 1
        apart = torch.cat([editor.render_tensor(prepared, [setting], steps=4) for setting in strengths])
        assert torch.equal(editor.render_tensor(prepared, strengths, steps=4), apart)
        assert (together - apart).abs().max() <= 1e-5
        assert torch.equal(apart[2], editor.render_tensor(prepared, [[1.0]], steps=4, slider_start=0.0)[0])

    def test_sweep_and_grid_take_the_start_from_their_settings(
        self, editor: SliderEditor, calls: list[list[float]], scene: Image.Image
    ) -> None:
        editor.sweep(scene, [RED, DARK], 0, [0.0, 1.5], steps=4, slider_start=0.25)
        assert calls == [[0.0]] + [[1.0, -0.5]] * 3
        calls.clear()
        editor.grid(scene, [RED, DARK], (0, [0.0, 1.5]), (1, [1.0]), steps=2, slider_start=0.5)
        assert calls == [[0.0], [1.0, -0.5]]

    def test_an_engine_may_have_a_start_of_its_own(
        self, editor: SliderEditor, calls: list[list[float]], scene: Image.Image
    ) -> None:
        editor.defaults = EditDefaults(slider_start=0.5)
        editor.edit(scene, [Slider(RED.instruction, 0.0)], steps=2)
        editor.edit(scene, [Slider(RED.instruction, 0.0)], steps=2, slider_start=0.0)
        assert calls == [[0.0], [1.0], [1.0], [1.0]]

    @pytest.mark.parametrize("start", [1.0, -0.1, float("nan")])
    def test_a_start_outside_the_run_is_refused(self, editor: SliderEditor, scene: Image.Image, start: float) -> None:
        prepared = editor.prepare(scene, [RED])
        for refuse in (
            lambda: EditSettings(slider_start=start),
            lambda: EditDefaults(slider_start=start),
            lambda: editor.render(prepared, [[0.5]], slider_start=start),
        ):
            with pytest.raises(SliderEditError, match=r"sliders start at the fraction .* pass at least 0 and less than 1"):
                refuse()


class TestService:
    def test_an_engine_without_batches_of_one_cannot_be_served(
        self, editor: SliderEditor, serve: Callable[..., EditService]
    ) -> None:
        editor.min_batch, editor.max_batch = 2, 8
        with pytest.raises(SliderEditError, match=r"smallest batch is 2, but a server also steps single .*--batch 1,2,8"):
            serve()

    def test_a_moved_slider_makes_only_the_steps_after_the_start(
        self, calls: list[list[float]], serve: Callable[..., EditService], scene: Image.Image
    ) -> None:
        service = serve()
        first = result_of(service, edit(scene, 0.0))
        assert calls == [[0.0]] * 3 + [[1.0]] * 3
        calls.clear()
        moved = result_of(service, edit(scene, 0.5))
        assert calls == [[0.5]] * 3
        calls.clear()
        back = result_of(service, edit(scene.copy(), 0.0))
        assert calls == []
        anew = serve(caching=Caching(latents=False))
        assert torch.equal(first, result_of(anew, edit(scene, 0.0)))
        assert torch.equal(moved, result_of(anew, edit(scene, 0.5)))
        assert torch.equal(back, first)
        assert len(calls) == 12, "without the cache, every step is made"
        stats = service.stats()
        assert {k: stats.cache_hits.get(k, 0) for k in ("first_steps", "latents")} == {"first_steps": 1, "latents": 1}
        assert {k: stats.cache_misses[k] for k in ("first_steps", "latents")} == {"first_steps": 1, "latents": 2}

    def test_what_is_served_is_what_the_editor_renders(
        self, editor: SliderEditor, serve: Callable[..., EditService], scene: Image.Image
    ) -> None:
        service = serve()
        for strengths in ((0.0, 0.5, 1.5), (0.7,), (0.5,)):
            request = edit(scene, *strengths)
            prepared = editor.prepare(scene, request.sliders, request.settings)
            expected = editor.render_tensor(prepared, request.strengths)
            assert (result_of(service, request) - expected).abs().max() <= 1e-5

    @pytest.mark.parametrize("latent_cache", [True, False])
    def test_images_of_a_request_share_the_steps_before_the_start(
        self, calls: list[list[float]], serve: Callable[..., EditService], scene: Image.Image, latent_cache: bool
    ) -> None:
        service = serve(caching=Caching(latents=latent_cache))
        result = result_of(service, edit(scene, 0.0, 0.5, 1.5))
        assert calls == [[0.0]] * 3 + [[1.0, 0.5, -0.5]] * 3
        again = result_of(service, edit(scene, 0.0, 0.5, 1.5))
        assert torch.equal(result, again)
        assert len(calls) == (6 if latent_cache else 12)

    def test_images_with_seeds_of_their_own_have_first_steps_of_their_own(
        self, editor: SliderEditor, calls: list[list[float]], serve: Callable[..., EditService], scene: Image.Image
    ) -> None:
        result = result_of(serve(), edit(scene, 0.0, 0.0, consecutive_seeds=True))
        assert calls == [[0.0, 0.0]] * 3 + [[1.0, 1.0]] * 3
        for seed in (0, 1):
            prepared = editor.prepare(scene, [RED], edit(scene, 0.0).settings, seed=seed)
            assert (result[seed] - editor.render_tensor(prepared, [[0.0]])[0]).abs().max() <= 1e-5

    def test_other_sliders_of_a_prompt_share_its_first_steps(
        self, calls: list[list[float]], serve: Callable[..., EditService], scene: Image.Image
    ) -> None:
        service = serve()
        for sliders in ((RED,), (DARK,), (RED, DARK)):
            result_of(service, edit(scene, 0.0, sliders=sliders))
        assert calls == [[0.0]] * 3 + [[1.0]] * 9

    @pytest.mark.parametrize(
        "change",
        [{"seed": 1}, {"steps": 8}, {"guidance_scale": 2.0}, {"prompt": f"{BOTH} now"}, {"slider_start": 0.34}, "image"],
    )
    def test_latents_of_other_settings_are_not_taken(
        self, editor: SliderEditor, calls: list[list[float]], serve: Callable[..., EditService], scene: Image.Image, change: Any
    ) -> None:
        service = serve()
        result_of(service, edit(scene, 0.0))
        calls.clear()
        request = edit(scene.rotate(180), 0.0) if change == "image" else edit(scene, 0.0, **change)
        result = result_of(service, request)
        assert len(calls) == (request.settings.steps or 0)
        expected = editor.render_tensor(editor.prepare(request.image, [RED], request.settings), [[0.0]])
        assert (result - expected).abs().max() <= 1e-5

    def test_latents_stay_within_the_caches_room(
        self, calls: list[list[float]], serve: Callable[..., EditService], scene: Image.Image
    ) -> None:
        service = serve(caching=Caching(100_000))
        for seed in range(8):
            result_of(service, edit(scene, 0.0, seed=seed))
        stats = service.stats()
        assert 0 < stats.cache_bytes <= 100_000
        assert stats.cache_bytes == sum(stats.cache_bytes_by_kind.values())
        assert set(stats.cache_bytes_by_kind) == {"images", "tokens", "text", "first_steps", "latents"}
        calls.clear()
        result_of(service, edit(scene, 0.0, seed=0))
        assert len(calls) == 6, "the oldest latents are gone"

    def test_a_cached_view_does_not_hold_its_batch(self, serve: Callable[..., EditService], scene: Image.Image) -> None:
        service = serve()
        result_of(service, edit(scene, 0.0))
        alone = service.stats().cache_bytes_by_kind["latents"]
        result_of(service, edit(scene, 0.1, 0.2, 0.3))
        assert service.stats().cache_bytes_by_kind["latents"] == 4 * alone

    @pytest.mark.parametrize("broken", [0, 5], ids=["a first step", "the last step"])
    def test_a_fault_of_one_step_is_not_kept(
        self, editor: SliderEditor, serve: Callable[..., EditService], scene: Image.Image, broken: int
    ) -> None:
        service, inner, made = serve(), editor.engine, list[int]()

        def fail_once(inputs: Mapping[str, Tensor]) -> Tensor:
            made.append(len(made))
            return inner(inputs) * (torch.nan if made[-1] == broken else 1.0)

        editor.engine = fail_once
        with pytest.raises(SliderEditError, match="produced NaN or infinity"):
            result_of(service, edit(scene, 0.0))
        assert service.stats().cache_bytes_by_kind.get("latents", 0) == 0
        for strength in (0.0, 0.5):
            assert result_of(service, edit(scene, strength)).isfinite().all()

    def test_without_memory_for_a_copy_the_edit_is_made_and_not_kept(
        self, serve: Callable[..., EditService], scene: Image.Image, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        clone, refused = Tensor.clone, list[torch.Size]()

        def full(tensor: Tensor) -> Tensor:
            if tensor.ndim != 3 or len(tensor) != 1:  # not latents
                return clone(tensor)
            refused.append(tensor.shape)
            raise torch.OutOfMemoryError("CUDA out of memory")

        service, expected = serve(), result_of(serve(), edit(scene, 0.0))
        monkeypatch.setattr(Tensor, "clone", full)
        result = result_of(service, edit(scene, 0.0))
        monkeypatch.undo()
        assert len(refused) == 2
        assert torch.equal(result, expected)
        assert not {"first_steps", "latents"} & {kind for kind, size in service.stats().cache_bytes_by_kind.items() if size}

    def test_latents_that_are_kept_already_are_not_copied(
        self, serve: Callable[..., EditService], scene: Image.Image, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        copied, clone = list[torch.Size](), Tensor.clone

        def counted(tensor: Tensor) -> Tensor:
            copied.append(tensor.shape)
            return clone(tensor)

        monkeypatch.setattr(Tensor, "clone", counted)
        service = serve()
        for count in (2, 2, 3):
            result_of(service, edit(scene, 0.0))
            result_of(service, edit(scene, 0.5 * (count - 2)))
            assert sum(len(shape) == 3 and shape[0] == 1 for shape in copied) == count

    def test_requests_that_begin_later_wait_in_the_queue_all_the_same(
        self, editor: SliderEditor, serve: Callable[..., EditService], scene: Image.Image
    ) -> None:
        service, inner, open_again = serve(max_queue=3), editor.engine, threading.Event()
        result_of(service, edit(scene, 0.0))

        def stand(inputs: Mapping[str, Tensor]) -> Tensor:
            open_again.wait(WAIT)
            return inner(inputs)

        editor.engine = stand
        running = service.submit_tensor(edit(scene, 0.1, seed=5))
        assert waited_for(lambda: service.stats().cache_misses["latents"] == 2, WAIT)
        waiting = [service.submit_tensor(edit(scene, 0.2 + i)) for i in range(2)]
        assert waited_for(lambda: service.stats().cache_hits.get("first_steps", 0) == 2, WAIT)
        try:
            with pytest.raises(QueueFull, match="3 of at most 3 images wait"):
                service.submit_tensor(edit(scene, 0.6))
        finally:
            open_again.set()
        for ticket in (running, *waiting):
            assert ticket.future.result(WAIT).isfinite().all()

    def test_a_cancelled_request_takes_its_followers_along(
        self, editor: SliderEditor, serve: Callable[..., EditService], scene: Image.Image
    ) -> None:
        service, inner, go, arrived = serve(), editor.engine, threading.Event(), threading.Event()

        def stand(inputs: Mapping[str, Tensor]) -> Tensor:
            arrived.set()
            go.wait(WAIT)
            return inner(inputs)

        editor.engine = stand
        cancelled = service.submit_tensor(edit(scene, 0.0, 0.5, 1.5))
        assert arrived.wait(WAIT)
        cancelled.cancel()
        go.set()
        assert result_of(service, edit(scene, 0.3)).isfinite().all()
        stats = service.stats()
        assert (stats.queued, stats.running) == (0, 0)
        assert stats.outcomes == {"cancelled": 1, "completed": 1}


class TestHttp:
    @pytest.fixture
    def client(self, editor: SliderEditor) -> Iterator[httpx.Client]:
        with (
            EditService(editor, observer=Metrics()) as service,
            listening(create_app(service, model="shapes"), service) as (url, _),
            httpx.Client(base_url=url, timeout=WAIT) as client,
        ):
            yield client

    def body(self, image: Path, strength: Any, **fields: Any) -> dict[str, Any]:
        return {"files": {"image": image.read_bytes()}, "data": {"prompt": BOTH, **self.sliders(strength), **fields}}

    def sliders(self, strength: Any) -> dict[str, str]:
        return {"sliders": json.dumps([{"instruction": RED.instruction, "strength": strength}])}

    @pytest.fixture
    def image(self, scene: Image.Image, tmp_path: Path) -> Path:
        scene.save(tmp_path / "scene.png")
        return tmp_path / "scene.png"

    def test_a_drag_shares_steps_and_the_metrics_count_it(
        self, client: httpx.Client, calls: list[list[float]], image: Path
    ) -> None:
        for strength in (0.0, 0.5, 0.0):
            fields = {"slider_start": "0.5", "num_inference_steps": "4"}
            answer = client.post("/v1/images/edits", **self.body(image, strength, **fields))
            assert answer.status_code == 200, answer.text
        assert calls == [[0.0]] * 2 + [[1.0]] * 2 + [[0.5]] * 2
        lines = client.get("/metrics").text.splitlines()
        found = dict(line.rsplit(" ", 1) for line in lines if line.startswith("slideredit_cache"))
        assert float(found['slideredit_cache_lookups_total{kind="first_steps",result="hit"}']) == 1
        assert float(found['slideredit_cache_lookups_total{kind="first_steps",result="miss"}']) == 1
        assert float(found['slideredit_cache_lookups_total{kind="latents",result="hit"}']) == 1
        assert float(found['slideredit_cache_lookups_total{kind="latents",result="miss"}']) == 2
        assert float(found['slideredit_cache_kind_bytes{kind="latents"}']) > 0
        assert float(found['slideredit_cache_kind_bytes{kind="first_steps"}']) > 0

    @pytest.mark.parametrize("send", ["form", "json"])
    def test_a_strength_may_be_a_schedule(self, client: httpx.Client, calls: list[list[float]], image: Path, send: str) -> None:
        schedule = [[0, 0], [0.5, 1]]
        if send == "form":
            answer = client.post("/v1/images/edits", **self.body(image, schedule, num_inference_steps="4"))
        else:
            sliders = [{"instruction": RED.instruction, "strength": schedule}]
            body = {"image": base64.b64encode(image.read_bytes()).decode(), "sliders": sliders, "num_inference_steps": 4}
            answer = client.post("/v1/images/edits", json=body)
        assert answer.status_code == 200, answer.text
        assert calls == [[1.0], [0.5], [0.0], [0.0]]
        assert answer.json()["data"][0]["strengths"] == [schedule]

    @pytest.mark.parametrize(
        ("strength", "status", "sentence"),
        [
            ([[0.5, 1], [0.2, 0]], 422, r"goes back in time; pass its points in ascending order"),
            ([[0, 1], [1.5, 0]], 400, r"sliders[0].strength[1][0]: input should be less than or equal to 1"),
            ([[0, 11]], 400, r"sliders[0].strength[0][1]: input should be less than or equal to 10"),
            ([], 400, r"sliders[0].strength: list should have at least 1 item"),
            ([[0, float("nan")]], 400, r"sliders[0].strength[0][1]: input should be a finite number"),
            ([[0]], 400, r"sliders[0].strength[0][1]: field required"),
            ("much", 400, r"sliders[0].strength: input should be a valid number"),
        ],
    )
    def test_what_is_not_a_strength_is_refused(
        self, client: httpx.Client, image: Path, strength: Any, status: int, sentence: str
    ) -> None:
        answer = client.post("/v1/images/edits", **self.body(image, strength))
        assert answer.status_code == status
        assert sentence in answer.json()["error"]["message"]

    @pytest.mark.parametrize("start", ["1", "-0.5", "nan"])
    def test_a_start_outside_the_run_is_refused(self, client: httpx.Client, image: Path, start: str) -> None:
        answer = client.post("/v1/images/edits", **self.body(image, 0.5, slider_start=start))
        assert answer.status_code == 400
        assert answer.json()["error"]["message"].startswith("slider_start: input should be ")


class TestCommand:
    def test_an_engine_built_with_a_start_has_it(
        self, tmp_path: Path, scene: Image.Image, capsys: pytest.CaptureFixture[str]
    ) -> None:
        build = ["build", "--base", "shapes-kontext", "--adapter", "shapes-st", "--quiet", "--default-slider-start"]
        assert cli.main([*build, "1", "--out", str(tmp_path / "none")]) == 2
        assert "pass at least 0 and less than 1" in capsys.readouterr().err
        assert cli.main([*build, "0.5", "--out", str(tmp_path / "engine")]) == 0
        assert read_manifest(tmp_path / "engine").defaults == {"slider_start": 0.5}
        scene.save(tmp_path / "scene.png")
        given = ["--image", str(tmp_path / "scene.png"), "--slider", f"{RED.instruction}=0:1:2", "--steps", "4", "--quiet"]
        for options, frozen in (([], 2), (["--slider-start", "0.25"], 1)):
            assert cli.main(["sweep", str(tmp_path / "engine"), *given, *options, "--out", str(tmp_path / "o.png")]) == 0
            assert json.loads((tmp_path / "o.json").read_text())["frozen_steps"] == frozen

    @pytest.mark.parametrize("start", ["1", "-0.1", "nan"])
    def test_a_start_outside_the_run_writes_nothing(
        self, engines: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], start: str
    ) -> None:
        given = ["--image", str(tmp_path / "none.png"), "--slider", "x", "--out", str(tmp_path / "o.png")]
        assert cli.main(["edit", str(engines["st"]), *given, f"--slider-start={start}"]) == 2
        assert "pass at least 0 and less than 1" in capsys.readouterr().err
        assert list(tmp_path.iterdir()) == []
