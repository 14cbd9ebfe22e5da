"""What a base-model family tells the rest of the package: its backbone's inputs, its linears, its prompt rows."""

from __future__ import annotations

import copy
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import diffusers
import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux_kontext import calculate_shift, retrieve_timesteps
from PIL import Image
from torch import Tensor, nn

from slideredit_rt.checkpoint import check_pipeline, load_components, quiet_libraries
from slideredit_rt.errors import SliderEditError
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
    """Everything of an edit that no slider changes: encoded once per images, prompt and seed.

    Attributes:
        inputs: the backbone's inputs other than latents and timestep; axis 0 is 1 where the spec says `batch`.
        latents: initial noise, `[1, latent_rows, C]`.
        reference: latents of the source images, `[1, reference_rows, C]`.
        sizes: height and width of each source image in latents, which decide the inputs that have no batch axis.
        height, width: size of the decoded image in pixels.
        negative: `inputs` for the negative pass of true classifier-free guidance; None where there is none.
        true_cfg_scale: how far the guidance extrapolates from the negative pass.
    """

    inputs: dict[str, Tensor]
    latents: Tensor
    reference: Tensor
    text_rows: int
    sizes: tuple[tuple[int, int], ...]
    height: int
    width: int
    negative: dict[str, Tensor] | None = None
    true_cfg_scale: float = 1.0

    @property
    def image_rows(self) -> int:
        return self.latents.shape[1] + self.reference.shape[1]


@dataclass(frozen=True)
class Schedule:
    """Noise levels of a run, float32.

    Attributes:
        timesteps: what the backbone is told in each step, `[steps]` in [0, 1].
        deltas: what each step adds to the noise level, `[steps]`.
    """

    timesteps: Tensor
    deltas: Tensor

    def __len__(self) -> int:
        return len(self.timesteps)

    def to(self, device: torch.device) -> Schedule:
        """Return the schedule on a device."""
        return Schedule(self.timesteps.to(device), self.deltas.to(device))


@dataclass(frozen=True)
class EncodedImages:
    """The source images of an edit, encoded: what of a `Conditioning` depends on them alone.

    Attributes:
        reference: their latents, `[1, reference_rows, C]`.
        inputs: the backbone's inputs that follow from the images' sizes.
        sizes: height and width of each source image in latents; `inputs` follow from them.
        height, width: size of the edited image in pixels.
    """

    reference: Tensor
    inputs: dict[str, Tensor]
    sizes: tuple[tuple[int, int], ...]
    height: int
    width: int


Backbone = Callable[[Mapping[str, Tensor]], Tensor]
"""Runs the backbone once: named inputs (with `alpha` and `token_mask`) to its prediction `[batch, image_rows, C]`."""


