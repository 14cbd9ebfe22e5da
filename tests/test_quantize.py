"""Writing a quantised base: permanent LoRAs, calibration, the command `quantize`, refusals, full disks, the full size."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import FluxTransformer2DModel
from quantized_base import TO_Q, WEIGHTS, weights_of
from refusals import refused
from safetensors.torch import load_file, save_file
from torch import Tensor

from slideredit_rt.adapters import Adapter, Fused, load_adapter, read_updates, save_adapter
from slideredit_rt.assets import resolve_base
from slideredit_rt.checkpoint import meta_transformer
from slideredit_rt.cli import main
from slideredit_rt.editor import SliderEditor
from slideredit_rt.errors import SliderEditError
from slideredit_rt.evaluation.dataset import CALIBRATION_SEEDS
from slideredit_rt.evaluation.shapes import ShapesScenes
from slideredit_rt.families import Family
from slideredit_rt.quantization import write
from slideredit_rt.quantization.calibrate import ActivationRun, measure_activations
from slideredit_rt.quantization.config import read_layers
from slideredit_rt.quantization.precisions import PRECISIONS
from slideredit_rt.quantization.write import QuantizeSettings, quantize_base

# Permanent LoRAs


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of a projection and of modulation."""
    g = torch.Generator().manual_seed(3)
    pairs = {
        TO_Q: (torch.randn(4, 128, generator=g), torch.randn(128, 4, generator=g) / 50),
        "transformer_blocks.0.norm1.linear": (torch.randn(4, 128, generator=g), torch.randn(768, 4, generator=g) / 50),
        "proj_out": (torch.randn(4, 128, generator=g), torch.randn(64, 4, generator=g) / 50),
    }
    path = tmp_path_factory.mktemp("lora") / "few=steps.safetensors"
    save_adapter(Adapter("flux_kontext", "gst", 4, pairs, "few-steps"), path)
    return path


def test_a_lora_is_fused_before_weights_are_quantised(tmp_path: Path, lora: Path, family: Family) -> None:
    fuse = (Fused(lora, 0.5), Fused(lora, 0.25))
    report = quantize_base("shapes-kontext", tmp_path / "out", QuantizeSettings("int8", fuse=fuse), progress=False)
    assert report.fused == 3
    original, found, form = weights_of(resolve_base("shapes-kontext")), weights_of(tmp_path / "out"), PRECISIONS["int8"]
    for module, (a, b) in load_adapter(lora, family).pairs.items():
        wanted = original[f"{module}.weight"] + 0.75 * b @ a
        assert (wanted - original[f"{module}.weight"]).abs().max() > 0.05
        parts = {p: found[f"{module}.{p}"] for p in ("weight", "weight_scale") if f"{module}.{p}" in found}
        stored = form.dequantise(parts) if "weight_scale" in parts else parts["weight"]
        torch.testing.assert_close(
            stored, form.dequantise(form.quantise(wanted)) if "weight_scale" in parts else wanted, rtol=0, atol=2e-2
        )
        assert (stored - wanted).abs().max() <= wanted.abs().max() / 127
    untouched = "transformer_blocks.1.attn.to_q.weight"
    assert torch.equal(found[untouched], form.quantise(original[untouched])["weight"])


def test_calibration_runs_with_the_fused_lora(family: Family, lora: Path) -> None:
    base, run = resolve_base("shapes-kontext"), ActivationRun(cases=1, steps=2)
    updates = read_updates([Fused(lora, 20.0)], family, meta_transformer(base / "transformer"))
    ends = ["transformer_blocks.0.attn.to_out.0", "transformer_blocks.0.ff.net.0.proj"]
    plain = measure_activations(family, base, ends, run, progress=False)
    fused = measure_activations(family, base, ends, run, updates, progress=False)
    assert fused[ends[1]] > 2 * plain[ends[1]]


