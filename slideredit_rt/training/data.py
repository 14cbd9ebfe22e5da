"""Where the source images and instructions of a training run come from."""

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
    """Where source images and instructions come from."""

    def draw(self, rng: random.Random, batch: int) -> tuple[Tensor, list[list[str]]]:
        """`batch` images, float32 `[B, 3, H, W]` in [0, 1], and for each the instructions of its prompt (one to three)."""
        ...


class FolderData:
    """Images of a folder, each with a random selection of one to three instructions, in random order.

    Args:
        images: files that Pillow reads, cropped to a square of `side` pixels.
        instructions: the edits that an adapter shall learn to suppress.
    """

    def __init__(self, images: Sequence[Path], instructions: Sequence[str], side: int) -> None:
        if not images or not instructions:
            raise SliderEditError(f"training needs images and instructions, got {len(images)} and {len(instructions)}")
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
