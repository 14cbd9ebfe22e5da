"""The ONNX Runtime backend: the default, on the CPU, or on a GPU with onnxruntime-gpu."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from slideredit_rt.engines.backend import Backend, BuildJob, Compiled, DType, ServedModel
from slideredit_rt.engines.cuda import CudaDevice
from slideredit_rt.engines.manifest import MODEL_FILE, Manifest
from slideredit_rt.engines.request import check_request, reading_request
from slideredit_rt.engines.shapes import ShapeCache
from slideredit_rt.errors import OutOfDeviceMemory, SliderEditError
from slideredit_rt.settings import RunSettings

_NUMPY = {"float32": np.float32, "bool": np.bool_, "int64": np.int64}
_TORCH = {"float32": torch.float32, "bool": torch.bool, "int64": torch.int64}
_CUDA_PROVIDER = "CUDAExecutionProvider"
_MAX_BINDINGS = 16
_SPIN_MICROSECONDS = 50
"""Time that an idle thread spins before it sleeps, about the gap between two operators. ONNX Runtime's default is longer and
takes the cores away from other threads (decoding, HTTP)."""


class _Binding:
    """I/O binding for one set of shapes. Its output is allocated once; inputs are bound to the caller's own memory."""

    def __init__(
        self, session: onnxruntime.InferenceSession, output: str, shape: tuple[int, ...], device: torch.device
    ) -> None:
        self.io = session.io_binding()
        self.output = torch.empty(shape, device=device)
        self.bound: dict[str, int] = {}
        self.io.bind_output(output, device.type, device.index or 0, np.float32, shape, self.output.data_ptr())


class _Bindings(threading.local):
    """Bindings of one thread by shapes. They are per thread because another thread may still be reading its output."""

    def __init__(self) -> None:
        self.by_shapes: ShapeCache[_Binding] = ShapeCache(_MAX_BINDINGS)


