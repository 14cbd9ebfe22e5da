"""Error responses: a status, and a body in the format of OpenAI's errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slideredit_rt.errors import SliderEditError
from slideredit_rt.images import ImageTooLarge
from slideredit_rt.serving.requests import Cancelled, Closed, DeadlineExceeded, EngineFailure, NoMemory, QueueFull


class Fault(Exception):
    """A request that is answered with an error.

    Statuses: 400 for a malformed body or a field of the wrong type or range, 401 for a missing or wrong key, 403 for a host
    name or web page that is not allowed, 404 for an unknown model or path, 408 for a body that arrives too slowly, 413 for a
    body or an image that is too large, 415 for an unsupported content type, 422 for a well-formed request that cannot be
    carried out (an instruction that is not in the prompt, a file that is not an image), 429 for a full queue, 500 for an
    internal error, 503 for a server that is shutting down or out of GPU memory, 504 for an edit that missed its deadline.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """`{"error": {"message", "type", "param", "code"}}`."""
        kind = {429: "rate_limit_error"}.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def fault_of(error: SliderEditError) -> Fault:
    """Return the response to an error of the package."""
    message = str(error)
    match error:
        case QueueFull():
            return Fault(429, message, code="queue_full", headers={"Retry-After": str(max(1, round(error.retry_after)))})
        case DeadlineExceeded():
            return Fault(504, message, code="deadline_exceeded")
        case Closed() | Cancelled():
            return Fault(503, message, code="closed", headers={"Retry-After": "1"})
        case NoMemory():
            return Fault(503, message, code="out_of_memory", headers={"Retry-After": "1"})
        case EngineFailure():
            return Fault(500, "the engine failed; see the server log", code="engine_failure")
        case ImageTooLarge():
            return Fault(413, message, param="image", code="image_too_large")
        case _:
            return Fault(422, message, code="unprocessable_edit")
