"""A server whose requests choose the adapter: batches, files that come and go, answers, and what is refused."""

from __future__ import annotations

import base64
import re
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from http_server import as_file, image_of, listening, waited_for
from PIL import Image
from test_adapter_inputs import like
from torch import Tensor

from slideredit_rt.adapters import AdapterInputs, load_adapter, save_adapter
from slideredit_rt.cli import main
from slideredit_rt.editor import SliderEditor
from slideredit_rt.engines import BuildSettings
from slideredit_rt.errors import OutOfDeviceMemory, SliderEditError
from slideredit_rt.export.build import build_engine
from slideredit_rt.serving import EditRequest, EditService
from slideredit_rt.serving.adapter_folder import AdapterFolder
from slideredit_rt.serving.app import create_app
from slideredit_rt.settings import EditSettings
from slideredit_rt.sliders import Slider

RED = Slider("make the circle red")
WAIT = 60.0  # seconds, which no test needs


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine for any ST adapter, without a default."""
    path = tmp_path_factory.mktemp("inputs") / "any"
    build_engine("shapes-kontext", None, path, BuildSettings(adapter_inputs=True), progress=False)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, shipped = tmp_path_factory.mktemp("adapters"), load_adapter("shapes-st")
    save_adapter(shipped, path / "shapes.safetensors")
    save_adapter(like(shipped, 4), path / "other", "peft")
    save_adapter(load_adapter("shapes-gst"), path / "gst.safetensors")
    (path / "notes.txt").write_text("no adapter")
    return path


@pytest.fixture
def editor(engine: Path) -> SliderEditor:
    return SliderEditor.from_engine(engine)


class Recorder:
    """An engine that stands still until it is let, and keeps the batch size and one number of the adapter of each call."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.device = engine, engine.device
        self.calls: list[tuple[int, float]] = []
        self.gate, self.standing = threading.Event(), threading.Event()

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        self.standing.set()
        assert self.gate.wait(WAIT)
        self.calls.append((len(inputs["alpha"]), inputs["lora_a.128"][0, 0, 0].item()))
        output: Tensor = self.engine(inputs)
        return output


def request(image: Image.Image, strength: float, adapter: str | None, **options: Any) -> EditRequest:
    return EditRequest(image, (RED,), ((strength,),), EditSettings(steps=2), adapter=adapter, **options)


def test_batches_share_sliders_but_never_adapters(editor: SliderEditor, folder: Path, scene: Image.Image) -> None:
    adapters = editor.adapters
    assert adapters is not None
    alone = {
        (name, strength): editor.use_adapter(folder / file).edit(scene, [Slider(RED.instruction, strength)], steps=2)
        for name, file in (("shapes", "shapes.safetensors"), ("other", "other"))
        for strength in (0.25, 0.75)
    }
    adapters._kept.clear()
    adapters.engine = recorder = Recorder(adapters.engine)
    loads = adapters.loads
    with EditService(editor, adapters=AdapterFolder(folder)) as service:
        blocker = service.submit(request(scene, 1.0, "shapes"))
        assert recorder.standing.wait(WAIT)
        tickets = {key: service.submit(request(scene, key[1], key[0])) for key in alone}
        assert waited_for(lambda: len(service._scheduler) == 5)
        recorder.gate.set()
        blocker.future.result(WAIT)
        for key, ticket in tickets.items():
            got, expected = ticket.future.result(WAIT)[0], alone[key]
            assert abs_difference(got, expected) <= 1, key
    assert adapters.loads == loads + 2, "each adapter was read once"
    first = recorder.calls[0][1]
    sizes = {same: [size for size, mark in recorder.calls if (mark == first) == same] for same in (True, False)}
    assert sizes == {True: [1, 3, 2], False: [2, 2]}
    assert abs_difference(alone["shapes", 0.25], alone["other", 0.25]) > 10, "the adapters differ"


def abs_difference(one: Image.Image, two: Image.Image) -> int:
    pixels = [torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).int() for image in (one, two)]
    return int((pixels[0] - pixels[1]).abs().max())


def test_adapters_share_the_steps_before_the_sliders_start(editor: SliderEditor, folder: Path, scene: Image.Image) -> None:
    adapters, settings = editor.adapters, EditSettings(steps=2, slider_start=0.5)
    assert adapters is not None
    expected = editor.use_adapter(folder / "other").edit(scene, [Slider(RED.instruction, 0.25)], settings)
    adapters._kept.clear()
    adapters.engine = recorder = Recorder(adapters.engine)
    recorder.gate.set()
    with EditService(editor, adapters=AdapterFolder(folder)) as service:
        for name, calls in (("shapes", 2), ("other", 1), ("other", 0)):
            recorder.calls.clear()
            chosen = EditRequest(scene, (RED,), ((0.25,),), settings, adapter=name)
            edited = service.submit(chosen).future.result(WAIT)[0]
            assert len(recorder.calls) == calls, name
    assert abs_difference(edited, expected) <= 1


