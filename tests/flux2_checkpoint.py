"""A tiny random FLUX.2-klein checkpoint made of the real classes, adapters for it, and diffusers' own edits with it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinKVPipeline,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from PIL import Image
from qwen_checkpoint import CORPUS
from transformers import Qwen3Config, Qwen3ForCausalLM

from slideredit_rt.adapters import Adapter
from slideredit_rt.bench.full_size import qwen3_tokenizer
from slideredit_rt.families import Kind, get_family

SIDE, TEXT_ROWS = 128, 96


def tiny_transformer() -> Flux2Transformer2DModel:
    """A transformer of two dual-stream and two single-stream blocks with random weights."""
    return Flux2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=96,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    ).eval()


def save_tiny_checkpoint(folder: Path, *, distilled: bool = True, kv: bool = False, seed: int = 0) -> Path:
    """Save a pipeline that edits up to 128²: 64 image rows an image, a VAE of factor 8, two dual and two single blocks."""
    torch.manual_seed(seed)
    vae = AutoencoderKLFlux2(
        block_out_channels=(8,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=SIDE,
    ).eval()
    vae.bn.running_mean.normal_(0, 0.3)
    vae.bn.running_var.uniform_(0.5, 2.0)
    transformer = tiny_transformer()
    tokenizer = qwen3_tokenizer(CORPUS, TEXT_ROWS)
    encoder = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=27,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            bos_token_id=None,
            eos_token_id=None,
            tie_word_embeddings=True,
        )
    ).eval()
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    parts = scheduler, vae, encoder, tokenizer, transformer
    pipeline = Flux2KleinKVPipeline(*parts) if kv else Flux2KleinPipeline(*parts, is_distilled=distilled)
    pipeline.save_pretrained(folder)
    return folder


def flux2_adapter(
    base: Path, kind: Kind, *, family_name: str = "flux2", seed: int = 3, all_projections: bool = False
) -> Adapter:
    """A random adapter for a checkpoint."""
    transformer = Flux2Transformer2DModel.from_pretrained(base / "transformer")
    adapter = random_pairs(transformer, kind, seed=seed, all_projections=all_projections)
    return dataclasses.replace(adapter, family=family_name)


def random_pairs(
    transformer: torch.nn.Module, kind: Kind, *, rank: int = 4, seed: int = 3, all_projections: bool = False
) -> Adapter:
    """A random adapter on the usual targets of its kind, or on all projections."""
    family = get_family("flux2")
    generator, target = torch.Generator().manual_seed(seed), family.targets(kind, all_projections=all_projections)
    pairs = {
        name: (
            torch.randn(rank, module.in_features, generator=generator) * 0.3,
            torch.randn(module.out_features, rank, generator=generator) * 0.3,
        )
        for name, module in transformer.named_modules()
        if isinstance(module, torch.nn.Linear) and target.fullmatch(name)
    }
    return Adapter(family.name, kind, rank, pairs, f"random-{kind}")


def diffusers_edit(pipeline: Any, images: list[Image.Image], prompt: str, scale: float | None, steps: int) -> torch.Tensor:
    """An image in [0, 1], float32 `[3, H, W]`, with seed 5; no scale for a pipeline without guidance."""
    pipeline.set_progress_bar_config(disable=True)
    output: torch.Tensor = pipeline(
        image=images,
        prompt=prompt,
        **({} if scale is None else {"guidance_scale": scale}),
        num_inference_steps=steps,
        max_sequence_length=TEXT_ROWS,
        output_type="pt",
        generator=torch.Generator().manual_seed(5),
    ).images[0]
    return output
