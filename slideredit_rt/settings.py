"""EditSettings and RunSettings: how an image is edited, and how an engine is run, in every interface."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, replace
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal, TypedDict, get_args

from slideredit_rt.errors import SliderEditError

if TYPE_CHECKING:
    import torch

ComponentDType = Literal["auto", "float32", "bfloat16"]
Offload = Literal["auto", "none", "encoders", "all"]
OFFLOADS: tuple[Offload, ...] = get_args(Offload)
COMPONENT_DTYPES: tuple[ComponentDType, ...] = get_args(ComponentDType)
MAX_THREADS = 1024
"""Largest accepted number of CPU threads, more than the cores of any machine. Backends start all threads at once."""
SEEDS = range(-(2**63), 2**64)
"""Seeds that torch's generator accepts."""


def check_seed(seed: int) -> None:
    """Check that torch's generator accepts a seed.

    Raises:
        SliderEditError: The seed is not a whole number from −2⁶³ to 2⁶⁴ − 1.
    """
    if not isinstance(seed, Integral) or int(seed) not in SEEDS:
        raise SliderEditError(f"the seed is {seed!r}; pass a whole number from −2⁶³ to 2⁶⁴ − 1")


@dataclass(frozen=True)
class EditSettings:
    """Settings of an edit besides the image and the sliders.

    Attributes:
        prompt: Text that contains every instruction; None joins the instructions with " and ". A GST adapter scales the whole
            prompt with one slider, which can name any part of it, or one slider per member of a bank. A slider of a GST bank
            that is named after a member and has no `adapter` need not be in the prompt, but then a prompt is required.
        seed: Seed of the initial noise.
        steps: Denoising steps; None takes the editor's default.
        guidance_scale: Scale of the embedded guidance, which is an input of the backbone; None takes the editor's default.
        true_cfg_scale: Scale of classifier-free guidance with a negative pass, in which sliders are off; None takes the
            editor's default, 1 runs without the pass.
        negative_prompt: Prompt of the negative pass; None takes the editor's default.
        slider_start: Fraction of the steps before the sliders act, in [0, 1). The steps that end by then run the base model
            with all sliders off, so all strengths share them. None takes the editor's default, usually 0.

    Raises:
        SliderEditError: The seed is out of range, there are no steps, a scale is not finite, or `slider_start` is not in
            [0, 1).
    """

    prompt: str | None = None
    seed: int = 0
    steps: int | None = None
    guidance_scale: float | None = None
    true_cfg_scale: float | None = None
    negative_prompt: str | None = None
    slider_start: float | None = None

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if self.steps is not None and self.steps < 1:
            raise SliderEditError(f"the number of denoising steps is {self.steps}; pass at least 1")
        for name, scale in (("guidance scale", self.guidance_scale), ("true-CFG scale", self.true_cfg_scale)):
            if scale is not None and not math.isfinite(scale):
                raise SliderEditError(f"the {name} is {scale}; pass a finite number")
        if self.slider_start is not None and not 0 <= self.slider_start < 1:
            raise SliderEditError(
                f"the sliders start at the fraction {self.slider_start} of the steps; pass at least 0 and less than 1"
            )


@dataclass(frozen=True)
class EditDefaults:
    """Values that an engine gives to settings of an edit that are not set, such as those of a few-step LoRA.

    Attributes:
        steps: Denoising steps; None takes the family's default.
        guidance_scale: Scale of the embedded guidance; None takes the family's default.
        true_cfg_scale: Scale of classifier-free guidance with a negative pass; None takes the family's default.
        timestep_shift: Fixed shift s of the noise levels, `σ' = s σ / (1 + (s − 1) σ)`; None takes the base's scheduler as it
            is.
        slider_start: Fraction of the steps before the sliders act; None takes 0.

    Raises:
        SliderEditError: `steps` is below 1, a scale is not finite, the shift is not above 0, or `slider_start` is not in
            [0, 1).
    """

    steps: int | None = None
    guidance_scale: float | None = None
    true_cfg_scale: float | None = None
    timestep_shift: float | None = None
    slider_start: float | None = None

    def __post_init__(self) -> None:
        EditSettings(**{name: value for name, value in asdict(self).items() if name != "timestep_shift"})
        if self.timestep_shift is not None and not 0 < self.timestep_shift < math.inf:
            raise SliderEditError(f"the timestep shift is {self.timestep_shift}; pass a number above 0, such as 3")

    def to_json(self) -> dict[str, Any]:
        """Return the values that are set."""
        return {name: value for name, value in asdict(self).items() if value is not None}


