"""The HTTP API over a real engine: OpenAI's shape with sliders, and a status and a sentence for whatever else is sent."""

import base64
import io
import json
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import numpy as np
import openai
import pytest
import schemathesis
from http_server import as_file, image_of, listening, waited_for
from hypothesis import HealthCheck, given, settings
from numpy.typing import NDArray
from PIL import Image
from qwen_checkpoint import qwen_adapter, save_tiny_checkpoint
from qwen_checkpoint import random_image as qwen_image
from schemathesis.checks import CHECKS

from slideredit_rt import Slider, SliderEditError, SliderEditor
from slideredit_rt.cli import main
from slideredit_rt.serving.app import PREVIEW_STEPS, create_app
from slideredit_rt.serving.body import Limits
from slideredit_rt.serving.image_files import decode_image_file
from slideredit_rt.serving.metrics import Metrics
from slideredit_rt.serving.requests import EditRequest
from slideredit_rt.serving.server import HEADER_BYTES
from slideredit_rt.serving.service import EditService
from slideredit_rt.settings import EditSettings, RunSettings

RED, DARK = "make the circle red", "make the background dark"
BOTH = f"{RED} and {DARK}"
SLIDERS = [{"instruction": RED, "strength": 0.5}, {"instruction": DARK, "strength": 1.25}]
STEPS = 3


@pytest.fixture(scope="module")
def editor(engines: dict[str, Path]) -> SliderEditor:
    """The server's own; what it should answer comes from the fixture `st_editor`."""
    return SliderEditor.from_engine(engines["st"], run=RunSettings(threads=1))


@pytest.fixture(scope="module")
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture(scope="module")
def service(editor: SliderEditor, metrics: Metrics) -> Iterator[EditService]:
    with EditService(editor, observer=metrics) as service:
        yield service


@pytest.fixture(scope="module")
def url(service: EditService) -> Iterator[str]:
    with listening(create_app(service, model="shapes"), service) as (address, _):
        yield address


@pytest.fixture
def client(url: str) -> Iterator[httpx.Client]:
    """Asks, and sees that the server still answers afterwards."""
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client
        assert client.get("/health").json() == {"status": "ok"}


@pytest.fixture
def ai(url: str) -> Iterator[openai.OpenAI]:
    """OpenAI's own client, which does not try again; Any to the tests, as its types lack the fields that sliders add."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def png(request: pytest.FixtureRequest) -> bytes:
    return as_file(request.getfixturevalue("scene"))


def pixels(image: Image.Image) -> NDArray[Any]:
    return np.asarray(image).astype(int)


def data_url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def edit(client: httpx.Client, png: bytes, **fields: Any) -> httpx.Response:
    """An edit as a form."""
    form = {"num_inference_steps": STEPS, **fields}
    return client.post("/v1/images/edits", files={"image": ("scene.png", png, "image/png")}, data=form)


FORM = {"content-type": "multipart/form-data; boundary=b"}


def form_body(parts: list[tuple[bytes, bytes, bytes]]) -> bytes:
    """A form of parts: name, what follows it in the headers, content."""
    head = b'--b\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n'
    return b"".join(head % part for part in parts) + b"--b--\r\n"


def events(text: str) -> list[tuple[str, Any]]:
    """Kinds and data of server-sent events."""
    blocks = [dict(line.split(": ", 1) for line in block.split("\n")) for block in text.strip().split("\n\n")]
    return [(block["event"], json.loads(block["data"])) for block in blocks]


# Edits.


def test_an_edit_is_the_editors_own_bit_for_bit(
    client: httpx.Client, png: bytes, scene: Image.Image, st_editor: SliderEditor
) -> None:
    answer = edit(client, png, sliders=json.dumps(SLIDERS), seed=7, num_inference_steps=4, guidance_scale=3).json()
    expected = st_editor.edit(scene, [Slider(RED, 0.5), Slider(DARK, 1.25)], seed=7, steps=4, guidance_scale=3)
    (item,) = answer["data"]
    assert image_of(item).tobytes() == expected.tobytes()
    assert (item["seed"], item["strengths"]) == (7, [0.5, 1.25])
    assert (answer["size"], answer["output_format"], answer["background"]) == ("64x64", "png", "opaque")
    # 64 rows of 8 × 8 pixels; the tokens are make the circle red and make the background dark.
    assert answer["usage"] == {
        "input_tokens": 73,
        "input_tokens_details": {"text_tokens": 9, "image_tokens": 64},
        "output_tokens": 64,
        "total_tokens": 137,
    }


@pytest.mark.parametrize("place", ["image", "images", "list"])
def test_json_holds_the_image_in_base64(client: httpx.Client, png: bytes, place: str) -> None:
    form = edit(client, png, sliders=json.dumps(SLIDERS)).json()
    sent: dict[str, dict[str, Any]] = {
        "image": {"image": base64.b64encode(png).decode()},
        "images": {"images": [{"image_url": data_url(png)}]},
        "list": {"image": [data_url(png)]},
    }
    answer = client.post("/v1/images/edits", json={"sliders": SLIDERS, "num_inference_steps": STEPS, **sent[place]})
    assert answer.json()["data"] == form["data"]


@pytest.mark.parametrize(
    "write",
    [
        lambda png: data_url(png).replace("image/png", "image/png;charset=utf-8;name=a.png"),
        lambda png: data_url(png).replace("data:image/png;base64", "DATA:Image/PNG;BASE64"),
        lambda png: data_url(png).replace("image/png", ""),
        lambda png: "data:image/png;base64," + quote(base64.b64encode(png), safe=""),
        lambda png: base64.urlsafe_b64encode(png).decode(),
        lambda png: base64.urlsafe_b64encode(png).decode().rstrip("="),
        lambda png: f"\n {data_url(png).rstrip('=')}\n",
    ],
)
def test_base64_and_data_urls_may_be_written_in_other_ways(
    client: httpx.Client, png: bytes, write: Callable[[bytes], str]
) -> None:
    # Padded, and with characters that only one of the alphabets has.
    png = png + b"\xfb\xff\xbf" + bytes(1 + -len(png) % 3)
    assert base64.b64encode(png).endswith(b"==")
    expected = edit(client, png, prompt=RED).json()
    answer = client.post("/v1/images/edits", json={"prompt": RED, "image": write(png), "num_inference_steps": STEPS})
    assert answer.json()["data"] == expected["data"]


def test_the_largest_seed_is_torchs(client: httpx.Client, png: bytes, scene: Image.Image, st_editor: SliderEditor) -> None:
    data = edit(client, png, prompt=RED, seed=2**64 - 2, n=2).json()["data"]
    assert [item["seed"] for item in data] == [2**64 - 2, 2**64 - 1]
    expected = st_editor.edit(scene, [Slider(RED)], seed=2**64 - 1, steps=STEPS)
    assert np.abs(pixels(image_of(data[1])) - pixels(expected)).max() <= 1


@pytest.mark.parametrize("header", ["; filename*=UTF-8''sc%C3%A8ne.png", "\r\nContent-Type: image/png"])
def test_a_part_is_a_file_without_a_plain_filename(client: httpx.Client, png: bytes, header: str) -> None:
    expected = edit(client, png, prompt=RED).json()
    parts = [(b"prompt", b"", RED.encode()), (b"num_inference_steps", b"", b"%d" % STEPS), (b"image", header.encode(), png)]
    answer = client.post("/v1/images/edits", content=form_body(parts), headers=FORM)
    assert answer.json()["data"] == expected["data"]


@pytest.fixture(scope="module")
def qwen_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that takes several images."""
    return save_tiny_checkpoint(tmp_path_factory.mktemp("qwen") / "base", plus=True)


