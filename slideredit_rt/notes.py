"""Notes on standard error: what a command or a server decides by itself. In Python, they are log records."""

from __future__ import annotations

import logging
import sys

LOGGER = "slideredit_rt.notes"
"""Name of the logger of notes."""


class _ToStandardError(logging.Handler):
    """Writes notes to standard error, whichever file that is at the time."""

    def emit(self, record: logging.LogRecord) -> None:
        sys.stderr.write(f"slideredit-rt: {record.getMessage()}\n")


_HANDLER = _ToStandardError()


def print_notes() -> None:
    """Print all notes of this process from now on. Idempotent."""
    logger = logging.getLogger(LOGGER)
    logger.setLevel(logging.INFO)
    logger.addHandler(_HANDLER)


def note(text: str) -> None:
    """Log a note, in one line."""
    logging.getLogger(LOGGER).info("%s", text)
