"""Scorers that compare an image with an attribute phrase, as in the paper: CLIP, SigLIP and BLIP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import transformers
from torch import Tensor

from slideredit_rt.errors import SliderEditError
from slideredit_rt.evaluation.scorers.base import BATCH, AttributeScorer, PretrainedVision


class _VisionLanguage(AttributeScorer):
    """A scorer with an image and a text encoder.

    Attributes:
        architecture: Name of the model's class in transformers.
        padding: Padding of the phrases, as in the model's training.
    """

    extra = "scorers"
    architecture: ClassVar[str]
    padding: ClassVar[bool | str] = True

    def __init__(self, source: str, device: str) -> None:
        self.vision = PretrainedVision(self.architecture, source, device)
        self.model = self.vision.model
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        self.most_tokens: int = self.model.config.text_config.max_position_embeddings

    def tokenise(self, phrases: Sequence[str]) -> dict[str, Tensor]:
        """Return `input_ids` and `attention_mask`, `[phrases, tokens]`, on the model's device."""
        encoded = self.tokenizer(list(phrases), verbose=False)
        for phrase, ids in zip(phrases, encoded["input_ids"], strict=True):
            if len(ids) > self.most_tokens:
                raise SliderEditError(
                    f"the attribute phrase {phrase!r} has {len(ids)} tokens, but the scorer {self.name!r} accepts at most "
                    f"{self.most_tokens}; shorten it"
                )
        padded = self.tokenizer.pad(
            encoded, padding=self.padding, max_length=self.most_tokens, return_tensors="pt", verbose=False
        )
        return {name: padded[name].to(self.model.device) for name in ("input_ids", "attention_mask") if name in padded}


class Clip(_VisionLanguage):
    """Cosine of CLIP's image and text embeddings (Radford et al. 2021, arXiv 2103.00020)."""

    name, source, architecture = "clip", "openai/clip-vit-base-patch32", "CLIPModel"

    @torch.no_grad()
    def score(self, images: Tensor, phrases: Sequence[str]) -> list[tuple[float, ...]]:
        tokens, rows = self.tokenise(phrases), []
        for batch in images.split(BATCH):
            output = self.model(**tokens, pixel_values=self.vision.pixels(batch))
            # Both embeddings are unit vectors.
            rows += (output.image_embeds @ output.text_embeds.T).tolist()
        return [tuple(row) for row in rows]


class Siglip(Clip):
    """Cosine of SigLIP's embeddings (Zhai et al. 2023, arXiv 2303.15343)."""

    name, source, architecture = "siglip", "google/siglip-so400m-patch14-384", "SiglipModel"
    padding = "max_length"

    def tokenise(self, phrases: Sequence[str]) -> dict[str, Tensor]:
        # The model was trained on phrases padded to its full length, without masking the padding.
        return {"input_ids": super().tokenise(phrases)["input_ids"]}


class BlipMatching(_VisionLanguage):
    """Probability of a match, by BLIP's image-text matching head (Li et al. 2022, arXiv 2201.12086)."""

    name, source, architecture = "blip-itm", "Salesforce/blip-itm-base-coco", "BlipForImageTextRetrieval"

    @torch.no_grad()
    def score(self, images: Tensor, phrases: Sequence[str]) -> list[tuple[float, ...]]:
        rows: list[tuple[float, ...]] = []
        for batch in images.split(BATCH):
            # The model's own forward encodes the image again for every phrase and always creates a mask on the CPU.
            patches = self.model.vision_model(pixel_values=self.vision.pixels(batch)).last_hidden_state
            columns = []
            for phrase in phrases:
                tokens = {name: ids.expand(len(batch), -1) for name, ids in self.tokenise([phrase]).items()}
                read = self.model.text_encoder(**tokens, encoder_hidden_states=patches).last_hidden_state
                columns.append(self.model.itm_head(read[:, 0]).softmax(dim=-1)[:, 1])
            rows += map(tuple, torch.stack(columns, dim=1).tolist())
        return rows
