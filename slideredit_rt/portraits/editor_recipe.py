"""Training recipe of `portraits-kontext`, a FLUX-Kontext pipeline of 12 MB that edits drawings of people.

The latents are the low frequencies of each 8×8 patch and the shares of it that the parts of the drawing cover (see
`slideredit_rt.training.embedded.autoencoder`). The editor learns in two stages:

- `editor`: flow matching on exact pairs, with and without instructions, at the family's default guidance.
- `guidance`: a guidance scale of g stands for classifier-free guidance with the weight w = g / default, so the default is the
  exact edit. The editor of the first stage is the teacher, `v(∅) + w (v(P) − v(∅))`, at noisy states around the exact drawing
  of strength w. Half of each batch repeats the first stage. Sources are encoded here, so the editor gets to know the encoder's
  errors.

Pairs are drawn and rendered on the device that trains. Generators are seeded by the number of the batch or the step.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FluxKontextPipeline
from torch import Tensor

from slideredit_rt.families.flux_kontext import FluxKontext
from slideredit_rt.images import draw_grid, save_image
from slideredit_rt.portraits.prompts import VOCABULARY, Prompts
from slideredit_rt.portraits.world import (
    INSTRUCTIONS,
    LAYERS,
    SIZE,
    Example,
    draw_people,
    edit,
    held_out_examples,
    render,
    render_with_layers,
    sample_instructions,
)
from slideredit_rt.training.embedded.autoencoder import Draw, autoencoder_losses, decoder_losses, patch_filters
from slideredit_rt.training.embedded.flow import Backbone, add_noise, edit_images, position_ids
from slideredit_rt.training.embedded.loop import Losses
from slideredit_rt.training.embedded.model import Sizes, build_pipeline
from slideredit_rt.training.embedded.pool import Pool
from slideredit_rt.training.embedded.recipe import EditorRecipe, Stage
from slideredit_rt.training.trainer import to_pil

SIZES = Sizes(side=SIZE, widths=(24, 40, 64, 64), channels=32, heads=6, dual=2, single=3)
_PATCH = 2 ** (len(SIZES.widths) - 1)
# Shares of prompts with 0, 1, 2 and 3 instructions.
_COUNT_WEIGHTS = (0.10, 0.38, 0.32, 0.20)
_SPARE_ROWS = 6
_LEAST_GUIDANCE, _MOST_GUIDANCE, _MOST_STRENGTH = 1.0, 5.0, 2.0
# The error of a prediction falls slowly from the highest noise level to .7, and quickly below, where the noisy target shows the
# edit. So most of the training belongs to high levels, where the model decides.
_SHIFT = 8.0
# Seeds of steps and of drawn pairs are apart, also between the stages.
_EDITOR_SEED, _GUIDANCE_SEED = 10_000_000, 20_000_000
_EDITOR_PAIRS, _PLAIN_PAIRS, _GUIDED_PAIRS, _PEOPLE = 30_000_000, 40_000_000, 50_000_000, 60_000_000
# Drawing a batch of pairs takes a fifth of a step on two cores, and most of a step on a GPU. The pool takes 1.1 GB with batches
# of 256, and every start of a stage fills it.
_POOLED_BATCHES, _STEPS_PER_DRAW = 64, 8

# Luminance has more frequencies than the two colour differences, and all parts of a drawing have a channel.
_ORDER = sorted(
    ((u * u + v * v + (9 if c else 0), c, u, v) for c in range(3) for u in range(_PATCH) for v in range(_PATCH)),
)
_FREQUENCIES = [(c, u, v) for _, c, u, v in _ORDER[: SIZES.channels - len(LAYERS)]]


def varied_people(count: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Draw people of whom most are edited, with any strengths up to 1.75.

    Args:
        count: Number of people.
        generator: Random number generator.
        device: Device of the result.
    """
    where = generator.device
    people = draw_people(count, generator, device)
    counts = torch.randint(0, 4, (count,), generator=generator, device=where)
    chosen = sample_instructions(people, counts, generator)
    strengths = 1.75 * torch.rand(chosen.shape, generator=generator, device=where)
    return edit(people, chosen * strengths.to(device))


