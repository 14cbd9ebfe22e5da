"""Sources of images and instructions for training."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from slideredit_rt.errors import SliderEditError
from slideredit_rt.images import open_image


class Data(Protocol):
    """Source of images and instructions."""

    def draw(self, rng: random.Random, batch: int) -> tuple[Tensor, list[list[str]]]:
        """Draw `batch` images, float32 `[B, 3, H, W]` in [0, 1], and one to three instructions for each."""
        ...


class FolderData:
    """Own images, each with a random selection of one to three instructions, in random order.

    Args:
        images: Image files in a format that Pillow reads.
        instructions: Edits that the adapter learns to suppress.
        side: Side of the training images, in pixels. Each image is cropped to its central square and resized.

    Raises:
        SliderEditError: `images` or `instructions` is empty.
    """

    def __init__(self, images: Sequence[Path], instructions: Sequence[str], side: int) -> None:
        if not images or not instructions:
            raise SliderEditError(
                f"training needs images and instructions, but there are {len(images)} images and {len(instructions)} "
                "instructions; add at least one of each"
            )
        self.images, self.instructions, self.side = list(images), list(instructions), side

    def draw(self, rng: random.Random, batch: int) -> tuple[Tensor, list[list[str]]]:
        images, prompts = [], []
        for path in rng.choices(self.images, k=batch):
            image = open_image(path)
            edge = min(image.size)
            left, top = (image.width - edge) // 2, (image.height - edge) // 2
            square = image.crop((left, top, left + edge, top + edge)).resize((self.side, self.side), Image.Resampling.LANCZOS)
            pixels = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8)
            images.append(pixels.view(self.side, self.side, 3).permute(2, 0, 1) / 255)
            prompts.append(rng.sample(self.instructions, min(len(self.instructions), rng.randint(1, 3))))
        return torch.stack(images), prompts
