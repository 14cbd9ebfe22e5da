"""Inductor: the diffusers transformer with our operators, compiled by `torch.compile` on the machine that runs it."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from safetensors import SafetensorError, safe_open
from torch import Tensor

from slideredit_rt.adapters import Member, load_adapter
from slideredit_rt.checkpoint import CONFIG_FILE, meta_transformer
from slideredit_rt.engines.backend import Backend, BuildJob, Compiled
from slideredit_rt.engines.cuda import CudaDevice
from slideredit_rt.engines.manifest import ADAPTER_FILE, Manifest
from slideredit_rt.engines.request import Outputs, check_request
from slideredit_rt.engines.shapes import ShapeCache
from slideredit_rt.errors import SliderEditError
from slideredit_rt.families import get_family
from slideredit_rt.modules import SliderBackbone
from slideredit_rt.placement import Placement

COMPILER = "inductor"
# Dynamo counts the compiled forms of a block's source code over every engine of the process; at its default of 8 it gives up.
RECOMPILE_LIMIT = 256
_MAX_BINDINGS = 8
# Tracing and compiling go by state of the whole process.
_COMPILING = threading.Lock()


@dataclass
class _Binding:
    """One set of shapes: buffers whose addresses a captured graph holds, and on a GPU the graph itself."""

    inputs: dict[str, Tensor]
    output: Tensor
    step: Callable[[], None]


def compile_blocks(backbone: SliderBackbone) -> None:
    """Compile the repeated blocks of a backbone's transformer, in place, on their first call with each set of shapes.

    Blocks of the same class share their compiled code: the 57 of FLUX take as long as three. Sizes are constants in it.
    What is compiled depends on no alpha and no mask, so that changing strengths compiles nothing.
    """
    transformer: Any = backbone.transformer
    transformer.compile_repeated_blocks(fullgraph=True, dynamic=False, backend=COMPILER)


def load_weights(transformer: Any, files: Iterable[Path], device: torch.device) -> None:
    """Give a transformer on `meta` its weights, read straight onto the device; the first file that holds a tensor wins.

    Args:
        transformer: changed in place.
        files: safetensors under the transformer's own names; tensors that it does not have are left out.
        device: where it shall run.

    Raises:
        SliderEditError: a file cannot be read, or a tensor is in none of them.
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
    transformer.to(device)  # buffers, which the configuration made


