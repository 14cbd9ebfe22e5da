"""The HTTP API: OpenAI's image edits with sliders, health, metrics, and the page."""

from __future__ import annotations

import copy
import hmac
import io
import math
import mimetypes
import threading
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from functools import lru_cache
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any, Literal, TypeVar

from anyio import CapacityLimiter, to_thread
from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBearer
from PIL import Image
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from slideredit_rt.assets import resolve_base
from slideredit_rt.editor import SliderEditor
from slideredit_rt.errors import SliderEditError
from slideredit_rt.serving.answers import EventStream, Form, Running
from slideredit_rt.serving.body import Limits, read_edit, read_json
from slideredit_rt.serving.faults import Fault, fault_of
from slideredit_rt.serving.metrics import Metrics
from slideredit_rt.serving.origins import guards
from slideredit_rt.serving.pictures import decode_picture, picture_bytes
from slideredit_rt.serving.schemas import (
    MAX_SOURCES,
    EditFields,
    EditResponse,
    EngineInfo,
    ErrorResponse,
    Health,
    Live,
    Model,
    ModelList,
    Ready,
    SpansFields,
    SpansResponse,
    Token,
)
from slideredit_rt.serving.service import EditRequest, EditService
from slideredit_rt.serving.settings import ServeSettings
from slideredit_rt.settings import SEEDS
from slideredit_rt.sliders import PromptToken, Slider, compose_prompt, normalise

PREVIEW_STEPS = ServeSettings.preview_steps
"""Denoising steps of a preview that names none."""

_CLIENT_GONE = 499  # nobody reads it; the metrics count it
_DECODERS = 4
_PAGE_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    # Without any referrer, browsers also leave out Origin, which tells the page's own requests from a stranger's.
    "Referrer-Policy": "same-origin",
}
_MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_SWAGGER_UI = ("swagger-ui-bundle.js", "swagger-ui.css")
_PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4//8/AAX+Av4N70a4AAAAAElFTkSuQmCC"

T = TypeVar("T")
_Responses = dict[int | str, dict[str, Any]]


class Tokens:
    """Tokens of prompts; safe between threads. Its tokenizers are its own, so that none waits for the editor's encodings."""

    def __init__(self, editor: SliderEditor) -> None:
        self.editor = editor
        self.text_rows = editor.family.max_text_rows(editor.pipeline)
        self._pipeline = copy.copy(editor.pipeline)
        for name in ("tokenizer", "tokenizer_2", "processor"):
            if getattr(editor.pipeline, name, None) is not None:
                setattr(self._pipeline, name, copy.deepcopy(getattr(editor.pipeline, name)))
        self._lock = threading.Lock()

    def of(self, prompt: str, images: Sequence[Image.Image] = ()) -> list[PromptToken]:
        with self._lock:
            return self.editor.family.tokenize(self._pipeline, prompt, images)


