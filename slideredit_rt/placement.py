"""Placement: the device that an edit runs on, the dtype of its encoders and autoencoder, and what stays in host memory."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from slideredit_rt.errors import SliderEditError

if TYPE_CHECKING:
    import torch

ComponentDType = Literal["auto", "float32", "bfloat16"]
Offload = Literal["none", "encoders"]
OFFLOADS: tuple[Offload, ...] = get_args(Offload)
COMPONENT_DTYPES: tuple[ComponentDType, ...] = get_args(ComponentDType)


@dataclass(frozen=True)
class Placement:
    """Where an edit runs: engine, encoders, autoencoder and the latents between them share one device.

    Attributes:
        device: `auto`, `cpu`, `cuda` or `cuda:N`. `auto` takes the device that the engine's backend prefers: the current CUDA
            device for TensorRT, the same for Inductor where there is one, else the CPU.
        dtype: dtype of encoders and autoencoder, `float32`, `bfloat16` or `auto`: bfloat16 on a GPU, float32 on the CPU.
        offload: `none`, or `encoders` for GPUs with little memory: text encoders stay in host memory and visit the GPU a layer
            at a time when a prompt is encoded, and images are decoded in tiles.

    Raises:
        SliderEditError: a value that is not one of these.
    """

    device: str = "auto"
    dtype: ComponentDType = "auto"
    offload: Offload = "none"

    def __post_init__(self) -> None:
        if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", self.device):
            raise SliderEditError(f"{self.device!r} is not a device; give auto, cpu, cuda or cuda:N with the number of a GPU")
        if self.dtype not in COMPONENT_DTYPES:
            raise SliderEditError(f"{self.dtype!r} is not a dtype of encoders; give {', '.join(COMPONENT_DTYPES)}")
        if self.offload not in OFFLOADS:
            raise SliderEditError(f"{self.offload!r} cannot be offloaded; give {' or '.join(OFFLOADS)}")

    def choose_device(self, preferred: torch.device | None = None) -> torch.device:
        """Return the device, with the number of the GPU.

        Args:
            preferred: device for `auto`; None takes the CPU.

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

    def check_offload(self, device: torch.device) -> None:
        """Refuse to offload from a CPU."""
        if self.offload != "none" and device.type == "cpu":
            raise SliderEditError(
                f"--offload {self.offload} frees memory of a GPU, and this engine runs on the CPU; leave it out"
            )

    def choose_dtype(self, device: torch.device) -> torch.dtype:
        """Return the dtype of encoders and autoencoder on a device."""
        import torch

        usual = torch.float32 if device.type == "cpu" else torch.bfloat16
        return {"auto": usual, "float32": torch.float32, "bfloat16": torch.bfloat16}[self.dtype]