def test_loras_that_do_not_fit_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], family: Family) -> None:
    command = ("quantize", "--base", "shapes-kontext", "--precision", "int8", "--out", tmp_path / "out", "--quiet", "--fuse")
    a, b = torch.ones(2, 128), torch.ones(128, 2)

    def saved(**pairs: tuple[Tensor, Tensor]) -> Path:
        named = {name.replace("__", "."): pair for name, pair in pairs.items()}
        tensors = {
            f"transformer.{m}.lora_{p}.weight": t.clone() for m, pair in named.items() for p, t in zip("AB", pair, strict=True)
        }
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        save_file(tensors, tmp_path / "lora.safetensors")
        return tmp_path / "lora.safetensors"

    q0, q9 = "transformer_blocks__0__attn__to_q", "transformer_blocks__9__attn__to_q"
    assert "updates no linear" in refused(capsys, *command, saved(nothing__here=(a, b)))
    assert "for transformer_blocks.9.attn.to_q, which this base lacks" in refused(
        capsys, *command, saved(**{q0: (a, b), q9: (a, b)})
    )
    wide = (torch.ones(2, 256), b)
    assert "which this base has with 128×128 weights" in refused(capsys, *command, saved(**{q0: wide}))
    assert "is a bank" in refused(capsys, *command, "shapes-concepts")
    assert "does not exist" in refused(capsys, *command, tmp_path / "none.safetensors")
    infinite = f"{saved(**{q0: (a * 1e38, b)})}=1e30"
    assert "holds NaN or infinity after fusing" in refused(capsys, *command, infinite)
    for text, message in (
        (f"{tmp_path}/x=much", "has scale 'much'"),
        ("shapes-st=0", "has scale 0"),
        ("shapes-st=inf", "has scale inf"),
    ):
        assert message in refused(capsys, *command, text)
    assert [p.name for p in tmp_path.iterdir()] == ["lora.safetensors"]


# Calibration


def test_calibration_keeps_the_largest_input_over_steps_strengths_and_adapters(family: Family) -> None:
    base, names = resolve_base("shapes-kontext"), [TO_Q, "single_transformer_blocks.2.proj_out"]
    seen: dict[str, list[float]] = {name: [] for name in names}
    for kind in ("st", "gst"):
        editor = SliderEditor.from_pretrained(base, f"shapes-{kind}")
        engine: Any = editor.engine
        for name in names:
            module = engine.backbone.transformer.get_submodule(name)
            module.register_forward_pre_hook(lambda m, args, name=name: seen[name].append(args[0].abs().max().item()))
        for case in ShapesScenes(seeds=CALIBRATION_SEEDS).cases("bench", 2, 1):
            prepared = editor.prepare(case.image, case.instructions, prompt=case.prompt, seed=case.seed)
            for strength in (0.0, 0.5, 1.0, 1.5):
                editor.render_tensor(prepared, [[strength]], steps=3)
    found = measure_activations(
        family, base, names, ActivationRun(("shapes-st", "shapes-gst"), cases=2, steps=3), progress=False
    )
    assert all(len(values) == 2 * 2 * 4 * 3 for values in seen.values())
    assert found == pytest.approx({name: max(values) for name, values in seen.items()}, rel=1e-4)


@pytest.fixture
def own(tmp_path: Path, scene: Any) -> tuple[Path, Path]:
    """A folder with one image, and a file of edits with one and two instructions."""
    (tmp_path / "images").mkdir()
    scene.save(tmp_path / "images" / "scene.png")
    edits = [["make the circle red"], ["make the circle red", "make the square blue"]]
    (tmp_path / "edits.jsonl").write_text("".join(json.dumps({"instructions": edit}) + "\n" for edit in edits))
    return tmp_path / "images", tmp_path / "edits.jsonl"