class Api:
    """What the routes do.

    Args:
        service: runs the edits.
        model: its name to clients.
        limits: of one request.
        preview_steps: of a preview that names none.
    """

    def __init__(self, service: EditService, model: str, limits: Limits, preview_steps: int) -> None:
        self.service = service
        self.editor = service.editor
        self.limits = limits
        self.preview_steps = min(preview_steps, self.editor.family.num_inference_steps)
        self.max_images = MAX_SOURCES if self.editor.family.takes_several_pictures(self.editor.pipeline) else 1
        self.tokens = Tokens(self.editor)
        self._workers = CapacityLimiter(_DECODERS)
        self.model = Model(id=model, created=int(time.time()), engine=self._engine())

    def _engine(self) -> EngineInfo:
        editor = self.editor
        manifest = getattr(editor.engine, "manifest", None)
        return EngineInfo(
            kind=editor.kind,
            family=editor.family.name,
            backend="torch" if manifest is None else manifest.backend,
            adapters=list(editor.members),
            max_sliders=editor.max_sliders,
            num_inference_steps=editor.family.num_inference_steps,
            preview_steps=self.preview_steps,
            max_images=self.max_images,
            side=editor.family.side(editor.pipeline),
            embedded=Path(editor.pipeline.name_or_path) == resolve_base("shapes-kontext"),
        )

    async def work(self, function: Callable[[], T]) -> T:
        """Run a function on one of a few threads, so that no more pictures are unpacked at once."""
        return await to_thread.run_sync(function, limiter=self._workers)

    async def edit(self, request: Request) -> Response:
        """The answer to an edit; raises `Fault`, `SliderEditError` and `ClientDisconnect`."""
        fields, files = await read_edit(request, EditFields, self.limits)
        edit, form = await self.work(lambda: self._submission(fields, files))
        with ExitStack() as stack:
            running = Running(self.service, edit, request.receive)
            stack.callback(running.close)
            if not fields.stream:
                images = await running.pictures()
                body = await self.work(lambda: form.response(images).model_dump_json())
                return Response(body, media_type="application/json")
            # The first event decides about the status: what fails before it is an error like any other.
            first = await running.next()
            stack.pop_all()
            return EventStream(running, first, form, self.work)

    def _submission(self, fields: EditFields, files: Sequence[bytes]) -> tuple[EditRequest, Form]:
        """What to submit for these fields, and how to write its answer."""
        self.check_model(fields.model)
        sliders = self._sliders(fields)
        strengths = tuple(slider.strength for slider in sliders)
        n = fields.n or 1
        settings = fields.settings(self.preview_steps)
        every: tuple[tuple[float, ...], ...] = (strengths,) * n
        strip = None
        if (sweep := fields.sweep) is not None:
            if sweep.slider >= len(sliders):
                message = f"sweep.slider is {sweep.slider} and there are {len(sliders)} slider(s), counted from 0"
                raise Fault(400, message, param="sweep.slider", code="no_such_slider")
            if n > 1 or (sweep.strip and fields.stream):
                other = f"n is {n}" if n > 1 else "its strip is one picture that is made last"
                raise Fault(400, f"a sweep goes with neither: {other}; leave one out", param="sweep", code="sweep_alone")
            every = tuple((*strengths[: sweep.slider], s, *strengths[sweep.slider + 1 :]) for s in sweep.strengths)
            strip = (sliders[sweep.slider].instruction, sweep.slider) if sweep.strip else None
        if (last := fields.seed + n - 1) not in SEEDS:
            message = f"seed is {fields.seed} and n is {n}, so that the last seed would be {last}; give at most {SEEDS[-1]}"
            raise Fault(400, message, param="seed", code="seed_too_large")
        images = self._sources(fields, files)
        self._check_size(fields.size, images[-1])
        pixels_per_row = (2 * self.editor.pipeline.vae_scale_factor) ** 2
        request = EditRequest(
            image=images,
            sliders=sliders,
            strengths=every,
            settings=settings,
            consecutive_seeds=n > 1,
            interactive=fields.preview,
            timeout=self.limits.request_seconds,
            partial_every=math.ceil(self.editor.number_of_steps(settings) / (fields.partial_images + 1))
            if fields.stream and fields.partial_images
            else 0,
        )
        prompt = normalise(fields.prompt) if fields.prompt else compose_prompt([s.instruction for s in sliders])
        form = Form(
            output_format=fields.output_format or "png",
            compression=100 if fields.output_compression is None else fields.output_compression,
            seeds=request.seeds,
            strengths=every,
            strip=strip,
            text_tokens=sum(token.end > token.start for token in self.tokens.of(prompt, images)),
            pixels_per_row=pixels_per_row,
            other_rows=sum(math.prod(self._edited_at(image)) // pixels_per_row for image in images[:-1]),
        )
        return request, form

    def _sources(self, fields: EditFields, files: Sequence[bytes]) -> tuple[Image.Image, ...]:
        """The images to edit: those of the form, then those in the fields, as they stand there."""
        texts = [("image", text) for text in ([fields.image] if isinstance(fields.image, str) else fields.image or [])]
        texts += [("images", image.image_url) for image in fields.images or []]
        count = len(files) + len(texts)
        if not 1 <= count <= self.max_images:
            wanted = "one" if self.max_images == 1 else f"1 to {self.max_images}"
            code = "one_image" if self.max_images == 1 else "number_of_images"
            raise Fault(400, f"{count} pictures were sent; send {wanted} as image", param="image", code=code)
        sources = [*files, *(picture_bytes(text, param) for param, text in texts)]
        names = ["the picture"] if count == 1 else [f"image {number}" for number in range(1, count + 1)]
        return tuple(
            decode_picture(data, name, max_pixels=self.limits.pixels, max_aspect=self.limits.aspect)
            for data, name in zip(sources, names, strict=True)
        )

    def _sliders(self, fields: EditFields) -> tuple[Slider, ...]:
        """The sliders, or one for the whole prompt."""
        if fields.sliders is not None:
            return tuple(Slider(s.instruction, s.strength, s.adapter) for s in fields.sliders)
        if fields.prompt is None:
            raise Fault(400, "neither a prompt nor sliders were given; say what to edit", param="prompt", code="missing")
        return (Slider(fields.prompt, adapter=next(iter(self.editor.members), None)),)

    def _check_size(self, size: str | None, image: Image.Image) -> None:
        if size in (None, "auto"):
            return
        width, height = self._edited_at(image)
        if size != f"{width}x{height}":
            message = f"size is {size[:40]!r} and this engine edits this picture at {width}x{height}; give that, or auto"
            raise Fault(400, message, param="size", code="invalid_size")

    def _edited_at(self, image: Image.Image) -> tuple[int, int]:
        """Width and height that the editor gives to a source image."""
        height, width = self.editor.family.preprocess(self.editor.pipeline, image).shape[-2:]
        return width, height

    def check_model(self, name: str | None) -> None:
        if name is not None and name != self.model.id:
            message = f"the model {name[:80]!r} is not served here; this is {self.model.id!r}"
            raise Fault(404, message, param="model", code="model_not_found")

    def spans(self, fields: SpansFields) -> SpansResponse:
        """The tokens of a prompt and whose they are."""
        sliders = [Slider(s.instruction, adapter=s.adapter) for s in fields.sliders]
        prompt = normalise(fields.prompt) if fields.prompt else compose_prompt([s.instruction for s in sliders])
        tokens = self.tokens.of(prompt)
        found = self.editor.controls.find_spans(prompt, sliders, tokens, self.tokens.text_rows)
        owners = {row: i for i, rows in enumerate(found) for row in rows}
        listed = [Token(text=t.text, start=t.start, end=t.end, slider=owners.get(t.row)) for t in tokens]
        return SpansResponse(prompt=prompt, tokens=listed, text_rows=self.tokens.text_rows)


class _App(FastAPI):
    """FastAPI whose description holds the models of bodies that are read by hand."""

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            models: list[tuple[type[BaseModel], Literal["validation"]]] = [(m, "validation") for m in (EditFields, SpansFields)]
            _, definitions = models_json_schema(models, ref_template="#/components/schemas/{model}")
            schema = super().openapi()
            schema.setdefault("components", {}).setdefault("schemas", {}).update(definitions["$defs"])
        assert self.openapi_schema is not None
        return self.openapi_schema


class _Outermost:
    """Counts answers by route, answers HEAD as GET without a body, and forbids browsers to guess at media types."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        answered, bodiless = False, scope["method"] == "HEAD"
        if bodiless:
            scope = {**scope, "method": "GET"}

        async def counted(message: Message) -> None:
            nonlocal answered
            if bodiless and message["type"] == "http.response.body":
                message = {**message, "body": b""}
            if message["type"] == "http.response.start":
                answered = True
                self.metrics.answered(_route(scope), message["status"])
                message = {**message, "headers": [*message["headers"], (b"x-content-type-options", b"nosniff")]}
            await send(message)

        try:
            await self.app(scope, receive, counted)
        except Exception:
            if not answered:
                self.metrics.answered(_route(scope), 500)
            raise


class _Key(HTTPBearer):
    """Lets requests pass that bring the key."""

    def __init__(self, key: str) -> None:
        super().__init__(auto_error=False, scheme_name="key", description="the key that the server was started with")
        self._key = key.encode()

    async def __call__(self, request: HTTPConnection) -> None:
        credentials = await super().__call__(request)
        # Headers come decoded as Latin-1.
        given = b"" if credentials is None else credentials.credentials.encode("latin-1", "replace")
        if not hmac.compare_digest(given, self._key):
            message = "no API key was sent" if credentials is None else "the API key is wrong"
            headers = {"WWW-Authenticate": "Bearer"}
            raise Fault(401, f"{message}; send it as 'Authorization: Bearer …'", code="invalid_api_key", headers=headers)


def _route(scope: Scope) -> str:
    """The path as it is declared: what a client wrote there has no bound."""
    return getattr(scope.get("route"), "path", "unknown")


def _body(schema: dict[str, Any], example: dict[str, Any], form: dict[str, Any] | None = None) -> dict[str, Any]:
    content = {"application/json": {"schema": schema, "example": example}}
    return {"requestBody": {"required": True, "content": content | ({"multipart/form-data": form} if form else {})}}


def _edit_body(max_images: int) -> dict[str, Any]:
    """How the description of the API shows the body of an edit."""
    file = {"type": "string", "format": "binary"}
    files = file if max_images == 1 else {"type": "array", "items": file, "minItems": 1, "maxItems": max_images}
    sliders = [{"instruction": "make the circle red", "strength": 0.5}, {"instruction": "make the background dark"}]
    example = {"image": f"data:image/png;base64,{_PIXEL}", "sliders": sliders}
    fields = EditFields.model_json_schema(ref_template="#/components/schemas/{model}")["properties"]
    form = {
        "type": "object",
        "properties": {**fields, "image": files},
        "required": ["image"],
        "additionalProperties": False,
    }
    encoding = {name: {"contentType": "application/json"} for name in ("sliders", "sweep")}
    schema = {"$ref": "#/components/schemas/EditFields"}
    return _body(schema, example, {"schema": form, "encoding": encoding})


def _refusals(*statuses: int) -> _Responses:
    return {status: {"model": ErrorResponse} for status in statuses}


@lru_cache
def sample_picture() -> bytes:
    """A scene of the shapes world, as a PNG file: something to edit."""
    from slideredit_rt.shapes.world import held_out_examples, scene_image

    file = io.BytesIO()
    scene_image(held_out_examples(1, 1)[0]).save(file, "PNG")
    return file.getvalue()


def create_app(
    service: EditService,
    *,
    model: str,
    api_key: str | None = None,
    limits: Limits | None = None,
    preview_steps: int = PREVIEW_STEPS,
    allowed_hosts: Collection[str] = (),
    allowed_origins: Collection[str] = (),
) -> FastAPI:
    """The API over a service, as an ASGI application. It keeps nothing outside itself, and leaves the service open.

    Args:
        service: runs the edits. Where its observer is no `Metrics`, the metrics count requests only, not what the engine does.
        model: what clients call it.
        api_key: what every request below /v1 must bring as a bearer token; None asks for nothing.
        limits: of one request.
        preview_steps: denoising steps of a preview that names none.
        allowed_hosts: names in `Host` that are answered besides IP addresses and localhost; `*` for any. With a key, all are.
        allowed_origins: origins whose web pages may send requests; `*` for any.

    Raises:
        SliderEditError: a malformed host name or origin.
    """
    api = Api(service, model, Limits() if limits is None else limits, preview_steps)
    metrics = service.observer if isinstance(service.observer, Metrics) else Metrics()
    metrics.watch(service)
    app = _App(
        title="slideredit-rt",
        description="Image edits in OpenAI's shape, with a slider for each instruction.",
        version="1",
        docs_url=None,
        redoc_url=None,
        responses=_refusals(403),
        middleware=[
            Middleware(_Outermost, metrics=metrics),
            *guards(allowed_hosts if api_key is None else ("*",), allowed_origins),
        ],
    )
    _answer_faults(app)

    v1 = APIRouter(
        prefix="/v1",
        dependencies=[] if api_key is None else [Depends(_Key(api_key))],
        responses={} if api_key is None else _refusals(401),
    )

    edited: _Responses = {200: {"model": EditResponse, "content": {"text/event-stream": {"schema": {"type": "string"}}}}}

    @v1.post(
        "/images/edits",
        tags=["edits"],
        summary="Edit a picture",
        responses={**edited, **_refusals(400, 404, 408, 413, 415, 422, 429, 500, 503, 504)},
        openapi_extra=_edit_body(api.max_images),
    )
    async def edit(request: Request) -> Response:
        """One picture per strength of a sweep, or `n` pictures, as base64; or, with `stream`, server-sent events:
        `image_edit.partial_image`, then one `image_edit.completed` per picture, or `error`.

        In a form, `sliders` and `sweep` are JSON. OpenAI's Python client sends them as
        `extra_body={"sliders": json.dumps([…])}`, or as a plain list whose sliders all have the same fields.
        """
        return await api.edit(request)

    @v1.post(
        "/sliders/spans",
        tags=["edits"],
        summary="Find sliders in a prompt",
        responses=_refusals(400, 408, 413, 415, 422),
        openapi_extra=_body(
            {"$ref": "#/components/schemas/SpansFields"},
            {"prompt": "make the circle red and make the background dark", "sliders": [{"instruction": "make the circle red"}]},
        ),
    )
    async def spans(request: Request) -> SpansResponse:
        """Every token of the prompt, its characters, and the slider that owns it."""
        fields = await read_json(request, SpansFields, api.limits)
        return await api.work(lambda: api.spans(fields))

    @v1.get("/models", tags=["models"], summary="List the model")
    async def models() -> ModelList:
        return ModelList(data=[api.model])

    @v1.get("/models/{name:path}", tags=["models"], summary="Describe the model", responses=_refusals(404, 422))
    async def one_model(name: str) -> Model:
        api.check_model(name)
        return api.model

    app.include_router(v1)

    @app.get("/health", tags=["health"], summary="Whether edits are taken", responses={503: {"model": Health}})
    async def health(response: Response) -> Health:
        response.status_code = 503 if service.closed else 200
        return Health(status="closed" if service.closed else "ok")

    @app.get("/v2/health/live", tags=["health"], summary="KServe's liveness")
    async def live() -> Live:
        return Live(live=True)

    @app.get("/v2/health/ready", tags=["health"], summary="KServe's readiness", responses={503: {"model": Ready}})
    async def ready(response: Response) -> Ready:
        response.status_code = 503 if service.closed else 200
        return Ready(ready=not service.closed)

    text: _Responses = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}

    @app.get("/metrics", tags=["health"], summary="Prometheus' metrics", response_class=Response, responses=text)
    async def exposition() -> Response:
        return Response(metrics.exposition(), media_type="text/plain; version=0.0.4")

    _serve_page(app)
    return app


def _answer_faults(app: FastAPI) -> None:
    """Every error in OpenAI's shape."""

    def answer(fault: Fault) -> Response:
        return JSONResponse(fault.body, fault.status, fault.headers)

    @app.exception_handler(Fault)
    async def refused(request: Request, error: Fault) -> Response:
        return answer(error)

    @app.exception_handler(SliderEditError)
    async def impossible(request: Request, error: SliderEditError) -> Response:
        return answer(fault_of(error))

    @app.exception_handler(HTTPException)
    async def not_here(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path[:200]!r}: {error.detail}"
        return answer(Fault(error.status_code, message, headers=error.headers))

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=_CLIENT_GONE)

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> Response:
        return answer(Fault(500, "the server failed; its log says how", code="internal_error"))


def _serve_page(app: FastAPI) -> None:
    """`GET /`, `/docs` with Swagger UI, and the files beside them."""

    def serve(path: str, content: bytes | Callable[[], bytes], media_type: str) -> None:
        async def get() -> Response:
            return Response(content if isinstance(content, bytes) else content(), media_type=media_type, headers=_PAGE_HEADERS)

        app.add_api_route(path, get, include_in_schema=False)

    swagger = package_files("fastapi_swagger.resources")
    files = [*package_files("slideredit_rt.serving").joinpath("page").iterdir(), *(swagger.joinpath(n) for n in _SWAGGER_UI)]
    for file in files:
        name, suffix = file.name, Path(file.name).suffix
        media_type = _MEDIA_TYPES.get(suffix) or mimetypes.guess_type(name)[0] or "application/octet-stream"
        path = name.removesuffix("index.html").removesuffix(".html")
        serve(f"/{path}", file.read_bytes(), media_type)
    serve("/sample.png", sample_picture, "image/png")
