"""Check that a command refuses its input."""

from __future__ import annotations

import pytest

from slideredit_rt.cli import main


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command that must be refused: exit code 2, one line on standard error, nothing on standard output."""
    capsys.readouterr()
    code = main([str(a) for a in arguments])
    out, error = capsys.readouterr()
    assert (code, out, error.count("\n")) == (2, "", 1), error
    assert error.startswith("slideredit-rt: ")
    return error
