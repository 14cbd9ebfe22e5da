"""Train an adapter by partial prompt suppression (SliderEdit, arXiv 2511.09715, section on training).

The adapted backbone, fed the full prompt, learns to predict what the frozen backbone predicts once an instruction is
removed. Only source images are needed. Suppressing a part of the prompt is PPS, the whole of it SPPS.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from slideredit_rt.adapters import Adapter, save_adapter
from slideredit_rt.editor import SliderEditor
from slideredit_rt.errors import SliderEditError
from slideredit_rt.families import Family, Kind
from slideredit_rt.images import draw_grid, open_image, save_image
from slideredit_rt.modules import SliderBackbone
from slideredit_rt.sliders import Slider, compose_prompt, find_spans, row_mask
from slideredit_rt.training.checkpoint import load_checkpoint, save_checkpoint

_SAMPLE_STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)

TargetPrompt = Literal["remaining", "empty", "neutral"]
AlphaSampling = Literal["uniform", "fixed"]
TimestepSampling = Literal["uniform", "logit-normal"]


@dataclass(frozen=True)
class SuppressionConfig:
    """Settings of a run; the defaults are the paper's, but for `alpha_sampling`.

    Attributes:
        kind: `st` or `gst`.
        target: what the frozen model is shown. `remaining`: the prompt without a random non-empty subset of its
            instructions (PPS; the empty string when none is left). `empty` and `neutral`: nothing, or the family's neutral
            sentence, in place of the whole prompt (SPPS). A GST adapter is not told which instructions to suppress, so PPS
            teaches it the mean over subsets.
        rank: LoRA rank; `lora_alpha` equals it.
        all_projections: adapt every linear whose rows the kind may scale, not only those of the released adapters.
        alpha_sampling: `fixed` is the paper's loss at α = 1. `uniform` draws α from [0, 1] per example and moves the
            target along: `v_full + α (v_target − v_full)`, which makes the slider a ramp instead of a step.
        timestep_sampling: of the noise level σ in [0, 1].
        steps, batch: length and batch size.
        learning_rate, schedule: AdamW's, with betas 0.9 and 0.999, weight decay 1e-4 and gradient norm clipped to 1.
        seed: of data, noise and initial weights.
        gradient_checkpointing: recompute activations in the backward pass; a full-size base needs it.
    """

    kind: Kind = "st"
    target: TargetPrompt = "remaining"
    rank: int = 16
    all_projections: bool = False
    alpha_sampling: AlphaSampling = "uniform"
    timestep_sampling: TimestepSampling = "uniform"
    steps: int = 1000
    batch: int = 6
    learning_rate: float = 5e-5
    schedule: str = "constant"
    seed: int = 0
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        allowed = {"target": TargetPrompt, "alpha_sampling": AlphaSampling, "timestep_sampling": TimestepSampling, "kind": Kind}
        for name, choices in allowed.items():
            if getattr(self, name) not in get_args(choices):
                raise SliderEditError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(get_args(choices))}")
        for name in ("rank", "steps", "batch"):
            if getattr(self, name) < 1:
                raise SliderEditError(f"{name} is {getattr(self, name)}; give at least 1")


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
        pictures, prompts = [], []
        for path in rng.choices(self.images, k=batch):
            image = open_image(path)
            edge = min(image.size)
            left, top = (image.width - edge) // 2, (image.height - edge) // 2
            square = image.crop((left, top, left + edge, top + edge)).resize((self.side, self.side), Image.Resampling.LANCZOS)
            pixels = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8)
            pictures.append(pixels.view(self.side, self.side, 3).permute(2, 0, 1) / 255)
            prompts.append(rng.sample(self.instructions, min(len(self.instructions), rng.randint(1, 3))))
        return torch.stack(pictures), prompts


def _to_pil(image: Tensor) -> Image.Image:
    return Image.fromarray((image.permute(1, 2, 0) * 255).round().to(torch.uint8).cpu().numpy())


@dataclass(frozen=True)
class _Batch:
    source: Tensor
    ids: Tensor
    full: dict[str, Tensor]
    target: dict[str, Tensor]
    token_mask: Tensor


class SuppressionTrainer:
    """Trains the A and B of one adapter over a frozen pipeline.

    Args:
        family, pipeline: the base; its weights are not changed.
        data: source images and instructions.
        config: settings.
        out: the adapter file to write; state for resuming lies beside it until the run is done.
    """

    def __init__(self, family: Family, pipeline: Any, data: Data, config: SuppressionConfig, out: Path) -> None:
        self.family, self.pipeline, self.data, self.config, self.out = family, pipeline, data, config, out
        self.accelerator = Accelerator(cpu=not torch.cuda.is_available())
        self.state_path = out.with_name(f"{out.name}.state.pt")
        pipeline.to(self.accelerator.device)
        for part in ("transformer", "vae", "text_encoder", "text_encoder_2"):
            if (module := getattr(pipeline, part, None)) is not None:
                module.requires_grad_(False).eval()
        if config.gradient_checkpointing:
            pipeline.transformer.enable_gradient_checkpointing()
        self.backbone = SliderBackbone(family, pipeline.transformer, self._initial_adapter())
        self._check_masks()
        parameters = [p for p in self.backbone.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, betas=(0.9, 0.999), weight_decay=1e-4)
        scheduler = get_scheduler(
            config.schedule, optimizer, num_warmup_steps=config.steps // 20, num_training_steps=config.steps
        )
        self.backbone, self.optimizer, self.scheduler = self.accelerator.prepare(self.backbone, optimizer, scheduler)

    def _initial_adapter(self) -> Adapter:
        # PEFT's initialisation: A uniform as nn.Linear's own, B zero, so that training starts at the frozen model.
        generator = torch.Generator().manual_seed(self.config.seed)
        pattern = self.family.targets(self.config.kind, all_projections=self.config.all_projections)
        rank = self.config.rank
        pairs = {}
        for name, module in self.pipeline.transformer.named_modules():
            if isinstance(module, nn.Linear) and pattern.fullmatch(name):
                bound = 1 / math.sqrt(module.in_features)
                lora_a = (torch.rand(rank, module.in_features, generator=generator) * 2 - 1) * bound
                pairs[name] = (lora_a, torch.zeros(module.out_features, rank))
        return Adapter(self.family.name, self.config.kind, rank, pairs, "training")

    def _check_masks(self) -> None:
        """Refuse to start when an instruction owns no row: the loss would teach nothing and nobody would notice."""
        if self.config.kind == "st":
            _, prompts = self.data.draw(random.Random(f"{self.config.seed}/check"), 4 * self.config.batch)
            for instructions in prompts:
                self._rows(instructions, set(range(len(instructions))))

    def _rows(self, instructions: Sequence[str], suppressed: set[int], images: Sequence[Image.Image] = ()) -> list[int]:
        """Text rows of the suppressed instructions."""
        prompt, most = compose_prompt(instructions), self.family.max_text_rows(self.pipeline)
        tokens = self.family.tokenize(self.pipeline, prompt, images)
        spans = find_spans(prompt, [Slider(i) for i in instructions], tokens, most)
        return [row for index in sorted(suppressed) for row in spans[index]]

    def adapter(self) -> Adapter:
        """The adapter as trained so far."""
        backbone = self.accelerator.unwrap_model(self.backbone)
        pairs = {n: (m.lora_A.detach().cpu().float(), m.lora_B.detach().cpu().float()) for n, m in backbone.adapted.items()}
        training = dataclasses.asdict(self.config)
        return Adapter(self.family.name, self.config.kind, self.config.rank, pairs, str(self.out), training)

    @torch.no_grad()
    def _batch(self, step: int) -> _Batch:
        rng = random.Random(f"{self.config.seed}/{step}")
        images, instructions = self.data.draw(rng, self.config.batch)
        pictures = [[picture] for picture in map(_to_pil, images)]
        full, target, suppressed_rows = [], [], []
        for parts, seen in zip(instructions, pictures, strict=True):
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
        source, ids = self.family.encode_image(self.pipeline, (images * 2 - 1).to(self.accelerator.device))
        most = self.family.max_text_rows(self.pipeline)
        full_text, target_text = (self.family.encode_prompt(self.pipeline, p, most, pictures) for p in (full, target))
        rows = full_text["encoder_hidden_states"].shape[1]
        if self.config.kind == "st":
            token_mask = torch.stack([row_mask([span], rows) for span in suppressed_rows])
        else:
            token_mask = torch.ones(len(full), 1, rows + 2 * source.shape[1], dtype=torch.bool)
        return _Batch(source, ids, full_text, target_text, token_mask)

    def loss(self, step: int) -> Tensor:
        """Mean squared error in float32 between the adapted and the frozen prediction, on noised source images."""
        batch = self._batch(step)
        count, device = len(batch.source), batch.source.device
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + step)
        if self.config.timestep_sampling == "uniform":
            sigma = torch.rand(count, generator=generator).to(device)
        else:
            sigma = torch.randn(count, generator=generator).sigmoid().to(device)
        noise = torch.randn(batch.source.shape, generator=generator).to(device)
        uniform = self.config.alpha_sampling == "uniform"
        alpha = (torch.rand(count, 1, generator=generator) if uniform else torch.ones(count, 1)).to(device)
        noisy = torch.lerp(batch.source, noise, sigma[:, None, None])

        def inputs(text: dict[str, Tensor]) -> dict[str, Tensor]:
            return self.family.training_inputs(self.pipeline, noisy, batch.source, batch.ids, text, sigma)

        rows = noisy.shape[1]
        with torch.no_grad():
            target = self.backbone(inputs(batch.target))[:, :rows].float()
            if uniform:
                full = self.backbone(inputs(batch.full))[:, :rows].float()
                target = torch.lerp(full, target, alpha[:, :, None])
        prediction = self.backbone(inputs(batch.full) | {"alpha": alpha, "token_mask": batch.token_mask.to(device)})
        return F.mse_loss(prediction[:, :rows].float(), target)

    def sample(self, step: int) -> Path:
        """Draw one data example at several strengths with the adapter as it is; returns the picture's path in `OUT.samples`."""
        images, instructions = self.data.draw(random.Random(f"{self.config.seed}/sample"), 1)
        backbone = self.accelerator.unwrap_model(self.backbone)
        config = dict(self.pipeline.transformer.config)
        editor = SliderEditor(self.family, self.pipeline, backbone, config, self.config.kind, max_batch=1, max_sliders=8)
        sliders = [Slider(i) for i in instructions[0]]
        chosen = sliders if self.config.kind == "st" else sliders[:1]
        prompt = compose_prompt(instructions[0])
        strip = editor.sweep(_to_pil(images[0]), chosen, 0, _SAMPLE_STRENGTHS, prompt=prompt)
        title = f"step {step}: {chosen[0].instruction}"
        path = self.out.with_name(f"{self.out.name}.samples") / f"step-{step:06d}.png"
        save_image(draw_grid([strip], [f"{s:g}" for s in _SAMPLE_STRENGTHS], [""], title), path)
        return path

    def train(
        self,
        *,
        progress: bool = True,
        checkpoint_every: int = 100,
        sample_every: int = 0,
        snapshots: Collection[int] = (),
    ) -> Adapter:
        """Run to the end, continuing from an interrupted run's state; writes and returns the adapter.

        Args:
            progress: show a bar with the loss on standard error.
            checkpoint_every: steps between saved states.
            sample_every: steps between sample pictures; 0 draws none.
            snapshots: steps after which the adapter as it is then is kept, as `OUT-step-N.safetensors`.
        """
        if outside := [step for step in snapshots if not 0 < step < self.config.steps]:
            raise SliderEditError(f"snapshot after step {outside[0]} of {self.config.steps}: name steps inside the run")
        start = self._resume()
        average = None
        with tqdm(
            range(start, self.config.steps),
            f"train {self.config.kind}",
            initial=start,
            total=self.config.steps,
            disable=not progress,
            mininterval=1,
        ) as bar:
            for step in bar:
                loss = self.loss(step)
                self.accelerator.backward(loss)
                self.accelerator.clip_grad_norm_(self.backbone.parameters(), 1.0)
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad(set_to_none=True)
                average = loss.item() if average is None else 0.95 * average + 0.05 * loss.item()
                bar.set_postfix(loss=f"{average:.5f}", refresh=False)
                if (step + 1) % checkpoint_every == 0 and step + 1 < self.config.steps:
                    self._save_state(step + 1)
                if sample_every and (step + 1) % sample_every == 0:
                    self.sample(step + 1)
                if step + 1 in snapshots:
                    save_adapter(self.adapter(), self.out.with_name(f"{self.out.stem}-step-{step + 1}.safetensors"))
        adapter = self.adapter()
        save_adapter(adapter, self.out)
        self.state_path.unlink(missing_ok=True)
        return adapter

    def _save_state(self, step: int) -> None:
        pairs = {name: list(pair) for name, pair in self.adapter().pairs.items()}
        state = {"step": step, "config": dataclasses.asdict(self.config), "pairs": pairs}
        state |= {"optimizer": self.optimizer.state_dict(), "scheduler": self.scheduler.state_dict()}
        save_checkpoint(self.state_path, state)

    def _resume(self) -> int:
        state = load_checkpoint(self.state_path)
        if state is None:
            return 0
        if state["config"] != dataclasses.asdict(self.config):
            raise SliderEditError(
                f"{str(self.state_path)!r} holds an unfinished run with other settings; "
                "delete it, or continue with the same settings"
            )
        for name, module in self.accelerator.unwrap_model(self.backbone).adapted.items():
            module.lora_A.data.copy_(state["pairs"][name][0])
            module.lora_B.data.copy_(state["pairs"][name][1])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        return int(state["step"])
