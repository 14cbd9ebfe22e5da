"""What a base-model family tells the rest of the package: its backbone's inputs, its linears, its prompt rows."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import diffusers
import torch
import transformers
from PIL import Image
from torch import Tensor, nn

from slideredit_rt.sliders import PromptToken

Kind = Literal["st", "gst"]
RowSet = Literal["text", "image", "joint"]

KINDS: tuple[Kind, ...] = ("st", "gst")
"""`st`: selective token, text rows of the slider's own instruction. `gst`: every text and image row."""


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype (torch's name of it) and shape of an engine input or output.

    Axes are numbers or one of the symbols `batch`, `text_rows`, `image_rows`, `sliders`, `rows` (text then image rows).
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def resolve(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape with its symbols replaced."""
        return tuple(sizes[axis] if isinstance(axis, str) else axis for axis in self.shape)


@dataclass(frozen=True)
class Conditioning:
    """Everything of an edit that no slider changes: encoded once per image, prompt and seed.

    Attributes:
        inputs: the backbone's inputs other than latents and timestep; axis 0 is 1 where the spec says `batch`.
        latents: initial noise, `[1, latent_rows, C]`.
        reference: latents of the source image, `[1, reference_rows, C]`.
        height, width: size of the decoded image in pixels.
    """

    inputs: dict[str, Tensor]
    latents: Tensor
    reference: Tensor
    text_rows: int
    height: int
    width: int

    @property
    def image_rows(self) -> int:
        return self.latents.shape[1] + self.reference.shape[1]


Backbone = Callable[[Mapping[str, Tensor]], Tensor]
"""Runs the backbone once: named inputs (with `alpha` and `token_mask`) to its prediction `[batch, image_rows, C]`."""


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Hide the bars that diffusers and transformers draw per file; a command shows one of its own where work is long."""
    libraries = (diffusers.utils.logging, transformers.utils.logging)
    shown = [library.is_progress_bar_enabled() for library in libraries]
    for library in libraries:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, was_shown in zip(libraries, shown, strict=True):
            if was_shown:
                library.enable_progress_bar()


class Family(ABC):
    """One base-model architecture. A family holds no weights; it works on a loaded diffusers pipeline.

    Attributes:
        no_float16: why the family cannot compute in float16; None where it can.
    """

    name: ClassVar[str]
    pipeline_class: ClassVar[str]
    guidance_scale: ClassVar[float]
    num_inference_steps: ClassVar[int]
    neutral_prompt: ClassVar[str]
    no_float16: ClassVar[str | None] = None

    @abstractmethod
    def load_pipeline(self, folder: Path, *, transformer: bool = True, dtype: torch.dtype = torch.float32) -> Any:
        """The diffusers pipeline in `folder`; without its transformer when an engine will stand in for it."""

    @abstractmethod
    def rows_of(self, module_name: str) -> RowSet | None:
        """Which rows the linear `module_name` projects; None where no slider may touch it."""

    @abstractmethod
    def targets(self, kind: Kind) -> re.Pattern[str]:
        """Names of the linears that an adapter of this kind is trained on by default (full match)."""

    @abstractmethod
    def input_specs(self, config: Mapping[str, Any]) -> list[TensorSpec]:
        """The backbone's own tensor inputs, given the transformer's configuration."""

    @abstractmethod
    def output_spec(self, config: Mapping[str, Any]) -> TensorSpec:
        """The backbone's own output."""

    @abstractmethod
    def random_inputs(
        self, config: Mapping[str, Any], batch: int, text_rows: int, image_rows: int, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Valid random inputs of the backbone, for export and verification; float32 on the CPU."""

    @abstractmethod
    def run(self, transformer: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """Call the diffusers transformer with the inputs that `input_specs` names."""

    @abstractmethod
    def max_text_rows(self, pipeline: Any) -> int:
        """Text rows that a prompt is padded or cut to."""

    @abstractmethod
    def tokenize(self, pipeline: Any, prompt: str) -> list[PromptToken]:
        """The untruncated tokens of a prompt with their characters and text rows."""

    @abstractmethod
    def encode_prompt(self, pipeline: Any, prompts: list[str], text_rows: int) -> dict[str, Tensor]:
        """The text inputs of the backbone, one batch row per prompt."""

    @abstractmethod
    def encode_image(self, pipeline: Any, images: Tensor) -> tuple[Tensor, Tensor]:
        """Packed latents `[B, rows, C]` of images `[B, 3, H, W]` in [−1, 1], and their position ids as the noisy image."""

    @abstractmethod
    def training_inputs(
        self, pipeline: Any, noisy: Tensor, reference: Tensor, ids: Tensor, text: Mapping[str, Tensor], sigma: Tensor
    ) -> dict[str, Tensor]:
        """Backbone inputs of a training step; `noisy`, `reference`: `[B, rows, C]`, `sigma`: `[B]` in [0, 1]."""

    @abstractmethod
    def encode(self, pipeline: Any, image: Image.Image, prompt: str, seed: int, guidance_scale: float) -> Conditioning:
        """Encode an image and a prompt and draw the initial noise."""

    @abstractmethod
    def preprocess(self, pipeline: Any, image: Image.Image) -> Tensor:
        """Resize to the size that the base model edits at: `[1, 3, H, W]` in [−1, 1]."""

    @abstractmethod
    def set_timesteps(self, pipeline: Any, scheduler: Any, conditioning: Conditioning, steps: int) -> Tensor:
        """Prepare a diffusers scheduler for `steps` steps and return its timesteps."""

    @abstractmethod
    def decode(self, pipeline: Any, latents: Tensor, height: int, width: int) -> Tensor:
        """Latents `[B, latent_rows, C]` to images `[B, 3, height, width]` in [0, 1]."""

    def batch_inputs(
        self, config: Mapping[str, Any], conditioning: Conditioning, alpha: Tensor, token_mask: Tensor
    ) -> dict[str, Tensor]:
        """Backbone inputs for one batch of slider settings, allocated once and then updated in place by `predict`.

        Args:
            alpha: float32 `[B, K]`.
            token_mask: bool `[B, K, S]`.
        """
        batch = len(alpha)
        inputs = {}
        for spec in self.input_specs(config):
            if spec.name in conditioning.inputs:
                value = conditioning.inputs[spec.name]
                inputs[spec.name] = (value.expand(batch, *value.shape[1:]) if spec.shape[0] == "batch" else value).contiguous()
        latents = torch.cat([conditioning.latents, conditioning.reference], dim=1)
        inputs["hidden_states"] = latents.expand(batch, -1, -1).contiguous()
        device = latents.device
        inputs["timestep"] = torch.zeros(batch, device=device)
        return inputs | {"alpha": alpha.to(device).contiguous(), "token_mask": token_mask.to(device).contiguous()}

    def predict(self, backbone: Backbone, inputs: dict[str, Tensor], latents: Tensor, timestep: Tensor) -> Tensor:
        """The velocity for `latents` `[B, latent_rows, C]` at a scheduler timestep in [0, 1000].

        Families with true classifier-free guidance override this: two calls, the negative one with alpha 0.
        """
        rows = latents.shape[1]
        inputs["hidden_states"][:, :rows].copy_(latents)
        inputs["timestep"].fill_(timestep / 1000)
        return backbone(inputs)[:, :rows]
