"""TensorRT-RTX: runs `model.engine` of an engine folder on an NVIDIA GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slideredit_rt.engines.manifest import Manifest
from slideredit_rt.engines.request import check_request
from slideredit_rt.errors import SliderEditError

PLAN_FILE = "model.engine"
_MAX_BINDINGS = 8


@dataclass(frozen=True)
class Environment:
    """What of this machine decides whether an engine can run. `capability` is such as `sm89`, None without a GPU."""

    package_version: str | None
    capability: str | None

    @classmethod
    def here(cls) -> Environment:
        """Of this process."""
        try:
            package: str | None = version("tensorrt_rtx")
        except PackageNotFoundError:
            package = None
        if not torch.cuda.is_available():
            return cls(package, None)
        major, minor = torch.cuda.get_device_capability()
        return cls(package, f"sm{major}{minor}")


def check_environment(manifest: Manifest, environment: Environment) -> None:
    """Refuse an engine that cannot run here, before anything is allocated.

    Raises:
        SliderEditError: package missing or of another version, no GPU, or a GPU that the engine was not built for.
    """
    if environment.package_version is None:
        raise SliderEditError(
            "the backend 'tensorrt-rtx' needs the package tensorrt-rtx; pip install 'slideredit-rt[tensorrt-rtx]'"
        )
    if environment.package_version != manifest.backend_version:
        raise SliderEditError(
            f"the engine was built by TensorRT-RTX {manifest.backend_version} and {environment.package_version} is installed; "
            "build it again or install that version"
        )
    if environment.capability is None:
        raise SliderEditError(
            f"the engine runs on NVIDIA GPUs ({', '.join(manifest.targets)}) and none is visible here; "
            "build one with --backend onnxruntime for the CPU"
        )
    if environment.capability not in manifest.targets:
        raise SliderEditError(
            f"the engine was built for {', '.join(manifest.targets)} and this GPU is {environment.capability}; "
            f"build it again with --targets {environment.capability}"
        )


@dataclass
class _Binding:
    """Device buffers of one set of shapes, written in place by every call, and the context that knows their addresses."""

    context: Any
    inputs: dict[str, Tensor]
    output: Tensor
    stream: torch.cuda.Stream = field(default_factory=torch.cuda.Stream)


class TensorRTEngine:
    """Runs a TensorRT-RTX plan; contexts of several shapes share one engine.

    Inputs may lie on the CPU or on the GPU: they are copied into the buffers whose addresses the context holds, so that a
    CUDA graph that TensorRT-RTX captured for a shape replays with new alphas and masks.
    """

    def __init__(self, folder: Path, manifest: Manifest, *, threads: int | None = None) -> None:
        check_environment(manifest, Environment.here())
        import tensorrt_rtx as trt

        self.manifest = manifest
        self._trt = trt
        self._logger = trt.Logger(trt.Logger.ERROR)  # TensorRT keeps a bare pointer to it
        self._runtime = trt.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine((folder / PLAN_FILE).read_bytes())
        if self._engine is None:
            raise SliderEditError(f"TensorRT-RTX cannot read {str(folder / PLAN_FILE)!r}; build the engine again")
        self._bindings: dict[tuple[tuple[int, ...], ...], _Binding] = {}

    def _bind(self, inputs: Mapping[str, Tensor]) -> _Binding:
        specs = self.manifest.inputs
        sizes = check_request(self.manifest, inputs)
        config = self._engine.create_runtime_config()
        config.cuda_graph_strategy = self._trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        context = self._engine.create_execution_context(config)
        if context is None:
            raise SliderEditError(f"the GPU has no memory left for the sizes {sizes}; use a smaller batch or resolution")
        output = self.manifest.outputs[0]
        buffers = {s.name: torch.empty(s.resolve(sizes), dtype=getattr(torch, s.dtype), device="cuda") for s in specs}
        result = torch.empty(output.resolve(sizes), dtype=getattr(torch, output.dtype), device="cuda")
        for name, buffer in buffers.items():
            context.set_input_shape(name, tuple(buffer.shape))
        for name, buffer in (*buffers.items(), (output.name, result)):
            context.set_tensor_address(name, buffer.data_ptr())
        return _Binding(context, buffers, result)

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """One prediction (see `slideredit_rt.engines.Engine`), on the device of the inputs."""
        key = tuple(tuple(inputs[s.name].shape) if s.name in inputs else () for s in self.manifest.inputs)
        binding = self._bindings.get(key)
        if binding is None:
            if len(self._bindings) == _MAX_BINDINGS:
                del self._bindings[next(iter(self._bindings))]
            binding = self._bindings[key] = self._bind(inputs)
        # A stream of its own: the default one cannot be captured.
        binding.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(binding.stream):
            for name, buffer in binding.inputs.items():
                buffer.copy_(inputs[name], non_blocking=True)
            if not binding.context.execute_async_v3(binding.stream.cuda_stream):
                raise SliderEditError("TensorRT-RTX failed to run the engine; see its log on standard error")
        torch.cuda.current_stream().wait_stream(binding.stream)
        return binding.output.to(inputs[self.manifest.inputs[0].name].device)
