"""What tests of quantised bases share: names of the embedded base, its weights, and commands that must be refused."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

WEIGHTS = "diffusion_pytorch_model.safetensors"
TO_Q = "transformer_blocks.0.attn.to_q"


def weights_of(base: Path) -> dict[str, Tensor]:
    """The stored tensors of a base's transformer."""
    return load_file(base / "transformer" / WEIGHTS)