class Family(ABC):
    """One base-model architecture. A family holds no weights; it works on a loaded diffusers pipeline.

    Attributes:
        pipeline_classes: names of the diffusers pipelines whose checkpoints belong to it.
        guidance_scale: default of the guidance that the backbone has as an input; None for a family without it.
        true_cfg_scale: default of true classifier-free guidance; 1 makes no negative pass.
        negative_prompt: default prompt of the negative pass.
        usual_text_rows: most text rows of an engine that is compiled for a range, unless it is told.
        text_reads_images: whether the text encoder sees the images, so that its output depends on them.
        component_classes: classes that stand in for those in `model_index.json`, by component.
        no_float16: why the family cannot compute in float16; None where it can.
    """

    name: ClassVar[str]
    pipeline_classes: ClassVar[tuple[str, ...]]
    guidance_scale: ClassVar[float | None]
    true_cfg_scale: ClassVar[float] = 1.0
    num_inference_steps: ClassVar[int]
    neutral_prompt: ClassVar[str]
    negative_prompt: ClassVar[str] = ""
    usual_text_rows: ClassVar[int] = 512
    text_reads_images: ClassVar[bool] = False
    component_classes: ClassVar[Mapping[str, Any]] = {}
    no_float16: ClassVar[str | None] = None

    def check_base(self, folder: Path, *, transformer: bool = True) -> dict[str, Any]:
        """Check that the pipeline in `folder` is whole, as `slideredit_rt.checkpoint.check_pipeline` does."""
        return check_pipeline(folder, skip=() if transformer else ("transformer",), classes=self.component_classes)

    def load_pipeline(self, folder: Path, *, transformer: bool = True, dtype: torch.dtype = torch.float32) -> Any:
        """The diffusers pipeline in `folder`; without its transformer when an engine will stand in for it.

        Raises:
            SliderEditError: a component is missing or damaged.
        """
        parts = self.check_base(folder, transformer=transformer) | ({} if transformer else {"transformer": None})
        options = {"dtype": dtype, "local_files_only": True, **parts}
        with quiet_libraries():
            return load_components(folder, lambda: diffusers.DiffusionPipeline.from_pretrained(folder, **options))

    def prepare_transformer(self, transformer: Any) -> None:  # noqa: B027
        """Let a transformer take tensors where diffusers passes Python objects; diffusers' own calls work as before."""

    @abstractmethod
    def rows_of(self, module_name: str) -> RowSet | None:
        """Which rows the linear `module_name` projects; None where no slider may touch it."""

    @abstractmethod
    def targets(self, kind: Kind, *, all_projections: bool = False) -> re.Pattern[str]:
        """Names of the linears that an adapter of this kind is trained on (full match).

        By default those of the released adapters; with `all_projections` every one whose rows the kind may scale.
        """

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

    def side(self, pipeline: Any) -> int:
        """Edge in pixels of the square that the base edits; 1024 where vae/config.json has no `sample_size`."""
        return int(pipeline.vae.config.get("sample_size", 1024))

    def takes_several_images(self, pipeline: Any) -> bool:
        """Whether an edit may have more than one source image."""
        return False

    @abstractmethod
    def max_text_rows(self, pipeline: Any) -> int:
        """The most text rows that the backbone reads."""

    @abstractmethod
    def tokenize(self, pipeline: Any, prompt: str, images: Sequence[Image.Image] = ()) -> list[PromptToken]:
        """The untruncated tokens of a prompt with their characters and text rows.

        Args:
            images: the edit's images, where the text encoder reads them ahead of the prompt; one square if none is given.
        """

    @abstractmethod
    def encode_prompt(
        self, pipeline: Any, prompts: list[str], text_rows: int, images: Sequence[Sequence[Image.Image]] = ()
    ) -> dict[str, Tensor]:
        """The text inputs of the backbone, one batch row per prompt.

        Args:
            text_rows: what prompts are padded or cut to; no more than `max_text_rows`.
            images: the images of each prompt, where the text encoder reads them.
        """

    @abstractmethod
    def encode_image(self, pipeline: Any, images: Tensor) -> tuple[Tensor, Tensor]:
        """Packed latents `[B, rows, C]` of images `[B, 3, H, W]` in [−1, 1], and their position ids as the noisy image."""

    @abstractmethod
    def training_inputs(
        self, pipeline: Any, noisy: Tensor, reference: Tensor, ids: Tensor, text: Mapping[str, Tensor], sigma: Tensor
    ) -> dict[str, Tensor]:
        """Backbone inputs of a training step; `noisy`, `reference`: `[B, rows, C]`, `sigma`: `[B]` in [0, 1]."""

    @abstractmethod
    def encode_sources(self, pipeline: Any, images: Sequence[Image.Image]) -> EncodedImages:
        """Encode the source images of an edit: one, or several where `takes_several_images`."""

    def draw_noise(self, pipeline: Any, height: int, width: int, seed: int) -> Tensor:
        """Initial noise for an image of `height` × `width` pixels, float32 `[1, latent_rows, C]`, as diffusers draws it.

        On the CPU, so that a seed gives the same noise whatever device an edit runs on.

        Args:
            seed: one that `slideredit_rt.settings.check_seed` lets pass.
        """
        generator = torch.Generator().manual_seed(int(seed))
        shape = (1, pipeline.latent_channels, height, width)
        latents: Tensor = pipeline.prepare_latents(None, *shape, torch.float32, torch.device("cpu"), generator)[0]
        return latents

    def condition(
        self,
        sources: EncodedImages,
        text: Mapping[str, Tensor],
        negative: Mapping[str, Tensor] | None,
        latents: Tensor,
        guidance_scale: float | None,
        true_cfg_scale: float,
    ) -> Conditioning:
        """Put the encoded parts of an edit together.

        Args:
            text, negative: from `encode_prompt` with one prompt; no negative makes no negative pass.
            latents: from `draw_noise`.
            guidance_scale: None for a family without embedded guidance.
            true_cfg_scale: of the guidance against `negative`.
        """
        shared = dict(sources.inputs)
        if guidance_scale is not None:
            shared["guidance"] = torch.tensor([guidance_scale], dtype=torch.float32, device=latents.device)
        return Conditioning(
            inputs={**text, **shared},
            latents=latents,
            reference=sources.reference,
            text_rows=text["encoder_hidden_states"].shape[1],
            sizes=sources.sizes,
            height=sources.height,
            width=sources.width,
            negative=None if negative is None else {**negative, **shared},
            true_cfg_scale=true_cfg_scale,
        )

    @abstractmethod
    def preprocess(self, pipeline: Any, image: Image.Image) -> Tensor:
        """Resize to the size that the base model edits at: `[1, 3, H, W]` in [−1, 1]."""

    def schedule(self, pipeline: Any, latent_rows: int, steps: int) -> Schedule:
        """Return the noise levels of a run, on the CPU.

        By default as diffusers does for flow matching: the noise levels shift with the number of latent rows.

        Raises:
            SliderEditError: a scheduler other than the Euler method for flow matching, or too few steps for it.
        """
        scheduler = copy.deepcopy(pipeline.scheduler)
        config = scheduler.config
        if type(scheduler) is not FlowMatchEulerDiscreteScheduler or config.get("stochastic_sampling"):
            raise SliderEditError(
                f"this base's scheduler is a {type(scheduler).__name__}, and edits need a FlowMatchEulerDiscreteScheduler "
                "without stochastic sampling; change scheduler/scheduler_config.json of the base"
            )
        mu = calculate_shift(
            latent_rows,
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.15),
        )
        sigmas = np.linspace(1.0, 1 / steps, steps)
        timesteps: Tensor = retrieve_timesteps(scheduler, steps, "cpu", sigmas=sigmas, mu=mu)[0]
        # Stretching a schedule to a last noise level (`shift_terminal`) divides by zero where it has one step only.
        if not torch.isfinite(timesteps).all():
            raise SliderEditError(f"this base's scheduler cannot make a schedule of {steps} step; use at least 2")
        return Schedule(timesteps / 1000, scheduler.sigmas.diff())

    @abstractmethod
    def decode_pixels(self, pipeline: Any, latents: Tensor, height: int, width: int) -> Tensor:
        """Latents `[B, latent_rows, C]` to images `[B, 3, height, width]`, as the autoencoder gives them: about [−1, 1]."""

    @torch.no_grad()
    def decode(self, pipeline: Any, latents: Tensor, height: int, width: int) -> Tensor:
        """Latents `[B, latent_rows, C]` to images `[B, 3, height, width]` in [0, 1].

        A row that is not finite before or after the autoencoder is NaN throughout: clamping would make infinities look like
        colours, and normalisation may bring them back into bounds.
        """
        pixels = self.decode_pixels(pipeline, latents, height, width)
        finite = latents.isfinite().flatten(1).all(1) & pixels.isfinite().flatten(1).all(1)
        images: Tensor = pipeline.image_processor.postprocess(pixels.float(), output_type="pt")
        return images.masked_fill(~finite[:, None, None, None], torch.nan)

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

    def negative_inputs(
        self, config: Mapping[str, Any], conditioning: Conditioning, inputs: Mapping[str, Tensor]
    ) -> dict[str, Tensor] | None:
        """Backbone inputs of the negative pass that belongs to `inputs`, from `batch_inputs`; None where there is none.

        No slider acts in them: every alpha is 0 and every mask empty. Latents and timestep are those of `inputs`, shared.
        """
        if conditioning.negative is None:
            return None
        text_rows = conditioning.negative["encoder_hidden_states"].shape[1]
        batch, sliders, rows = inputs["token_mask"].shape
        token_mask = inputs["token_mask"].new_zeros(batch, sliders, rows - conditioning.text_rows + text_rows)
        encoded = replace(conditioning, inputs=conditioning.negative, text_rows=text_rows)
        negative = self.batch_inputs(config, encoded, torch.zeros_like(inputs["alpha"]), token_mask)
        return negative | {name: inputs[name] for name in ("hidden_states", "timestep")}

    def predict(
        self,
        backbone: Backbone,
        inputs: Mapping[str, Tensor],
        latents: Tensor,
        timestep: Tensor,
        negative: Mapping[str, Tensor] | None = None,
        true_cfg_scale: float | Tensor = 1.0,
    ) -> Tensor:
        """The velocity for `latents` `[B, latent_rows, C]` at a timestep in [0, 1].

        Args:
            timestep: from a `Schedule`, on the device of the inputs: one for all rows, or `[B]`.
            inputs: from `batch_inputs`.
            negative: from `negative_inputs`; None makes one pass without guidance.
            true_cfg_scale: of the guidance between the two passes.
        """
        rows = latents.shape[1]
        inputs["hidden_states"][:, :rows].copy_(latents)
        inputs["timestep"].copy_(timestep)
        prediction = backbone(inputs)[:, :rows]
        if negative is None:
            return prediction
        # An engine's output is a buffer that its next call may write.
        return self.guide(prediction.clone(), backbone(negative)[:, :rows], true_cfg_scale)

    def guide(self, prediction: Tensor, negative: Tensor, scale: float | Tensor) -> Tensor:
        """Classifier-free guidance between two passes' predictions, `[B, latent_rows, C]`; a scale may be `[B, 1, 1]`."""
        return negative + scale * (prediction - negative)
