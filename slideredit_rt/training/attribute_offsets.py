"""Continuous Attribute Control (Baumann et al., arXiv 2403.17064), a rival of SliderEdit: one embedding offset per attribute.

A vector that is added to the text rows of a noun, times the slider's number, moves what the model makes of that noun. It was
published for a text-to-image model and nouns like "person"; an editor's neutral prompt speaks of the "image".
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from slideredit_rt.editor import Prepared, SliderEditor
from slideredit_rt.errors import SliderEditError
from slideredit_rt.families import Family
from slideredit_rt.files import atomic_file
from slideredit_rt.modules import SliderBackbone
from slideredit_rt.sliders import Controls, Slider, find_spans
from slideredit_rt.training.contrast import ContrastConfig, ContrastTrainer
from slideredit_rt.training.data import Data
from slideredit_rt.training.trainer import to_pil

_SAMPLE_SCALES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0)
_TEXT = "encoder_hidden_states"
_LEAST, _MOST = 0.1, 5.0


def add_offsets(embeddings: Tensor, rows: Sequence[int], scales: Tensor, vectors: Tensor) -> Tensor:
    """`e' = e + α m δ`: every attribute's vector, times its scale, on the rows of the noun.

    Args:
        embeddings: `encoder_hidden_states`, `[B, text_rows, D]`.
        rows: of the noun.
        scales: `[B, G]`.
        vectors: `[G, D]`.
    """
    mask = torch.zeros(embeddings.shape[1], 1, dtype=embeddings.dtype, device=embeddings.device)
    mask[list(rows)] = 1
    return embeddings + mask * (scales @ vectors)[:, None]


@dataclass(frozen=True)
class AttributeOffsets:
    """Learned offsets, for any engine of their base: text embeddings are an input per row.

    Attributes:
        family: base-model family that they were trained on.
        noun: words of the neutral prompt on whose rows they are added.
        attributes: names, G of them.
        vectors: `[G, D]`, float32.
        training: how they were trained.
    """

    family: str
    noun: str
    attributes: tuple[str, ...]
    vectors: Tensor
    training: dict[str, Any] = field(default_factory=dict)

    def prepare(self, editor: SliderEditor, image: Image.Image, seed: int) -> Prepared:
        """Encode an image with the neutral prompt; the only span is the noun's."""
        member = next(iter(editor.members), None)
        return editor.prepare(image, [Slider(self.noun, adapter=member)], prompt=editor.family.neutral_prompt, seed=seed)

    def render(self, editor: SliderEditor, prepared: Prepared, scales: Tensor, steps: int | None = None) -> Tensor:
        """One image per row of `scales` `[N, G]`, all from the same noise, no slider acting; float32 `[N, 3, H, W]`."""
        images, steps = [], editor.family.num_inference_steps if steps is None else steps
        for chunk in scales.split(editor.max_batch):
            inputs = editor.frozen_inputs(prepared, len(chunk))
            embeddings = inputs["encoder_hidden_states"]
            offset = add_offsets(embeddings, prepared.spans[0], chunk.to(embeddings), self.vectors.to(embeddings))
            inputs["encoder_hidden_states"] = offset.contiguous()
            images.append(editor.denoise(prepared.conditioning, inputs, steps))
        return torch.cat(images)


def save_offsets(offsets: AttributeOffsets, path: Path) -> None:
    """Write a safetensors file; it appears whole or not at all."""
    metadata = {
        "format": "pt",
        "family": offsets.family,
        "noun": offsets.noun,
        "attributes": json.dumps(offsets.attributes),
        "training": json.dumps(offsets.training, sort_keys=True),
    }
    with atomic_file(path) as temporary:
        temporary.write_bytes(save({"vectors": offsets.vectors.contiguous()}, metadata))