class EditOptions(TypedDict, total=False):
    """Keyword arguments that replace fields of `EditSettings`."""

    prompt: str | None
    seed: int
    steps: int | None
    guidance_scale: float | None
    true_cfg_scale: float | None
    negative_prompt: str | None
    slider_start: float | None


def merge(settings: EditSettings | None, given: EditOptions) -> EditSettings:
    """Replace fields of settings.

    Args:
        settings: Settings to change; None takes the defaults.
        given: New values of fields, by name.

    Raises:
        SliderEditError: A value is invalid (see `EditSettings`).
        TypeError: A name is not a field.
    """
    return replace(EditSettings() if settings is None else settings, **given)


@dataclass(frozen=True)
class RunSettings:
    """Settings for running an engine. The engine, the encoders, the autoencoder and all latents share one device.

    Attributes:
        device: `auto`, `cpu`, `cuda` or `cuda:N`. `auto` takes the device that the engine's backend prefers: the current CUDA
            device for TensorRT, the same for Inductor where there is one, else the CPU.
        dtype: Dtype of encoders and autoencoder, `float32`, `bfloat16` or `auto`: bfloat16 on a GPU, float32 on the CPU.
        offload: Parts that stay in host memory. `none`: nothing. `encoders`: text encoders, from where each layer is copied
            when it is needed; images are encoded and decoded in tiles. `all`: also the backbone's weights that do not fit,
            which are copied in every step; only for TensorRT engines built with weight streaming. `auto`: the first of these
            with which an edit fits into the GPU's free memory.
        threads: CPU threads of the backend; None lets the backend choose.
        options: Run options of the backend, an instance of its `run_options`; None uses its defaults.

    Raises:
        SliderEditError: A value is not one of these.
    """

    device: str = "auto"
    dtype: ComponentDType = "auto"
    offload: Offload = "auto"
    threads: int | None = None
    options: Any = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", self.device):
            raise SliderEditError(f"{self.device!r} is not a device; give auto, cpu, cuda or cuda:N with the number of a GPU")
        if self.dtype not in COMPONENT_DTYPES:
            raise SliderEditError(f"{self.dtype!r} is not a dtype of encoders; give {', '.join(COMPONENT_DTYPES)}")
        if self.offload not in OFFLOADS:
            raise SliderEditError(f"{self.offload!r} is not a choice of what to offload; give {', '.join(OFFLOADS)}")
        if self.threads is not None and not 1 <= self.threads <= MAX_THREADS:
            raise SliderEditError(
                f"cannot use {self.threads} CPU threads; pass 1 to {MAX_THREADS}, or omit it to let the backend choose"
            )

    def choose_device(self, preferred: torch.device | None = None, option: str = "--device") -> torch.device:
        """Return the device, with the number of the GPU.

        Args:
            preferred: Device for `auto`; None takes the CPU.
            option: Name of the command-line option, for the error.

        Raises:
            SliderEditError: The GPU does not exist.
        """
        import torch

        device = preferred or torch.device("cpu") if self.device == "auto" else torch.device(self.device)
        if device.type != "cuda":
            return device
        if not torch.cuda.is_available():
            raise SliderEditError(f"the device is {self.device}, but torch finds no CUDA GPU; use {option} cpu")
        index = torch.cuda.current_device() if device.index is None else device.index
        if index >= (count := torch.cuda.device_count()):
            raise SliderEditError(f"the device is {self.device}, but this machine has {count} GPU(s), counted from 0")
        return torch.device("cuda", index)

    def check_offload(self, device: torch.device) -> None:
        """Refuse to offload from a CPU.

        Raises:
            SliderEditError: The settings ask for it.
        """
        if self.offload in ("encoders", "all") and device.type == "cpu":
            raise SliderEditError(
                f"--offload {self.offload} frees memory of a GPU, and this engine runs on the CPU; leave it out"
            )

    def choose_dtype(self, device: torch.device) -> torch.dtype:
        """Return the dtype of encoders and autoencoder on a device."""
        import torch

        usual = torch.float32 if device.type == "cpu" else torch.bfloat16
        return {"auto": usual, "float32": torch.float32, "bfloat16": torch.bfloat16}[self.dtype]


def pick_device(device: str = "auto", option: str = "--device") -> torch.device:
    """Return the device of work that has no engine, such as training.

    Args:
        device: `auto`, `cpu`, `cuda` or `cuda:N`, as in `RunSettings`. `auto` takes the current GPU if there is one.
        option: Name of the command-line option, for the error.

    Raises:
        SliderEditError: It is not one of these, or the GPU does not exist.
    """
    import torch

    return RunSettings(device).choose_device(torch.device("cuda") if torch.cuda.is_available() else None, option)
