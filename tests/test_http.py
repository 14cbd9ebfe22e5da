"""The HTTP API over a real engine: OpenAI's shape with sliders, streams, and what the server says of itself."""

import base64
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import numpy as np
import openai
import pytest
import schemathesis
from http_server import BOTH, DARK, FORM, RED, SLIDERS, STEPS, as_file, data_url, edit, form_body, image_of, listening, refused
from hypothesis import HealthCheck, given, settings
from numpy.typing import NDArray
from PIL import Image
from qwen_checkpoint import qwen_adapter, save_tiny_checkpoint
from qwen_checkpoint import random_image as qwen_image
from schemathesis.checks import CHECKS

from slideredit_rt import Slider, SliderEditor
from slideredit_rt.serving.app import PREVIEW_STEPS, create_app
from slideredit_rt.serving.body import Limits
from slideredit_rt.serving.service import EditService


@pytest.fixture
def ai(url: str) -> Iterator[openai.OpenAI]:
    """OpenAI's own client, which does not try again; Any to the tests, as its types lack the fields that sliders add."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        yield client


def pixels(image: Image.Image) -> NDArray[Any]:
    return np.asarray(image).astype(int)


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
