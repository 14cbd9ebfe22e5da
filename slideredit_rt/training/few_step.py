"""Training of a few-step LoRA by distilling the base's own trajectories (progressive distillation for flow matching).

The frozen base denoises from some noise in many small steps. With the LoRA, it learns to reach the same points in few large
steps from the same noise. Every large step starts where the previous one ended, so it also learns to correct earlier errors.
It needs source images and instructions only, without edited images.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from slideredit_rt.adapters import Adapter, save_adapter
from slideredit_rt.editor import SliderEditor
from slideredit_rt.families import Family, Schedule
from slideredit_rt.modules import SliderBackbone
from slideredit_rt.sliders import Controls, Slider, compose_prompt
from slideredit_rt.strength import StrengthCurve
from slideredit_rt.training.data import Data
from slideredit_rt.training.suppression import initial_pair
from slideredit_rt.training.trainer import Trainer, TrainingConfig

_SAMPLE_SCALES = (0.0, 0.5, 1.0)
_AS_A_SCALE = StrengthCurve((0.0, 1.0), (0.0, 1.0))


@dataclass(frozen=True, kw_only=True)
class FewStepConfig(TrainingConfig):
    """Settings for training a few-step LoRA, in addition to those of `TrainingConfig`.

    `timestep_sampling` has no effect: noise levels are those of the schedule.

    Attributes:
        few_steps: Denoising steps that an edit with the LoRA takes.
        substeps: Steps of the frozen base within each of them.
        rank: LoRA rank; `lora_alpha` equals it.
    """

    few_steps: int = 4
    substeps: int = 7
    rank: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check({}, ("few_steps", "substeps", "rank"))


@dataclass(frozen=True)
class Edits:
    """A batch of edits to denoise.

    Attributes:
        source: Source latents, `[B, S, C]`.
        ids: Position ids of the source latents.
        noise: Initial noise, `[B, S, C]`.
        text: Text inputs of the prompts.
        negative: Text inputs of the negative prompt; None if the base runs without true classifier-free guidance.
        schedule: Noise levels of the few steps.
    """

    source: Tensor
    ids: Tensor
    noise: Tensor
    text: dict[str, Tensor]
    negative: dict[str, Tensor] | None
    schedule: Schedule


class FewStepTrainer(Trainer[Adapter]):
    """Trainer of a LoRA on all attention and MLP projections. Arguments are those of `Trainer`.

    The base uses its default guidance. Where that includes a negative pass, the LoRA learns the guided trajectory and runs
    without the pass.
    """

    what = "few-step"

    def __init__(
        self, family: Family, pipeline: Any, data: Data, config: FewStepConfig, out: Path, device: torch.device | None = None
    ) -> None:
        self.config = config
        super().__init__(family, pipeline, data, config, out, device)

    def build(self) -> SliderBackbone:
        generator = torch.Generator().manual_seed(self.config.seed)
        pattern = self.family.targets("gst", all_projections=True)
        pairs = {
            name: initial_pair(module, self.config.rank, generator)
            for name, module in self.pipeline.transformer.named_modules()
            if isinstance(module, nn.Linear) and pattern.fullmatch(name)
        }
        return SliderBackbone(self.family, self.pipeline.transformer, self._adapter(pairs))

    def _adapter(self, pairs: dict[str, tuple[Tensor, Tensor]]) -> Adapter:
        training = dataclasses.asdict(self.config)
        return Adapter(self.family.name, "gst", self.config.rank, pairs, str(self.out), training, _AS_A_SCALE)

    def result(self) -> Adapter:
        return self._adapter({n: (m.lora_A.detach().cpu(), m.lora_B.detach().cpu()) for n, m in self.own.adapted.items()})

    def write(self, trained: Adapter, path: Path) -> None:
        save_adapter(trained, path)

    @torch.no_grad()
    def edits(self, step: int) -> Edits:
        """Return the batch of a step, on the device."""
        images, instructions = self.data.draw(random.Random(f"{self.config.seed}/{step}"), self.config.batch)
        source, ids = self.encode_images(images)
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + step)
        noise = torch.randn(source.shape, generator=generator).to(source)
        prompts = [compose_prompt(parts) for parts in instructions]
        guided = self.family.default_true_cfg_scale(self.pipeline) > 1
        negative = self.encode_prompts([self.family.negative_prompt] * len(prompts), images) if guided else None
        schedule = self.family.schedule(self.pipeline, source.shape[1], self.config.few_steps).to(source.device)
        return Edits(source, ids, noise, self.encode_prompts(prompts, images), negative, schedule)

    def _velocity(
        self, edits: Edits, latents: Tensor, level: Tensor, text: Mapping[str, Tensor], *, adapted: bool = False
    ) -> Tensor:
        """Predict the velocity, float32 `[B, S, C]`, at a noise level; with or without the LoRA."""
        inputs = self.family.training_inputs(
            self.pipeline, latents, edits.source, edits.ids, text, level.expand(len(latents)).contiguous()
        )
        if adapted:
            rows = inputs["encoder_hidden_states"].shape[1] + inputs["hidden_states"].shape[1]
            inputs["alpha"] = latents.new_ones(len(latents), 1)
            inputs["token_mask"] = torch.ones(len(latents), 1, rows, dtype=torch.bool, device=latents.device)
        velocity: Tensor = self.module(inputs)[:, : latents.shape[1]].float()
        return velocity

    @torch.no_grad()
    def trajectory(self, edits: Edits) -> list[Tensor]:
        """Denoise with the frozen base.

        Returns:
            Latents after each of the few steps, `[B, S, C]` each. Within a step, noise levels of the substeps are equidistant.
        """
        latents, ends = edits.noise, []
        scale = self.family.default_true_cfg_scale(self.pipeline)
        for level, delta in zip(edits.schedule.timesteps, edits.schedule.deltas, strict=True):
            for substep in range(self.config.substeps):
                within = level + delta * substep / self.config.substeps
                velocity = self._velocity(edits, latents, within, edits.text)
                if edits.negative is not None:
                    against = self._velocity(edits, latents, within, edits.negative)
                    velocity = self.family.guide(velocity, against, scale)
                latents = latents + delta / self.config.substeps * velocity
            ends.append(latents)
        return ends

    def loss(self, step: int) -> Tensor:
        """Return the mean squared error, in float32, between the latents after each step with the LoRA and the base's."""
        edits = self.edits(step)
        latents, errors = edits.noise, []
        levels = zip(edits.schedule.timesteps, edits.schedule.deltas, self.trajectory(edits), strict=True)
        for level, delta, end in levels:
            reached = latents + delta * self._velocity(edits, latents, level, edits.text, adapted=True)
            errors.append(F.mse_loss(reached, end))
            latents = reached.detach()
        return torch.stack(errors).mean()

    def strip(self, image: Image.Image, instructions: Sequence[str]) -> tuple[str, Sequence[float], list[Image.Image]]:
        config = dict(self.pipeline.transformer.config)
        editor = SliderEditor(
            self.family, self.pipeline, self.own, config, Controls("gst", _AS_A_SCALE), max_batch=1, max_sliders=1
        )
        prompt, steps = compose_prompt(instructions), self.config.few_steps
        prepared = editor.prepare(image, [Slider(instructions[0])], prompt=prompt, steps=steps, true_cfg_scale=1.0)
        title = f"{prompt}, LoRA at"
        return title, _SAMPLE_SCALES, editor.render(prepared, [[scale] for scale in _SAMPLE_SCALES])
