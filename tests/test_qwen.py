"""Qwen-Image-Edit on tiny random checkpoints of the real classes: the same images as diffusers' own pipelines."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from accelerate import init_empty_weights
from diffusers import QwenImageTransformer2DModel
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from PIL import Image
from qwen_checkpoint import SIDE, random_image, save_tiny_checkpoint
from test_linked_export import sparse_checkpoint

from slideredit_rt import cli
from slideredit_rt.adapters import Adapter, load_adapter, save_adapter
from slideredit_rt.assets import resolve_base
from slideredit_rt.editor import SliderEditor
from slideredit_rt.engines import BuildSettings, open_engine
from slideredit_rt.engines.backend import Lowering
from slideredit_rt.engines.folding import FoldedLoRALinear
from slideredit_rt.engines.tensorrt.build import image_rows_of
from slideredit_rt.errors import SliderEditError
from slideredit_rt.export.build import build_engine
from slideredit_rt.export.lowering import lower
from slideredit_rt.export.onnx_graph import example_inputs, trace
from slideredit_rt.families import KINDS, Family, Kind, family_of, get_family, qwen_image_edit
from slideredit_rt.modules import MaskedLoRALinear, SliderBackbone
from slideredit_rt.sliders import Controls, Slider, compose_prompt
from slideredit_rt.spans import find_spans, normalise
from slideredit_rt.training.suppression import SuppressionConfig, SuppressionTrainer
from slideredit_rt.verify import verify_engine

PARTS = ("make the circle red", "make the background dark")
PROMPT = compose_prompt(PARTS)


@pytest.fixture(scope="module")
def family() -> Family:
    return get_family("qwen_image_edit")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One image; and several, with the reference rows modulated as in 2511."""
    root = tmp_path_factory.mktemp("qwen")
    return {
        "edit": save_tiny_checkpoint(root / "edit"),
        "plus": save_tiny_checkpoint(root / "plus", plus=True, zero_cond_t=True),
    }


def _adapter(family: Family, kind: Kind, transformer: torch.nn.Module, rank: int = 4) -> Adapter:
    generator, target = torch.Generator().manual_seed(3), family.targets(kind)
    scale = {"st": 0.6, "gst": 0.2}[kind]
    pairs = {
        name: (
            torch.randn(rank, module.in_features, generator=generator) * scale,
            torch.randn(module.out_features, rank, generator=generator) * scale,
        )
        for name, module in transformer.named_modules()
        if isinstance(module, torch.nn.Linear) and target.fullmatch(name)
    }
    return Adapter(family.name, kind, rank, pairs, "random-adapter")


@pytest.fixture(scope="module")
def adapters(bases: dict[str, Path], family: Family) -> dict[Kind, Path]:
    transformer = QwenImageTransformer2DModel.from_pretrained(bases["edit"] / "transformer")
    paths: dict[Kind, Path] = {kind: bases["edit"].parent / f"{kind}.safetensors" for kind in KINDS}
    for kind, path in paths.items():
        save_adapter(_adapter(family, kind, transformer), path)
    return paths


@pytest.fixture(scope="module")
def qwen_engines(bases: dict[str, Path], adapters: dict[Kind, Path]) -> dict[str, Path]:
    """ST on the one-image base, GST on the other, each in its own lowering."""
    root = bases["edit"].parent
    pairs: tuple[tuple[str, Kind], ...] = (("edit", "st"), ("plus", "gst"))
    for base, kind in pairs:
        build_engine(bases[base], adapters[kind], root / f"engine-{base}", progress=False)
    return {base: root / f"engine-{base}" for base in bases}


@pytest.fixture(scope="module")
def encoders(bases: dict[str, Path], family: Family) -> dict[str, Any]:
    return {name: family.load_pipeline(path, transformer=False) for name, path in bases.items()}


def images_for(base: str) -> list[Image.Image]:
    return [random_image(80, 64)] if base == "edit" else [random_image(64, 64), random_image(96, 48, seed=1)]


