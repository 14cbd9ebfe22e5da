"""uvicorn server with errors in the API's format, a time limit for headers, and a shutdown that finishes accepted edits."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from collections.abc import Callable
from http import HTTPStatus
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from slideredit_rt.serving.faults import Fault
from slideredit_rt.serving.service import EditService

HEADER_BYTES = 32 * 2**10
HEADER_SECONDS = 15.0
_GRACE = 5  # seconds to send responses after the last edit


class Connection(H11Protocol):
    """Connection that is closed if the headers of a request do not arrive in time."""

    _headers_due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_headers()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._expect_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_headers()
        super().connection_lost(exc)

    def _expect_headers(self) -> None:
        if self.conn.their_state is not h11.IDLE or self.transport.is_closing():
            self._forget_headers()
        elif self._headers_due is None:
            self._headers_due = self.loop.call_later(HEADER_SECONDS, self.transport.close)

    def _forget_headers(self) -> None:
        if self._headers_due is not None:
            self._headers_due.cancel()
            self._headers_due = None

    def on_response_complete(self) -> None:
        super().on_response_complete()
        # uvicorn's keep-alive timer covers the wait for the next request.
        self._forget_headers()

    def send_400_response(self, msg: str) -> None:
        # h11 has the status (431 for headers that are too large), but uvicorn does not pass it on.
        status = getattr(sys.exc_info()[1], "error_status_hint", 400)
        if status == 431:
            msg = f"the headers are larger than the limit of {HEADER_BYTES // 2**10} KiB; send fewer or shorter ones"
        body = json.dumps(Fault(status, msg).body).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        for event in (
            h11.Response(status_code=status, headers=headers, reason=HTTPStatus(status).phrase.encode()),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


class Server(uvicorn.Server):
    """Server of an application over a service.

    On the first signal (or call of `stop`), accepted edits are finished, for at most `drain_seconds`, and new requests get 503.
    The second one cancels the remaining edits.

    Args:
        app: The application.
        service: The service, closed when the server stops.
        drain_seconds: Longest time for accepted edits to finish.
        on_ready: Called when the server accepts requests.
    """

    def __init__(
        self, app: Any, service: EditService, *, drain_seconds: float = 30.0, on_ready: Callable[[], None] | None = None
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=Connection,
                ws="none",
                log_config=None,
                log_level="error",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                h11_max_incomplete_event_size=HEADER_BYTES,
                timeout_graceful_shutdown=int(drain_seconds) + _GRACE,
            )
        )
        self._service = service
        self._drain_seconds = drain_seconds
        self._on_ready = on_ready
        self._closer: threading.Thread | None = None

    async def startup(self, sockets: list[Any] | None = None) -> None:
        await super().startup(sockets)
        if self.started and self._on_ready is not None:
            self._on_ready()

    def stop(self) -> None:
        """Stop after finishing accepted edits; on the second call, cancel them."""
        if self.should_exit:
            self.force_exit = True
            threading.Thread(target=self._service.close, kwargs={"drain": False}, daemon=True).start()
            return
        self.should_exit = True
        # Closing waits for the edits, so it runs on another thread; the event loop still has to send their responses.
        self._closer = threading.Thread(target=self._service.close, kwargs={"timeout": self._drain_seconds}, daemon=True)
        self._closer.start()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.stop()

    async def shutdown(self, sockets: list[Any] | None = None) -> None:
        await super().shutdown(sockets)
        if self._closer is not None:
            await asyncio.to_thread(self._closer.join)
