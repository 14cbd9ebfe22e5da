"""Request bodies: read within limits, as JSON or as a form, and validated against a model of the fields."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request
from starlette.types import Message, Receive

from slideredit_rt.serving.faults import Fault
from slideredit_rt.serving.schemas import MAX_SOURCES, TAGS

_MAX_FIELDS = 512
_EXTENDED_FILENAME = re.compile(rb";\s*filename\*", re.IGNORECASE)
_APART = re.compile(r"(sliders(?=\[\])|sweep)(?:\[\])?\[(\w+)\]")

Fields = TypeVar("Fields", bound=BaseModel)


@dataclass(frozen=True)
class Limits:
    """Limits of one request.

    Attributes:
        body_bytes: Largest body, counted while it is read.
        body_seconds: Longest time for the body to arrive.
        request_seconds: Longest time from the end of the body to the last image.
        pixels: Largest size of an image, read from its header.
        aspect: Largest ratio of an image's longer to its shorter side.
    """

    body_bytes: int = 32 * 2**20
    body_seconds: float = 60.0
    request_seconds: float = 300.0
    pixels: int = 16_000_000
    aspect: float = 4.0


def _too_large(limits: Limits) -> Fault:
    message = f"the body is larger than the limit of {limits.body_bytes / 2**20:g} MiB; send a smaller image"
    return Fault(413, message, code="body_too_large")


def _counted(receive: Receive, limits: Limits) -> Receive:
    """Wrap `receive` so that it raises once the body exceeds the limit."""
    taken = 0

    async def counted() -> Message:
        nonlocal taken
        message = await receive()
        taken += len(message.get("body", b""))
        if taken > limits.body_bytes:
            raise _too_large(limits)
        return message

    return counted


@asynccontextmanager
async def _reading(request: Request, limits: Limits) -> AsyncIterator[Request]:
    """Yield the request with its body bounded in size and time."""
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > limits.body_bytes:
        raise _too_large(limits)
    try:
        async with asyncio.timeout(limits.body_seconds):
            yield Request(request.scope, _counted(request.receive, limits))
    except TimeoutError:
        message = (
            f"the body did not arrive within {limits.body_seconds:g} seconds; send a smaller image, or over a faster connection"
        )
        raise Fault(408, message, code="body_timeout", headers={"Connection": "close"}) from None


def _sentence(error: ValidationError) -> Fault:
    """Describe the first error, as in `sliders[0].strength: input should be a finite number (got nan)`."""
    first = error.errors(include_url=False, include_context=False)[0]
    loc = [part for part in first["loc"] if part not in TAGS]
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).lstrip(".")[:80]
    message: str = first["msg"][:1].lower() + first["msg"][1:]
    shown = repr(first["input"])
    got = f" (got {shown})" if first["type"] not in ("missing", "json_invalid") and len(shown) <= 80 else ""
    place = place or "the body"
    return Fault(400, f"{place}: {message}{got}", param=place, code=first["type"])


def _form_fields(texts: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Return a form's fields in the structure that they have in JSON.

    `sliders` and `sweep` are JSON, or split up as OpenAI's clients write nested values: `sweep[from]`, and for a list
    `sliders[][instruction]` of every slider, then `sliders[][strength]` of those that have one. Unless all sliders have the
    same fields, that is ambiguous.

    Raises:
        Fault: A field is duplicate, ambiguous or not JSON.
    """
    fields: dict[str, Any] = {}
    apart: dict[str, dict[str, Sequence[str]]] = {}
    for name, values in texts.items():
        if found := _APART.fullmatch(name):
            apart.setdefault(found[1], {})[found[2]] = values
        elif len(values) > 1:
            raise Fault(400, f"{name[:80]} was given {len(values)} times; give it once", param=name[:80], code="duplicate")
        else:
            fields[name] = values[0]
    for root, parts in apart.items():
        if len({len(values) for values in parts.values()}) > 1:
            counts = ", ".join(f"{len(values)} × {name[:80]}" for name, values in parts.items())
            raise Fault(
                400,
                f"{root} is ambiguous: the form has {counts}; give every entry the same fields, or send {root} as JSON in one "
                "field",
                param=root,
                code="ambiguous_fields",
            )
        rows = [dict(zip(parts, row, strict=True)) for row in zip(*parts.values(), strict=True)]
        fields[root] = rows if root == "sliders" else rows[0]
    for root in ("sliders", "sweep"):
        if isinstance(text := fields.get(root), str):
            try:
                fields[root] = from_json(text)
            except ValueError as error:
                raise Fault(400, f"{root} is not valid JSON ({error})", param=root, code="json_invalid") from None
    return fields


