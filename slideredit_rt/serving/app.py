"""HTTP application: OpenAI's image edits API with sliders, health checks, metrics, and the web page."""

from __future__ import annotations

import hmac
from collections.abc import Collection
from typing import Any, Literal

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBearer
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from slideredit_rt.errors import SliderEditError
from slideredit_rt.samples import sample_of
from slideredit_rt.serving.api import Api
from slideredit_rt.serving.body import Limits, read_json
from slideredit_rt.serving.faults import Fault, fault_of
from slideredit_rt.serving.metrics import Metrics
from slideredit_rt.serving.origins import guards
from slideredit_rt.serving.schemas import (
    EditFields,
    EditResponse,
    ErrorResponse,
    Health,
    Live,
    Model,
    ModelList,
    Ready,
    SpansFields,
    SpansResponse,
)
from slideredit_rt.serving.service import EditService
from slideredit_rt.serving.settings import ServeSettings
from slideredit_rt.serving.static import serve_page

PREVIEW_STEPS = ServeSettings.preview_steps
"""Denoising steps of previews that do not set num_inference_steps."""

_CLIENT_GONE = 499  # for the metrics; no client is left to read it
_PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4//8/AAX+Av4N70a4AAAAAElFTkSuQmCC"

_Responses = dict[int | str, dict[str, Any]]


class _App(FastAPI):
    """FastAPI with the models of hand-read bodies in its OpenAPI description."""

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            models: list[tuple[type[BaseModel], Literal["validation"]]] = [(m, "validation") for m in (EditFields, SpansFields)]
            _, definitions = models_json_schema(models, ref_template="#/components/schemas/{model}")
            schema = super().openapi()
            schema.setdefault("components", {}).setdefault("schemas", {}).update(definitions["$defs"])
        assert self.openapi_schema is not None
        return self.openapi_schema


class _Outermost:
    """Outermost middleware: counts responses by route, answers HEAD as GET without a body, and sends `nosniff`."""

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
    """Dependency that rejects requests without the API key."""

    def __init__(self, key: str) -> None:
        super().__init__(auto_error=False, scheme_name="key", description="API key that the server was started with")
        self._key = key.encode()

    async def __call__(self, request: HTTPConnection) -> None:
        credentials = await super().__call__(request)
        # Starlette decodes headers as Latin-1.
        given = b"" if credentials is None else credentials.credentials.encode("latin-1", "replace")
        if not hmac.compare_digest(given, self._key):
            message = "no API key was sent" if credentials is None else "the API key is wrong"
            headers = {"WWW-Authenticate": "Bearer"}
            raise Fault(401, f"{message}; send it as 'Authorization: Bearer …'", code="invalid_api_key", headers=headers)


def _route(scope: Scope) -> str:
    """Return the declared path of the route; paths as sent would give the metrics unbounded labels."""
    return getattr(scope.get("route"), "path", "unknown")


def _body(schema: dict[str, Any], example: dict[str, Any], form: dict[str, Any] | None = None) -> dict[str, Any]:
    content = {"application/json": {"schema": schema, "example": example}}
    return {"requestBody": {"required": True, "content": content | ({"multipart/form-data": form} if form else {})}}


def _edit_body(max_images: int) -> dict[str, Any]:
    """Return the OpenAPI description of the body of an edit."""
    file = {"type": "string", "format": "binary"}
    files = file if max_images == 1 else {"type": "array", "items": file, "minItems": 1, "maxItems": max_images}
    sliders = [{"instruction": "make the hair red", "strength": 0.5}, {"instruction": "make the person smile"}]
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
    """Create the ASGI application for a service. It has no global state and does not close the service.

    Args:
        service: Runs the edits. Unless its observer is a `Metrics`, the metrics lack the engine's figures.
        model: Model name for clients.
        api_key: Bearer token required for every request below /v1; None requires none.
        limits: Limits of one request; None takes the defaults.
        preview_steps: Denoising steps of previews that do not set num_inference_steps.
        allowed_hosts: Values of `Host` to accept besides IP addresses and localhost; `*` for any. With a key, any is.
        allowed_origins: Origins whose web pages may send requests; `*` for any.

    Raises:
        SliderEditError: A host name or an origin is malformed.
    """
    api = Api(service, model, Limits() if limits is None else limits, preview_steps)
    metrics = service.observer if isinstance(service.observer, Metrics) else Metrics()
    metrics.watch(service)
    app = _App(
        title="slideredit-rt",
        description="OpenAI's image edits API, with a slider for each instruction.",
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

    app.include_router(_edit_routes(api, api_key))
    _add_health(app, service, metrics)
    serve_page(app, sample_of(service.editor.pipeline.name_or_path))
    return app


def _edit_routes(api: Api, api_key: str | None) -> APIRouter:
    """Return the routes below /v1."""
    v1 = APIRouter(
        prefix="/v1",
        dependencies=[] if api_key is None else [Depends(_Key(api_key))],
        responses={} if api_key is None else _refusals(401),
    )

    edited: _Responses = {200: {"model": EditResponse, "content": {"text/event-stream": {"schema": {"type": "string"}}}}}

    @v1.post(
        "/images/edits",
        tags=["edits"],
        summary="Edit an image",
        responses={**edited, **_refusals(400, 404, 408, 413, 415, 422, 429, 500, 503, 504)},
        openapi_extra=_edit_body(api.max_images),
    )
    async def edit(request: Request) -> Response:
        """Edit an image at given slider strengths.

        The response has `n` images, or one per strength of a sweep, as base64. With `stream`, it is a stream of server-sent
        events instead: `image_edit.partial_image`, then one `image_edit.completed` per image, or `error`.

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
            {"prompt": "make the hair red and make the person smile", "sliders": [{"instruction": "make the hair red"}]},
        ),
    )
    async def spans(request: Request) -> SpansResponse:
        """Return every token of the prompt with its characters and the slider that owns it."""
        fields = await read_json(request, SpansFields, api.limits)
        return await api.work(lambda: api.spans(fields))

    @v1.get("/models", tags=["models"], summary="List the model")
    async def models() -> ModelList:
        return ModelList(data=[api.model])

    @v1.get("/models/{name:path}", tags=["models"], summary="Describe the model", responses=_refusals(404, 422))
    async def one_model(name: str) -> Model:
        api.check_model(name)
        return api.model

    return v1


def _add_health(app: FastAPI, service: EditService, metrics: Metrics) -> None:
    """Add health checks and metrics, which need neither the engine nor the API key."""

    @app.get("/health", tags=["health"], summary="Check whether the server accepts edits", responses={503: {"model": Health}})
    async def health(response: Response) -> Health:
        response.status_code = 503 if service.closed else 200
        return Health(status="closed" if service.closed else "ok")

    @app.get("/v2/health/live", tags=["health"], summary="Check liveness (KServe)")
    async def live() -> Live:
        return Live(live=True)

    @app.get("/v2/health/ready", tags=["health"], summary="Check readiness (KServe)", responses={503: {"model": Ready}})
    async def ready(response: Response) -> Ready:
        response.status_code = 503 if service.closed else 200
        return Ready(ready=not service.closed)

    text: _Responses = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}

    @app.get("/metrics", tags=["health"], summary="Get metrics for Prometheus", response_class=Response, responses=text)
    async def exposition() -> Response:
        return Response(metrics.exposition(), media_type="text/plain; version=0.0.4")


def _answer_faults(app: FastAPI) -> None:
    """Answer every error in OpenAI's format."""

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
        return answer(Fault(500, "internal error; see the server log", code="internal_error"))
