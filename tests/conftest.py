"""Shared fixtures: the embedded editor, its engines built once per process, a scene to edit, and a server."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

if (processes := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))) > 1:
    # Read when torch is imported, here and in what the tests start. With all cores each, they stand in each other's way.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))

import torch

if not torch.cuda.is_available():
    # Read when a kernel is defined: before anything of ours is imported.
    os.environ["TRITON_INTERPRET"] = "1"

import httpx
import torch._dynamo
from http_server import as_file, listening
from PIL import Image
from trace_cache import TraceCache

from slideredit_rt.assets import resolve_base
from slideredit_rt.editor import SliderEditor
from slideredit_rt.engines import inductor
from slideredit_rt.export import linked_weights, onnx_graph
from slideredit_rt.export.build import build_engine
from slideredit_rt.families import Family, get_family
from slideredit_rt.serving.app import create_app
from slideredit_rt.serving.metrics import Metrics
from slideredit_rt.serving.service import EditService
from slideredit_rt.settings import RunSettings
from slideredit_rt.shapes.world import held_out_examples, scene_image


def pytest_configure(config: pytest.Config) -> None:
    torch.manual_seed(0)


# Files of few tests that take long. They start first, so that the processes of a parallel run end together.
LONGEST = (
    "test_gpu_model.py",
    "test_linked_export.py",
    "test_bench.py",
    "test_aot.py",
    "test_ptx.py",
    "test_flux2.py",
    "test_flux2_kv.py",
    "test_marks.py",
    "test_inductor.py",
    "test_training.py",
    "test_tensorrt.py",
    "test_demo.py",
)


@pytest.hookimpl(trylast=True)  # after pytest's own reordering by the parameters of session fixtures
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    sizes = Counter(item.path for item in items)
    items.sort(key=lambda item: (places.get(item.path.name, len(places)), -sizes[item.path], item.path))
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))


@pytest.fixture(scope="session", autouse=True)
def _shared_traces(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Builds in the tests' own processes take the trace of a structure from the first one that needed it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "traces"
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linked_weights, "trace", TraceCache(folder, onnx_graph.trace))
        yield


@pytest.fixture(scope="session")
def family() -> Family:
    return get_family("flux_kontext")


@pytest.fixture
def pipeline(family: Family) -> Any:
    """A fresh copy of the embedded pipeline: tests may inject into its transformer."""
    return family.load_pipeline(resolve_base("shapes-kontext"))


@pytest.fixture(scope="session", params=["st", "gst"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both embedded engines, built for real."""
    root = tmp_path_factory.mktemp("engines")
    paths = {kind: root / kind for kind in ("st", "gst")}
    for kind, path in paths.items():
        build_engine("shapes-kontext", f"shapes-{kind}", path, progress=False)
    return paths


@pytest.fixture(scope="session")
def st_editor(engines: dict[str, Path]) -> SliderEditor:
    return SliderEditor.from_engine(engines["st"])


@pytest.fixture(scope="session")
def gst_editor(engines: dict[str, Path]) -> SliderEditor:
    return SliderEditor.from_engine(engines["gst"])


@pytest.fixture(scope="module")
def service(engines: dict[str, Path]) -> Iterator[EditService]:
    """A service with an editor of its own; what it should answer comes from the fixture `st_editor`."""
    editor = SliderEditor.from_engine(engines["st"], run=RunSettings(threads=1))
    with EditService(editor, observer=Metrics()) as service:
        yield service


@pytest.fixture(scope="module")
def url(service: EditService) -> Iterator[str]:
    """The address of a server of `service`, for all tests of a file."""
    with listening(create_app(service, model="shapes"), service) as (address, _):
        yield address


@pytest.fixture
def client(url: str) -> Iterator[httpx.Client]:
    """Asks, and sees that the server still answers afterwards."""
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client
        assert client.get("/health").json() == {"status": "ok"}


@pytest.fixture(scope="session")
def png(scene: Image.Image) -> bytes:
    """The file of the scene."""
    return as_file(scene)


@pytest.fixture
def as_traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Dynamo runs the graphs that it captured, without compiling them to machine code; one thread is enough for them."""
    monkeypatch.setattr(inductor, "COMPILER", "eager")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def scene() -> Image.Image:
    return scene_image(held_out_examples(1, 1)[0])


def _library(package: str, name: str) -> Path:
    """A shared library inside an installed package, found without importing it."""
    spec = find_spec(package)
    folders = list(spec.submodule_search_locations or []) if spec else []
    found = [path for folder in folders for path in sorted(Path(folder).glob(f"{name}.so*"))]
    if not found:
        pytest.skip(f"the package {package!r} with {name}.so is not installed")
    return found[0]


@pytest.fixture(scope="session")
def nvidia_bindings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment of a process in which `import tensorrt` finds NVIDIA's bindings (`tensorrt-cu13-bindings`).

    They ask for TensorRT's libraries, which are not installed. TensorRT-RTX's export the same symbols, so links by TensorRT's
    names let the bindings import.
    """
    bindings = _library("tensorrt_bindings", "tensorrt").parent
    inference = _library("tensorrt_rtx_libs", "libtensorrt_rtx")
    parser = _library("tensorrt_rtx_libs", "libtensorrt_onnxparser_rtx")
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler for a library of one function")
    scratch = tmp_path_factory.mktemp("tensorrt")
    (scratch / "libnvinfer.so.11").symlink_to(inference)
    (scratch / "libnvonnxparser.so.11").symlink_to(parser)
    source = "int initLibNvInferPlugins(void *logger, const char *name_space) { return 1; }"
    target = ["-shared", "-fPIC", "-o", str(scratch / "libnvinfer_plugin.so.11"), "-xc", "-"]
    subprocess.run([compiler, *target], input=source, text=True, check=True)
    (scratch / "tensorrt").symlink_to(bindings)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    for variable in ("LD_LIBRARY_PATH", "PYTHONPATH"):
        environment[variable] = os.pathsep.join(filter(None, [str(scratch), environment.get(variable)]))
    return environment