@pytest.mark.parametrize("kind", ["st", "gst"])
def test_own_images_calibrate_any_base(
    own: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    shutil.copytree(resolve_base("shapes-kontext"), tmp_path / "base")
    command = (
        "quantize",
        "--base",
        tmp_path / "base",
        "--precision",
        "fp8",
        "--out",
        tmp_path / "out",
        "--steps",
        2,
        "--quiet",
    )
    assert "must be calibrated on edits of your own" in refused(capsys, *command)
    given = ("--calibrate", own[0], "--prompts", own[1], "--adapter", f"shapes-{kind}", "--json")
    assert main([str(a) for a in (*command, *given)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["precision"], report["layers"]) == ("fp8", {"FP8": 39, "W8A16": 7})
    scales = [t.item() for name, t in weights_of(tmp_path / "out").items() if name.endswith("input_scale")]
    assert len(scales) == 39
    assert all(0.001 < scale * 448 < 2000 for scale in scales)


def test_calibration_images_that_cannot_be_used_are_refused(
    own: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.rglob("*"))
    (images, prompts), out = own, tmp_path / "out"
    command = ("quantize", "--base", "shapes-kontext", "--precision", "fp8", "--out", out, "--quiet")
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "a.png").write_bytes(b"\x89PNG")
    for folder, message in (("empty", "contains no images"), ("none", "cannot be read"), ("damaged", "a.png")):
        assert message in refused(capsys, *command, "--calibrate", tmp_path / folder, "--prompts", prompts)
    assert "prompts file" in refused(capsys, *command, "--calibrate", images, "--prompts", tmp_path / "none.jsonl")
    assert "give both" in refused(capsys, *command, "--calibrate", images)
    assert "numbers of at least 1" in refused(capsys, *command, "--cases", 0)
    assert "is a bank" in refused(capsys, *command, "--adapter", "shapes-concepts")
    weights = ("quantize", "--base", "shapes-kontext", "--precision", "int4", "--out", out)
    assert "int4 does not; leave it out" in refused(capsys, *weights, "--calibrate", images, "--prompts", prompts)
    assert {p.name for p in set(tmp_path.rglob("*")) - set(before)} == {"empty", "damaged", "a.png"}


def test_a_linear_that_no_edit_runs_cannot_be_calibrated(family: Family) -> None:
    base, run = resolve_base("shapes-kontext"), ActivationRun(cases=1, steps=1)
    # A list of modules, which is not called itself.
    with pytest.raises(SliderEditError, match=r"the inputs of transformer_blocks\.0\.attn\.to_out were not seen"):
        measure_activations(family, base, ["transformer_blocks.0.attn.to_out"], run, progress=False)


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    shutil.copytree(resolve_base("shapes-kontext"), tmp_path / "base")
    changed = weights_of(tmp_path / "base")
    changed["transformer_blocks.0.norm1.linear.weight"][0] = torch.inf
    save_file(changed, tmp_path / "base" / "transformer" / WEIGHTS)
    with pytest.raises(SliderEditError, match=r"norm1\.linear\.weight holds NaN or infinity; download the base again"):
        quantize_base(tmp_path / "base", tmp_path / "out", QuantizeSettings("int8"), progress=False)
    assert not (tmp_path / "out").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


# The command


def test_the_command_reports_what_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    command = ["quantize", "--base", "shapes-kontext", "--precision", "int8", "--out", str(out), "--keep", "*norm*"]
    assert main([*command, "--fuse", "shapes-gst=0.5"]) == 0
    captured = capsys.readouterr()
    assert "39 W8A16 linears, 17 kept" in captured.out
    assert "fused into 33 linears" in captured.out
    assert "quantize" in captured.err, "a progress bar"
    assert "exists already" in refused(capsys, *command)
    before = (out / "transformer" / WEIGHTS).read_bytes()
    assert main([*command, "--overwrite", "--quiet"]) == 0
    assert (out / "transformer" / WEIGHTS).read_bytes() != before
    for holder in (out, out.parent):
        assert "which is read; choose another folder with --out" in refused(
            capsys, "quantize", "--base", out, "--precision", "int8", "--out", holder, "--overwrite"
        )
    assert out.exists()
    assert "is quantised already (int8)" in refused(
        capsys, "quantize", "--base", out, "--precision", "int8", "--out", tmp_path / "other"
    )


# Refusals


def test_weights_that_are_float8_already_are_refused(tmp_path: Path) -> None:
    shutil.copytree(resolve_base("shapes-kontext"), tmp_path / "base")
    tensors = weights_of(tmp_path / "base")
    tensors[f"{TO_Q}.weight"] = tensors[f"{TO_Q}.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "base" / "transformer" / WEIGHTS)
    with pytest.raises(SliderEditError, match=r"stores transformer_blocks.0.attn.to_q.weight as torch.float8_e4m3fn"):
        quantize_base(tmp_path / "base", tmp_path / "out", QuantizeSettings("int8"), progress=False)


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **options: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(write, "read_tensor", full)
        with pytest.raises(SliderEditError, match="No space left on device"):
            quantize_base("shapes-kontext", tmp_path / "out", QuantizeSettings("int8"), progress=False)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 10**6))
    with pytest.raises(SliderEditError, match=r"take 0.0 GB, but .* has 0.0 GB free"):
        quantize_base("shapes-kontext", tmp_path / "out", QuantizeSettings("int8"), progress=False)
    assert not list(tmp_path.iterdir())


def test_shards_have_a_limit_and_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: Family) -> None:
    monkeypatch.setattr(write, "SHARD_BYTES", 900_000)
    quantize_base("shapes-kontext", tmp_path / "out", QuantizeSettings("int8"), progress=False)
    folder = tmp_path / "out" / "transformer"
    shards = sorted(folder.glob("*.safetensors"))
    assert [shard.name for shard in shards] == [f"diffusion_pytorch_model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    assert all(shard.stat().st_size < 950_000 for shard in shards)
    index = json.loads((folder / f"{WEIGHTS}.index.json").read_text())
    found = {name: shard.name for shard in shards for name in load_file(shard)}
    assert index["weight_map"] == found
    monkeypatch.undo()
    quantize_base("shapes-kontext", tmp_path / "whole", QuantizeSettings("int8"), progress=False)
    whole = weights_of(tmp_path / "whole")
    state = family.load_pipeline(tmp_path / "out").transformer.state_dict()
    assert state.keys() == whole.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in whole.items())


