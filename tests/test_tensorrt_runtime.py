"""The TensorRT runtime as far as a machine without a GPU shows it: its checks, its files, and what it asks of TensorRT.

Plans do not load without a driver. `TestCalls` therefore lets the runtime talk to recorders that stand for TensorRT's objects,
accept only what the real classes have, and read and write the tensors at the addresses they are given. It runs with
`tensorrt_rtx`, and once more in a process with NVIDIA's bindings of `tensorrt`.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import importlib
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slideredit_rt import SliderEditError, cli
from slideredit_rt.engines import open_engine
from slideredit_rt.engines.cuda import CudaDevice
from slideredit_rt.engines.manifest import Manifest, describe_files, read_manifest, write_manifest
from slideredit_rt.engines.tensorrt import PLAN_FILE, Environment, RuntimeOptions, TensorRT, TensorRTRTX
from slideredit_rt.engines.tensorrt.engine import (
    TensorRTEngine,
    load_runtime_cache,
    runtime_cache_file,
    save_runtime_cache,
)
from slideredit_rt.families import TensorSpec
from slideredit_rt.settings import RunSettings

BACKEND = os.environ.get("BACKEND_UNDER_TEST", "tensorrt-rtx")
STREAM = 7
FLAVOURS = {backend.name: backend for backend in (TensorRT(), TensorRTRTX())}


def manifest_of(backend: str, **changes: Any) -> Manifest:
    """Of an engine that nobody built, whose output is one number per image row."""
    inputs = [
        TensorSpec("hidden_states", "float32", ("batch", "image_rows", 4)),
        TensorSpec("alpha", "float32", ("batch", "sliders")),
        TensorSpec("token_mask", "bool", ("batch", "sliders", "image_rows")),
    ]
    version = {"tensorrt": "11.4.0.106", "tensorrt-rtx": "1.7.1.116"}[backend]
    values = {f.name: None for f in dataclasses.fields(Manifest)} | {
        "backend": backend,
        "backend_version": version,
        "targets": ["sm90"] if backend == "tensorrt" else ["sm86", "sm120"],
        "inputs": inputs,
        "outputs": [TensorSpec("sample", "float32", ("batch", "image_rows"))],
        "ranges": {"batch": [1, 1, 8], "image_rows": [1, 4, 64], "sliders": [1, 2, 4]},
        "compatibility": {},
        "files": {PLAN_FILE: {"sha256": "ab" * 32, "bytes": 9}},
    }
    return Manifest(**(values | changes))


READING = {
    "inputs": [
        TensorSpec("hidden_states", "float32", ("batch", "image_rows", 4)),
        TensorSpec("encoder_hidden_states", "float32", ("batch", "text_rows", 4)),
        TensorSpec("kept", "int64", ("kept_rows",)),
        TensorSpec("alpha", "float32", ("batch", "sliders")),
        TensorSpec("token_mask", "bool", ("batch", "sliders", "rows")),
    ],
    "outputs": [
        TensorSpec("sample", "float32", ("batch", "image_rows")),
        TensorSpec("keys_values", "float32", ("batch", "kept_rows", 4)),
    ],
    "ranges": {"batch": [1, 1, 8], "text_rows": [1, 5, 5], "image_rows": [1, 4, 64], "kept_rows": [0, 0, 0]},
    "reading_ranges": {"batch": [1, 1, 1], "text_rows": [0, 0, 1], "image_rows": [1, 4, 64], "kept_rows": [1, 4, 64]},
}
"""What an engine that reads source images once has in its manifest."""


# --- What decides whether an engine can run ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "compatibility", "package", "capability", "message"),
    [
        (
            "tensorrt",
            {},
            None,
            "sm90",
            r"the package tensorrt, .*pip install 'slideredit-rt\[tensorrt\]'$",
        ),
        ("tensorrt-rtx", {}, None, "sm86", r"the package tensorrt-rtx, .*pip install 'slideredit-rt\[tensorrt-rtx\]'$"),
        (
            "tensorrt",
            {},
            "11.4.0.107",
            "sm90",
            r"TensorRT 11\.4\.0\.106, but 11\.4\.0\.107 is installed; build it again",
        ),
        ("tensorrt-rtx", {}, "1.8.0.1", "sm86", r"built by TensorRT-RTX 1\.7\.1\.116, but 1\.8\.0\.1 is installed"),
        ("tensorrt", {"versions": True}, "11.3.9.9", "sm90", "install that version or a later one of the same major$"),
        ("tensorrt", {"versions": True}, "12.0.0.1", "sm90", "install that version or a later one of the same major$"),
        ("tensorrt", {}, "same", None, r"an NVIDIA GPU \(sm90\), but none is visible; build one with --backend onnxruntime"),
        ("tensorrt-rtx", {}, "same", None, r"an NVIDIA GPU \(sm86, sm120\), but none is visible"),
        ("tensorrt", {"hardware": "none"}, "same", "sm89", "built for sm90, but this GPU is sm89; build it again on this GPU"),
        ("tensorrt", {}, "same", "sm120", "built for sm90, but this GPU is sm120"),
        ("tensorrt", {"hardware": "same_compute_capability"}, "same", "sm100", "built for sm90, but this GPU is sm100"),
        ("tensorrt", {"hardware": "ampere_plus"}, "same", "sm75", "needs a GPU of sm80 or later, but this one is sm75"),
        ("tensorrt-rtx", {}, "same", "sm90", "built for sm86, sm120, but this GPU is sm90; build it again with --targets sm90"),
    ],
)
def test_machine_that_cannot_run_the_engine(
    backend: str, compatibility: dict[str, Any], package: str | None, capability: str | None, message: str
) -> None:
    manifest = manifest_of(backend, compatibility=compatibility)
    with pytest.raises(SliderEditError, match=message):
        FLAVOURS[backend].check_environment(
            manifest, Environment(manifest.backend_version if package == "same" else package, capability)
        )


@pytest.mark.parametrize(
    ("backend", "compatibility", "package", "capability"),
    [
        ("tensorrt", {}, "same", "sm90"),
        ("tensorrt", {"versions": True}, "same", "sm90"),
        ("tensorrt", {"versions": True}, "11.10.0.1", "sm90"),
        ("tensorrt", {"hardware": "same_compute_capability"}, "same", "sm90"),
        ("tensorrt", {"hardware": "ampere_plus"}, "same", "sm80"),
        ("tensorrt", {"hardware": "ampere_plus"}, "same", "sm120"),
        ("tensorrt-rtx", {}, "same", "sm120"),
    ],
)
def test_machine_that_can_run_the_engine(backend: str, compatibility: dict[str, Any], package: str, capability: str) -> None:
    manifest = manifest_of(backend, compatibility=compatibility)
    FLAVOURS[backend].check_environment(
        manifest, Environment(manifest.backend_version if package == "same" else package, capability)
    )


def test_environment_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    rtx = pytest.importorskip("tensorrt_rtx")
    assert FLAVOURS["tensorrt-rtx"].environment().package_version == rtx.__version__
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    assert FLAVOURS["tensorrt-rtx"].environment().package_version is None


# --- A real plan -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plan_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded editor with its ST adapter, built by the command for TensorRT-RTX."""
    pytest.importorskip("tensorrt_rtx")
    out = tmp_path_factory.mktemp("plan") / "engine"
    build = ["build", "--base", "shapes-kontext", "--adapter", "shapes-st", "--backend", "tensorrt-rtx", "--quiet"]
    assert cli.main([*build, "--resolution", "64", "--max-text-rows", "24", "--out", str(out)]) == 0
    return out


