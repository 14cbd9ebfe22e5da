"""Scorers that compare an image with its source, as in the paper: LPIPS, DINOv2 and ArcFace."""

from __future__ import annotations

import contextlib
import hashlib
import sys
import warnings
from abc import abstractmethod
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from slideredit_rt.errors import SliderEditError
from slideredit_rt.evaluation.scorers.base import BATCH, DistanceScorer, PretrainedVision, to_images


class _Lpips(DistanceScorer):
    """LPIPS 0.1 (Zhang et al. 2018, arXiv 1801.03924), with the linear weights of the package `lpips`.

    Args:
        source: `torchvision`, which downloads the backbone's ImageNet weights on first use, or a `.pth` or `.safetensors`
            file of those weights under torchvision's names (`features.0.weight`, …).
        device: Torch device.
    """

    source, extra = "torchvision", "lpips"
    backbone: ClassVar[str]

    def __init__(self, source: str, device: str) -> None:
        import lpips

        own = source == self.source
        with warnings.catch_warnings():
            # The package passes deprecated arguments to torchvision.
            warnings.filterwarnings("ignore", module="torchvision")
            model = lpips.LPIPS(net=self.backbone, pnet_rand=not own, verbose=False)
        if not own:
            path = Path(source)
            weights = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
            # The package splits the backbone into slices, and layers keep their numbers.
            model.net.load_state_dict({k: weights[f"features.{k.split('.', 1)[1]}"] for k in model.net.state_dict()})
        self.model, self.device = model.to(device).eval(), device

    @torch.no_grad()
    def distance(self, images: Tensor, source: Tensor) -> list[float | None]:
        """Return the LPIPS distance of each image to the source.

        Args:
            images: Images, float32 `[N, 3, H, W]` in [0, 1].
            source: Source image, `[1, 3, H, W]`.

        Raises:
            SliderEditError: The images and the source differ in size.
        """
        if images.shape[2:] != source.shape[2:]:
            sizes = [f"{image.shape[3]}×{image.shape[2]}" for image in (images, source)]
            raise SliderEditError(
                f"{self.name} compares images of equal size, but the edit has {sizes[0]} pixels and its source {sizes[1]}; "
                "resize one of them"
            )
        out: list[float | None] = []
        for batch in images.split(BATCH):
            out += self.model(batch.to(self.device), source.to(self.device), normalize=True).flatten().tolist()
        return out


class LpipsAlex(_Lpips):
    name, backbone = "lpips-alex", "alex"


class LpipsVgg(_Lpips):
    name, backbone = "lpips-vgg", "vgg"


class _EmbeddingDistance(DistanceScorer):
    """1 − cosine of two embeddings. Each source is embedded once and cached."""

    def __init__(self) -> None:
        self._known: dict[bytes, Tensor | None] = {}

    @abstractmethod
    def embed(self, images: Tensor) -> list[Tensor | None]:
        """Return a unit vector per image, or None where there is nothing to embed."""

    def distance(self, images: Tensor, source: Tensor) -> list[float | None]:
        # The key is the content, because every system passes the same source as another tensor.
        key = hashlib.sha256(source.cpu().numpy().tobytes()).digest()
        if key not in self._known:
            (self._known[key],) = self.embed(source)
        reference = self._known[key]
        # Rounding may put a cosine slightly above 1.
        return [
            None if reference is None or vector is None else max(0.0, 1 - float(vector @ reference))
            for vector in self.embed(images)
        ]


class Dinov2(_EmbeddingDistance):
    """1 − cosine of DINOv2's class token (Oquab et al. 2023, arXiv 2304.07193), after the last norm."""

    name, source, extra = "dinov2", "facebook/dinov2-base", "scorers"

    def __init__(self, source: str, device: str) -> None:
        super().__init__()
        self.vision = PretrainedVision("Dinov2Model", source, device)

    @torch.no_grad()
    def embed(self, images: Tensor) -> list[Tensor | None]:
        pooled = [self.vision.model(pixel_values=self.vision.pixels(batch)).pooler_output for batch in images.split(BATCH)]
        return list(F.normalize(torch.cat(pooled), dim=-1).cpu())


class ArcFace(_EmbeddingDistance):
    """1 − cosine of ArcFace's face embeddings (Deng et al. 2019, arXiv 1801.07698), a measure of identity preservation.

    The distance is None unless both images contain exactly one face, as in the paper. InsightFace's models may be used for
    research only.

    Args:
        source: Name of an InsightFace model pack, which is downloaded on first use, or a folder that contains one.
        device: Torch device.
    """

    name, source, extra = "arcface", "buffalo_l", "arcface"

    def __init__(self, source: str, device: str) -> None:
        super().__init__()
        folder = Path(source)
        if len(folder.parts) > 1 and not folder.is_dir():
            raise FileNotFoundError("no such folder")
        from insightface.app import FaceAnalysis

        number = -1 if torch.device(device).type == "cpu" else torch.device(device).index or 0
        providers = ["CPUExecutionProvider"] if number < 0 else [("CUDAExecutionProvider", {"device_id": number})]
        # The package prints while it downloads, and standard output must contain the command's result only.
        try:
            with contextlib.redirect_stdout(sys.stderr):
                self.faces = FaceAnalysis(
                    str(folder.resolve()) if folder.is_dir() else source,
                    allowed_modules=["detection", "recognition"],
                    providers=providers,
                )
        except AssertionError:  # the package asserts that there is one
            raise ValueError("it does not contain a face detection model") from None
        if "recognition" not in self.faces.models:
            raise ValueError("it does not contain a face recognition model")
        self.faces.prepare(number, det_size=(640, 640))

    def embed(self, images: Tensor) -> list[Tensor | None]:
        out: list[Tensor | None] = []
        for image in to_images(images):
            found = self.faces.get(np.ascontiguousarray(np.asarray(image)[:, :, ::-1]))
            out.append(torch.from_numpy(found[0].normed_embedding) if len(found) == 1 else None)
        return out
