"""Training of an adapter by prompt suppression (SliderEdit, arXiv 2511.09715, section on training).

Given the full prompt, the adapted backbone learns to predict what the frozen backbone predicts with an instruction removed.
It needs source images only, without edited ones. Suppressing part of the prompt is called PPS (partial prompt suppression),
suppressing all of it SPPS.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from slideredit_rt.adapters import Adapter, save_adapter
from slideredit_rt.editor import SliderEditor
from slideredit_rt.errors import SliderEditError
from slideredit_rt.families import Family, Kind
from slideredit_rt.modules import SliderBackbone
from slideredit_rt.sliders import Controls, Slider, compose_prompt
from slideredit_rt.spans import find_spans, row_mask
from slideredit_rt.training.data import Data
from slideredit_rt.training.trainer import Trainer, TrainingConfig

_SAMPLE_STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)

TargetPrompt = Literal["remaining", "empty", "neutral"]
AlphaSampling = Literal["uniform", "fixed"]


@dataclass(frozen=True, kw_only=True)
class SuppressionConfig(TrainingConfig):
    """Settings for training an adapter, in addition to those of `TrainingConfig`.

    The defaults are the paper's, except for `alpha_sampling`.

    Attributes:
        kind: Kind of adapter, `st` or `gst`.
        target: Prompt of the frozen model. `remaining` is the prompt without a random non-empty subset of its instructions
            (PPS), or the empty string if none is left. `empty` is the empty string and `neutral` the family's neutral
            sentence, for the whole prompt (SPPS). A GST adapter cannot know which instructions to suppress, so PPS teaches it
            the mean over subsets.
        rank: LoRA rank; `lora_alpha` equals it.
        all_projections: Adapt every linear layer whose rows the kind may scale, not only those of the released adapters.
        alpha_sampling: `fixed` is the paper's loss, at α = 1. `uniform` draws α from [0, 1] per example with the target
            `v_full + α (v_target − v_full)`, which makes the response of the slider gradual instead of a switch.
    """

    kind: Kind = "st"
    target: TargetPrompt = "remaining"
    rank: int = 16
    all_projections: bool = False
    alpha_sampling: AlphaSampling = "uniform"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check({"target": TargetPrompt, "alpha_sampling": AlphaSampling, "kind": Kind}, ("rank",))


def initial_pair(linear: nn.Linear, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return A and B initialised as in PEFT: A uniform like `nn.Linear`, B zero, so training starts at the frozen model."""
    bound = 1 / math.sqrt(linear.in_features)
    lora_a = (torch.rand(rank, linear.in_features, generator=generator) * 2 - 1) * bound
    return lora_a, torch.zeros(linear.out_features, rank)


@dataclass(frozen=True)
class _Batch:
    source: Tensor
    ids: Tensor
    full: dict[str, Tensor]
    target: dict[str, Tensor]
    token_mask: Tensor