def edit(engine: Path, folder: Path, *options: str) -> int:
    from PIL import Image

    Image.new("RGB", (64, 64)).save(folder / "in.png")
    image = ["--image", str(folder / "in.png"), "--out", str(folder / "out.png")]
    return cli.main(["edit", str(engine), *image, "--slider", "make the circle red=0.5", "--quiet", *options])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_the_command_says_so_in_one_sentence(
    plan_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert edit(plan_folder, tmp_path, "--weight-budget-mib", "auto", "--cuda-graphs", "off") == 2
    error = capsys.readouterr().err
    assert "the engine needs an NVIDIA GPU (sm86, sm89, sm120), but none is visible" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize("damage", ["truncated", "foreign"])
def test_plan_that_tensorrt_cannot_read(plan_folder: Path, tmp_path: Path, damage: str) -> None:
    """Past the manifest's hash: what TensorRT-RTX itself says about such a file, and where it lies."""
    content = (plan_folder / PLAN_FILE).read_bytes()
    file = tmp_path / PLAN_FILE
    file.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"another thing altogether" * 100)
    write_manifest(dataclasses.replace(read_manifest(plan_folder), files=describe_files(tmp_path, [PLAN_FILE])), tmp_path)
    trt = importlib.import_module("tensorrt_rtx")
    with pytest.raises(SliderEditError, match=r"TensorRT-RTX cannot load '.*model\.engine' \(.+\); build the engine again$"):
        TensorRTRTX.engine(file, read_manifest(tmp_path), trt, Device(), RuntimeOptions())


