"""Permanent LoRAs in engines, and the defaults of edits that belong to them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from http_server import serving
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from slideredit_rt.adapters import Adapter, Fused, load_adapter, load_adapters, save_adapter
from slideredit_rt.assets import resolve_base
from slideredit_rt.cli import main
from slideredit_rt.editor import SliderEditor
from slideredit_rt.engines import BuildSettings, Manifest, open_engine, read_manifest
from slideredit_rt.engines.manifest import ADAPTER_FILE, CONVERTED_FILE
from slideredit_rt.engines.tensorrt import TensorRTOptions
from slideredit_rt.engines.tensorrt import build as tensorrt_build
from slideredit_rt.errors import SliderEditError
from slideredit_rt.export.build import build_engine
from slideredit_rt.export.onnx_graph import example_inputs
from slideredit_rt.families import Family
from slideredit_rt.modules import SliderBackbone
from slideredit_rt.quantization.write import QuantizeSettings, quantize_base
from slideredit_rt.settings import EditDefaults, RunSettings

BASE = "shapes-kontext"
SCALE = 0.5
RED = "make the circle red"
# A projection that the ST adapter also updates, one that no slider can scale, modulation, and the last norm.
TOUCHED = {
    "transformer_blocks.0.attn.add_q_proj": (128, 128),
    "transformer_blocks.0.attn.to_q": (128, 128),
    "transformer_blocks.0.norm1.linear": (768, 128),
    "norm_out.linear": (256, 128),
}


def weights_of(base: Path) -> dict[str, Tensor]:
    return load_file(base / "transformer" / "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA in PEFT's own format."""
    g = torch.Generator().manual_seed(3)
    pairs = {
        name: (torch.randn(4, columns, generator=g), torch.randn(rows, 4, generator=g) / 50)
        for name, (rows, columns) in TOUCHED.items()
    }
    path = tmp_path_factory.mktemp("lora") / "few-steps"
    save_adapter(Adapter("flux_kontext", "gst", 4, pairs, "few-steps"), path, form="peft")
    return path


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory, lora: Path) -> Path:
    """The embedded base with the LoRA merged by PEFT."""
    path = tmp_path_factory.mktemp("merged") / "base"
    shutil.copytree(resolve_base(BASE), path)
    model = PeftModel.from_pretrained(FluxTransformer2DModel.from_pretrained(path / "transformer"), lora)
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.set_scale("default", SCALE)
    model.merge_and_unload().save_pretrained(path / "transformer")
    return path


def build(base: str | Path, adapter: str, out: Path, lora: Path | None = None, **settings: Any) -> Manifest:
    fuse = () if lora is None else (Fused(lora, SCALE),)
    return build_engine(base, adapter, out, BuildSettings(fuse=fuse, **settings), progress=False)


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory, lora: Path) -> Path:
    """An ONNX Runtime engine with the fused LoRA and defaults, built by the command."""
    out = tmp_path_factory.mktemp("fused") / "engine"
    command = ["build", "--base", BASE, "--adapter", "shapes-st", "--out", str(out), "--quiet", "--fuse", f"{lora}={SCALE}"]
    usual = ["--default-steps", "3", "--default-guidance-scale", "2.5", "--default-true-cfg-scale", "1.5"]
    assert main([*command, *usual, "--timestep-shift", "2"]) == 0
    return out


def step(engine: Path, family: Family, adapter: str, *, alpha: float | None = None) -> Tensor:
    """Predict one whole step for random inputs and random or equal alphas."""
    manifest = read_manifest(engine)
    transformer = FluxTransformer2DModel.from_config(manifest.config)
    inputs = example_inputs(SliderBackbone(family, transformer, load_adapters(adapter, family)), manifest.config, 2, 24, 60, 2)
    if alpha is not None:
        inputs["alpha"].fill_(alpha)
    return open_engine(engine, RunSettings("cpu"), manifest)[1](inputs).clone()


# The engine


def assert_equal_steps(found: Path, merged: Path, plain: Path, adapter: str, family: Family) -> None:
    """Check that an engine predicts what that of the merged checkpoint does, and that the LoRA and the sliders act."""
    actual = step(found, family, adapter)
    assert (actual - step(merged, family, adapter)).abs().max() <= 1e-5
    assert (actual - step(plain, family, adapter)).abs().max() > 0.1
    assert (actual - step(found, family, adapter, alpha=0.0)).abs().max() > 1e-3


