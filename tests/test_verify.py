"""Verification: what passes, what does not, per dtype."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from slideredit_rt import cli
from slideredit_rt.editor import SliderEditor
from slideredit_rt.engines import open_engine
from slideredit_rt.engines.manifest import describe_files, read_manifest, write_manifest
from slideredit_rt.sliders import Slider
from slideredit_rt.verify import ALPHAS, Comparison, Verification, compare, compare_backbones, verify_engine

RED = "make the circle red"


@pytest.fixture(scope="module")
def eager() -> SliderEditor:
    return SliderEditor.from_pretrained("shapes-kontext", "shapes-gst")


@pytest.fixture(scope="module")
def bfloat16() -> SliderEditor:
    """Eager in bfloat16; stands for an engine, since nothing on a CPU runs a compiled one."""
    return SliderEditor.from_pretrained("shapes-kontext", "shapes-gst", dtype=torch.bfloat16)


def verified(eager: SliderEditor, engine: Any, same_dtype: Any, scene: Any) -> Verification:
    parts = eager.family, eager.pipeline, engine, eager.config, eager.controls
    editor = SliderEditor(*parts, max_batch=4, max_sliders=8)
    prepared = eager.prepare(scene, ["make the circle red"])
    return Verification("bfloat16", compare_backbones(editor, eager.engine, same_dtype, prepared), {})


def test_half_precision_passes_when_it_errs_as_eager_does(eager: SliderEditor, bfloat16: SliderEditor, scene: Any) -> None:
    report = verified(eager, bfloat16.engine, bfloat16.engine, scene)
    assert report.passed
    assert len(report.comparisons) == 2 * (len(ALPHAS) + 1)
    assert all(1e-3 < c.relative_rms == c.same_dtype_rms for c in report.comparisons)
    assert report.max_abs_error > 1e-3, "a float32 limit would refuse it"
    assert report.verdict == "passed: the error is 1.00 times that of eager bfloat16, limit 2"


def test_half_precision_fails_when_it_errs_more_than_twice_as_much(
    eager: SliderEditor, bfloat16: SliderEditor, scene: Any
) -> None:
    def worse(inputs: Any) -> torch.Tensor:
        y = eager.engine(inputs)
        return y + 3 * (bfloat16.engine(inputs).float() - y)

    report = verified(eager, worse, bfloat16.engine, scene)
    assert not report.passed
    assert report.verdict.startswith("FAILED: the error is 3.0")


def test_half_precision_fails_when_one_row_of_a_mixed_batch_is_anothers(
    eager: SliderEditor, bfloat16: SliderEditor, scene: Any
) -> None:
    def swapped(inputs: Any) -> torch.Tensor:
        alpha = inputs["alpha"].roll(1, 0)
        return bfloat16.engine(inputs | {"alpha": alpha})

    report = verified(eager, swapped, bfloat16.engine, scene)
    assert {c.case for c in report.comparisons if not c.passed} == {"real inputs, mixed batch", "random inputs, mixed batch"}


@pytest.mark.parametrize(("error", "passed"), [(0.9e-4, True), (1.1e-4, False)])
def test_float32_has_an_absolute_limit(error: float, passed: bool) -> None:
    expected = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    actual = expected.clone()
    actual[1, 2, 3] += error
    found = compare("case", actual, expected)
    assert (found.same_dtype_rms, found.passed) == (None, passed)
    assert found.max_abs_error == pytest.approx(error)


def test_a_not_a_number_never_passes() -> None:
    nan = torch.full((2,), float("nan"))
    assert not compare("case", nan, torch.ones(2)).passed
    assert not compare("case", nan, torch.ones(2), same_dtype=torch.ones(2) * 1.01).passed


def test_one_not_a_number_among_figures_is_the_worst_of_them_and_null_in_json() -> None:
    nan = float("nan")
    for order in (slice(None), slice(None, None, -1)):
        cases = [Comparison("a", 1.0, 2e-3, 1e-3), Comparison("b", nan, nan, 1e-3)][order]
        report = Verification("bfloat16", cases, {"alpha +0.00": nan})
        assert report.verdict == "FAILED: the error is nan times that of eager bfloat16, limit 2"
        data = report.to_json()
        json.dumps(data, allow_nan=False)
        assert (data["max_abs_error"], data["passed"], data["psnr"]) == (None, False, {"alpha +0.00": None})
        assert {c["case"]: (c["relative_rms"], c["passed"]) for c in data["comparisons"]} == {
            "a": (2e-3, True),
            "b": (None, False),
        }


def test_json_has_every_figure() -> None:
    report = Verification("float32", [Comparison("a", 1e-5, 1e-6)], {"alpha +0.00": float("inf")})
    data = json.loads(json.dumps(report.to_json()))
    assert (data["dtype"], data["passed"], data["max_abs_error"], data["psnr"]) == (
        "float32",
        True,
        1e-5,
        {"alpha +0.00": None},
    )


def test_command_fails_for_an_engine_whose_adapter_file_was_swapped(
    engines: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 1 and not 2: the input was fine, the engine is not."""
    for file in engines["st"].iterdir():
        (tmp_path / file.name).hardlink_to(file)
    manifest = read_manifest(tmp_path)
    data = (tmp_path / "adapter.safetensors").read_bytes()
    (tmp_path / "adapter.safetensors").unlink()
    (tmp_path / "adapter.safetensors").write_bytes(data[:-4000] + bytes(4000))  # zeros in the last B
    (tmp_path / "manifest.json").unlink()
    write_manifest(dataclasses.replace(manifest, files=describe_files(tmp_path, list(manifest.files))), tmp_path)
    assert cli.main(["verify", str(tmp_path)]) == 1
    assert "FAILED: max abs" in capsys.readouterr().out


