"""What both rivals learn from: the frozen model's step from a neutral prompt to an instruction, one attribute per example."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slideredit_rt.errors import SliderEditError
from slideredit_rt.families import Family
from slideredit_rt.modules import SliderBackbone
from slideredit_rt.training.data import Data
from slideredit_rt.training.trainer import Noised, Trained, Trainer, TrainingConfig


@dataclass(frozen=True)
class ContrastConfig(TrainingConfig):
    """Settings of a run (others in `TrainingConfig`).

    Attributes:
        attributes: instructions, each of which gets a slider of its own.
    """

    attributes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.attributes:
            raise SliderEditError("no attribute was given; name the instructions that shall get a slider")
        if twice := next((name for name, count in Counter(self.attributes).items() if count > 1), None):
            raise SliderEditError(f"attribute {twice!r} is given twice; each gets one slider")


@dataclass(frozen=True)
class Contrast:
    """A batch of B examples that move one attribute each.

    Attributes:
        noised: latents of the source images, with noise.
        images: the source images, `[B, 3, H, W]` in [0, 1].
        text: the neutral prompt's text inputs.
        neutral, positive: the frozen model's velocities at the neutral prompt and at the instruction, float32 `[B, S, C]`.
        chosen: float32 `[B, G]`, 1 at each example's attribute.
    """

    noised: Noised
    images: Tensor
    text: dict[str, Tensor]
    neutral: Tensor
    positive: Tensor
    chosen: Tensor


class ContrastTrainer(Trainer[Trained]):
    """Trains something per attribute (arguments as `Trainer`; of each example's instructions, the first counts).

    Attributes:
        backbone: answers as the frozen model when it gets no slider inputs.
    """

    backbone: SliderBackbone

    def __init__(self, family: Family, pipeline: Any, data: Data, config: ContrastConfig, out: Path) -> None:
        self.attributes: Sequence[str] = config.attributes
        super().__init__(family, pipeline, data, config, out)

    @torch.no_grad()
    def contrast(self, step: int) -> Contrast:
        """The batch of a step."""
        images, instructions = self.data.draw(random.Random(f"{self.settings.seed}/{step}"), self.settings.batch)
        first = [parts[0] for parts in instructions]
        if unknown := next((text for text in first if text not in self.attributes), None):
            raise SliderEditError(f"the data draw {unknown!r}, which is none of the {len(self.attributes)} attributes")
        noised = self.noised(step, *self.encode_images(images))
        neutral_text = self.encode_prompts([self.family.neutral_prompt] * len(first), images)
        neutral, positive = (
            self.backbone(self.inputs(noised, text))[:, : noised.noisy.shape[1]].float()
            for text in (neutral_text, self.encode_prompts(first, images))
        )
        chosen = torch.eye(len(self.attributes))[[self.attributes.index(text) for text in first]]
        return Contrast(noised, images, neutral_text, neutral, positive, chosen.to(neutral.device))