@pytest.fixture(scope="module")
def qwen(qwen_base: Path) -> Iterator[str]:
    """A server of an editor on that base: its address."""
    editor = SliderEditor.from_pretrained(qwen_base, qwen_adapter(qwen_base))
    limits = Limits(pixels=10_000)
    with EditService(editor) as service, listening(create_app(service, model="qwen", limits=limits), service) as (address, _):
        yield address


@pytest.mark.parametrize("send", ["openai", "form", "image", "images", "both"])
def test_several_images_are_edited_as_the_editor_edits_them(qwen: str, qwen_base: Path, send: str) -> None:
    images = [qwen_image(96, 48, seed=1), qwen_image(64, 64)]
    files = [as_file(image) for image in images]
    fields: dict[str, Any] = {
        "prompt": RED,
        "seed": 3,
        "num_inference_steps": 2,
        "sliders": [{"instruction": RED, "strength": 0.4}],
    }
    form = {**fields, "sliders": json.dumps(fields["sliders"])}
    urls = [data_url(file) for file in files]
    sent: dict[str, dict[str, Any]] = {
        "image": {"image": urls},
        "images": {"images": [{"image_url": url} for url in urls]},
        "both": {"image": urls[0], "images": [{"image_url": urls[1]}]},
    }
    with httpx.Client(base_url=qwen, timeout=60) as client, openai.OpenAI(base_url=f"{qwen}/v1", api_key="any") as ai:
        if send == "openai":
            extra = {name: form[name] for name in ("seed", "num_inference_steps", "sliders")}
            answer: dict[str, Any] = ai.images.edit(image=files, prompt=RED, extra_body=extra).to_dict()
        elif send == "form":
            parts = [("image", (f"{i}.png", file, "image/png")) for i, file in enumerate(files)]
            answer = client.post("/v1/images/edits", files=parts, data=form).json()
        else:
            answer = client.post("/v1/images/edits", json={**fields, **sent[send]}).json()
        assert client.get("/v1/models").json()["data"][0]["engine"]["max_images"] == 16
    editor = SliderEditor.from_pretrained(qwen_base, qwen_adapter(qwen_base))
    expected = editor.edit(images, [Slider(RED, 0.4)], prompt=RED, seed=3, steps=2)
    (item,) = answer["data"]
    assert image_of(item).tobytes() == expected.tobytes()
    turned = editor.edit(images[::-1], [Slider(RED, 0.4)], prompt=RED, seed=3, steps=2)
    assert expected.tobytes() != turned.tobytes()  # their order counts
    # Rows of 8 × 8 pixels: the first image is encoded at 96 × 32, the second one at 64 × 64, as the edit is.
    assert answer["size"] == "64x64"
    usage = answer["usage"]
    assert (usage["input_tokens_details"]["image_tokens"], usage["output_tokens"]) == (12 * 4 + 8 * 8, 8 * 8)
    rows = editor.prepare(images, [RED], prompt=RED).conditioning.image_rows
    assert rows == usage["input_tokens_details"]["image_tokens"] + usage["output_tokens"]


def test_limits_of_several_images(qwen: str) -> None:
    file = as_file(qwen_image())
    with httpx.Client(base_url=qwen, timeout=60) as client:

        def send(*images: bytes) -> httpx.Response:
            fields = {"prompt": RED, "image": [data_url(image) for image in images]}
            return client.post("/v1/images/edits", json=fields)

        refused(send(), 400, "number_of_images", "0 images were sent; send 1 to 16, in the field image")
        refused(send(*[file] * 17), 400, "number_of_images", "17 images were sent; send 1 to 16, in the field image")
        many = [("image[]", file)] * 17
        refused(client.post("/v1/images/edits", files=many, data={"prompt": RED}), 400, None, "Maximum number of files is 16")
        refused(send(file, as_file(qwen_image(128, 100))), 413, "image_too_large", "image 2 .*megapixels allowed")
        refused(send(file, b"no image"), 422, "unprocessable_edit", "image 2 cannot be read")


def test_without_sliders_the_whole_prompt_is_one_at_strength_1(
    client: httpx.Client, png: bytes, scene: Image.Image, st_editor: SliderEditor
) -> None:
    answer = edit(client, png, prompt=BOTH).json()
    assert image_of(answer["data"][0]).tobytes() == st_editor.edit(scene, [Slider(BOTH)], steps=STEPS).tobytes()


def test_nulls_and_fields_without_meaning_here_change_nothing(client: httpx.Client, png: bytes) -> None:
    plain = {"prompt": RED, "image": data_url(png), "num_inference_steps": STEPS}
    nulls = dict.fromkeys(("n", "size", "stream", "output_format", "partial_images"))
    openais = {"quality": "high", "user": "me", "background": "auto"}
    answers = [client.post("/v1/images/edits", json=fields).json() for fields in (plain, plain | nulls | openais)]
    assert answers[0]["data"] == answers[1]["data"]


def test_n_images_have_consecutive_seeds(client: httpx.Client, png: bytes, scene: Image.Image, st_editor: SliderEditor) -> None:
    data = edit(client, png, prompt=RED, n=3, seed=5).json()["data"]
    assert [item["seed"] for item in data] == [5, 6, 7]
    for item in data:
        expected = st_editor.edit(scene, [Slider(RED)], seed=item["seed"], steps=STEPS)
        assert np.abs(pixels(image_of(item)) - pixels(expected)).max() <= 1


