"""FLUX.2-klein with a key-value cache: the same images as diffusers' own pipeline, while the source images are read once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from flux2_checkpoint import TEXT_ROWS, diffusers_edit, flux2_adapter, save_tiny_checkpoint
from PIL import Image
from qwen_checkpoint import random_image

from slideredit_rt.adapters import load_adapter, save_adapter
from slideredit_rt.editor import SliderEditor
from slideredit_rt.families import KINDS, Family, Kind, family_of, get_family
from slideredit_rt.sliders import compose_prompt

PARTS = ("make the circle red", "make the background dark")
PROMPT = compose_prompt(PARTS)


@pytest.fixture(scope="module")
def family() -> Family:
    return get_family("flux2_kv")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("kv") / "base", kv=True)


@pytest.fixture(scope="module")
def adapters(base: Path) -> dict[Kind, Path]:
    paths: dict[Kind, Path] = {kind: base.parent / f"{kind}.safetensors" for kind in KINDS}
    for kind, path in paths.items():
        save_adapter(flux2_adapter(base, kind, family_name="flux2_kv"), path)
    return paths


def images_of(number: int) -> list[Image.Image]:
    return [random_image(96, 128), random_image(83, 70, seed=1)][:number]


def edit_of_diffusers(
    family: Family, base: Path, adapter: Path, kind: Kind, images: int, alphas: list[float], spans: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return diffusers' edit with an update on the spans (ST), or on all rows but those of source images (GST), and without."""
    pipeline = family.load_pipeline(base)
    frozen = diffusers_edit(pipeline, images_of(images), PROMPT, None, steps=3)
    text = torch.zeros(1, TEXT_ROWS, 1)
    for span, alpha in zip(spans, alphas, strict=True):
        text[:, list(span) if kind == "st" else slice(None)] = alpha
    noisy = 48

    def update(name: str, a: torch.Tensor, b: torch.Tensor) -> Any:
        rows = family.rows_of(name)

        def hook(_: Any, args: tuple[torch.Tensor, ...], y: torch.Tensor) -> torch.Tensor:
            scale = torch.zeros(1, y.shape[1], 1)
            if rows in ("text", "joint"):
                scale[:, :TEXT_ROWS] = text
            if rows in ("image", "joint") and kind == "gst":
                # Diffusers puts the rows of source images before the noisy ones, in the first step only.
                scale[:, -noisy:] = alphas[0]
            return y + scale * (args[0] @ a.T @ b.T)

        return hook

    for name, pair in load_adapter(adapter, family).pairs.items():
        pipeline.transformer.get_submodule(name).register_forward_hook(update(name, *pair))
    return diffusers_edit(pipeline, images_of(images), PROMPT, None, steps=3), frozen


@pytest.mark.parametrize(("kind", "images"), [("st", 1), ("st", 2), ("gst", 1), ("gst", 2)])
def test_eager_torch_draws_what_diffusers_does(
    family: Family, base: Path, adapters: dict[Kind, Path], kind: Kind, images: int
) -> None:
    assert family_of(base) is family
    editor = SliderEditor.from_pretrained(base, adapters[kind])
    parts, alphas = (PARTS, [0.75, -0.5]) if kind == "st" else (PARTS[:1], [0.6])
    prepared = editor.prepare(images_of(images), parts, prompt=PROMPT, seed=5)
    drawn = editor.render_tensor(prepared, [[1 - alpha for alpha in alphas], [1.0] * len(alphas)], steps=3)
    expected, frozen = edit_of_diffusers(family, base, adapters[kind], kind, images, alphas, prepared.spans)
    assert (drawn[0] - expected).abs().max() <= 1e-4
    assert (drawn[1] - frozen).abs().max() <= 1e-4
    assert (expected - frozen).abs().max() > 2e-3
