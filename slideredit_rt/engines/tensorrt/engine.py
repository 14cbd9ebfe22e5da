"""Execution of plans (`model.engine`) on an NVIDIA GPU with TensorRT or TensorRT-RTX."""

from __future__ import annotations

import math
import mmap
import re
import threading
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from slideredit_rt.engines.adapter_inputs import AdapterBuffers
from slideredit_rt.engines.cuda import CudaDevice
from slideredit_rt.engines.manifest import Manifest
from slideredit_rt.engines.request import InputBuffers, Outputs, check_request, reading_request
from slideredit_rt.engines.shapes import ShapeCache
from slideredit_rt.engines.tensorrt.logger import make_logger
from slideredit_rt.engines.tensorrt.options import RuntimeOptions
from slideredit_rt.errors import OutOfDeviceMemory, SliderEditError
from slideredit_rt.files import atomic_file, cache_directory

PLAN_FILE = "model.engine"


@dataclass
class _Binding:
    """Context for one set of shapes, with the buffers whose addresses the context and its captured graph hold."""

    context: Any
    config: Any
    inputs: InputBuffers
    outputs: list[Tensor]
    scratch: Tensor
    warm: bool = False
    replay: Callable[[], None] | None = None

    def release(self) -> None:
        self.replay = None
        self.context = None


@dataclass
class _Loaded:
    """A plan in device memory. It is released in order from the graphs to the runtime, because each refers to the next."""

    device: CudaDevice
    logger: Any  # must stay alive, because TensorRT keeps a raw pointer to it
    runtime: Any
    engine: Any
    bindings: ShapeCache[_Binding]
    cache: Any = None
    cache_file: Path | None = None
    scratch: Tensor | None = None

    def release(self) -> None:
        self.device.wait()
        if self.cache_file is not None:
            save_runtime_cache(self.cache, self.cache_file)
        self.bindings.clear()
        self.scratch = self.cache = None
        self.engine = None
        self.runtime = None