def test_a_sweep_has_one_image_per_strength(
    client: httpx.Client, png: bytes, scene: Image.Image, st_editor: SliderEditor
) -> None:
    sweep = {"slider": 0, "from": 0, "to": 1.5, "count": 4}
    data = edit(client, png, sliders=json.dumps(SLIDERS), sweep=json.dumps(sweep)).json()["data"]
    assert [item["strengths"] for item in data] == [[0, 1.25], [0.5, 1.25], [1, 1.25], [1.5, 1.25]]
    expected = st_editor.sweep(scene, [Slider(RED), Slider(DARK, 1.25)], 0, [0, 0.5, 1, 1.5], steps=STEPS)
    for item, image in zip(data, expected, strict=True):
        assert np.abs(pixels(image_of(item)) - pixels(image)).max() <= 1


@pytest.mark.parametrize(
    ("output_format", "answer"),
    [("webp", (400, "strip_too_large")), ("jpeg", (422, "unprocessable_edit")), ("png", (422, "unprocessable_edit"))],
)
def test_a_strip_that_its_format_cannot_hold_is_refused_before_the_work(
    client: httpx.Client, png: bytes, output_format: str, answer: tuple[int, str]
) -> None:
    """The title is wider than a WebP image may be; the prompt is longer than the engine reads, which encoding would tell."""
    words = "make the circle red " * 199
    sweep = {"from": 0, "to": 1, "count": 2, "strip": True}
    fields = {"sliders": [{"instruction": words}], "sweep": sweep, "output_format": output_format, "image": data_url(png)}
    said = client.post("/v1/images/edits", json=fields)
    error = said.json()["error"]
    assert (said.status_code, error["code"]) == answer
    if output_format == "webp":
        assert error["param"] == "output_format"
        assert re.fullmatch(
            r"the strip has \d{5}×\d+ pixels, too large for output_format 'webp' \(.*16383 pixels\); "
            "use png, or fewer strengths",
            error["message"],
        )


def test_a_sweeps_strip_is_one_image(client: httpx.Client, png: bytes) -> None:
    sweep = {"from": 0, "to": 1, "count": 3, "strip": True}
    (item,) = edit(client, png, prompt=RED, sweep=json.dumps(sweep)).json()["data"]
    width, height = image_of(item).size
    assert width > 3 * 64
    assert width > height
    assert item["strengths"] is None


def test_a_preview_takes_fewer_steps_unless_it_says_how_many(
    client: httpx.Client, png: bytes, scene: Image.Image, st_editor: SliderEditor
) -> None:
    files = {"image": png}
    data = client.post("/v1/images/edits", files=files, data={"prompt": RED, "preview": "true"}).json()["data"]
    assert image_of(data[0]).tobytes() == st_editor.edit(scene, [Slider(RED)], steps=PREVIEW_STEPS).tobytes()
    data = edit(client, png, prompt=RED, preview="true").json()["data"]
    assert image_of(data[0]).tobytes() == st_editor.edit(scene, [Slider(RED)], steps=STEPS).tobytes()


@pytest.mark.parametrize(("output_format", "pillow"), [("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP")])
def test_output_formats(client: httpx.Client, png: bytes, output_format: str, pillow: str) -> None:
    full, small = (
        edit(client, png, prompt=RED, output_format=output_format, output_compression=quality).json()["data"][0]
        for quality in (100, 10)
    )
    assert image_of(full).format == pillow
    assert image_of(full).size == (64, 64)
    assert (len(small["b64_json"]) < len(full["b64_json"])) == (output_format != "png")


def test_the_size_is_the_engines_for_the_image(client: httpx.Client, scene: Image.Image) -> None:
    wide = as_file(scene.resize((80, 40)))
    answers = [edit(client, wide, prompt=RED, size=size) for size in ("auto", "88x48", "1024x1024")]
    assert [a.status_code for a in answers] == [200, 200, 400]
    assert answers[0].json()["size"] == "88x48"
    assert "this image is edited at 88x48" in answers[2].json()["error"]["message"]


# Streams.


def test_a_stream_sends_partial_images_and_then_the_edit(client: httpx.Client, png: bytes) -> None:
    answer = edit(client, png, prompt=RED, num_inference_steps=6, stream="true", partial_images=2)
    whole = edit(client, png, prompt=RED, num_inference_steps=6).json()
    assert answer.headers["content-type"].startswith("text/event-stream")
    kinds, data = zip(*events(answer.text), strict=True)
    assert kinds == ("image_edit.partial_image",) * 2 + ("image_edit.completed",)
    assert [d["type"] for d in data] == list(kinds)
    assert [d["partial_image_index"] for d in data[:2]] == [0, 1]
    assert all((d["size"], d["output_format"]) == ("64x64", "png") and d["created_at"] > 1e9 for d in data)
    assert data[-1]["b64_json"] == whole["data"][0]["b64_json"]
    assert data[-1]["usage"] == whole["usage"]
    # What is shown first is further from the end.
    distances = [np.abs(pixels(image_of(d)) - pixels(image_of(data[-1]))).mean() for d in data]
    assert distances[0] > distances[1] > distances[2] == 0


def test_a_stream_of_several_images_completes_each(client: httpx.Client, png: bytes) -> None:
    answer = edit(client, png, prompt=RED, n=2, seed=40, stream="true", partial_images=1, num_inference_steps=4)
    data = [d for _, d in events(answer.text)]
    assert [(d["type"].split(".")[1], d["image_index"]) for d in data] == [
        ("partial_image", 0),
        ("partial_image", 1),
        ("completed", 0),
        ("completed", 1),
    ]
    assert [d["seed"] for d in data[2:]] == [40, 41]


def test_what_fails_before_the_first_event_has_a_status(client: httpx.Client, png: bytes) -> None:
    answer = edit(client, png, prompt=DARK, sliders=json.dumps(SLIDERS[:1]), stream="true")
    assert answer.status_code == 422
    assert "nowhere in the prompt" in answer.json()["error"]["message"]


# OpenAI's client.


def test_openais_client_edits(ai: Any, png: bytes, scene: Image.Image, st_editor: SliderEditor) -> None:
    answer = ai.images.edit(model="shapes", image=("scene.png", png), prompt=BOTH, extra_body={"num_inference_steps": STEPS})
    expected = st_editor.edit(scene, [Slider(BOTH)], steps=STEPS)
    assert image_of({"b64_json": answer.data[0].b64_json}).tobytes() == expected.tobytes()
    assert answer.size == "64x64"
    assert answer.usage.output_tokens == 64


@pytest.mark.parametrize("send", [json.dumps, list])
def test_openais_client_sends_sliders(
    ai: Any, png: bytes, scene: Image.Image, st_editor: SliderEditor, send: Callable[[Any], Any]
) -> None:
    extra = {"sliders": send(SLIDERS), "num_inference_steps": STEPS, "seed": 2}
    answer = ai.images.edit(image=png, prompt=BOTH, extra_body=extra)
    expected = st_editor.edit(scene, [Slider(RED, 0.5), Slider(DARK, 1.25)], steps=STEPS, seed=2)
    assert image_of({"b64_json": answer.data[0].b64_json}).tobytes() == expected.tobytes()