def test_command_holds_a_half_precision_engine_against_eager_in_its_dtype(
    engines: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A float32 engine under the name of a bfloat16 one errs less than bfloat16 does."""
    for file in engines["gst"].iterdir():
        if file.name != "manifest.json":
            (tmp_path / file.name).hardlink_to(file)
    write_manifest(dataclasses.replace(read_manifest(engines["gst"]), dtype="bfloat16"), tmp_path)
    assert cli.main(["verify", str(tmp_path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["dtype"], report["passed"]) == ("bfloat16", True)
    assert all(c["relative_rms"] < 1e-4 < 1e-3 < c["same_dtype_rms"] for c in report["comparisons"])


def link_engine(engine: Path, path: Path, **changes: Any) -> None:
    """Link the files of an engine into another folder, with a changed manifest."""
    for file in engine.iterdir():
        if file.name != "manifest.json":
            (path / file.name).hardlink_to(file)
    write_manifest(dataclasses.replace(read_manifest(engine), **changes), path)


def test_an_engine_whose_smallest_batch_is_above_one_gets_no_smaller_one(
    engines: dict[str, Path], tmp_path: Path, scene: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    link_engine(engines["gst"], tmp_path, ranges={"batch": [3, 3, 4]}, max_batch=4)
    given: set[int] = set()

    def open_and_count(*args: Any) -> tuple[Any, Any]:
        manifest, engine = open_engine(*args)

        class Counted:
            device = engine.device

            def __call__(self, inputs: Any) -> torch.Tensor:
                given.add(len(inputs["alpha"]))
                return engine(inputs)

        return manifest, Counted()

    monkeypatch.setattr("slideredit_rt.verify.open_engine", open_and_count)
    report = verify_engine(tmp_path, scene, [Slider(RED)], steps=2)
    assert given == {3, 4}
    assert report.passed
    assert report.psnr == verify_engine(engines["gst"], scene, [Slider(RED)], steps=2).psnr


def test_alphas_are_compared_whatever_strengths_a_curve_calls_them(
    engines: dict[str, Path], tmp_path: Path, scene: Any
) -> None:
    manifest = read_manifest(engines["gst"])
    curve = {"strengths": [0.0, 1.0], "alphas": [0.25, 0.75]}
    link_engine(engines["gst"], tmp_path, adapter=(manifest.adapter or {}) | {"strength_curve": curve})
    plain, curved = (verify_engine(path, scene, [Slider(RED)], steps=2) for path in (engines["gst"], tmp_path))
    assert plain.passed
    assert curved.psnr == plain.psnr
