"""Logger for TensorRT's messages."""

from __future__ import annotations

from typing import Any, TextIO


def make_logger(trt: Any, file: TextIO | None = None) -> Any:
    """Return a TensorRT logger that keeps errors for use in our error messages.

    Args:
        trt: The module `tensorrt` or `tensorrt_rtx`.
        file: Text file for all messages, one per line; None keeps errors only.
    """

    class Logger(trt.ILogger):
        """Logger whose `errors` are the messages since the last call of `why`."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if file is not None:
                file.write(f"{severity.name}: {message}\n")
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)

        def why(self) -> str:
            """Return the first error since the last call, because later errors are mostly its consequences."""
            errors, self.errors = self.errors, []
            return errors[0].strip() if errors else "no reason given"

    return Logger()
