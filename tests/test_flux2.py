"""FLUX.2-klein on tiny random checkpoints of the real classes: the same images as diffusers' own pipeline."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel
from flux2_checkpoint import SIDE, TEXT_ROWS, diffusers_edit, flux2_adapter, random_pairs, save_tiny_checkpoint
from http_server import as_file, image_of, serving
from PIL import Image
from qwen_checkpoint import random_image
from test_linked_export import export_apart, sparse_checkpoint
from test_qwen import AWKWARD, only_with_prompt

from slideredit_rt import cli
from slideredit_rt.adapters import Adapter, load_adapter, save_adapter
from slideredit_rt.bench.full_size import FULL_SIZES, qwen3_tokenizer
from slideredit_rt.editor import SliderEditor
from slideredit_rt.engines import BuildSettings, open_engine
from slideredit_rt.engines.backend import Lowering
from slideredit_rt.engines.folding import FoldedLoRALinear
from slideredit_rt.engines.tensorrt.build import image_rows_of
from slideredit_rt.errors import SliderEditError
from slideredit_rt.export.build import build_engine
from slideredit_rt.export.onnx_graph import example_inputs
from slideredit_rt.families import KINDS, Family, Kind, family_of, get_family
from slideredit_rt.modules import MaskedLoRALinear, SliderBackbone
from slideredit_rt.settings import EditSettings
from slideredit_rt.sliders import Controls, Slider, compose_prompt
from slideredit_rt.spans import find_spans, normalise
from slideredit_rt.training.suppression import SuppressionConfig, SuppressionTrainer
from slideredit_rt.verify import verify_engine

PARTS = ("make the circle red", "make the background dark")
PROMPT = compose_prompt(PARTS)
BASES = ("distilled", "base")


@pytest.fixture(scope="module")
def family() -> Family:
    return get_family("flux2")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("flux2")
    return {name: save_tiny_checkpoint(root / name, distilled=name == "distilled") for name in BASES}


@pytest.fixture(scope="module")
def adapters(bases: dict[str, Path]) -> dict[Kind, Path]:
    paths: dict[Kind, Path] = {kind: bases["base"].parent / f"{kind}.safetensors" for kind in KINDS}
    for kind, path in paths.items():
        save_adapter(flux2_adapter(bases["base"], kind), path)
    return paths


@pytest.fixture(scope="module")
def flux2_engines(bases: dict[str, Path], adapters: dict[Kind, Path]) -> dict[tuple[str, str], Path]:
    """An engine of each kind for each checkpoint. Both checkpoints have the same weights."""
    engines: dict[tuple[str, str], Path] = {}
    for base, checkpoint in bases.items():
        for kind, adapter in adapters.items():
            engines[base, kind] = checkpoint.parent / f"engine-{base}-{kind}"
            build_engine(checkpoint, adapter, engines[base, kind], progress=False)
    return engines


@pytest.fixture(scope="module")
def encoders(bases: dict[str, Path], family: Family) -> Any:
    return family.load_pipeline(bases["distilled"], transformer=False)


def images_of(number: int) -> list[Image.Image]:
    return [random_image(96, 128), random_image(83, 70, seed=1)][:number]


@pytest.fixture(scope="module")
def st_editors(
    flux2_engines: dict[tuple[str, str], Path], bases: dict[str, Path], adapters: dict[Kind, Path], family: Family
) -> dict[tuple[str, str], tuple[SliderEditor, Adapter]]:
    """Editors with ST adapters, on text rows alone and on those among the joint rows as well."""
    joint, path = flux2_adapter(bases["base"], "st", all_projections=True), bases["base"].parent / "engine-joint"
    build_engine(bases["distilled"], joint, path, progress=False)
    text = load_adapter(adapters["st"], family)
    editors = {(base, "text"): (SliderEditor.from_engine(flux2_engines[base, "st"]), text) for base in BASES}
    return editors | {("distilled", "joint"): (SliderEditor.from_engine(path), joint)}


@pytest.mark.parametrize(
    ("base", "rows", "images"),
    [("distilled", "text", 1), ("distilled", "text", 2), ("distilled", "joint", 2), ("base", "text", 1), ("base", "text", 2)],
)
def test_st_engine_draws_what_diffusers_does_with_the_update_on_the_sliders_rows(
    st_editors: dict[tuple[str, str], tuple[SliderEditor, Adapter]],
    bases: dict[str, Path],
    family: Family,
    monkeypatch: pytest.MonkeyPatch,
    base: str,
    rows: str,
    images: int,
) -> None:
    (editor, adapter), strengths = st_editors[base, rows], [0.25, 1.5]
    prepared = editor.prepare(images_of(images), PARTS, seed=5)
    drawn = editor.render_tensor(prepared, [strengths, [1.0, 1.0]], steps=3)
    assert drawn.shape == (2, 3, 128, 96), "the edited image has the size of the first one"

    pipeline = family.load_pipeline(bases[base])
    row_scale = torch.zeros(1, TEXT_ROWS, 1)
    for span, strength in zip(prepared.spans, strengths, strict=True):
        row_scale[:, list(span)] = 1 - strength
    on = [True]

    def update(a: torch.Tensor, b: torch.Tensor) -> Any:
        def hook(_: torch.nn.Module, args: tuple[torch.Tensor], y: torch.Tensor) -> torch.Tensor:
            # Joint rows begin with the text rows.
            scale = F.pad(row_scale, (0, 0, 0, y.shape[1] - TEXT_ROWS))
            return y + scale * (args[0] @ a.T @ b.T) if on[0] else y

        return hook

    only_with_prompt(pipeline, monkeypatch, lambda with_prompt: on.__setitem__(0, with_prompt))
    # A distilled checkpoint ignores the scale.
    frozen = diffusers_edit(pipeline, images_of(images), PROMPT, 4.0, steps=3)
    for name, pair in adapter.pairs.items():
        pipeline.transformer.get_submodule(name).register_forward_hook(update(*pair))
    expected = diffusers_edit(pipeline, images_of(images), PROMPT, 4.0, steps=3)
    assert (drawn[0] - expected).abs().max() <= 1e-4
    assert (drawn[1] - frozen).abs().max() <= 1e-4
    assert (expected - frozen).abs().max() > 2e-3


@pytest.mark.parametrize(("base", "images"), [("distilled", 2), ("base", 1)])
def test_gst_engine_draws_what_diffusers_does_with_peft(
    flux2_engines: dict[tuple[str, str], Path],
    bases: dict[str, Path],
    adapters: dict[Kind, Path],
    family: Family,
    monkeypatch: pytest.MonkeyPatch,
    base: str,
    images: int,
) -> None:
    editor, strength = SliderEditor.from_engine(flux2_engines[base, "gst"]), 0.4
    prepared = editor.prepare(images_of(images), PARTS[:1], prompt=PROMPT, seed=5)
    drawn = editor.render_tensor(prepared, [[strength], [1.0]], steps=3)

    pipeline = family.load_pipeline(bases[base])
    frozen = diffusers_edit(pipeline, images_of(images), PROMPT, 4.0, steps=3)
    pipeline.load_lora_weights(adapters["gst"].parent, weight_name=adapters["gst"].name, adapter_name="gst")
    pipeline.set_adapters("gst", 1 - strength)

    def switch(on: bool) -> None:
        (pipeline.transformer.enable_lora if on else pipeline.transformer.disable_lora)()

    only_with_prompt(pipeline, monkeypatch, switch)
    expected = diffusers_edit(pipeline, images_of(images), PROMPT, 4.0, steps=3)
    assert (drawn[0] - expected).abs().max() <= 1e-4
    assert (drawn[1] - frozen).abs().max() <= 1e-4
    assert (expected - frozen).abs().max() > 2e-3


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_alpha_zero_is_the_base_bit_for_bit_in_eager(
    bases: dict[str, Path], adapters: dict[Kind, Path], family: Family, kind: Kind
) -> None:
    transformer = family.load_pipeline(bases["base"]).transformer
    backbone = SliderBackbone(family, transformer, load_adapter(adapters[kind], family))
    inputs = example_inputs(backbone, transformer.config, 3, 20, 32, 2)
    assert {spec.name for spec in family.input_specs(transformer.config)} == set(inputs) - {"alpha", "token_mask"}
    adapted = backbone(inputs)
    inputs["alpha"].zero_()
    off = backbone(inputs)
    backbone.remove()
    plain = backbone({k: v for k, v in inputs.items() if k not in ("alpha", "token_mask")})
    assert torch.equal(off, plain)
    assert not torch.equal(adapted, plain)


@pytest.mark.parametrize(
    ("sizes", "counts"),
    [
        ({"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680}, (30, 70, 100)),
        ({"num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288}, (48, 96, 144)),
    ],
    ids=["4B", "9B"],
)
def test_targets_of_the_full_size_models(family: Family, sizes: dict[str, int], counts: tuple[int, int, int]) -> None:
    with init_empty_weights():
        transformer = Flux2Transformer2DModel(**sizes, guidance_embeds=False)
    linears = [name for name, m in transformer.named_modules() if isinstance(m, torch.nn.Linear)]
    targets = (family.targets("st"), family.targets("st", all_projections=True), family.targets("gst"))
    assert tuple(sum(bool(target.fullmatch(n)) for n in linears) for target in targets) == counts
    assert {family.rows_of(n) for n in linears if family.targets("st").fullmatch(n)} == {"text"}
    assert all(family.targets("gst").fullmatch(n) for n in linears if family.rows_of(n) is not None)
    # The blocks share their modulation. Embedders and the last norm and projection are left.
    assert [n for n in linears if family.is_modulation(n)] == [
        *(f"double_stream_modulation_{stream}.linear" for stream in ("img", "txt")),
        "single_stream_modulation.linear",
    ]
    left = {n for n in linears if family.rows_of(n) is None and not family.is_modulation(n)}
    assert {n.split(".")[0] for n in left} == {"time_guidance_embed", "x_embedder", "context_embedder", "norm_out", "proj_out"}


def test_a_distilled_checkpoint_takes_few_steps_and_no_negative_pass(bases: dict[str, Path], family: Family) -> None:
    found = {}
    for name, path in bases.items():
        pipeline = family.load_pipeline(path, transformer=False)
        editor = SliderEditor(family, pipeline, lambda _: torch.zeros(()), {}, Controls("st"), max_batch=1, max_sliders=4)
        prepared = editor.prepare(images_of(1), PARTS)
        conditioning = prepared.conditioning
        found[name] = editor.number_of_steps(EditSettings()), conditioning.true_cfg_scale, conditioning.negative is not None
        asked = editor.prepare(images_of(1), PARTS, true_cfg_scale=2.0, negative_prompt="blurred").conditioning
        assert asked.negative is not None, "guidance on request, with any checkpoint"
        with pytest.raises(SliderEditError, match="flux2 has no embedded guidance; use the true-CFG scale"):
            editor.prepare(images_of(1), PARTS, guidance_scale=3.5)
    assert found == {"distilled": (4, 1.0, False), "base": (50, 4.0, True)}


AWKWARD_HERE = [*AWKWARD, ("\nmake it red", "make it red"), ("user", "user"), ("assistant make it red", "assistant")]


@pytest.mark.parametrize(("prompt", "instruction"), AWKWARD_HERE)
@torch.no_grad()
def test_a_span_is_the_rows_of_its_tokens_in_what_the_encoder_returns(
    family: Family, encoders: Any, prompt: str, instruction: str
) -> None:
    text, wanted, most = normalise(prompt), Slider(instruction), family.max_text_rows(encoders)
    tokens = family.tokenize(encoders, text)
    (span,) = find_spans(text, [wanted], tokens, most)
    seen: dict[str, list[int]] = {}
    perturbed: set[int] = set()

    def read(_: Any, args: tuple[Any, ...], embeddings: torch.Tensor) -> torch.Tensor:
        seen["ids"] = args[0][0].tolist()
        embeddings = embeddings.clone()
        for row in perturbed:
            embeddings[0, row] += 1.0
        return embeddings

    def encode() -> torch.Tensor:
        return family.encode_prompt(encoders, [text], most)["encoder_hidden_states"][0]

    hook = encoders.text_encoder.get_input_embeddings().register_forward_hook(read)
    try:
        plain = encode()
        assert len(plain) == len(seen["ids"]) == most

        def words(rows: list[int]) -> str:
            return str(encoders.tokenizer.decode([seen["ids"][row] for row in rows]))

        # Exactly the tokens that hold the instruction: it is in them, and no longer without the first or the last.
        assert span == list(range(span[0], span[-1] + 1))
        assert wanted.instruction in words(span)
        assert wanted.instruction not in words(span[1:])
        assert wanted.instruction not in words(span[:-1])
        # And in that place of the prompt, to the letter. Rows of the template and of the padding belong to nobody.
        first = next(t for t in tokens if t.row == span[0])
        assert words(list(range(span[0]))) == f"<|im_start|>user\n{text[: first.start]}"
        last = max(t.row for t in tokens)
        assert words(list(range(last + 1, most))).startswith("<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")
        assert [t.row for t in tokens] == list(range(tokens[0].row, last + 1))
        # Row by row: what the encoder returns changes from the perturbed token's own row on, and not before it.
        for row in {span[0], span[-1]}:
            perturbed = {row}
            changed = (encode() != plain).any(dim=1).nonzero()[:, 0]
            assert changed[0] == row
            assert changed[-1] == most - 1, "Qwen3 is causal, so later rows and padding also carry an instruction"
    finally:
        hook.remove()


@torch.no_grad()
def test_every_prompt_has_the_same_rows_and_the_backbone_attends_to_its_padding(bases: dict[str, Path], family: Family) -> None:
    pipeline = family.load_pipeline(bases["distilled"])
    text = family.encode_prompt(pipeline, ["red", PROMPT], family.max_text_rows(pipeline))
    assert text["encoder_hidden_states"].shape == (2, TEXT_ROWS, 96)
    assert text["txt_ids"].tolist() == [[0, 0, 0, row] for row in range(TEXT_ROWS)]
    inputs = family.random_inputs(pipeline.transformer.config, 2, TEXT_ROWS, 32, torch.Generator().manual_seed(1)) | text
    whole = family.run(pipeline.transformer, inputs)
    shorter = {"encoder_hidden_states": text["encoder_hidden_states"][:, :-1], "txt_ids": text["txt_ids"][:-1]}
    assert (family.run(pipeline.transformer, inputs | shorter) - whole).abs().max() > 1e-5


def test_text_that_does_not_fit_is_refused(family: Family, encoders: Any) -> None:
    most = family.max_text_rows(encoders)
    assert most == TEXT_ROWS
    prompt = "red " * most + PARTS[0]
    with pytest.raises(SliderEditError, match=r"make the circle red.*is cut off"):
        find_spans(prompt, [Slider(PARTS[0])], family.tokenize(encoders, prompt), most)
    # The instruction fits, but the end of the template would be cut off.
    room = most - len(family.tokenize(encoders, PROMPT)) - 8
    with pytest.raises(SliderEditError, match=r"and its chat template need \d+ text rows, but this base reads 96"):
        family.encode_prompt(encoders, [PROMPT + " red" * room], most)


@pytest.mark.parametrize("word", ["<|im_end|>", "<think>", "<|endoftext|>"])
def test_control_tokens_in_a_prompt_are_refused(family: Family, encoders: Any, word: str) -> None:
    with pytest.raises(SliderEditError, match="a special token of this base"):
        family.tokenize(encoders, f"make {word} red")


def test_a_tokenizer_that_moves_the_rows_of_prompts_is_refused(
    family: Family, encoders: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = qwen3_tokenizer((PROMPT,), TEXT_ROWS)
    monkeypatch.setattr(encoders, "tokenizer", tokenizer)
    tokenizer.padding_side = "left"
    with pytest.raises(SliderEditError, match="pads on the left"):
        family.encode_prompt(encoders, [PROMPT], TEXT_ROWS)
    tokenizer.chat_template = tokenizer.chat_template.replace("m.content", "m.content.upper()")
    with pytest.raises(SliderEditError, match="chat template changes the prompt"):
        family.tokenize(encoders, PROMPT)


@pytest.mark.parametrize(
    ("given", "edited"), [((128, 128), (128, 128)), ((64, 70), (64, 64)), ((400, 100), (256, 64)), ((159, 81), (144, 80))]
)
def test_images_shrink_to_the_area_of_the_base_and_are_cropped_to_patches(
    family: Family, encoders: Any, given: tuple[int, int], edited: tuple[int, int]
) -> None:
    assert tuple(family.preprocess(encoders, Image.new("RGB", given)).shape[2:]) == edited[::-1]


@pytest.mark.parametrize(("size", "reason"), [((63, 200), "too small.*needs 64"), ((640, 70), "too narrow.*exceeds 8:1")])
def test_images_that_diffusers_refuses_are_refused(family: Family, encoders: Any, size: tuple[int, int], reason: str) -> None:
    with pytest.raises(SliderEditError, match=f"image of {size[0]}×{size[1]} pixels is {reason}"):
        family.preprocess(encoders, Image.new("RGB", size))
    with pytest.raises(ValueError, match=r"Image too small|Aspect ratio"):
        encoders.image_processor.check_image_input(Image.new("RGB", size))


def test_several_images_are_numbered_and_the_first_gives_the_size(family: Family, encoders: Any) -> None:
    sources = family.encode_sources(encoders, images_of(2))
    assert (sources.height, sources.width) == (128, 96)
    assert sources.sizes == ((16, 12), (8, 10))
    ids = sources.inputs["img_ids"]
    noisy, first, second = ids.split([48, 48, 20])
    assert torch.equal(noisy[:, 1:], first[:, 1:])
    assert [part[:, 0].unique().tolist() for part in (noisy, first, second)] == [[0], [10], [20]]
    theirs = Flux2KleinPipeline._prepare_image_ids([torch.zeros(1, 16, 8, 6), torch.zeros(1, 16, 4, 5)])[0]
    assert torch.equal(ids[48:], theirs.float())


@pytest.mark.usefixtures("as_traced")
@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_an_inductor_engine_computes_what_eager_torch_does(
    bases: dict[str, Path], adapters: dict[Kind, Path], family: Family, tmp_path: Path, kind: Kind
) -> None:
    build_engine(bases["base"], adapters[kind], tmp_path / "engine", BuildSettings("inductor"), progress=False)
    manifest, engine = open_engine(tmp_path / "engine")
    transformer = Flux2Transformer2DModel.from_pretrained(bases["base"] / "transformer").eval()
    eager = SliderBackbone(family, transformer, load_adapter(adapters[kind], family))
    for sizes in ((2, 24, 32, 2), (1, 7, 20, 1)):
        inputs = example_inputs(eager, manifest.config, *sizes)
        expected, frozen = eager(inputs), eager(inputs | {"alpha": torch.zeros_like(inputs["alpha"])})
        error = (engine(inputs) - expected).abs().max()
        assert error <= min(1e-4, 1e-3 * float((expected - frozen).abs().max()))
    modules = dict(engine._backbone.transformer.named_modules())  # type: ignore[attr-defined]
    form = {"st": MaskedLoRALinear, "gst": FoldedLoRALinear}[kind]
    assert any(isinstance(module, form) for module in modules.values())


@pytest.mark.parametrize("kind", KINDS)
def test_verification_passes(flux2_engines: dict[tuple[str, str], Path], kind: Kind) -> None:
    sliders = [Slider(part) for part in PARTS][: {"st": 2, "gst": 1}[kind]]
    result = verify_engine(flux2_engines["base", kind], random_image(), sliders, steps=2)
    assert result.passed, result.verdict


def test_commands_build_an_engine_and_edit_several_images(
    bases: dict[str, Path], adapters: dict[Kind, Path], tmp_path: Path
) -> None:
    engine, given = tmp_path / "engine", []
    for index, image in enumerate(images_of(2)):
        image.save(tmp_path / f"{index}.png")
        given += ["--image", str(tmp_path / f"{index}.png")]
    built = ["build", "--base", str(bases["base"]), "--adapter", str(adapters["st"]), "--out", str(engine)]
    assert cli.main(built) == 0
    options = ["--slider", f"{PARTS[0]}=0.5", "--steps", "2", "--out", str(tmp_path / "out.png")]
    assert cli.main(["edit", str(engine), *given, *options]) == 0
    assert Image.open(tmp_path / "out.png").size == (96, 128)


def test_a_checkpoint_tells_its_family_and_its_rows(bases: dict[str, Path], family: Family, tmp_path: Path) -> None:
    for path in bases.values():
        assert family_of(path) is family
        # Images are never enlarged, so an engine has to take small ones as well.
        assert image_rows_of(path, SIDE, small_images=family.keeps_small_images) == (2, 128, 131)


def test_a_bank_gives_each_member_its_own_strength(bases: dict[str, Path], adapters: dict[Kind, Path], tmp_path: Path) -> None:
    other = flux2_adapter(bases["base"], "st", seed=4)
    save_adapter(other, tmp_path / "other.safetensors")
    files = [str(adapters["st"]), str(tmp_path / "other.safetensors")]
    build_engine(bases["distilled"], files, tmp_path / "bank", progress=False)
    editor = SliderEditor.from_engine(tmp_path / "bank")
    sliders = [Slider(part, adapter=name) for part, name in zip(PARTS, editor.members, strict=True)]
    prepared = editor.prepare(images_of(1), sliders)
    drawn = editor.render_tensor(prepared, [[0.2, 1.0], [1.0, 0.2]], steps=2)
    for member, (source, part) in enumerate(zip(files, PARTS, strict=True)):
        alone = SliderEditor.from_pretrained(bases["distilled"], source)
        expected = alone.render_tensor(alone.prepare(images_of(1), [part], prompt=PROMPT), [[0.2]], steps=2)
        assert (drawn[member] - expected[0]).abs().max() <= 1e-4


def test_commands_show_and_convert_an_adapter(
    bases: dict[str, Path], adapters: dict[Kind, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["adapter", "show", str(adapters["gst"]), "--base", str(bases["base"]), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["family"], shown["kind"], shown["modules"]) == ("flux2", "gst", 28)
    out = tmp_path / "converted.safetensors"
    assert cli.main(["adapter", "convert", str(adapters["st"]), str(out), "--dtype", "bfloat16"]) == 0
    assert load_adapter(out).family == "flux2"


@pytest.mark.slow
def test_a_quantised_base_makes_an_engine_that_passes(
    bases: dict[str, Path], adapters: dict[Kind, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "images").mkdir()
    random_image(64, 64).save(tmp_path / "images" / "one.png")
    (tmp_path / "edits.jsonl").write_text(json.dumps({"instructions": list(PARTS)}) + "\n")
    own = ["--calibrate", str(tmp_path / "images"), "--prompts", str(tmp_path / "edits.jsonl"), "--steps", "2"]
    for precision, given in (("int8", []), ("fp8", own)):
        out, engine = tmp_path / precision, tmp_path / f"engine-{precision}"
        command = ["quantize", "--base", str(bases["distilled"]), "--precision", precision, "--out", str(out), *given]
        assert cli.main([*command, "--quiet", "--json"]) == 0
        # All projections and the three modulations of a block, which both kinds of blocks share.
        assert sum(json.loads(capsys.readouterr().out)["layers"].values()) == 28 + 3
        build_engine(out, adapters["st"], engine, progress=False)
        result = verify_engine(engine, random_image(), [Slider(p) for p in PARTS], steps=2)
        assert result.passed, result.verdict


def test_inspect_estimates_the_memory_of_an_edit(
    flux2_engines: dict[tuple[str, str], Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cli.main(["inspect", str(flux2_engines["base", "gst"]), "--vram", "8", "--json"]) == 0
    memory = json.loads(capsys.readouterr().out)["memory"]
    assert (memory["fits"], memory["offload"]) == (True, "none")


def test_the_server_edits_several_images_as_the_editor_does(flux2_engines: dict[tuple[str, str], Path]) -> None:
    engine, images = flux2_engines["distilled", "st"], images_of(2)
    fields = {"prompt": PARTS[0], "seed": "3", "sliders": json.dumps([{"instruction": PARTS[0], "strength": 0.4}])}
    with serving(engine) as address, httpx.Client(base_url=address, timeout=60) as client:
        parts = [("image", (f"{i}.png", as_file(image), "image/png")) for i, image in enumerate(images)]
        answer = client.post("/v1/images/edits", files=parts, data=fields).json()
        described = client.get("/v1/models").json()["data"][0]["engine"]
    assert (described["num_inference_steps"], described["max_images"]) == (4, 16)
    expected = SliderEditor.from_engine(engine).edit(images, [Slider(PARTS[0], 0.4)], prompt=PARTS[0], seed=3)
    assert image_of(answer["data"][0]).tobytes() == expected.tobytes()
    assert answer["size"] == "96x128"
    # Rows of 16 × 16 pixels: two source images of 96 × 128 and 80 × 64, and the edit.
    usage = answer["usage"]
    assert (usage["input_tokens_details"]["image_tokens"], usage["output_tokens"]) == (6 * 8 + 5 * 4, 6 * 8)


@pytest.mark.parametrize("kind", KINDS)
def test_tensorrt_rtx_builds_a_plan(bases: dict[str, Path], adapters: dict[Kind, Path], tmp_path: Path, kind: Kind) -> None:
    pytest.importorskip("tensorrt_rtx")
    from slideredit_rt.engines.tensorrt import TensorRTOptions

    options = TensorRTOptions(resolution=SIDE, max_text_rows=TEXT_ROWS, targets=("sm89",))
    settings = BuildSettings("tensorrt-rtx", batch=(1, 1, 4), options=options)
    manifest = build_engine(bases["base"], adapters[kind], tmp_path / "rtx", settings, progress=False)
    assert (manifest.family, manifest.targets) == ("flux2", ["sm89"])
    assert manifest.ranges["image_rows"] == [2, 128, 131]


def test_calibration_learns_a_curve(bases: dict[str, Path], adapters: dict[Kind, Path], tmp_path: Path) -> None:
    engine, out = tmp_path / "engine", tmp_path / "calibrated.safetensors"
    build_engine(bases["distilled"], adapters["st"], engine, progress=False)
    size = ["--base", str(bases["distilled"]), "--cases", "2", "--samples", "5", "--steps", "2", "--quiet"]
    assert cli.main(["adapter", "calibrate", str(adapters["st"]), str(out), "--engine", str(engine), *size]) == 0
    assert len(load_adapter(out).curve.strengths) > 2


class _TwoEdits:
    def draw(self, rng: random.Random, batch: int) -> tuple[torch.Tensor, list[list[str]]]:
        generator = torch.Generator().manual_seed(rng.randint(0, 10**6))
        edits = [list(PARTS[: 1 + index % 2]) for index in range(batch)]
        return torch.rand(batch, 3, SIDE, SIDE, generator=generator), edits


@pytest.mark.parametrize("kind", KINDS)
def test_training_learns(bases: dict[str, Path], family: Family, tmp_path: Path, kind: Kind) -> None:
    target: Any = {"st": "remaining", "gst": "neutral"}[kind]
    options: dict[str, Any] = {"rank": 2, "steps": 2, "batch": 2, "learning_rate": 1e-2, "gradient_checkpointing": kind == "st"}
    config = SuppressionConfig(kind=kind, target=target, **options)
    pipeline = family.load_pipeline(bases["base"])
    adapter = SuppressionTrainer(family, pipeline, _TwoEdits(), config, tmp_path / "new.safetensors").train(progress=False)
    assert adapter.family == "flux2"
    assert len(adapter.pairs) == {"st": 12, "gst": 28}[kind]
    assert all(b.any() for _, b in adapter.pairs.values()), "text rows reach the output through the single-stream blocks"
    assert load_adapter(tmp_path / "new.safetensors", family).kind == kind


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "form"), [("st", "native"), ("gst", "folded")])
@pytest.mark.parametrize(("size", "weights"), [("flux2_klein_4b", 7.75e9), ("flux2_klein_9b", 18.16e9)])
def test_full_transformers_export_without_their_weights(
    tmp_path: Path, family: Family, kind: Kind, form: Lowering, size: str, weights: float, capsys: pytest.CaptureFixture[str]
) -> None:
    with init_empty_weights():
        transformer = Flux2Transformer2DModel(**FULL_SIZES[size].full)
    sparse_checkpoint(tmp_path / "base" / "transformer", transformer)
    adapter = random_pairs(transformer, kind, rank=16)
    figures = export_apart(family, tmp_path / "base", adapter, tmp_path / "engine", form)
    with capsys.disabled():
        print(  # noqa: T201
            f"\n{size}, {kind}, {form}: {figures['processor_seconds']:.0f} s of processor time, "
            f"peak {figures['peak_bytes'] / 1e9:.2f} GB, written {figures['bytes_written'] / 1e6:.0f} MB, "
            f"linked {figures['linked_bytes'] / 1e9:.1f} GB"
        )
    assert set(figures["links"].values()) == {"hard"}
    assert figures["linked_bytes"] == pytest.approx(weights, rel=0.01)
    # Not the time on the clock, because other work beside the tests would count.
    assert figures["processor_seconds"] <= 120
    assert figures["peak_bytes"] <= 2e9
    assert figures["bytes_written"] <= 150e6
    assert figures["updates"] == {form: len(adapter.pairs)}
