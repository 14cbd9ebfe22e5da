"""`slideredit-rt adapter replace`: the new adapter's results without a build, and never half of a pair."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import refused

from slideredit_rt.adapters import Adapter, load_adapter, save_adapter
from slideredit_rt.assets import resolve_adapter
from slideredit_rt.cli import main
from slideredit_rt.engines import open_engine
from slideredit_rt.engines.manifest import ADAPTER_FILE, describe_files, read_manifest
from slideredit_rt.engines.tensorrt import PLAN_FILE
from slideredit_rt.errors import SliderEditError
from slideredit_rt.export.onnx_graph import example_inputs
from slideredit_rt.families import Family
from slideredit_rt.modules import SliderBackbone


@pytest.fixture
def engine(engines: dict[str, Path], tmp_path: Path, kind: str) -> Path:
    """A copy to change; its weights stay links to the checkpoint's."""
    shutil.copytree(engines[kind], tmp_path / "engine", copy_function=os.link)
    return tmp_path / "engine"


def like(adapter: Adapter, rank: int) -> Adapter:
    """A random adapter for the same modules."""
    g = torch.Generator().manual_seed(1)
    pairs = {
        name: (0.2 * torch.randn(rank, a.shape[1], generator=g), 0.2 * torch.randn(len(b), rank, generator=g))
        for name, (a, b) in adapter.pairs.items()
    }
    return dataclasses.replace(adapter, pairs=pairs, rank=rank, source="another", training={"steps": 7})


@pytest.fixture
def first(family: Family, kind: str) -> Adapter:
    return load_adapter(f"shapes-{kind}", family)


def saved(adapter: Adapter, folder: Path) -> str:
    save_adapter(adapter, folder / "new.safetensors")
    return str(folder / "new.safetensors")


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if not file.name.startswith(".")}


@torch.no_grad()
@pytest.mark.parametrize("less", [0, 3])
def test_the_engine_computes_with_the_new_adapter_and_describes_it(
    engine: Path, first: Adapter, family: Family, pipeline: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], less: int
) -> None:
    before, _ = open_engine(engine)
    old_session = open_engine(engine)[1]
    other = like(first, first.rank - less)
    backbone = SliderBackbone(family, pipeline.transformer.eval(), other)
    inputs = example_inputs(backbone, before.config, 2, 24, 128, 1)
    old = old_session(inputs).clone()
    source = saved(other, tmp_path)
    assert main(["adapter", "replace", str(engine), source, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    after, session = open_engine(engine)
    expected, found = backbone(inputs), session(inputs)
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert (found - old).abs().max() > 0.1
    assert torch.equal(old_session(inputs), old), "a session that was open keeps its adapter"
    assert printed["manifest"] == json.loads(json.dumps(after.to_json()))
    assert after.adapter == {
        "source": source,
        "fingerprint": other.fingerprint,
        "kind": first.kind,
        "rank": first.rank - less,
        "modules": len(first.pairs),
        "training": {"steps": 7},
        "strength_curve": {"strengths": [0.0, 1.0], "alphas": [1.0, 0.0]},
    }
    assert dataclasses.replace(after, adapter=before.adapter, files=before.files) == before


def test_the_first_adapter_comes_back_byte_for_byte_after_one_of_lower_rank(
    engine: Path, first: Adapter, tmp_path: Path, kind: str
) -> None:
    before = contents(engine)
    assert main(["adapter", "replace", str(engine), saved(like(first, 1), tmp_path)]) == 0
    assert contents(engine) != before
    assert main(["adapter", "replace", str(engine), f"shapes-{kind}"]) == 0
    assert contents(engine) == before


def test_verify_holds_the_engine_against_the_new_adapter(
    engine: Path, first: Adapter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = dataclasses.replace(first, pairs={name: (a, b * 0.5) for name, (a, b) in first.pairs.items()})
    assert main(["adapter", "replace", str(engine), saved(small, tmp_path)]) == 0
    assert main(["verify", str(engine)]) == 0
    assert "passed" in capsys.readouterr().out


def test_an_interruption_between_the_two_files_is_refused_and_repaired(
    engine: Path, first: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = saved(like(first, first.rank), tmp_path)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("slideredit_rt.export.replace.describe_files", stop)
        assert main(["adapter", "replace", str(engine), source]) == 130
    capsys.readouterr()
    assert "was changed after the build" in refused(capsys, "inspect", engine)
    with pytest.raises(SliderEditError, match="was changed after the build"):
        open_engine(engine)
    assert main(["adapter", "replace", str(engine), source]) == 0
    assert read_manifest(engine).files[ADAPTER_FILE] == describe_files(engine, [ADAPTER_FILE])[ADAPTER_FILE]


def test_adapters_that_do_not_fit_leave_the_engine_as_it_was(
    engine: Path, first: Adapter, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    before = contents(engine)
    fewer = dataclasses.replace(first, pairs=dict(list(first.pairs.items())[1:]))
    cases = {
        saved(like(first, first.rank + 1), tmp_path): "a higher rank",
        f"shapes-{'st' if kind == 'gst' else 'gst'}": "export again for it",
        str(tmp_path / "nothing.safetensors"): "does not exist",
    }
    for source, message in cases.items():
        assert message in refused(capsys, "adapter", "replace", engine, source)
    assert "which are not the same" in refused(capsys, "adapter", "replace", engine, saved(fewer, tmp_path))
    assert contents(engine) == before


def change_manifest(engine: Path, **changes: Any) -> None:
    file = engine / "manifest.json"
    text = json.dumps(json.loads(file.read_text()) | changes)
    file.unlink()
    file.write_text(text)


def test_engines_whose_adapter_lies_in_no_file_of_its_own(
    engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    replace = ("adapter", "replace", engine, resolve_adapter("shapes-st"))
    (engine / PLAN_FILE).write_bytes(b"plan")
    change_manifest(engine, backend="tensorrt-rtx", files=describe_files(engine, [PLAN_FILE]), links={})
    assert "because tensorrt-rtx compiled its adapter into the engine; build it again" in refused(capsys, *replace)
    change_manifest(engine, adapter=None)
    assert "was built without an adapter" in refused(capsys, *replace)
    assert "not an engine folder" in refused(capsys, "adapter", "replace", tmp_path, "shapes-st")


def test_another_damaged_file_of_the_engine_is_refused(engine: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    model = (engine / "model.onnx").read_bytes()
    (engine / "model.onnx").unlink()
    (engine / "model.onnx").write_bytes(model[:-1])
    assert "bytes instead of" in refused(capsys, "adapter", "replace", engine, f"shapes-{kind}")
