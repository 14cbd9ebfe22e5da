"""The scripts of examples/ run as they are and write what they say."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

FOLDER = Path(__file__).parents[1] / "examples"
PORTRAIT = FOLDER.parent / "docs" / "portrait.png"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the scripts run, one after the other: the first builds the engine that the others open."""
    return tmp_path_factory.mktemp("examples")


def run(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")


def differs_from_portrait(path: Path) -> bool:
    edited, source = (np.asarray(Image.open(file).convert("RGB")).astype(int) for file in (path, PORTRAIT))
    return bool(edited.shape == source.shape and np.abs(edited - source).max() > 50)


@pytest.mark.parametrize(
    ("name", "image"), [("edit_image", "edited.png"), ("serve_and_call", "served.png"), ("own_adapter", "own.png")]
)
def test_an_example_edits_the_portrait(name: str, image: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(name, folder, monkeypatch)
    assert differs_from_portrait(folder / image)


def test_the_sweep_draws_a_strip_and_a_grid(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("sweep_and_grid", folder, monkeypatch)
    strip, grid = (Image.open(folder / name) for name in ("strip.png", "grid.png"))
    assert strip.width > 4 * 128
    assert grid.height > 2 * strip.height


def test_the_export_names_every_input(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run("export_for_triton_server", folder, monkeypatch)
    assert {"alpha", "token_mask", "hidden_states"} <= set(capsys.readouterr().out.split())
    assert (folder / "model_repository" / "slider_backbone" / "config.pbtxt").exists()


def test_the_kernel_equals_its_formula(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run("call_a_kernel", folder, monkeypatch)
    assert "bit for bit: True" in capsys.readouterr().out


def test_the_table_has_every_example() -> None:
    listed = set(re.findall(r"\((\w+)\.py\)", (FOLDER / "README.md").read_text()))
    assert listed == {file.stem for file in FOLDER.glob("*.py")}
    tests = Path(__file__).read_text()
    assert all(f'"{name}"' in tests for name in listed)
