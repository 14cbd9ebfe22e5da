"""Base of the rival trainers, which learn from the frozen model's change from a neutral prompt to an instruction."""

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
    """Settings for training one slider per attribute, in addition to those of `TrainingConfig`.

    Attributes:
        attributes: Instructions, each of which gets its own slider.

    Raises:
        SliderEditError: `attributes` is empty or names one twice, or another setting is out of range.
    """

    attributes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.attributes:
            raise SliderEditError("the list of attributes is empty; name the instructions that shall get a slider")
        if twice := next((name for name, count in Counter(self.attributes).items() if count > 1), None):
            raise SliderEditError(f"attribute {twice!r} is given twice; name each once")


@dataclass(frozen=True)
class Contrast:
    """A batch of B examples, each with one attribute.

    Attributes:
        noised: Latents of the source images with noise.
        images: Source images, `[B, 3, H, W]` in [0, 1].
        text: Text inputs of the neutral prompt.
        neutral: Velocity of the frozen model at the neutral prompt, float32 `[B, S, C]`.
        positive: Velocity of the frozen model at the instruction, float32 `[B, S, C]`.
        chosen: One-hot attribute of each example, float32 `[B, G]`.
    """

    noised: Noised
    images: Tensor
    text: dict[str, Tensor]
    neutral: Tensor
    positive: Tensor
    chosen: Tensor


class ContrastTrainer(Trainer[Trained]):
    """Base class of trainers of one slider per attribute. It uses the first instruction of each example.

    Arguments are those of `Trainer`.

    Attributes:
        backbone: Backbone. Without slider inputs it predicts as the frozen model.
    """

    backbone: SliderBackbone

    def __init__(
        self, family: Family, pipeline: Any, data: Data, config: ContrastConfig, out: Path, device: torch.device | None = None
    ) -> None:
        self.attributes: Sequence[str] = config.attributes
        super().__init__(family, pipeline, data, config, out, device)

    @torch.no_grad()
    def contrast(self, step: int) -> Contrast:
        """Return the batch of a step.

        Raises:
            SliderEditError: The data contain an instruction that is not among the attributes.
        """
        images, instructions = self.data.draw(random.Random(f"{self.settings.seed}/{step}"), self.settings.batch)
        first = [parts[0] for parts in instructions]
        if unknown := next((text for text in first if text not in self.attributes), None):
            raise SliderEditError(
                f"the data contain {unknown!r}, which is not one of the {len(self.attributes)} attributes; add it to them"
            )
        noised = self.noised(step, *self.encode_images(images))
        neutral_text = self.encode_prompts([self.family.neutral_prompt] * len(first), images)
        neutral, positive = (
            self.backbone(self.inputs(noised, text))[:, : noised.noisy.shape[1]].float()
            for text in (neutral_text, self.encode_prompts(first, images))
        )
        chosen = torch.eye(len(self.attributes))[[self.attributes.index(text) for text in first]]
        return Contrast(noised, images, neutral_text, neutral, positive, chosen.to(neutral.device))
