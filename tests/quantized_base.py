"""What tests of quantised bases share: names of the embedded base, its weights, and commands that must be refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from slideredit_rt.cli import main

WEIGHTS = "diffusion_pytorch_model.safetensors"
TO_Q = "transformer_blocks.0.attn.to_q"


def weights_of(base: Path) -> dict[str, Tensor]:
    """The stored tensors of a base's transformer."""
    return load_file(base / "transformer" / WEIGHTS)


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command that must be refused in one sentence."""
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("slideredit-rt: ")
    assert error.count("\n") == 1
    return error
