"""`SliderEditor`, which encodes an image and a prompt once and then denoises any slider settings with one engine."""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from slideredit_rt.adapters import AdapterSource, Fused, load_adapters, read_updates
from slideredit_rt.assets import resolve_base
from slideredit_rt.denoising import Denoising, fill_batch, frozen_steps
from slideredit_rt.engines import check_run, open_engine
from slideredit_rt.engines.adapter_inputs import AdaptedEngine, no_adapter
from slideredit_rt.engines.eager import EagerEngine
from slideredit_rt.engines.manifest import ADAPTER_FILE, check_base, read_manifest
from slideredit_rt.engines.request import as_reader
from slideredit_rt.errors import OutOfDeviceMemory, SliderEditError
from slideredit_rt.families import Backbone, Conditioning, EncodedImages, Family, family_of, get_family
from slideredit_rt.images import ImageSource
from slideredit_rt.loaded_adapters import LoadedAdapter, LoadedAdapters
from slideredit_rt.memory import ServerParts
from slideredit_rt.modules import SliderBackbone
from slideredit_rt.placement import Placement, choose_placement
from slideredit_rt.preparing import Guidance, Prepared, Preparer, Remember
from slideredit_rt.preview_decoder import PreviewDecoder
from slideredit_rt.settings import EditDefaults, EditOptions, EditSettings, RunSettings, merge
from slideredit_rt.sliders import Controls, Slider
from slideredit_rt.strength import Strength, StrengthCurve, is_constant

# Diffusers and transformers change process-wide state while they load.
_LOADING = threading.Lock()


