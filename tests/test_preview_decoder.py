"""A tiny autoencoder decodes previews and partial images, never finished edits, and only if it fits the base."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import flux2_checkpoint
import pytest
import qwen_checkpoint
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from PIL import Image, ImageChops, ImageStat
from safetensors.torch import load_file, save_file

from slideredit_rt.assets import resolve_base
from slideredit_rt.cli import main
from slideredit_rt.editor import SliderEditor
from slideredit_rt.engines.manifest import read_manifest
from slideredit_rt.errors import SliderEditError
from slideredit_rt.families import Family, family_of, get_family
from slideredit_rt.memory import ServerParts, engine_footprint
from slideredit_rt.preview_decoder import PreviewDecoder
from slideredit_rt.serving import EditRequest, EditService, Partial
from slideredit_rt.settings import EditSettings
from slideredit_rt.sliders import Slider

RED = Slider("make the circle red")


def save_tiny(folder: Path, channels: int = 16, stages: int = 3, width: int = 8) -> Path:
    """Save a random tiny autoencoder; by default it fits the embedded base."""
    torch.manual_seed(0)
    widths, blocks = (width,) * stages, (1,) * stages
    AutoencoderTiny(
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        num_encoder_blocks=blocks,
        num_decoder_blocks=blocks,
        latent_channels=channels,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "tiny")


@pytest.fixture
def editor(st_editor: SliderEditor, tiny: Path) -> SliderEditor:
    """The ST editor with a preview decoder."""
    editor = copy.copy(st_editor)
    editor.preview_decoder = PreviewDecoder.load(tiny, editor.family, editor.pipeline)
    return editor


def difference(a: Image.Image, b: Image.Image) -> float:
    """Mean absolute difference of two images, in grey levels."""
    return sum(ImageStat.Stat(ImageChops.difference(a, b)).mean) / 3


@torch.no_grad()
def test_it_decodes_what_diffusers_pipeline_decodes_with_that_autoencoder(
    family: Family, pipeline: Any, tiny: Path, scene: Image.Image
) -> None:
    decoder = PreviewDecoder.load(tiny, family, pipeline)
    latents = family.encode_sources(pipeline, [scene]).reference
    preview = decoder.decode(latents, 64, 64)
    pipeline.vae = AutoencoderTiny.from_pretrained(tiny)
    torch.testing.assert_close(preview, family.decode(pipeline, latents, 64, 64))
    assert preview.shape == (1, 3, 64, 64)


def test_previews_and_partial_images_use_it_and_finished_edits_do_not(
    st_editor: SliderEditor, editor: SliderEditor, scene: Image.Image
) -> None:
    settings = EditSettings(steps=2)
    full = EditRequest(scene, (RED,), ((1.0,),), settings, partial_every=1)
    preview = EditRequest(scene, (RED,), ((1.0,),), settings, interactive=True)
    partials: list[Partial] = []
    with EditService(editor) as service:
        finished = service.submit(full, on_partial=partials.append).future.result()[0]
        previewed = service.submit(preview).future.result()[0]
    expected = st_editor.edit(scene, [RED], settings)
    assert difference(finished, expected) < 0.1
    # A random decoder makes other images than the base's.
    assert difference(previewed, expected) > 20
    assert [difference(partial.image, expected) > 20 for partial in partials] == [True]


def test_batches_are_decoded_one_image_at_a_time(editor: SliderEditor, scene: Image.Image) -> None:
    """As the memory plan counts them."""
    assert editor.preview_decoder is not None
    together: list[int] = []
    editor.preview_decoder.vae.decoder.register_forward_hook(lambda module, given, found: together.append(len(given[0])))
    latents = editor.family.encode_sources(editor.pipeline, [scene]).reference.repeat(3, 1, 1)
    images = editor.decode(latents * torch.tensor([1.0, 0.5, -1.0])[:, None, None], 64, 64, preview=True)
    assert together == [1, 1, 1]
    assert torch.equal(images[:1], editor.decode(latents[:1], 64, 64, preview=True))


@pytest.mark.parametrize("width", [8, 512])
def test_its_weights_and_activations_are_planned_with(engines: dict[str, Path], tmp_path: Path, width: int) -> None:
    """A wide decoder takes more activations than the base's own autoencoder, and a narrow one does not."""
    folder, manifest = save_tiny(tmp_path / "tiny", width=width), read_manifest(engines["st"])
    base = resolve_base("shapes-kontext")
    plain = engine_footprint(engines["st"], manifest, base)
    found = engine_footprint(engines["st"], manifest, base, server=ServerParts(preview_decoder=folder))
    numbers = sum(tensor.numel() for tensor in load_file(folder / "diffusion_pytorch_model.safetensors").values())
    assert (plain.preview_decoder, found.preview_decoder) == (0, 2 * numbers)
    exact = engine_footprint(engines["st"], manifest, base, torch.float32, ServerParts(preview_decoder=folder))
    assert exact.preview_decoder == 4 * numbers
    if width == 8:
        assert (found.decode, found.tiled_decode) == (plain.decode, plain.tiled_decode)
    else:
        # At least the input and the output of a convolution at full size, in bfloat16.
        assert found.decode == found.tiled_decode >= 2 * width * 64 * 64 * 2 > plain.decode