@pytest.mark.parametrize("option", [["--cuda-graphs", "off"], ["--weight-budget-mib", "100"]])
def test_options_of_tensorrt_are_refused_for_another_backend(
    engines: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], option: list[str]
) -> None:
    assert edit(engines["st"], tmp_path, *option) == 2
    assert "ONNX Runtime engines take no run options, got RuntimeOptions(weight_budget=" in capsys.readouterr().err
    with pytest.raises(SliderEditError, match="ONNX Runtime engines take no run options"):
        open_engine(engines["st"], RunSettings(options=RuntimeOptions(cuda_graphs=False)))


def test_a_backend_says_which_run_options_it_takes() -> None:
    TensorRT().check_run_options(RuntimeOptions())
    with pytest.raises(SliderEditError, match=r"TensorRT engines do not take str; pass RuntimeOptions \(weight_budget, "):
        TensorRT().check_run_options("fast")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], None),
        (["--weight-budget-mib", "auto"], RuntimeOptions(weight_budget="auto")),
        (["--weight-budget-mib", "3", "--cuda-graphs", "on"], RuntimeOptions(weight_budget=3 * 2**20)),
        (["--cuda-graphs", "off"], RuntimeOptions(cuda_graphs=False)),
    ],
)
def test_options_reach_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: list[str], expected: RuntimeOptions | None
) -> None:
    asked = []
    (tmp_path / "manifest.json").touch()

    def check_nothing(folder: Path, manifest: Manifest, run: RunSettings) -> None:
        asked.append(run)
        raise SliderEditError("asked for")

    monkeypatch.setattr("slideredit_rt.editor.read_manifest", lambda folder: None)
    monkeypatch.setattr("slideredit_rt.editor.check_run", check_nothing)
    assert edit(tmp_path, tmp_path, *given) == 2
    assert asked == [RunSettings(options=expected)]