class SliderEditor:
    """Image editor with sliders. Create one with `from_engine` or `from_pretrained`.

    Thread-safe: steps of different threads run concurrently as far as the engine allows; encoding and decoding run one after
    the other.

    Attributes:
        family: Base-model family.
        pipeline: diffusers pipeline that encodes and decodes.
        engine: Engine that runs the backbone; it never changes during the life of the editor.
        adapters: Adapters on the device of an engine with adapter inputs; None for an engine that contains its adapter.
        adapter: The one that was chosen for an engine with adapter inputs; None without a choice, and for other engines.
        config: Configuration of the transformer.
        controls: Kind of the sliders, their strength curves and the members of a bank.
        min_batch: Smallest batch of the engine.
        max_batch: Largest batch of the engine.
        max_sliders: Largest number of sliders of the engine.
        placement: Parts that `from_engine` left in host memory, and why.
        defaults: Values that an engine has for settings that an edit does not set.
        preview_decoder: Decoder of previews; None decodes them like all images.
    """

    min_batch = 1
    defaults = EditDefaults()
    placement = Placement(RunSettings(offload="none"))
    adapters: LoadedAdapters | None = None
    adapter: LoadedAdapter | None = None
    preview_decoder: PreviewDecoder | None = None

    def __init__(
        self,
        family: Family,
        pipeline: Any,
        engine: Backbone,
        config: dict[str, Any],
        controls: Controls,
        *,
        max_batch: int,
        max_sliders: int,
    ) -> None:
        self.family = family
        self.pipeline = pipeline
        self.engine = engine
        self.config = config
        self.controls = controls
        self.max_batch = max_batch
        self.max_sliders = max_sliders
        # Tokenizers, text encoders and autoencoders have state during a call.
        self._pipeline_lock = threading.RLock()

    @property
    def device(self) -> torch.device:
        """Device that encodes, denoises and decodes: the pipeline's."""
        device: torch.device = self.pipeline.vae.device
        return device

    @property
    def default_steps(self) -> int:
        """Denoising steps of an edit that does not set them."""
        given = self.defaults.steps
        return self.family.default_steps(self.pipeline) if given is None else given

    @property
    def default_guidance_scale(self) -> float | None:
        """Scale of the embedded guidance of an edit that does not set it; None for a family without it."""
        given = self.defaults.guidance_scale
        return self.family.guidance_scale if given is None else given

    @property
    def default_true_cfg_scale(self) -> float:
        """Scale of guidance with a negative pass of an edit that does not set it; 1 runs without the pass."""
        given = self.defaults.true_cfg_scale
        return self.family.default_true_cfg_scale(self.pipeline) if given is None else given

    @property
    def default_slider_start(self) -> float:
        """Fraction of the steps before the sliders act, of an edit that does not set it."""
        given = self.defaults.slider_start
        return 0.0 if given is None else given

    @property
    def kind(self) -> str:
        """Kind of the adapter, `st` or `gst`."""
        return self.controls.kind

    @property
    def curve(self) -> StrengthCurve:
        """Curve from strength to alpha, see `Controls.curve`."""
        return self.controls.curve

    @property
    def members(self) -> Mapping[str, StrengthCurve]:
        """Strength curves of a bank's adapters by name, see `Controls.members`; empty without a bank."""
        return self.controls.members

    @classmethod
    def from_engine(
        cls,
        path: str | Path,
        base: str | Path | None = None,
        run: RunSettings | None = None,
        server: ServerParts | None = None,
    ) -> SliderEditor:
        """Open an engine folder.

        An engine with adapter inputs starts with its default adapter; choose another one with `use_adapter`.

        Args:
            path: Folder written by `slideredit-rt build`.
            base: Folder, hub repository or embedded name of the base, which holds the encoders and the decoder; None takes the
                source recorded in the manifest.
            run: Device, threads and options of the engine, dtype of encoders and autoencoder, and what is offloaded; None
                uses the defaults. The logger `slideredit_rt.notes` tells what `auto` decided.
            server: Parts that a server will keep on the device, for the decision of `auto`; None without a server.

        Raises:
            SliderEditError: The engine is damaged or cannot run here, it was built from another base, or an edit does not fit
                into the GPU's free memory.
        """
        run, manifest = run or RunSettings(), read_manifest(Path(path))
        device = check_run(Path(path), manifest, run)
        if manifest.kind is None:
            raise SliderEditError(
                f"engine {str(path)!r} was built without an adapter and has no sliders; rebuild it with --adapter"
            )
        family = get_family(manifest.family)
        folder = resolve_base(base if base is not None else manifest.base["source"])
        if (found := family_of(folder)) is not family:
            raise SliderEditError(
                f"base {str(folder)!r} is a {found.name}, but engine {str(path)!r} was built from a {family.name}; "
                "pass the original base or rebuild the engine"
            )
        check_base(manifest, Path(path), folder, skip=("transformer",))
        with _LOADING:
            placement = choose_placement(Path(path), manifest, folder, run, device, server=server)
        _, engine = open_engine(Path(path), placement.run, manifest)
        with _LOADING:
            pipeline = family.load_pipeline(folder, transformer=False, dtype=run.choose_dtype(engine.device))
            try:
                family.place(pipeline, engine.device, offload=placement.run.offload)
            except torch.OutOfMemoryError:
                raise OutOfDeviceMemory(
                    "the GPU is out of memory for the encoders and the autoencoder; free some, or use --offload encoders"
                ) from None
        controls = Controls(manifest.kind, manifest.curve, manifest.members, manifest.member_kinds)
        limits = {"max_batch": manifest.max_batch, "max_sliders": manifest.max_sliders}
        editor = cls(family, pipeline, engine, manifest.config, controls, **limits)
        editor.placement, editor.defaults, editor.min_batch = placement, manifest.edit_defaults, manifest.min_batch
        if editor.defaults.timestep_shift is not None:
            family.fix_shift(pipeline, editor.defaults.timestep_shift)
        if manifest.layout is None:
            return editor
        editor.adapters = LoadedAdapters(engine, manifest)
        editor.engine = AdaptedEngine(engine, manifest, None)
        return editor if manifest.adapter is None else editor.use_adapter(Path(path) / ADAPTER_FILE)

    @classmethod
    def from_pretrained(
        cls,
        base: str | Path,
        adapter: AdapterSource,
        *,
        max_batch: int = 16,
        max_sliders: int = 8,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        fuse: Sequence[Fused] = (),
    ) -> SliderEditor:
        """Load a checkpoint and an adapter for eager torch, which is slower than an engine and serves as its reference.

        Args:
            base: Embedded name, folder or hub repository of a diffusers pipeline.
            adapter: Embedded name, file, folder or loaded adapter; several make a bank.
            max_batch: Largest batch.
            max_sliders: Largest number of sliders.
            dtype: Dtype of all weights and arithmetic.
            device: `cpu`, `cuda` or `cuda:N`.
            fuse: LoRAs that are added to the transformer's weights.

        Raises:
            SliderEditError: The base, the adapter or a LoRA cannot be loaded, or they do not fit.
        """
        place = RunSettings(device).choose_device()
        folder = resolve_base(base)
        family = family_of(folder)
        with _LOADING:
            pipeline = family.load_pipeline(folder, dtype=dtype)
            read_updates(fuse, family, pipeline.transformer).fuse_into(pipeline.transformer)
            family.place(pipeline, place)
        loaded = load_adapters(adapter, family)
        backbone = SliderBackbone(family, pipeline.transformer.eval(), loaded).to(place, dtype)
        config = dict(pipeline.transformer.config)
        curves = {name: member.curve for name, member in loaded.members.items()}
        kinds = {name: member.kind for name, member in loaded.members.items()}
        controls = Controls(loaded.kind, loaded.curve, curves, kinds)
        limits = {"max_batch": max_batch, "max_sliders": max_sliders}
        return cls(family, pipeline, EagerEngine(backbone, place), config, controls, **limits)

    def use_adapter(self, source: AdapterSource) -> SliderEditor:
        """Return an editor with another adapter for the same engine, which must have adapter inputs.

        Both editors share the engine, the encoders and the decoder, and can be used at the same time. The adapter is read and
        copied to the device when it is used first, and kept there as long as `adapters.max_bytes` allows.

        Args:
            source: Embedded name, file or folder of an adapter, or a loaded one.

        Raises:
            SliderEditError: The engine contains its adapter, or the adapter cannot be read or does not fit the engine (see
                `slideredit_rt.adapters.AdapterInputs.check`).
        """
        if self.adapters is None:
            raise SliderEditError(
                "this engine contains its adapter, so it cannot run another one; build an engine with --adapter-inputs"
            )
        editor = copy.copy(self)
        editor.adapter = chosen = self.adapters.of(source)
        editor.engine, editor.controls = chosen.engine, chosen.controls
        return editor

    def check_adapter(self) -> None:
        """Check that an engine with adapter inputs has an adapter.

        Raises:
            SliderEditError: It has no default adapter, and none was chosen.
        """
        if self.adapters is not None and self.adapter is None:
            raise no_adapter()

    def prepare(
        self,
        image: ImageSource | Sequence[ImageSource],
        sliders: Sequence[Slider | str],
        settings: EditSettings | None = None,
        *,
        remember: Remember | None = None,
        **given: Unpack[EditOptions],
    ) -> Prepared:
        """Encode an image and a prompt and find the rows of each slider.

        Args:
            image: Image to edit, in memory or as a path, of any mode (see `slideredit_rt.images.as_rgb`); several for a base
                that takes them.
            sliders: Instructions, or sliders, whose strengths are not used here.
            settings: Settings of the edit; None takes the defaults.
            remember: Cache for encodings. Keys of `images` and `keys_values` depend on the images, those of `tokens` and `text`
                on the prompt, and also on the images if the text encoder reads them. None encodes everything.
            **given: Fields that replace those of `settings`, such as `prompt` or `seed`.

        Raises:
            SliderEditError: No adapter was chosen for an engine that needs one, an image cannot be read, a setting is not valid
                for this base, there are too many sliders, or a slider's instruction is not in the prompt.
        """
        self.check_adapter()
        preparer = Preparer(
            self.family,
            self.pipeline,
            self.read,
            self.controls,
            self.max_sliders,
            Guidance(self.default_guidance_scale, self.default_true_cfg_scale),
            self._pipeline_lock,
        )
        return preparer.prepare(image, sliders, merge(settings, given), remember)

    @torch.no_grad()
    def read(self, sources: EncodedImages) -> Tensor:
        """Compute the keys and values of source images with the engine, for a family that reads them once.

        Args:
            sources: Source images from the family's `encode_sources`.

        Returns:
            `[blocks, 2, 1, rows, heads, D]` in the engine's dtype, keys before values, on the device of the source images.

        Raises:
            SliderEditError: The engine cannot read source images.
        """
        engine = as_reader(self.engine, self.family.name)
        # Clone, because the engine's next call may overwrite its output.
        return engine.read(self.family.read_inputs(self.config, sources)).to(sources.reference.device).clone()

    def alphas(self, prepared: Prepared, strengths: Sequence[Sequence[Strength]], fraction: float = 0.0) -> Tensor:
        """Convert N settings of K strengths to the engine's alphas, see `Controls.alphas`.

        Args:
            prepared: Result of `prepare`.
            strengths: N settings of K strengths each.
            fraction: Fraction of the run, for strengths that are schedules.

        Returns:
            Float32 `[N, K]`, for a bank `[N, K, G]`.

        Raises:
            SliderEditError: There is no setting, a setting does not have K strengths, or a strength is not finite or its alpha
                exceeds float32.
        """
        return self.controls.alphas(prepared.instructions, prepared.members, strengths, fraction)

    def alphas_of_run(self, prepared: Prepared, strengths: Sequence[Sequence[Strength]], settings: EditSettings) -> Tensor:
        """Return the alphas of every step: float32 `[steps, N, K]`, for a bank `[steps, N, K, G]`.

        Args:
            prepared: Result of `prepare`.
            strengths: N settings of K strengths each.
            settings: Settings with the number of steps and the start of the sliders, before which every alpha is 0.

        Raises:
            SliderEditError: See `alphas`.
        """
        steps, frozen = self.number_of_steps(settings), self.frozen_steps(settings)
        varying = not is_constant(strengths)
        alphas = torch.stack([self.alphas(prepared, strengths, i / steps) for i in range(steps if varying else 1)])
        alphas = alphas.expand(steps, *alphas.shape[1:]).clone()
        alphas[:frozen] = 0
        return alphas

    def backbone_inputs(self, prepared: Prepared, alpha: Tensor) -> dict[str, Tensor]:
        """Return the backbone inputs of one batch.

        Args:
            prepared: Result of `prepare`.
            alpha: Result of `alphas`, with N up to `max_batch`.
        """
        token_mask = prepared.token_mask.expand(len(alpha), -1, -1)
        return self.family.batch_inputs(self.config, prepared.conditioning, alpha, token_mask)

    def frozen_inputs(self, prepared: Prepared, batch: int) -> dict[str, Tensor]:
        """Return backbone inputs of `batch` rows with all sliders off, for callers that change other inputs."""
        bank = (len(self.members),) if self.members else ()
        return self.backbone_inputs(prepared, torch.zeros(batch, len(prepared.instructions), *bank))

    def render(
        self,
        prepared: Prepared,
        strengths: Sequence[Sequence[Strength]],
        *,
        steps: int | None = None,
        slider_start: float | None = None,
        progress: bool = False,
    ) -> list[Image.Image]:
        """Denoise one image per slider setting, all from the same noise, in batches up to the engine's limit.

        A batch below the engine's smallest is filled with rows whose results are dropped. The steps before `slider_start` are
        made once for all settings.

        Args:
            prepared: Result of `prepare`.
            strengths: N settings of K strengths each.
            steps: Denoising steps; None takes those of `prepared`.
            slider_start: Fraction of the steps before the sliders act, see `EditSettings`; None takes that of `prepared`.
            progress: Show a progress bar on standard error.

        Returns:
            N RGB images.

        Raises:
            SliderEditError: `alphas` refuses the strengths, a setting is not valid, or an image contains NaN or infinity.
        """
        pixels = self.render_tensor(prepared, strengths, steps=steps, slider_start=slider_start, progress=progress)
        return self.to_images(pixels)

    def to_images(self, pixels: Tensor) -> list[Image.Image]:
        """Convert float32 `[N, 3, H, W]` in [0, 1] to RGB images."""
        processor = self.pipeline.image_processor
        images: list[Image.Image] = processor.numpy_to_pil(processor.pt_to_numpy(pixels))
        return images

    def number_of_steps(self, settings: EditSettings) -> int:
        """Return the number of denoising steps of an edit with these settings."""
        return self.default_steps if settings.steps is None else settings.steps

    def frozen_steps(self, settings: EditSettings) -> int:
        """Return the number of first steps in which the sliders do not act, for an edit with these settings."""
        start = self.default_slider_start if settings.slider_start is None else settings.slider_start
        return frozen_steps(start, self.number_of_steps(settings))

    @torch.no_grad()
    def render_tensor(
        self,
        prepared: Prepared,
        strengths: Sequence[Sequence[Strength]],
        *,
        steps: int | None = None,
        slider_start: float | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Denoise like `render`, but without rounding to 8 bits.

        Args:
            prepared: Result of `prepare`.
            strengths: N settings of K strengths each.
            steps: Denoising steps; None takes those of `prepared`.
            slider_start: Fraction of the steps before the sliders act, see `EditSettings`; None takes that of `prepared`.
            progress: Show a progress bar on standard error.

        Returns:
            Float32 `[N, 3, H, W]` in [0, 1].

        Raises:
            SliderEditError: `alphas` refuses the strengths, a setting is not valid, or an image contains NaN or infinity.
        """
        settings = prepared.settings
        settings = settings if steps is None else replace(settings, steps=steps)
        settings = settings if slider_start is None else replace(settings, slider_start=slider_start)
        alphas = self.alphas_of_run(prepared, strengths, settings)
        run, frozen, conditioning = len(alphas), self.frozen_steps(settings), prepared.conditioning
        chunks = alphas.split(self.max_batch, dim=1)
        images = []
        with tqdm(total=frozen + (run - frozen) * len(chunks), desc="denoise", disable=not progress, leave=False) as bar:
            latents = conditioning.latents
            if frozen:
                # One row makes the steps that all settings share, whatever their number.
                latents = self._denoise_rows(prepared, latents, alphas[:, :1], range(frozen), bar)
            for chunk in chunks:
                rows = self._denoise_rows(prepared, latents, chunk, range(frozen, run), bar)
                images.append(self.decode(rows, conditioning.height, conditioning.width))
        together = torch.cat(images).cpu()
        for row in broken_rows(together):
            raise not_finite(prepared.instructions, strengths[row])
        return together

    def _denoise_rows(self, prepared: Prepared, latents: Tensor, alphas: Tensor, steps: range, bar: tqdm[Any]) -> Tensor:
        """Return `[B, latent_rows, C]` after some of the steps of B settings, all from the same `latents` of one row.

        Args:
            prepared: Result of `prepare`.
            latents: `[1, latent_rows, C]` before the first of the steps.
            alphas: Alphas of every step of the run, `[run, B, K]`, for a bank `[run, B, K, G]`; B is at most `max_batch`.
            steps: Indices of the steps to make.
            bar: Progress bar that advances by one per step.
        """
        filled = fill_batch(alphas, self.min_batch, dim=1)
        denoising = self._denoising(prepared.conditioning, self.backbone_inputs(prepared, filled[0]), len(alphas))
        rows = denoising.run(latents.repeat(filled.shape[1], 1, 1), filled.to(latents.device), steps, bar)
        return rows[: alphas.shape[1]]

    @torch.no_grad()
    def denoise(
        self,
        conditioning: Conditioning,
        inputs: dict[str, Tensor],
        steps: int,
        true_cfg_scale: float | Tensor = 1.0,
        bar: tqdm[Any] | None = None,
    ) -> Tensor:
        """Denoise one batch from the noise of `conditioning`.

        Args:
            conditioning: Encoded edit.
            inputs: Backbone inputs from the family's `batch_inputs`. Callers may change them, and every row may differ.
            steps: Denoising steps.
            true_cfg_scale: Scale of the guidance away from `conditioning.negative`, unused without one; a tensor `[B, 1, 1]`
                gives each row its own.
            bar: Progress bar that advances by one per step.

        Returns:
            Float32 `[B, 3, H, W]` in [0, 1].

        Raises:
            SliderEditError: An image contains NaN or infinity.
        """
        alpha = inputs["alpha"].clone()
        latents = conditioning.latents.repeat(len(alpha), 1, 1)
        denoising = self._denoising(conditioning, inputs, steps, true_cfg_scale)
        latents = denoising.run(latents, alpha.expand(steps, *alpha.shape), range(steps), bar)
        images = self.decode(latents, conditioning.height, conditioning.width).cpu()
        for row in broken_rows(images):
            raise SliderEditError(
                f"row {row} of a batch, with alpha {alpha[row].tolist()}, produced NaN or infinity; use smaller alphas"
            )
        return images

    def _denoising(
        self,
        conditioning: Conditioning,
        inputs: dict[str, Tensor],
        steps: int,
        true_cfg_scale: float | Tensor | None = None,
    ) -> Denoising:
        """Return the run of one batch; without a true-CFG scale, it takes that of `conditioning`."""
        schedule = self.family.schedule(self.pipeline, conditioning.latents.shape[1], steps)
        return Denoising(
            self.family,
            self.engine,
            inputs,
            self.family.negative_inputs(self.config, conditioning, inputs),
            schedule.to(conditioning.latents.device),
            conditioning.true_cfg_scale if true_cfg_scale is None else true_cfg_scale,
        )

    @torch.no_grad()
    def decode(self, latents: Tensor, height: int, width: int, *, preview: bool = False) -> Tensor:
        """Decode latents `[B, latent_rows, C]` to images `[B, 3, height, width]` in [0, 1].

        An image that is not finite before or after the autoencoder is filled with NaN (see `broken_rows`).

        Args:
            latents: Latents of B images.
            height: Height of the images, in pixels.
            width: Width of the images, in pixels.
            preview: Use `preview_decoder`, if there is one.
        """
        with self._pipeline_lock:
            if preview and self.preview_decoder is not None:
                return self.preview_decoder.decode(latents, height, width)
            return self.family.decode(self.pipeline, latents, height, width)

    def edited_size(self, images: Sequence[Image.Image]) -> tuple[int, int]:
        """Return the width and height of an edit of these RGB images, in pixels."""
        height, width = self.family.preprocess(self.pipeline, images[self.family.sized_by]).shape[-2:]
        return width, height

    def edit(
        self,
        image: ImageSource | Sequence[ImageSource],
        sliders: Sequence[Slider],
        settings: EditSettings | None = None,
        *,
        progress: bool = False,
        **given: Unpack[EditOptions],
    ) -> Image.Image:
        """Edit an image at the sliders' own strengths.

        Args:
            image: Image or images to edit, see `prepare`.
            sliders: Sliders with their strengths.
            settings: Settings of the edit; None takes the defaults.
            progress: Show a progress bar on standard error.
            **given: Fields that replace those of `settings`, such as `prompt` or `seed`.

        Raises:
            SliderEditError: See `prepare` and `render`.
        """
        prepared = self.prepare(image, sliders, settings, **given)
        return self.render(prepared, [[s.strength for s in sliders]], progress=progress)[0]

    def sweep(
        self,
        image: ImageSource | Sequence[ImageSource],
        sliders: Sequence[Slider],
        index: int,
        strengths: Sequence[float],
        settings: EditSettings | None = None,
        *,
        progress: bool = False,
        **given: Unpack[EditOptions],
    ) -> list[Image.Image]:
        """Move one slider through several strengths while the others keep their own.

        Args:
            image: Image or images to edit, see `prepare`.
            sliders: Sliders with their strengths.
            index: Index of the slider to move.
            strengths: Strengths of that slider.
            settings: Settings of the edit; None takes the defaults.
            progress: Show a progress bar on standard error.
            **given: Fields that replace those of `settings`, such as `prompt` or `seed`.

        Returns:
            One image per strength.

        Raises:
            SliderEditError: See `prepare` and `render`.
        """
        prepared = self.prepare(image, sliders, settings, **given)
        moved = [[s.strength for s in with_strength(sliders, {index: value})] for value in strengths]
        return self.render(prepared, moved, progress=progress)

    def grid(
        self,
        image: ImageSource | Sequence[ImageSource],
        sliders: Sequence[Slider],
        rows: tuple[int, Sequence[float]],
        columns: tuple[int, Sequence[float]],
        settings: EditSettings | None = None,
        *,
        progress: bool = False,
        **given: Unpack[EditOptions],
    ) -> list[list[Image.Image]]:
        """Move two sliders through several strengths each while the others keep their own.

        Args:
            image: Image or images to edit, see `prepare`.
            sliders: Sliders with their strengths.
            rows: Index and strengths of the slider that moves from row to row.
            columns: Index and strengths of the slider that moves from column to column.
            settings: Settings of the edit; None takes the defaults.
            progress: Show a progress bar on standard error.
            **given: Fields that replace those of `settings`, such as `prompt` or `seed`.

        Returns:
            A list of rows, each with one image per column.

        Raises:
            SliderEditError: See `prepare` and `render`.
        """
        prepared = self.prepare(image, sliders, settings, **given)
        moved = [
            [s.strength for s in with_strength(sliders, {rows[0]: down, columns[0]: across})]
            for down in rows[1]
            for across in columns[1]
        ]
        images = self.render(prepared, moved, progress=progress)
        width = len(columns[1])
        return [images[i : i + width] for i in range(0, len(images), width)]


def broken_rows(images: Tensor) -> list[int]:
    """Return the indices of images `[B, …]` from `SliderEditor.decode` that are not finite."""
    return images.isnan().flatten(1).any(1).nonzero().flatten().tolist()


def not_finite(instructions: Sequence[str], strengths: Sequence[Strength]) -> SliderEditError:
    """Make the error for an edit whose image is not finite."""
    setting = " and ".join(f"{i!r} at strength {s:g}" for i, s in zip(instructions, strengths, strict=True))
    return SliderEditError(
        f"the edit with {setting} produced NaN or infinity; use strengths closer to 1, or check the adapter and the engine "
        "with slideredit-rt verify"
    )


def with_strength(sliders: Sequence[Slider], strengths: Mapping[int, Strength]) -> list[Slider]:
    """Replace the strengths of some sliders, by index."""
    return [replace(s, strength=strengths.get(i, s.strength)) for i, s in enumerate(sliders)]
