"""Scorers of image and source: LPIPS, DINOv2 and ArcFace, as the paper uses them."""

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
    """LPIPS 0.1 (Zhang et al. 2018, arXiv 1801.03924), with the weights that the package `lpips` carries.

    Args:
        source: `torchvision`, which downloads the backbone's ImageNet weights on first use, or a file with those weights as
            torchvision names them (`features.0.weight`, …), `.pth` or `.safetensors`.
    """

    source, extra = "torchvision", "lpips"
    backbone: ClassVar[str]

    def __init__(self, source: str, device: str) -> None:
        import lpips

        own = source == self.source
        with warnings.catch_warnings():
            # The package calls torchvision by arguments that have newer names.
            warnings.filterwarnings("ignore", module="torchvision")
            model = lpips.LPIPS(net=self.backbone, pnet_rand=not own, verbose=False)
        if not own:
            path = Path(source)
            weights = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
            # The package cuts the backbone into slices whose layers keep their numbers.
            model.net.load_state_dict({k: weights[f"features.{k.split('.', 1)[1]}"] for k in model.net.state_dict()})
        self.model, self.device = model.to(device).eval(), device

    @torch.inference_mode()
    def distance(self, images: Tensor, source: Tensor) -> list[float | None]:
        """As the base class says.

        Raises:
            SliderEditError: the images and the source differ in size.
        """
        if images.shape[2:] != source.shape[2:]:
            sizes = [f"{image.shape[3]}×{image.shape[2]}" for image in (images, source)]
            raise SliderEditError(
                f"{self.name} compares images of one size, but the edit has {sizes[0]} pixels and its source {sizes[1]}; "
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
    """1 − cosine of two embeddings. A source is embedded once, however often images are compared with it."""

    def __init__(self) -> None:
        self._known: dict[bytes, Tensor | None] = {}

    @abstractmethod
    def embed(self, images: Tensor) -> list[Tensor | None]:
        """A unit vector per image; None where there is nothing to embed."""

    def distance(self, images: Tensor, source: Tensor) -> list[float | None]:
        # By its pixels: the same source comes as another tensor for every system that is compared.
        key = hashlib.sha256(source.cpu().numpy().tobytes()).digest()
        if key not in self._known:
            (self._known[key],) = self.embed(source)
        reference = self._known[key]
        # A cosine of 1 may come out one rounding above it.
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

    @torch.inference_mode()
    def embed(self, images: Tensor) -> list[Tensor | None]:
        pooled = [self.vision.model(pixel_values=self.vision.pixels(batch)).pooler_output for batch in images.split(BATCH)]
        return list(F.normalize(torch.cat(pooled), dim=-1).cpu())


class ArcFace(_EmbeddingDistance):
    """1 − cosine of ArcFace's embedding of the face (Deng et al. 2019, arXiv 1801.07698): is it still the same person?

    None unless both images hold exactly one face, as in the paper. InsightFace's models may be used for research only.

    Args:
        source: a model pack of InsightFace, which it downloads on first use, or the folder of one.
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
        # The package prints as it downloads; standard output is the command's own.
        try:
            with contextlib.redirect_stdout(sys.stderr):
                self.faces = FaceAnalysis(
                    str(folder.resolve()) if folder.is_dir() else source,
                    allowed_modules=["detection", "recognition"],
                    providers=providers,
                )
        except AssertionError:  # how the package says it
            raise ValueError("it holds no face detection model") from None
        if "recognition" not in self.faces.models:
            raise ValueError("it holds no face recognition model")
        self.faces.prepare(number, det_size=(640, 640))

    def embed(self, images: Tensor) -> list[Tensor | None]:
        out: list[Tensor | None] = []
        for image in to_images(images):
            found = self.faces.get(np.ascontiguousarray(np.asarray(image)[:, :, ::-1]))
            out.append(torch.from_numpy(found[0].normed_embedding) if len(found) == 1 else None)
        return out
