"""FLUX.1-Kontext: whole edits equal diffusers' own, prompt rows are the encoder's, and the sizes that it was trained on."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS
from kontext_edit import PROMPT, diffusers_edit
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from PIL import Image
from torch import nn

from slideredit_rt.adapters import Adapter, load_adapter
from slideredit_rt.assets import resolve_base
from slideredit_rt.editor import SliderEditor
from slideredit_rt.engines.tensorrt.build import image_rows_of
from slideredit_rt.export.build import build_engine
from slideredit_rt.families import Family
from slideredit_rt.sliders import Controls, Slider
from slideredit_rt.spans import find_spans


def add_peft(transformer: nn.Module, adapter: Adapter) -> list[LoraLayer]:
    """The adapter as PEFT runs it: unmasked, one scale for every row."""
    config = LoraConfig(r=adapter.rank, lora_alpha=adapter.rank, target_modules=list(adapter.pairs), init_lora_weights=False)
    transformer.add_adapter(config)  # type: ignore[operator]
    layers = {name: module for name, module in transformer.named_modules() if isinstance(module, LoraLayer)}
    for name, layer in layers.items():
        layer.lora_A["default"].weight.data.copy_(adapter.pairs[name][0])
        layer.lora_B["default"].weight.data.copy_(adapter.pairs[name][1])
    return list(layers.values())


def every_projection(family: Family, transformer: nn.Module) -> Adapter:
    """A random GST adapter on every projection, also those of the single-stream blocks that the released ones leave alone."""
    g, pairs = torch.Generator().manual_seed(0), {}
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear) and family.targets("gst", all_projections=True).fullmatch(name):
            a = torch.randn(4, module.in_features, generator=g) / module.in_features**0.5
            pairs[name] = a, torch.randn(module.out_features, 4, generator=g) / 8
    return Adapter(family.name, "gst", 4, pairs, "random")


@pytest.mark.parametrize("projections", ["released", "all"])
def test_an_engine_draws_what_diffusers_draws_with_peft_over_the_whole_loop(
    family: Family,
    pipeline: Any,
    scene: Image.Image,
    engines: dict[str, Path],
    tmp_path: Path,
    projections: str,
) -> None:
    if projections == "released":
        path, adapter = engines["gst"], load_adapter("shapes-gst", family)
    else:
        path, adapter = tmp_path / "engine", every_projection(family, pipeline.transformer)
        build_engine("shapes-kontext", adapter, path, progress=False)
    editor = SliderEditor.from_engine(path)
    prepared = editor.prepare(scene, [PROMPT.split(" and ")[0]], prompt=PROMPT, seed=7)
    layers = add_peft(pipeline.transformer, adapter)
    strengths = (0.0, 0.4, 1.0, 1.5)
    ours = editor.render_tensor(prepared, [[s] for s in strengths], steps=6)
    for strength, found in zip(strengths, ours, strict=True):
        for layer in layers:
            layer.set_scale("default", 1 - strength)
        assert (found - diffusers_edit(pipeline, scene, steps=6)[0]).abs().max() <= 1e-4, f"strength {strength}"


def test_true_guidance_is_diffusers_own_and_no_slider_acts_in_its_negative_pass(
    st_editor: SliderEditor, pipeline: Any, scene: Image.Image
) -> None:
    parts = PROMPT.split(" and ")
    options: dict[str, Any] = {"true_cfg_scale": 2.5, "negative_prompt": "make the circle blue"}
    prepared = st_editor.prepare(scene, parts, prompt=PROMPT, seed=7, **options)
    ours = st_editor.render_tensor(prepared, [[1.0, 1.0]], steps=4)[0]
    assert (ours - diffusers_edit(pipeline, scene, 4, **options)[0]).abs().max() <= 1e-4
    alphas: list[torch.Tensor] = []
    backbone = st_editor.engine

    def listening(inputs: Any) -> torch.Tensor:
        alphas.append(inputs["alpha"].clone())
        return backbone(inputs)

    editor = SliderEditor(
        st_editor.family, st_editor.pipeline, listening, st_editor.config, Controls("st"), max_batch=4, max_sliders=8
    )
    editor.render_tensor(prepared, [[0.5, 1.5]], steps=2)
    assert [a.tolist() for a in alphas] == [[[0.5, -0.5]], [[0.0, 0.0]]] * 2


@pytest.mark.parametrize(("width", "height"), PREFERRED_KONTEXT_RESOLUTIONS)
def test_every_preferred_resolution_is_kept_and_fits_an_engine_for_1024(
    family: Family, pipeline: Any, width: int, height: int
) -> None:
    pipeline.vae.register_to_config(sample_size=1024)
    # Another size of this aspect ratio is brought to the one that the base was trained on.
    pixels = family.preprocess(pipeline, Image.new("RGB", (width // 2, height // 2)))
    assert pixels.shape == (1, 3, height, width)
    patch = pipeline.vae_scale_factor * 2
    low, _, high = image_rows_of(resolve_base("shapes-kontext"), 1024)
    assert low <= 2 * (width // patch) * (height // patch) <= high


@pytest.mark.parametrize("size", [(64, 64), (300, 150), (150, 300), (640, 90), (65, 63), (1, 1), (2000, 1000)])
def test_references_of_other_sizes_and_aspect_ratios_are_edited(st_editor: SliderEditor, size: tuple[int, int]) -> None:
    edited = st_editor.edit(Image.new("RGB", size, (120, 120, 120)), [Slider("make the circle red")], steps=1)
    ratio = size[0] / size[1]
    assert edited.width / edited.height == pytest.approx(ratio, rel=0.35)
    assert edited.width * edited.height == pytest.approx(64 * 64, rel=0.3)


# Instructions that tokenizers, span search or people get wrong. Prompt, then instructions.
AWKWARD: list[tuple[str, list[str]]] = [
    (PROMPT, ["make the circle red", "make the background dark"]),
    ("make the background dark and make the circle red", ["make the circle red", "make the background dark"]),
    ("  make the circle red", ["make the circle red"]),
    ("make the circle red!", ["make the circle red"]),
    ("make the circle red.make the square blue", ["make the circle red", "make the square blue"]),
    ("make the circle red,make the square blue", ["make the circle red", "make the square blue"]),
    ("make the circle red;\tmake the square blue", ["make the circle red", "make the square blue"]),
    ("make the circle red\nmake the square blue", ["make the circle red", "make the square blue"]),
    ("'make the circle red' and \"make the square blue\"", ["make the circle red", "make the square blue"]),
    ("“make the circle red” and «make the square blue»", ["make the circle red", "make the square blue"]),
    ("(make the circle red) [make the square blue]", ["make the circle red", "make the square blue"]),
    ("{make the circle red} <make the square blue>", ["make the circle red", "make the square blue"]),
    ("1. make the circle red 2. make the square blue", ["make the circle red", "make the square blue"]),
    ("make 2 circles red and make 22 circles blue", ["make 2 circles red", "make 22 circles blue"]),
    ("add 50% fog and add 5 birds", ["add 50% fog", "add 5 birds"]),
    ("空を暗くする and make the circle red", ["空を暗くする", "make the circle red"]),
    ("把圆变红 (把背景变暗)", ["把圆变红", "把背景变暗"]),
    ("원을 빨갛게 and make the square blue", ["원을 빨갛게", "make the square blue"]),
    ("make the 🔴 bigger and make the 🟦 smaller", ["make the 🔴 bigger", "make the 🟦 smaller"]),
    ("make the circle red 👩‍🎨 make the square blue", ["make the circle red", "make the square blue"]),
    ("make the circle red and make the circle red", ["make the circle red", "make the circle red"]),
    ("make the circle red make the circle red make the circle red", ["make the circle red"] * 3),
    ("make the circle redder and make the circle red", ["make the circle red"]),
    ("remake the circle red, then make the circle red", ["make the circle red"]),
    ("make the circle red and blue", ["blue", "make the circle red"]),
    ("make the circle red and make the circle blue", ["make the circle blue", "make the circle red"]),
    ("MAKE THE CIRCLE RED and make the circle red", ["make the circle red", "MAKE THE CIRCLE RED"]),
    ("make the café's sign naïve and make the circle red", ["make the café's sign naïve", "make the circle red"]),
    ("make  the   circle red", ["make  the   circle red"]),
    ("red", ["red"]),
    ("make the circle red " + "and keep it " * 3 + "cut off here " * 9, ["make the circle red"]),
]


@pytest.fixture(scope="module")
def encoders(family: Family) -> Any:
    """Encoders whose T5 rows do not see each other: what comes out of row i is made of token i alone."""
    encoders = family.load_pipeline(resolve_base("shapes-kontext"), transformer=False)
    for block in encoders.text_encoder_2.encoder.block:
        nn.init.zeros_(block.layer[0].SelfAttention.o.weight)
    return encoders


@torch.no_grad()
@pytest.mark.parametrize(("prompt", "instructions"), AWKWARD)
def test_perturbing_the_tokens_of_a_slider_changes_its_rows_and_no_others(
    family: Family, encoders: Any, prompt: str, instructions: list[str]
) -> None:
    rows = 64
    spans = find_spans(prompt, [Slider(i) for i in instructions], family.tokenize(encoders, prompt), rows)
    embedding, ids = encoders.text_encoder_2.encoder.embed_tokens, []
    handle = embedding.register_forward_hook(lambda module, inputs, output: ids.append(inputs[0][0]))
    try:
        before = family.encode_prompt(encoders, [prompt], rows)["encoder_hidden_states"][0]
    finally:
        handle.remove()
    tokens = encoders.tokenizer_2.convert_ids_to_tokens(ids[0])
    for span, instruction in zip(spans, instructions, strict=True):
        # What the encoder reads in these rows is the instruction, as far as its vocabulary goes.
        words = "".join(tokens[row] for row in span).replace("▁", "")
        if "<unk>" not in words:
            assert words.strip(".,;!()[]{}<>'\"“”«»") == "".join(instruction.split())

        def perturb(module: nn.Module, inputs: Any, output: torch.Tensor, span: list[int] = span) -> torch.Tensor:
            changed = output.clone()
            changed[:, span] += 1
            return changed

        handle = embedding.register_forward_hook(perturb)
        try:
            after = family.encode_prompt(encoders, [prompt], rows)["encoder_hidden_states"][0]
        finally:
            handle.remove()
        assert (after != before).any(dim=-1).nonzero().flatten().tolist() == sorted(span)
    assert len({row for span in spans for row in span}) == sum(map(len, spans)), "a row has one owner"


def test_rows_follow_their_instruction_when_sliders_change_places(family: Family, encoders: Any) -> None:
    first, second = PROMPT.split(" and ")
    tokens = family.tokenize(encoders, PROMPT)
    one = find_spans(PROMPT, [Slider(first), Slider(second)], tokens, 24)
    assert find_spans(PROMPT, [Slider(second), Slider(first)], tokens, 24) == one[::-1]


def test_a_base_without_embedded_guidance_takes_none(family: Family, pipeline: Any) -> None:
    config = dict(pipeline.transformer.config)
    assert "guidance" in {s.name for s in family.input_specs(config)}
    assert "guidance" not in {s.name for s in family.input_specs(config | {"guidance_embeds": False})}


def test_embedded_guidance_is_an_input_of_the_request(st_editor: SliderEditor, scene: Image.Image) -> None:
    prepared = st_editor.prepare(scene, ["make the circle red"], guidance_scale=2.0)
    assert prepared.conditioning.inputs["guidance"].tolist() == [2.0]
    other = dataclasses.replace(prepared.conditioning, inputs=prepared.conditioning.inputs | {"guidance": torch.tensor([9.0])})
    images = [
        st_editor.render_tensor(dataclasses.replace(prepared, conditioning=c), [[1.0]], steps=1)
        for c in (prepared.conditioning, other)
    ]
    assert not torch.equal(*images)
