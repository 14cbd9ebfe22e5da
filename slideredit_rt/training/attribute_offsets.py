"""Attribute offsets (Continuous Attribute Control, Baumann et al., arXiv 2403.17064), a rival method of SliderEdit.

Each attribute has a trained vector. Added to the text rows of a noun and multiplied by the slider's setting, it changes how
the model renders that noun. The method was published for a text-to-image model and nouns such as "person". Here it is applied
to the noun "image" of the editor's neutral prompt.
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

from slideredit_rt.denoising import fill_batch
from slideredit_rt.editor import SliderEditor
from slideredit_rt.errors import SliderEditError
from slideredit_rt.families import Family
from slideredit_rt.files import atomic_file
from slideredit_rt.modules import SliderBackbone
from slideredit_rt.preparing import Prepared
from slideredit_rt.sliders import Controls, Slider
from slideredit_rt.spans import find_spans
from slideredit_rt.training.contrast import ContrastConfig, ContrastTrainer
from slideredit_rt.training.data import Data
from slideredit_rt.training.trainer import to_pil

_SAMPLE_SCALES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0)
_TEXT = "encoder_hidden_states"
_LEAST, _MOST = 0.1, 5.0


def add_offsets(embeddings: Tensor, rows: Sequence[int], scales: Tensor, vectors: Tensor) -> Tensor:
    """Return `e + α m δ`: the embeddings with each attribute's scaled vector added to the rows of the noun.

    Args:
        embeddings: Text embeddings e, `[B, text_rows, D]`.
        rows: Text rows of the noun, the mask m.
        scales: Scale α of each attribute, `[B, G]`.
        vectors: Vector δ of each attribute, `[G, D]`.
    """
    mask = torch.zeros(embeddings.shape[1], 1, dtype=embeddings.dtype, device=embeddings.device)
    mask[list(rows)] = 1
    return embeddings + mask * (scales @ vectors)[:, None]


@dataclass(frozen=True)
class AttributeOffsets:
    """Trained offsets. They work with any engine of their base, because text embeddings are an input per row.

    Attributes:
        family: Base-model family that they were trained on.
        noun: Words of the neutral prompt to whose rows they are added.
        attributes: Names of the G attributes.
        vectors: Vectors, `[G, D]`, float32.
        training: Settings of the training run.
    """

    family: str
    noun: str
    attributes: tuple[str, ...]
    vectors: Tensor
    training: dict[str, Any] = field(default_factory=dict)

    def prepare(self, editor: SliderEditor, image: Image.Image, seed: int) -> Prepared:
        """Encode an image with the neutral prompt. The only span is that of the noun."""
        member = next(iter(editor.members), None)
        return editor.prepare(image, [Slider(self.noun, adapter=member)], prompt=editor.family.neutral_prompt, seed=seed)

    def render(self, editor: SliderEditor, prepared: Prepared, scales: Tensor, steps: int | None = None) -> Tensor:
        """Render one image per row of `scales`, all from the same noise and without sliders.

        Args:
            editor: Editor of the base.
            prepared: Result of `prepare`.
            scales: Scale of each attribute, `[N, G]`.
            steps: Denoising steps; None uses the family's default.

        Returns:
            Float32 `[N, 3, H, W]` in [0, 1].
        """
        images, steps = [], editor.default_steps if steps is None else steps
        for chunk in scales.split(editor.max_batch):
            filled = fill_batch(chunk, editor.min_batch)
            inputs = editor.frozen_inputs(prepared, len(filled))
            embeddings = inputs["encoder_hidden_states"]
            offset = add_offsets(embeddings, prepared.spans[0], filled.to(embeddings), self.vectors.to(embeddings))
            inputs["encoder_hidden_states"] = offset.contiguous()
            images.append(editor.denoise(prepared.conditioning, inputs, steps)[: len(chunk)])
        return torch.cat(images)


def save_offsets(offsets: AttributeOffsets, path: Path) -> None:
    """Write a safetensors file atomically."""
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
    """Read a file written by `save_offsets`.

    Raises:
        SliderEditError: The file does not exist, does not contain attribute offsets, or is for another family.
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
            f"{str(path)!r} does not contain attribute offsets ({error}); train them with slideredit-rt train offsets"
        ) from None
    if offsets.family != family.name:
        raise SliderEditError(
            f"attribute offsets {str(path)!r} were trained for {offsets.family}, not for {family.name}; train new ones"
        )
    return offsets


