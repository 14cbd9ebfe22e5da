"""Concept Sliders (Gandikota et al., arXiv 2311.12092, the FLUX variant), a rival method of SliderEdit: a LoRA per attribute.

Each LoRA learns to move the prediction at a neutral prompt towards and beyond the effect of an instruction, at the same norm.
All attributes train at once as a bank. An example affects its own member only, so the members are the same as if they were
trained one by one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from slideredit_rt.adapters import Adapter, Member, save_adapter
from slideredit_rt.editor import SliderEditor
from slideredit_rt.families import Family
from slideredit_rt.modules import SliderBackbone
from slideredit_rt.sliders import Controls, Slider
from slideredit_rt.strength import StrengthCurve
from slideredit_rt.training.contrast import ContrastConfig, ContrastTrainer
from slideredit_rt.training.data import Data

_SAMPLE_SCALES = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0)


@dataclass(frozen=True)
class ConceptConfig(ContrastConfig):
    """Settings for training concept sliders, in addition to those of `ContrastConfig`.

    The defaults of learning rate, steps, rank and η are the published ones.

    Attributes:
        learning_rate: Peak learning rate.
        rank: LoRA rank of each member.
        eta: Distance of the target from the neutral prediction; 1 is the prediction at the instruction.
    """

    learning_rate: float = 2e-3
    rank: int = 16
    eta: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check({}, ("rank",))


def concept_target(neutral: Tensor, positive: Tensor, eta: float) -> Tensor:
    """Return `v(c) + η (v(c⁺) − v(c⁻))`, `[B, S, C]`, scaled per sample to the norm of `v(c⁺)`.

    Args:
        neutral: Prediction at the neutral prompt, which is both c and c⁻, `[B, S, C]`.
        positive: Prediction at the instruction c⁺, `[B, S, C]`.
        eta: Factor η.
    """
    far = neutral + eta * (positive - neutral)
    norm, wanted = (v.flatten(1).norm(dim=1)[:, None, None] for v in (far, positive))
    target: Tensor = far * (wanted / norm)
    return target


class ConceptTrainer(ContrastTrainer[Adapter]):
    """Trainer of the A matrices of a bank; the B matrices are random, orthogonal and fixed. Arguments as for `Trainer`.

    It adapts attention projections only. A member's alpha equals its strength, so strength 0 is the edit at the neutral
    prompt.
    """

    what = "concepts"

    def __init__(
        self, family: Family, pipeline: Any, data: Data, config: ConceptConfig, out: Path, device: torch.device | None = None
    ) -> None:
        self.config = config
        super().__init__(family, pipeline, data, config, out, device)

    def build(self) -> SliderBackbone:
        self.backbone = SliderBackbone(self.family, self.pipeline.transformer, self._initial_bank())
        for module in self.backbone.adapted.values():
            module.lora_B.requires_grad_(False)
        return self.backbone

    def _initial_bank(self) -> Adapter:
        generator = torch.Generator().manual_seed(self.config.seed)
        pattern, count, rank = self.family.targets("gst"), len(self.attributes), self.config.rank
        pairs = {}
        for name, module in self.pipeline.transformer.named_modules():
            if isinstance(module, nn.Linear) and pattern.fullmatch(name) and ".attn." in name:
                bases = [torch.randn(module.out_features, rank, generator=generator) for _ in range(count)]
                lora_b = torch.cat([torch.linalg.qr(basis).Q for basis in bases], dim=1)
                # A starts at zero, so training starts at the frozen model.
                pairs[name] = (torch.zeros(count * rank, module.in_features), lora_b)
        return self._bank(pairs)

    def _bank(self, pairs: dict[str, tuple[Tensor, Tensor]]) -> Adapter:
        member = Member(str(self.out), "gst", StrengthCurve((0.0, 1.0), (0.0, 1.0)))
        return Adapter(
            family=self.family.name,
            kind="gst",
            rank=len(self.attributes) * self.config.rank,
            pairs=pairs,
            source=str(self.out),
            training=dataclasses.asdict(self.config),
            members=dict.fromkeys(self.attributes, member),
        )

    def result(self) -> Adapter:
        return self._bank({n: (m.lora_A.detach().cpu(), m.lora_B.detach().cpu()) for n, m in self.own.adapted.items()})

    def write(self, trained: Adapter, path: Path) -> None:
        save_adapter(trained, path)

    def loss(self, step: int) -> Tensor:
        """Return the mean squared error, in float32, between the adapted prediction at the neutral prompt and the target."""
        batch = self.contrast(step)
        target = concept_target(batch.neutral, batch.positive, self.config.eta)
        inputs = self.inputs(batch.noised, batch.text)
        rows = inputs["encoder_hidden_states"].shape[1] + inputs["hidden_states"].shape[1]
        everywhere = torch.ones(len(target), 1, rows, dtype=torch.bool, device=target.device)
        prediction = self.module(inputs | {"alpha": batch.chosen[:, None], "token_mask": everywhere})
        return F.mse_loss(prediction[:, : target.shape[1]].float(), target)

    def strip(self, image: Image.Image, instructions: Sequence[str]) -> tuple[str, Sequence[float], list[Image.Image]]:
        controls = Controls("gst", members={name: member.curve for name, member in self.result().members.items()})
        config = dict(self.pipeline.transformer.config)
        editor = SliderEditor(self.family, self.pipeline, self.own, config, controls, max_batch=8, max_sliders=1)
        prepared = editor.prepare(image, [Slider(instructions[0])], prompt=self.family.neutral_prompt)
        return instructions[0], _SAMPLE_SCALES, editor.render(prepared, [[scale] for scale in _SAMPLE_SCALES])
