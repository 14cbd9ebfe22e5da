"""A tiny random Qwen-Image-Edit checkpoint made of the real classes, and an image for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImageTransformer2DModel,
)
from PIL import Image
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessorPil,
)

from slideredit_rt.adapters import Adapter
from slideredit_rt.bench.full_size import qwen_tokenizer
from slideredit_rt.families import get_family
from slideredit_rt.families.qwen_image_edit import SourceImageProcessor

SIDE = 64
CORPUS = (
    "make the circle red and make the square blue and make the background dark and add a small hat to the cat",
    "turn the sky into a sunset, please; give her curly hair and a warm smile; remove the 3 dogs; Picture 1: Picture 2:",
)


def _text_encoder(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("image_pad", "video_pad", "vision_start")}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": None,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 32,
            "patch_size": 4,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def save_tiny_checkpoint(folder: Path, *, plus: bool = False, zero_cond_t: bool = False, seed: int = 0) -> Path:
    """Save a pipeline that edits at 64²: 64 image rows an image, a VAE of factor 4, two blocks.

    Args:
        plus: `QwenImageEditPlusPipeline`, which takes several images.
        zero_cond_t: the reference rows are modulated with timestep 0, as in Qwen-Image-Edit-2511.
    """
    torch.manual_seed(seed)
    pipeline_class: Any = QwenImageEditPlusPipeline if plus else QwenImageEditPipeline
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[-0.1, 0.2, 0.0, 0.1],
        latents_std=[1.2, 0.9, 1.0, 1.1],
    ).eval()
    vae.register_to_config(sample_size=SIDE)
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=32,
        axes_dims_rope=(4, 6, 6),
        zero_cond_t=zero_cond_t,
    ).eval()
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, shift_terminal=0.02)
    # The template stands in the pipeline's class; a pipeline without models tells it.
    template = pipeline_class(scheduler, None, None, None, None, None).prompt_template_encode
    tokenizer = qwen_tokenizer(template, CORPUS, 256)
    image_processor = Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, size={"shortest_edge": 8 * 8, "longest_edge": 32 * 32}
    )
    processor = SourceImageProcessor(image_processor, tokenizer)
    pipeline_class(scheduler, vae, _text_encoder(tokenizer), tokenizer, processor, transformer).save_pretrained(folder)
    # As released checkpoints name it.
    index = json.loads((folder / "model_index.json").read_text())
    index["processor"] = ["transformers", "Qwen2VLProcessor"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def qwen_adapter(base: Path) -> Adapter:
    """A random ST adapter for a tiny Qwen checkpoint."""
    family = get_family("qwen_image_edit")
    transformer = family.load_pipeline(base).transformer
    generator = torch.Generator().manual_seed(3)
    pairs = {
        name: (
            torch.randn(4, module.in_features, generator=generator) * 0.6,
            torch.randn(module.out_features, 4, generator=generator) * 0.6,
        )
        for name, module in transformer.named_modules()
        if isinstance(module, torch.nn.Linear) and family.targets("st").fullmatch(name)
    }
    return Adapter(family.name, "st", 4, pairs, "random-adapter")


def random_image(width: int = 64, height: int = 64, seed: int = 0) -> Image.Image:
    """A smooth random image."""
    generator = torch.Generator().manual_seed(seed)
    pixels = (torch.rand(6, 6, 3, generator=generator) * 255).to(torch.uint8).numpy()
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
