"""Quantised bases: which linears are quantised, what a base contains, sliders beside it, accuracy, damaged bases."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import Flux2Transformer2DModel, FluxTransformer2DModel, QwenImageTransformer2DModel
from quantized_base import TO_Q, WEIGHTS, weights_of
from refusals import refused
from safetensors.torch import save_file
from torch import Tensor

from slideredit_rt.adapters import load_adapter
from slideredit_rt.assets import resolve_base
from slideredit_rt.bench.full_size import FULL_SIZES
from slideredit_rt.bench.quantized_accuracy import measure_accuracy
from slideredit_rt.checkpoint import fingerprint_base, meta_transformer
from slideredit_rt.cli import main
from slideredit_rt.editor import SliderEditor
from slideredit_rt.errors import SliderEditError
from slideredit_rt.export.onnx_graph import example_inputs
from slideredit_rt.families import Family, get_family
from slideredit_rt.kernels import quantized_linear_reference
from slideredit_rt.modules import MaskedLoRAQuantizedLinear, SliderBackbone
from slideredit_rt.quantization.calibrate import ActivationRun, measure_activations
from slideredit_rt.quantization.config import QuantizedLayer, describe_layers, read_layers
from slideredit_rt.quantization.linear import QuantizedLinear
from slideredit_rt.quantization.precisions import PRECISIONS
from slideredit_rt.quantization.selection import select_layers
from slideredit_rt.quantization.write import QuantizeSettings, quantize_base

precisions = pytest.mark.parametrize("precision", PRECISIONS)


# Which linears


def _count(layers: dict[str, QuantizedLayer]) -> dict[tuple[str, bool], int]:
    return dict(Counter((layer.precision, layer.activations) for layer in layers.values()))


def test_flux_quantises_projections_and_modulation_and_keeps_the_rest(family: Family) -> None:
    with init_empty_weights():
        transformer = FluxTransformer2DModel(guidance_embeds=True)
    layers = select_layers(family, transformer, "nvfp4")
    # 19 blocks of 12 and 38 of 5 projections; 2 and 1 modulation linears a block.
    assert _count(layers) == {("nvfp4", True): 418, ("int8", False): 76}
    assert _count(select_layers(family, transformer, "int4")) == {("int4", False): 418, ("int8", False): 76}
    linears = [name for name, m in transformer.named_modules() if isinstance(m, torch.nn.Linear)]
    kept = {name.partition(".")[0] for name in linears if name not in layers}
    assert kept == {"x_embedder", "context_embedder", "time_text_embed", "norm_out", "proj_out"}


def test_qwen_keeps_its_first_two_and_last_two_blocks() -> None:
    with init_empty_weights():
        transformer = QwenImageTransformer2DModel()
    layers = select_layers(get_family("qwen_image_edit"), transformer, "fp8")
    assert {int(name.split(".")[1]) for name in layers} == set(range(2, 58))
    assert _count(layers) == {("fp8", True): 56 * 12, ("int8", False): 56 * 2}


def test_flux2_quantises_projections_and_the_modulation_that_its_blocks_share() -> None:
    for name, projections in (("flux2_klein_4b", 100), ("flux2_klein_9b", 144)):
        with init_empty_weights():
            transformer = Flux2Transformer2DModel(**FULL_SIZES[name].full)
        layers = select_layers(get_family("flux2"), transformer, "nvfp4")
        assert _count(layers) == {("nvfp4", True): projections, ("int8", False): 3}
        linears = [name for name, m in transformer.named_modules() if isinstance(m, torch.nn.Linear)]
        kept = {name.partition(".")[0] for name in linears if name not in layers}
        assert kept == {"x_embedder", "context_embedder", "time_guidance_embed", "norm_out", "proj_out"}


def test_keep_leaves_linears_out_and_must_match_one(family: Family) -> None:
    transformer = meta_transformer(resolve_base("shapes-kontext") / "transformer")
    layers = select_layers(family, transformer, "int8", ["transformer_blocks.0.*", "*.to_k"])
    assert layers.keys() == {
        name
        for name in select_layers(family, transformer, "int8")
        if ".to_k" not in name and not name.startswith("transformer_blocks.0.")
    }
    with pytest.raises(SliderEditError, match="matches no linear of this flux_kontext transformer"):
        select_layers(family, transformer, "int8", ["*.to_z"])
    with pytest.raises(SliderEditError, match="no linear is left"):
        select_layers(family, transformer, "int8", ["*"])


# Bases


@pytest.fixture(scope="module")
def maxima(family: Family) -> dict[str, float]:
    """The largest inputs of every projection in a calibration of the usual kind."""
    base = resolve_base("shapes-kontext")
    layers = select_layers(family, meta_transformer(base / "transformer"), "fp8")
    run = ActivationRun(("shapes-st", "shapes-gst"), cases=2, steps=6)
    return measure_activations(family, base, [n for n, layer in layers.items() if layer.activations], run, progress=False)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory, maxima: dict[str, float]) -> dict[str, Path]:
    """The embedded base in every precision."""
    root = tmp_path_factory.mktemp("quantised")
    for name in PRECISIONS:
        quantize_base("shapes-kontext", root / name, QuantizeSettings(name), maxima=maxima, progress=False)
    return {name: root / name for name in PRECISIONS}


@precisions
def test_a_quantised_base_holds_what_the_precision_makes_of_the_original(
    bases: dict[str, Path], maxima: dict[str, float], precision: str
) -> None:
    original, found = weights_of(resolve_base("shapes-kontext")), weights_of(bases[precision])
    layers, expected = read_layers(bases[precision] / "transformer"), {}
    for name, tensor in original.items():
        module = name.removesuffix(".weight")
        if module not in layers:
            expected[name] = tensor
            continue
        form = PRECISIONS[layers[module].precision]
        expected |= {f"{module}.{part}": value for part, value in form.quantise(tensor).items()}
        if layers[module].activations:
            expected[f"{module}.input_scale"] = torch.tensor(form.input_scale(maxima[module]))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


@precisions
def test_its_configuration_names_each_linear_as_modelopt_does(bases: dict[str, Path], precision: str) -> None:
    config = json.loads((bases[precision] / "transformer" / "config.json").read_text())
    quantisation = config.pop("quantization_config")
    assert config == json.loads((resolve_base("shapes-kontext") / "transformer" / "config.json").read_text())
    assert (quantisation["quant_method"], quantisation["precision"]) == ("modelopt", precision)
    assert len(quantisation["quantized_layers"]) == 46
    assert quantisation["quantized_layers"][TO_Q] == {"quant_algo": PRECISIONS[precision].algorithm}
    assert quantisation["quant_algo"] == ("W8A16" if precision == "int8" else "MIXED_PRECISION")


def test_everything_else_is_that_of_the_original_and_its_weights_are_linked(bases: dict[str, Path]) -> None:
    base, copy_ = resolve_base("shapes-kontext"), bases["fp8"]
    assert fingerprint_base(copy_, skip=("transformer",)) == fingerprint_base(base, skip=("transformer",))
    for file in base.rglob("*.safetensors"):
        place = copy_ / file.relative_to(base)
        assert place.samefile(file) == ("transformer" not in file.parts)
    assert not (copy_ / "scheduler" / "scheduler_config.json").samefile(base / "scheduler" / "scheduler_config.json")


@precisions
@torch.no_grad()
def test_sliders_act_beside_a_quantised_base_and_off_they_change_no_bit(
    bases: dict[str, Path], family: Family, precision: str
) -> None:
    transformer = family.load_pipeline(bases[precision]).transformer
    frozen = SliderBackbone(family, transformer, None)
    keys = list(transformer.state_dict())
    inputs = example_inputs(
        SliderBackbone(family, meta_transformer(bases[precision] / "transformer"), load_adapter("shapes-gst")),
        dict(transformer.config),
        2,
        24,
        128,
        1,
    )
    before = frozen({k: v for k, v in inputs.items() if k not in ("alpha", "token_mask")})
    adapter = load_adapter("shapes-gst", family)
    backbone = SliderBackbone(family, transformer, adapter)
    assert sum(isinstance(m, MaskedLoRAQuantizedLinear) for m in transformer.modules()) == len(adapter.pairs)
    assert set(keys) <= set(transformer.state_dict())
    assert torch.equal(backbone(inputs | {"alpha": torch.zeros_like(inputs["alpha"])}), before)
    assert (backbone(inputs | {"alpha": torch.ones_like(inputs["alpha"])}) - before).abs().max() > 0.01
    backbone.remove()
    assert list(transformer.state_dict()) == keys
    assert torch.equal(frozen({k: v for k, v in inputs.items() if k not in ("alpha", "token_mask")}), before)
    assert type(transformer.get_submodule(TO_Q)) is QuantizedLinear


def test_the_low_rank_update_reads_the_unquantised_rows(bases: dict[str, Path], family: Family) -> None:
    transformer = family.load_pipeline(bases["fp8"]).transformer
    backbone = SliderBackbone(family, transformer, load_adapter("shapes-gst", family))
    module = backbone.adapted[TO_Q]
    x = torch.randn(1, 4, 128) * 100  # far beyond the calibrated range
    backbone.set_scales(torch.ones(1, 2 + 4), text_rows=2, image_rows=4)
    assert isinstance(module, MaskedLoRAQuantizedLinear)
    frozen = quantized_linear_reference(x, module.weight, module.weight_scale, None, module.input_scale, module.bias, "fp8")
    with torch.no_grad():
        update = module(x) - frozen
        torch.testing.assert_close(update, x @ module.lora_A.T @ module.lora_B.T, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("kind", ["st", "gst"])
def test_steps_and_images_reach_the_accuracy_marks(bases: dict[str, Path], kind: str) -> None:
    for name, accuracy in measure_accuracy(bases, kind, scenes=2, steps=6).items():
        limits = PRECISIONS[name].limits
        assert limits.step_rms / 20 < accuracy.step_rms <= limits.step_rms, (name, accuracy)
        assert limits.psnr <= accuracy.worst_psnr < 90, (name, accuracy)


def test_a_bfloat16_editor_edits_with_a_quantised_base(bases: dict[str, Path], scene: Any) -> None:
    editor = SliderEditor.from_pretrained(bases["nvfp4"], "shapes-st", dtype=torch.bfloat16)
    prepared = editor.prepare(scene, ["make the circle red"])
    low, high = editor.render_tensor(prepared, [[0.0], [1.0]], steps=4)
    assert (high - low).abs().max() > 0.2


# What people see


def test_inspect_and_adapter_show_understand_a_quantised_base(
    bases: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(bases["int4"]), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["precision"], report["layers"], report["kept"]) == ("int4", {"W4A16": 39, "W8A16": 7}, 10)
    assert sum(report["stored"].values()) == sum(t.nbytes for t in weights_of(bases["int4"]).values())
    assert main(["inspect", str(bases["nvfp4"])]) == 0
    assert "layers     39 NVFP4, 7 W8A16; 10 linears kept" in capsys.readouterr().out
    assert main(["inspect", str(resolve_base("shapes-kontext"))]) == 0
    assert "precision  not quantised" in capsys.readouterr().out
    assert "--vram is for engines" in refused(capsys, "inspect", bases["fp8"], "--vram", 24)
    assert main(["adapter", "show", "shapes-gst", "--base", str(bases["fp8"]), "--json"]) == 0
    match = json.loads(capsys.readouterr().out)["base"]
    assert (len(match["matched"]), match["missing"], match["unexpected"], match["mismatched"]) == (33, [], [], [])


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("activations", [False, True])
def test_a_configuration_is_read_as_it_was_written(tmp_path: Path, precision: str, activations: bool) -> None:
    form = PRECISIONS[precision]
    if (not form.quantises_activations) if activations else (form.weight_only_algorithm is None):
        pytest.skip("not offered")
    layers = {"a": QuantizedLayer(precision, activations), "b": QuantizedLayer("int8")}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": describe_layers(layers, precision)}))
    assert read_layers(tmp_path) == layers


# Refusals


def set_quantisation(base: Path, value: Any) -> None:
    config = base / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": value}))


@pytest.mark.parametrize(
    ("method", "hint"),
    [
        ("bitsandbytes_4bit", "NF4 and LLM.int8() need bitsandbytes"),
        ("gguf", "GGUF blocks are not read"),
        ("nunchaku", "Nunchaku's layout"),
        ("modelopt", "in a form that cannot be used here"),
        ("quanto", "in a form that cannot be used here"),
    ],
)
def test_other_methods_are_refused_with_what_to_do_instead(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str, hint: str
) -> None:
    base = tmp_path / "base"
    shutil.copytree(resolve_base("shapes-kontext"), base)
    set_quantisation(base, {"quant_method": method})
    for command in (
        ("quantize", "--precision", "int8", "--out", tmp_path / "out", "--base", base),
        ("build", "--adapter", "shapes-st", "--out", tmp_path / "out", "--quiet", "--base", base),
        ("inspect", base),
    ):
        error = refused(capsys, *command)
        assert f"is quantised ({method})" in error
        assert hint in error
        assert "slideredit-rt quantize" in error
    with pytest.raises(SliderEditError, match="is quantised"):
        SliderEditor.from_pretrained(base, "shapes-st")


@pytest.mark.parametrize(
    "name", ["flux1-kontext-dev-Q4_K_M.gguf", "svdq-int4_r32-flux.1-kontext-dev.safetensors", "flux.safetensors"]
)
def test_a_single_file_is_not_a_base(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    (tmp_path / name).write_bytes(b"GGUF")
    error = refused(capsys, "build", "--base", tmp_path / name, "--out", tmp_path / "out")
    assert "is a single file, not a folder" in error
    assert ("comes closest" in error) == (name != "flux.safetensors")


def change_weights(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    def damage(base: Path) -> None:
        tensors = weights_of(base)
        tensors[name] = change(tensors[name]).contiguous()
        save_file(tensors, base / "transformer" / WEIGHTS)

    return damage


def change_layers(**entries: Any) -> Callable[[Path], None]:
    def damage(base: Path) -> None:
        layers = {name: {"quant_algo": layer.algorithm} for name, layer in read_layers(base / "transformer").items()}
        described = describe_layers(read_layers(base / "transformer"), "fp8")
        set_quantisation(base, described | {"quantized_layers": layers | {k.replace("__", "."): v for k, v in entries.items()}})

    return damage


DAMAGE = {
    "a scale of 0": (change_weights(f"{TO_Q}.weight_scale", lambda t: t * (torch.arange(128) > 0)), "a scale of 0 in"),
    "a negative scale": (change_weights(f"{TO_Q}.input_scale", lambda t: -t), "a scale of -"),
    "a scale of NaN": (change_weights(f"{TO_Q}.weight_scale", lambda t: t * math.nan), "a scale of nan in"),
    "an infinite scale": (change_weights(f"{TO_Q}.input_scale", lambda t: t * math.inf), "a scale of inf in"),
    "too few scales": (change_weights(f"{TO_Q}.weight_scale", lambda t: t[:1]), "with shape [1]"),
    "scales in 16 bits": (change_weights(f"{TO_Q}.weight_scale", Tensor.bfloat16), "as torch.bfloat16, but fp8 needs"),
    "a weight in 16 bits": (change_weights(f"{TO_Q}.weight", Tensor.bfloat16), "as torch.bfloat16, but fp8 needs"),
    "an unknown algorithm": (change_layers(x_embedder={"quant_algo": "FP6"}), "in the unknown quant_algo"),
    "no algorithm": (change_layers(x_embedder=8), "in the unknown quant_algo"),
    "an unknown linear": (change_layers(transformer_blocks__9__to_q={"quant_algo": "FP8"}), "which is not a linear"),
    "a linear without parts": (change_layers(x_embedder={"quant_algo": "FP8"}), "lacks the tensor x_embedder.weight_scale"),
    "an entry that is not an object": (lambda base: set_quantisation(base, [1]), "is quantised"),
    "no layers": (lambda base: set_quantisation(base, {"quant_method": "modelopt", "quantized_layers": {}}), "is quantised"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_quantised_base_is_refused(bases: dict[str, Path], tmp_path: Path, damage: str) -> None:
    base = tmp_path / "base"
    shutil.copytree(bases["fp8"], base)
    change, message = DAMAGE[damage]
    change(base)
    with pytest.raises(SliderEditError) as error:
        SliderEditor.from_pretrained(base, "shapes-st")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