def test_an_onnx_engine_equals_one_of_the_checkpoint_that_peft_merged(
    fused: Path, merged: Path, engines: dict[str, Path], family: Family, tmp_path: Path
) -> None:
    build(merged, "shapes-st", tmp_path / "merged")
    assert_equal_steps(fused, tmp_path / "merged", engines["st"], "shapes-st", family)


@pytest.mark.parametrize("adapter", ["shapes-st", "shapes-gst", "shapes-concepts"])
def test_an_inductor_engine_equals_one_of_the_checkpoint_that_peft_merged(
    adapter: str, lora: Path, merged: Path, family: Family, tmp_path: Path, as_traced: None
) -> None:
    build(BASE, adapter, tmp_path / "fused", lora, backend="inductor")
    build(merged, adapter, tmp_path / "merged", backend="inductor")
    build(BASE, adapter, tmp_path / "plain", backend="inductor")
    assert_equal_steps(tmp_path / "fused", tmp_path / "merged", tmp_path / "plain", adapter, family)


@pytest.mark.parametrize("backend", ["onnxruntime", "inductor"])
def test_only_the_touched_weights_are_written(backend: str, fused: Path, lora: Path, merged: Path, tmp_path: Path) -> None:
    engine = fused
    if backend != "onnxruntime":
        engine = tmp_path / "engine"
        build(BASE, "shapes-st", engine, lora, backend=backend)
    manifest, source = read_manifest(engine), resolve_base(BASE) / "transformer"
    assert list(manifest.links) == ["diffusion_pytorch_model.safetensors"]
    assert all((engine / name).samefile(source / name) for name in manifest.links)
    written, expected = load_file(engine / CONVERTED_FILE), weights_of(merged)
    assert set(written) == {f"{name}.weight" for name in TOUCHED}
    assert all((tensor - expected[name]).abs().max() <= 1e-6 for name, tensor in written.items())
    payload = 4 * sum(rows * columns for rows, columns in TOUCHED.values())
    assert payload < manifest.files[CONVERTED_FILE]["bytes"] < payload + 2000


def test_weights_are_fused_before_they_are_rounded(lora: Path, merged: Path, tmp_path: Path) -> None:
    build(BASE, "shapes-st", tmp_path / "engine", lora, backend="inductor", dtype="bfloat16")
    written, expected = load_file(tmp_path / "engine" / CONVERTED_FILE), weights_of(merged)
    for name in TOUCHED:
        assert torch.equal(written[f"{name}.weight"], expected[f"{name}.weight"].bfloat16())


