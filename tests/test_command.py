"""The command: what each verb writes, and one clear sentence with exit code 2 for bad input."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from http_server import waited_for
from PIL import Image
from safetensors.torch import save_file

from slideredit_rt import __version__
from slideredit_rt.assets import choose_world, resolve_adapter, resolve_base
from slideredit_rt.cli import _parser, main
from slideredit_rt.commands.edit import parse_slider, parse_swept_slider
from slideredit_rt.commands.shared import own_image_options
from slideredit_rt.editor import SliderEditor
from slideredit_rt.engines import BACKENDS, read_manifest
from slideredit_rt.export.build import build_engine
from slideredit_rt.files import user_path

RED = "make the circle red"


@pytest.fixture
def image_file(tmp_path: Path, scene: Image.Image) -> Path:
    scene.save(tmp_path / "in.png")
    return tmp_path / "in.png"


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command that must fail: exit code 2, one line on standard error, nothing on standard output."""
    code, out, err = run(capsys, *arguments, "--quiet")
    assert code == 2
    assert out == ""
    assert err.startswith("slideredit-rt: ")
    assert err.count("\n") == 1
    return err


EDIT = ["edit", "engine", "--image", "in.png", "--slider", RED, "--out", "out.png"]


@pytest.mark.parametrize(
    ("arguments", "code", "shown"),
    [
        (["--help"], 0, "inference for SliderEdit"),
        (["--version"], 0, f"slideredit-rt {__version__}"),
        (["serve", "--help"], 0, "--max-megapixels"),
        (["serve", "--port", "many"], 2, "argument --port: invalid int value: 'many'"),
        (["serve", "--port", "70000"], 2, "--port is 70000; give 0 to 65535"),
        ([*EDIT, "--slider", f"{RED}=nan"], 2, "has strength nan"),
        ([*EDIT, "--guidance-scale", "nan"], 2, "guidance scale is nan"),
        ([*EDIT, "--seed", str(2**64)], 2, "the seed is 18446744073709551616"),
        (["inspect", "nowhere"], 2, "engine 'nowhere' does not exist; build one with slideredit-rt build"),
        (["verify", "nowhere"], 2, "engine 'nowhere' does not exist"),
        (["serve", "nowhere"], 2, "engine 'nowhere' does not exist"),
        (["adapter", "replace", "nowhere", "shapes-st"], 2, "engine 'nowhere' does not exist"),
        (["adapter", "calibrate", "shapes-st", "a", "--engine", "nowhere"], 2, "engine 'nowhere' does not exist"),
        (["evaluate", "--engine", "nowhere", "--out", "a"], 2, "engine 'nowhere' does not exist"),
        (["export-triton", "nowhere", "--out", "a"], 2, "engine 'nowhere' does not exist"),
        (["inspect", str(Path(__file__).parent)], 2, "is not an engine folder: manifest.json is missing; build one"),
    ],
)
def test_help_and_refusals_of_arguments_wait_for_no_library(arguments: list[str], code: int, shown: str) -> None:
    program = f"""
import sys, time
from slideredit_rt.cli import main
try:
    code = main({arguments!r})
except SystemExit as end:
    code = end.code
loaded = [name for name in ("torch", "numpy", "diffusers", "PIL", "fastapi") if name in sys.modules]
print(code, loaded, time.process_time() < 0.5)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == f"{code} [] True"
    assert shown in done.stdout + done.stderr


def test_edit_writes_an_image_and_json(engines: dict[str, Path], image_file: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out.png"
    code, text, _ = run(
        capsys,
        "edit",
        engines["st"],
        "--image",
        image_file,
        "--slider",
        f"{RED}=0.5",
        "--steps",
        2,
        "--out",
        out,
        "--json",
        "--quiet",
    )
    assert code == 0
    assert json.loads(text)["sliders"] == [{"instruction": RED, "strength": 0.5}]
    assert Image.open(out).size == (64, 64)


def test_sweep_writes_a_strip_and_its_description(
    engines: dict[str, Path], image_file: Path, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "strip.png"
    code, _, _ = run(
        capsys,
        "sweep",
        engines["st"],
        "--image",
        image_file,
        "--slider",
        f"{RED}=0:1.5:4",
        "--steps",
        2,
        "--out",
        out,
        "--quiet",
    )
    assert code == 0
    assert json.loads((tmp_path / "strip.json").read_text())["sliders"] == [
        {"instruction": RED, "strengths": [0.0, 0.5, 1.0, 1.5]}
    ]
    assert Image.open(out).width > 4 * 64


def test_two_swept_sliders_make_a_grid(engines: dict[str, Path], image_file: Path, tmp_path: Path, capsys: Any) -> None:
    sliders = ["--slider", f"{RED}=0:1:2", "--slider", "make the background dark=0:1:3"]
    code, text, _ = run(
        capsys,
        "sweep",
        engines["st"],
        "--image",
        image_file,
        *sliders,
        "--steps",
        1,
        "--out",
        tmp_path / "g.png",
        "--json",
        "--quiet",
    )
    assert code == 0
    assert [len(s["strengths"]) for s in json.loads(text)["sliders"]] == [2, 3]


def test_inspect_prints_the_manifest(engines: dict[str, Path], capsys: Any) -> None:
    code, text, _ = run(capsys, "inspect", engines["gst"], "--json")
    manifest = json.loads(text)
    assert (code, manifest["adapter"]["kind"], manifest["family"]) == (0, "gst", "flux_kontext")
    assert {"alpha", "token_mask"} <= {i["name"] for i in manifest["inputs"]}
    assert "token_mask bool" in run(capsys, "inspect", engines["st"])[1]


def test_verify_compares_with_eager(engines: dict[str, Path], capsys: Any, kind: str) -> None:
    code, text, _ = run(capsys, "verify", engines[kind], "--json")
    report = json.loads(text)
    assert code == 0
    assert report["max_abs_error"] <= 1e-4
    assert {c["case"] for c in report["comparisons"]} >= {"real inputs, mixed batch", "random inputs, alpha -0.50"}
    assert all(v is None or v > 60 for v in report["psnr"].values())


def test_spans_prints_who_owns_which_row(capsys: Any) -> None:
    code, text, _ = run(capsys, "spans", "--base", "shapes-kontext", "--slider", RED, "--slider", "make the square larger")
    assert code == 0
    owners = {line.split()[1]: line for line in text.splitlines()[1:-1]}
    assert "0: make the circle red" in owners["▁circle"]
    assert "1: make the square larger" in owners["▁square"]
    assert owners["▁and"].split() == ["4", "▁and", "and"]


@pytest.mark.parametrize(
    ("slider", "message"),
    [
        (f"{RED}=nan", "finite"),
        (f"{RED}=inf", "finite"),
        (f"{RED}=strong", "strength 'strong'"),
        ("=0.5", "empty instruction"),
        ("make the circle pink=0.5=", "strength ''"),
    ],
)
def test_bad_sliders(
    engines: dict[str, Path], image_file: Path, tmp_path: Path, capsys: Any, slider: str, message: str
) -> None:
    out = tmp_path / "o.png"
    assert message in refused(capsys, "edit", engines["st"], "--image", image_file, "--slider", slider, "--out", out)
    assert not out.exists()


@pytest.mark.parametrize("value", ["0:1", "0:1:1", "0:1:1000", "a:b:c", "0:nan:3"])
def test_bad_sweeps(engines: dict[str, Path], image_file: Path, tmp_path: Path, capsys: Any, value: str) -> None:
    refused(capsys, "sweep", engines["st"], "--image", image_file, "--slider", f"{RED}={value}", "--out", tmp_path / "o.png")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.png"]


def test_instruction_that_is_not_in_the_prompt(engines: dict[str, Path], image_file: Path, tmp_path: Path, capsys: Any) -> None:
    options = ["--prompt", "make the square red", "--slider", RED, "--out", tmp_path / "o.png"]
    assert "nowhere in the prompt" in refused(capsys, "edit", engines["st"], "--image", image_file, *options)


def test_unreadable_and_enormous_images(engines: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "text.png").write_text("not an image")
    Image.new("1", (9000, 9000)).save(tmp_path / "huge.png")
    Image.new("RGB", (64, 64)).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:60])
    cases = {
        "missing.png": "does not exist",
        "text.png": "cannot be read",
        "huge.png": "megapixels",
        "cut.png": "cannot be read",
    }
    for name, message in cases.items():
        arguments = ["edit", engines["st"], "--image", tmp_path / name, "--slider", RED, "--out", tmp_path / "o.png"]
        assert message in refused(capsys, *arguments)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "LA", "CMYK", "I;16"])
def test_other_colour_modes_are_converted(
    engines: dict[str, Path], scene: Image.Image, tmp_path: Path, capsys: Any, mode: str
) -> None:
    path = tmp_path / ("in.tiff" if mode in ("CMYK", "I;16") else "in.png")
    (Image.new("I;16", (64, 64), 30000) if mode == "I;16" else scene.convert(mode)).save(path)
    code, _, _ = run(
        capsys, "edit", engines["st"], "--image", path, "--slider", RED, "--steps", 1, "--out", tmp_path / "o.png", "--quiet"
    )
    assert code == 0
    assert Image.open(tmp_path / "o.png").mode == "RGB"


def test_output_name_without_a_format(engines: dict[str, Path], image_file: Path, tmp_path: Path, capsys: Any) -> None:
    assert "image format" in refused(
        capsys, "edit", engines["st"], "--image", image_file, "--slider", RED, "--steps", 1, "--out", tmp_path / "o.xyz"
    )


def test_output_that_cannot_hold_the_result_is_refused_before_the_work(
    engines: dict[str, Path], image_file: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SliderEditor, "render", lambda *_, **__: pytest.fail("it was denoised"))
    common = ["--image", image_file, "--steps", 1, "--quiet", "--out"]
    edit = ["edit", engines["st"], "--slider", RED, *common]
    assert "Pillow does not write PSD files" in refused(capsys, *edit, tmp_path / "o.psd")
    sweep = ["sweep", engines["st"], "--slider", f"{RED}=0:1:64", *common]
    monkeypatch.setattr(SliderEditor, "edited_size", lambda *_: (1024, 64))
    assert "cannot hold an RGB image of 66064×128 pixels" in refused(capsys, *sweep, tmp_path / "o.webp")
    assert not list(tmp_path.glob("o.*"))


@pytest.mark.parametrize("command", [["edit", f"{RED}=1e20"], ["sweep", f"{RED}=0:1e20:3"]])
def test_an_image_that_is_not_finite_is_bad_input(
    engines: dict[str, Path], image_file: Path, tmp_path: Path, capsys: Any, command: list[str]
) -> None:
    name, slider = command
    arguments = [name, engines["st"], "--image", image_file, "--slider", slider, "--steps", 2, "--out", tmp_path / "o.png"]
    assert "'make the circle red' at strength" in refused(capsys, *arguments, "--quiet")
    assert not list(tmp_path.glob("o.*"))


def test_bad_bases(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "empty").mkdir()
    other = tmp_path / "other"
    other.mkdir()
    (other / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "model_index.json").write_text("{")
    cases = {
        "nowhere": "does not exist",
        "empty": "not a diffusers checkpoint",
        "other": "is not supported; supported: FluxKontextPipeline",
        "broken": "not a diffusers model index",
    }
    for name, message in cases.items():
        out = tmp_path / "engine"
        assert message in refused(capsys, "build", "--base", tmp_path / name, "--adapter", "shapes-st", "--out", out)
        assert not out.exists()


def test_a_base_with_damaged_weights(tmp_path: Path, capsys: Any) -> None:
    base = tmp_path / "base"
    shutil.copytree(resolve_base("shapes-kontext"), base)
    weights = base / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "cannot read the weights" in refused(
        capsys, "build", "--base", base, "--adapter", "shapes-st", "--out", tmp_path / "engine"
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base"]


def test_an_adapter_that_matches_some_or_none_of_the_modules(tmp_path: Path, capsys: Any) -> None:
    a, b = torch.zeros(4, 128), torch.zeros(128, 4)
    some = ["transformer_blocks.0.attn.to_q", "transformer_blocks.9.attn.to_q"]
    for name, modules, expected in (
        ("none", ["unet.to_q"], "no linear that sliders can scale"),
        ("absent", some[1:], "0 of the 1 modules"),
        ("some", some, "1 of the 2 modules"),
    ):
        file = tmp_path / f"{name}.safetensors"
        save_file({f"{m}.lora_{p}.weight": (a if p == "A" else b).clone() for m in modules for p in "AB"}, file)
        message = refused(capsys, "build", "--base", "shapes-kontext", "--adapter", file, "--out", tmp_path / "engine")
        assert expected in message
        assert not (tmp_path / "engine").exists()


def test_unknown_backend_and_existing_output(engines: dict[str, Path], capsys: Any) -> None:
    base = ["build", "--base", "shapes-kontext", "--adapter", "shapes-st", "--out"]
    assert "unknown backend 'coreml'" in refused(capsys, *base, "x", "--backend", "coreml")
    assert "exists already" in refused(capsys, *base, engines["st"])


@pytest.fixture
def copied(engines: dict[str, Path], tmp_path: Path) -> Path:
    shutil.copytree(engines["st"], tmp_path / "engine")
    return tmp_path / "engine"


def rewrite(manifest: Path, **changes: Any) -> None:
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | changes))


def test_damaged_engines(copied: Path, capsys: Any) -> None:
    adapter, manifest = copied / "adapter.safetensors", copied / "manifest.json"
    original, text = adapter.read_bytes(), manifest.read_text()
    adapter.write_bytes(original[:-8])
    assert "bytes instead of" in refused(capsys, "inspect", copied)
    adapter.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    assert "was changed after the build" in refused(capsys, "inspect", copied)
    adapter.unlink()
    assert "lacks the file" in refused(capsys, "inspect", copied)
    adapter.write_bytes(original)
    rewrite(manifest, schema_version=99)
    assert "schema 99" in refused(capsys, "inspect", copied)
    manifest.write_text(text[:100])
    assert "damaged" in refused(capsys, "inspect", copied)
    manifest.unlink()
    assert "not an engine folder" in refused(capsys, "inspect", copied)
    assert "does not exist" in refused(capsys, "inspect", copied / "nothing")


def test_engine_whose_linked_weights_are_gone_or_changed(copied: Path, capsys: Any) -> None:
    file = copied / "diffusion_pytorch_model.safetensors"
    content = file.read_bytes()
    assert run(capsys, "inspect", copied)[0] == 0
    for damage in (
        lambda: file.write_bytes(content[:-1]),
        lambda: file.write_bytes(content[:-1] + bytes([content[-1] ^ 1])),
        file.unlink,
    ):
        damage()
        message = refused(capsys, "inspect", copied)
        assert f"links to the checkpoint's file {file.name}, which is missing or was changed" in message
        assert "--copy-weights" in message


def test_engine_of_an_unknown_family_or_backend_or_another_base(
    copied: Path, image_file: Path, tmp_path: Path, capsys: Any
) -> None:
    arguments = ["edit", copied, "--image", image_file, "--slider", RED, "--out", tmp_path / "o.png"]
    manifest = copied / "manifest.json"
    text = manifest.read_text()
    rewrite(manifest, family="sdxl")
    assert "unknown family 'sdxl'" in refused(capsys, *arguments)
    manifest.write_text(text)
    rewrite(manifest, backend="coreml")
    assert "needs the backend 'coreml'" in refused(capsys, *arguments)
    manifest.write_text(text)
    base = tmp_path / "base"
    shutil.copytree(resolve_base("shapes-kontext"), base)
    (base / "scheduler" / "scheduler_config.json").write_text("{}")
    assert "scheduler differ" in refused(capsys, *arguments, "--base", base)


@pytest.mark.parametrize("typed", ["./base", "base/", "~/base", "../work/base"])
def test_sources_are_stored_so_that_any_folder_finds_them(
    tmp_path: Path, scene: Image.Image, capsys: Any, monkeypatch: pytest.MonkeyPatch, typed: str
) -> None:
    work, elsewhere = tmp_path / "work", tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copytree(resolve_base("shapes-kontext"), work / "base")
    shutil.copy(resolve_adapter("shapes-st"), work / "mine.safetensors")
    scene.save(elsewhere / "in.png")
    monkeypatch.setenv("HOME", str(work))
    monkeypatch.chdir(work)
    assert run(capsys, "build", "--base", typed, "--adapter", "mine.safetensors", "--out", "~/engine", "--quiet")[0] == 0
    manifest = read_manifest(work / "engine")
    assert manifest.base["source"] == str(work / "base")
    assert manifest.adapter is not None
    assert manifest.adapter["source"] == str(work / "mine.safetensors")
    monkeypatch.setenv("HOME", str(elsewhere))
    monkeypatch.chdir(elsewhere)
    edit = ["edit", work / "engine", "--image", "~/in.png", "--slider", RED, "--steps", 1, "--out", "~/out.png", "--quiet"]
    assert run(capsys, *edit)[0] == 0
    assert Image.open(elsewhere / "out.png").size == (64, 64)


def test_members_of_a_bank_are_stored_so_that_any_folder_finds_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("first", "second"):
        shutil.copy(resolve_adapter("shapes-st"), tmp_path / f"{name}.safetensors")
    monkeypatch.chdir(tmp_path)
    build_engine("shapes-kontext", ["first.safetensors", "./second.safetensors"], tmp_path / "bank", progress=False)
    manifest = read_manifest(tmp_path / "bank")
    assert manifest.base["source"] == "shapes-kontext"
    assert manifest.adapter is not None
    sources = [str(tmp_path / f"{name}.safetensors") for name in ("first", "second")]
    assert [member["source"] for member in manifest.adapter["members"].values()] == sources
    assert manifest.adapter["source"] == ", ".join(sources)


def _options(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                yield from _options(sub)
        else:
            yield action


def test_every_option_that_is_a_path_expands_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    options = list(_options(_parser()))
    assert not [action.dest for action in options if action.type is Path]
    paths = [action for action in options if action.type is user_path]
    assert {"engine", "image", "out", "images", "prompts", "instructions", "api_key_file", "timing_cache", "plot"} <= {
        action.dest for action in paths
    }
    assert all(action.type("~/x") == Path("/home/someone/x") for action in paths if callable(action.type))
    assert user_path("~nobody-of-this-name/x") == Path("~nobody-of-this-name/x")
    scorers = _parser().parse_args(
        ["evaluate", "--out", "o", "--images", "i", "--prompts", "p", "--scorer", "clip=~/clip", "--scorer", "siglip=a/b"]
    )
    options_given = own_image_options(scorers)
    assert options_given is not None
    assert options_given.sources == {"clip": "/home/someone/clip", "siglip": "a/b"}


def test_an_engine_without_an_adapter_has_no_sliders(tmp_path: Path, image_file: Path, capsys: Any) -> None:
    code, _, _ = run(capsys, "build", "--base", "shapes-kontext", "--out", tmp_path / "frozen", "--quiet")
    assert code == 0
    arguments = ["edit", tmp_path / "frozen", "--image", image_file, "--slider", RED, "--out", tmp_path / "o.png"]
    assert "has no sliders" in refused(capsys, *arguments)


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("slideredit_rt.export.linked_weights.export_linked", full)
    message = refused(capsys, "build", "--base", "shapes-kontext", "--adapter", "shapes-st", "--out", tmp_path / "engine")
    assert "No space left on device" in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_build_leaves_nothing_that_loads(tmp_path: Path, capsys: Any, how: signal.Signals) -> None:
    out = tmp_path / "engine"
    command = [
        sys.executable,
        "-m",
        "slideredit_rt.cli",
        "build",
        "--base",
        "shapes-kontext",
        "--adapter",
        "shapes-st",
        "--out",
        str(out),
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    waited_for(lambda: list(tmp_path.glob(".engine.*.tmp")), 120)
    process.send_signal(how)
    process.wait(timeout=60)
    assert not out.exists()
    if how == signal.SIGTERM:
        assert list(tmp_path.iterdir()) == []
    assert "does not exist" in refused(capsys, "inspect", out)


def test_the_next_build_removes_what_a_killed_one_left(tmp_path: Path, capsys: Any) -> None:
    gone, alive = tmp_path / ".engine.999999999.tmp", tmp_path / f".engine.{os.getppid()}.tmp"
    for folder in (gone, alive):
        folder.mkdir()
    code, _, _ = run(
        capsys, "build", "--base", "shapes-kontext", "--adapter", "shapes-st", "--out", tmp_path / "engine", "--quiet"
    )
    assert code == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == [alive.name, "engine"]


@pytest.mark.parametrize("arguments", [["inspect", "nowhere"], ["serve", "--port", "70000"]])
def test_the_callers_handler_of_sigterm_is_restored(arguments: list[str], capsys: Any) -> None:
    def own(signum: int, frame: Any) -> None:
        raise AssertionError("never sent")

    before = signal.signal(signal.SIGTERM, own)
    try:
        assert main(arguments) == 2
        assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_help_of_build_names_every_backend_and_lowering(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "500")  # a narrower help text is wrapped at the hyphen of tensorrt-rtx
    with pytest.raises(SystemExit):
        main(["build", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    listed = re.search(r"execution backend: (.*?) \(default", text)
    assert listed is not None
    assert re.split(", | or ", listed[1]) == list(BACKENDS)
    lowerings = re.search(r"--lowering \{(.*?)\}", text)
    assert lowerings is not None
    assert set(lowerings[1].split(",")) == {"auto", *(name for backend in BACKENDS.values() for name in backend.lowerings)}


def test_debug_shows_the_traceback(tmp_path: Path, capsys: Any) -> None:
    code, _, err = run(capsys, "inspect", tmp_path / "x", "--debug")
    assert code == 2
    assert "Traceback" in err


def in_a_process(*arguments: object, **options: Any) -> subprocess.CompletedProcess[bytes]:
    """The command as a shell runs it; `options` of `subprocess.run`."""
    command: list[str | bytes] = [sys.executable, "-m", "slideredit_rt.cli", *map(os.fsencode, map(str, arguments))]
    done: subprocess.CompletedProcess[bytes] = subprocess.run(
        command, stderr=subprocess.PIPE, timeout=120, check=False, **options
    )
    return done


def test_a_full_or_closed_standard_output(engines: dict[str, Path]) -> None:
    command = ("inspect", engines["st"])
    with open("/dev/full", "wb") as full:
        done = in_a_process(*command, stdout=full)
    assert (done.returncode, done.stderr.count(b"\n")) == (2, 1)
    assert b"cannot write to standard output: No space left on device" in done.stderr

    reader, writer = os.pipe()
    os.close(reader)
    done = in_a_process(*command, stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")

    done = in_a_process(*command, preexec_fn=lambda: os.close(1))
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_standard_output_that_is_not_utf8_shows_codes(tmp_path: Path) -> None:
    spans = ("spans", "--slider", "mach es größer …")
    done = in_a_process(*spans, stdout=subprocess.PIPE, env=os.environ | {"PYTHONIOENCODING": "latin-1"})
    assert done.returncode == 0
    assert "größer \\u2026".encode("latin-1") in done.stdout


def test_arguments_that_are_not_utf8(engines: dict[str, Path], image_file: Path, tmp_path: Path, capsys: Any) -> None:
    base = ("edit", engines["st"], "--steps", 1, "--slider", RED)
    out = tmp_path / os.fsdecode(b"caf\xe9.png")
    code, text, _ = run(
        capsys, *base, "--image", image_file.rename(tmp_path / os.fsdecode(b"\xe9.png")), "--out", out, "--json"
    )
    assert code == 0
    assert Path(json.loads(text)["out"]) == out
    assert Image.open(out).size == (64, 64)
    message = refused(capsys, *base[:-1], os.fsdecode(b"make it r\xe9d"), "--image", out, "--out", tmp_path / "o.png")
    assert "is not a character; encode it in UTF-8" in message


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1, 10**40])
def test_seeds_beyond_what_torch_takes(
    engines: dict[str, Path], image_file: Path, tmp_path: Path, capsys: Any, seed: int
) -> None:
    out = tmp_path / "o.png"
    message = refused(
        capsys, "edit", engines["st"], "--image", image_file, "--slider", RED, "--steps", 1, "--seed", seed, "--out", out
    )
    assert f"the seed is {seed}" in message
    assert not out.exists()
    train = ("train", "adapter", "--kind", "st", "--seed", seed, "--out", tmp_path / "a.safetensors")
    assert f"seed is {seed}" in refused(capsys, *train)


def test_the_largest_and_the_smallest_seed(st_editor: SliderEditor) -> None:
    first, last = (
        st_editor.family.draw_noise(st_editor.pipeline, 64, 64, seed).flatten()[0].item() for seed in (-(2**63), 2**64 - 1)
    )
    expected = [
        torch.randn(8, 16, 16, generator=torch.Generator().manual_seed(s))[0, 0, 0].item() for s in (-(2**63), 2**64 - 1)
    ]
    assert [first, last] == expected


@pytest.mark.parametrize("threads", [0, -1, 10_000])
def test_a_number_of_threads_that_makes_no_sense(
    engines: dict[str, Path], image_file: Path, tmp_path: Path, capsys: Any, threads: int
) -> None:
    message = refused(
        capsys, "edit", engines["st"], "--image", image_file, "--slider", RED, "--threads", threads, "--out", tmp_path / "o.png"
    )
    assert f"{threads} CPU threads; pass 1 to 1024" in message


@pytest.mark.parametrize(
    ("text", "prompt", "expected"),
    [
        ("write 1+1=2", None, ("write 1+1", 2.0)),
        ("write 1+1=2", "write 1+1=2 on the board", ("write 1+1=2", 1.0)),
        ("write 1+1=2=0.5", "write 1+1=2 on the board", ("write 1+1=2", 0.5)),
        ("write 1+1=2", "write 1+1 on the board", ("write 1+1", 2.0)),
        ("write 1+1=2", "write 1+1=25 on the board", ("write 1+1", 2.0)),
        ("write a=b", "write a=b and smile", ("write a=b", 1.0)),
        ("write 1:2:3=1:2:3", "write 1:2:3=1:2:3", ("write 1:2:3=1:2:3", 1.0)),
    ],
)
def test_the_prompt_decides_what_an_equals_sign_means(text: str, prompt: str | None, expected: tuple[str, float]) -> None:
    for slider in (parse_slider(text, prompt), parse_swept_slider(text, prompt)[0]):
        assert (slider.instruction, slider.strength) == expected


def test_a_sweep_of_an_instruction_with_an_equals_sign() -> None:
    slider, strengths = parse_swept_slider("write 1+1=2=0:1:3", "write 1+1=2")
    assert (slider.instruction, strengths) == ("write 1+1=2", [0.0, 0.5, 1.0])


@pytest.mark.parametrize(
    ("given", "sources", "world"),
    [
        (None, [], "portraits"),
        (None, [None, "runs/my-kontext"], "portraits"),
        (None, [None, "shapes-st"], "shapes"),
        (None, [resolve_base("shapes-kontext"), "runs/my-st.safetensors"], "shapes"),
        ("shapes", ["runs/my-kontext"], "shapes"),
    ],
)
def test_embedded_sources_say_the_world(given: str | None, sources: list[str | Path | None], world: str) -> None:
    assert choose_world(given, sources) == world


@pytest.mark.parametrize(
    "command",
    [
        ["evaluate", "--world", "portraits", "--adapter", "shapes-st"],
        ["evaluate", "--base", "portraits-kontext", "--adapter", "shapes-st"],
        ["train", "adapter", "--kind", "st", "--world", "portraits", "--base", "shapes-kontext"],
        ["train", "editor", "--world", "portraits", "--from", "shapes-kontext"],
    ],
)
def test_worlds_are_not_mixed(command: list[str], tmp_path: Path, capsys: Any) -> None:
    message = refused(capsys, *command, "--out", tmp_path / "out")
    assert "belongs to the world 'shapes', not to 'portraits'; use one world for everything" in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            ["build", "--base", "shapes-st", "--adapter", "shapes-st"],
            "'shapes-st' is an adapter, not an editor; pass a path or",
        ),
        (
            ["build", "--base", "shapes-kontext", "--adapter", "shapes-kontext"],
            "is an editor, not an adapter; pass a path or one",
        ),
        (
            ["evaluate", "--adapter", "shapes-st", "--concepts", "shapes-offsets"],
            "is a file of attribute offsets, not an adapter",
        ),
        (
            ["evaluate", "--adapter", "shapes-st", "--offsets", "shapes-concepts"],
            "is an adapter, not a file of attribute offsets",
        ),
    ],
)
def test_an_embedded_name_in_the_wrong_place_is_said_to_be_what_it_is(
    command: list[str], message: str, tmp_path: Path, capsys: Any
) -> None:
    assert message in refused(capsys, *command, "--out", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
