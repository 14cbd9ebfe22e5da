"""The eager reference behind the engine protocol: a diffusers transformer with our linears, not compiled."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import torch
from torch import Tensor

from slideredit_rt.modules import SliderBackbone


class EagerEngine:
    """Runs a backbone as it is, on the device of its weights. Calls of several threads run one after the other.

    Args:
        backbone: in evaluation mode.
    """

    def __init__(self, backbone: SliderBackbone) -> None:
        self.backbone = backbone
        self.device = next(backbone.parameters()).device
        self._lock = threading.Lock()  # the linears share a call's row scales

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return one prediction, `[B, image_rows, C]`."""
        with self._lock:
            output: Tensor = self.backbone(inputs)
        return output
