"""A manifest that anybody may have written: read, or refused in one sentence, and nothing outside of the folder is opened."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from slideredit_rt.cli import main
from slideredit_rt.engines import BuildSettings, read_manifest
from slideredit_rt.engines.manifest import MAX_BATCH, MAX_SLIDERS, NAME, SCHEMA_VERSION
from slideredit_rt.errors import SliderEditError
from slideredit_rt.export.build import build_engine
from slideredit_rt.files import cache_directory

ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    10**9,
    10**400,
    1.5,
    "",
    "..",
    "../../secret",
    "/etc/passwd",
    "a\0b",
    "\x1b[31m",
    "\ud800",
    "x" * 100_000,
    [],
    [[]],
    {},
    {"../../secret": {"sha256": "0" * 64, "bytes": 6, "kind": "hard"}},
    {"": {"sha256": "0" * 64, "bytes": 6, "kind": "hard"}},
    {"..": {"sha256": "0" * 64, "bytes": 6, "kind": "hard"}},
    ["batch", None],
]


@pytest.fixture
def engine(engines: dict[str, Path], tmp_path: Path) -> Path:
    (tmp_path / "secret").write_text("secret")
    shutil.copytree(engines["gst"], tmp_path / "there" / "engine", copy_function=os.link)
    (tmp_path / "there" / "engine" / NAME).unlink()
    return tmp_path / "there" / "engine"


@pytest.fixture
def manifest(engines: dict[str, Path]) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((engines["gst"] / NAME).read_text())
    return data


def places(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to each value in a JSON document."""
    for key, value in data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ():
        yield (*path, key)
        yield from places(value, (*path, key))


def changed(data: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    new = copy.deepcopy(data)
    parent = new
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = value
    return new


def test_the_manifest_of_a_build_is_read(engine: Path, manifest: dict[str, Any]) -> None:
    (engine / NAME).write_text(json.dumps(manifest))
    assert json.loads(json.dumps(read_manifest(engine).to_json())) == manifest


def test_any_value_in_any_place_is_read_or_refused_and_no_other_file_is_opened(
    engine: Path, manifest: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: set[Path] = set()
    real = Path.open

    def watch(path: Path, *arguments: Any, **options: Any) -> Any:
        opened.add(path)
        return real(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", watch)
    generator = random.Random(0)
    ways = list(places(manifest))
    found, messages = [], []
    for way in ways:
        for value in generator.sample(ODD, 5):
            (engine / NAME).write_text(json.dumps(changed(manifest, way, value)))
            try:
                found.append(read_manifest(engine))
            except SliderEditError as error:
                messages.append(str(error))
    assert len(messages) > len(ways)
    assert all("build the engine again" in message and len(message) < 1000 for message in messages)
    # What may say anything: texts, and what a configuration or a training record holds.
    assert all(1 <= one.max_batch <= MAX_BATCH and 1 <= one.max_sliders <= MAX_SLIDERS for one in found)
    assert all({*one.files, *one.links} <= {*manifest["files"], *manifest["links"]} for one in found)
    assert {path.parent for path in opened} <= {engine, cache_directory() / "digests"}


@pytest.mark.parametrize("field", ["files", "links"])
@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", "..", ".", "", "a/../../../secret", "..\\secret", "s\0"])
def test_a_file_outside_of_the_folder_is_neither_opened_nor_measured(
    engine: Path, manifest: dict[str, Any], field: str, name: str
) -> None:
    for size in (5, 6):
        manifest[field] |= {name: {"sha256": "0" * 64, "bytes": size} | ({"kind": "hard"} if field == "links" else {})}
        (engine / NAME).write_text(json.dumps(manifest))
        with pytest.raises(
            SliderEditError, match=rf"is damaged \(a name in the manifest\.{field} is .*; build the engine again"
        ):
            read_manifest(engine)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_batch": 10**9}, "max_batch is 1000000000, expected a whole number from 1 to 1024"),
        ({"max_sliders": 8.0}, "max_sliders is 8.0, expected a whole number from 1 to 256"),
        ({"max_batch": True}, "max_batch is True"),
        ({"targets": "sm90"}, "targets is 'sm90', expected a list"),
        ({"dtype": "cuda"}, "dtype is 'cuda', expected one of"),
        ({"ranges": {"batch": [4, 1, 2]}}, "three numbers in ascending order"),
        ({"ranges": {"width": [1, 1, 2]}}, "a name in the manifest.ranges is 'width'"),
        ({"ranges": {"batch": [1, 2]}}, "a list of 3 to 3"),
        ({"config": {}}, "config lacks what a flux_kontext needs"),
        ({"config": []}, "config is"),
        ({"inputs": []}, "inputs is"),
        ({"surplus": 1}, "the unknown entry 'surplus'"),
        ({"created": "\x1b]0;title\x07"}, "created is"),
    ],
)
def test_a_value_out_of_bounds_is_named(engine: Path, manifest: dict[str, Any], changes: Any, message: str) -> None:
    (engine / NAME).write_text(json.dumps(manifest | changes))
    with pytest.raises(SliderEditError) as error:
        read_manifest(engine)
    assert message in str(error.value)


def test_a_config_of_another_size_does_not_fit_the_inputs(engine: Path, manifest: dict[str, Any]) -> None:
    manifest["config"]["in_channels"] += 1
    (engine / NAME).write_text(json.dumps(manifest))
    with pytest.raises(SliderEditError, match="are not those that this version gives a flux_kontext with this config"):
        read_manifest(engine)


@pytest.mark.parametrize(
    "text",
    [
        '{"schema_version":' + "[" * 100_000,
        f'{{"schema_version": {SCHEMA_VERSION}, "family": ' + "[" * 200 + "]" * 200 + "}",
        "[]",
        "",
        '{"schema_version": 1e999}',
        '{"schema_version": NaN}',
        '{"schema_version": ' + "9" * 10_000 + "}",
        "{}",
        "\ufeff{}",
        '{"schema_version": {"a": []}}',
    ],
)
def test_json_that_is_no_manifest_is_refused(engine: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    (engine / NAME).write_text(text)
    assert main(["inspect", str(engine)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "build the engine again" in error


def test_a_pipe_is_not_waited_for(engine: Path, manifest: dict[str, Any]) -> None:
    os.mkfifo(engine / NAME)
    with pytest.raises(SliderEditError, match="not a regular file"):
        read_manifest(engine)
    (engine / NAME).unlink()
    (engine / NAME).write_text(json.dumps(manifest))
    (engine / "model.onnx").unlink()
    os.mkfifo(engine / "model.onnx")
    with pytest.raises(SliderEditError, match=r"lacks the file model\.onnx"):
        read_manifest(engine)


@pytest.mark.parametrize(
    ("limits", "message"), [({"batch": (1, 1, MAX_BATCH + 1)}, "at most 1024"), ({"max_sliders": MAX_SLIDERS + 1}, "1 to 256")]
)
def test_no_engine_is_built_that_could_not_be_read(tmp_path: Path, limits: Any, message: str) -> None:
    with pytest.raises(SliderEditError, match=message):
        build_engine("shapes-kontext", "shapes-st", tmp_path / "engine", BuildSettings(**limits), progress=False)