class SuppressionTrainer(Trainer[Adapter]):
    """Trainer of the A and B matrices of one adapter. Further arguments are those of `Trainer`.

    Args:
        start: Trained adapter to start from, of the kind and the rank in `config`; None starts at the frozen model. Its
            strength curve is not taken over.

    Raises:
        SliderEditError: `start` updates other linears than the run would, or with other sizes, or is of another kind.
    """

    def __init__(
        self,
        family: Family,
        pipeline: Any,
        data: Data,
        config: SuppressionConfig,
        out: Path,
        device: torch.device | None = None,
        *,
        start: Adapter | None = None,
    ) -> None:
        self.config = config
        self.start = start
        self.what = config.kind
        super().__init__(family, pipeline, data, config, out, device)

    def build(self) -> SliderBackbone:
        backbone = SliderBackbone(self.family, self.pipeline.transformer, self._initial_adapter())
        self._check_masks()
        return backbone

    def _initial_adapter(self) -> Adapter:
        generator = torch.Generator().manual_seed(self.config.seed)
        pattern = self.family.targets(self.config.kind, all_projections=self.config.all_projections)
        pairs = {
            name: initial_pair(module, self.config.rank, generator)
            for name, module in self.pipeline.transformer.named_modules()
            if isinstance(module, nn.Linear) and pattern.fullmatch(name)
        }
        if self.start is not None:
            self._check_start(self.start, pairs)
            pairs = self.start.pairs
        return Adapter(self.family.name, self.config.kind, self.config.rank, pairs, "training")

    def _check_start(self, start: Adapter, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Check that an adapter has the kind and the matrices that this run trains."""
        if start.members or start.kind != self.config.kind:
            what = "a bank" if start.members else f"of kind {start.kind}"
            raise SliderEditError(f"adapter {start.source!r} is {what}; start from a single {self.config.kind} adapter")
        sizes, own = ({name: (a.shape, b.shape) for name, (a, b) in group.items()} for group in (start.pairs, pairs))
        if different := next((name for name in sorted(sizes.keys() | own.keys()) if sizes.get(name) != own.get(name)), None):
            raise SliderEditError(
                f"adapter {start.source!r} differs in {different} from what this run trains (rank {self.config.rank}, "
                f"{len(own)} linears); give the base, the rank and the projections that it was trained with"
            )

    def _check_masks(self) -> None:
        """Raise an error if an instruction has no text row. Training would run, but learn nothing from it."""
        if self.config.kind == "st":
            _, prompts = self.data.draw(random.Random(f"{self.config.seed}/check"), 4 * self.config.batch)
            for instructions in prompts:
                self._rows(instructions, set(range(len(instructions))))

    def _rows(self, instructions: Sequence[str], suppressed: set[int], images: Sequence[Image.Image] = ()) -> list[int]:
        """Return the text rows of the suppressed instructions."""
        prompt, most = compose_prompt(instructions), self.family.max_text_rows(self.pipeline)
        tokens = self.family.tokenize(self.pipeline, prompt, images)
        spans = find_spans(prompt, [Slider(i) for i in instructions], tokens, most)
        return [row for index in sorted(suppressed) for row in spans[index]]

    def run_settings(self) -> dict[str, Any]:
        return super().run_settings() | ({} if self.start is None else {"start": self.start.fingerprint})

    def result(self) -> Adapter:
        pairs = {n: (m.lora_A.detach().cpu().float(), m.lora_B.detach().cpu().float()) for n, m in self.own.adapted.items()}
        training = dataclasses.asdict(self.config)
        if self.start is not None:
            training["started_from"] = Path(self.start.source).name
        return Adapter(self.family.name, self.config.kind, self.config.rank, pairs, str(self.out), training)

    def write(self, trained: Adapter, path: Path) -> None:
        save_adapter(trained, path)

    @torch.no_grad()
    def _batch(self, step: int) -> _Batch:
        rng = random.Random(f"{self.config.seed}/{step}")
        images, instructions = self.data.draw(rng, self.config.batch)
        full, target, suppressed_rows = [], [], []
        for parts, seen in zip(instructions, self.prompt_images(images), strict=True):
            if self.config.target == "remaining":
                suppressed = set(rng.sample(range(len(parts)), rng.randint(1, len(parts))))
                rest = [part for index, part in enumerate(parts) if index not in suppressed]
                target.append(compose_prompt(rest) if rest else "")
            else:
                suppressed = set(range(len(parts)))
                target.append("" if self.config.target == "empty" else self.family.neutral_prompt)
            full.append(compose_prompt(parts))
            if self.config.kind == "st":
                suppressed_rows.append(self._rows(parts, suppressed, seen))
        source, ids = self.encode_images(images)
        full_text, target_text = (self.encode_prompts(prompts, images) for prompts in (full, target))
        rows = full_text["encoder_hidden_states"].shape[1]
        if self.config.kind == "st":
            token_mask = torch.stack([row_mask([span], rows) for span in suppressed_rows])
        else:
            token_mask = torch.ones(len(full), 1, rows + 2 * source.shape[1], dtype=torch.bool)
        return _Batch(source, ids, full_text, target_text, token_mask)

    def loss(self, step: int) -> Tensor:
        """Return the mean squared error, in float32, between adapted and frozen predictions on noised source images."""
        batch = self._batch(step)
        noised = self.noised(step, batch.source, batch.ids)
        uniform, shape = self.config.alpha_sampling == "uniform", (len(batch.source), 1)
        alpha = torch.rand(shape, generator=noised.generator) if uniform else torch.ones(shape)
        alpha, token_mask = alpha.to(batch.source.device), batch.token_mask.to(batch.source.device)
        rows = noised.noisy.shape[1]
        with torch.no_grad():
            target = self.module(self.inputs(noised, batch.target))[:, :rows].float()
            if uniform:
                full = self.module(self.inputs(noised, batch.full))[:, :rows].float()
                target = torch.lerp(full, target, alpha[:, :, None])
        prediction = self.module(self.inputs(noised, batch.full) | {"alpha": alpha, "token_mask": token_mask})
        return F.mse_loss(prediction[:, :rows].float(), target)

    def strip(self, image: Image.Image, instructions: Sequence[str]) -> tuple[str, Sequence[float], list[Image.Image]]:
        config = dict(self.pipeline.transformer.config)
        controls = Controls(self.config.kind)
        editor = SliderEditor(self.family, self.pipeline, self.own, config, controls, max_batch=1, max_sliders=8)
        sliders = [Slider(i) for i in instructions]
        chosen = sliders if self.config.kind == "st" else sliders[:1]
        images = editor.sweep(image, chosen, 0, _SAMPLE_STRENGTHS, prompt=compose_prompt(instructions))
        return chosen[0].instruction, _SAMPLE_STRENGTHS, images