def test_one_that_does_not_fit_the_base_is_refused_by_the_plan(engines: dict[str, Path], tmp_path: Path) -> None:
    other = ServerParts(preview_decoder=save_tiny(tmp_path / "other", channels=4))
    with pytest.raises(SliderEditError, match="has 4 latent channels and 4 pixels per latent, but this base has 16 and 4"):
        engine_footprint(engines["st"], read_manifest(engines["st"]), resolve_base("shapes-kontext"), server=other)


@pytest.mark.parametrize(
    ("channels", "stages", "message"),
    [
        (4, 3, "has 4 latent channels and 4 pixels per latent, but this base has 16 and 4"),
        (16, 4, "has 16 latent channels and 8 pixels per latent, but this base has 16 and 4"),
    ],
)
def test_one_that_does_not_fit_the_base_is_refused(
    family: Family, pipeline: Any, tmp_path: Path, channels: int, stages: int, message: str
) -> None:
    with pytest.raises(SliderEditError, match=message):
        PreviewDecoder.load(save_tiny(tmp_path / "other", channels, stages), family, pipeline)


def test_another_class_is_refused(family: Family, pipeline: Any, tmp_path: Path) -> None:
    AutoencoderKL(block_out_channels=(32,), latent_channels=16).save_pretrained(tmp_path / "kl")
    with pytest.raises(SliderEditError, match="is of class AutoencoderKL; give an"):
        PreviewDecoder.load(tmp_path / "kl", family, pipeline)


def test_a_damaged_one_is_refused(family: Family, pipeline: Any, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "tiny")
    weights = folder / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    del state["decoder.layers.0.weight"]
    save_file(state, weights, {"format": "pt"})
    with pytest.raises(SliderEditError, match=r"decoder\.layers\.0\.weight"):
        PreviewDecoder.load(folder, family, pipeline)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_decoder_blocks": [1]}))
    with pytest.raises(SliderEditError, match="cannot load"):
        PreviewDecoder.load(folder, family, pipeline)


def test_the_server_refuses_a_folder_that_does_not_exist(
    engines: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "missing"
    assert main(["serve", str(engines["st"]), "--port", "0", "--preview-decoder", str(missing), "--quiet"]) == 2
    assert f"preview decoder {str(missing)!r} has no readable config.json" in capsys.readouterr().err


@torch.no_grad()
@pytest.mark.parametrize("module", [flux2_checkpoint, qwen_checkpoint], ids=["flux2", "qwen_image_edit"])
def test_other_families_arrange_latents_as_their_pipelines_do(module: Any, tmp_path: Path) -> None:
    base = module.save_tiny_checkpoint(tmp_path / "base")
    family = family_of(base)
    pipeline = family.load_pipeline(base)
    side = family.side(pipeline)
    latents = family.draw_noise(pipeline, side, side, 0)
    grid = family.latent_grid(pipeline, latents, side, side)
    if family is get_family("flux2"):
        packed = pipeline._pack_latents(pipeline._patchify_latents(grid))
    else:
        packed = pipeline._pack_latents(grid, *grid.shape)
    assert torch.equal(packed, latents)
    stages = (side // grid.shape[2]).bit_length()
    decoder = PreviewDecoder.load(save_tiny(tmp_path / "tiny", grid.shape[1], stages), family, pipeline)
    assert decoder.decode(latents, side, side).shape == (1, 3, side, side)
