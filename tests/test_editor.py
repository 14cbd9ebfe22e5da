"""The editor: same images as diffusers' own pipeline, encodings shared by every setting, both back ends alike."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from kontext_edit import PROMPT, diffusers_edit
from PIL import Image

from slideredit_rt.editor import SliderEditor
from slideredit_rt.errors import SliderEditError
from slideredit_rt.sliders import Slider

PARTS = PROMPT.split(" and ")


def test_eager_at_strength_one_is_the_base_pipeline_bit_for_bit(pipeline: Any, kind: str, scene: Image.Image) -> None:
    expected = diffusers_edit(pipeline, scene, steps=3)[0]
    editor = SliderEditor.from_pretrained("shapes-kontext", f"shapes-{kind}")
    sliders = PARTS if kind == "st" else PARTS[:1]
    prepared = editor.prepare(scene, sliders, prompt=PROMPT, seed=7)
    assert torch.equal(editor.render_tensor(prepared, [[1.0] * len(sliders)], steps=3)[0], expected)


def test_engine_and_eager_draw_the_same_images(st_editor: SliderEditor, scene: Image.Image) -> None:
    eager = SliderEditor.from_pretrained("shapes-kontext", "shapes-st")
    settings = [[0.0, 1.0], [0.5, 0.5], [1.5, 0.0]]
    images = [e.render_tensor(e.prepare(scene, PARTS), settings, steps=4) for e in (st_editor, eager)]
    assert (images[0] - images[1]).abs().max() <= 1e-3


def test_an_edit_is_the_same_alone_and_inside_a_sweep(st_editor: SliderEditor, scene: Image.Image) -> None:
    prepared = st_editor.prepare(scene, PARTS)
    together = st_editor.render_tensor(prepared, [[s, 1.0] for s in (0.0, 0.5, 1.0)], steps=3)
    alone = st_editor.render_tensor(prepared, [[0.5, 1.0]], steps=3)
    assert (together[1] - alone[0]).abs().max() <= 1e-4


def test_batches_beyond_the_engines_limit_are_split(st_editor: SliderEditor, scene: Image.Image, monkeypatch: Any) -> None:
    prepared = st_editor.prepare(scene, PARTS[:1])
    settings = [[s / 4] for s in range(5)]
    whole = st_editor.render_tensor(prepared, settings, steps=2)
    monkeypatch.setattr(st_editor, "max_batch", 2)
    assert (st_editor.render_tensor(prepared, settings, steps=2) - whole).abs().max() <= 1e-4


def test_edit_sweep_and_grid_agree(st_editor: SliderEditor, scene: Image.Image) -> None:
    sliders = [Slider(PARTS[0], 0.5), Slider(PARTS[1], 1.0)]
    edited = st_editor.edit(scene, sliders, steps=2, seed=3)
    swept = st_editor.sweep(scene, sliders, 0, [0.0, 0.5], steps=2, seed=3)
    grid = st_editor.grid(scene, sliders, (0, [0.0, 0.5]), (1, [1.0]), steps=2, seed=3)
    pixels = [torch.frombuffer(bytearray(i.tobytes()), dtype=torch.uint8).int() for i in (edited, swept[1], grid[1][0])]
    assert edited.size == (64, 64)
    assert max((p - pixels[0]).abs().max().item() for p in pixels) <= 1


def test_the_same_seed_gives_the_same_image_and_another_seed_another(st_editor: SliderEditor, scene: Image.Image) -> None:
    noise = [st_editor.prepare(scene, PARTS[:1], seed=s).conditioning.latents for s in (1, 1, 2)]
    assert torch.equal(noise[0], noise[1])
    assert not torch.equal(noise[0], noise[2])


def test_other_aspect_ratios_keep_their_shape(st_editor: SliderEditor) -> None:
    wide = Image.new("RGB", (300, 150), (120, 120, 120))
    assert st_editor.edit(wide, [Slider(PARTS[0])], steps=1).size == (88, 48)


@pytest.mark.parametrize(
    ("sliders", "options", "message"),
    [
        ([], {"prompt": PROMPT}, "no slider"),
        ([], {}, "no instruction"),
        (["make the square red"], {"prompt": PROMPT}, "nowhere"),
        (["make the circle red"] * 9, {}, "at most 8"),
        (["make the circle red"], {"guidance_scale": float("nan")}, "guidance"),
    ],
)
def test_bad_requests_are_refused(
    st_editor: SliderEditor, scene: Image.Image, sliders: list[str], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(SliderEditError, match=message):
        st_editor.prepare(scene, sliders, **options)


def test_a_gst_engine_has_one_slider(gst_editor: SliderEditor, scene: Image.Image) -> None:
    with pytest.raises(SliderEditError, match="one slider"):
        gst_editor.prepare(scene, PARTS)


def test_zero_steps_are_refused(st_editor: SliderEditor, scene: Image.Image) -> None:
    with pytest.raises(SliderEditError, match="at least 1"):
        st_editor.render(st_editor.prepare(scene, PARTS[:1]), [[1.0]], steps=0)


@pytest.mark.parametrize(
    "draw",
    [
        lambda editor, image: editor.edit(image, [Slider(PARTS[0], 1e20)], steps=2),
        lambda editor, image: editor.sweep(image, [Slider(PARTS[0])], 0, [0.5, 1e20, 1.0], steps=2),
        lambda editor, image: editor.grid(image, [Slider(p) for p in PARTS], (1, [1.0]), (0, [0.0, 1e20]), steps=2),
    ],
)
def test_an_image_that_is_not_finite_is_an_error(
    st_editor: SliderEditor, scene: Image.Image, draw: Callable[[SliderEditor, Image.Image], object]
) -> None:
    with pytest.raises(SliderEditError, match=r"'make the circle red' at strength 1e\+20.* produced NaN or infinity; use"):
        draw(st_editor, scene)


def test_a_strength_beyond_float32_is_refused(st_editor: SliderEditor, scene: Image.Image) -> None:
    prepared = st_editor.prepare(scene, PARTS)
    with pytest.raises(SliderEditError, match=r"'make the background dark' has strength 1e\+39, which exceeds float32"):
        st_editor.alphas(prepared, [[1.0, 1.0], [1.0, 1e39]])


def test_rows_of_one_batch_share_no_nan(st_editor: SliderEditor, scene: Image.Image) -> None:
    prepared = st_editor.prepare(scene, PARTS)
    expected = st_editor.render_tensor(prepared, [[0.5, 1.0]], steps=2)
    inputs = st_editor.backbone_inputs(prepared, torch.tensor([[-1e20, 0.0], [0.5, 0.0]]))
    denoising = st_editor._denoising(prepared.conditioning, inputs, 2)
    latents = prepared.conditioning.latents.repeat(2, 1, 1)
    latents = denoising.run(latents, inputs["alpha"].clone().expand(2, -1, -1), range(2))
    images = st_editor.decode(latents, prepared.conditioning.height, prepared.conditioning.width)
    assert images[0].isnan().all()
    assert (images[1] - expected[0]).abs().max() <= 1e-5
    with pytest.raises(SliderEditError, match=r"row 0 of a batch, with alpha \[-1.*e\+20, 0.0\], produced"):
        st_editor.denoise(prepared.conditioning, inputs, 2)


def test_an_autoencoder_that_overflows_is_noticed(st_editor: SliderEditor, scene: Image.Image) -> None:
    """Clamping to [0, 1] would make a white point of it."""

    class Overflows(type(st_editor.family)):  # type: ignore[misc]
        def decode_pixels(self, *args: Any) -> torch.Tensor:
            pixels: torch.Tensor = super().decode_pixels(*args)
            pixels[-1, 0, 5, 5] = torch.inf
            return pixels

    editor = copy.copy(st_editor)
    editor.family = Overflows()
    with pytest.raises(SliderEditError, match=r"at strength 0\.25 produced NaN or infinity"):
        editor.render(editor.prepare(scene, PARTS[:1]), [[1.0], [0.25]], steps=1)


def test_latents_that_an_autoencoder_would_bring_back_into_bounds_are_noticed(st_editor: SliderEditor) -> None:
    latents = st_editor.family.draw_noise(st_editor.pipeline, 64, 64, 0).repeat(2, 1, 1)
    whole = st_editor.decode(latents, 64, 64)
    latents[0, 3, 3] = torch.inf
    images = st_editor.decode(latents, 64, 64)
    assert images[0].isnan().all()
    assert torch.equal(images[1], whole[1])


def test_a_scheduler_that_is_not_euler_for_flow_matching_is_refused(engines: dict[str, Path], scene: Image.Image) -> None:
    editor = SliderEditor.from_engine(engines["st"])
    prepared, config = editor.prepare(scene, [Slider("make the circle red")]), editor.pipeline.scheduler.config
    for scheduler in (
        FlowMatchHeunDiscreteScheduler(),
        FlowMatchEulerDiscreteScheduler.from_config(config, stochastic_sampling=True),
    ):
        editor.pipeline.scheduler = scheduler
        with pytest.raises(SliderEditError, match=r"scheduler is a \w+, and edits need a FlowMatchEulerDiscreteScheduler"):
            editor.render(prepared, [[1.0]], steps=2)
