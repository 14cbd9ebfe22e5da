"""What the HTTP API refuses, with a status and a sentence: bad input, limits, lost connections, a full or closed queue."""

import json
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from http_server import DARK, FORM, RED, SLIDERS, as_file, data_url, edit, form_body, listening, raw, refused, waited_for
from PIL import Image

from slideredit_rt import Slider, SliderEditor
from slideredit_rt.serving.app import create_app
from slideredit_rt.serving.body import Limits
from slideredit_rt.serving.requests import EditRequest
from slideredit_rt.serving.server import HEADER_BYTES
from slideredit_rt.serving.service import EditService
from slideredit_rt.settings import EditSettings, RunSettings


def bomb(width: int, height: int) -> bytes:
    """A small PNG file that says it is large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(10**6))) + chunk(b"IEND", b"")


# Bad input.


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
