"""Responses to a submitted edit: one JSON object, or a stream of server-sent events."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from concurrent.futures import Future
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any

from PIL import Image
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from slideredit_rt.errors import SliderEditError
from slideredit_rt.images import draw_grid
from slideredit_rt.serving.faults import Fault, fault_of
from slideredit_rt.serving.image_files import OutputFormat, encode_image_file
from slideredit_rt.serving.requests import EditRequest, Partial
from slideredit_rt.serving.schemas import EditedImage, EditResponse, InputTokens, Usage
from slideredit_rt.serving.service import EditService
from slideredit_rt.strength import Strength, strength_json

Work = Callable[[Callable[[], str]], Awaitable[str]]
"""Runner of a function on another thread."""


class Running:
    """A submitted edit, followed until it is done or its client disconnects.

    Args:
        service: The service to submit to.
        request: The edit.
        receive: ASGI channel of the HTTP request. Its body has been read, so the next message is the disconnect.

    Raises:
        SliderEditError: The service rejects the request.
    """

    def __init__(self, service: EditService, request: EditRequest, receive: Receive) -> None:
        events: asyncio.Queue[Partial | Future[list[Image.Image]] | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        self._events = events

        def tell(event: Any) -> None:
            # The loop is closed if the server was stopped without draining; nothing waits for the event then.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(events.put_nowait, event)

        self._ticket = service.submit(request, on_partial=tell)
        self._ticket.future.add_done_callback(tell)
        self._watch = asyncio.create_task(self._watched(receive))

    async def _watched(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._events.put_nowait(None)

    async def next(self) -> Partial | list[Image.Image]:
        """Wait for the next partial image, or for all images.

        Raises:
            SliderEditError: The edit failed.
            ClientDisconnect: The client closed the connection.
        """
        event = await self._events.get()
        if event is None:
            raise ClientDisconnect
        return event.result() if isinstance(event, Future) else event

    async def images(self) -> list[Image.Image]:
        """Wait for all images; raises as `next` does."""
        while isinstance(event := await self.next(), Partial):
            pass
        return event

    def close(self) -> None:
        """Stop watching the connection and cancel the edit if it is not done, which frees its slot."""
        self._watch.cancel()
        self._ticket.cancel()


@dataclass(frozen=True)
class Form:
    """Format of the response to an edit.

    Attributes:
        output_format: Image format.
        compression: `output_compression` of the request, 0 to 100.
        seeds, strengths: Seed and slider strengths of each image.
        strip: The swept slider's instruction and index if the images are laid side by side in one, else None.
        text_tokens: Number of tokens in the prompt.
        pixels_per_row: Pixels that one image row of the backbone stands for.
        other_rows: Image rows of all source images except the one that the edit has the size of.
    """

    output_format: OutputFormat
    compression: int
    seeds: Sequence[int]
    strengths: Sequence[Sequence[Strength]]
    strip: tuple[str, int] | None
    text_tokens: int
    pixels_per_row: int
    other_rows: int = 0

    def usage(self, size: tuple[int, int], images: int) -> Usage:
        # One source image is encoded at the size of the edit.
        rows = size[0] * size[1] // self.pixels_per_row
        inputs = InputTokens(text_tokens=self.text_tokens, image_tokens=self.other_rows + rows)
        total = inputs.text_tokens + inputs.image_tokens
        return Usage(
            input_tokens=total,
            input_tokens_details=inputs,
            output_tokens=rows * images,
            total_tokens=total + rows * images,
        )

    def encode(self, image: Image.Image) -> str:
        return encode_image_file(image, self.output_format, self.compression)

    def response(self, images: Sequence[Image.Image]) -> EditResponse:
        """Return the response with all images."""
        usage = self.usage(images[0].size, len(images))
        if self.strip is not None:
            title, index = self.strip
            images = [draw_grid([images], [f"{setting[index]:g}" for setting in self.strengths], [""], title)]
            data = [EditedImage(b64_json=self.encode(images[0]), seed=self.seeds[0], strengths=None)]
        else:
            data = [
                EditedImage(b64_json=self.encode(image), seed=seed, strengths=list(map(strength_json, strengths)))
                for image, seed, strengths in zip(images, self.seeds, self.strengths, strict=True)
            ]
        return EditResponse(
            created=int(time.time()), data=data, output_format=self.output_format, size=_size(images[0]), usage=usage
        )


def _size(image: Image.Image) -> str:
    return f"{image.width}x{image.height}"


def _event(kind: str, data: dict[str, Any]) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **data})}\n\n".encode()


class EventStream(Response):
    """Server-sent events: partial images as they become ready, then one event per finished image, or one for an error."""

    media_type = "text/event-stream"

    def __init__(self, running: Running, first: Partial | list[Image.Image], form: Form, work: Work) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._running, self._first, self._form, self._work = running, first, form, work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async with aclosing(self._chunks()) as chunks:
                async for chunk in chunks:
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        except (ClientDisconnect, OSError):
            pass
        finally:
            self._running.close()

    async def _image(self, image: Image.Image) -> dict[str, Any]:
        return {
            "b64_json": await self._work(lambda: self._form.encode(image)),
            "created_at": int(time.time()),
            "size": _size(image),
            "output_format": self._form.output_format,
            "background": "opaque",
            "quality": "auto",
        }

    async def _chunks(self) -> AsyncGenerator[bytes, None]:
        event = self._first
        sent: Counter[int] = Counter()
        while isinstance(event, Partial):
            place = {"image_index": event.index, "partial_image_index": sent[event.index]}
            sent[event.index] += 1
            yield _event("image_edit.partial_image", {**await self._image(event.image), **place})
            try:
                event = await self._running.next()
            except SliderEditError as error:
                yield error_event(fault_of(error))
                return
        for index, image in enumerate(event):
            usage = self._form.usage(image.size, 1).model_dump()
            of = {
                "image_index": index,
                "seed": self._form.seeds[index],
                "strengths": [*map(strength_json, self._form.strengths[index])],
            }
            yield _event("image_edit.completed", {**await self._image(image), **of, "usage": usage})


def error_event(fault: Fault) -> bytes:
    """Return the event that ends a stream whose edit failed."""
    return _event("error", fault.body)
