"""Base class of the trainers over a frozen pipeline: settings, noised source images, the loop and its state on disk."""

from __future__ import annotations

import dataclasses
import random
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, get_args

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from slideredit_rt.errors import SliderEditError
from slideredit_rt.families import Family
from slideredit_rt.images import draw_grid, save_image
from slideredit_rt.settings import pick_device
from slideredit_rt.training.checkpoint import load_checkpoint, save_checkpoint
from slideredit_rt.training.data import Data

TimestepSampling = Literal["uniform", "logit-normal"]
Trained = TypeVar("Trained")
_SEEDS = 2**32


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Settings shared by all trainers.

    Attributes:
        timestep_sampling: Distribution of the noise level σ in [0, 1], `uniform` or `logit-normal`.
        steps: Number of optimiser steps.
        batch: Batch size.
        learning_rate: Peak learning rate of AdamW. The gradient norm is clipped to 1.
        schedule: Learning-rate schedule, by diffusers' names, with a warm-up of `steps` / 20.
        seed: Seed of data, noise and initial weights.
        gradient_checkpointing: Recompute activations in the backward pass. A full-size base needs it.

    Raises:
        SliderEditError: A setting is out of range.
    """

    timestep_sampling: TimestepSampling = "uniform"
    steps: int = 1000
    batch: int = 6
    learning_rate: float = 5e-5
    schedule: str = "constant"
    seed: int = 0
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        self._check({"timestep_sampling": TimestepSampling}, ("steps", "batch"))

    def _check(self, choices: Mapping[str, Any], counts: Sequence[str]) -> None:
        for name, literal in choices.items():
            if getattr(self, name) not in get_args(literal):
                raise SliderEditError(f"{name} is {getattr(self, name)!r}; choose from {', '.join(get_args(literal))}")
        for name in counts:
            if getattr(self, name) < 1:
                raise SliderEditError(f"{name} is {getattr(self, name)}; pass at least 1")
        # Each step's seed is derived from a multiple of this one and must stay within the range of torch's generator.
        if abs(self.seed) >= _SEEDS:
            raise SliderEditError(f"seed is {self.seed}; pass a number between −{_SEEDS} and {_SEEDS}")


@dataclass(frozen=True)
class Noised:
    """Noised latents of a batch.

    Attributes:
        source: Source latents, `[B, S, C]`.
        ids: Position ids of the source latents.
        noisy: Noised latents, `[B, S, C]`.
        sigma: Noise levels, `[B]`.
        generator: Generator for further random numbers of the step.
    """

    source: Tensor
    ids: Tensor
    noisy: Tensor
    sigma: Tensor
    generator: torch.Generator


def to_pil(image: Tensor) -> Image.Image:
    """Convert `[3, H, W]` in [0, 1] to an image with 8 bits per channel."""
    return Image.fromarray((image.permute(1, 2, 0) * 255).round().to(torch.uint8).cpu().numpy())


class Trainer(ABC, Generic[Trained]):
    """Base class of the trainers, which optimise the module returned by `build` over a frozen pipeline.

    Args:
        family: Family of the base.
        pipeline: Pipeline of the base, whose weights are not changed.
        data: Source images and instructions.
        config: Settings.
        out: Output file. The state for resuming is written next to it and deleted at the end of the run.
        device: Device of the pipeline and of what is trained; None takes the current GPU if there is one. Data and noise are
            drawn on the CPU, so they do not depend on it.

    Attributes:
        what: Name of what is trained, for the progress bar.
        betas: Betas of AdamW.
        weight_decay: Weight decay of AdamW.

    Raises:
        SliderEditError: The family reads source images once.
    """

    what: str
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 1e-4

    def __init__(
        self,
        family: Family,
        pipeline: Any,
        data: Data,
        config: TrainingConfig,
        out: Path,
        device: torch.device | None = None,
    ) -> None:
        if family.reads_images_once:
            raise SliderEditError(
                f"training on a {family.name} base is not supported; train an ST adapter on a {family.variant_of} base, which "
                "also fits this one"
            )
        self.family, self.pipeline, self.data, self.out = family, pipeline, data, out
        self.settings = config
        self.device = device or pick_device()
        # Accelerate would choose a device of its own.
        self.accelerator = Accelerator(device_placement=False)
        self.state_path = out.with_name(f"{out.name}.state.pt")
        pipeline.to(self.device)
        for part in ("transformer", "vae", "text_encoder", "text_encoder_2"):
            if (module := getattr(pipeline, part, None)) is not None:
                module.requires_grad_(False).eval()
        if config.gradient_checkpointing:
            pipeline.transformer.enable_gradient_checkpointing()
        module = self.build().to(self.device)
        parameters = [p for p in module.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, betas=self.betas, weight_decay=self.weight_decay)
        scheduler = get_scheduler(
            config.schedule, optimizer, num_warmup_steps=config.steps // 20, num_training_steps=config.steps
        )
        self.module, self.optimizer, self.scheduler = self.accelerator.prepare(module, optimizer, scheduler)

    @abstractmethod
    def build(self) -> nn.Module:
        """Return the module to train. Parameters that require gradients are optimised."""

    @abstractmethod
    def loss(self, step: int) -> Tensor:
        """Return the loss of one batch, which depends on the step number and the settings only."""

    @abstractmethod
    def result(self) -> Trained:
        """Return the current result."""

    @abstractmethod
    def write(self, trained: Trained, path: Path) -> None:
        """Save a result atomically."""

    @abstractmethod
    def strip(self, image: Image.Image, instructions: Sequence[str]) -> tuple[str, Sequence[float], list[Image.Image]]:
        """Return a title, slider settings and an image for each setting, made with the current result."""

    @property
    def own(self) -> Any:
        """The module without the wrapper of `accelerate`."""
        return self.accelerator.unwrap_model(self.module)

    def encode_images(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Encode images `[B, 3, H, W]` in [0, 1] to latents `[B, S, C]` and their position ids."""
        return self.family.encode_image(self.pipeline, (images * 2 - 1).to(self.device))

    def prompt_images(self, images: Tensor) -> list[list[Image.Image]]:
        """Return the images that belong to each prompt, none if the text encoder does not read them."""
        return [[to_pil(image)] if self.family.text_reads_images else [] for image in images]

    def encode_prompts(self, prompts: list[str], images: Tensor) -> dict[str, Tensor]:
        """Return the text inputs of the backbone. `images` matter for families whose text encoder sees them."""
        most = self.family.max_text_rows(self.pipeline)
        return self.family.encode_prompt(self.pipeline, prompts, most, self.prompt_images(images))

    def noised(self, step: int, source: Tensor, ids: Tensor) -> Noised:
        """Add the noise of a step to source latents."""
        count, device = len(source), source.device
        generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + step)
        if self.settings.timestep_sampling == "uniform":
            sigma = torch.rand(count, generator=generator).to(device)
        else:
            sigma = torch.randn(count, generator=generator).sigmoid().to(device)
        noise = torch.randn(source.shape, generator=generator).to(device)
        return Noised(source, ids, torch.lerp(source, noise, sigma[:, None, None]), sigma, generator)

    def inputs(self, noised: Noised, text: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the backbone inputs: noised latents, source latents and the text inputs."""
        return self.family.training_inputs(self.pipeline, noised.noisy, noised.source, noised.ids, text, noised.sigma)

    def sample(self, step: int) -> Path:
        """Render one example of the data with the current result, and return the path of the image in `OUT.samples`."""
        images, instructions = self.data.draw(random.Random(f"{self.settings.seed}/sample"), 1)
        title, values, cells = self.strip(to_pil(images[0]), instructions[0])
        path = self.out.with_name(f"{self.out.name}.samples") / f"step-{step:06d}.png"
        save_image(draw_grid([cells], [f"{v:g}" for v in values], [""], f"step {step}: {title}"), path)
        return path

    def train(
        self,
        *,
        progress: bool = True,
        checkpoint_every: int = 100,
        sample_every: int = 0,
        snapshots: Collection[int] = (),
    ) -> Trained:
        """Train to the end, starting from the state of an interrupted run if there is one. Write and return the result.

        Args:
            progress: Show a progress bar with the loss on standard error.
            checkpoint_every: Steps between saved states.
            sample_every: Steps between sample images; 0 draws none.
            snapshots: Steps after which the current result is saved as `OUT-step-N.safetensors`.

        Raises:
            SliderEditError: A snapshot lies outside the run, or the saved state is of a run with other settings.
        """
        config = self.settings
        if outside := [step for step in snapshots if not 0 < step < config.steps]:
            raise SliderEditError(f"snapshot step {outside[0]} is not inside the run; name steps from 1 to {config.steps - 1}")
        start = self._resume()
        average = None
        with tqdm(
            range(start, config.steps),
            f"train {self.what}",
            initial=start,
            total=config.steps,
            disable=not progress,
            mininterval=1,
        ) as bar:
            for step in bar:
                loss = self.loss(step)
                self.accelerator.backward(loss)
                self.accelerator.clip_grad_norm_(self.module.parameters(), 1.0)
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad(set_to_none=True)
                last = loss.item()
                average = last if average is None else 0.95 * average + 0.05 * last
                bar.set_postfix(loss=f"{average:.5f}", refresh=False)
                if (step + 1) % checkpoint_every == 0 and step + 1 < config.steps:
                    self._save_state(step + 1)
                if sample_every and (step + 1) % sample_every == 0:
                    self.sample(step + 1)
                if step + 1 in snapshots:
                    self.write(self.result(), self.out.with_name(f"{self.out.stem}-step-{step + 1}.safetensors"))
        trained = self.result()
        self.write(trained, self.out)
        self.state_path.unlink(missing_ok=True)
        return trained

    def run_settings(self) -> dict[str, Any]:
        """Return what a saved state must agree with to be resumed."""
        return dataclasses.asdict(self.settings)

    def _trained_parameters(self) -> dict[str, Tensor]:
        return {name: p for name, p in self.own.named_parameters() if p.requires_grad}

    def _save_state(self, step: int) -> None:
        parameters = {name: p.detach().cpu() for name, p in self._trained_parameters().items()}
        state = {"step": step, "config": self.run_settings(), "parameters": parameters}
        state |= {"optimizer": self.optimizer.state_dict(), "scheduler": self.scheduler.state_dict()}
        save_checkpoint(self.state_path, state)

    def _resume(self) -> int:
        state = load_checkpoint(self.state_path)
        if state is None:
            return 0
        if state.get("config") != self.run_settings() or "parameters" not in state:
            raise SliderEditError(
                f"{str(self.state_path)!r} contains an unfinished run with other settings; "
                "delete it, or continue with the same settings"
            )
        for name, parameter in self._trained_parameters().items():
            parameter.data.copy_(state["parameters"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        return int(state["step"])