def load_offsets(path: Path, family: Family) -> AttributeOffsets:
    """Read what `save_offsets` wrote.

    Raises:
        SliderEditError: no such file, not one of attribute offsets, or for another family.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata, vectors = file.metadata() or {}, file.get_tensor("vectors").float()
        offsets = AttributeOffsets(
            family=metadata["family"],
            noun=metadata["noun"],
            attributes=tuple(json.loads(metadata["attributes"])),
            vectors=vectors,
            training=json.loads(metadata["training"]),
        )
        if vectors.ndim != 2 or len(vectors) != len(offsets.attributes) or not vectors.isfinite().all():
            raise ValueError(f"vectors {list(vectors.shape)} for {len(offsets.attributes)} attributes, or not finite")
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise SliderEditError(
            f"{str(path)!r} holds no attribute offsets ({error}); train them with slideredit-rt train offsets"
        ) from None
    if offsets.family != family.name:
        raise SliderEditError(f"attribute offsets {str(path)!r} were trained for {offsets.family}, not for {family.name}")
    return offsets


@dataclass(frozen=True)
class OffsetConfig(ContrastConfig):
    """Settings of a run (others in `ContrastConfig`).

    Attributes:
        noun: words of the family's neutral prompt that get the offset.
    """

    learning_rate: float = 0.1
    noun: str = "image"


class _Vectors(nn.Module):
    """The trained vectors, `[G, D]`; zeros at first, so that training starts at the frozen model."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.vectors = nn.Parameter(torch.zeros(count, width))

    def forward(self, embeddings: Tensor, rows: Sequence[int], scales: Tensor) -> Tensor:
        return add_offsets(embeddings, rows, scales, self.vectors)


class OffsetTrainer(ContrastTrainer[AttributeOffsets]):
    """Trains one vector per attribute (arguments as `ContrastTrainer`), with the published optimiser."""

    what = "offsets"
    betas = (0.5, 0.8)
    weight_decay = 0.333

    def __init__(self, family: Family, pipeline: Any, data: Data, config: OffsetConfig, out: Path) -> None:
        self.config = config
        super().__init__(family, pipeline, data, config, out)

    def build(self) -> nn.Module:
        self.backbone = SliderBackbone(self.family, self.pipeline.transformer, None)
        text = next(s for s in self.family.input_specs(dict(self.pipeline.transformer.config)) if s.name == _TEXT)
        return _Vectors(len(self.attributes), int(text.shape[2]))

    def _rows(self, image: Image.Image) -> list[int]:
        """Of the noun in the neutral prompt."""
        prompt, most = self.family.neutral_prompt, self.family.max_text_rows(self.pipeline)
        return find_spans(prompt, [Slider(self.config.noun)], self.family.tokenize(self.pipeline, prompt, [image]), most)[0]

    def result(self) -> AttributeOffsets:
        vectors = self.own.vectors.detach().cpu().float().clone()
        training = dataclasses.asdict(self.config)
        return AttributeOffsets(self.family.name, self.config.noun, tuple(self.attributes), vectors, training)

    def write(self, trained: AttributeOffsets, path: Path) -> None:
        save_offsets(trained, path)

    def loss(self, step: int) -> Tensor:
        """Mean squared error in float32: `v(c, e + s m δ)` learns `v(c) + s (v(c⁺) − v(c⁻))` at scales s from ±[0.1, 5]."""
        batch = self.contrast(step)
        generator, shape = batch.noised.generator, (len(batch.images), 1)
        size = _LEAST + (_MOST - _LEAST) * torch.rand(shape, generator=generator)
        scale = (size * (2 * torch.randint(0, 2, shape, generator=generator) - 1)).to(batch.neutral)
        target = batch.neutral + scale[:, :, None] * (batch.positive - batch.neutral)
        inputs = self.inputs(batch.noised, batch.text)
        inputs[_TEXT] = self.module(inputs[_TEXT], self._rows(to_pil(batch.images[0])), scale * batch.chosen)
        return F.mse_loss(self.backbone(inputs)[:, : target.shape[1]].float(), target)

    def strip(self, image: Image.Image, instructions: Sequence[str]) -> tuple[str, Sequence[float], list[Image.Image]]:
        config = dict(self.pipeline.transformer.config)
        editor = SliderEditor(self.family, self.pipeline, self.backbone, config, Controls("st"), max_batch=8, max_sliders=1)
        offsets, index = self.result(), self.attributes.index(instructions[0])
        scales = torch.zeros(len(_SAMPLE_SCALES), len(self.attributes))
        scales[:, index] = torch.tensor(_SAMPLE_SCALES)
        pixels = offsets.render(editor, offsets.prepare(editor, image, seed=0), scales)
        return instructions[0], _SAMPLE_SCALES, [to_pil(one) for one in pixels]
