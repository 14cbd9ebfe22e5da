"""FP8 transformers of other tools: what each layout means, what stays linked, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import Flux2Transformer2DModel, FluxTransformer2DModel
from diffusers.loaders.single_file_utils import (
    convert_flux2_transformer_checkpoint_to_diffusers,
    convert_flux_transformer_checkpoint_to_diffusers,
)
from qwen_checkpoint import save_tiny_checkpoint
from refusals import refused
from safetensors.torch import load_file, save_file
from torch import Tensor

from slideredit_rt.adapters import load_adapter
from slideredit_rt.assets import resolve_base
from slideredit_rt.checkpoint import fingerprint_base, meta_transformer, read_weights
from slideredit_rt.cli import main
from slideredit_rt.engines import open_engine
from slideredit_rt.engines.inductor import load_weights
from slideredit_rt.errors import SliderEditError
from slideredit_rt.export.build import build_engine
from slideredit_rt.export.linked_weights import export_weights
from slideredit_rt.export.onnx_graph import example_inputs
from slideredit_rt.families import Family, get_family
from slideredit_rt.memory import engine_footprint
from slideredit_rt.modules import SliderBackbone
from slideredit_rt.quantization.config import QuantizedLayer, describe_layers, read_layers
from slideredit_rt.quantization.foreign import _original_rows
from slideredit_rt.quantization.importing import import_base
from slideredit_rt.quantization.linear import quantized_linears
from slideredit_rt.settings import RunSettings

WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
FP8 = torch.float8_e4m3fn
INPUT_SCALE = 0.0625
TO_K = "transformer_blocks.1.attn.to_k"
QKV = "double_blocks.1.img_attn.qkv"


def original(family: Family) -> dict[str, Tensor]:
    """The embedded transformer under the names of Black Forest Labs, with fused projections and a swapped last norm."""
    state = load_file(resolve_base("shapes-kontext") / "transformer" / WEIGHTS)
    found: dict[str, Tensor] = {}
    for name, rows in _original_rows(family, state).items():
        tensor = state[name]
        if name.startswith("norm_out.linear"):
            tensor = torch.cat(tensor.chunk(2)[::-1])
        found.setdefault(rows.tensor, torch.empty(rows.whole, *tensor.shape[1:]))[rows.first : rows.last] = tensor
    return found


def is_projection(name: str) -> bool:
    return "_blocks." in name and name.endswith(".weight")


def is_modulation(name: str) -> bool:
    return "mod.lin" in name or "modulation.lin" in name or ".norm" in name


def quantised(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """FP8 weights with a scale per tensor, which no power of two is, and static activations for all but modulation."""
    found = dict(tensors)
    for name in filter(is_projection, tensors):
        module = name.removesuffix(".weight")
        scale = tensors[name].abs().max() / 448
        found[name] = (tensors[name] / scale).to(FP8)
        found[f"{module}.weight_scale"] = scale
        if not is_modulation(name):
            found[f"{module}.input_scale"] = torch.tensor(INPUT_SCALE)
    return found


@pytest.fixture(scope="module")
def fused(family: Family) -> dict[str, Tensor]:
    """A file of Black Forest Labs."""
    return quantised(original(family))


def unfused(fused: dict[str, Tensor], family: Family) -> dict[str, Tensor]:
    """The same under diffusers' names, with the scales of the fused projections."""
    state = load_file(resolve_base("shapes-kontext") / "transformer" / WEIGHTS)
    found: dict[str, Tensor] = {}
    for name, rows in _original_rows(family, state).items():
        tensor = fused[rows.tensor][rows.first : rows.last].clone()
        found[name] = torch.cat(tensor.chunk(2)[::-1]) if name.startswith("norm_out.linear") else tensor
        for part in ("weight_scale", "input_scale"):
            if name.endswith(".weight") and (scale := fused.get(f"{rows.module}.{part}")) is not None:
                found[f"{name.removesuffix('.weight')}.{part}"] = scale.clone()
    return found


