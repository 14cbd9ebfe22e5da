"""Full-size bases with random weights: their configurations are the released ones, and diffusers edits with the small ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from slideredit_rt.bench import full_size
from slideredit_rt.bench.full_size import FULL_SIZES
from slideredit_rt.editor import SliderEditor
from slideredit_rt.engines.eager import EagerEngine
from slideredit_rt.modules import SliderBackbone
from slideredit_rt.quantization.linear import quantized_linears
from slideredit_rt.quantization.precisions import PRECISIONS
from slideredit_rt.quantization.selection import select_layers
from slideredit_rt.sliders import Controls, Slider

CPU = torch.device("cpu")
PROMPT = "make the circle red"

PARAMETERS = {  # of the released checkpoints
    "flux_kontext": {"transformer": 11.9e9, "text_encoder": 0.123e9, "text_encoder_2": 4.76e9, "vae": 0.084e9},
    "qwen_image_edit": {"transformer": 20.4e9, "text_encoder": 8.29e9, "vae": 0.127e9},
    "qwen_image_edit_plus": {"transformer": 20.4e9, "text_encoder": 8.29e9, "vae": 0.127e9},
    "flux2_klein_4b": {"transformer": 3.88e9, "text_encoder": 4.02e9, "vae": 0.084e9},
    "flux2_klein_9b": {"transformer": 9.08e9, "text_encoder": 8.19e9, "vae": 0.084e9},
    "flux2_klein_4b_kv": {"transformer": 3.88e9, "text_encoder": 4.02e9, "vae": 0.084e9},
    "flux2_klein_9b_kv": {"transformer": 9.08e9, "text_encoder": 8.19e9, "vae": 0.084e9},
}


@pytest.mark.parametrize("name", list(FULL_SIZES))
def test_full_size_configurations_are_the_released_ones(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(full_size, "materialise", lambda module, device: full_size.tie(module))
    pipeline = FULL_SIZES[name].pipeline(small=False, device=torch.device("meta"))
    modules = {part: module for part, module in pipeline.components.items() if isinstance(module, nn.Module)}
    found = {part: sum(p.numel() for p in module.parameters()) for part, module in modules.items()}
    assert found == pytest.approx(PARAMETERS[name], rel=0.01)
    assert FULL_SIZES[name].family.side(pipeline) == 1024


@pytest.mark.parametrize("name", list(FULL_SIZES))
def test_a_small_base_edits_the_same_in_diffusers_and_here(name: str) -> None:
    base = FULL_SIZES[name]
    pipeline = base.pipeline(small=True, device=CPU)
    pipeline.to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    family, side = base.family, base.family.side(pipeline)
    image = full_size.noise_image(side)
    scale = family.true_cfg_scale
    backbone = SliderBackbone(family, pipeline.transformer, None)
    config = dict(pipeline.transformer.config)
    editor = SliderEditor(family, pipeline, EagerEngine(backbone, CPU), config, Controls("st"), max_batch=1, max_sliders=1)
    prepared = editor.prepare(image, [Slider(PROMPT)])
    ours = editor.denoise(prepared.conditioning, editor.frozen_inputs(prepared, 1), 2, scale)
    with base.edits_of(side):
        negative = family.negative_prompt if scale > 1 else None
        given = base.options(pipeline, scale) | {"num_inference_steps": 2, "output_type": "pt", "latents": None}
        texts = {"prompt": PROMPT} | ({} if negative is None else {"negative_prompt": negative})
        embeddings = base.embeddings(pipeline, image, PROMPT, negative)
        edits = [
            pipeline(image=image, generator=torch.Generator().manual_seed(0), **given, **words).images
            for words in (texts, embeddings)
        ]
    assert ours.shape == edits[0].shape == (1, 3, side, side)
    assert torch.equal(edits[0], edits[1]), "embeddings stand for the prompts"
    torch.testing.assert_close(ours, edits[0].float(), atol=2e-4, rtol=0)


@pytest.mark.parametrize("precision", ["fp8", "int8", "int4"])
@pytest.mark.parametrize("name", ["flux_kontext", "qwen_image_edit", "flux2_klein_4b"])
def test_a_quantised_transformer_has_the_same_random_weights_quantised(name: str, precision: str) -> None:
    base = FULL_SIZES[name]
    plain = base.transformer(small=True, device=CPU)
    quantised = base.transformer(small=True, device=CPU, precision=precision)
    linears = quantized_linears(quantised)
    chosen = select_layers(base.family, plain, precision)
    assert {name: linear.precision for name, linear in linears.items()} == {n: layer.precision for n, layer in chosen.items()}
    assert {precision, "int8"} == {linear.precision for linear in linears.values()}
    for name, linear in linears.items():
        form, weight = PRECISIONS[linear.precision], plain.get_parameter(f"{name}.weight").float()
        for part, tensor in form.quantise(weight).items():
            assert torch.equal(getattr(linear, part).float(), tensor.float()), (name, part)
        if linear.activations:
            assert linear.input_scale is not None
            assert linear.input_scale.item() == form.input_scale(full_size.RANDOM_AMAX)
        assert linear.activations == (linear.precision == "fp8")
    kept = dict(quantised.named_parameters())
    assert kept.keys() < dict(plain.named_parameters()).keys()
    assert all(torch.equal(value, plain.get_parameter(name)) for name, value in kept.items())