class InductorEngine:
    """Runs a compiled backbone on the device of its weights.

    The first call with a set of shapes compiles; on a GPU it also captures a CUDA graph, which later calls replay. Inputs may
    lie on any device and are copied into buffers of fixed addresses. Sliders are filled up to the engine's largest number with
    alpha 0 and empty masks, which changes no bit, so that their number is no shape. Hence only another batch, text or image
    size compiles; the buffers and graphs of the last eight sets of shapes are kept. Torch caches compiled code on disk
    (`TORCHINDUCTOR_CACHE_DIR`). Safe between threads: their calls run one after the other, and each thread has outputs of its
    own, which its next call with the same shapes writes again. A context manager.

    Args:
        backbone: its transformer's blocks are compiled in place.
        manifest: what the engine takes.
    """

    def __init__(self, backbone: SliderBackbone, manifest: Manifest) -> None:
        self.manifest = manifest
        self._lock = threading.RLock()
        self.device = next(backbone.parameters()).device
        self._cuda = cuda = CudaDevice(self.device) if self.device.type == "cuda" else None
        # Outputs lie outside of it and graphs replay one at a time, so that all of them can use the same memory.
        self._pool = torch.cuda.graph_pool_handle() if self._cuda else None
        self._bindings: ShapeCache[_Binding] = ShapeCache(_MAX_BINDINGS, lambda _: cuda.wait() if cuda else None)
        self._outputs = Outputs(_MAX_BINDINGS)
        self._backbone: SliderBackbone | None = backbone
        compile_blocks(backbone)

    def close(self) -> None:
        """Let go of graphs, buffers and weights. Idempotent."""
        with self._lock:
            self.forget_shapes()
            self._backbone = None

    def forget_shapes(self) -> None:
        """Let go of buffers and graphs; the next call captures again. For a transformer that was changed since."""
        with self._lock:
            self._bindings.clear()

    def __enter__(self) -> InductorEngine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """One prediction (see `slideredit_rt.engines.Engine`), on the device of the inputs.

        Raises:
            SliderEditError: the engine is closed, a tensor is not what it takes, the device's memory is used up, or torch
                cannot compile here.
        """
        sizes = check_request(self.manifest, inputs)
        if "sliders" in sizes:
            sizes |= {"sliders": self.manifest.max_sliders}
        key = tuple(sizes.values())
        with self._lock:
            backbone = self._backbone
            if backbone is None:
                raise SliderEditError("the engine was closed; open it again")
            result = self._outputs.of(self.manifest, sizes, inputs)
            with self._stream():
                binding = self._bindings.get(key, lambda: self._bind(backbone, sizes, inputs))
                _fill(binding.inputs, inputs)
                binding.step()
                result.copy_(binding.output)
        return result

    def _stream(self) -> AbstractContextManager[Any]:
        return self._cuda.stream() if self._cuda else nullcontext()

    def _bind(self, backbone: SliderBackbone, sizes: Mapping[str, int], inputs: Mapping[str, Tensor]) -> _Binding:
        """Allocate the buffers of one set of shapes, compile, and capture."""
        spec = self.manifest.outputs[0]
        try:
            buffers = {s.name: self._empty(s.resolve(sizes), s.dtype) for s in self.manifest.inputs}
            output = self._empty(spec.resolve(sizes), spec.dtype)

            def step() -> None:
                output.copy_(backbone(buffers))

            # Valid values: a kernel may index by them.
            _fill(buffers, inputs)
            limits = {"recompile_limit": RECOMPILE_LIMIT, "accumulated_recompile_limit": RECOMPILE_LIMIT}
            with _COMPILING, torch._dynamo.config.patch(limits):  # type: ignore[attr-defined]
                step()
            return _Binding(buffers, output, self._capture(step) if self._cuda else step)
        except torch.OutOfMemoryError:
            raise SliderEditError(
                f"the GPU has no memory left for the sizes {dict(sizes)}; use a smaller batch or resolution"
            ) from None
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = str(error).strip().splitlines()[0]
            raise SliderEditError(
                f"torch cannot compile the engine here ({reason}); install a C++ compiler, or use --backend onnxruntime"
            ) from error

    def _capture(self, step: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream(self.device)
        with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
            step()
        return graph.replay

    def _empty(self, shape: tuple[int, ...], dtype: str) -> Tensor:
        return torch.empty(shape, dtype=getattr(torch, dtype), device=self.device)


def _fill(buffers: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> None:
    """Copy a call's tensors into the buffers; sliders that it does not have get alpha 0 and an empty mask."""
    for name, buffer in buffers.items():
        if name in ("alpha", "token_mask"):
            sliders = inputs[name].shape[1]
            buffer[:, :sliders].copy_(inputs[name])
            buffer[:, sliders:].zero_()
        else:
            buffer.copy_(inputs[name])


class Inductor(Backend):
    """Inductor: the diffusers transformer with our operators, which choose a kernel for the card when they run."""

    name = "inductor"
    title = "Inductor"
    package = "torch"
    lowerings = ("operator",)

    def compile(self, job: BuildJob, folder: Path) -> Compiled:
        """Link the weights beside the transformer's configuration (see `Backend.compile`)."""
        from slideredit_rt.export.linked_weights import WeightOptions, export_weights

        weights = WeightOptions(job.dtype, copy=job.settings.copy_weights)
        exported = export_weights(job.family, job.base, job.adapter, folder, weights)
        return Compiled(exported, exported.files, exported.links)

    def open(
        self,
        folder: Path,
        manifest: Manifest,
        *,
        threads: int | None = None,
        options: Any = None,
        placement: Placement | None = None,
    ) -> InductorEngine:
        """Load an engine folder onto a CUDA device, or onto the CPU where there is none (see `Backend.open`).

        `threads` are those of torch, in the whole process; None leaves them as they are.
        """
        if threads is not None:
            torch.set_num_threads(threads)
        device = (placement or Placement()).choose_device(torch.device("cuda") if torch.cuda.is_available() else None)
        family, transformer = get_family(manifest.family), meta_transformer(folder)
        # Weights that were converted at the build come before the shards that hold them as they were.
        own = [name for name in manifest.files if name not in (CONFIG_FILE, ADAPTER_FILE)]
        adapter = load_adapter(folder / ADAPTER_FILE, family) if manifest.adapter else None
        if adapter is not None:
            dtype = getattr(torch, manifest.dtype)
            pairs = {name: (a.to(dtype), b.to(dtype)) for name, (a, b) in adapter.pairs.items()}
            members = {name: Member(adapter.source, curve) for name, curve in manifest.members.items()}
            adapter = dataclasses.replace(adapter, pairs=pairs, members=members)
        try:
            load_weights(transformer, [folder / name for name in (*own, *manifest.links)], device)
            backbone = SliderBackbone(family, transformer, adapter)
        except torch.OutOfMemoryError:
            raise SliderEditError(
                f"the GPU has no memory left for the weights of {str(folder)!r}; free some, or build it with --dtype bfloat16"
            ) from None
        return InductorEngine(backbone.eval().requires_grad_(False), manifest)