KILLED = """
import sys, time
from pathlib import Path
from slideredit_rt.quantization import write
read = write.read_tensor
def slow(place):
    print("reading", flush=True)
    time.sleep(0.2)
    return read(place)
write.read_tensor = slow
write.quantize_base("shapes-kontext", Path(sys.argv[1]), write.QuantizeSettings("int8"), progress=False)
"""


def test_a_killed_run_leaves_nothing_that_loads_and_the_next_cleans_up(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = subprocess.Popen([sys.executable, "-c", KILLED, str(out)], stdout=subprocess.PIPE)
    assert run.stdout is not None
    assert run.stdout.readline() == b"reading\n"
    time.sleep(0.3)
    run.send_signal(signal.SIGKILL)
    run.wait()
    run.stdout.close()
    assert not out.exists()
    assert len(list(tmp_path.iterdir())) == 1, "the temporary folder of the killed run"
    quantize_base("shapes-kontext", out, QuantizeSettings("int8"), progress=False)
    assert list(tmp_path.iterdir()) == [out]


# The full size


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """For gigabytes: gone after the test, where pytest keeps the folders of three runs."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def full_size_base(folder: Path) -> None:
    """A base with a transformer of 11.9B random bfloat16 weights, all of which lie in the same 400 MB of one file."""
    shutil.copytree(resolve_base("shapes-kontext"), folder)
    shutil.rmtree(folder / "transformer")
    (folder / "transformer").mkdir()
    with init_empty_weights():
        transformer = FluxTransformer2DModel(guidance_embeds=True)
    transformer.save_config(folder / "transformer")
    header, random = {}, torch.randn(200_000_000, generator=torch.Generator().manual_seed(6)).mul_(0.02).bfloat16()
    for index, (name, tensor) in enumerate(transformer.state_dict().items()):
        start = 2 * 4096 * (index % 1000)
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, start + 2 * tensor.numel()]}
    raw = json.dumps(header).encode()
    with (folder / "transformer" / WEIGHTS).open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.write(random.view(torch.uint8).numpy().data)


FULL_SIZE = """
import json, resource, sys, time
from pathlib import Path
from slideredit_rt.checkpoint import meta_transformer
from slideredit_rt.families import get_family
from slideredit_rt.quantization.selection import select_layers
from slideredit_rt.quantization.write import QuantizeSettings, quantize_base
base, out, precision = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
maxima = dict.fromkeys(select_layers(get_family("flux_kontext"), meta_transformer(base / "transformer"), precision), 8.0)
started = time.perf_counter()
report = quantize_base(base, out, QuantizeSettings(precision), maxima=maxima, progress=False)
seconds = time.perf_counter() - started
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"seconds": seconds, "peak": peak, "bytes": report.transformer_bytes, "source": report.source_bytes}))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "gigabytes"), [("fp8", 12.5), ("int8", 15), ("int4", 9), ("nvfp4", 9)])
def test_the_full_12b_transformer_is_quantised_in_15_minutes_and_4_gb(
    scratch: Path, precision: str, gigabytes: float, capsys: pytest.CaptureFixture[str]
) -> None:
    if shutil.disk_usage(scratch).free < 16 * 2**30:
        pytest.skip("needs 16 GiB of free disk")
    full_size_base(scratch / "base")
    # A process of its own: its peak memory is that of the quantisation.
    run = subprocess.run(
        [sys.executable, "-c", FULL_SIZE, scratch / "base", scratch / "out", precision],
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    figures = json.loads(run.stdout.splitlines()[-1])
    with capsys.disabled():
        print(  # noqa: T201
            f"\n{precision}: {figures['seconds'] / 60:.1f} min, peak {figures['peak'] / 1e9:.2f} GB, "
            f"{figures['source'] / 1e9:.1f} → {figures['bytes'] / 1e9:.2f} GB"
        )
    assert figures["source"] > 23.5e9
    assert figures["seconds"] < 15 * 60
    assert figures["peak"] < 4e9
    assert figures["bytes"] < gigabytes * 1e9
    layers = read_layers(scratch / "out" / "transformer")
    assert len(layers) == 494
    shards = list((scratch / "out" / "transformer").glob("*.safetensors"))
    assert all(shard.stat().st_size < 4.01e9 for shard in shards)