@pytest.fixture
def client(editor: SliderEditor, folder: Path) -> Iterator[httpx.Client]:
    with (
        EditService(editor, adapters=AdapterFolder(folder)) as service,
        listening(create_app(service, model="any"), service) as (url, _),
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        yield client


def post(client: httpx.Client, image: Image.Image, **fields: Any) -> httpx.Response:
    data = base64.b64encode(as_file(image)).decode()
    sliders = [{"instruction": RED.instruction, "strength": 0.5}]
    return client.post(
        "/v1/images/edits", json={"image": data, "sliders": sliders, "num_inference_steps": 2, "seed": 3, **fields}
    )


def test_a_request_chooses_its_adapter(
    client: httpx.Client, editor: SliderEditor, folder: Path, scene: Image.Image, tmp_path: Path
) -> None:
    assert client.get("/v1/models").json()["data"][0]["engine"]["choices"] == ["gst", "other", "shapes"]
    half = [Slider(RED.instruction, 0.5)]
    for name, file in (("shapes", "shapes.safetensors"), ("other", "other")):
        answer = post(client, scene, adapter=name)
        assert answer.status_code == 200, answer.text
        expected = editor.use_adapter(folder / file).edit(scene, half, steps=2, seed=3)
        assert abs_difference(image_of(answer.json()["data"][0]), expected) <= 1
    added = folder / "added.safetensors"
    save_adapter(like(load_adapter("shapes-st"), 2, seed=9), added)
    try:
        assert "added" in client.get("/v1/models/any").json()["engine"]["choices"]
        assert post(client, scene, adapter="added").status_code == 200, "no restart, no rebuild"
    finally:
        added.unlink()
    for adapter, message in (
        (None, "takes its adapter as an input and has no default; choose one"),
        ("../secret", "the adapter '../secret' is not served here; choose from 'gst', 'other', 'shapes'"),
        ("gst", "is gst, but the engine's adapter inputs are for st"),
    ):
        answer = post(client, scene, **({} if adapter is None else {"adapter": adapter}))
        assert answer.status_code == 422, adapter
        assert message in answer.json()["error"]["message"]


def test_a_device_without_room_for_an_adapter_is_not_the_clients_fault(
    client: httpx.Client, scene: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Any:
        raise OutOfDeviceMemory("full")

    monkeypatch.setattr(AdapterInputs, "pack", full)
    answer = post(client, scene, adapter="other")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "out_of_memory")


def test_servers_without_a_choice(st_editor: SliderEditor, folder: Path, scene: Image.Image, tmp_path: Path) -> None:
    with pytest.raises(SliderEditError, match="the engine contains its adapter, so it cannot run those in"):
        EditService(st_editor, adapters=AdapterFolder(folder))
    with pytest.raises(SliderEditError, match="cannot read the adapter folder"):
        AdapterFolder(tmp_path / "none")
    with EditService(st_editor) as service, pytest.raises(SliderEditError, match="this server has no folder of adapters"):
        service.submit(request(scene, 0.5, "shapes"))


def test_entries_that_cannot_be_looked_into_are_no_adapters(tmp_path: Path) -> None:
    (tmp_path / "age.safetensors").touch()
    for name in ("unreachable", "unreachable.safetensors"):
        # Looking at it fails for every user, as looking into another user's folder does.
        (tmp_path / name).symlink_to("x" * 300)
    assert AdapterFolder(tmp_path).names() == ["age"]


def test_two_adapters_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "age.safetensors").touch()
    (tmp_path / "smile.safetensors").touch()
    served = AdapterFolder(tmp_path)
    (tmp_path / "age").mkdir()
    (tmp_path / "age" / "adapter_model.safetensors").touch()
    message = f"the adapter 'age' is both '{tmp_path / 'age'}' and '{tmp_path / 'age.safetensors'}'; rename or remove one"
    for choose in (lambda: served.path("age"), lambda: AdapterFolder(tmp_path)):
        with pytest.raises(SliderEditError, match=re.escape(message)):
            choose()
    assert served.path("smile") == tmp_path / "smile.safetensors", "others are not affected"
    assert served.names() == ["age", "smile"]


def test_the_command_refuses_a_folder_for_an_engine_with_its_own_adapter(
    engines: dict[str, Path], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", str(engines["st"]), "--port", "0", "--adapters", str(folder)]) == 2
    assert "the engine contains its adapter" in capsys.readouterr().err
