"""What the benchmark asks of a scorer, and what scorers built on transformers share."""

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
"""Images that a model is shown at once."""


class Scorer(ABC):
    """A model that reads images.

    Attributes:
        name: on the command line and in tables.
        source: of its weights unless another is given; a hub repository, or what its own package calls them.
        extra: of this package, installs what it needs.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    extra: ClassVar[str]

    @abstractmethod
    def __init__(self, source: str, device: str) -> None:
        """Load the weights; whatever goes wrong is raised as it comes, and `load_scorer` puts it into words."""


class AttributeScorer(Scorer):
    """How much of a phrase an image shows."""

    @abstractmethod
    def score(self, images: Tensor, phrases: Sequence[str]) -> list[tuple[float, ...]]:
        """Similarity of each image to each phrase; higher is more.

        Args:
            images: float32 `[N, 3, H, W]` in [0, 1].
            phrases: such as "curly hair"; one or more.

        Returns:
            N tuples of one number per phrase. They depend on nothing else in the batch.

        Raises:
            SliderEditError: a phrase has more tokens than the model reads.
        """


class DistanceScorer(Scorer):
    """How far an image is from its source."""

    @abstractmethod
    def distance(self, images: Tensor, source: Tensor) -> list[float | None]:
        """Distance of each image to the source; 0 for the source itself, None where the scorer cannot tell.

        Args:
            images: float32 `[N, 3, H, W]` in [0, 1].
            source: `[1, 3, H, W]`.
        """


def to_images(images: Tensor) -> list[Image.Image]:
    """`[N, 3, H, W]` in [0, 1] as 8-bit images: what a model would read from saved files."""
    pixels = (images.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()
    return [Image.fromarray(image.contiguous().numpy()) for image in pixels]


class PretrainedVision:
    """A transformers checkpoint with its image processor, in float32.

    The processor is the one that works on PIL images: the other one needs torchvision and resizes differently, so that scores
    would depend on what is installed.
    """

    def __init__(self, architecture: str, source: str, device: str) -> None:
        with quiet_libraries():
            # Without safetensors in a repository this reads a pickle, as tensors only.
            self.model, report = getattr(transformers, architecture).from_pretrained(
                source, dtype=torch.float32, weights_only=True, output_loading_info=True
            )
            self.processor = transformers.AutoImageProcessor.from_pretrained(source, backend="pil")
        # Transformers would go on with random weights in their place.
        if missing := sorted(report["missing_keys"]):
            raise ValueError(f"it is no {architecture}: {len(missing)} weights are missing, such as {missing[0]}")
        self.model.to(device).eval()

    def pixels(self, images: Tensor) -> Tensor:
        """`[N, 3, H, W]` in [0, 1] as the model's `pixel_values`, on its device."""
        values: Tensor = self.processor(images=to_images(images), return_tensors="pt")["pixel_values"]
        return values.to(self.model.device)
