"""Interfaces of the learned scorers, and the parts shared by those built on transformers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
import transformers
from PIL import Image
from torch import Tensor

from slideredit_rt.checkpoint import quiet_libraries

BATCH = 16
"""Number of images per forward pass."""


class Scorer(ABC):
    """A model that scores images.

    Attributes:
        name: Name on the command line and in tables.
        source: Default weights: a hub repository, or a name defined by the scorer's own package.
        extra: Extra of this package that installs the scorer's requirements.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    extra: ClassVar[str]

    @abstractmethod
    def __init__(self, source: str, device: str) -> None:
        """Load the weights. Errors of the loaders pass through; `load_scorer` turns them into `SliderEditError`."""


class AttributeScorer(Scorer):
    """Scorer of how well an image shows a phrase."""

    @abstractmethod
    def score(self, images: Tensor, phrases: Sequence[str]) -> list[tuple[float, ...]]:
        """Return the similarity of each image to each phrase; higher is more similar.

        Args:
            images: Images, float32 `[N, 3, H, W]` in [0, 1].
            phrases: One or more phrases, such as "curly hair".

        Returns:
            N tuples of one number per phrase. An image's numbers do not depend on the other images of the batch.

        Raises:
            SliderEditError: A phrase has more tokens than the model accepts.
        """


class DistanceScorer(Scorer):
    """Scorer of the distance between an edited image and its source."""

    @abstractmethod
    def distance(self, images: Tensor, source: Tensor) -> list[float | None]:
        """Return the distance of each image to the source: 0 for the source itself, None where it is undefined.

        Args:
            images: Images, float32 `[N, 3, H, W]` in [0, 1].
            source: Source image, `[1, 3, H, W]`.
        """


def to_images(images: Tensor) -> list[Image.Image]:
    """Convert `[N, 3, H, W]` in [0, 1] to 8-bit images, as a model would read them from saved files."""
    pixels = (images.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()
    return [Image.fromarray(image.contiguous().numpy()) for image in pixels]


class PretrainedVision:
    """A transformers checkpoint with its image processor, in float32.

    It uses the image processor that works on PIL images. The other one needs torchvision and resizes differently, so scores
    would depend on the installed packages.
    """

    def __init__(self, architecture: str, source: str, device: str) -> None:
        with quiet_libraries():
            # A repository without safetensors is read from a pickle, and weights_only restricts it to tensors.
            self.model, report = getattr(transformers, architecture).from_pretrained(
                source, dtype=torch.float32, weights_only=True, output_loading_info=True
            )
            self.processor = transformers.AutoImageProcessor.from_pretrained(source, backend="pil")
        # Transformers would continue with random weights in their place.
        if missing := sorted(report["missing_keys"]):
            raise ValueError(f"it is not a {architecture}: {len(missing)} weights are missing, such as {missing[0]}")
        self.model.to(device).eval()

    def pixels(self, images: Tensor) -> Tensor:
        """Convert `[N, 3, H, W]` in [0, 1] to the model's `pixel_values`, on its device."""
        values: Tensor = self.processor(images=to_images(images), return_tensors="pt")["pixel_values"]
        return values.to(self.model.device)