class IdealLatents:
    """Latents that the autoencoder learns: the features of a drawing, shifted and scaled.

    A channel of standard deviation s is divided by √s, so that rare and fine features weigh more than in the image, but less
    than flat colour. The scales come from the same 128 people on every device.

    Args:
        device: Device of the images.
    """

    def __init__(self, device: torch.device) -> None:
        self.filters = patch_filters(_PATCH, _FREQUENCIES).to(device)
        people = varied_people(128, torch.Generator().manual_seed(0), device)
        images, covers = render_with_layers(people)
        features = self._features(images * 2 - 1, covers)
        spread, self.shift = torch.std_mean(features, dim=(0, 2, 3), keepdim=True)
        scale = spread.clamp_min(0.01).rsqrt()
        self.scale = scale / (spread * scale).square().mean().sqrt()

    def _features(self, images: Tensor, covers: Tensor) -> Tensor:
        return torch.cat([F.conv2d(images, self.filters, stride=_PATCH), F.avg_pool2d(covers, _PATCH)], dim=1)

    def __call__(self, people: Tensor) -> tuple[Tensor, Tensor]:
        """Return drawings of people, `[N, 3, H, W]` in [−1, 1], and their latents, `[N, C, H/8, W/8]`."""
        images, covers = render_with_layers(people)
        images = images * 2 - 1
        return images, (self._features(images, covers) - self.shift) * self.scale


@cache
def ideal_latents(device: torch.device) -> IdealLatents:
    """Return the latents for a device, which all stages share."""
    return IdealLatents(device)


def _image_draw(device: torch.device, batch: int) -> Draw:
    """Return batches of drawings and their latents. They come from a pool: a GPU draws longer than a step takes."""
    ideal = ideal_latents(device)

    def draw(number: int) -> tuple[Tensor, Tensor]:
        return ideal(varied_people(batch, torch.Generator(device).manual_seed(_PEOPLE + number), device))

    pool = Pool(draw, _POOLED_BATCHES, _STEPS_PER_DRAW)

    @torch.no_grad()
    def take(step: int, count: int) -> tuple[Tensor, Tensor]:
        images, latents = pool.take(step, count, torch.Generator(device).manual_seed(step))
        return images, latents

    return take