def test_openais_client_sends_a_sweep_taken_apart(ai: Any, png: bytes) -> None:
    extra = {"sweep": {"slider": 0, "from": 0, "to": 1, "count": 3}, "num_inference_steps": STEPS}
    answer = ai.images.edit(image=png, prompt=RED, extra_body=extra)
    assert [item.strengths for item in answer.data] == [[0.0], [0.5], [1.0]]


def test_sliders_whose_fields_cannot_be_told_apart_are_refused(ai: Any, png: bytes) -> None:
    # The client sends two instructions and one strength, without saying whose.
    extra = {"sliders": [{"instruction": RED}, {"instruction": DARK, "strength": 0.5}]}
    with pytest.raises(openai.BadRequestError, match=r"2 × instruction, 1 × strength.*as JSON in one field"):
        ai.images.edit(image=png, prompt=BOTH, extra_body=extra)


def test_openais_client_streams(ai: Any, png: bytes) -> None:
    extra = {"sliders": json.dumps(SLIDERS), "num_inference_steps": 8}
    stream = ai.images.edit(image=png, prompt=BOTH, stream=True, partial_images=3, extra_body=extra)
    kinds = [event.type for event in stream]
    assert kinds == ["image_edit.partial_image"] * 3 + ["image_edit.completed"]


def test_openais_client_knows_the_errors(ai: Any, png: bytes) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        ai.images.edit(image=png, prompt=RED, model="gpt-image-1")
    assert unknown.value.code == "model_not_found"
    assert unknown.value.param == "model"
    with pytest.raises(openai.UnprocessableEntityError):
        ai.images.edit(image=b"no image", prompt=RED)
    assert [model.id for model in ai.models.list()] == ["shapes"]
    assert ai.models.retrieve("shapes").engine["max_sliders"] == 8


# The rest of the surface.


def test_the_model_says_what_its_engine_is(client: httpx.Client, st_editor: SliderEditor) -> None:
    (model,) = client.get("/v1/models").json()["data"]
    assert model["id"] == "shapes"
    assert client.get("/v1/models/shapes").json() == model
    assert model["engine"] == {
        "kind": "st",
        "family": "flux_kontext",
        "backend": "onnxruntime",
        "precision": None,
        "adapters": [],
        "adapter_kinds": [],
        "choices": [],
        "own_adapter": True,
        "max_sliders": st_editor.max_sliders,
        "num_inference_steps": st_editor.family.num_inference_steps,
        "guidance_scale": st_editor.family.guidance_scale,
        "true_cfg_scale": st_editor.family.true_cfg_scale,
        "slider_start": 0.0,
        "preview_steps": PREVIEW_STEPS,
        "max_images": 1,
        "side": 64,
        "world": "shapes",
        "sample_instructions": ["make the circle red", "make the background dark"],
    }


def test_spans_say_which_slider_owns_each_token(client: httpx.Client) -> None:
    answer = client.post("/v1/sliders/spans", json={"prompt": f"Please {BOTH}", "sliders": SLIDERS}).json()
    words = [(answer["prompt"][t["start"] : t["end"]], t["slider"]) for t in answer["tokens"] if t["end"] > t["start"]]
    owned = {0: [w for w, s in words if s == 0], 1: [w for w, s in words if s == 1]}
    assert owned == {0: RED.split(), 1: DARK.split()}
    assert answer["text_rows"] == 24
    composed = client.post("/v1/sliders/spans", json={"sliders": SLIDERS}).json()
    assert composed["prompt"] == BOTH


def test_health(client: httpx.Client) -> None:
    assert client.get("/v2/health/live").json() == {"live": True}
    assert client.get("/v2/health/ready").json() == {"ready": True}


def test_the_page_comes_from_the_package_and_loads_nothing_from_elsewhere(client: httpx.Client, scene: Image.Image) -> None:
    page = client.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    for name, kind in (("app.js", "text/javascript"), ("style.css", "text/css")):
        assert name in page.text
        assert client.get(f"/{name}").headers["content-type"].startswith(kind)
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy
    assert page.headers["x-content-type-options"] == "nosniff"
    sample = Image.open(io.BytesIO(client.get("/sample.png").content))
    assert sample.tobytes() == scene.tobytes()


def test_metrics_count_what_was_done(client: httpx.Client, png: bytes) -> None:
    def values() -> dict[str, float]:
        lines = [line for line in client.get("/metrics").text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}

    secret = "make the square green"
    before = values()
    edit(client, png, prompt=secret, n=2, num_inference_steps=5)
    edit(client, png, prompt=secret, seed=9, preview="true", num_inference_steps=2)
    edit(client, png, prompt=secret, sliders=json.dumps(SLIDERS))
    after = values()
    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert grown['slideredit_requests_total{mode="full",outcome="completed"}'] == 1
    assert grown['slideredit_requests_total{mode="preview",outcome="completed"}'] == 1
    assert grown['slideredit_requests_total{mode="full",outcome="refused"}'] == 1
    assert grown['slideredit_images_total{mode="full"}'] == 2
    # Two images, five steps, in the same calls; then one image, two steps.
    assert grown['slideredit_step_batch_size_sum{mode="full"}'] == 10
    assert grown['slideredit_step_batch_size_count{mode="full"}'] == 5
    assert grown['slideredit_step_seconds_count{mode="preview"}'] == 2
    assert grown['slideredit_request_seconds_count{mode="preview",outcome="completed"}'] == 1
    assert grown['slideredit_cache_lookups_total{kind="text",result="miss"}'] == 1
    assert grown['slideredit_cache_lookups_total{kind="text",result="hit"}'] == 1
    assert grown['slideredit_http_responses_total{route="/v1/images/edits",status="200"}'] == 2
    assert grown['slideredit_http_responses_total{route="/v1/images/edits",status="422"}'] == 1
    assert after["slideredit_queued_images"] == after["slideredit_running_images"] == 0
    assert "square" not in client.get("/metrics").text


def test_a_second_application_over_a_service_doubles_no_metric(client: httpx.Client, service: EditService) -> None:
    create_app(service, model="again")
    assert client.get("/metrics").text.count("# TYPE slideredit_queued_images gauge\n") == 1


# Images of all kinds.


def decoded(data: bytes, max_pixels: int = 10**6) -> Image.Image:
    return decode_image_file(data, "the image", max_pixels=max_pixels, max_aspect=4)


