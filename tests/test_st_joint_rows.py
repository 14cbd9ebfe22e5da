"""ST adapters on joint rows: a slider scales its own text rows in single-stream blocks, and no image row."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kontext_edit import PROMPT, diffusers_edit
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from slideredit_rt.adapters import FORMATS, Adapter, bank_adapters, fill_ranks, load_adapter, save_adapter
from slideredit_rt.assets import resolve_base
from slideredit_rt.cli import main
from slideredit_rt.compat import SliderEditFluxKontextPipeline
from slideredit_rt.editor import SliderEditor
from slideredit_rt.engines import BuildSettings, open_engine
from slideredit_rt.errors import SliderEditError
from slideredit_rt.export.build import build_engine
from slideredit_rt.export.lowering import lower
from slideredit_rt.export.nodes import LINEAR, projection_name
from slideredit_rt.export.onnx_graph import example_inputs, trace
from slideredit_rt.families import Family
from slideredit_rt.modules import SliderBackbone
from slideredit_rt.quantization.linear import QuantizedLinear
from slideredit_rt.quantization.loading import load_transformer
from slideredit_rt.quantization.write import QuantizeSettings, quantize_base
from slideredit_rt.shapes.adapter_recipes import ShapesData
from slideredit_rt.sliders import Slider
from slideredit_rt.spans import find_spans
from slideredit_rt.training.suppression import SuppressionConfig, SuppressionTrainer

TEXT_ROWS, IMAGE_ROWS = 24, 32
FIRST = "single_transformer_blocks.0"
SLIDERS = PROMPT.split(" and ")
STRENGTHS = (0.3, 1.4)
ENGINES = ["eager", "onnxruntime native", "onnxruntime folded", "inductor operator", "inductor folded"]


@pytest.fixture(scope="module")
def adapter(family: Family) -> Adapter:
    """A random ST adapter on every linear that projects text rows or joint rows."""
    transformer = family.load_pipeline(resolve_base("shapes-kontext")).transformer
    pattern, g, pairs = family.targets("st", all_projections=True), torch.Generator().manual_seed(0), {}
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear) and pattern.fullmatch(name):
            a = torch.randn(4, module.in_features, generator=g) / module.in_features**0.5
            pairs[name] = a, torch.randn(module.out_features, 4, generator=g) / 8
    return Adapter(family.name, "st", 4, pairs, "random")


@pytest.fixture
def backbone(family: Family, pipeline: Any, adapter: Adapter) -> SliderBackbone:
    return SliderBackbone(family, pipeline.transformer, adapter)


@pytest.fixture(scope="module")
def opened(adapter: Adapter, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Editors by the names in `ENGINES`, each built once."""
    root, editors = tmp_path_factory.mktemp("joint"), {}

    def editor(name: str) -> SliderEditor:
        if name not in editors:
            backend, _, lowering = name.partition(" ")
            if lowering:
                path = root / name.replace(" ", "-")
                build_engine("shapes-kontext", adapter, path, BuildSettings(backend, lowering=lowering), progress=False)
                editors[name] = SliderEditor.from_engine(path)
            else:
                editors[name] = SliderEditor.from_pretrained("shapes-kontext", adapter)
        return editors[name]

    return editor


@contextmanager
def hooked(transformer: nn.Module, adapter: Adapter, scale: Tensor) -> Iterator[None]:
    """The adapter as forward hooks on diffusers' own linears: the first rows are text, `scale` has one number for each."""
    rows, handles = len(scale), []
    for name, (a, b) in adapter.pairs.items():

        def update(_: nn.Module, args: tuple[Tensor], y: Tensor, a: Tensor = a, b: Tensor = b) -> Tensor:
            return torch.cat([y[:, :rows] + scale[:, None] * (args[0][:, :rows] @ a.T @ b.T), y[:, rows:]], dim=1)

        handles.append(transformer.get_submodule(name).register_forward_hook(update))
    yield
    for handle in handles:
        handle.remove()


def scale_of(family: Family, pipeline: Any) -> Tensor:
    """Scales of the text rows at `STRENGTHS`."""
    scale, tokens = torch.zeros(TEXT_ROWS), family.tokenize(pipeline, PROMPT)
    for rows, strength in zip(find_spans(PROMPT, [Slider(s) for s in SLIDERS], tokens, TEXT_ROWS), STRENGTHS, strict=True):
        scale[list(rows)] = 1 - strength
    return scale


