"""The rooms of the package: which imports which, and what a new backend takes."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from toy_backend import Toy

from slideredit_rt import cli
from slideredit_rt.engines import BACKENDS, read_manifest

ROOT = Path(__file__).parents[1]
ROOMS = {
    "slideredit_rt": ROOT / "slideredit_rt",
    "slideredit_rt.kernels": ROOT / "kernels",
    "slideredit_rt.export": ROOT / "export",
    "slideredit_rt.bench": ROOT / "bench",
}


def modules() -> dict[str, Path]:
    """Every module of the package, by name."""
    found = {}
    for room, folder in ROOMS.items():
        for file in folder.rglob("*.py"):
            parts = file.relative_to(folder).with_suffix("").parts
            found[".".join((room, *parts)).removesuffix(".__init__")] = file
    return found


def at_import(body: list[ast.stmt]) -> Iterator[ast.Import | ast.ImportFrom]:
    """Imports that run when the module is imported."""
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            yield from at_import(node.orelse)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for name in ("body", "orelse", "finalbody"):
                yield from at_import(getattr(node, name, []))
            for handler in getattr(node, "handlers", []):
                yield from at_import(handler.body)


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    """Module to the modules of the package that it imports when it is imported."""
    known = modules()
    edges: dict[str, set[str]] = {name: set() for name in known}
    for name, file in known.items():
        for node in at_import(ast.parse(file.read_text()).body):
            if isinstance(node, ast.Import):
                wanted = [alias.name for alias in node.names]
            else:
                assert node.level == 0, f"{name} imports relatively"
                below = [f"{node.module}.{alias.name}" for alias in node.names]
                # `from package import module` imports the module; other names come from the package itself.
                wanted = [one if one in known else str(node.module) for one in below]
            edges[name] |= {one for one in wanted if one in known and one != name}
    return edges


def reached(graph: dict[str, set[str]], start: str) -> set[str]:
    """What `start` imports, and what that imports in turn."""
    found: set[str] = set()
    waiting = list(graph[start])
    while waiting:
        if (module := waiting.pop()) not in found:
            found.add(module)
            waiting += graph[module]
    return found


def test_no_modules_import_each_other_in_a_circle(graph: dict[str, set[str]]) -> None:
    below = {name: reached(graph, name) for name in graph}
    circles = {frozenset({name, *(one for one in below[name] if name in below[one])}) for name in graph if name in below[name]}
    assert len(graph) > 100
    assert circles == set()


@pytest.mark.parametrize("start", ["slideredit_rt.engines", "slideredit_rt.editor"])
def test_opening_an_engine_imports_nothing_that_builds_one(graph: dict[str, set[str]], start: str) -> None:
    found = reached(graph, start)
    assert "slideredit_rt.engines.tensorrt.engine" in found
    assert not [name for name in found if name.startswith(("slideredit_rt.export", "slideredit_rt.bench"))]


def test_a_new_backend_is_one_file_and_one_line(
    tmp_path: Path, scene: Image.Image, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(BACKENDS, Toy.name, Toy())
    engine, image = tmp_path / "engine", tmp_path / "scene.png"
    build = ["build", "--base", "shapes-kontext", "--adapter", "shapes-st", "--quiet"]
    assert cli.main([*build, "--backend", "toy", "--out", str(engine)]) == 0
    manifest = read_manifest(engine)
    assert (manifest.backend, manifest.lowering, manifest.updates) == ("toy", "operator", {"operator": 12})

    scene.save(image)
    given = ["--image", str(image), "--slider", "make the circle red=0.5", "--steps", "2", "--quiet"]
    assert cli.main(["edit", str(engine), *given, "--out", str(tmp_path / "toy.png")]) == 0
    assert cli.main([*build, "--out", str(tmp_path / "usual")]) == 0
    assert cli.main(["edit", str(tmp_path / "usual"), *given, "--out", str(tmp_path / "usual.png")]) == 0
    toy, usual = (np.asarray(Image.open(tmp_path / f"{name}.png")).astype(int) for name in ("toy", "usual"))
    assert np.abs(toy - usual).max() <= 1
    assert np.abs(toy - np.asarray(scene)).max() > 50, "it did edit"

    capsys.readouterr()
    assert cli.main([*build, "--backend", "openvino", "--out", str(tmp_path / "none")]) == 2
    assert "known: inductor, onnxruntime, tensorrt, tensorrt-rtx, toy" in capsys.readouterr().err
    assert cli.main([*build, "--backend", "toy", "--lowering", "folded", "--out", str(tmp_path / "none")]) == 2
    assert "the backend toy does not support the lowering 'folded'; use --lowering operator" in capsys.readouterr().err
    assert cli.main([*build, "--backend", "toy", "--resolution", "64", "--out", str(tmp_path / "none")]) == 2
    assert "--resolution is for --backend tensorrt or tensorrt-rtx" in capsys.readouterr().err
    assert cli.main(["edit", str(engine), *given, "--cuda-graphs", "off", "--out", str(tmp_path / "o.png")]) == 2
    assert "engines take no run options" in capsys.readouterr().err
    assert cli.main(["export-triton", str(engine), "--out", str(tmp_path / "models")]) == 2
    assert "build it with --backend onnxruntime or tensorrt" in capsys.readouterr().err


# Signatures that others fix: the released pipeline's, TensorRT's for a plugin, and those of Triton kernels and their launches.
FIXED_SIGNATURES = {
    "slideredit_rt.compat.__call__",
    "slideredit_rt.export.tensorrt_plugin.implement",
    "slideredit_rt.families.flux2_kv.__call__",  # diffusers finds the arguments of attention processors by their names
}


def test_functions_are_short_and_take_few_arguments() -> None:
    long, wide = [], []
    for module, file in modules().items():
        if module.startswith("slideredit_rt.bench"):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            name = f"{module}.{node.name}"
            given = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            documented = ast.get_docstring(node, clean=False)
            if (node.end_lineno or node.lineno) - node.lineno - (documented or "").count("\n") >= 60:
                long.append(name)
            if len(given) - (given[:1] in (["self"], ["cls"])) > 7 and not module.startswith("slideredit_rt.kernels.triton_"):
                wide.append(name)
    assert long == []
    assert set(wide) <= FIXED_SIGNATURES