@pytest.fixture
def small_edits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Diffusers' own pipelines edit at 64² instead of 1024², the images of the text encoder in proportion."""
    for module in (pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus):
        original = module.calculate_dimensions

        def smaller(area: int, ratio: float, original: Callable[..., Any] = original) -> Any:
            return original(area * SIDE**2 // 1024**2, ratio)

        monkeypatch.setattr(module, "calculate_dimensions", smaller)


def only_with_prompt(pipeline: Any, monkeypatch: pytest.MonkeyPatch, switch: Callable[[bool], None]) -> None:
    """Turn an adapter off for diffusers' negative passes: they run in a cache context of their own."""

    @contextlib.contextmanager
    def context(name: str) -> Iterator[None]:
        switch(name == "cond")
        yield

    monkeypatch.setattr(pipeline.transformer, "cache_context", context)


def diffusers_edit(pipeline: Any, images: list[Image.Image], scale: float, negative_prompt: str, steps: int) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    output: torch.Tensor = pipeline(
        image=images if len(images) > 1 else images[0],
        prompt=PROMPT,
        negative_prompt=negative_prompt if scale > 1 else None,
        true_cfg_scale=scale,
        num_inference_steps=steps,
        output_type="pt",
        generator=torch.Generator().manual_seed(5),
    ).images[0]
    return output


# The last negative prompt takes as many rows as the prompt.
GUIDANCE = [(1.0, " "), (4.0, " "), (4.0, "make the circle dark and make the background red")]


@pytest.mark.parametrize(("scale", "negative_prompt"), GUIDANCE)
def test_st_engine_draws_what_diffusers_does_with_the_update_on_the_sliders_rows(
    qwen_engines: dict[str, Path],
    bases: dict[str, Path],
    adapters: dict[Kind, Path],
    family: Family,
    small_edits: None,
    monkeypatch: pytest.MonkeyPatch,
    scale: float,
    negative_prompt: str,
) -> None:
    editor, strengths = SliderEditor.from_engine(qwen_engines["edit"]), [0.25, 1.5]
    prepared = editor.prepare(images_for("edit"), PARTS, seed=5, true_cfg_scale=scale, negative_prompt=negative_prompt)
    drawn = editor.render_tensor(prepared, [strengths, [1.0, 1.0]], steps=3)

    pipeline = family.load_pipeline(bases["edit"])
    row_scale = torch.zeros(1, prepared.conditioning.text_rows, 1)
    for span, strength in zip(prepared.spans, strengths, strict=True):
        row_scale[:, list(span)] = 1 - strength
    on = [True]

    def update(a: torch.Tensor, b: torch.Tensor) -> Any:
        return lambda _, args, y: y + row_scale * (args[0] @ a.T @ b.T) if on[0] else y

    only_with_prompt(pipeline, monkeypatch, lambda with_prompt: on.__setitem__(0, with_prompt))
    base = diffusers_edit(pipeline, images_for("edit"), scale, negative_prompt, steps=3)
    for name, pair in load_adapter(adapters["st"], family).pairs.items():
        pipeline.transformer.get_submodule(name).register_forward_hook(update(*pair))
    expected = diffusers_edit(pipeline, images_for("edit"), scale, negative_prompt, steps=3)
    assert (drawn[0] - expected).abs().max() <= 1e-4
    assert (drawn[1] - base).abs().max() <= 1e-4
    assert (expected - base).abs().max() > 2e-3


@pytest.mark.parametrize(("scale", "negative_prompt"), GUIDANCE)
def test_gst_engine_draws_what_diffusers_does_with_peft(
    qwen_engines: dict[str, Path],
    bases: dict[str, Path],
    adapters: dict[Kind, Path],
    family: Family,
    small_edits: None,
    monkeypatch: pytest.MonkeyPatch,
    scale: float,
    negative_prompt: str,
) -> None:
    editor, strength = SliderEditor.from_engine(qwen_engines["plus"]), 0.4
    images = images_for("plus")
    prepared = editor.prepare(images, PARTS[:1], prompt=PROMPT, seed=5, true_cfg_scale=scale, negative_prompt=negative_prompt)
    drawn = editor.render_tensor(prepared, [[strength]], steps=3)[0]

    pipeline = family.load_pipeline(bases["plus"])
    pipeline.load_lora_weights(adapters["gst"].parent, weight_name=adapters["gst"].name, adapter_name="gst")
    pipeline.set_adapters("gst", 1 - strength)

    def switch(on: bool) -> None:
        (pipeline.transformer.enable_lora if on else pipeline.transformer.disable_lora)()

    only_with_prompt(pipeline, monkeypatch, switch)
    expected = diffusers_edit(pipeline, images, scale, negative_prompt, steps=3)
    assert (drawn - expected).abs().max() <= 1e-4


def test_alpha_zero_is_the_base_bit_for_bit_in_eager(
    bases: dict[str, Path], adapters: dict[Kind, Path], family: Family
) -> None:
    for base in bases:
        transformer = family.load_pipeline(bases[base]).transformer
        for kind in KINDS:
            backbone = SliderBackbone(family, transformer, load_adapter(adapters[kind], family))
            inputs = example_inputs(backbone, transformer.config, 3, 20, 32, 2)
            with torch.no_grad():
                adapted = backbone(inputs)
                inputs["alpha"].zero_()
                off = backbone(inputs)
                backbone.remove()
                plain = backbone({k: v for k, v in inputs.items() if k not in ("alpha", "token_mask")})
            assert torch.equal(off, plain)
            assert not torch.equal(adapted, plain)


def test_a_prepared_transformer_is_diffusers_own_with_shapes_and_with_tables(bases: dict[str, Path], family: Family) -> None:
    """Three images of different sizes, padded text, with and without modulated reference rows; and gradients through both."""
    shapes = [(1, 8, 6), (1, 5, 4), (1, 3, 9)]
    rows = sum(h * w for _, h, w in shapes)
    for base, path in bases.items():
        original, prepared = (QwenImageTransformer2DModel.from_pretrained(path / "transformer").eval() for _ in range(2))
        family.prepare_transformer(prepared)
        prepared.enable_gradient_checkpointing()
        assert list(prepared.state_dict()) == list(original.state_dict())
        positions = torch.cat([qwen_image_edit._positions(h, w, i) for i, (_, h, w) in enumerate(shapes)])
        inputs = family.random_inputs(prepared.config, 3, 12, rows, torch.Generator().manual_seed(1))
        inputs |= qwen_image_edit._row_inputs(prepared.config, positions, 12)
        inputs["encoder_hidden_states_mask"] = torch.arange(12) < torch.tensor([5, 12, 9])[:, None]
        plain = {k: inputs[k] for k in ("hidden_states", "encoder_hidden_states", "encoder_hidden_states_mask", "timestep")}
        noise = inputs["hidden_states"].clone().requires_grad_()
        expected = original(**plain | {"hidden_states": noise}, img_shapes=[shapes] * 3, return_dict=False)[0]
        again = prepared(**plain, img_shapes=[shapes] * 3, return_dict=False)[0]
        assert (again - expected).abs().max() == 0, base
        ours_noise = noise.detach().clone().requires_grad_()
        ours = family.run(prepared, inputs | {"hidden_states": ours_noise})
        assert (ours - expected).abs().max() <= 1e-5, base
        expected.square().mean().backward()
        ours.square().mean().backward()
        assert noise.grad is not None
        assert ours_noise.grad is not None
        assert (ours_noise.grad - noise.grad).abs().max() <= 1e-5, base


@torch.no_grad()
def test_prompts_of_one_length_need_no_mask(bases: dict[str, Path], family: Family, encoders: dict[str, Any]) -> None:
    images = images_for("edit")
    alone = family.encode_prompt(encoders["edit"], [PROMPT], 192, [images])
    assert list(alone) == ["encoder_hidden_states"]
    padded = family.encode_prompt(encoders["edit"], [PROMPT, "red"], 192, [images] * 2)
    assert padded["encoder_hidden_states_mask"].all(dim=1).tolist() == [True, False]
    for path in bases.values():
        transformer = family.load_pipeline(path).transformer
        family.prepare_transformer(transformer)
        inputs = family.random_inputs(transformer.config, 2, 12, 32, torch.Generator().manual_seed(1))
        assert [spec.name for spec in family.input_specs(transformer.config)] == list(inputs)
        every_row = torch.ones(2, 12, dtype=torch.bool)
        plain, masked = (family.run(transformer, inputs | more) for more in ({}, {"encoder_hidden_states_mask": every_row}))
        assert (plain - masked).abs().max() <= 1e-6
        short = family.run(transformer, inputs | {"encoder_hidden_states_mask": every_row & (torch.arange(12) < 7)})
        assert (plain - short).abs().max() > 1e-4, "a mask that leaves rows out is not ignored"


def test_an_engine_with_a_mask_is_refused(qwen_engines: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "older"
    shutil.copytree(qwen_engines["edit"], folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    mask = {"name": "encoder_hidden_states_mask", "dtype": "bool", "shape": ["batch", "text_rows"]}
    manifest["inputs"].insert(2, mask)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(SliderEditError, match=r"are not those that this version gives a qwen_.*; build the engine again"):
        SliderEditor.from_engine(folder)


def test_targets_of_the_full_size_model(family: Family) -> None:
    with init_empty_weights():
        qwen = QwenImageTransformer2DModel()
    linears = [name for name, m in qwen.named_modules() if isinstance(m, torch.nn.Linear)]
    counts = {kind: sum(bool(family.targets(kind).fullmatch(n)) for n in linears) for kind in KINDS}
    assert counts == {"st": 360, "gst": 720}
    assert {family.rows_of(n) for n in linears if family.targets("st").fullmatch(n)} == {"text"}
    assert sum(family.rows_of(n) == "image" for n in linears) == 360
    assert {n.split(".", 2)[2] for n in linears if family.rows_of(n) == "text"} == {
        *(f"attn.add_{x}_proj" for x in "qkv"),
        "attn.to_add_out",
        "txt_mlp.net.0.proj",
        "txt_mlp.net.2",
    }


AWKWARD = [
    (PROMPT, PARTS[0]),
    (PROMPT, PARTS[1]),
    ('say "make the circle red" twice', "make the circle red"),
    ('write "Ciao" on the wall', '"Ciao"'),
    ("it's 'make it red', isn't it", "make it red"),
    ("(make the circle red)", "make the circle red"),
    ("[[make the circle red]] {now}", "make the circle red"),
    ("{make} the {0} circle", "{0} circle"),
    ("make 30% of them orange", "30%"),
    ("add 3 cats, 12345 dogs", "12345 dogs"),
    ("set it to 3.14159 cm", "3.14159"),
    ("把天空变暗，并让圆形变红", "让圆形变红"),
    ("空を暗くして、円を赤くする", "円を赤くする"),
    ("하늘을 어둡게 and make it red", "하늘을 어둡게"),
    ("把天空变暗 and make the circle red", "make the circle red"),
    ("add a 🐈‍⬛ next to the 🐶 please", "🐈‍⬛"),
    ("🎉 make the circle red 🎉", "make the circle red"),
    ("make the flag 🇮🇹 bigger", "flag 🇮🇹"),
    ("make the café red", "café"),
    ("make the cafe\u0301 red", "make the cafe\u0301"),
    ("make the circle red and make the circle red", "make the circle red"),
    ("make it reddish, then make it red", "make it red"),
    ("make make it red", "make it red"),
    ("make the circle red, make the circle red now", "make the circle red now"),
    ("make   the\tcircle\nred", "the\tcircle\nred"),
    ("   make the circle red   ", "make the circle red"),
    ("MAKE THE CIRCLE RED!!!", "CIRCLE RED!!!"),
    ("don't add a hat; it's fine", "don't add a hat"),
    ("x" * 60 + " make it red", "make it red"),
    ("Picture 1: make Picture 2 red", "make Picture 2 red"),
    ("user\nassistant system make it red", "make it red"),
    ("Привет: сделай круг красным", "сделай круг красным"),
]


@pytest.mark.parametrize("base", ["edit", "plus"])
@pytest.mark.parametrize(("prompt", "instruction"), AWKWARD)
@torch.no_grad()
def test_a_span_is_the_rows_of_its_tokens_in_what_the_encoder_returns(
    family: Family, encoders: dict[str, Any], base: str, prompt: str, instruction: str
) -> None:
    pipeline, images = encoders[base], images_for(base)
    text, wanted = normalise(prompt), Slider(instruction)
    (span,) = find_spans(text, [wanted], family.tokenize(pipeline, text, images), family.max_text_rows(pipeline))
    seen: dict[str, Any] = {}
    perturbed: set[int] = set()

    def read(_: Any, args: tuple[Any, ...], embeddings: torch.Tensor) -> torch.Tensor:
        seen["ids"] = args[0][0].tolist()
        embeddings = embeddings.clone()
        for row in perturbed:
            embeddings[0, row + pipeline.prompt_template_encode_start_idx] += 1.0
        return embeddings

    def encode() -> torch.Tensor:
        return family.encode_prompt(pipeline, [text], family.max_text_rows(pipeline), [images])["encoder_hidden_states"][0]

    hook = pipeline.text_encoder.get_input_embeddings().register_forward_hook(read)
    try:
        plain = encode()
        ids = seen["ids"][pipeline.prompt_template_encode_start_idx :]
        assert len(ids) == len(plain)

        def words(rows: list[int]) -> str:
            return str(pipeline.tokenizer.decode([ids[row] for row in rows]))

        # Exactly the tokens that hold the instruction: it is in them, and no longer without the first or the last.
        assert span == list(range(span[0], span[-1] + 1))
        assert wanted.instruction in words(span)
        assert wanted.instruction not in words(span[1:])
        assert wanted.instruction not in words(span[:-1])
        # And in that place of the prompt, to the letter.
        assert words(list(range(len(ids)))).endswith(f"{text}<|im_end|>\n<|im_start|>assistant\n")
        first = next(t for t in family.tokenize(pipeline, text, images) if t.row == span[0])
        assert words(list(range(span[0]))).endswith(f"<|vision_end|>{text[: first.start]}")
        # Row by row: what the encoder returns changes from the perturbed token's own row on, and not before it.
        for row in {span[0], span[-1]}:
            perturbed = {row}
            changed = (encode() != plain).any(dim=1).nonzero()[:, 0]
            assert changed[0] == row
    finally:
        hook.remove()


def test_the_prefix_that_is_dropped_is_the_templates(encoders: dict[str, Any]) -> None:
    for pipeline in encoders.values():
        before_user = pipeline.prompt_template_encode.split("user\n")[0] + "user\n"
        assert len(pipeline.tokenizer(before_user)["input_ids"]) == pipeline.prompt_template_encode_start_idx


def test_text_that_does_not_fit_is_refused(family: Family, encoders: dict[str, Any]) -> None:
    pipeline, images = encoders["edit"], images_for("edit")
    most = family.max_text_rows(pipeline)
    assert most == 256 - 64
    prompt = "red " * most + PARTS[0]
    with pytest.raises(SliderEditError, match=r"make the circle red.*is cut off"):
        find_spans(prompt, [Slider(PARTS[0])], family.tokenize(pipeline, prompt, images), most)
    with pytest.raises(SliderEditError, match=r"need .* text rows, but this base reads 192"):
        family.encode_prompt(pipeline, [prompt], most, [images])


def test_control_tokens_in_a_prompt_are_refused(family: Family, encoders: dict[str, Any]) -> None:
    for word in ("<|image_pad|>", "<|im_end|>"):
        with pytest.raises(SliderEditError, match="a special token of this base"):
            family.tokenize(encoders["plus"], f"make {word} red")


@torch.no_grad()
def test_requests_of_different_lengths_in_a_batch_are_what_each_is_alone(
    bases: dict[str, Path], adapters: dict[Kind, Path], family: Family
) -> None:
    prompts = ["red", PROMPT, "make the circle red and add 3 cats"]
    images = images_for("edit")
    for kind in KINDS:
        pipeline = family.load_pipeline(bases["edit"])
        backbone = SliderBackbone(family, pipeline.transformer, load_adapter(adapters[kind], family))
        config = dict(pipeline.transformer.config)
        text = family.encode_prompt(pipeline, prompts, 192, [images] * 3)
        lengths = text["encoder_hidden_states_mask"].sum(dim=1).tolist()
        assert len(set(lengths)) == 3
        sources = family.encode_sources(pipeline, images)
        noise = family.draw_noise(pipeline, sources.height, sources.width, 0)
        conditioning = family.condition(sources, text, None, noise, None, 1.0)
        rows = max(lengths)
        generator = torch.Generator().manual_seed(2)
        alpha = torch.randn(3, 2, generator=generator)
        width = rows if kind == "st" else rows + conditioning.image_rows
        owner = torch.randint(0, 3, (3, 1, width), generator=generator)
        mask = owner == torch.arange(2)[:, None]
        several = dataclasses.replace(conditioning, inputs=conditioning.inputs | text, text_rows=rows)
        inputs = family.batch_inputs(config, several, alpha, mask)
        inputs["timestep"].copy_(torch.tensor([0.2, 0.5, 0.9]))
        together = backbone(inputs)
        for row, length in enumerate(lengths):
            own = {k: v[row : row + 1, :length] for k, v in text.items()}
            alone = dataclasses.replace(conditioning, inputs=conditioning.inputs | own, text_rows=length)
            kept = torch.cat([mask[row : row + 1, :, :length], mask[row : row + 1, :, rows:]], dim=2)
            request = family.batch_inputs(config, alone, alpha[row : row + 1], kept)
            request["timestep"].copy_(inputs["timestep"][row : row + 1])
            assert (backbone(request)[0] - together[row]).abs().max() <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_every_lowering_computes_what_eager_torch_does(
    bases: dict[str, Path], adapters: dict[Kind, Path], family: Family, kind: Kind
) -> None:
    config = QwenImageTransformer2DModel.load_config(bases["plus"] / "transformer")
    torch.manual_seed(0)
    transformer = QwenImageTransformer2DModel.from_config(config, num_layers=1).eval()
    backbone = SliderBackbone(family, transformer, _adapter(family, kind, transformer))
    config = dict(transformer.config)
    proto = ir.serde.serialize_model(trace(backbone, config).model)
    assert not any("Complex" in node.op_type or "STFT" in node.op_type for node in proto.graph.node)
    for form in ("native", "folded"):
        model = ir.serde.deserialize_model(proto)
        lower(model, form)
        session = onnxruntime.InferenceSession(ir.serde.serialize_model(model).SerializeToString())
        for sizes in ((2, 24, 32, 2), (1, 7, 20, 1), (3, 11, 12, 5)):
            inputs = example_inputs(backbone, config, *sizes)
            with torch.no_grad():
                expected = backbone(inputs)
                frozen = backbone(inputs | {"alpha": torch.zeros_like(inputs["alpha"])})
            actual = session.run(None, {n: t.numpy() for n, t in inputs.items()})[0]
            error = np.abs(actual - expected.numpy()).max()
            assert error <= 1e-4
            assert error <= 1e-3 * float((expected - frozen).abs().max())


@pytest.mark.usefixtures("as_traced")
@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_an_inductor_engine_computes_what_eager_torch_does(
    bases: dict[str, Path], adapters: dict[Kind, Path], family: Family, tmp_path: Path, kind: Kind
) -> None:
    """GST is folded one projection at a time, because the attention of Qwen never calls joint projections."""
    base = bases["plus"]
    build_engine(base, adapters[kind], tmp_path / "engine", BuildSettings("inductor"), progress=False)
    manifest, engine = open_engine(tmp_path / "engine")
    transformer = QwenImageTransformer2DModel.from_pretrained(base / "transformer").eval()
    eager = SliderBackbone(family, transformer, load_adapter(adapters[kind], family))
    for sizes in ((2, 24, 32, 2), (1, 7, 20, 1)):
        inputs = example_inputs(eager, manifest.config, *sizes)
        expected, frozen = eager(inputs), eager(inputs | {"alpha": torch.zeros_like(inputs["alpha"])})
        error = (engine(inputs) - expected).abs().max()
        assert error <= min(1e-4, 1e-3 * float((expected - frozen).abs().max()))
    modules = dict(engine._backbone.transformer.named_modules())  # type: ignore[attr-defined]
    form = {"st": MaskedLoRALinear, "gst": FoldedLoRALinear}[kind]
    assert {name for name, module in modules.items() if isinstance(module, form)} == set(eager.adapted)
    assert not any(name.endswith(("to_qkv", "to_added_qkv")) for name in modules)


def test_the_negative_pass_is_told_by_being_it(encoders: dict[str, Any], bases: dict[str, Path], family: Family) -> None:
    """Even with the very same prompt: every alpha 0, every mask empty; one pass at scale 1."""
    pipeline = family.load_pipeline(bases["edit"])
    backbone = SliderBackbone(family, pipeline.transformer, None)
    calls = []

    def engine(inputs: Any) -> Any:
        calls.append({k: v.clone() for k, v in inputs.items()})
        return backbone({k: v for k, v in inputs.items() if k not in ("alpha", "token_mask")})

    for kind in KINDS:
        parts = family, pipeline, torch.no_grad()(engine), dict(pipeline.transformer.config), Controls(kind)
        editor = SliderEditor(*parts, max_batch=4, max_sliders=4)
        for scale, passes in ((4.0, 2), (1.0, 1)):
            calls.clear()
            prepared = editor.prepare(
                images_for("edit"), PARTS[:1], prompt=PROMPT, true_cfg_scale=scale, negative_prompt=PROMPT
            )
            editor.render_tensor(prepared, [[0.0], [2.0]], steps=2)
            assert len(calls) == 2 * passes
            with pytest.raises(SliderEditError, match="schedule of 1 step; use at least 2"):
                editor.render_tensor(prepared, [[0.0]], steps=1)
            assert calls[0]["alpha"].tolist() == [[1.0], [-1.0]]
            assert calls[0]["token_mask"].any()
            if passes == 2:
                assert calls[0]["token_mask"].shape == calls[1]["token_mask"].shape
                assert not calls[1]["alpha"].any()
                assert not calls[1]["token_mask"].any()
                assert torch.equal(calls[0]["encoder_hidden_states"], calls[1]["encoder_hidden_states"])


def test_verification_passes(qwen_engines: dict[str, Path]) -> None:
    result = verify_engine(qwen_engines["edit"], random_image(), [Slider(p) for p in PARTS], steps=2)
    assert result.passed, result.verdict


def test_command_takes_several_images_and_a_negative_prompt(qwen_engines: dict[str, Path], tmp_path: Path) -> None:
    paths = [tmp_path / f"{index}.png" for index in range(2)]
    for path, image in zip(paths, images_for("plus"), strict=True):
        image.save(path)
    given = [x for path in paths for x in ("--image", str(path))]
    options = [
        "--slider",
        f"{PARTS[0]}=0.5",
        "--negative-prompt",
        "blurred",
        "--steps",
        "2",
        "--out",
        str(tmp_path / "out.png"),
    ]
    assert cli.main(["edit", str(qwen_engines["plus"]), *given, *options]) == 0
    # As wide as the last image is beside its height.
    assert Image.open(tmp_path / "out.png").size == (96, 32)
    assert cli.main(["edit", str(qwen_engines["edit"]), *given, *options]) == 2


class _TwoEdits:
    def draw(self, rng: random.Random, batch: int) -> tuple[torch.Tensor, list[list[str]]]:
        generator = torch.Generator().manual_seed(rng.randint(0, 10**6))
        edits = [list(PARTS[: 1 + index % 2]) for index in range(batch)]
        return torch.rand(batch, 3, SIDE, SIDE, generator=generator), edits


@pytest.mark.parametrize("kind", KINDS)
def test_training_learns_on_prompts_of_different_lengths(
    bases: dict[str, Path], family: Family, tmp_path: Path, kind: Kind
) -> None:
    base = {"st": "plus", "gst": "edit"}[kind]
    target: Any = {"st": "remaining", "gst": "neutral"}[kind]
    options: dict[str, Any] = {"rank": 2, "steps": 2, "batch": 2, "learning_rate": 1e-2, "gradient_checkpointing": kind == "st"}
    config = SuppressionConfig(kind=kind, target=target, **options)
    trainer = SuppressionTrainer(family, family.load_pipeline(bases[base]), _TwoEdits(), config, tmp_path / "new.safetensors")
    adapter = trainer.train(progress=False)
    assert adapter.family == "qwen_image_edit"
    assert len(adapter.pairs) == {"st": 12, "gst": 24}[kind]
    # What the last block makes of its text rows reaches no output, nor do their queries.
    still = {name for name, (_, b) in adapter.pairs.items() if not b.any()}
    last = ("attn.add_q_proj", "attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2")
    assert still == {f"transformer_blocks.1.{name}" for name in last}
    assert load_adapter(tmp_path / "new.safetensors", family).kind == kind


def test_several_images_need_a_base_that_takes_them(
    encoders: dict[str, Any], family: Family, bases: dict[str, Path], scene: Image.Image
) -> None:
    def editor(of: Family, pipeline: Any) -> SliderEditor:
        return SliderEditor(of, pipeline, lambda _: torch.zeros(()), {}, Controls("st"), max_batch=1, max_sliders=4)

    flux = get_family("flux_kontext")
    kontext = editor(flux, flux.load_pipeline(resolve_base("shapes-kontext")))
    qwen = editor(family, encoders["edit"])
    for one_image, name in ((kontext, "FluxKontextPipeline"), (qwen, "QwenImageEditPipeline")):
        for images in ([], [scene, scene]):
            with pytest.raises(SliderEditError, match=f"got {len(images)} images, but a {name} edits one"):
                one_image.prepare(images, PARTS)
    with pytest.raises(SliderEditError, match="this editor runs without a negative pass by default"):
        kontext.prepare(scene, PARTS, negative_prompt=" ")
    with pytest.raises(SliderEditError, match="qwen_image_edit has no embedded guidance; use the true-CFG scale"):
        qwen.prepare(scene, PARTS, guidance_scale=3.5)
    with pytest.raises(SliderEditError, match="900×2 pixels is too narrow"):
        qwen.prepare(Image.new("RGB", (900, 2)), PARTS)


def test_an_adapter_of_the_other_family_is_refused(bases: dict[str, Path], adapters: dict[Kind, Path], tmp_path: Path) -> None:
    with pytest.raises(SliderEditError, match="flux_kontext"):
        SliderEditor.from_pretrained(bases["edit"], "shapes-st")
    with pytest.raises(SliderEditError, match="qwen_image_edit"):
        SliderEditor.from_pretrained("shapes-kontext", adapters["gst"])


def test_a_checkpoint_tells_its_family_and_its_rows(bases: dict[str, Path], family: Family) -> None:
    for path in bases.values():
        assert family_of(path) is family
        # 64 rows each of noise and image at 64²; the VAE's factor is 4.
        assert image_rows_of(path, SIDE)[1] == 128
        with pytest.raises(SliderEditError, match="60 is not a multiple of 8"):
            image_rows_of(path, 60)


FULL_SIZE = """
import json, resource, sys, time
from pathlib import Path
from slideredit_rt.adapters import load_adapter
from slideredit_rt.export.linked_weights import export_linked
from slideredit_rt.families import get_family
family = get_family("qwen_image_edit")
started = time.perf_counter()
base, adapter, folder, lowering = Path(sys.argv[1]), load_adapter(sys.argv[2], family), Path(sys.argv[3]), sys.argv[4]
result = export_linked(family, base, adapter, folder, lowering=lowering, target="sm90")
seconds = time.perf_counter() - started
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"seconds": seconds, "peak_bytes": peak, "bytes_written": result.bytes_written, "links": result.links}))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "form"), [("st", "native"), ("gst", "folded"), ("gst", "plugin")])
def test_the_full_20b_transformer_exports_without_its_weights(
    tmp_path: Path, family: Family, kind: Kind, form: Lowering, capsys: pytest.CaptureFixture[str]
) -> None:
    with init_empty_weights():
        transformer = QwenImageTransformer2DModel(zero_cond_t=True)
    sparse_checkpoint(tmp_path / "base" / "transformer", transformer)
    adapter = _adapter(family, kind, transformer, rank=16)
    save_adapter(adapter, tmp_path / "adapter.safetensors")
    folder = tmp_path / "engine"
    folder.mkdir()
    # A process of its own: its peak memory is the export's.
    run = subprocess.run(
        [sys.executable, "-c", FULL_SIZE, tmp_path / "base", tmp_path / "adapter.safetensors", folder, form],
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    figures = json.loads(run.stdout.splitlines()[-1])
    linked_bytes = sum((folder / name).stat().st_size for name in figures["links"])
    with capsys.disabled():
        print(  # noqa: T201
            f"\n{kind}, {form}: {figures['seconds']:.0f} s, peak {figures['peak_bytes'] / 1e9:.2f} GB, "
            f"written {figures['bytes_written'] / 1e6:.0f} MB, linked {linked_bytes / 1e9:.1f} GB"
        )
    assert set(figures["links"].values()) == {"hard"}
    assert linked_bytes > 40e9
    assert figures["peak_bytes"] < 4e9
    assert figures["bytes_written"] < 250e6
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    nodes = collections.Counter(node.op_type for node in model.graph.node)
    # What the last block makes of its text rows reaches no output.
    left = len(adapter.pairs) - 3
    assert nodes["MaskedLoRA"] + nodes["MaskedLoRALinear"] == (0 if form == "folded" else left)
    assert not {"SplitToSequence", "SequenceAt", "ConcatFromSequence"} & set(nodes)
    shutil.rmtree(tmp_path)
