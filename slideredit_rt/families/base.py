"""`Family`, the interface of base-model families: backbone inputs, adaptable linears, encoding and decoding."""

from __future__ import annotations

import copy
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import diffusers
import numpy as np
import torch
from accelerate import cpu_offload
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux_kontext import calculate_shift, retrieve_timesteps
from PIL import Image
from torch import Tensor, nn

from slideredit_rt.checkpoint import check_pipeline, load_components, quiet_libraries
from slideredit_rt.errors import SliderEditError
from slideredit_rt.quantization.config import read_layers
from slideredit_rt.quantization.loading import load_transformer
from slideredit_rt.settings import Offload
from slideredit_rt.spans import PromptToken

Kind = Literal["st", "gst"]
RowSet = Literal["text", "image", "joint"]

KINDS: tuple[Kind, ...] = ("st", "gst")
"""`st` (selective token) scales the text rows of the slider's own instruction, also among joint rows; `gst` scales every text
and image row."""


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype (as torch names it) and shape of an engine input or output.

    Axes are numbers or the symbols `batch`, `text_rows`, `image_rows`, `sliders`, `rows` (text rows, then image rows). Families
    that read source images once also have `references` (edits with different source images), `reference_rows` and `kept_rows`.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def resolve(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Return the shape with its symbols replaced by sizes."""
        return tuple(sizes[axis] if isinstance(axis, str) else axis for axis in self.shape)


@dataclass(frozen=True)
class Conditioning:
    """The parts of an edit that do not depend on sliders, encoded once per images, prompt and seed.

    Attributes:
        inputs: Backbone inputs other than latents and timestep; `batch` axes have size 1.
        latents: Initial noise, float32 `[1, latent_rows, C]`.
        reference: Latents of the source images, float32 `[1, reference_rows, C]`.
        text_rows: Number of text rows.
        sizes: Height and width of each source image in latents, which determine the inputs without a batch axis.
        height: Height of the decoded image, in pixels.
        width: Width of the decoded image, in pixels.
        negative: `inputs` for the negative pass of true classifier-free guidance (CFG); None without one.
        true_cfg_scale: Scale of the guidance away from the negative pass.
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
        timesteps: Noise level that the backbone gets in each step, `[steps]` in [0, 1].
        deltas: Change of the noise level in each step, `[steps]`.
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
    """The parts of a `Conditioning` that only depend on the source images.

    Attributes:
        reference: Latents of the images, float32 `[1, reference_rows, C]`.
        inputs: Backbone inputs that follow from the sizes of the images.
        sizes: Height and width of each source image in latents.
        height: Height of the edited image, in pixels.
        width: Width of the edited image, in pixels.
    """

    reference: Tensor
    inputs: dict[str, Tensor]
    sizes: tuple[tuple[int, int], ...]
    height: int
    width: int


def decode_in_tiles(vae: Any) -> None:
    """Let an autoencoder work in tiles of at most 512 pixels, to save memory.

    The FLUX autoencoder's default tile is as large as the images that it edits, so its size is set here.
    """
    if hasattr(vae, "tile_latent_min_size"):
        ratio = vae.tile_sample_min_size / vae.tile_latent_min_size
        vae.tile_sample_min_size = min(vae.tile_sample_min_size, 512)
        vae.tile_latent_min_size = int(vae.tile_sample_min_size / ratio)
    vae.enable_tiling()


def in_blocks(theirs: str, ours: str, names: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """Return names of a block with the block's own name before them, for `Family.original_names`.

    Args:
        theirs: Name of the blocks in files of the model's authors.
        ours: Name of the blocks in diffusers.
        names: Names within a block, as in `Family.original_names`.
    """
    return {f"{theirs}.{{}}.{name}": tuple(f"{ours}.{{}}.{part}" for part in parts) for name, parts in names.items()}


Backbone = Callable[[Mapping[str, Tensor]], Tensor]
"""A function that runs the backbone once: named inputs (with `alpha` and `token_mask`) to `[batch, image_rows, C]`."""


@runtime_checkable
class Reader(Protocol):
    """A `Backbone` that also reads source images, for families that read them once."""

    def read(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the keys and values of the rows `kept`, `[blocks, 2, 1, kept_rows, heads, D]` (see `Family.read`)."""
        ...


class Family(ABC):
    """One base-model architecture. A family does not hold weights; it works on a loaded diffusers pipeline.

    Attributes:
        name: Name in commands and manifests.
        pipeline_classes: Names of the diffusers pipelines whose checkpoints belong to it.
        guidance_scale: Default of the embedded guidance, which is an input of the backbone; None for a family without it.
        true_cfg_scale: Default scale of true classifier-free guidance; 1 runs without a negative pass.
        num_inference_steps: Default number of denoising steps. Checkpoints may have defaults of their own, see `default_steps`
            and `default_true_cfg_scale`.
        neutral_prompt: Prompt that does not ask for an edit, for training.
        negative_prompt: Default prompt of the negative pass.
        linears: Patterns of the names (full match) of the linears that sliders can scale, by the rows that they project.
        usual_text_rows: Default largest number of text rows of an engine that is compiled for a range.
        text_reads_images: True if the text encoder also sees the images.
        sized_by: Index of the source image whose shape the edited image has.
        keeps_small_images: True if images that are smaller than the base's square keep their size.
        component_classes: Replacements for classes in `model_index.json`, by component.
        joint_projections: Projections of the same rows that the transformer's attention can also compute as one module: the
            name of that module and of its parts.
        no_float16: Reason why the family cannot compute in float16; None if it can.
        modulation: Pattern for the names (full match) of the linears that compute a block's shifts, scales and gates (adaLN).
        proportions: Output features of linears for each input feature, by patterns for their names (full match), where files
            of several families use the same names.
        original_names: Names of modules and tensors in single files that follow the model's authors, and those that their rows
            have in diffusers, in order. `{}` stands for the number of a block. Empty if the names are diffusers' own.
        swapped_halves: Modules, by diffusers' names, whose output features are in the other order of halves in such files.
        variant_of: Name of the family whose linears this one shares, and whose ST adapters it takes; None if there is none.
        reads_images_once: True if the source images are read in a call of their own (see `read`) instead of in every step. Its
            GST adapters do not scale rows of source images.
        encoding_pipeline: Pipeline class for a checkpoint that is loaded without its transformer; None takes the checkpoint's.
    """

    name: ClassVar[str]
    pipeline_classes: ClassVar[tuple[str, ...]]
    guidance_scale: ClassVar[float | None]
    true_cfg_scale: ClassVar[float] = 1.0
    num_inference_steps: ClassVar[int]
    neutral_prompt: ClassVar[str]
    negative_prompt: ClassVar[str] = ""
    linears: ClassVar[Mapping[RowSet, str]]
    usual_text_rows: ClassVar[int] = 512
    text_reads_images: ClassVar[bool] = False
    sized_by: ClassVar[int] = -1
    keeps_small_images: ClassVar[bool] = False
    component_classes: ClassVar[Mapping[str, Any]] = {}
    joint_projections: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    no_float16: ClassVar[str | None] = None
    modulation: ClassVar[str]
    proportions: ClassVar[Mapping[str, Fraction]] = {}
    original_names: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    swapped_halves: ClassVar[tuple[str, ...]] = ()
    variant_of: ClassVar[str | None] = None
    reads_images_once: ClassVar[bool] = False
    encoding_pipeline: ClassVar[type | None] = None

    def check_base(self, folder: Path, *, transformer: bool = True) -> dict[str, Any]:
        """Check that the pipeline in `folder` is complete (see `slideredit_rt.checkpoint.check_pipeline`).

        Args:
            folder: Folder of the checkpoint.
            transformer: Check the transformer as well.
        """
        return check_pipeline(folder, skip=() if transformer else ("transformer",), classes=self.component_classes)

    def load_pipeline(self, folder: Path, *, transformer: bool = True, dtype: torch.dtype = torch.float32) -> Any:
        """Load the diffusers pipeline in `folder`.

        Args:
            folder: Folder of the checkpoint.
            transformer: Load the transformer; false if an engine replaces it.
            dtype: Dtype of the weights.

        Raises:
            SliderEditError: A component is missing or damaged.
        """
        parts = self.check_base(folder, transformer=transformer) | ({} if transformer else {"transformer": None})
        if transformer and read_layers(folder / "transformer"):
            parts["transformer"] = load_transformer(folder / "transformer", dtype)
        options = {"dtype": dtype, "local_files_only": True, **parts}
        with quiet_libraries():
            sort: Any = diffusers.DiffusionPipeline if transformer else self.encoding_pipeline or diffusers.DiffusionPipeline
            return load_components(folder, lambda: sort.from_pretrained(folder, **options))

    def place(self, pipeline: Any, device: torch.device, *, offload: Offload = "none") -> None:
        """Move a pipeline to a device, and let it decode a batch one image at a time there.

        Args:
            pipeline: diffusers pipeline, changed in place.
            device: Device that encodes and decodes.
            offload: See `RunSettings.offload`; not `auto`. `all` is the same as `encoders` here.
        """
        resident = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
        if offload in ("encoders", "all"):
            for name in [name for name in resident if name.startswith("text_encoder")]:
                cpu_offload(resident.pop(name), execution_device=device)
            decode_in_tiles(pipeline.vae)
        for part in resident.values():
            part.to(device)
        if device.type != "cpu":
            pipeline.vae.enable_slicing()

    def prepare_transformer(self, transformer: Any) -> None:  # noqa: B027
        """Make a transformer accept tensors where diffusers passes Python objects. Diffusers' own calls work as before."""

    def rows_of(self, module_name: str) -> RowSet | None:
        """Return which rows the linear `module_name` projects; None if sliders cannot scale it."""
        return next((rows for rows, pattern in self.linears.items() if re.fullmatch(pattern, module_name)), None)

    @abstractmethod
    def targets(self, kind: Kind, *, all_projections: bool = False) -> re.Pattern[str]:
        """Return a pattern for the names (full match) of the linears that an adapter of this kind is trained on.

        Args:
            kind: `st` or `gst`.
            all_projections: Match every linear whose rows the kind can scale, instead of those of the released adapters. ST
                can scale text rows and joint rows, GST all rows.
        """

    def has_proportions(self, module_name: str, in_features: int, out_features: int) -> bool:
        """Return whether a linear of these sizes can be `module_name`, to tell families apart whose files share names."""
        outputs = next((ratio for pattern, ratio in self.proportions.items() if re.fullmatch(pattern, module_name)), None)
        return outputs is None or out_features == outputs * in_features

    def is_modulation(self, module_name: str) -> bool:
        """Return whether a linear computes a block's shifts, scales and gates from the timestep."""
        return re.fullmatch(self.modulation, module_name) is not None

    def keeps_precision(self, module_name: str, config: Mapping[str, Any]) -> bool:
        """Return whether a projection or a modulation linear is too sensitive to be quantised.

        Args:
            module_name: Name of the linear.
            config: Configuration of the transformer.
        """
        return False

    @abstractmethod
    def input_specs(self, config: Mapping[str, Any], dtype: str = "float32") -> list[TensorSpec]:
        """Return the backbone's own inputs, without slider inputs.

        Args:
            config: Configuration of the transformer.
            dtype: Dtype of its arithmetic, as torch names it, which keys and values of source images have. All other
                floating-point inputs are float32.
        """

    @abstractmethod
    def output_spec(self, config: Mapping[str, Any]) -> TensorSpec:
        """Return the prediction, the backbone's first output, for a transformer's configuration."""

    def output_specs(self, config: Mapping[str, Any], dtype: str = "float32") -> list[TensorSpec]:
        """Return all of the backbone's outputs (see `input_specs`)."""
        return [self.output_spec(config)]

    @abstractmethod
    def random_inputs(
        self, config: Mapping[str, Any], batch: int, text_rows: int, image_rows: int, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Make valid random inputs of the backbone on the CPU, for export and verification."""

    @abstractmethod
    def run(self, transformer: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """Call the diffusers transformer with the inputs listed by `input_specs`; return `[B, image_rows, C]`."""

    def outputs(self, transformer: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Call the transformer like `run`; return the outputs listed by `output_specs`."""
        return (self.run(transformer, inputs),)

    def read(self, transformer: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """Read source images. For families that read them once.

        Args:
            transformer: diffusers transformer.
            inputs: Result of `read_inputs`.

        Returns:
            Keys and values of the rows, in the transformer's dtype, `[blocks, 2, 1, kept_rows, heads, D]`, for `with_read`.
        """
        raise NotImplementedError

    def read_inputs(self, config: Mapping[str, Any], sources: EncodedImages) -> dict[str, Tensor]:
        """Return the inputs of `read`, without those of the sliders. For families that read source images once.

        Args:
            config: Configuration of the transformer.
            sources: Source images from `encode_sources`.
        """
        raise NotImplementedError

    def with_read(self, sources: EncodedImages, keys_values: Tensor) -> EncodedImages:
        """Replace the latents of source images by what `read` returned. For families that read source images once."""
        raise NotImplementedError

    def step_rows(self, rows: int) -> int:
        """Return the image rows of a step that edits one source image, where the edited image and the source have `rows`."""
        return 2 * rows

    def side(self, pipeline: Any) -> int:
        """Return the edge of the square that the base edits, in pixels: the autoencoder's `sample_size`, else 1024."""
        return int(pipeline.vae.config.get("sample_size", 1024))

    def default_steps(self, pipeline: Any) -> int:
        """Return the number of denoising steps of an edit that does not set it."""
        return self.num_inference_steps

    def default_true_cfg_scale(self, pipeline: Any) -> float:
        """Return the scale of true classifier-free guidance of an edit that does not set it."""
        return self.true_cfg_scale

    def takes_several_images(self, pipeline: Any) -> bool:
        """Return whether an edit can have more than one source image."""
        return False

    @abstractmethod
    def max_text_rows(self, pipeline: Any) -> int:
        """Return the largest number of text rows that the backbone reads."""

    @abstractmethod
    def tokenize(self, pipeline: Any, prompt: str, images: Sequence[Image.Image] = ()) -> list[PromptToken]:
        """Return the untruncated tokens of a prompt with their characters and text rows.

        Args:
            pipeline: diffusers pipeline.
            prompt: Text to tokenize.
            images: Images of the edit, if the text encoder reads them ahead of the prompt; one square if none is given.
        """

    @abstractmethod
    def encode_prompt(
        self, pipeline: Any, prompts: list[str], text_rows: int, images: Sequence[Sequence[Image.Image]] = ()
    ) -> dict[str, Tensor]:
        """Encode prompts to the text inputs of the backbone, one batch row per prompt.

        Args:
            pipeline: diffusers pipeline.
            prompts: Texts to encode.
            text_rows: Number of rows that prompts are padded or truncated to, at most `max_text_rows`.
            images: Images of each prompt, if the text encoder reads them.
        """

    @abstractmethod
    def encode_image(self, pipeline: Any, images: Tensor) -> tuple[Tensor, Tensor]:
        """Encode images to latents.

        Args:
            pipeline: diffusers pipeline.
            images: `[B, 3, H, W]` in [−1, 1].

        Returns:
            Packed latents `[B, rows, C]`, and position ids for their rows as rows of the noisy image.
        """

    @abstractmethod
    def training_inputs(
        self, pipeline: Any, noisy: Tensor, reference: Tensor, ids: Tensor, text: Mapping[str, Tensor], sigma: Tensor
    ) -> dict[str, Tensor]:
        """Return the backbone inputs of a training step.

        Args:
            pipeline: diffusers pipeline.
            noisy: Latents of the noisy image, `[B, rows, C]`.
            reference: Latents of the reference image, `[B, rows, C]`.
            ids: Position ids from `encode_image`.
            text: Text inputs from `encode_prompt`.
            sigma: Noise levels, `[B]` in [0, 1].
        """

    @abstractmethod
    def encode_sources(self, pipeline: Any, images: Sequence[Image.Image]) -> EncodedImages:
        """Encode the source images of an edit: one, or several if `takes_several_images`."""

    def draw_noise(self, pipeline: Any, height: int, width: int, seed: int) -> Tensor:
        """Draw the initial noise as diffusers does; return float32 `[1, latent_rows, C]`.

        On the CPU, so that a seed gives the same noise whatever device an edit runs on.

        Args:
            pipeline: diffusers pipeline.
            height: Height of the image, in pixels.
            width: Width of the image, in pixels.
            seed: Seed that passes `slideredit_rt.settings.check_seed`.
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
        """Combine the encoded parts of an edit.

        Args:
            sources: Source images from `encode_sources`.
            text: Text inputs of one prompt from `encode_prompt`.
            negative: Text inputs of the negative prompt; None runs without a negative pass.
            latents: Noise from `draw_noise`.
            guidance_scale: Scale of the embedded guidance; None for a family without it.
            true_cfg_scale: Scale of the guidance away from `negative`.
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
        """Resize an image to the size that the base edits; return `[1, 3, H, W]` in [−1, 1]."""

    def shift(self, config: Mapping[str, Any], latent_rows: int, steps: int) -> float:
        """Return how far noise levels shift towards noise (diffusers' `mu`).

        Args:
            config: Configuration of the scheduler.
            latent_rows: Rows of the edited image.
            steps: Denoising steps.
        """
        mu: float = calculate_shift(
            latent_rows,
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.15),
        )
        return mu

    def schedule(self, pipeline: Any, latent_rows: int, steps: int) -> Schedule:
        """Return the noise levels of a run, on the CPU.

        They follow diffusers' flow matching and shift with the number of latent rows (see `shift`).

        Args:
            pipeline: diffusers pipeline, for its scheduler.
            latent_rows: Rows of the edited image.
            steps: Denoising steps.

        Raises:
            SliderEditError: The scheduler is not the Euler method for flow matching, or cannot make a schedule of this length.
        """
        scheduler = copy.deepcopy(pipeline.scheduler)
        config = scheduler.config
        if type(scheduler) is not FlowMatchEulerDiscreteScheduler or config.get("stochastic_sampling"):
            raise SliderEditError(
                f"this base's scheduler is a {type(scheduler).__name__}, and edits need a FlowMatchEulerDiscreteScheduler "
                "without stochastic sampling; change scheduler/scheduler_config.json of the base"
            )
        mu = self.shift(config, latent_rows, steps)
        sigmas = np.linspace(1.0, 1 / steps, steps)
        timesteps: Tensor = retrieve_timesteps(scheduler, steps, "cpu", sigmas=sigmas, mu=mu)[0]
        # `shift_terminal` stretches a schedule to a last noise level, which divides by zero for a single step.
        if not torch.isfinite(timesteps).all():
            raise SliderEditError(f"this base's scheduler cannot make a schedule of {steps} step; use at least 2 steps")
        return Schedule(timesteps / 1000, scheduler.sigmas.diff())

    def fix_shift(self, pipeline: Any, shift: float) -> None:
        """Make a pipeline's scheduler shift noise levels by a fixed amount, for any size and number of steps.

        Args:
            pipeline: diffusers pipeline, changed in place.
            shift: Shift s; a noise level σ becomes `s σ / (1 + (s − 1) σ)`.
        """
        fixed = {"use_dynamic_shifting": False, "shift": shift, "shift_terminal": None}
        pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, **fixed)

    @abstractmethod
    def decode_pixels(self, pipeline: Any, latents: Tensor, height: int, width: int) -> Tensor:
        """Decode latents `[B, latent_rows, C]` to images `[B, 3, height, width]` in about [−1, 1], without clamping."""

    @abstractmethod
    def latent_grid(self, pipeline: Any, latents: Tensor, height: int, width: int) -> Tensor:
        """Arrange latents `[B, latent_rows, C]` of an image with this size in pixels as `[B, channels, h, w]`.

        Values stay as the transformer has them. Tiny autoencoders for previews read latents in this form.
        """

    @torch.no_grad()
    def decode(self, pipeline: Any, latents: Tensor, height: int, width: int) -> Tensor:
        """Decode latents `[B, latent_rows, C]` to images `[B, 3, height, width]` in [0, 1], see `to_images`."""
        return self.to_images(pipeline, latents, self.decode_pixels(pipeline, latents, height, width))

    def to_images(self, pipeline: Any, latents: Tensor, pixels: Tensor) -> Tensor:
        """Convert decoded pixels to images in [0, 1].

        An image that is not finite before or after the autoencoder is filled with NaN. Otherwise, clamping would turn
        infinities into colours, and normalisation in the autoencoder could hide them.

        Args:
            pipeline: diffusers pipeline.
            latents: Latents that were decoded, `[B, latent_rows, C]`.
            pixels: Result of the autoencoder, `[B, 3, height, width]` in about [−1, 1].
        """
        finite = latents.isfinite().flatten(1).all(1) & pixels.isfinite().flatten(1).all(1)
        images: Tensor = pipeline.image_processor.postprocess(pixels.float(), output_type="pt")
        return images.masked_fill(~finite[:, None, None, None], torch.nan)

    def batch_inputs(
        self, config: Mapping[str, Any], conditioning: Conditioning, alpha: Tensor, token_mask: Tensor
    ) -> dict[str, Tensor]:
        """Allocate the backbone inputs for one batch of slider settings, which `predict` then updates in place.

        Args:
            config: Configuration of the transformer.
            conditioning: Encoded edit.
            alpha: float32 `[B, K]`, for a bank `[B, K, G]`.
            token_mask: Bool `[B, K, S]`.
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
        """Return the backbone inputs of the negative pass for `inputs` from `batch_inputs`; None without a negative pass.

        Sliders are off: every alpha is 0 and every mask is empty. Latents and timestep are shared with `inputs`.
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
        """Predict the velocity for latents at one timestep; return `[B, latent_rows, C]`.

        Args:
            backbone: Function that runs the backbone, such as an engine.
            inputs: Backbone inputs from `batch_inputs`, updated in place.
            latents: `[B, latent_rows, C]`.
            timestep: Noise level in [0, 1] from a `Schedule`, one for all rows or `[B]`.
            negative: Inputs of the negative pass from `negative_inputs`; None runs a single pass without guidance.
            true_cfg_scale: Scale of the guidance between the two passes; `[B, 1, 1]` gives each row its own.
        """
        rows = latents.shape[1]
        inputs["hidden_states"][:, :rows].copy_(latents)
        inputs["timestep"].copy_(timestep)
        prediction = backbone(inputs)[:, :rows]
        if negative is None:
            return prediction
        # Clone, because an engine's next call may overwrite its output.
        return self.guide(prediction.clone(), backbone(negative)[:, :rows], true_cfg_scale)

    def guide(self, prediction: Tensor, negative: Tensor, scale: float | Tensor) -> Tensor:
        """Apply classifier-free guidance to the predictions of two passes, `[B, latent_rows, C]`.

        Args:
            prediction: Prediction of the pass with the prompt.
            negative: Prediction of the negative pass.
            scale: Scale of the guidance; `[B, 1, 1]` gives each row its own.
        """
        return negative + scale * (prediction - negative)