def test_weight_budget_is_a_number_or_auto(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        edit(tmp_path, tmp_path, "--weight-budget-mib", "-3")
    assert "'-3' is neither a number of MiB nor 'auto'" in capsys.readouterr().err


# --- The runtime cache -------------------------------------------------------------------------------------------------


class Cache:
    """`IRuntimeCache`, which takes back only what it gave."""

    content = b""
    rejected = False

    def serialize(self) -> Any:
        return memoryview(b"RTX" + self.content if self.content else b"")

    def deserialize(self, blob: bytes) -> bool:
        self.rejected = not blob.startswith(b"RTX")
        if not self.rejected:
            self.content = blob[3:]
        return not self.rejected


@pytest.fixture
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_cache_file_belongs_to_one_plan_card_and_version(cache_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = manifest_of("tensorrt-rtx")
    file = runtime_cache_file(manifest, "NVIDIA GeForce RTX 4090")
    expected = "abababababababab-nvidia-geforce-rtx-4090-1.7.1.116.bin"
    assert file == cache_home / "slideredit-rt" / "tensorrt-rtx" / expected
    other = dataclasses.replace(manifest, files={PLAN_FILE: {"sha256": "cd" * 32, "bytes": 9}})
    newer = dataclasses.replace(manifest, backend_version="1.8.0.0")
    name = "NVIDIA GeForce RTX 4090"
    assert (
        len({file, runtime_cache_file(other, name), runtime_cache_file(newer, name), runtime_cache_file(manifest, "L4")}) == 4
    )
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert runtime_cache_file(manifest, name).parents[2] == Path.home() / ".cache"


def test_cache_is_written_whole_and_read_back(tmp_path: Path) -> None:
    file, cache = tmp_path / "new" / "kernels.bin", Cache()
    save_runtime_cache(cache, file)
    assert not file.exists(), "an empty cache is not worth a file"
    cache.content = b"kernels"
    save_runtime_cache(cache, file)
    assert [f.name for f in file.parent.iterdir()] == ["kernels.bin"]
    again = Cache()
    load_runtime_cache(again, file)
    assert again.content == b"kernels"


def test_cache_that_cannot_be_read_or_written_fails_nothing(tmp_path: Path) -> None:
    cache = Cache()
    load_runtime_cache(cache, tmp_path / "missing.bin")
    load_runtime_cache(cache, tmp_path)
    (tmp_path / "damaged.bin").write_bytes(b"\0garbage")
    load_runtime_cache(cache, tmp_path / "damaged.bin")
    assert (cache.rejected, cache.content) == (True, b"")
    cache.content = b"kernels"
    save_runtime_cache(cache, tmp_path / "damaged.bin" / "below-a-file.bin")


# --- What the runtime asks of TensorRT ---------------------------------------------------------------------------------


class Device(CudaDevice):
    """The CPU in place of a GPU: one stream, and graphs that run what was enqueued while they were captured."""

    def __init__(self, log: list[Any] | None = None) -> None:
        self.device, self.name, self.log = torch.device("cpu"), "Card of the test", [] if log is None else log
        self.cannot_capture = ""

    @contextmanager
    def stream(self) -> Iterator[int]:
        yield STREAM

    def capture(self, enqueue: Callable[[int], object]) -> Callable[[], None]:
        if self.cannot_capture:
            raise RuntimeError(self.cannot_capture)
        mark = len(self.log)
        enqueue(STREAM)
        work = [entry[-1] for entry in self.log[mark:]]
        self.log[mark:] = [("capture",)]
        graph = Released(self.log, "graph")

        def replay(graph: Released = graph) -> None:
            self.log.append(("replay",))
            for context in work:
                context().compute()

        return replay

    def wait(self) -> None:
        self.log.append(("wait",))


class Released:
    """Writes down when the last reference to it goes."""

    def __init__(self, log: list[Any], what: str) -> None:
        self._released = (log, what)

    def __del__(self) -> None:
        log, what = self._released
        log.append(("released", what))


class Recorder(Released):
    """Stands for an object of one of TensorRT's classes, and has the attributes of that class only."""

    real: str
    _trt: Tensorrt

    def __init__(self, trt: Tensorrt) -> None:
        super().__init__(trt.log, self.real)
        vars(self)["_trt"] = trt
        kind = getattr(trt.module, self.real)
        for name in {n for c in type(self).__mro__ for n in vars(c) if not n.startswith("_")} - {
            "real",
            "compute",
            "content",
            "rejected",
        }:
            assert hasattr(kind, name), f"{self.real} has no {name}"

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_"):
            assert isinstance(getattr(getattr(self._trt.module, self.real), name), property), f"{self.real} has no {name}"
            self._trt.log.append((name, value))
        super().__setattr__(name, value)


class Runtime(Recorder):
    real = "Runtime"

    def deserialize_cuda_engine(self, content: Any) -> Any:
        assert bytes(content) == b"some plan"
        return self._trt.loads and Engine(self._trt)


class Config(Recorder):
    real = "IRuntimeConfig"

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        assert strategy == self._trt.ExecutionContextAllocationStrategy.USER_MANAGED


class RtxConfig(Config):
    def create_runtime_cache(self) -> Any:
        return RtxCache(self._trt)

    def set_runtime_cache(self, cache: RtxCache) -> bool:
        self._trt.log.append(("set_runtime_cache", cache.content))
        return True


class RtxCache(Cache, Recorder):
    real = "IRuntimeCache"
    content = b""

    def __setattr__(self, name: str, value: Any) -> None:
        vars(self)[name] = value


class Engine(Recorder):
    real = "ICudaEngine"

    def __init__(self, trt: Tensorrt) -> None:
        super().__init__(trt)
        vars(self)["streamable_weights_size"] = trt.streamable

    def get_weight_streaming_automatic_budget(self) -> int:
        return 12345

    def create_runtime_config(self) -> Config:
        return (RtxConfig if BACKEND == "tensorrt-rtx" else Config)(self._trt)

    def create_execution_context(self, config: Config) -> Any:
        assert isinstance(config, Config)
        self._trt.log.append(("context",))
        return Context(self._trt) if self._trt.room else None


class Context(Recorder):
    real = "IExecutionContext"

    def __init__(self, trt: Tensorrt) -> None:
        super().__init__(trt)
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._memory: tuple[int, int] | None = None

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        assert stream_handle == STREAM
        assert not self._shapes, "before any shape"
        self._trt.log.append(("profile", profile_index))
        return self._trt.selects

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._shapes[name] = shape
        return self._trt.accepts

    def update_device_memory_size_for_shapes(self) -> int:
        assert len(self._shapes) == self._trt.inputs, "after all the shapes"
        return 100 * self._shapes["hidden_states"][0]

    def set_device_memory(self, memory: int, size: int) -> None:
        assert size >= self.update_device_memory_size_for_shapes()
        self._trt.log.append(("scratch", memory))
        self._memory = (memory, size)

    def set_tensor_address(self, name: str, memory: int) -> bool:
        assert memory, "TensorRT refuses null for an output, also for one without elements"
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        assert stream_handle == STREAM
        assert self._memory is not None
        self._trt.log.append(("enqueue", weakref.ref(self)))
        self.compute()
        return self._trt.runs

    def compute(self) -> None:
        """sample[b, i] = Σ_k alpha[b, k] · token_mask[b, k, i], from and to the bound addresses, for the mask's last rows.

        With a second output, keys_values[i] = hidden_states[kept[i]].
        """
        (batch, sliders), rows = self._shapes["alpha"], self._shapes["token_mask"][2]
        images, width = self._shapes["hidden_states"][1:]
        text = rows - images
        alpha = (ctypes.c_float * (batch * sliders)).from_address(self._addresses["alpha"])
        mask = (ctypes.c_bool * (batch * sliders * rows)).from_address(self._addresses["token_mask"])
        sample = (ctypes.c_float * (batch * images)).from_address(self._addresses["sample"])
        for b in range(batch):
            for i in range(images):
                terms = (alpha[b * sliders + k] * mask[(b * sliders + k) * rows + text + i] for k in range(sliders))
                sample[b * images + i] = sum(terms)
        if "keys_values" in self._addresses:
            count = self._shapes["kept"][0]
            kept = (ctypes.c_int64 * count).from_address(self._addresses["kept"])
            latents = (ctypes.c_float * (batch * images * width)).from_address(self._addresses["hidden_states"])
            stored = (ctypes.c_float * (count * width)).from_address(self._addresses["keys_values"])
            for i, row in enumerate(kept):
                for j in range(width):
                    stored[i * width + j] = latents[row * width + j]


class Tensorrt:
    """The real module, except for `Runtime`."""

    def __init__(self, module: Any, log: list[Any]) -> None:
        self.module, self.log = module, log
        self.loads = self.room = self.accepts = self.runs = self.selects = True
        self.streamable, self.inputs = 0, 3

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)

    def Runtime(self, logger: Any) -> Runtime:  # noqa: N802
        assert isinstance(logger, self.module.ILogger)
        vars(self)["logger"] = logger
        return Runtime(self)


def request(batch: int = 1, rows: int = 6, sliders: int = 2, seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(batch, sliders, rows, generator=g) < 0.5
    alpha = torch.randn(batch, sliders, generator=g)
    return {"hidden_states": torch.zeros(batch, rows, 4), "alpha": alpha, "token_mask": mask}


def answer(inputs: dict[str, Tensor]) -> Tensor:
    return torch.einsum("bk,bki->bi", inputs["alpha"], inputs["token_mask"].float())


class TestCalls:
    @pytest.fixture
    def log(self) -> list[Any]:
        return []

    @pytest.fixture
    def trt(self, log: list[Any]) -> Tensorrt:
        return Tensorrt(pytest.importorskip(FLAVOURS[BACKEND].import_name), log)

    @pytest.fixture
    def device(self, log: list[Any]) -> Device:
        return Device(log)

    @pytest.fixture
    def load(self, trt: Tensorrt, device: Device, tmp_path: Path, cache_home: Path) -> Callable[..., TensorRTEngine]:
        plan = tmp_path / PLAN_FILE
        plan.write_bytes(b"some plan")

        def load(threads: int | None = None, changes: dict[str, Any] | None = None, **options: Any) -> TensorRTEngine:
            manifest = manifest_of(BACKEND, **(changes or {}))
            return FLAVOURS[BACKEND].engine(plan, manifest, trt, device, RuntimeOptions(**options), threads)  # type: ignore[arg-type]

        return load

    def test_one_capture_serves_twenty_settings(self, load: Callable[..., TensorRTEngine], log: list[Any]) -> None:
        engine = load()
        for seed in range(20):
            inputs = request(seed=seed)
            torch.testing.assert_close(engine(inputs), answer(inputs))
        runs = [entry[0] for entry in log if entry[0] in ("context", "enqueue", "capture", "replay")]
        if BACKEND == "tensorrt-rtx":
            assert runs == ["context"] + ["enqueue"] * 20, "it captures by itself"
        else:
            assert runs == ["context", "enqueue", "capture"] + ["replay"] * 19

    def test_every_set_of_shapes_has_its_context_and_graph(self, load: Callable[..., TensorRTEngine], log: list[Any]) -> None:
        engine = load()
        for _ in range(3):
            for sizes in ((1, 6, 2), (2, 6, 2), (1, 5, 2), (1, 6, 1)):
                inputs = request(*sizes)
                torch.testing.assert_close(engine(inputs), answer(inputs))
        assert log.count(("context",)) == 4
        assert log.count(("capture",)) == (0 if BACKEND == "tensorrt-rtx" else 4)

    def test_graphs_can_be_turned_off(self, load: Callable[..., TensorRTEngine], log: list[Any], trt: Tensorrt) -> None:
        engine = load(cuda_graphs=False, specialization="eager")
        for _ in range(3):
            engine(request())
        assert sum(entry[0] == "enqueue" for entry in log) == 3
        if BACKEND == "tensorrt-rtx":
            assert ("cuda_graph_strategy", trt.CudaGraphStrategy.DISABLED) in log
            kernels = trt.DynamicShapesKernelSpecializationStrategy.EAGER
            assert ("dynamic_shapes_kernel_specialization_strategy", kernels) in log

    @pytest.mark.skipif(BACKEND != "tensorrt-rtx", reason="of TensorRT-RTX only")
    def test_contexts_capture_by_themselves_and_share_one_kept_cache(
        self, load: Callable[..., TensorRTEngine], log: list[Any], trt: Tensorrt
    ) -> None:
        with load() as engine:
            engine(request())
            assert ("cuda_graph_strategy", trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE) in log
            kernels = trt.DynamicShapesKernelSpecializationStrategy.LAZY
            assert ("dynamic_shapes_kernel_specialization_strategy", kernels) in log
            assert ("set_runtime_cache", b"") in log
            engine._loaded.cache.content = b"kernels"
        with load() as engine:
            engine(request())
            assert ("set_runtime_cache", b"kernels") in log

    def test_least_recently_used_context_goes_first(self, load: Callable[..., TensorRTEngine], log: list[Any]) -> None:
        engine = load(max_contexts=2)
        for rows in (3, 4, 3, 5, 3, 4):
            inputs = request(rows=rows)
            torch.testing.assert_close(engine(inputs), answer(inputs))
        assert log.count(("context",)) == 4, "3, 4, 5 in the place of 4, and 4 again in the place of 5"
        gone = log.index(("released", "IExecutionContext"))
        assert log[gone - 1] == ("wait",), "what runs is waited for"

    def test_contexts_share_scratch_memory_of_the_largest_request(
        self, load: Callable[..., TensorRTEngine], log: list[Any]
    ) -> None:
        engine = load()
        for batch in (2, 1, 4, 3):
            engine(request(batch))
        first, second, third, fourth = [entry[1] for entry in log if entry[0] == "scratch"]
        assert (first == second, second != third, third == fourth) == (True, True, True)
        assert engine._loaded.scratch is not None
        assert engine._loaded.scratch.numel() == 400, "what batch 4 needs, not what the profile's batch 8 would"

    def test_release_goes_from_graphs_to_the_runtime_and_only_once(
        self, load: Callable[..., TensorRTEngine], log: list[Any]
    ) -> None:
        engine = load()
        for _ in range(2):
            engine(request())
            engine(request(2))
        log[:] = [entry for entry in log if entry[0] == "capture"]
        engine.close()
        captured = log.count(("capture",))
        gone = [entry[1] for entry in log if entry[0] == "released" and entry[1] not in ("IRuntimeConfig", "IRuntimeCache")]
        pair = ["graph", "IExecutionContext"] if captured else ["IExecutionContext"]
        assert gone == [*pair, *pair, "ICudaEngine", "Runtime"]
        assert log[captured] == ("wait",)
        engine.close()
        assert log.count(("released", "Runtime")) == 1
        with pytest.raises(SliderEditError, match="the engine is closed; open it again"):
            engine(request())

    def test_without_close_collection_releases(self, load: Callable[..., TensorRTEngine], log: list[Any]) -> None:
        engine = load()
        engine(request())
        del engine
        gc.collect()
        assert log[-1] == ("released", "Runtime")

    def test_an_output_is_its_threads_own_and_stays_where_it_is(self, load: Callable[..., TensorRTEngine]) -> None:
        engine = load()
        first = engine(request(seed=1))
        with ThreadPoolExecutor(1) as other:
            second = other.submit(engine, request(seed=2)).result()
        assert torch.equal(first, answer(request(seed=1)))
        assert torch.equal(second, answer(request(seed=2)))
        assert engine(request(seed=3)).data_ptr() == first.data_ptr()

    def test_request_is_checked_on_every_call(self, load: Callable[..., TensorRTEngine]) -> None:
        engine = load()
        engine(request())
        with pytest.raises(SliderEditError, match="'alpha' must be contiguous float32"):
            engine(request() | {"alpha": torch.zeros(1, 2, dtype=torch.float64)})
        with pytest.raises(SliderEditError, match="built for 1 to 8 in the axis 'batch', got 9"):
            engine(request(9))

    def test_source_images_are_read_in_a_profile_of_their_own(
        self, load: Callable[..., TensorRTEngine], log: list[Any], trt: Tensorrt
    ) -> None:
        trt.inputs = 5
        engine = load(changes=READING)
        latents, text = torch.randn(1, 3, 4), torch.zeros(1, 0, 4)
        reading = {"hidden_states": latents, "encoder_hidden_states": text, "kept": torch.arange(3)}
        stored = engine.read(reading).clone()
        assert torch.equal(stored, latents)
        kept: dict[str, Tensor] = {"encoder_hidden_states": torch.zeros(2, 5, 4), "kept": torch.arange(0)}
        mask = torch.cat([torch.zeros(2, 2, 5, dtype=torch.bool), request(2)["token_mask"]], 2)
        step = request(2) | kept | {"token_mask": mask}
        for _ in range(2):
            torch.testing.assert_close(engine(step), answer(request(2)))
        assert torch.equal(engine.read(reading), latents)
        assert [entry for entry in log if entry[0] == "profile"] == [("profile", 1), ("profile", 0)]
        assert log.count(("context",)) == 2
        with pytest.raises(SliderEditError, match="built for 0 to 0 in the axis 'kept_rows', got 1"):
            engine(step | {"kept": torch.arange(1)})
        with pytest.raises(SliderEditError, match="built for 0 to 1 in the axis 'text_rows', got 5"):
            engine.read(reading | {"encoder_hidden_states": torch.zeros(1, 5, 4)})
        trt.selects = False
        with pytest.raises(SliderEditError, match=r"refuses the sizes .* \(no reason given\); build the engine again$"):
            engine.read({"hidden_states": latents[:, :1], "encoder_hidden_states": text, "kept": torch.arange(1)})

    def test_weight_budget(self, load: Callable[..., TensorRTEngine], log: list[Any], trt: Tensorrt) -> None:
        trt.streamable = 10**6
        load(weight_budget="auto")
        load(weight_budget=77)
        load()
        assert [value for name, *value in log if name == "weight_streaming_budget_v2"] == [[12345], [77]]
        trt.streamable = 0
        with pytest.raises(
            SliderEditError,
            match="without weight streaming, so it has no weight budget; build it again with",
        ):
            load(weight_budget=77)

    def test_threads_and_the_runtime_inside_a_version_compatible_plan(
        self, load: Callable[..., TensorRTEngine], log: list[Any]
    ) -> None:
        load()
        assert not [entry for entry in log if entry[0] in ("max_threads", "engine_host_code_allowed")]
        load(threads=3, changes={"compatibility": {"versions": True}})
        assert ("max_threads", 3) in log
        assert ("engine_host_code_allowed", True) in log

    @pytest.mark.parametrize(
        ("reason", "message"),
        [
            ("magic tag differs", r"cannot load '.*model\.engine' \(magic tag differs\); build the engine again$"),
            ("Error Code 2: OutOfMemory (Requested size was 9)", "free GPU memory, or build with --weight-streaming$"),
        ],
    )
    def test_plan_that_does_not_load(
        self, load: Callable[..., TensorRTEngine], trt: Tensorrt, monkeypatch: pytest.MonkeyPatch, reason: str, message: str
    ) -> None:
        monkeypatch.setattr(Runtime, "deserialize_cuda_engine", lambda self, _: says(trt, reason))
        with pytest.raises(SliderEditError, match=message):
            load()

    def test_driver_that_is_too_old(
        self, load: Callable[..., TensorRTEngine], trt: Tensorrt, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(logger: Any) -> None:
            raise TypeError("pybind11::init(): factory function returned nullptr")

        monkeypatch.setattr(trt, "Runtime", refuse)
        with pytest.raises(SliderEditError, match=r"cannot start here \(.*\); update the NVIDIA driver$"):
            load()

    def test_out_of_device_memory_is_one_sentence(
        self, load: Callable[..., TensorRTEngine], trt: Tensorrt, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        engine = load()
        message = (
            r"out of memory for the sizes \{'batch': 2, 'image_rows': 6, 'sliders': 2\}; use a smaller batch or resolution"
        )
        trt.room = False
        with pytest.raises(SliderEditError, match=message):
            engine(request(2))
        trt.room = True

        def empty(*_: Any, **__: Any) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory.")

        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", empty)
            with pytest.raises(SliderEditError, match=message):
                engine(request(2))
        inputs = request(1)
        torch.testing.assert_close(engine(inputs), answer(inputs))

    def test_failures_of_a_call_are_one_sentence(
        self, load: Callable[..., TensorRTEngine], trt: Tensorrt, device: Device
    ) -> None:
        engine = load()
        trt.accepts = False
        with pytest.raises(SliderEditError, match=r"refuses the sizes .* \(no reason given\); build the engine again$"):
            engine(request())
        trt.accepts, trt.runs = True, False
        says(trt, "Error Code 1: Cuda Runtime (out of memory)")
        with pytest.raises(SliderEditError, match=r"failed to run the engine \(.*out of memory\)\); use a smaller batch"):
            engine(request())
        trt.runs, device.cannot_capture = True, "operation not permitted when stream is capturing\nCompile with ..."
        engine(request())
        if BACKEND == "tensorrt":
            with pytest.raises(SliderEditError, match=r"CUDA graph \(operation .* capturing\); run it with --cuda-graphs off"):
                engine(request())


def says(trt: Tensorrt, reason: str) -> None:
    """TensorRT's first error, some chatter, and an error that follows from the first."""
    trt.logger.log(trt.ILogger.INFO, "Loaded engine size: 1 MiB")
    trt.logger.log(trt.ILogger.ERROR, reason)
    trt.logger.log(trt.ILogger.ERROR, "and so on")


def test_nvidias_bindings_of_tensorrt_have_everything_that_the_runtime_asks_for(nvidia_bindings: dict[str, str]) -> None:
    line = [sys.executable, "-m", "pytest", __file__, "-k", "TestCalls", "-p", "no:cacheprovider"]
    environment = nvidia_bindings | {"BACKEND_UNDER_TEST": "tensorrt"}
    done = subprocess.run(line, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout
    assert ", 1 skipped" in done.stdout, "only what TensorRT-RTX alone has"
