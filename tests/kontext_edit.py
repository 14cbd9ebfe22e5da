"""What diffusers' own FLUX.1-Kontext pipeline draws: the reference of whole edits."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image

PROMPT = "make the circle red and make the background dark"


def diffusers_edit(pipeline: Any, image: Image.Image, steps: int, **options: Any) -> torch.Tensor:
    """Images in [0, 1], float32 `[1, 3, 64, 64]`, of the prompt with seed 7; `options` are the pipeline's."""
    pipeline.set_progress_bar_config(disable=True)
    images: torch.Tensor = pipeline(
        image=image,
        prompt=PROMPT,
        num_inference_steps=steps,
        guidance_scale=3.5,
        max_sequence_length=24,
        height=64,
        width=64,
        max_area=64 * 64,
        _auto_resize=False,
        output_type="pt",
        generator=torch.Generator().manual_seed(7),
        **options,
    ).images
    return images