class OnnxRuntimeEngine:
    """Engine that runs `model.onnx` on the CPU, or on a GPU if the installed package has a CUDA provider.

    A step does not copy or allocate arrays on the Python side: inputs are bound in place, and the output tensor is reused by
    the same thread's next call with the same shapes. Thread-safe: concurrent calls run in parallel on the CPU. On a GPU they
    run one after the other, on a stream of the engine that the caller's stream waits for.

    Args:
        folder: Engine folder.
        manifest: Manifest of the folder.
        threads: Threads of ONNX Runtime; None uses its default.
        device: Device to run on; None uses the CPU.

    Raises:
        SliderEditError: ONNX Runtime cannot load the graph, or cannot use its CUDA provider.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, *, threads: int | None = None, device: torch.device | None = None
    ) -> None:
        self.device = device or torch.device("cpu")
        self._cuda = CudaDevice(self.device) if self.device.type == "cuda" else None
        self._lock: AbstractContextManager[Any] = threading.Lock() if self._cuda else nullcontext()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.spin_duration_us", str(_SPIN_MICROSECONDS))
        if threads is not None:
            options.intra_op_num_threads = threads
        providers = self._providers()
        try:
            self.session = onnxruntime.InferenceSession(folder / MODEL_FILE, options, providers=providers)
        except Exception as error:  # onnxruntime raises several unrelated classes
            raise SliderEditError(f"ONNX Runtime cannot load {str(folder)!r} ({error}); build the engine again") from error
        # A provider whose libraries cannot be loaded is left out without an error.
        if self._cuda and self.session.get_providers()[0] != _CUDA_PROVIDER:
            raise SliderEditError(
                f"ONNX Runtime cannot use its {_CUDA_PROVIDER}: a library of CUDA or cuDNN is missing; install them, or leave "
                "out --device"
            )
        self.manifest = manifest
        self._bindings = _Bindings()
        self._run_options = onnxruntime.RunOptions()
        if self._cuda:
            # The host need not wait for the GPU: whoever reads the output does so in the order of streams.
            self._run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def _providers(self) -> list[Any]:
        if self._cuda is None:
            return ["CPUExecutionProvider"]
        options = {
            "device_id": self.device.index or 0,
            "user_compute_stream": str(self._cuda.own.cuda_stream),
            "use_tf32": "0",  # float32 engines are verified as such
        }
        return [(_CUDA_PROVIDER, options), "CPUExecutionProvider"]

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Predict one step (see `slideredit_rt.engines.Engine`).

        Raises:
            SliderEditError: An input does not match the manifest.
        """
        with self._lock:
            return self._run(inputs)

    def read(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Read source images with the same graph (see `slideredit_rt.families.Reader`).

        Raises:
            SliderEditError: An input does not match the manifest.
        """
        with self._lock:
            return self._run(reading_request(self.manifest, inputs), 1)

    def _run(self, inputs: Mapping[str, Tensor], output: int = 0) -> Tensor:
        specs = self.manifest.inputs
        key = (output, *(tuple(inputs[s.name].shape) if s.name in inputs else () for s in specs))
        binding = self._bindings.by_shapes.get(key, lambda: self._bind(inputs, output))
        for spec in specs:
            tensor = inputs[spec.name]
            # Check every call: the address of a bound tensor may have been reused for another dtype or layout.
            if tensor.dtype != _TORCH[spec.dtype] or not tensor.is_contiguous() or tensor.device != self.device:
                check_request(self.manifest, inputs)
                raise SliderEditError(
                    f"engine input {spec.name!r} is on {tensor.device}, but this engine runs on {self.device}"
                )
            pointer = tensor.data_ptr()
            if binding.bound.get(spec.name) != pointer:
                place = (self.device.type, self.device.index or 0)
                binding.io.bind_input(spec.name, *place, _NUMPY[spec.dtype], tuple(tensor.shape), pointer)
                binding.bound[spec.name] = pointer
        if self._cuda is None:
            self.session.run_with_iobinding(binding.io)
        else:
            try:
                with self._cuda.between():
                    self.session.run_with_iobinding(binding.io, self._run_options)
            except Exception as error:  # onnxruntime raises several unrelated classes
                if "allocat" in str(error).lower():
                    raise OutOfDeviceMemory(
                        "the GPU is out of memory for the step; use a smaller batch or resolution"
                    ) from None
                raise
        return binding.output

    def _bind(self, inputs: Mapping[str, Tensor], index: int) -> _Binding:
        output = self.manifest.outputs[index]
        return _Binding(self.session, output.name, output.resolve(check_request(self.manifest, inputs)), self.device)


class OnnxRuntime(Backend):
    """ONNX Runtime: runs the exported graph with weights linked from the checkpoint."""

    name = "onnxruntime"
    title = "ONNX Runtime"
    package = "onnxruntime"
    lowerings = ("native", "folded")
    reads_images = True
    served = ServedModel("onnxruntime_onnx", MODEL_FILE, MODEL_FILE, is_graph=True)
    # fp8 has no fast kernel on a CPU: it is for comparing accuracy.
    quantised: ClassVar = {"int8": "nbits", "int4": "nbits", "fp8": "qdq"}

    def choose_dtype(self, asked: DType | None) -> DType:
        """Return the requested dtype, float32 by default (see `Backend.choose_dtype`)."""
        if asked == "bfloat16":
            raise SliderEditError("ONNX Runtime cannot multiply bfloat16 matrices on the CPU; use --dtype float32")
        return asked or "float32"

    def compile(self, job: BuildJob, folder: Path) -> Compiled:
        """Write the graph and link the weights beside it (see `Backend.compile`)."""
        from slideredit_rt.export.linked_weights import WeightOptions, export_linked

        # ONNX Runtime does not follow symbolic links.
        weights = WeightOptions(
            job.dtype,
            symbolic_links=False,
            copy=job.settings.copy_weights,
            quantised=self.quantised,
            updates=job.updates,
        )
        exported = export_linked(job.family, job.base, job.adapter, folder, weights, lowering=job.lowering)
        return Compiled(exported, exported.files, exported.links)

    def choose_device(self, manifest: Manifest, run: RunSettings) -> torch.device:
        """Return the requested device, by default the CPU, and check that the installed package supports it.

        See `Backend.choose_device`.
        """
        device = run.choose_device()
        if device.type == "cuda" and _CUDA_PROVIDER not in onnxruntime.get_available_providers():
            raise SliderEditError(
                f"the installed ONNX Runtime has no {_CUDA_PROVIDER}; pip install onnxruntime-gpu in place of onnxruntime, or "
                "leave out --device"
            )
        return device

    def open(self, folder: Path, manifest: Manifest, run: RunSettings) -> OnnxRuntimeEngine:
        """Load the graph (see `Backend.open`)."""
        return OnnxRuntimeEngine(folder, manifest, threads=run.threads, device=self.choose_device(manifest, run))