def base_of(folder: Path, tensors: dict[str, Tensor], configuration: dict[str, Any]) -> Path:
    """A copy of the embedded base with other weights."""
    shutil.copytree(resolve_base("shapes-kontext"), folder)
    save_file(tensors, folder / "transformer" / WEIGHTS)
    config = folder / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": configuration}))
    return folder


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory, fused: dict[str, Tensor], family: Family) -> Path:
    """The same weights as a base in our own layout."""
    tensors, layers = unfused(fused, family), {}
    for name in [name for name, tensor in tensors.items() if tensor.dtype == FP8]:
        module = name.removesuffix(".weight")
        layers[module] = QuantizedLayer("fp8", activations=f"{module}.input_scale" in tensors)
        tensors[f"{module}.weight_scale"] = tensors[f"{module}.weight_scale"].repeat(len(tensors[name]))
    return base_of(tmp_path_factory.mktemp("own") / "base", tensors, describe_layers(layers, "fp8"))


Write = Callable[[Path, dict[str, Tensor], Family], Path]


def saved(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


def bfl(folder: Path, fused: dict[str, Tensor], family: Family) -> Path:
    return saved(folder / "flux1-kontext-dev-fp8.safetensors", fused)


def comfy(folder: Path, fused: dict[str, Tensor], family: Family) -> Path:
    """Other names of scales, a prefix, a marker, and the text encoder of a whole checkpoint."""
    renamed = {
        "model.diffusion_model." + name.replace("weight_scale", "scale_weight").replace("input_scale", "scale_input"): tensor
        for name, tensor in fused.items()
    }
    other = {"model.diffusion_model.scaled_fp8": torch.empty(0, dtype=FP8), "text_encoders.t5xxl.weight": torch.ones(3, 3)}
    return saved(folder / "comfy.safetensors", renamed | other)


def per_channel(folder: Path, fused: dict[str, Tensor], family: Family) -> Path:
    """Scales in a column, as other converters store them."""
    columns = {
        name: tensor.expand(len(fused[name.removesuffix("_scale")]), 1) if name.endswith("weight_scale") else tensor
        for name, tensor in fused.items()
    }
    return saved(folder / "channels.safetensors", columns)


def modelopt(folder: Path, fused: dict[str, Tensor], family: Family) -> Path:
    """A whole pipeline with diffusers' names; its configuration does not name the linears."""
    configuration = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["proj_out*"]}
    return base_of(folder / "modelopt", unfused(fused, family), configuration)


LAYOUTS: dict[str, Write] = {"bfl": bfl, "comfy": comfy, "per channel": per_channel, "modelopt": modelopt}


def imported(folder: Path, source: Path) -> Path:
    import_base(source, None if source.is_dir() else "shapes-kontext", folder / "imported")
    return folder / "imported"


@pytest.mark.parametrize(
    ("name", "model_class", "guidance", "convert"),
    [
        ("flux_kontext", FluxTransformer2DModel, True, convert_flux_transformer_checkpoint_to_diffusers),
        ("flux2", Flux2Transformer2DModel, False, convert_flux2_transformer_checkpoint_to_diffusers),
    ],
)
def test_names_and_rows_are_those_of_diffusers_own_converter(
    name: str, model_class: Any, guidance: bool, convert: Callable[..., dict[str, Tensor]]
) -> None:
    family = get_family(name)
    with init_empty_weights():
        state = model_class(num_layers=1, num_single_layers=1, guidance_embeds=guidance).state_dict()
    expected = _original_rows(family, state)
    whole: dict[str, Tensor] = {}
    for number, rows in enumerate(expected.values()):
        # Each row says which tensor and which of its rows it is.
        whole.setdefault(rows.tensor, torch.arange(rows.whole, dtype=torch.float64)[:, None] + number * 1e6)
    converted = convert({name: tensor.clone() for name, tensor in whole.items()})
    assert converted.keys() == state.keys()
    for name, tensor in converted.items():
        mine = whole[expected[name].tensor][expected[name].first : expected[name].last]
        swapped = name.rpartition(".")[0] in family.swapped_halves
        assert torch.equal(tensor, torch.cat(mine.chunk(2)[::-1]) if swapped else mine), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_the_same_base_as_in_our_own(
    tmp_path: Path, own: Path, fused: dict[str, Tensor], family: Family, layout: str
) -> None:
    base = imported(tmp_path, LAYOUTS[layout](tmp_path, fused, family))
    assert read_layers(base / "transformer") == read_layers(own / "transformer")
    assert len(read_layers(base / "transformer")) == 46
    found, expected = (family.load_pipeline(folder).transformer.state_dict() for folder in (base, own))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name
    assert fingerprint_base(base, skip=("transformer",)) == fingerprint_base(own, skip=("transformer",))


