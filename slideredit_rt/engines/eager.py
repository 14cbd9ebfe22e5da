"""Eager torch behind the engine protocol: the reference of every engine, and what rival systems change at run time."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import torch
from torch import Tensor

from slideredit_rt.engines.cuda import on_device
from slideredit_rt.errors import SliderEditError
from slideredit_rt.families import Backbone, Reader


class EagerEngine:
    """Engine that runs a backbone without compiling it. Calls of several threads run one after the other.

    Args:
        backbone: Function from named inputs to the prediction, such as a `SliderBackbone` in evaluation mode.
        device: Device of its weights.
    """

    def __init__(self, backbone: Backbone, device: torch.device) -> None:
        self.backbone = backbone
        self.device = device
        self._lock = threading.Lock()  # the linears share the row scales of a call

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Predict one step (see `slideredit_rt.engines.Engine`)."""
        with self._lock, on_device(self.device):
            return self.backbone(inputs)

    @torch.no_grad()
    def read(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Read source images (see `slideredit_rt.families.Reader`)."""
        with self._lock, on_device(self.device):
            if not isinstance(self.backbone, Reader):
                raise SliderEditError("this backbone cannot read source images in a call of its own; use a SliderBackbone")
            return self.backbone.read(inputs)
