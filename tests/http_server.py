"""What tests of the HTTP API share: a server of a thread, requests, and the images that go there and come back."""

from __future__ import annotations

import base64
import io
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import httpx
from fastapi import FastAPI
from PIL import Image

from slideredit_rt.editor import SliderEditor
from slideredit_rt.serving.adapter_folder import AdapterFolder
from slideredit_rt.serving.app import create_app
from slideredit_rt.serving.cache import Caching
from slideredit_rt.serving.metrics import Metrics
from slideredit_rt.serving.server import Server
from slideredit_rt.serving.service import EditService
from slideredit_rt.settings import RunSettings

T = TypeVar("T")

RED, DARK = "make the circle red", "make the background dark"
BOTH = f"{RED} and {DARK}"
SLIDERS = [{"instruction": RED, "strength": 0.5}, {"instruction": DARK, "strength": 1.25}]
STEPS = 3
FORM = {"content-type": "multipart/form-data; boundary=b"}


@contextmanager
def listening(app: FastAPI, service: EditService, **options: Any) -> Iterator[tuple[str, Server]]:
    """A server of its own thread on a free port of this machine; yields its address and the server."""
    started = threading.Event()
    server = Server(app, service, on_ready=started.set, **options)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        assert started.wait(30)
        try:
            yield address, server
        finally:
            server.should_exit = True
            thread.join(30)
    assert not thread.is_alive()


@contextmanager
def serving(engine: Path, adapters: Path | None = None, *, latent_cache: bool = True, **options: Any) -> Iterator[str]:
    """The address of a server of an engine and a folder of adapters; other options are those of `create_app`."""
    editor = SliderEditor.from_engine(engine, run=RunSettings(threads=1))
    choices = None if adapters is None else AdapterFolder(adapters)
    with (
        EditService(editor, observer=Metrics(), caching=Caching(latents=latent_cache), adapters=choices) as service,
        listening(create_app(service, **{"model": "shapes-kontext"} | options), service) as (address, _),
    ):
        yield address


def waited_for(condition: Callable[[], T], seconds: float = 20, every: float = 0.01) -> T:
    """What a condition gives when it is met, or after so long."""
    end = time.monotonic() + seconds
    while not (given := condition()) and time.monotonic() < end:
        time.sleep(every)
    return given


def as_file(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """The content of an image file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def image_of(item: dict[str, Any]) -> Image.Image:
    """The image of an entry of `data`, or of an event."""
    return Image.open(io.BytesIO(base64.b64decode(item["b64_json"])))


def data_url(data: bytes) -> str:
    """The content of a PNG file as a data URL."""
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def edit(client: httpx.Client, png: bytes, **fields: Any) -> httpx.Response:
    """An edit as a form."""
    form = {"num_inference_steps": STEPS, **fields}
    return client.post("/v1/images/edits", files={"image": ("scene.png", png, "image/png")}, data=form)


def form_body(parts: list[tuple[bytes, bytes, bytes]]) -> bytes:
    """A form of parts, for the headers `FORM`: name, what follows it in the headers, content."""
    head = b'--b\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n'
    return b"".join(head % part for part in parts) + b"--b--\r\n"


def raw(url: str, data: bytes) -> socket.socket:
    """A connection on which this was sent."""
    connection = socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])), timeout=20)
    connection.sendall(data)
    return connection


def refused(answer: httpx.Response, status: int, code: str | None, sentence: str) -> None:
    """Check that a request was refused, with this code and in these words (a regular expression)."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    assert re.search(sentence, error["message"]), error["message"]