class _Edits:
    """Batches of edits on one device.

    Args:
        pipeline: Pipeline of the editor.
        device: Device of the pipeline.
        encode: Encode sources with the autoencoder, whose errors an edit has to cope with, instead of taking their ideal
            latents.
    """

    def __init__(self, pipeline: FluxKontextPipeline, device: torch.device, *, encode: bool = False) -> None:
        self.pipeline, self.device, self.encode = pipeline, device, encode
        self.ideal, self.prompts = ideal_latents(device), Prompts(pipeline, device)
        self.counts = torch.tensor(_COUNT_WEIGHTS, device=device).cumsum(0)[:-1]

    def backbone(self) -> Backbone:
        """Return the trained part of the pipeline."""
        ids = position_ids(self.pipeline, SIZE // _PATCH // 2, self.device)
        return Backbone(self.pipeline.transformer, self.pipeline.text_encoder_2, ids)

    def rows(self, seed: int) -> int:
        """Return the number of text rows of a step. It varies, so that padding means nothing."""
        return self.prompts.longest + random.Random(f"portraits/{seed}").randint(0, _SPARE_ROWS)

    def draw(self, weight: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Draw people with instructions.

        Args:
            weight: Strength of the edit of each of the N people, `[N]`.
            generator: Generator on the device.

        Returns:
            Latents of the people and of the edited people, `[N, S, 4 · C]`, and the order of their prompts.
        """
        count = len(weight)
        people = draw_people(count, generator, self.device)
        counts = torch.bucketize(torch.rand(count, generator=generator, device=self.device), self.counts)
        strengths = sample_instructions(people, counts, generator)
        images, latents = self.ideal(torch.cat([people, edit(people, strengths * weight[:, None])]))
        if self.encode:
            latents[:count] = self.pipeline.vae.encode(images[:count]).latent_dist.mean
        source, target = self.pipeline._pack_latents(latents, *latents.shape).chunk(2)
        return source, target, self.prompts.draw_order(strengths, generator)


def editor_losses(pipeline: FluxKontextPipeline, device: torch.device, batch: int) -> Callable[[int], Losses]:
    """Return the losses of flow matching on exact pairs, at the default guidance."""
    edits = _Edits(pipeline, device)
    backbone, exact = edits.backbone(), torch.ones(batch, device=device)

    def draw(number: int) -> tuple[Tensor, Tensor, Tensor]:
        return edits.draw(exact, torch.Generator(device).manual_seed(_EDITOR_PAIRS + number))

    pool = Pool(draw, _POOLED_BATCHES, _STEPS_PER_DRAW)

    def losses(step: int) -> Losses:
        seed = _EDITOR_SEED + step
        generator = torch.Generator(device).manual_seed(seed)
        with torch.no_grad():
            source, target, order = pool.take(step, batch, generator)
            noisy = add_noise(source, target, edits.prompts.draw_pooled(batch, generator), generator, _SHIFT)
            tokens = edits.prompts.ids(order, edits.rows(seed))
        velocity = backbone.velocity(noisy, tokens, FluxKontext.guidance_scale * exact)
        error = F.mse_loss(velocity, noisy.velocity)
        return error, error

    return losses


def guided(unconditional: Tensor, conditional: Tensor, weight: Tensor) -> Tensor:
    """Return the prediction of classifier-free guidance, `v(∅) + w (v(P) − v(∅))`, `[N, S, C]`.

    Args:
        unconditional: Prediction at the empty prompt, `[N, S, C]`.
        conditional: Prediction at the prompt, `[N, S, C]`.
        weight: Weight w of each, `[N]`.
    """
    return torch.lerp(unconditional, conditional, weight[:, None, None])


def guidance_losses(pipeline: FluxKontextPipeline, device: torch.device, batch: int) -> Callable[[int], Losses]:
    """Return the losses of the guidance stage. The teacher is the pipeline as it is now."""
    edits = _Edits(pipeline, device, encode=True)
    backbone = edits.backbone()
    frozen = [copy.deepcopy(part).requires_grad_(False).eval() for part in (pipeline.transformer, pipeline.text_encoder_2)]
    teacher = Backbone(frozen[0], frozen[1], backbone.img_ids)
    plain, default = batch // 2, FluxKontext.guidance_scale

    def draw_plain(number: int) -> tuple[Tensor, Tensor, Tensor]:
        return edits.draw(torch.ones(plain, device=device), torch.Generator(device).manual_seed(_PLAIN_PAIRS + number))

    def draw_guided(number: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        generator = torch.Generator(device).manual_seed(_GUIDED_PAIRS + number)
        guidance = torch.empty(batch - plain, device=device).uniform_(_LEAST_GUIDANCE, _MOST_GUIDANCE, generator=generator)
        return *edits.draw((guidance / default).clamp(max=_MOST_STRENGTH), generator), guidance

    pools = [Pool(draw, _POOLED_BATCHES, _STEPS_PER_DRAW) for draw in (draw_plain, draw_guided)]

    def losses(step: int) -> Losses:
        seed = _GUIDANCE_SEED + step
        generator = torch.Generator(device).manual_seed(seed)
        with torch.no_grad():
            *exact, usual = *pools[0].take(step, plain, generator), torch.full((plain,), default, device=device)
            *strengthened, scales = pools[1].take(step, batch - plain, generator)
            source, target, order = (torch.cat(pair) for pair in zip(exact, strengthened, strict=True))
            noisy = add_noise(source, target, edits.prompts.draw_pooled(batch, generator), generator, _SHIFT)
            rows = edits.rows(seed)
            tokens = edits.prompts.ids(order, rows)
            empty = edits.prompts.ids(edits.prompts.nothing(batch - plain), rows)
            rest, default_scales = noisy.part(slice(plain, None)), torch.full_like(scales, default)
            conditional = teacher.velocity(rest, tokens[plain:], default_scales)
            wanted = guided(teacher.velocity(rest, empty, default_scales), conditional, scales / default)
        velocity = backbone.velocity(noisy, tokens, torch.cat([usual, scales]))
        error = F.mse_loss(velocity, torch.cat([noisy.velocity[:plain], wanted]))
        return error, error

    return losses


def psnr(images: Tensor, exact: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio of each image in decibels, `[N]`.

    Args:
        images: Images, `[N, 3, H, W]` in [0, 1].
        exact: Exact images, of the same shape.
    """
    return -10 * (images - exact).square().mean(dim=(1, 2, 3)).clamp_min(1e-10).log10()


@torch.no_grad()
def _reconstruct(pipeline: FluxKontextPipeline, images: Tensor) -> Tensor:
    """Return images after the autoencoder, on the CPU."""
    vae, parts = pipeline.vae, []
    for part in (images * 2 - 1).split(32):
        decoded = vae.decode(vae.encode(part.to(vae.device)).latent_dist.mean).sample
        parts.append((decoded / 2 + 0.5).clamp(0, 1).float().cpu())
    return torch.cat(parts)


def _outside(examples: list[Example], images: Tensor, exact: Tensor) -> Tensor:
    """Return the root mean squared distance of each image where its edit changes nothing, `[N]`."""
    source = render(torch.cat([e.people for e in examples]))
    free = ((exact - source).abs().amax(dim=1, keepdim=True) < 1 / 255).float()
    free = 1 - F.max_pool2d(1 - free, 9, 1, 4)
    squared = ((images - exact).square() * free).sum(dim=(1, 2, 3))
    return (squared / (3 * free.sum(dim=(1, 2, 3))).clamp_min(1)).sqrt()


def evaluate_editor(
    pipeline: FluxKontextPipeline, samples: Path | None = None, number: int = 64, steps: int = 28
) -> dict[str, Any]:
    """Compare edits of held-out people with the exact ones, with diffusers' own pipeline.

    Args:
        pipeline: Pipeline of the editor.
        samples: Folder for strips of images; None writes none.
        number: Number of people for each number of instructions.
        steps: Denoising steps.

    Returns:
        For one, two and three instructions: the mean squared errors of the edit and of the unedited source, their `ratio`, the
        median `psnr` in decibels, and the median distance `outside` the edited regions, also of the autoencoder alone.
    """
    report: dict[str, Any] = {"people": number, "steps": steps}
    for count in (1, 2, 3):
        examples = held_out_examples(number, count)
        source, exact = (render(torch.cat([getattr(e, name) for e in examples])) for name in ("people", "target"))
        edited, rebuilt = edit_images(pipeline, source, [e.prompt for e in examples], steps), _reconstruct(pipeline, exact)
        error, unedited = F.mse_loss(edited, exact).item(), F.mse_loss(source, exact).item()
        report[f"instructions={count}"] = {
            "mse": error,
            "mse_unedited": unedited,
            "ratio": error / unedited,
            "psnr": psnr(edited, exact).median().item(),
            "psnr_autoencoder": psnr(rebuilt, exact).median().item(),
            "outside": _outside(examples, edited, exact).median().item(),
            "outside_autoencoder": _outside(examples, rebuilt, exact).median().item(),
        }
        if samples is not None:
            cells = [[to_pil(one) for one in row] for row in zip(source[:8], edited[:8], exact[:8], rebuilt[:8], strict=True)]
            columns, names = ["source", "edit", "exact edit", "autoencoder"], [e.prompt for e in examples[:8]]
            save_image(draw_grid(cells, columns, names, f"{count} instruction(s)", 256), samples / f"instructions-{count}.png")
    if samples is not None:
        _draw_all_edits(pipeline, samples / "all.png", steps)
    return report


def _draw_all_edits(pipeline: FluxKontextPipeline, path: Path, steps: int) -> None:
    """Draw every instruction on two people."""
    people = torch.cat([e.people for e in held_out_examples(2, 1, seed=1)])
    columns = math.ceil((len(INSTRUCTIONS) + 1) / 2)
    rows = []
    for person in people:
        source = render(person[None]).expand(len(INSTRUCTIONS) + 1, -1, -1, -1)
        prompts = [FluxKontext.neutral_prompt, *(i.text for i in INSTRUCTIONS)]
        cells = [to_pil(one) for one in edit_images(pipeline, source, prompts, steps)]
        cells += [cells[0]] * (2 * columns - len(cells))
        rows += [cells[:columns], cells[columns:]]
    save_image(draw_grid(rows, [""] * columns, [""] * len(rows), "neutral prompt, then every instruction", 128), path)


def editor_recipe(sizes: Sizes = SIZES) -> EditorRecipe:
    """Return the recipe of `portraits-kontext`. Weights are stored in 16 bits, half of float32's size.

    Args:
        sizes: Sizes of the editor. Side, levels and channels are fixed by the world and its latents.
    """
    return EditorRecipe(
        name="portraits-kontext",
        build=lambda: build_pipeline(VOCABULARY, sizes),
        stages=(
            Stage(
                name="autoencoder",
                modules=lambda pipeline: {"vae": pipeline.vae},
                prepare=lambda pipeline, device, batch: autoencoder_losses(pipeline.vae, _image_draw(device, batch), batch),
                steps=2500,
                batch={"cpu": 16, "cuda": 64},
                peak=2e-3,
                share=0.15,
                average=True,
            ),
            Stage(
                name="decoder",
                modules=lambda pipeline: {"decoder": pipeline.vae.decoder},
                prepare=lambda pipeline, device, batch: decoder_losses(pipeline.vae, _image_draw(device, batch), batch, 0.5),
                steps=3000,
                batch={"cpu": 8, "cuda": 64},
                peak=1.5e-3,
                share=0.2,
                needs=("autoencoder",),
                average=True,
            ),
            Stage(
                name="editor",
                modules=lambda pipeline: {"transformer": pipeline.transformer, "t5": pipeline.text_encoder_2},
                prepare=editor_losses,
                steps=6000,
                batch={"cpu": 32, "cuda": 256},
                peak=1e-3,
                share=0.55,
                average=True,
            ),
            Stage(
                name="guidance",
                modules=lambda pipeline: {"transformer": pipeline.transformer, "t5": pipeline.text_encoder_2},
                prepare=guidance_losses,
                steps=1200,
                batch={"cpu": 32, "cuda": 256},
                peak=4e-4,
                share=0.1,
                needs=("autoencoder", "editor"),
                average=True,
            ),
        ),
        evaluate=evaluate_editor,
        # float16 rounds less, but the transformer's dtype is also that of engines, and the family cannot compute in float16.
        storage={
            "transformer": torch.bfloat16,
            "vae": torch.float16,
            "text_encoder": torch.float16,
            "text_encoder_2": torch.float16,
        },
    )