def test_tensorrt_rtx_compiles_the_fused_weights(
    lora: Path, merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs: list[dict[str, Tensor]] = []

    def compile_none(_: Any, job: Any, graph: Path, *others: Any) -> None:
        graphs.append(load_file(graph.parent / CONVERTED_FILE))
        raise SliderEditError("not compiled")

    monkeypatch.setattr(tensorrt_build, "build_plan", compile_none)
    options = TensorRTOptions(resolution=64, max_text_rows=24)
    with pytest.raises(SliderEditError, match="not compiled"):
        build(BASE, "shapes-st", tmp_path / "engine", lora, backend="tensorrt-rtx", options=options)
    expected = weights_of(merged)
    assert set(graphs[0]) == {f"{name}.weight" for name in TOUCHED}
    assert all((tensor - expected[name]).abs().max() <= 1e-6 for name, tensor in graphs[0].items())


def test_several_loras_add_up(lora: Path, family: Family, tmp_path: Path) -> None:
    plain, once = (SliderEditor.from_pretrained(BASE, "shapes-st", fuse=f) for f in ((), [Fused(lora, 0.75)]))
    twice = SliderEditor.from_pretrained(BASE, "shapes-st", fuse=[Fused(lora, 0.5), Fused(lora, 0.25)])
    before, first, second = (e.pipeline.transformer.norm_out.linear.weight for e in (plain, once, twice))
    torch.testing.assert_close(first, second, rtol=0, atol=1e-6)
    assert (first - before).abs().max() > 0.01


# The manifest


def test_the_manifest_and_inspect_name_the_lora(fused: Path, lora: Path, family: Family, capsys: Any) -> None:
    (entry,) = read_manifest(fused).fused
    fingerprint = load_adapter(lora, family).fingerprint
    assert entry == {"source": str(lora), "scale": SCALE, "fingerprint": fingerprint, "modules": len(TOUCHED)}
    assert main(["inspect", str(fused)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"fused      {lora} (scale 0.5, 4 linears)" in lines
    assert [line for line in lines if line.startswith("default ")] == [
        "default    steps 3",
        "default    guidance_scale 2.5",
        "default    true_cfg_scale 1.5",
        "default    timestep_shift 2",
    ]


def test_replacing_the_adapter_keeps_the_lora(fused: Path, family: Family, tmp_path: Path) -> None:
    engine = tmp_path / "engine"
    shutil.copytree(fused, engine)
    before = step(engine, family, "shapes-st")
    original = load_adapter("shapes-st", family)
    other = Adapter("flux_kontext", "st", 16, {n: (a, -b) for n, (a, b) in original.pairs.items()}, "other")
    save_adapter(other, tmp_path / "other.safetensors")
    assert main(["adapter", "replace", str(engine), str(tmp_path / "other.safetensors"), "--quiet"]) == 0
    manifest = read_manifest(engine)
    assert (manifest.fused, manifest.defaults) == (read_manifest(fused).fused, read_manifest(fused).defaults)
    assert CONVERTED_FILE in manifest.files
    assert ADAPTER_FILE in manifest.files
    assert (step(engine, family, "shapes-st") - before).abs().max() > 1e-3
    frozen = (step(path, family, "shapes-st", alpha=0.0) for path in (engine, fused))
    assert torch.equal(*frozen)


# verify


def test_verify_fuses_the_lora_into_its_reference(fused: Path, lora: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(["verify", str(fused)]) == 0
    assert "passed: max abs" in capsys.readouterr().out
    shutil.copytree(lora, tmp_path / "moved")
    assert main(["verify", str(fused), "--fuse", str(tmp_path / "moved"), "--quiet"]) == 0
    capsys.readouterr()
    assert main(["verify", str(fused), "--fuse", "shapes-gst"]) == 2
    assert "LoRA 'shapes-gst' is not the one fused into engine" in capsys.readouterr().err
    assert main(["verify", str(fused), "--fuse", str(lora), "--fuse", str(lora)]) == 2
    assert "got 2 LoRAs, but 1 were fused into engine" in capsys.readouterr().err


# Defaults of edits


def test_an_editor_takes_the_engines_defaults_and_explicit_values_win(fused: Path, scene: Image.Image) -> None:
    editor = SliderEditor.from_engine(fused)
    usual = editor.prepare(scene, [RED])
    assert editor.number_of_steps(usual.settings) == 3
    assert editor.frozen_inputs(usual, 1)["guidance"].item() == 2.5
    assert usual.conditioning.true_cfg_scale == 1.5
    assert usual.conditioning.negative is not None
    asked = editor.prepare(scene, [RED], steps=5, guidance_scale=4.0, true_cfg_scale=1.0)
    assert editor.number_of_steps(asked.settings) == 5
    assert editor.frozen_inputs(asked, 1)["guidance"].item() == 4.0
    assert asked.conditioning.negative is None


def test_the_timestep_shift_is_fixed(fused: Path, engines: dict[str, Path]) -> None:
    editor, other = SliderEditor.from_engine(fused), SliderEditor.from_engine(engines["st"])
    even = torch.tensor([1.0, 0.75, 0.5, 0.25])
    for rows in (16, 4096):
        found = editor.family.schedule(editor.pipeline, rows, 4).timesteps
        torch.testing.assert_close(found, 2 * even / (1 + even), rtol=0, atol=1e-5)
        assert not torch.allclose(other.family.schedule(other.pipeline, rows, 4).timesteps, found, atol=1e-3)


def test_edit_takes_the_default_steps(fused: Path, scene: Image.Image, tmp_path: Path) -> None:
    scene.save(tmp_path / "scene.png")
    command = ["edit", str(fused), "--image", str(tmp_path / "scene.png"), "--slider", f"{RED}=0.5", "--quiet"]
    for name, steps in (("usual", []), ("three", ["--steps", "3"]), ("four", ["--steps", "4"])):
        assert main([*command, *steps, "--out", str(tmp_path / f"{name}.png")]) == 0
    usual, three, four = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("usual", "three", "four"))
    assert np.array_equal(usual, three)
    assert not np.array_equal(usual, four)


def test_the_server_tells_the_engines_defaults(fused: Path) -> None:
    with serving(fused) as address, httpx.Client(base_url=address, timeout=60) as client:
        described = client.get("/v1/models").json()["data"][0]["engine"]
    names = ("num_inference_steps", "guidance_scale", "true_cfg_scale", "preview_steps")
    assert [described[name] for name in names] == [3, 2.5, 1.5, 3]


def test_defaults_of_an_engine_without_them_are_the_familys(engines: dict[str, Path]) -> None:
    manifest = read_manifest(engines["st"])
    assert (manifest.fused, manifest.defaults, manifest.edit_defaults) == ([], {}, EditDefaults())
    editor = SliderEditor.from_engine(engines["st"])
    assert editor.default_steps == editor.family.num_inference_steps
    assert editor.default_guidance_scale == editor.family.guidance_scale
    assert editor.default_true_cfg_scale == editor.family.true_cfg_scale


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("fused", [{"source": "a", "scale": 1e300, "fingerprint": "0" * 64, "modules": 1}]),
        ("fused", [{"source": "a", "scale": 1.0, "fingerprint": "../x", "modules": 1}]),
        ("defaults", {"steps": 0}),
        ("defaults", {"guidance_scale": True}),
        ("defaults", {"timestep_shift": -1.0}),
        ("defaults", {"seed": 1}),
    ],
)
def test_a_damaged_manifest_is_refused(fused: Path, tmp_path: Path, field: str, value: Any) -> None:
    engine = tmp_path / "engine"
    shutil.copytree(fused, engine)
    data = json.loads((engine / "manifest.json").read_text())
    (engine / "manifest.json").write_text(json.dumps(data | {field: value}))
    with pytest.raises(SliderEditError, match=rf"the manifest\.{field}.*build the engine again"):
        read_manifest(engine)


# Bad input


def refused(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: object) -> str:
    """Run a build that must be refused in one sentence and write nothing."""
    before = sorted(folder.iterdir())
    assert main([str(a) for a in ("build", "--adapter", "shapes-st", "--quiet", "--out", folder / "engine", *arguments)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("slideredit-rt: ")
    assert error.count("\n") == 1
    assert sorted(folder.iterdir()) == before
    return error


def saved(path: Path, name: str, a: Tensor, b: Tensor) -> Path:
    save_file({f"transformer.{name}.lora_A.weight": a, f"transformer.{name}.lora_B.weight": b}, path)
    return path


def test_loras_that_cannot_be_fused_are_refused(tmp_path: Path, lora: Path, capsys: Any) -> None:
    (tmp_path / "work").mkdir()
    a, b, to_q = torch.ones(2, 128), torch.ones(128, 2), "transformer_blocks.0.attn.to_q"
    for path, message in (
        (saved(tmp_path / "nothing.safetensors", "nothing.here", a, b), "updates no linear"),
        (saved(tmp_path / "wide.safetensors", to_q, torch.ones(2, 256), b), "which this base has with 128×128 weights"),
        (saved(tmp_path / "deep.safetensors", to_q.replace("0", "9"), a, b), "which this base lacks"),
        (f"{saved(tmp_path / 'huge.safetensors', to_q, a * 1e38, b)}=1e30", "holds NaN or infinity after fusing"),
        (tmp_path / "none.safetensors", "does not exist"),
        ("shapes-concepts", "is a bank of sliders"),
        (f"{lora}=strong", "has scale 'strong', not a number"),
        (f"{lora}=inf", "has scale inf; pass a number"),
        (f"{lora}=0", "has scale 0; pass a number"),
    ):
        assert message in refused(capsys, tmp_path / "work", "--base", BASE, "--fuse", path)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--default-steps", 0, "the number of denoising steps is 0; pass at least 1"),
        ("--default-guidance-scale", "nan", "the guidance scale is nan; pass a finite number"),
        ("--default-true-cfg-scale", "inf", "the true-CFG scale is inf; pass a finite number"),
        ("--timestep-shift", 0, "the timestep shift is 0.0; pass a number above 0"),
    ],
)
def test_defaults_that_make_no_edit_are_refused(option: str, value: Any, message: str, tmp_path: Path, capsys: Any) -> None:
    assert message in refused(capsys, tmp_path, "--base", BASE, option, value)


def test_a_quantised_base_is_fused_when_it_is_quantised(tmp_path: Path, lora: Path, capsys: Any) -> None:
    quantize_base(BASE, tmp_path / "int8", QuantizeSettings("int8"), progress=False)
    message = refused(capsys, tmp_path, "--base", tmp_path / "int8", "--fuse", lora)
    assert "is quantised (int8), and LoRAs are fused before weights are quantised" in message
