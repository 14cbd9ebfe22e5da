"""Training recipe of `shapes-kontext`, a FLUX-Kontext pipeline small enough to train on two CPU cores.

The latents are the low frequencies of each 4×4 patch, and the share of it that the circle and the square cover (see
`slideredit_rt.training.embedded.autoencoder`). Prompt padding varies between steps, so any `max_sequence_length` from 17 to 31
works.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FluxKontextPipeline
from torch import Tensor

from slideredit_rt.families.flux_kontext import FluxKontext
from slideredit_rt.shapes.world import (
    ALL_INSTRUCTIONS,
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    SIZE,
    Example,
    Scene,
    Shape,
    coverage,
    draw_example,
    draw_scene,
    held_out_examples,
    render,
)
from slideredit_rt.training.embedded.autoencoder import autoencoder_losses, decoder_losses, patch_filters
from slideredit_rt.training.embedded.flow import Backbone, add_noise, edit_images, position_ids
from slideredit_rt.training.embedded.loop import Losses
from slideredit_rt.training.embedded.model import Sizes, build_pipeline
from slideredit_rt.training.embedded.recipe import EditorRecipe, Stage
from slideredit_rt.training.embedded.text import Vocabulary

# Share of training prompts with 0, 1, 2 and 3 instructions. Half of the empty prompts become the neutral sentence.
_COUNT_WEIGHTS = (0.08, 0.42, 0.34, 0.16)

_WORDS = ("make", "the", "and", *SHAPES, *COLOURS, *BACKGROUNDS)
_PAIRS = [f"{a.text} and {b.text}" for a in ALL_INSTRUCTIONS for b in ALL_INSTRUCTIONS if a.subject != b.subject]
VOCABULARY = Vocabulary(
    prompts=_PAIRS,
    # Words of the world. Some are split into two pieces.
    pieces=(*(f"▁{word}" for word in _WORDS), "▁back", "ground", "▁large", "▁small", "r", "er", "▁keep", "▁image", "▁same"),
)
SIZES = Sizes(side=SIZE, widths=(16, 32, 64), channels=16, heads=4, dual=2, single=3)

_LOW = ((0, 0), (0, 1), (1, 0), (1, 1))
# Six luminance frequencies, and four of each of two colour differences.
_FREQUENCIES = [(c, u, v) for c, more in enumerate([((0, 2), (2, 0)), (), ()]) for u, v in (*_LOW, *more)]
# Flat colour varies far more than detail. The gains bring both closer to unit variance.
_GAINS = torch.tensor([0.7 if u == v == 0 else 1.2 for _, u, v in _FREQUENCIES])
_FILTERS = _GAINS[:, None, None, None] * patch_filters(4, _FREQUENCIES)


def ideal_latents(images: Tensor, shapes: Tensor) -> Tensor:
    """Return the latents that the autoencoder learns.

    Args:
        images: Images, `[N, 3, H, W]` in [−1, 1].
        shapes: Their `coverage`, `[N, 2, H, W]`.

    Returns:
        `[N, 16, H/4, W/4]`: 14 low frequencies of each 4×4 patch, and the share of it that circle and square cover.
    """
    return torch.cat([F.conv2d(images, _FILTERS, stride=4), 1.5 * F.avg_pool2d(shapes, 4)], dim=1)


def _varied_scene(rng: random.Random) -> Scene:
    """Draw a scene with colours and greys outside the palettes, as they occur at intermediate strengths."""

    def recolour(shape: Shape) -> Shape:
        colour = (rng.random(), rng.random(), rng.random())
        return Shape(shape.x, shape.y, shape.radius * rng.uniform(0.5, 1.45), colour)

    scene = draw_scene(rng)
    return Scene(rng.uniform(0.02, 0.98), recolour(scene.circle), recolour(scene.square))


def _draw_images(step: int, batch: int) -> tuple[Tensor, Tensor]:
    """Return images in [−1, 1] and their ideal latents."""
    rng = random.Random(f"vae/{step}")
    half = batch // 2
    varied = [_varied_scene(rng) for _ in range(half)]
    examples = [draw_example(rng, rng.choice((1, 2, 3))) for _ in range(batch - half)]
    # Blends look like intermediate strengths.
    blend = torch.tensor([rng.choice((0.0, 1.0, rng.random())) for _ in examples])[:, None, None, None]
    before, after = [e.scene for e in examples], [e.target for e in examples]
    images = torch.cat([render(varied), torch.lerp(render(before), render(after), blend)])
    shapes = torch.cat([coverage(varied), torch.lerp(coverage(before), coverage(after), blend)])
    images = images * 2 - 1
    return images, ideal_latents(images, shapes)


def _draw_examples(step: int, batch: int) -> tuple[list[Example], list[str], int]:
    rng = random.Random(f"editor/{step}")
    counts = rng.choices(range(4), _COUNT_WEIGHTS, k=batch)
    examples = [draw_example(rng, count) for count in counts]
    prompts = [e.prompt or rng.choice(("", FluxKontext.neutral_prompt)) for e in examples]
    return examples, prompts, rng.randint(17, 31)


def editor_losses(pipeline: FluxKontextPipeline, device: torch.device, batch: int) -> Callable[[int], Losses]:
    """Return the losses of flow matching on exact pairs."""
    backbone = Backbone(pipeline.transformer, pipeline.text_encoder_2, position_ids(pipeline, SIZE // 8, device))
    guidance = torch.full((batch,), FluxKontext.guidance_scale)

    def losses(step: int) -> Losses:
        examples, prompts, length = _draw_examples(step, batch)
        scenes = [e.scene for e in examples] + [e.target for e in examples]
        latents = ideal_latents(render(scenes) * 2 - 1, coverage(scenes))
        source, target = pipeline._pack_latents(latents, *latents.shape).chunk(2)
        with torch.no_grad():
            pooled = pipeline._get_clip_prompt_embeds(prompts)
        tokens = pipeline.tokenizer_2(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        noisy = add_noise(source, target, pooled, torch.Generator().manual_seed(step))
        error = F.mse_loss(backbone.velocity(noisy, tokens.input_ids, guidance), noisy.velocity)
        return error, error

    return losses


def evaluate_editor(pipeline: FluxKontextPipeline, number: int = 256, counts: tuple[int, ...] = (1, 2, 3)) -> dict[str, Any]:
    """Return mean squared errors to the correct edit, of the editor and of the unedited source, in units of [0, 1] pixels."""
    report: dict[str, Any] = {"scenes": number}
    for count in counts:
        examples = held_out_examples(number, count)
        target, source = render(e.target for e in examples), render(e.scene for e in examples)
        edited = edit_images(pipeline, source, [e.prompt for e in examples])
        error, unedited = F.mse_loss(edited, target).item(), F.mse_loss(source, target).item()
        report[f"instructions={count}"] = {"mse": error, "mse_unedited": unedited, "ratio": error / unedited}
    return report


def editor_recipe() -> EditorRecipe:
    """Return the recipe of `shapes-kontext`, which trains on the CPU: its scenes are drawn one by one."""
    return EditorRecipe(
        name="shapes-kontext",
        build=lambda: build_pipeline(VOCABULARY, SIZES),
        stages=(
            Stage(
                name="autoencoder",
                modules=lambda pipeline: {"vae": pipeline.vae},
                prepare=lambda pipeline, _, batch: autoencoder_losses(pipeline.vae, _draw_images, batch),
                steps=1600,
                batch={"cpu": 32},
                peak=2e-3,
                share=0.2,
            ),
            Stage(
                name="decoder",
                modules=lambda pipeline: {"decoder": pipeline.vae.decoder},
                prepare=lambda pipeline, _, batch: decoder_losses(pipeline.vae, _draw_images, batch),
                steps=800,
                batch={"cpu": 32},
                peak=1.5e-3,
                share=0.1,
                needs=("autoencoder",),
            ),
            Stage(
                name="editor",
                modules=lambda pipeline: {"transformer": pipeline.transformer, "t5": pipeline.text_encoder_2},
                prepare=editor_losses,
                steps=2800,
                batch={"cpu": 32},
                peak=1.2e-3,
                share=0.7,
            ),
        ),
        evaluate=lambda pipeline, _: evaluate_editor(pipeline),
    )