@dataclass(frozen=True)
class OffsetConfig(ContrastConfig):
    """Settings for training attribute offsets, in addition to those of `ContrastConfig`.

    Attributes:
        learning_rate: Peak learning rate.
        noun: Words of the family's neutral prompt that get the offset.
    """

    learning_rate: float = 0.1
    noun: str = "image"


class _Vectors(nn.Module):
    """The trained vectors, `[G, D]`. They start at zero, so training starts at the frozen model."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.vectors = nn.Parameter(torch.zeros(count, width))

    def forward(self, embeddings: Tensor, rows: Sequence[int], scales: Tensor) -> Tensor:
        return add_offsets(embeddings, rows, scales, self.vectors)


class OffsetTrainer(ContrastTrainer[AttributeOffsets]):
    """Trainer of one vector per attribute, with the published optimiser settings. Arguments are those of `Trainer`."""

    what = "offsets"
    betas = (0.5, 0.8)
    weight_decay = 0.333

    def __init__(
        self, family: Family, pipeline: Any, data: Data, config: OffsetConfig, out: Path, device: torch.device | None = None
    ) -> None:
        self.config = config
        super().__init__(family, pipeline, data, config, out, device)

    def build(self) -> nn.Module:
        self.backbone = SliderBackbone(self.family, self.pipeline.transformer, None)
        text = next(s for s in self.family.input_specs(dict(self.pipeline.transformer.config)) if s.name == _TEXT)
        return _Vectors(len(self.attributes), int(text.shape[2]))

    def _rows(self, images: Sequence[Image.Image]) -> list[int]:
        """Return the text rows of the noun in the neutral prompt."""
        prompt, most = self.family.neutral_prompt, self.family.max_text_rows(self.pipeline)
        return find_spans(prompt, [Slider(self.config.noun)], self.family.tokenize(self.pipeline, prompt, images), most)[0]

    def result(self) -> AttributeOffsets:
        vectors = self.own.vectors.detach().cpu().float().clone()
        training = dataclasses.asdict(self.config)
        return AttributeOffsets(self.family.name, self.config.noun, tuple(self.attributes), vectors, training)

    def write(self, trained: AttributeOffsets, path: Path) -> None:
        save_offsets(trained, path)

    def loss(self, step: int) -> Tensor:
        """Return the mean squared error, in float32, between `v(c, e + s m δ)` and `v(c) + s (v(c⁺) − v(c⁻))`.

        c and c⁻ are the neutral prompt, c⁺ is the instruction, and the scales s are drawn from ±[0.1, 5].
        """
        batch = self.contrast(step)
        generator, shape = batch.noised.generator, (len(batch.images), 1)
        size = _LEAST + (_MOST - _LEAST) * torch.rand(shape, generator=generator)
        scale = (size * (2 * torch.randint(0, 2, shape, generator=generator) - 1)).to(batch.neutral)
        target = batch.neutral + scale[:, :, None] * (batch.positive - batch.neutral)
        inputs = self.inputs(batch.noised, batch.text)
        inputs[_TEXT] = self.module(inputs[_TEXT], self._rows(self.prompt_images(batch.images[:1])[0]), scale * batch.chosen)
        return F.mse_loss(self.backbone(inputs)[:, : target.shape[1]].float(), target)

    def strip(self, image: Image.Image, instructions: Sequence[str]) -> tuple[str, Sequence[float], list[Image.Image]]:
        config = dict(self.pipeline.transformer.config)
        editor = SliderEditor(self.family, self.pipeline, self.backbone, config, Controls("st"), max_batch=8, max_sliders=1)
        offsets, index = self.result(), self.attributes.index(instructions[0])
        scales = torch.zeros(len(_SAMPLE_SCALES), len(self.attributes))
        scales[:, index] = torch.tensor(_SAMPLE_SCALES)
        pixels = offsets.render(editor, offsets.prepare(editor, image, seed=0), scales)
        return instructions[0], _SAMPLE_SCALES, [to_pil(one) for one in pixels]
