"""The wheel, built from the Docker build context: it holds the package and runs where there is no repository."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from zipfile import ZipFile

import httpx
import pytest

import slideredit_rt

ROOT = Path(__file__).parents[1]
CONTEXT = ROOT / "deploy/docker/Dockerfile.dockerignore"
LARGEST = 2500 * 10**6  # bytes of an environment that can run the demo
LARGEST_WHEEL = 20 * 10**6  # bytes


def environment(cache: Path) -> dict[str, str]:
    """The variables of a process that must find the package where it was installed, and its caches in `cache`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "SLIDEREDIT", "TRITON"))}
    return {**kept, "XDG_CACHE_HOME": str(cache)}


def output(*command: str | Path, folder: Path) -> str:
    """What a command prints that runs in `folder`."""
    line = [str(part) for part in command]
    done = subprocess.run(line, cwd=folder, env=environment(folder), stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.strip()


def context(folder: Path) -> Path:
    """Copy to `folder` what a Docker build gets to see."""
    ignored, *rules = [line for line in CONTEXT.read_text().splitlines() if line and not line.startswith("#")]
    assert ignored == "*"
    folder.mkdir()
    for name in [rule[1:] for rule in rules if rule.startswith("!")]:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    offline = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    sources = context(folder / "context")
    output(sys.executable, "-m", "pip", "wheel", *offline, "--wheel-dir", folder, sources, folder=folder)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_every_file_but_the_shapes_editor(wheel: Path) -> None:
    rooms = {"slideredit_rt": "*", "kernels": "*", "export": "*", "bench": "*.py"}
    expected = {
        file.relative_to(ROOT) if room == "slideredit_rt" else Path("slideredit_rt") / file.relative_to(ROOT)
        for room, pattern in rooms.items()
        for file in (ROOT / room).rglob(pattern)
        if file.is_file() and "__pycache__" not in file.parts and "assets/shapes-" not in file.as_posix()
    }
    with ZipFile(wheel) as archive:
        held = {Path(name) for name in archive.namelist() if ".dist-info/" not in name}
    assert len(expected) > 150
    assert held == expected
    assert wheel.stat().st_size <= LARGEST_WHEEL
    assert wheel.name == f"slideredit_rt-{slideredit_rt.__version__}-py3-none-any.whl"


PROGRAM = """
from fastapi import FastAPI
from slideredit_rt import cli
from slideredit_rt.kernels import configurations
from slideredit_rt.samples import SAMPLES
from slideredit_rt.serving.static import serve_page

assert cli.main(["adapter", "show", "portraits-st", "--base", "portraits-kontext", "--json"]) == 0
assert cli.main(["spans", "--slider", "make the hair red", "--json"]) == 0
assert configurations.table()
serve_page(app := FastAPI(), SAMPLES["portraits"])
print(cli.__file__, *(route.path for route in app.routes))
"""


def test_an_installed_wheel_finds_its_files_from_anywhere(wheel: Path, tmp_path: Path) -> None:
    """In an environment that has the wheel and, through a .pth file, the dependencies of this one."""
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env/bin/python"
    install = ("-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--quiet")
    output(sys.executable, *install, wheel, folder=tmp_path)
    (packages,) = (tmp_path / "env/lib").glob("python*/site-packages")
    (packages / "dependencies.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))

    version = output(tmp_path / "env/bin/slideredit-rt", "--version", folder=tmp_path)
    assert version == f"slideredit-rt {slideredit_rt.__version__}"
    adapter, spans, found = output(python, "-c", PROGRAM, folder=tmp_path).splitlines()
    assert json.loads(adapter)["kind"] == "st"
    assert json.loads(spans)["text_rows"] == 24
    module, *routes = found.split()
    assert module == f"{packages}/slideredit_rt/cli.py"
    assert {"/", "/app.js", "/style.css", "/docs", "/swagger-ui.css"} <= set(routes)


@contextmanager
def serving(command: Path, folder: Path) -> Iterator[str]:
    """Start a server of the embedded engine in `folder`; yields its address."""
    arguments = [str(command), "serve", "--port", "0", "--json", "--quiet"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, cwd=folder, env=environment(folder)) as process:
        try:
            assert process.stdout is not None
            yield json.loads(process.stdout.readline())["url"]
        finally:
            process.terminate()


@pytest.mark.slow
def test_a_wheel_in_an_empty_environment_runs_the_demo_and_serves(wheel: Path, tmp_path: Path) -> None:
    """With its dependencies installed by pip, in the versions that the tests run with."""
    venv.create(tmp_path / "env", with_pip=True)
    pip = (tmp_path / "env/bin/python", "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt")
    started = time.perf_counter()
    for wanted in ("torch", f"{wheel}[serve]"):
        output(*pip, wanted, folder=tmp_path)
    installed = time.perf_counter()
    command = tmp_path / "env/bin/slideredit-rt"
    output(command, "demo", "--out", "demo", "--quiet", folder=tmp_path)
    finished = time.perf_counter()

    assert {"strip.png", "grid.png", "report.json"} <= {file.name for file in (tmp_path / "demo").iterdir()}
    size = sum(file.lstat().st_size for file in (tmp_path / "env").rglob("*"))
    sys.stdout.write(f"\ninstalled in {installed - started:.0f} s, {size / 1e9:.2f} GB; demo {finished - installed:.0f} s\n")
    assert size <= LARGEST
    with serving(command, tmp_path) as url, httpx.Client(base_url=url, timeout=120, trust_env=False) as client:
        assert client.get("/").status_code == 200
        sample = {"image": ("sample.png", client.get("/sample.png").content, "image/png")}
        sliders = json.dumps([{"instruction": "make the hair red", "strength": 0.5}])
        assert client.post("/v1/images/edits", files=sample, data={"sliders": sliders}).status_code == 200
