"""Middleware for Ray's proxies. It imports little, because Ray gives a proxy only seconds to start."""

from __future__ import annotations

from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

REPLICA_LOST = "replica_lost"


class ReplicaLost:
    """Middleware that answers 503 in the API's format, instead of a bare 500, when a replica dies before it responds.

    Edits have no side effects, so the client can safely send the request again.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        await self.app(scope, receive, watched)
        if not started:
            message = "the replica that handled this request died; send it again"
            body = {"error": {"message": message, "type": "server_error", "param": None, "code": REPLICA_LOST}}
            await JSONResponse(body, 503, {"Retry-After": "1"})(scope, receive, send)


def middlewares() -> list[Middleware]:
    """Return the middlewares for `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH`."""
    return [Middleware(ReplicaLost)]
