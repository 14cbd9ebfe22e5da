"""What TensorRT says while it builds and runs."""

from __future__ import annotations

from typing import Any, TextIO


def make_logger(trt: Any, file: TextIO | None = None) -> Any:
    """Return a TensorRT logger that keeps what TensorRT calls an error, for the sentence that a person sees.

    Args:
        trt: the module `tensorrt` or `tensorrt_rtx`.
        file: gets every message, a line each; None drops all but errors.
    """

    class Logger(trt.ILogger):
        """`errors` are the messages since the last question."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if file is not None:
                file.write(f"{severity.name}: {message}\n")
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)

        def why(self) -> str:
            """The first error since the last question: those after it are mostly its consequences."""
            errors, self.errors = self.errors, []
            return errors[0].strip() if errors else "it gives no reason"

    return Logger()