def test_images_are_turned_upright_and_made_rgb(scene: Image.Image) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    turned = decoded(as_file(scene.resize((64, 48)), exif=exif))
    assert turned.size == (48, 64)
    clear = decoded(as_file(Image.new("RGBA", (4, 4), (255, 0, 0, 0))))
    assert clear.getpixel((0, 0)) == (255, 255, 255)
    deep = decoded(as_file(Image.fromarray(np.full((4, 4), 32768, np.uint16))))
    assert deep.getpixel((0, 0)) == (128, 128, 128)
    moving = decoded(as_file(scene, "WEBP", save_all=True, append_images=[Image.new("RGB", (64, 64))], lossless=True))
    assert moving.tobytes() == scene.tobytes()
    assert decoded(as_file(scene.convert("CMYK"), "JPEG")).mode == "RGB"


def bomb(width: int, height: int) -> bytes:
    """A small PNG file that says it is large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(10**6))) + chunk(b"IEND", b"")


def test_damaged_files_are_refused_whatever_they_do_to_the_decoder(scene: Image.Image) -> None:
    rng = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "WEBP"):
        data = as_file(scene, kind)
        for _ in range(60):
            broken = bytearray(data[: rng.integers(len(data))] if rng.random() < 0.3 else data)
            for place in rng.integers(0, max(1, len(broken)), 4):
                broken[place : place + 1] = bytes([rng.integers(256)])
            with suppress(SliderEditError):
                assert decoded(bytes(broken)).mode == "RGB"


# Bad input.


def refused(answer: httpx.Response, status: int, code: str | None, sentence: str) -> None:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    assert re.search(sentence, error["message"]), error["message"]


@pytest.mark.parametrize(
    ("fields", "status", "code", "sentence"),
    [
        ({}, 400, "missing", "neither prompt nor sliders"),
        ({"prompt": RED, "strength": 1}, 400, "extra_forbidden", r"strength: extra inputs are not permitted"),
        ({"prompt": RED, "n": 11}, 400, "less_than_equal", r"^n: input should be less than or equal to 10 \(got '11'\)"),
        ({"prompt": RED, "seed": -1}, 400, "greater_than_equal", "^seed: "),
        ({"prompt": RED, "seed": 2**64}, 400, "less_than_equal", "^seed: "),
        ({"prompt": RED, "seed": "many"}, 400, "int_parsing", r"^seed: .*valid integer"),
        ({"prompt": RED, "num_inference_steps": 10**6}, 400, "less_than_equal", "^num_inference_steps: "),
        ({"prompt": RED, "guidance_scale": "inf"}, 400, "finite_number", "^guidance_scale: .*finite"),
        ({"prompt": "a" * 5000}, 400, "string_too_long", "^prompt: "),
        ({"prompt": RED, "size": "1x1"}, 400, "invalid_size", "at 64x64"),
        ({"prompt": RED, "response_format": "url"}, 400, "literal_error", "^response_format: input should be 'b64_json'"),
        ({"prompt": RED, "output_format": "gif"}, 400, "literal_error", "^output_format: "),
        ({"prompt": RED, "background": "transparent"}, 400, "literal_error", "^background: "),
        ({"prompt": RED, "partial_images": 4}, 400, "less_than_equal", "^partial_images: "),
        ({"prompt": RED, "model": "dall-e-2"}, 404, "model_not_found", "'dall-e-2' is not served here; use 'shapes'"),
        ({"prompt": RED, "sliders": "[{"}, 400, "json_invalid", "^sliders is not valid JSON"),
        ({"prompt": RED, "sliders": "[]"}, 400, "too_short", "^sliders: "),
        (
            {"sliders": '[{"instruction": "a", "strength": NaN}]'},
            400,
            "finite_number",
            r"^sliders\[0\]\.strength: .*finite.*nan",
        ),
        ({"sliders": '[{"instruction": "a", "strength": 1e300}]'}, 400, "less_than_equal", r"^sliders\[0\]\.strength: "),
        ({"sliders": json.dumps([{"instruction": RED}] * 100)}, 400, "too_long", "^sliders: .*at most 64"),
        ({"sliders": json.dumps([{"instruction": f"w{i}"} for i in range(20)])}, 422, "unprocessable_edit", "takes at most 8"),
        ({"prompt": DARK, "sliders": json.dumps(SLIDERS)}, 422, "unprocessable_edit", "nowhere in the prompt"),
        ({"sliders": json.dumps([{"instruction": RED, "adapter": "x"}])}, 422, "unprocessable_edit", "names the adapter 'x'"),
        ({"prompt": RED, "sweep": '{"from": 0, "to": 1, "count": 1000}'}, 400, "less_than_equal", r"^sweep\.count: "),
        ({"prompt": RED, "sweep": '{"slider": 1, "from": 0, "to": 1}'}, 400, "no_such_slider", "the last slider has index 0"),
        ({"prompt": RED, "n": 2, "sweep": '{"from": 0, "to": 1}'}, 400, "sweep_alone", "a sweep cannot be combined with n > 1"),
        ({"prompt": RED, "negative_prompt": "blur"}, 422, "unprocessable_edit", "true-CFG scale above 1"),
    ],
)
def test_fields_that_cannot_be(
    client: httpx.Client, png: bytes, fields: dict[str, Any], status: int, code: str | None, sentence: str
) -> None:
    files = {"image": png}
    refused(client.post("/v1/images/edits", files=files, data=fields), status, code, sentence)


@pytest.mark.parametrize(
    ("body", "status", "code", "sentence"),
    [
        (b"{", 400, "json_invalid", "invalid JSON"),
        (b"", 400, "json_invalid", "invalid JSON"),
        (b"[1]", 400, "model_type", "the body: "),
        (b"\xff\xfe", 400, "json_invalid", "invalid JSON"),
        (b"[" * 100_000, 400, "json_invalid", "invalid JSON"),
        (b'{"prompt": "\\ud800", "image": "AA=="}', 400, "json_invalid", "invalid JSON"),
        (b'{"prompt": 1, "image": "AA=="}', 400, "string_type", "^prompt: "),
        (b'{"prompt": "a", "n": "1", "image": "AA=="}', 400, "int_type", "^n: "),
        (b'{"prompt": "a"}', 400, "one_image", "0 images were sent"),
        (b'{"prompt": "a", "image": ["AA==", "AA=="]}', 400, "one_image", "2 images were sent"),
        (b'{"prompt": "a", "image": "https://example.com/a.png"}', 400, "url_not_allowed", "this server does not fetch URLs"),
        (b'{"prompt": "a", "images": [{"image_url": "file:///etc/passwd"}]}', 400, "url_not_allowed", "does not fetch URLs"),
        (b'{"prompt": "a", "image": "/etc/passwd"}', 422, "unprocessable_edit", "the image cannot be read"),
        (b'{"prompt": "a", "image": "data:image/png,AAAA"}', 400, "invalid_base64", "image is not base64"),
        (b'{"prompt": "a", "image": "AAAAA"}', 400, "invalid_base64", "image is not base64"),
        (b'{"prompt": "a", "image": "AA=A"}', 400, "invalid_base64", "image is not base64"),
        (
            b'{"prompt": "a", "image": "AA==", "seed": 18446744073709551616}',
            400,
            "less_than_equal",
            "^seed: .*18446744073709551615",
        ),
        (b'{"prompt": "a", "image": "AA==", "seed": 18446744073709551615, "n": 2}', 400, "seed_too_large", "^seed is .*n is 2"),
        (b'{"prompt": "a", "image": "not base64!"}', 400, "invalid_base64", "image is not base64"),
        (b'{"prompt": "a", "image": ""}', 422, "unprocessable_edit", "the image cannot be read"),
    ],
)
def test_json_that_cannot_be(client: httpx.Client, body: bytes, status: int, code: str | None, sentence: str) -> None:
    headers = {"content-type": "application/json"}
    refused(client.post("/v1/images/edits", content=body, headers=headers), status, code, sentence)


def test_files_that_are_no_images(client: httpx.Client, png: bytes, scene: Image.Image) -> None:
    refused(edit(client, b"no image", prompt=RED), 422, "unprocessable_edit", "the image cannot be read")
    refused(edit(client, png[: len(png) // 2], prompt=RED), 422, "unprocessable_edit", "the image cannot be read .*truncated")
    # A format whose decoder would start another program.
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\nshowpage\n"
    refused(edit(client, eps, prompt=RED), 422, "unprocessable_edit", "the image cannot be read")
    for size in ((5000, 5000), (60_000, 60_000)):
        refused(edit(client, bomb(*size), prompt=RED), 413, "image_too_large", "more than the 16 megapixels allowed")
    refused(edit(client, as_file(scene.resize((300, 10))), prompt=RED), 422, "unprocessable_edit", "crop it")


def test_forms_that_cannot_be_read(client: httpx.Client, png: bytes) -> None:
    def post(content: bytes, content_type: str) -> httpx.Response:
        return client.post("/v1/images/edits", content=content, headers={"content-type": content_type})

    refused(post(b"x", "multipart/form-data"), 400, None, "boundary")
    refused(post(b"x", "multipart/form-data; boundary=b"), 400, None, "multipart")
    nameless = b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--\r\n"
    refused(post(nameless, "multipart/form-data; boundary=b"), 400, None, "name")
    refused(post(b"prompt=a", "application/x-www-form-urlencoded"), 415, "unsupported_media_type", "application/json or")
    two = [("image[]", png), ("image[]", png)]
    refused(client.post("/v1/images/edits", files=two, data={"prompt": RED}), 400, "one_image", "2 images were sent")
    latin = form_body([(b"image", b'; filename="a.png"', png), (b"prompt", b"", "make the café red".encode("latin-1"))])
    message = r"^prompt is not UTF-8 \(.* at byte 12\); encode the form's text as UTF-8"
    refused(client.post("/v1/images/edits", content=latin, headers=FORM), 400, "invalid_utf8", message)
    mask = {"image": png, "mask": png}
    refused(client.post("/v1/images/edits", files=mask, data={"prompt": RED}), 400, "unknown_file", "mask is a file")


def test_head_answers_as_get_without_a_body(client: httpx.Client) -> None:
    for path in ("/health", "/v2/health/live", "/v2/health/ready", "/metrics", "/v1/models", "/v1/models/shapes", "/", "/docs"):
        got, head = client.get(path), client.head(path)
        assert (head.status_code, head.content) == (200, b""), path
        assert head.headers["content-type"] == got.headers["content-type"]
        if path != "/metrics":  # which counts these requests
            assert head.headers["content-length"] == got.headers["content-length"]
    assert client.head("/v1/models/gpt-image-1").status_code == 404
    assert client.head("/v1/images/edits").status_code == 405


def test_unknown_paths_and_methods(client: httpx.Client) -> None:
    refused(client.get("/v1/nothing"), 404, None, "Not Found")
    refused(client.get("/v1/models/gpt-image-1"), 404, "model_not_found", "'gpt-image-1' is not served here")
    refused(client.get("/v1/images/edits"), 405, None, "Method Not Allowed")


def test_bodies_over_the_limit_or_too_slow(service: EditService, png: bytes) -> None:
    limits = Limits(body_bytes=100_000, body_seconds=0.5)
    with (
        listening(create_app(service, model="shapes", limits=limits), service) as (address, _),
        httpx.Client(base_url=address, timeout=30) as client,
    ):
        assert edit(client, png, prompt=RED).status_code == 200
        for body in (bytes(10**6), (bytes(1000) for _ in range(1000))):  # with a length, and in chunks without one
            answer = client.post("/v1/images/edits", content=body, headers={"content-type": "application/json"})
            refused(answer, 413, "body_too_large", r"larger than the limit of 0\.09\d+ MiB")
        refused(edit(client, bytes(10**6), prompt=RED), 413, "body_too_large", "larger than the limit")

        def slow() -> Iterator[bytes]:
            yield b"{"
            time.sleep(1)
            yield b"}"

        answer = client.post("/v1/images/edits", content=slow(), headers={"content-type": "application/json"})
        refused(answer, 408, "body_timeout", r"did not arrive within 0\.5 seconds")
        assert edit(client, png, prompt=RED).status_code == 200


def test_an_edit_that_is_not_done_in_time(service: EditService, png: bytes) -> None:
    app = create_app(service, model="shapes", limits=Limits(request_seconds=0.05))
    with listening(app, service) as (address, _), httpx.Client(base_url=address, timeout=30) as client:
        refused(edit(client, png, prompt=RED, num_inference_steps=100), 504, "deadline_exceeded", r"within 0\.05 seconds")


def raw(url: str, data: bytes) -> socket.socket:
    """A connection on which this was sent."""
    connection = socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])), timeout=20)
    connection.sendall(data)
    return connection


def post_head(body: bytes) -> bytes:
    """The headers of an edit with this body."""
    sent = {"Host": "127.0.0.1", "Content-Type": "application/json", "Content-Length": len(body)}
    lines = [f"{name}: {value}\r\n" for name, value in sent.items()]
    return f"POST /v1/images/edits HTTP/1.1\r\n{''.join(lines)}\r\n".encode()


def test_headers_that_are_too_large_or_no_http(client: httpx.Client, url: str) -> None:
    for data, status in ((b"GET / HTTP/1.1\r\nX: " + b"a" * 2 * HEADER_BYTES, b"431"), (b"\x16\x03\x01\r\n\r\n", b"400")):
        with raw(url, data) as connection:
            answer = connection.recv(10_000)
            while chunk := connection.recv(10_000):
                answer += chunk
        assert answer.startswith(b"HTTP/1.1 " + status)
        assert json.loads(answer.split(b"\r\n\r\n", 1)[1])["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("stream", [False, True])
def test_an_edit_whose_client_went_away_is_cancelled(
    client: httpx.Client, url: str, service: EditService, png: bytes, stream: bool
) -> None:
    body = json.dumps({"image": data_url(png), "prompt": RED, "num_inference_steps": 100, "n": 10, "stream": stream}).encode()
    before = service.stats()
    with raw(url, post_head(body) + body):
        assert waited_for(lambda: service.stats().running)
    assert waited_for(lambda: service.stats().outcomes.get("cancelled", 0) == before.outcomes.get("cancelled", 0) + 1)
    assert waited_for(lambda: not service.stats().running)


def test_a_client_that_goes_away_in_its_body(client: httpx.Client, url: str) -> None:
    raw(url, post_head(bytes(100)) + b"{").close()


def test_only_the_right_key_opens(service: EditService, png: bytes) -> None:
    with (
        listening(create_app(service, model="shapes", api_key="s3cret"), service) as (address, _),
        httpx.Client(base_url=address, timeout=30) as client,
    ):
        for key in (None, "Bearer wrong", b"Bearer \xff\xfe", "s3cret", "Basic s3cret"):
            headers: dict[str, Any] = {} if key is None else {"Authorization": key}
            for answer in (client.get("/v1/models", headers=headers), client.post("/v1/images/edits", headers=headers)):
                refused(answer, 401, "invalid_api_key", "Authorization: Bearer")
                assert answer.headers["www-authenticate"] == "Bearer"
        for path in ("/health", "/v2/health/ready", "/metrics", "/"):
            assert client.get(path).status_code == 200
        client.headers["Authorization"] = "Bearer s3cret"
        assert edit(client, png, prompt=RED).status_code == 200
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{address}/v1", api_key="wrong").models.list()


def test_a_full_queue_says_when_to_come_back_and_a_signal_finishes_what_was_accepted(
    engines: dict[str, Path], scene: Image.Image, png: bytes
) -> None:
    service = EditService(SliderEditor.from_engine(engines["st"], run=RunSettings(threads=1)), max_queue=2, max_batch=1)
    answers: dict[str, httpx.Response] = {}

    def ask(name: str, **fields: Any) -> None:
        with httpx.Client(base_url=address, timeout=60) as client:
            answers[name] = edit(client, png, prompt=RED, **fields)

    with listening(create_app(service, model="shapes"), service) as (address, server):
        accepted = threading.Thread(target=ask, args=("accepted",), kwargs={"num_inference_steps": 60})
        accepted.start()
        assert waited_for(lambda: service.stats().running == 1)
        waiting = service.submit(EditRequest(scene, (Slider(RED),), ((1.0,), (0.5,)), EditSettings(steps=100)))
        ask("too many")
        refused(answers["too many"], 429, "queue_full", "no room for 1 more: 2 of at most 2 images wait")
        assert int(answers["too many"].headers["retry-after"]) >= 1
        waiting.cancel()

        # One that has yet to send its image, and one that waits for its edit.
        body = json.dumps({"image": data_url(png), "prompt": RED}).encode()
        with raw(address, post_head(body) + body[:100]) as late:
            assert waited_for(lambda: len(server.server_state.tasks) == 2)
            server.stop()
            assert waited_for(lambda: service.closed)
            late.sendall(body[100:])
            assert late.recv(10_000).startswith(b"HTTP/1.1 503 ")
        accepted.join(30)
    assert answers["accepted"].status_code == 200
    with pytest.raises(OSError, match="refused"):
        raw(address, b"")
    assert service.stats().outcomes == {"completed": 1, "refused": 2, "cancelled": 1}


def test_a_closed_service_answers_503(engines: dict[str, Path], png: bytes) -> None:
    service = EditService(SliderEditor.from_engine(engines["st"], run=RunSettings(threads=1)))
    with listening(create_app(service, model="shapes"), service) as (address, _), httpx.Client(base_url=address) as client:
        service.close()
        refused(edit(client, png, prompt=RED), 503, "closed", "accepts no requests")
        assert client.get("/health").status_code == client.get("/v2/health/ready").status_code == 503
        assert client.get("/v2/health/live").status_code == 200


# Who may ask.


NAMES = ["localhost:8000", "LocalHost.", "app.localhost", "127.0.0.1:1", "[::1]:8000", "[2001:db8::1]", "10.1.2.3", ""]


@pytest.mark.parametrize("host", NAMES)
def test_local_names_and_addresses_are_answered(client: httpx.Client, host: str) -> None:
    assert client.get("/v1/models", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example", "[::1", "::1", "a@localhost"]
)
@pytest.mark.parametrize("path", ["/", "/v1/models", "/metrics"])
def test_a_name_that_was_made_to_resolve_here_is_refused(client: httpx.Client, host: str, path: str) -> None:
    sentence = "is not a known name of this server; use its IP address, or start it with --allowed-host"
    refused(client.get(path, headers={"host": host}), 403, "host_not_allowed", sentence)


def test_a_health_check_without_host_is_answered(client: httpx.Client, url: str) -> None:
    with raw(url, b"GET /health HTTP/1.0\r\n\r\n") as connection:
        assert connection.recv(10_000).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "http://localhost:3000", "sec-fetch-site": "same-site", "sec-fetch-mode": "cors"},
        {"origin": "https://evil.example", "sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"},
        {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"},
    ],
)
def test_pages_of_other_sites_are_refused(
    client: httpx.Client, service: EditService, png: bytes, headers: dict[str, str]
) -> None:
    before = service.stats().outcomes
    form: dict[str, Any] = {"files": {"image": png}, "data": {"prompt": RED, "num_inference_steps": 1}, "headers": headers}
    refused(client.post("/v1/images/edits", **form), 403, "origin_not_allowed", "start it with --allow-origin to allow them")
    assert service.stats().outcomes == before
    preflight = client.options("/v1/images/edits", headers=headers | {"access-control-request-method": "POST"})
    refused(preflight, 403, "origin_not_allowed", "may not use this server")
    assert not [name for name in preflight.headers if name.startswith("access-control")]


def test_the_servers_own_pages_and_links_to_them_are_answered(client: httpx.Client, url: str, png: bytes) -> None:
    for headers in (
        {"origin": url},
        {"origin": url.upper(), "sec-fetch-site": "same-origin", "sec-fetch-mode": "cors"},
        # Through a proxy that puts its own name into Host.
        {"origin": "https://images.example.com", "sec-fetch-site": "same-origin"},
        {"sec-fetch-site": "none"},
    ):
        form: dict[str, Any] = {"files": {"image": png}, "data": {"prompt": RED, "num_inference_steps": 1}, "headers": headers}
        assert client.post("/v1/images/edits", **form).status_code == 200, headers
    link = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert client.get("/", headers=link).status_code == 200


def test_what_is_allowed_is_answered_with_what_browsers_ask_for(service: EditService, png: bytes) -> None:
    hosts, origins = ("GPU-Box.", "*.example.com"), ("HTTPS://App.Example.org:443", "null")
    app = create_app(service, model="shapes", api_key="s3cret", allowed_origins=origins)
    with listening(app, service) as (address, _), httpx.Client(base_url=address, timeout=30) as client:
        # The key does what the names would.
        assert client.get("/health", headers={"host": "anything.example"}).status_code == 200
        for origin in ("https://app.example.org", "null"):
            asked = {"origin": origin, "sec-fetch-site": "cross-site", "access-control-request-method": "POST"}
            asked |= {"access-control-request-headers": "authorization, x-stainless-lang"}
            preflight = client.options("/v1/images/edits", headers=asked | {"access-control-request-private-network": "true"})
            assert preflight.status_code == 200
            assert preflight.headers["access-control-allow-origin"] == origin
            assert "POST" in preflight.headers["access-control-allow-methods"]
            assert preflight.headers["access-control-allow-headers"] == "authorization, x-stainless-lang"
            assert preflight.headers["access-control-allow-private-network"] == "true"
            for key, status in (("s3cret", 200), ("wrong", 401)):  # a page may read why it was refused
                headers = {"origin": origin, "sec-fetch-site": "cross-site", "authorization": f"Bearer {key}"}
                answer = client.post("/v1/images/edits", files={"image": png}, data={"prompt": RED}, headers=headers)
                assert answer.status_code == status
                assert answer.headers["access-control-allow-origin"] == origin
                assert "Origin" in answer.headers["vary"]
        headers = {"origin": "https://evil.example", "authorization": "Bearer s3cret"}
        refused(
            client.get("/v1/models", headers=headers),
            403,
            "origin_not_allowed",
            "'https://evil.example' may not use this server",
        )
    app = create_app(service, model="shapes", allowed_hosts=hosts, allowed_origins=["*"])
    with listening(app, service) as (address, _), httpx.Client(base_url=address, timeout=30) as client:
        for host, status in (("gpu-box:80", 200), ("a.example.com", 200), ("example.com", 403)):
            assert client.get("/v1/models", headers={"host": host}).status_code == status
        answer = client.get("/v1/models", headers={"origin": "https://any.example"})
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, "*")


# Its own description.


ROUTES = [
    ("POST", "/v1/images/edits"),
    ("POST", "/v1/sliders/spans"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{name}"),
    ("GET", "/health"),
    ("GET", "/v2/health/live"),
    ("GET", "/v2/health/ready"),
    ("GET", "/metrics"),
]


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_answers_are_as_described(client: httpx.Client, url: str, method: str, path: str) -> None:
    operation = schemathesis.openapi.from_url(f"{url}/openapi.json")[path][method]
    # That a file is an image and a prompt holds an instruction is beyond a schema.
    beyond: list[Any] = [CHECKS.get_one("positive_data_acceptance")]

    @settings(max_examples=12, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(operation.as_strategy() | operation.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE))
    def check(case: schemathesis.Case[Any]) -> None:
        case.call_and_validate(excluded_checks=beyond)

    check()


def test_every_route_is_checked(client: httpx.Client) -> None:
    described = client.get("/openapi.json").json()["paths"]
    assert {(method.upper(), path) for path, methods in described.items() for method in methods} == set(ROUTES)


# The command.


def test_serve_refuses_an_address_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "--port", str(port)]) == 2
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use; choose another --port" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "70000"], "--port is 70000; give 0 to 65535"),
        (["--host", "no.such.host.invalid"], "cannot listen on no.such.host.invalid:8000: "),
        (["--api-key", "two words"], "choose another one"),
        (["--api-key-file", "nowhere"], "cannot be read"),
        (["--port", "0", "--allowed-host", "http://gpu-box"], "--allowed-host 'http://gpu-box' is not a host name"),
        (["--port", "0", "--allowed-host", "gpu-box:8000"], "give one such as gpu-box.example.com, without a port"),
        (["--port", "0", "--allow-origin", "https://example.com/app"], "is not an origin; give scheme://host[:port]"),
        (["--port", "0", "--allow-origin", "example.com"], "--allow-origin 'example.com' is not an origin"),
        (["--port", "0", "--allow-origin", "http://[::1"], "is not an origin"),
        (["--preview-steps", "0"], "--preview-steps is 0; give at least 1"),
        (["--max-body-mib", "0"], "--max-body-mib is 0; give a number above 0"),
        (["nowhere", "--port", "0"], "nowhere"),
    ],
)
def test_serve_refuses_what_it_cannot_serve(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert main(["serve", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_serve_names_the_extra_that_is_missing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slideredit_rt.serving.run.find_spec", lambda name: None if name == "uvicorn" else name)
    assert main(["serve"]) == 2
    assert "serving needs uvicorn; install them with pip install 'slideredit-rt[serve]'" in capsys.readouterr().err


def test_serve_says_where_it_is_and_stops_at_a_signal(engines: dict[str, Path], tmp_path: Path, png: bytes) -> None:
    (tmp_path / "key").write_text("s3cret\n")
    command: list[str | Path] = [
        sys.executable,
        "-m",
        "slideredit_rt.cli",
        "serve",
        engines["st"],
        "--port",
        "0",
        "--json",
        "--threads",
        "1",
    ]
    command += ["--api-key-file", tmp_path / "key", "--allow-origin", "https://example.com"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            said = json.loads(process.stdout.readline())
            with openai.OpenAI(base_url=f"{said['url']}/v1", api_key="s3cret") as ai:
                extra = {"num_inference_steps": 1}
                assert ai.images.edit(image=png, prompt=RED, model=said["model"], extra_body=extra).data
            for origin, status in (("https://example.com", 200), ("https://example.org", 403)):
                assert httpx.get(f"{said['url']}/health", headers={"origin": origin}).status_code == status
            process.send_signal(signal.SIGTERM)
            assert process.communicate(timeout=60) == ("", "")
            assert process.returncode == 0
        finally:
            process.kill()
