"""Transformer and pipeline of an embedded editor."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxKontextPipeline, FluxTransformer2DModel
from diffusers.models.normalization import AdaLayerNormZero, AdaLayerNormZeroSingle

from slideredit_rt.training.embedded.text import (
    POOLED_WIDTH,
    TEXT_WIDTH,
    Vocabulary,
    build_clip_tokenizer,
    build_t5_tokenizer,
    build_text_encoders,
)

_HEAD_WIDTH, _ROPE_AXES = 32, (4, 14, 14)
_AXIS_STARTS = (0, 4, 18)


def _open_up(transformer: FluxTransformer2DModel) -> None:
    """Initialise open residual branches and sharp attention, which a short run has no time to learn."""
    for name, module in transformer.named_modules():
        if re.search(r"norm_(added_)?[qk]$", name):
            with torch.no_grad():
                for start in _AXIS_STARTS:
                    module.weight[start : start + 2] = 2.0
        elif re.search(r"attn\.to_[qk]$", name):
            _look_at_own_position(module, is_query=name.endswith("q"))
        elif isinstance(module, AdaLayerNormZero | AdaLayerNormZeroSingle):
            # The modulation consists of shift, scale and gate (twice in a dual-stream block). Open the gates.
            width = module.linear.in_features
            with torch.no_grad():
                for chunk in range(2, module.linear.out_features // width, 3):
                    module.linear.bias[chunk * width : (chunk + 1) * width] = 1.0


@torch.no_grad()
def _look_at_own_position(projection: torch.nn.Linear, *, is_query: bool) -> None:
    """Bias every other head towards the reference token at its own position, which is slow to learn.

    Each axis has its fastest rotation in its first pair of dimensions, where equal directions favour equal coordinates. The
    first axis is the image id: a query turned by one radian favours the reference (id 1) over the noise (id 0).
    """
    for head in range(0, projection.out_features // _HEAD_WIDTH, 2):
        bias = projection.bias[head * _HEAD_WIDTH : (head + 1) * _HEAD_WIDTH]
        for axis, start in enumerate(_AXIS_STARTS):
            turn = 1.0 if is_query and axis == 0 else 0.0
            bias[start], bias[start + 1] = 6 * math.cos(turn), 6 * math.sin(turn)


def build_autoencoder(widths: tuple[int, ...], channels: int, side: int) -> AutoencoderKL:
    """Build an untrained autoencoder whose latents are neither shifted nor scaled.

    Args:
        widths: Width of each level; each level but the first halves the resolution.
        channels: Latent channels.
        side: Side of the images in pixels.
    """
    return AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        latent_channels=channels,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=side,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0,
        scaling_factor=1.0,
    )


def build_transformer(channels: int, heads: int, dual: int, single: int) -> FluxTransformer2DModel:
    """Build an untrained transformer with heads of width 32, open gates and sharp attention.

    Args:
        channels: Latent channels; four of them are packed into a row.
        heads: Attention heads.
        dual: Dual-stream blocks.
        single: Single-stream blocks.
    """
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * channels,
        num_layers=dual,
        num_single_layers=single,
        attention_head_dim=_HEAD_WIDTH,
        num_attention_heads=heads,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=POOLED_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=_ROPE_AXES,
    )
    _open_up(transformer)
    return transformer


@dataclass(frozen=True)
class Sizes:
    """Sizes of an embedded editor.

    Attributes:
        side: Side of the images in pixels.
        widths: Width of each level of the autoencoder.
        channels: Latent channels.
        heads: Attention heads of the transformer, each of width 32.
        dual: Dual-stream blocks.
        single: Single-stream blocks.
    """

    side: int
    widths: tuple[int, ...]
    channels: int
    heads: int
    dual: int
    single: int


def build_pipeline(vocabulary: Vocabulary, sizes: Sizes, seed: int = 0) -> FluxKontextPipeline:
    """Build an untrained pipeline.

    Args:
        vocabulary: Text that the tokenizers are trained on.
        sizes: Sizes of the autoencoder and the transformer.
        seed: Seed of the initial weights.
    """
    torch.manual_seed(seed)
    t5, clip = build_t5_tokenizer(vocabulary), build_clip_tokenizer(vocabulary)
    text_encoder_2, text_encoder = build_text_encoders(t5, clip)
    vae = build_autoencoder(sizes.widths, sizes.channels, sizes.side)
    transformer = build_transformer(sizes.channels, sizes.heads, sizes.dual, sizes.single)
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=3.0, use_dynamic_shifting=True, base_image_seq_len=256, max_image_seq_len=4096
    )
    return FluxKontextPipeline(
        scheduler=scheduler,
        vae=vae,
        text_encoder=text_encoder.requires_grad_(False),
        tokenizer=clip,
        text_encoder_2=text_encoder_2,
        tokenizer_2=t5,
        transformer=transformer,
    ).to("cpu")
