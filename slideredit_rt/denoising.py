"""The denoising loop over one batch, with alphas that may change from step to step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from slideredit_rt.families import Backbone, Family, Schedule


def frozen_steps(slider_start: float, steps: int) -> int:
    """Return the number of first steps in which the sliders do not act: those that end by `slider_start`.

    Args:
        slider_start: Fraction of the steps, in [0, 1).
        steps: Denoising steps.
    """
    return sum((step + 1) / steps <= slider_start for step in range(steps))


def fill_batch(rows: Tensor, smallest: int, dim: int = 0) -> Tensor:
    """Repeat the last row of a batch that has fewer rows than an engine takes; return other batches as they are.

    Rows of a batch do not affect each other, so the first rows of the result are those of the smaller batch.

    Args:
        rows: A value for each row of the batch, with B ≥ 1 of them along `dim`.
        smallest: Smallest batch of the engine.
        dim: Dimension of the rows.

    Returns:
        `rows` with at least `smallest` in place of B.
    """
    count = rows.shape[dim]
    return rows.index_select(dim, torch.arange(max(count, smallest), device=rows.device).clamp(max=count - 1))


@dataclass(frozen=True)
class Denoising:
    """A batch whose rows make the same steps.

    Attributes:
        family: Base-model family.
        engine: Function that runs the backbone.
        inputs: Backbone inputs from the family's `batch_inputs`, updated in place.
        negative: Inputs of the negative pass; None without one.
        schedule: Noise levels of the whole run, on the device of the latents.
        true_cfg_scale: Scale of the guidance between the two passes; `[B, 1, 1]` gives each row its own.
    """

    family: Family
    engine: Backbone
    inputs: dict[str, Tensor]
    negative: dict[str, Tensor] | None
    schedule: Schedule
    true_cfg_scale: float | Tensor

    def run(self, latents: Tensor, alphas: Tensor, steps: range, bar: tqdm[Any] | None = None) -> Tensor:
        """Make some of the run's steps.

        Args:
            latents: `[B, latent_rows, C]` before the first of the steps; not changed.
            alphas: Alphas of every step of the run, `[run, B, K]`, for a bank `[run, B, K, G]`.
            steps: Indices of the steps to make.
            bar: Progress bar that advances by one per step.

        Returns:
            The latents after the last of the steps.
        """
        for step in steps:
            # Change alphas in place, because an engine may have bound the tensor's memory.
            self.inputs["alpha"].copy_(alphas[step])
            timestep = self.schedule.timesteps[step]
            velocity = self.family.predict(self.engine, self.inputs, latents, timestep, self.negative, self.true_cfg_scale)
            latents = latents + self.schedule.deltas[step] * velocity
            if bar is not None:
                bar.update()
        return latents