def adapted_inputs(base: Path, family: Family) -> dict[str, Tensor]:
    transformer = meta_transformer(base / "transformer")
    backbone = SliderBackbone(family, transformer, load_adapter("shapes-gst", family))
    return example_inputs(backbone, dict(transformer.config), 2, 24, 128, 1)


@torch.no_grad()
def test_an_engine_with_sliders_computes_the_same_from_linked_slices(
    tmp_path: Path, own: Path, fused: dict[str, Tensor], family: Family
) -> None:
    source = bfl(tmp_path, fused, family)
    base = imported(tmp_path, source)
    predictions = []
    for number, folder in enumerate((own, base)):
        manifest = build_engine(folder, "shapes-gst", tmp_path / str(number), progress=False)
        assert (manifest.precision, manifest.quantised) == ("fp8", {"fp8": 46})
        engine = open_engine(tmp_path / str(number), RunSettings())[1]
        predictions.append(engine(adapted_inputs(base, family)).clone())
    assert torch.equal(*predictions)
    eager = SliderBackbone(family, family.load_pipeline(base).transformer, load_adapter("shapes-gst", family))
    expected = eager(adapted_inputs(base, family))
    # Another order of summation rounds some activations the other way.
    assert (predictions[1] - expected).square().mean() < 0.02**2 * expected.square().mean()
    linked = [tmp_path / "1" / name for name in manifest.links]
    assert any(file.samefile(source) for file in linked), "the engine reads the file itself"
    # What it reads of the linked file, and not its other tensors.
    weights = [engine_footprint(tmp_path / str(number), manifest, base).weights for number in (0, 1)]
    assert weights[1] == pytest.approx(weights[0], rel=0.001)