def outputs_of(backbone: SliderBackbone, inputs: dict[str, Tensor], names: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Input and output of linears in one call, by name."""
    found, handles = {}, []
    for name in names:

        def keep(_: nn.Module, args: tuple[Tensor], y: Tensor, name: str = name) -> None:
            found[name] = args[0], y

        handles.append(backbone.transformer.get_submodule(name).register_forward_hook(keep))
    backbone(inputs)
    for handle in handles:
        handle.remove()
    return found


def changed_rows(first: Tensor, second: Tensor) -> list[int]:
    return (first != second).any(dim=-1)[0].nonzero().flatten().tolist()


def test_all_projections_of_an_st_adapter_are_those_of_text_and_joint_rows(family: Family, adapter: Adapter) -> None:
    released = [name for name in adapter.pairs if family.targets("st").fullmatch(name)]
    joint = [name for name in adapter.pairs if name not in released]
    assert {family.rows_of(name) for name in released} == {"text"}
    assert {family.rows_of(name) for name in joint} == {"joint"}
    assert {name.removeprefix(FIRST) for name in joint if name.startswith(FIRST)} == {
        *(f".attn.to_{part}" for part in "qkv"),
        ".proj_mlp",
        ".proj_out",
    }


@pytest.mark.usefixtures("as_traced")
@pytest.mark.parametrize("engine", ENGINES)
def test_a_whole_edit_is_diffusers_own_with_the_update_on_the_sliders_rows(
    opened: Any, family: Family, pipeline: Any, adapter: Adapter, scene: Image.Image, engine: str
) -> None:
    editor = opened(engine)
    prepared = editor.prepare(scene, SLIDERS, prompt=PROMPT, seed=7)
    ours = editor.render_tensor(prepared, [STRENGTHS, (1.0, 1.0)], steps=4)
    unchanged = diffusers_edit(pipeline, scene, steps=4)[0]
    with hooked(pipeline.transformer, adapter, scale_of(family, pipeline)):
        expected = diffusers_edit(pipeline, scene, steps=4)[0]
    assert (ours[0] - expected).abs().max() <= 1e-4
    assert (ours[1] - unchanged).abs().max() <= 1e-4
    assert (expected - unchanged).abs().max() > 0.1


def test_the_authors_pipeline_takes_such_an_adapter(
    family: Family, pipeline: Any, adapter: Adapter, scene: Image.Image, tmp_path: Path
) -> None:
    save_adapter(adapter, tmp_path / "joint.safetensors")
    pipe = SliderEditFluxKontextPipeline(**family.load_pipeline(resolve_base("shapes-kontext")).components)
    pipe.load_stlora(tmp_path / "joint.safetensors")
    ours = diffusers_edit(pipe, scene, 2, subprompts_list=SLIDERS, slider_alpha_list=[1 - s for s in STRENGTHS])
    with hooked(pipeline.transformer, adapter, scale_of(family, pipeline)):
        assert (ours - diffusers_edit(pipeline, scene, 2)).abs().max() <= 1e-4


@torch.no_grad()
def test_only_the_sliders_rows_differ_from_the_frozen_projection_of_the_same_input(
    backbone: SliderBackbone, family: Family, adapter: Adapter
) -> None:
    inputs = example_inputs(backbone, backbone.transformer.config, 1, TEXT_ROWS, IMAGE_ROWS, 2)
    own = inputs["token_mask"].any(dim=1)[0].nonzero().flatten().tolist()
    names = [name for name in adapter.pairs if family.rows_of(name) == "joint"]
    for name, (x, y) in outputs_of(backbone, inputs, names).items():
        linear = backbone.adapted[name]
        assert x.shape[1] == TEXT_ROWS + IMAGE_ROWS
        assert changed_rows(y, F.linear(x, linear.weight, linear.bias)) == own, name


@torch.no_grad()
@pytest.mark.parametrize("row", [0, 7, TEXT_ROWS - 1])
def test_a_text_row_is_the_same_row_among_the_joint_rows(family: Family, pipeline: Any, adapter: Adapter, row: int) -> None:
    """At the first single-stream block: the row that changes with a token is the row that the token's slider scales."""
    names = [f"{FIRST}.attn.to_q", f"{FIRST}.proj_mlp"]
    only = dataclasses.replace(adapter, pairs={name: adapter.pairs[name] for name in names})
    backbone = SliderBackbone(family, pipeline.transformer, only)
    inputs = example_inputs(backbone, pipeline.transformer.config, 1, TEXT_ROWS, IMAGE_ROWS, 1)
    inputs["token_mask"].zero_()
    inputs["token_mask"][:, :, row] = True
    inputs["alpha"].zero_()
    plain = outputs_of(backbone, inputs, names)
    slid = outputs_of(backbone, inputs | {"alpha": torch.ones(1, 1)}, names)

    def disturb(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        text = kwargs["encoder_hidden_states"].clone()
        text[:, row] += torch.linspace(-1, 1, text.shape[-1])
        return args, kwargs | {"encoder_hidden_states": text}

    pipeline.transformer.get_submodule(FIRST).register_forward_pre_hook(disturb, with_kwargs=True)
    disturbed = outputs_of(backbone, inputs, names)
    for name in names:
        assert changed_rows(slid[name][1], plain[name][1]) == [row]
        assert changed_rows(disturbed[name][0], plain[name][0]) == [row]


@torch.no_grad()
@pytest.mark.usefixtures("as_traced")
@pytest.mark.parametrize("engine", ["eager", "inductor operator"])
def test_alpha_zero_is_the_base_model_bit_for_bit(opened: Any, backbone: SliderBackbone, pipeline: Any, engine: str) -> None:
    run = opened(engine).engine
    inputs = example_inputs(backbone, pipeline.transformer.config, 3, TEXT_ROWS, IMAGE_ROWS, 2)
    inputs["alpha"].zero_()
    backbone.remove()
    plain = {name: value for name, value in inputs.items() if name not in ("alpha", "token_mask")}
    assert torch.equal(run(inputs), pipeline.transformer(**plain, return_dict=False)[0])


@torch.no_grad()
@pytest.mark.usefixtures("as_traced")
@pytest.mark.parametrize("engine", ENGINES)
def test_rows_of_a_mixed_batch_do_not_see_each_other(opened: Any, backbone: SliderBackbone, engine: str) -> None:
    run = opened(engine).engine
    inputs = example_inputs(backbone, backbone.transformer.config, 3, TEXT_ROWS, IMAGE_ROWS, 2)
    mixed = run(inputs).clone()
    for row in range(3):
        alone = {name: value if name.endswith("_ids") else value[row : row + 1] for name, value in inputs.items()}
        assert (mixed[row] - run(alone)[0]).abs().max() <= 2e-5


@torch.no_grad()
@pytest.mark.parametrize("lowering", ["native", "folded"])
def test_a_bank_holds_members_with_and_without_joint_rows(
    family: Family, adapter: Adapter, tmp_path: Path, lowering: Any
) -> None:
    pair = [load_adapter("shapes-st", family), adapter]
    bank = bank_adapters(pair, ["text", "joint"])
    build_engine("shapes-kontext", bank, tmp_path / "bank", BuildSettings(lowering=lowering), progress=False)
    manifest, run = open_engine(tmp_path / "bank")
    inputs: dict[str, Tensor] = {}
    for member, single in enumerate(pair):
        own = SliderBackbone(family, family.load_pipeline(resolve_base("shapes-kontext")).transformer, single)
        inputs = inputs or example_inputs(own, manifest.config, 2, TEXT_ROWS, IMAGE_ROWS, 2)
        alpha = torch.zeros(2, 2, 2)
        alpha[:, :, member] = inputs["alpha"]
        assert (run(inputs | {"alpha": alpha}) - own(inputs)).abs().max() <= 2e-5


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.usefixtures("as_traced")
def test_quantised_bases_take_such_an_adapter(family: Family, adapter: Adapter, tmp_path: Path) -> None:
    quantize_base("shapes-kontext", tmp_path / "int8", QuantizeSettings("int8"), progress=False)
    backbone = SliderBackbone(family, load_transformer(tmp_path / "int8" / "transformer", torch.float32), adapter)
    inputs = example_inputs(backbone, backbone.transformer.config, 2, TEXT_ROWS, IMAGE_ROWS, 2)
    expected, own = backbone(inputs), inputs["token_mask"].any(dim=1)[0].nonzero().flatten().tolist()
    name = f"{FIRST}.proj_mlp"
    ((x, y),) = outputs_of(backbone, inputs, [name]).values()
    frozen = backbone.adapted[name].frozen()
    assert isinstance(frozen, QuantizedLinear)
    assert changed_rows(y, frozen(x)) == own
    assert (backbone(inputs | {"alpha": torch.zeros(2, 2)}) - expected).norm() > 0.05 * expected.norm()
    # MatMulNBits rounds activations to 8 bits, which the reference does not.
    for backend, largest in (("onnxruntime", 0.012), ("inductor", 1e-5)):
        build_engine(tmp_path / "int8", adapter, tmp_path / backend, BuildSettings(backend), progress=False)
        assert (open_engine(tmp_path / backend)[1](inputs) - expected).norm() <= largest * expected.norm()


def test_the_scales_of_joint_rows_are_computed_once_and_plugins_take_them(
    family: Family, pipeline: Any, adapter: Adapter
) -> None:
    whole = fill_ranks(adapter, dict.fromkeys(adapter.pairs, 16))  # plugins take ranks that fill a tensor core
    backbone = SliderBackbone(family, pipeline.transformer, whole)
    model = trace(backbone.to(torch.bfloat16), backbone.transformer.config).model
    scales = collections.defaultdict(set)
    for node in model.graph:
        if node.op_type == LINEAR:
            scales[family.rows_of(projection_name(node))].add(node.inputs[5])
    assert {rows: len(values) for rows, values in scales.items()} == {"text": 1, "joint": 1}
    assert scales["text"] != scales["joint"]
    assert lower(model, "plugin", "sm80") == ({"plugin": len(backbone.adapted)}, [])


@pytest.mark.parametrize("lowering", ["native", "folded"])
def test_tensorrt_rtx_builds_such_an_adapter(adapter: Adapter, tmp_path: Path, lowering: Any) -> None:
    pytest.importorskip("tensorrt_rtx")
    from slideredit_rt.engines.tensorrt import TensorRTOptions

    options = TensorRTOptions(resolution=64, max_text_rows=24, targets=("sm89",))
    settings = BuildSettings("tensorrt-rtx", lowering=lowering, batch=(1, 1, 4), options=options)
    manifest = build_engine("shapes-kontext", adapter, tmp_path / "rtx", settings, progress=False)
    shapes = {spec.name: spec.shape for spec in manifest.inputs}
    assert shapes["token_mask"] == ("batch", "sliders", "text_rows")


@pytest.mark.parametrize("form", [form for form in FORMATS if form != "slideredit-st"])
def test_files_carry_such_an_adapter_by_the_names_of_its_linears(
    family: Family, adapter: Adapter, tmp_path: Path, form: Any
) -> None:
    save_adapter(adapter, tmp_path / "file", form)
    loaded = load_adapter(tmp_path / "file", family)
    assert (loaded.kind, loaded.fingerprint) == ("st", adapter.fingerprint)
    assert f"{FIRST.replace('0', '*')}.proj_out" in loaded.targets


def test_without_a_stated_kind_joint_rows_mean_gst(family: Family, adapter: Adapter, tmp_path: Path) -> None:
    """A general LoRA of FLUX may leave the image stream alone; the authors' ST file never has joint rows."""
    save_adapter(adapter, tmp_path / "joint.safetensors")
    save_file(load_file(tmp_path / "joint.safetensors"), tmp_path / "plain.safetensors")
    assert load_adapter(tmp_path / "plain.safetensors", family).kind == "gst"
    with pytest.raises(
        SliderEditError, match=rf"also updates {FIRST}.*, on joint rows; .* would be read as GST; use canonical"
    ):
        save_adapter(adapter, tmp_path / "joint.pt", "slideredit-st")
    assert not (tmp_path / "joint.pt").exists()


def test_training_all_projections_also_fits_the_text_rows_of_joint_rows(family: Family, pipeline: Any, tmp_path: Path) -> None:
    config = SuppressionConfig(kind="st", all_projections=True, rank=4, steps=4, batch=2, learning_rate=1e-3)
    trained = SuppressionTrainer(family, pipeline, ShapesData(), config, tmp_path / "a.safetensors").train(progress=False)
    joint = [name for name in trained.pairs if family.rows_of(name) == "joint"]
    # Nothing reads the text rows that leave the last block.
    assert [name for name in joint if not trained.pairs[name][1].any()] == [
        f"single_transformer_blocks.2.{name}" for name in ("proj_mlp", "proj_out", "attn.to_q")
    ]
    loaded = load_adapter(tmp_path / "a.safetensors", family)
    assert (loaded.kind, loaded.fingerprint) == ("st", trained.fingerprint)


def test_an_engine_of_text_rows_does_not_take_the_adapter_in_exchange(
    engines: dict[str, Path], adapter: Adapter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_adapter(adapter, tmp_path / "joint.safetensors")
    assert main(["adapter", "replace", str(engines["st"]), str(tmp_path / "joint.safetensors")]) == 2
    assert re.search(r"updates 27 modules, but the export in .* has 12, which are not the same", capsys.readouterr().err)
