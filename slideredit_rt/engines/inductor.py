"""The Inductor backend: the diffusers transformer with this package's operators, compiled by `torch.compile` at run time."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch._dynamo
import torch._inductor.config
from safetensors import SafetensorError, safe_open
from torch import Tensor

from slideredit_rt.adapters import Adapter, Member, load_adapter
from slideredit_rt.checkpoint import CONFIG_FILE, meta_transformer
from slideredit_rt.engines.adapter_inputs import AdapterBuffers
from slideredit_rt.engines.backend import Backend, BuildJob, Compiled
from slideredit_rt.engines.cuda import CudaDevice
from slideredit_rt.engines.folding import fold
from slideredit_rt.engines.manifest import ADAPTER_FILE, CONVERTED_FILE, Manifest
from slideredit_rt.engines.quantised import ShareEqualNodes, prepare_quantised
from slideredit_rt.engines.request import InputBuffers, Outputs, check_request, reading_request
from slideredit_rt.engines.shapes import ShapeCache
from slideredit_rt.errors import OutOfDeviceMemory, SliderEditError
from slideredit_rt.families import Family, get_family
from slideredit_rt.modules import SliderBackbone
from slideredit_rt.quantization.precisions import PRECISIONS
from slideredit_rt.settings import RunSettings

COMPILER = "inductor"
# Dynamo counts the compiled variants of a block over all engines of the process and fails at its default limit of 8.
RECOMPILE_LIMIT = 256
_MAX_BINDINGS = 8
# Tracing and compiling use process-wide state.
_COMPILING = threading.Lock()


@dataclass
class _Binding:
    """Buffers and compiled step for one set of shapes; on a GPU, the step replays a graph captured on these buffers."""

    inputs: InputBuffers
    output: Tensor
    step: Callable[[], None]


def compile_blocks(backbone: SliderBackbone) -> None:
    """Set up the repeated blocks of a backbone's transformer, in place, to compile on their first call with each set of shapes.

    Blocks of the same class share compiled code, so the 57 blocks of FLUX take as long as three. Sizes are constants in the
    code. Alphas and masks are not, so changing strengths never recompiles.
    """
    transformer: Any = backbone.transformer
    transformer.compile_repeated_blocks(fullgraph=True, dynamic=False, backend=COMPILER)


def compiler_passes() -> dict[str, Any]:
    """Return the settings of torch's compiler that add this package's passes."""
    return {"post_grad_custom_pre_pass": ShareEqualNodes()}


def load_weights(transformer: Any, files: Iterable[Path], device: torch.device) -> None:
    """Load the weights of a transformer on the `meta` device, reading files directly to the target device.

    Args:
        transformer: Transformer on `meta`, changed in place.
        files: safetensors files with the transformer's own tensor names. The first file that holds a tensor is used;
            unknown tensors are ignored.
        device: Device to run on.

    Raises:
        SliderEditError: A file cannot be read, or a tensor is in none of them.
    """
    wanted, state = transformer.state_dict().keys(), {}
    for path in files:
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                for name in file.keys():  # noqa: SIM118
                    if name in wanted and name not in state:
                        state[name] = file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise SliderEditError(f"cannot read the weights in {str(path)!r} ({error}); build the engine again") from error
    if missing := wanted - state.keys():
        raise SliderEditError(f"the engine's files lack the weight {min(missing)}; build the engine again")
    transformer.load_state_dict(state, assign=True)
    transformer.to(device)  # moves the buffers, which are not in the state dict


class InductorEngine:
    """Engine that runs a compiled backbone on the device of its weights. A context manager.

    The first call with a set of shapes compiles; on a GPU it also captures a CUDA graph, which later calls replay. Inputs may
    be on any device and are copied into fixed buffers. Sliders are padded to the engine's maximum with alpha 0 and empty
    masks, which does not change a single bit, so only a new batch, text or image size compiles. Buffers and graphs are kept
    for the last eight sets of shapes. Torch caches compiled code on disk (`TORCHINDUCTOR_CACHE_DIR`).

    Thread-safe: concurrent calls run one after the other. Each thread has its own outputs, which its next call with the same
    shapes overwrites.

    Args:
        backbone: Backbone whose transformer blocks are compiled in place.
        manifest: Manifest of the engine.
    """

    def __init__(self, backbone: SliderBackbone, manifest: Manifest) -> None:
        self.manifest = manifest
        self._lock = threading.RLock()
        self.device = next(backbone.parameters()).device
        self._cuda = cuda = CudaDevice(self.device) if self.device.type == "cuda" else None
        # Graphs replay one at a time and outputs are allocated outside the pool, so all graphs can share its memory.
        self._pool = torch.cuda.graph_pool_handle() if self._cuda else None
        self._bindings: ShapeCache[_Binding] = ShapeCache(_MAX_BINDINGS, lambda _: cuda.wait() if cuda else None)
        self._adapter = AdapterBuffers(manifest, self.device)
        self._outputs = Outputs(_MAX_BINDINGS)
        self._backbone: SliderBackbone | None = backbone
        compile_blocks(backbone)

    def close(self) -> None:
        """Release graphs, buffers and weights. Idempotent."""
        with self._lock:
            self.forget_shapes()
            self._backbone = None

    def forget_shapes(self) -> None:
        """Release buffers and graphs, so that the next call captures again. Use it after changing the transformer."""
        with self._lock:
            self._bindings.clear()

    def __enter__(self) -> InductorEngine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Predict one step (see `slideredit_rt.engines.Engine`). The output is on the device of the inputs.

        Raises:
            SliderEditError: The engine is closed, an input does not match the manifest, the device is out of memory, or torch
                cannot compile here.
        """
        return self._run(inputs)

    @torch.no_grad()
    def read(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Read source images with the same weights (see `slideredit_rt.families.Reader`).

        Raises:
            SliderEditError: See `__call__`.
        """
        return self._run(reading_request(self.manifest, inputs), 1)

    def _run(self, inputs: Mapping[str, Tensor], output: int = 0) -> Tensor:
        """Run a step, or with the second output a reading of source images."""
        sizes = check_request(self.manifest, inputs)
        if "sliders" in sizes:
            sizes |= {"sliders": self.manifest.max_sliders}
        key = (output, *sizes.values())
        with self._lock:
            backbone = self._backbone
            if backbone is None:
                raise SliderEditError("the engine is closed; open it again")
            result = self._outputs.of(self.manifest, sizes, inputs, output)
            with self._stream():
                self._adapter.fill(inputs)
                binding = self._bindings.get(key, lambda: self._bind(backbone, sizes, inputs, output))
                binding.inputs.fill(inputs)
                binding.step()
                result.copy_(binding.output)
        return result

    def _stream(self) -> AbstractContextManager[Any]:
        return self._cuda.stream() if self._cuda else nullcontext()

    def _bind(self, backbone: SliderBackbone, sizes: Mapping[str, int], inputs: Mapping[str, Tensor], index: int) -> _Binding:
        """Allocate buffers for one set of shapes, compile, and capture."""
        spec, run = self.manifest.outputs[index], (backbone, backbone.read)[index]
        try:
            buffers = InputBuffers(self.manifest, sizes, self._empty)
            output = self._empty(spec.resolve(sizes), spec.dtype)

            def step() -> None:
                output.copy_(run({**buffers.tensors, **self._adapter.tensors}))

            # Use the call's values, because a kernel may index by them.
            buffers.fill(inputs)
            limits = {"recompile_limit": RECOMPILE_LIMIT, "accumulated_recompile_limit": RECOMPILE_LIMIT}
            with (
                _COMPILING,
                torch._dynamo.config.patch(limits),  # type: ignore[attr-defined]
                torch._inductor.config.patch(compiler_passes()),  # type: ignore[attr-defined]
            ):
                step()
            return _Binding(buffers, output, self._capture(step) if self._cuda else step)
        except torch.OutOfMemoryError:
            raise OutOfDeviceMemory(
                f"the GPU is out of memory for the sizes {dict(sizes)}; use a smaller batch or resolution"
            ) from None
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = str(error).strip().splitlines()[0]
            raise SliderEditError(
                f"torch cannot compile the engine on this machine ({reason}); install a C++ compiler, or use "
                "--backend onnxruntime"
            ) from error

    def _capture(self, step: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream(self.device)
        with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
            step()
        return graph.replay

    def _empty(self, shape: tuple[int, ...], dtype: str) -> Tensor:
        return torch.empty(shape, dtype=getattr(torch, dtype), device=self.device)


def engine_of(backbone: SliderBackbone, manifest: Manifest) -> InductorEngine:
    """Return an engine on a loaded backbone, in the form that the manifest's lowering asks for.

    Args:
        backbone: Backbone on its device, changed in place. A folded one cannot be restored.
        manifest: Manifest of the engine.
    """
    prepare_quantised(backbone)
    if manifest.lowering == "folded":
        fold(backbone)
        if next(backbone.parameters()).is_cuda:
            torch.cuda.empty_cache()  # Torch would keep the memory of the weights that were folded from other libraries.
    return InductorEngine(backbone.eval().requires_grad_(False), manifest)


def _adapter_in(folder: Path, manifest: Manifest, family: Family) -> Adapter | None:
    """Return the adapter that an engine contains, in the engine's dtype; None for a frozen backbone."""
    if manifest.adapter is None:
        return None
    adapter, dtype = load_adapter(folder / ADAPTER_FILE, family), getattr(torch, manifest.dtype)
    pairs = {name: (a.to(dtype), b.to(dtype)) for name, (a, b) in adapter.pairs.items()}
    kinds = manifest.member_kinds
    members = {name: Member(adapter.source, kinds[name], curve) for name, curve in manifest.members.items()}
    return dataclasses.replace(adapter, pairs=pairs, members=members)


class Inductor(Backend):
    """Inductor: the diffusers transformer with this package's operators, or with its adapted projections folded."""

    name = "inductor"
    title = "Inductor"
    package = "torch"
    lowerings = ("operator", "folded")
    reads_images = True
    quantised: ClassVar = {"fp8": "module", "int8": "module", "int4": "module"}

    def compile(self, job: BuildJob, folder: Path) -> Compiled:
        """Write the transformer's configuration and link the weights beside it (see `Backend.compile`)."""
        from slideredit_rt.export.linked_weights import WeightOptions, export_weights

        weights = WeightOptions(job.dtype, copy=job.settings.copy_weights, updates=job.updates)
        exported = export_weights(job.family, job.base, job.adapter, folder, weights, lowering=job.lowering)
        return Compiled(exported, exported.files, exported.links)

    def choose_device(self, manifest: Manifest, run: RunSettings) -> torch.device:
        """Return the requested device, by default a GPU if there is one (see `Backend.choose_device`)."""
        device = run.choose_device(torch.device("cuda") if torch.cuda.is_available() else None)
        if device.type == "cuda":
            major, minor = torch.cuda.get_device_capability(device)
            card = f"sm{major}{minor}"
            for form in (PRECISIONS[name] for name in manifest.quantised):
                if not form.runs_on(card):
                    raise SliderEditError(
                        f"the GPU {str(device)!r} is {card}, which does not compute in {form.name}; pass --device cpu, or "
                        "build from a base quantised to int8 or int4"
                    )
        return device

    def open(self, folder: Path, manifest: Manifest, run: RunSettings) -> InductorEngine:
        """Load an engine folder onto a CUDA device, or the CPU if there is none (see `Backend.open`).

        `run.threads` sets torch's threads for the whole process; None does not change them.
        """
        if run.threads is not None:
            torch.set_num_threads(run.threads)
        device = self.choose_device(manifest, run)
        family, transformer = get_family(manifest.family), meta_transformer(folder)
        # Converted weights take precedence over the checkpoint's shards, linked or copied, which hold the original ones.
        own = [name for name in manifest.files if name not in (CONFIG_FILE, ADAPTER_FILE)]
        own.sort(key=lambda name: name != CONVERTED_FILE)
        adapter = manifest.layout or _adapter_in(folder, manifest, family)
        try:
            load_weights(transformer, [folder / name for name in (*own, *manifest.links)], device)
            return engine_of(SliderBackbone(family, transformer, adapter), manifest)
        except torch.OutOfMemoryError:
            raise OutOfDeviceMemory(
                f"the GPU is out of memory for the weights of {str(folder)!r}; free some, or build with --dtype bfloat16"
            ) from None