def test_weights_stay_in_the_source_and_only_scales_and_the_last_norm_are_written(
    tmp_path: Path, fused: dict[str, Tensor], family: Family, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = bfl(tmp_path, fused, family), tmp_path / "out"
    command = ["import", str(source), "--base", "shapes-kontext", "--out", str(out)]
    assert main([*command, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["layers"], report["kept"], report["links"]) == ({"FP8": 39, "W8A16_FP8": 7}, 10, True)
    own, linked = sorted((out / "transformer").glob("*.safetensors"))
    assert linked.samefile(source)
    places = read_weights(out / "transformer")
    written = {name for name, place in places.items() if place.file == own}
    assert {name.rpartition(".")[0] for name in written if "scale" not in name} == {"norm_out.linear"}
    assert written == load_file(own).keys()
    k = places[f"{TO_K}.weight"]
    assert (k.file, k.shape, k.dtype, k.length) == (linked, (128, 128), FP8, 128 * 128)
    assert main(["inspect", str(out)]) == 0
    assert "39 FP8, 7 W8A16_FP8; 10 linears kept" in capsys.readouterr().out
    assert "exists already" in refused(capsys, *command)
    assert main([*command, "--overwrite"]) == 0
    assert "linked" in capsys.readouterr().out
    assert "quantised already (fp8)" in refused(
        capsys, "quantize", "--base", out, "--precision", "int8", "--out", tmp_path / "again"
    )
    assert "which is read; choose another folder" in refused(capsys, "import", out, "--out", out, "--overwrite")
    assert "which is read; choose another folder" in refused(capsys, *command[:-1], tmp_path, "--overwrite")


def test_engines_that_read_modules_get_slices_under_their_own_names(
    tmp_path: Path, own: Path, fused: dict[str, Tensor], family: Family
) -> None:
    for layout in ("bfl", "modelopt"):
        root = tmp_path / layout
        (root / "engine").mkdir(parents=True)
        base = imported(root, LAYOUTS[layout](root, fused, family))
        export = export_weights(family, base, None, root / "engine")
        files = [name for name in (*export.files, *export.links) if name.endswith(".safetensors")]
        assert any((root / "engine" / name).samefile(base / "transformer" / name) for name in export.links)
        found = meta_transformer(root / "engine")
        load_weights(found, [root / "engine" / name for name in files], torch.device("cpu"))
        for name, tensor in family.load_pipeline(own).transformer.state_dict().items():
            assert torch.equal(found.state_dict()[name].float(), tensor.float()), name


def test_a_plain_file_has_scale_1_and_activations_that_are_not_quantised(tmp_path: Path, family: Family) -> None:
    source = saved(tmp_path / "plain.safetensors", {name: tensor.to(FP8) for name, tensor in original(family).items()})
    base = imported(tmp_path, source)
    assert set(read_layers(base / "transformer").values()) == {QuantizedLayer("fp8")}
    transformer = family.load_pipeline(base).transformer
    linears = quantized_linears(transformer)
    assert all((linear.weight_scale == 1).all() and linear.input_scale is None for linear in linears.values())
    state = load_file(resolve_base("shapes-kontext") / "transformer" / WEIGHTS)
    for name, tensor in transformer.state_dict().items():
        if "scale" not in name:
            assert torch.equal(tensor.float(), state[name].to(FP8).float()), name
    stored = {place.dtype for name, place in read_weights(base / "transformer").items() if "scale" not in name}
    assert stored == {FP8, torch.bfloat16}, "biases, norms and embedders"


def test_each_linear_of_a_fused_one_has_the_scales_of_its_rows(
    tmp_path: Path, fused: dict[str, Tensor], family: Family
) -> None:
    scales = torch.arange(1.0, 385)
    base = imported(tmp_path, saved(tmp_path / "x.safetensors", fused | {f"{QKV}.weight_scale": scales[:, None]}))
    transformer = family.load_pipeline(base).transformer
    for number, part in enumerate(("to_q", "to_k", "to_v")):
        found = transformer.get_submodule(f"transformer_blocks.1.attn.{part}").weight_scale
        assert torch.equal(found, scales[128 * number : 128 * (number + 1)])


def test_embedders_in_fp8_are_expanded_with_their_scale(tmp_path: Path, fused: dict[str, Tensor], family: Family) -> None:
    scaled = {"img_in.weight": (fused["img_in.weight"] * 4).to(FP8), "img_in.weight_scale": torch.tensor(0.25)}
    wide = {"txt_in.weight_scale": torch.tensor(2.0)}
    base = imported(tmp_path, saved(tmp_path / "x.safetensors", fused | scaled | wide))
    transformer = family.load_pipeline(base).transformer
    assert torch.equal(transformer.x_embedder.weight, scaled["img_in.weight"].float() / 4)
    assert torch.equal(transformer.context_embedder.weight, fused["txt_in.weight"] * 2)


FULL = {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}
WEIGHTS_ONLY: dict[str, tuple[dict[str, Tensor], dict[str, str]]] = {
    "marker": ({"scaled_fp8": torch.zeros(2).to(FP8)}, {}),
    "metadata": ({}, {"_quantization_metadata": json.dumps({"layers": {QKV: FULL}})}),
    "tensor": ({f"{QKV}.comfy_quant": torch.tensor(list(json.dumps(FULL).encode()), dtype=torch.uint8)}, {}),
    "other": ({f"{QKV}.comfy_quant": torch.ones(3, dtype=torch.uint8)}, {"_quantization_metadata": "[1"}),
}


@pytest.mark.parametrize("how", WEIGHTS_ONLY)
def test_activations_stay_wide_where_comfyui_says_so(
    tmp_path: Path, fused: dict[str, Tensor], family: Family, how: str
) -> None:
    more, metadata = WEIGHTS_ONLY[how]
    layers = read_layers(imported(tmp_path, saved(tmp_path / "x.safetensors", fused | more, metadata)) / "transformer")
    assert layers[TO_K].activations == (how == "other")
    assert layers["single_transformer_blocks.0.proj_out"].activations == (how != "marker")


def test_input_scales_are_those_that_bfloat16_engines_have(tmp_path: Path, fused: dict[str, Tensor], family: Family) -> None:
    given = {name: torch.tensor(0.0123) for name in fused if name.endswith("input_scale")}
    base = imported(tmp_path, saved(tmp_path / "x.safetensors", fused | given))
    linear = family.load_pipeline(base).transformer.get_submodule(TO_K)
    assert linear.input_scale.item() == torch.tensor(0.0123).bfloat16().item() != pytest.approx(0.0123, rel=1e-5)


def test_the_base_may_lack_the_weights_of_its_transformer(
    tmp_path: Path, own: Path, fused: dict[str, Tensor], family: Family
) -> None:
    shutil.copytree(resolve_base("shapes-kontext"), tmp_path / "base")
    (tmp_path / "base" / "transformer" / WEIGHTS).unlink()
    import_base(bfl(tmp_path, fused, family), tmp_path / "base", tmp_path / "out")
    assert family.load_pipeline(tmp_path / "out").transformer.state_dict().keys() == read_weights(own / "transformer").keys()


def test_qwen_files_have_diffusers_names_after_a_prefix(tmp_path: Path) -> None:
    base, family = save_tiny_checkpoint(tmp_path / "base"), get_family("qwen_image_edit")
    state = load_file(base / "transformer" / WEIGHTS)
    plain = {f"model.diffusion_model.{name}": tensor.to(FP8) for name, tensor in state.items()}
    import_base(saved(tmp_path / "qwen_fp8_e4m3fn.safetensors", plain), base, tmp_path / "out")
    layers = read_layers(tmp_path / "out" / "transformer")
    assert len(layers) == 2 * (12 + 2)
    transformer = family.load_pipeline(tmp_path / "out").transformer
    for name, tensor in transformer.state_dict().items():
        if "scale" not in name:
            assert torch.equal(tensor.float(), state[name].to(FP8).float()), name


# Refusals


def without(*names: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name not in names}


def plus(**more: Tensor) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """Add or replace tensors of the fused projection."""
    return lambda tensors: tensors | {f"{QKV}.{name}": tensor for name, tensor in more.items()}


def also(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: tensors | {name: torch.ones(shape, dtype=dtype)}


def widened(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.float() for name, tensor in tensors.items() if not name.endswith(("weight_scale", "input_scale"))}


DAMAGE: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "a scale of 0": (plus(weight_scale=torch.tensor(0.0)), f"a scale of 0 in {QKV}.weight_scale"),
    "a negative scale": (plus(weight_scale=torch.tensor(-1.0)), "a scale of -1 in"),
    "a scale of NaN": (plus(weight_scale=torch.tensor(math.nan)), "a scale of nan in"),
    "an infinite input scale": (plus(input_scale=torch.tensor(math.inf)), "a scale of inf in"),
    "a scale of another name": (plus(weight_scale_inv=torch.ones(1)), f"holds {QKV}.weight_scale_inv beside an FP8 weight"),
    "too few scales": (plus(weight_scale=torch.ones(128)), "of shape [128], but a scale per tensor or output channel"),
    "scales per block": (plus(weight_scale=torch.ones(3, 128)), "of shape [3, 128], but a scale per tensor or"),
    "a scale per input": (plus(input_scale=torch.ones(3)), "of shape [3], but a scale per tensor is"),
    "a scale in integers": (plus(weight_scale=torch.tensor(1)), "as torch.int64 of shape []"),
    "E5M2": (plus(weight=torch.ones(384, 128).to(torch.float8_e5m2)), "as torch.float8_e5m2, but only"),
    "INT8": (plus(weight=torch.ones(384, 128, dtype=torch.int8)), "as torch.int8, but only"),
    "NF4": (also("a.weight.absmax", 3), "NF4 and LLM.int8() need bitsandbytes"),
    "NF4's state": (also("a.weight.quant_state.bitsandbytes__nf4", 3), "NF4 and LLM.int8() need"),
    "Nunchaku": (also("a.qweight", 3), "Nunchaku's layout is for its own kernels"),
    "NVFP4": (also("a.weight_scale_2"), "NVFP4 files of other tools are not read"),
    "a missing bias": (without(f"{QKV}.bias"), f"lacks {QKV}.bias"),
    "another model": (lambda tensors: {"blocks.0.weight": torch.ones(2, 2)}, "should hold a flux_kontext transformer"),
    "another width": (plus(bias=torch.ones(300)), "with shape [300], but the base needs [384]"),
    "another depth": (also("double_blocks.2.img_mlp.0.weight", 2, 2), "which the base's transformer lacks"),
    "no FP8": (widened, "holds no FP8 weights"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_cannot_be_imported_is_refused_in_one_sentence(
    tmp_path: Path, fused: dict[str, Tensor], damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change, message = DAMAGE[damage]
    source = saved(tmp_path / "x.safetensors", change(fused))
    assert message in refused(capsys, "import", source, "--base", "shapes-kontext", "--out", tmp_path / "out")
    assert list(tmp_path.iterdir()) == [source]


def test_files_of_other_formats_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "flux.gguf").write_bytes(b"GGUF")
    (tmp_path / "flux.safetensors").write_bytes(b"GGUF")
    out = ("--out", tmp_path / "out")
    given = ("--base", "shapes-kontext", *out)
    assert "GGUF blocks are not read" in refused(capsys, "import", tmp_path / "flux.gguf", *given)
    assert "cannot read the weights" in refused(capsys, "import", tmp_path / "flux.safetensors", *given)
    assert "does not exist" in refused(capsys, "import", tmp_path / "none.safetensors", *given)
    assert "pass the base that it was made from with --base" in refused(capsys, "import", tmp_path / "flux.safetensors", *out)
    assert "slideredit-rt import makes a base" in refused(capsys, "build", "--base", tmp_path / "flux.safetensors", *out)
    assert not (tmp_path / "out").exists()


def test_a_modelopt_folder_is_not_a_base_until_it_is_imported(
    tmp_path: Path, fused: dict[str, Tensor], family: Family, capsys: pytest.CaptureFixture[str]
) -> None:
    source = modelopt(tmp_path, fused, family)
    assert "slideredit-rt import makes a base of FP8 weights that ModelOpt wrote" in refused(capsys, "inspect", source)
    assert main(["import", str(source), "--out", str(tmp_path / "out")]) == 0
    assert main(["import", str(source / "transformer"), "--base", "shapes-kontext", "--out", str(tmp_path / "again")]) == 0
    assert read_layers(tmp_path / "out" / "transformer") == read_layers(tmp_path / "again" / "transformer")


BAD_SLICES: dict[str, Any] = {
    "an unknown tensor": {"tensor": "none", "rows": [0, 128]},
    "too many rows": {"tensor": f"{QKV}.weight", "rows": [300, 400]},
    "negative rows": {"tensor": f"{QKV}.weight", "rows": [-1, 127]},
    "a fraction": {"tensor": f"{QKV}.weight", "rows": [0, 127.5]},
    "one number": {"tensor": f"{QKV}.weight", "rows": [0]},
    "no object": 3,
    "other rows": {"tensor": f"{QKV}.weight", "rows": [0, 127]},
}


@pytest.mark.parametrize("damage", BAD_SLICES)
def test_a_damaged_index_of_slices_is_refused(tmp_path: Path, fused: dict[str, Tensor], family: Family, damage: str) -> None:
    base = imported(tmp_path, bfl(tmp_path, fused, family))
    file = base / "transformer" / INDEX
    index = json.loads(file.read_text())
    index["slices"][f"{TO_K}.weight"] = BAD_SLICES[damage]
    file.write_text(json.dumps(index))
    message = "with shape" if damage == "other rows" else "is not an index of shards"
    with pytest.raises(SliderEditError, match=message):
        family.load_pipeline(base)


def test_an_index_that_names_a_tensor_its_shard_lacks_is_refused(
    tmp_path: Path, fused: dict[str, Tensor], family: Family
) -> None:
    base = imported(tmp_path, bfl(tmp_path, fused, family))
    file = base / "transformer" / INDEX
    index = json.loads(file.read_text())
    del index["slices"][f"{TO_K}.weight"]
    file.write_text(json.dumps(index))
    with pytest.raises(SliderEditError, match=f"its shards lack {TO_K}.weight"):
        family.load_pipeline(base)