async def read_json(request: Request, model: type[Fields], limits: Limits) -> Fields:
    """Read a JSON body.

    Raises:
        Fault: The body is over a limit, not JSON, or does not fit the model.
        starlette.requests.ClientDisconnect: The client closed the connection.
    """
    _media_type(request, "application/json")
    async with _reading(request, limits) as bounded:
        body = await bounded.body()
    try:
        return model.model_validate_json(body, strict=True)
    except ValidationError as error:
        raise _sentence(error) from None


class _FormParser(MultiPartParser):
    """Starlette's parser with two changes: text must be UTF-8, and image parts need no `filename`.

    Starlette decodes other text as Latin-1, and treats every part without a plain `filename` as text.
    """

    def on_headers_finished(self) -> None:
        part = self._current_part
        disposition = part.content_disposition or b""
        if b"filename" not in parse_options_header(disposition)[1]:
            media_type = dict(part.item_headers).get(b"content-type", b"").lower()
            if _EXTENDED_FILENAME.search(disposition) or media_type.startswith(b"image/"):
                part.content_disposition = disposition + b'; filename=""'
        super().on_headers_finished()

    def on_part_end(self) -> None:
        part = self._current_part
        if part.file is not None:
            super().on_part_end()
            return
        try:
            self.items.append((part.field_name, part.data.decode()))
        except UnicodeDecodeError as error:
            name = part.field_name[:80]
            message = f"{name} is not UTF-8 ({error.reason} at byte {error.start}); encode the form's text as UTF-8"
            raise Fault(400, message, param=name, code="invalid_utf8") from None


@asynccontextmanager
async def _form(request: Request, limits: Limits) -> AsyncIterator[FormData]:
    """Yield the parts of a multipart body; close their files afterwards."""
    sizes = {"max_files": MAX_SOURCES, "max_fields": _MAX_FIELDS, "max_part_size": limits.body_bytes}
    try:
        async with aclosing(request.stream()) as stream:
            form = await _FormParser(request.headers, stream, **sizes).parse()
    except MultiPartException as error:
        raise Fault(400, f"the form cannot be read: {error.message}") from None
    try:
        yield form
    finally:
        await form.close()


async def read_edit(request: Request, model: type[Fields], limits: Limits) -> tuple[Fields, list[bytes]]:
    """Read a JSON or multipart body; return its fields, and its files named `image` or `image[]`.

    Raises:
        Fault, starlette.requests.ClientDisconnect: See `read_json`.
    """
    if _media_type(request, "application/json", "multipart/form-data") == "application/json":
        return await read_json(request, model, limits), []
    files: list[bytes] = []
    texts: dict[str, list[str]] = {}
    async with _reading(request, limits) as bounded, _form(bounded, limits) as form:
        for name, value in form.multi_items():
            if not isinstance(value, UploadFile):
                texts.setdefault(name, []).append(value)
            elif name in ("image", "image[]"):
                files.append(await value.read())
            else:
                raise Fault(400, f"{name} is a file, but only image can be one; remove it", param=name, code="unknown_file")
    try:
        return model.model_validate(_form_fields(texts)), files
    except ValidationError as error:
        raise _sentence(error) from None


def _media_type(request: Request, *known: str) -> str:
    media_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if media_type not in known:
        raise Fault(
            415, f"the content type {media_type!r} is not supported; send {' or '.join(known)}", code="unsupported_media_type"
        )
    return media_type
