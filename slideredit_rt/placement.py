"""Placement: the device that an edit runs on, and the dtype of its encoders and its autoencoder there."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from slideredit_rt.errors import SliderEditError

if TYPE_CHECKING:
    import torch

ComponentDType = Literal["auto", "float32", "bfloat16"]
COMPONENT_DTYPES: tuple[ComponentDType, ...] = get_args(ComponentDType)


@dataclass(frozen=True)
class Placement:
    """Where an edit runs: engine, encoders, autoencoder and the latents between them share one device.

    Attributes:
        device: `auto`, `cpu`, `cuda` or `cuda:N`. `auto` takes the device that the engine's backend prefers: the current CUDA
            device for TensorRT, the same for Inductor where there is one, else the CPU.
        dtype: of encoders and autoencoder: `float32`, `bfloat16`, or `auto`, which is bfloat16 on a GPU and float32 on the CPU.

    Raises:
        SliderEditError: a device or dtype that is not one of these.
    """

    device: str = "auto"
    dtype: ComponentDType = "auto"

    def __post_init__(self) -> None:
        if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", self.device):
            raise SliderEditError(f"{self.device!r} is not a device; give auto, cpu, cuda or cuda:N with the number of a GPU")
        if self.dtype not in COMPONENT_DTYPES:
            raise SliderEditError(f"{self.dtype!r} is not a dtype of encoders; give {', '.join(COMPONENT_DTYPES)}")

    def choose_device(self, preferred: torch.device | None = None) -> torch.device:
        """Return the device, with the number of the GPU.

        Args:
            preferred: what `auto` takes; None takes the CPU.

        Raises:
            SliderEditError: a GPU that is not there.
        """
        import torch

        device = preferred or torch.device("cpu") if self.device == "auto" else torch.device(self.device)
        if device.type != "cuda":
            return device
        if not torch.cuda.is_available():
            raise SliderEditError(f"the device {self.device} was asked for and torch finds no CUDA GPU here; use --device cpu")
        index = torch.cuda.current_device() if device.index is None else device.index
        if index >= (count := torch.cuda.device_count()):
            raise SliderEditError(f"the device {self.device} was asked for and this machine has {count} GPU(s), counted from 0")
        return torch.device("cuda", index)

    def choose_dtype(self, device: torch.device) -> torch.dtype:
        """Return the dtype of encoders and autoencoder on a device."""
        import torch

        usual = torch.float32 if device.type == "cpu" else torch.bfloat16
        return {"auto": usual, "float32": torch.float32, "bfloat16": torch.bfloat16}[self.dtype]