class TensorRTEngine:
    """Engine that runs a plan. A context manager.

    There is one execution context per set of shapes; all contexts share the weights and scratch memory. Inputs may be on the
    CPU or the GPU. They are copied into fixed buffers, so a captured CUDA graph can be replayed with new alphas and masks.

    Thread-safe: concurrent calls run one after the other, each on its caller's CUDA stream. Each thread has its own outputs,
    which its next call with the same shapes overwrites. Without `close()`, the plan is released when the engine is garbage
    collected or the interpreter exits.

    Args:
        plan: File of the serialized engine.
        manifest: Manifest of the engine.
        trt: The module `tensorrt` or `tensorrt_rtx`.
        device: Device to run on.
        options: Run options, see `RuntimeOptions`.
        threads: Largest number of CPU threads of TensorRT; None lets TensorRT choose.

    Attributes:
        title: Name of the backend as its makers write it.
        captures_graphs: Capture CUDA graphs in this class; TensorRT-RTX captures them itself.

    Raises:
        SliderEditError: The plan is damaged, does not fit into device memory, or does not support weight streaming.
    """

    title: ClassVar[str] = "TensorRT"
    captures_graphs: ClassVar[bool] = True

    def __init__(
        self, plan: Path, manifest: Manifest, trt: Any, device: CudaDevice, options: RuntimeOptions, threads: int | None = None
    ) -> None:
        self.manifest = manifest
        self._lock = threading.RLock()
        self._trt, self._device, self._options = trt, device, options
        self._outputs = Outputs(options.max_contexts)
        self._adapter = AdapterBuffers(manifest, device.device)
        self._logger = make_logger(trt)
        try:
            runtime = trt.Runtime(self._logger)
        except (TypeError, RuntimeError):  # raised by pybind11 when the constructor returns nothing
            raise SliderEditError(f"{self.title} cannot start here ({self._logger.why()}); update the NVIDIA driver") from None
        if threads is not None:
            runtime.max_threads = threads
        if manifest.compatibility.get("versions"):
            runtime.engine_host_code_allowed = True  # such a plan contains its own runtime
        # Map the file to avoid another host copy of the weights.
        with plan.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            engine = runtime.deserialize_cuda_engine(content)
        if engine is None:
            reason = self._logger.why()
            todo = "free GPU memory, or build with --weight-streaming" if _is_memory(reason) else "build the engine again"
            raise SliderEditError(f"{self.title} cannot load {str(plan)!r} ({reason}); {todo}")
        if options.weight_budget is not None:
            _set_weight_budget(engine, options.weight_budget)

        def release(binding: _Binding) -> None:
            device.wait()
            binding.release()

        self._loaded = _Loaded(device, self._logger, runtime, engine, ShapeCache(options.max_contexts, release))
        self._release = weakref.finalize(self, self._loaded.release)
        self._load_cache()

    def _load_cache(self) -> None:
        """Load kernels that earlier processes compiled. Empty here, because TensorRT compiles everything at build time."""

    def close(self) -> None:
        """Release graphs, contexts, weights and the runtime, and save the kernels that TensorRT-RTX compiled. Idempotent."""
        with self._lock:
            self._release()

    def __enter__(self) -> TensorRTEngine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def device(self) -> torch.device:
        """The GPU that holds the plan."""
        return self._device.device

    @property
    def plan(self) -> Any:
        """The deserialized `ICudaEngine`."""
        return self._loaded.engine

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Predict one step (see `slideredit_rt.engines.Engine`). The output is on the device of the inputs.

        Raises:
            SliderEditError: The engine is closed, an input does not match the manifest, or the device is out of memory.
        """
        return self._call(inputs)

    @torch.no_grad()
    def read(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Read source images with the same weights, in the plan's second profile (see `slideredit_rt.families.Reader`).

        Raises:
            SliderEditError: See `__call__`.
        """
        return self._call(reading_request(self.manifest, inputs), 1)

    def _call(self, inputs: Mapping[str, Tensor], output: int = 0) -> Tensor:
        """Run a step, or with the second output a reading of source images."""
        sizes = check_request(self.manifest, inputs, reading=output == 1)
        with self._lock:
            if not self._release.alive:
                raise SliderEditError("the engine is closed; open it again")
            result = self._outputs.of(self.manifest, sizes, inputs, output)
            with self._device.stream() as stream:
                binding = self._loaded.bindings.get((output, *sizes.values()), lambda: self._bind(sizes, output, stream))
                self._adapter.fill(inputs)
                binding.inputs.fill(inputs)
                self._run(binding, stream)
                result.copy_(binding.outputs[output])
        return result

    def _bind(self, sizes: dict[str, int], profile: int, stream: int) -> _Binding:
        """Create a context and its buffers for one set of shapes in one of the plan's profiles."""
        full = OutOfDeviceMemory(
            f"the GPU is out of memory for the sizes {sizes}; use a smaller batch or resolution, or --weight-budget-mib"
        )
        config = self._runtime_config()
        context = self._loaded.engine.create_execution_context(config)
        if context is None:
            raise full
        try:
            inputs = InputBuffers(self.manifest, sizes, self._empty)
            bound = {**inputs.tensors, **self._adapter.tensors}
            outputs = {s.name: self._empty(s.resolve(sizes), s.dtype) for s in self.manifest.outputs}
            # A plan with one profile selects it by itself.
            selected = not self.manifest.reading_ranges or context.set_optimization_profile_async(profile, stream)
            if not selected or not all(context.set_input_shape(name, tuple(one.shape)) for name, one in bound.items()):
                raise SliderEditError(f"{self.title} refuses the sizes {sizes} ({self._logger.why()}); build the engine again")
            scratch = self._scratch(context.update_device_memory_size_for_shapes())
        except torch.OutOfMemoryError:
            raise full from None
        context.set_device_memory(scratch.data_ptr(), scratch.numel())
        for name, buffer in (bound | outputs).items():
            # The storage's address, because that of a tensor without elements is null, which TensorRT refuses for outputs.
            context.set_tensor_address(name, buffer.untyped_storage().data_ptr())
        return _Binding(context, config, inputs, list(outputs.values()), scratch)

    def _empty(self, shape: tuple[int, ...], dtype: str) -> Tensor:
        """Allocate a tensor with a storage of its own, which is not empty."""
        size = math.prod(shape)
        return torch.empty(max(size, 1), dtype=getattr(torch, dtype), device=self._device.device)[:size].view(shape)

    def _scratch(self, size: int) -> Tensor:
        """Return the scratch memory that contexts share. When it grows, older contexts keep the memory their graphs use."""
        scratch = self._loaded.scratch
        if scratch is None or scratch.numel() < size:
            scratch = self._loaded.scratch = self._empty((max(size, 1),), "uint8")
        return scratch

    def _runtime_config(self) -> Any:
        config = self._loaded.engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(self._trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        return config

    def _run(self, binding: _Binding, stream: int) -> None:
        # TensorRT-RTX captures graphs itself once its kernels for the shapes are compiled. With TensorRT, the first enqueue of
        # a context does initialisation that is not allowed during a capture.
        if self._options.cuda_graphs and self.captures_graphs and binding.warm:
            if binding.replay is None:
                binding.replay = self._capture(binding)
            binding.replay()
        else:
            self._enqueue(binding, stream)
            binding.warm = True

    def _enqueue(self, binding: _Binding, stream: int) -> None:
        if not binding.context.execute_async_v3(stream):
            reason = self._logger.why()
            if _is_memory(reason):
                raise OutOfDeviceMemory(f"{self.title} failed to run the engine ({reason}); use a smaller batch or resolution")
            raise SliderEditError(f"{self.title} failed to run the engine ({reason}); build the engine again")

    def _capture(self, binding: _Binding) -> Callable[[], None]:
        try:
            return self._device.capture(partial(self._enqueue, binding))
        except torch.OutOfMemoryError:
            raise OutOfDeviceMemory(
                "the GPU is out of memory for capturing a CUDA graph; use a smaller batch, or --cuda-graphs off"
            ) from None
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise SliderEditError(
                f"the engine cannot be captured in a CUDA graph ({reason}); run it with --cuda-graphs off"
            ) from error


class TensorRTRTXEngine(TensorRTEngine):
    """`TensorRTEngine` for TensorRT-RTX, which compiles kernels at run time. They are cached on disk for later processes."""

    title = "TensorRT-RTX"
    captures_graphs = False

    def _load_cache(self) -> None:
        loaded = self._loaded
        loaded.cache = loaded.engine.create_runtime_config().create_runtime_cache()
        loaded.cache_file = runtime_cache_file(self.manifest, self._device.name)
        load_runtime_cache(loaded.cache, loaded.cache_file)

    def _runtime_config(self) -> Any:
        trt, options, config = self._trt, self._options, super()._runtime_config()
        graphs, kernels = trt.CudaGraphStrategy, trt.DynamicShapesKernelSpecializationStrategy
        config.cuda_graph_strategy = graphs.WHOLE_GRAPH_CAPTURE if options.cuda_graphs else graphs.DISABLED
        config.dynamic_shapes_kernel_specialization_strategy = getattr(kernels, options.specialization.upper())
        config.set_runtime_cache(self._loaded.cache)
        return config


def runtime_cache_file(manifest: Manifest, card: str) -> Path:
    """Return the file in the user's cache for kernels that TensorRT-RTX compiles for an engine and a GPU.

    Args:
        manifest: Manifest of the engine; the plan's hash and the backend's version become part of the file name.
        card: Name of the GPU.
    """
    plan = manifest.files[PLAN_FILE]["sha256"][:16]
    slug = re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")
    return cache_directory() / manifest.backend / f"{plan}-{slug}-{manifest.backend_version}.bin"


def load_runtime_cache(cache: Any, file: Path) -> None:
    """Load an `IRuntimeCache` from a file. If the file is missing, damaged or from another driver, the cache stays empty."""
    with suppress(OSError):
        cache.deserialize(file.read_bytes())


def save_runtime_cache(cache: Any, file: Path) -> None:
    """Write an `IRuntimeCache` to a file atomically. Errors are ignored, because the kernels can be compiled again."""
    content = cache.serialize()
    if content is not None and content.nbytes:
        with suppress(SliderEditError), atomic_file(file) as temporary:
            temporary.write_bytes(content)


def _set_weight_budget(engine: Any, budget: int | Literal["auto"]) -> None:
    if not engine.streamable_weights_size:
        raise SliderEditError(
            "the engine was built without weight streaming, so it has no weight budget; build it again with --weight-streaming"
        )
    engine.weight_streaming_budget_v2 = engine.get_weight_streaming_automatic_budget() if budget == "auto" else budget


def _is_memory(reason: str) -> bool:
    """Return whether an error of TensorRT or CUDA is about device memory."""
    return "outofmemory" in reason.lower().replace(" ", "")
