"""The ONNX Runtime backend, which is the default and runs on the CPU."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from slideredit_rt.engines.backend import Backend, BuildJob, Compiled, DType, ServedModel
from slideredit_rt.engines.manifest import MODEL_FILE, Manifest
from slideredit_rt.engines.request import check_request
from slideredit_rt.engines.shapes import ShapeCache
from slideredit_rt.errors import SliderEditError

_NUMPY = {"float32": np.float32, "bool": np.bool_}
_TORCH = {"float32": torch.float32, "bool": torch.bool}
_MAX_BINDINGS = 16
_SPIN_MICROSECONDS = 50
"""Time that an idle thread spins before it sleeps, about the gap between two operators. ONNX Runtime's default is longer and
takes the cores away from other threads (decoding, HTTP)."""


class _Binding:
    """I/O binding for one set of shapes. Its output is allocated once; inputs are bound to the caller's own memory."""

    def __init__(self, session: onnxruntime.InferenceSession, output: str, shape: tuple[int, ...]) -> None:
        self.io = session.io_binding()
        self.output = torch.empty(shape)
        self.bound: dict[str, int] = {}
        self.io.bind_output(output, "cpu", 0, np.float32, shape, self.output.data_ptr())


class _Bindings(threading.local):
    """Bindings of one thread by shapes. They are per thread because another thread may still be reading its output."""

    def __init__(self) -> None:
        self.by_shapes: ShapeCache[_Binding] = ShapeCache(_MAX_BINDINGS)


class OnnxRuntimeEngine:
    """Engine that runs `model.onnx` on the CPU.

    A step does not copy or allocate arrays on the Python side: inputs are bound in place, and the output tensor is reused by
    the same thread's next call with the same shapes. Thread-safe: concurrent calls run in parallel.

    Args:
        folder: engine folder.
        manifest: manifest of the folder.
        threads: threads of ONNX Runtime; None uses its default.

    Raises:
        SliderEditError: ONNX Runtime cannot load the graph.
    """

    def __init__(self, folder: Path, manifest: Manifest, *, threads: int | None = None) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.spin_duration_us", str(_SPIN_MICROSECONDS))
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            self.session = onnxruntime.InferenceSession(folder / MODEL_FILE, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises several unrelated classes
            raise SliderEditError(f"ONNX Runtime cannot load {str(folder)!r} ({error}); build the engine again") from error
        self.manifest = manifest
        self._bindings = _Bindings()

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Predict one step (see `slideredit_rt.engines.Engine`).

        Raises:
            SliderEditError: an input does not match the manifest.
        """
        specs = self.manifest.inputs
        key = tuple(tuple(inputs[s.name].shape) if s.name in inputs else () for s in specs)
        binding = self._bindings.by_shapes.get(key, lambda: self._bind(inputs))
        for spec in specs:
            tensor = inputs[spec.name]
            # Check every call: the address of a bound tensor may have been reused for another dtype or layout.
            if tensor.dtype != _TORCH[spec.dtype] or not tensor.is_contiguous() or not tensor.is_cpu:
                check_request(self.manifest, inputs)
                raise SliderEditError(f"engine input {spec.name!r} is on {tensor.device}, but this engine runs on the CPU")
            pointer = tensor.data_ptr()
            if binding.bound.get(spec.name) != pointer:
                binding.io.bind_input(spec.name, "cpu", 0, _NUMPY[spec.dtype], tuple(tensor.shape), pointer)
                binding.bound[spec.name] = pointer
        self.session.run_with_iobinding(binding.io)
        return binding.output

    def _bind(self, inputs: Mapping[str, Tensor]) -> _Binding:
        output = self.manifest.outputs[0]
        return _Binding(self.session, output.name, output.resolve(check_request(self.manifest, inputs)))


class OnnxRuntime(Backend):
    """ONNX Runtime on the CPU: runs the exported graph with weights linked from the checkpoint."""

    name = "onnxruntime"
    title = "ONNX Runtime"
    package = "onnxruntime"
    lowerings = ("native", "folded")
    served = ServedModel("onnxruntime_onnx", MODEL_FILE, MODEL_FILE, is_graph=True)

    def choose_dtype(self, asked: DType | None) -> DType:
        """Return the requested dtype, float32 by default (see `Backend.choose_dtype`)."""
        if asked == "bfloat16":
            raise SliderEditError("ONNX Runtime cannot multiply bfloat16 matrices on the CPU; use --dtype float32")
        return asked or "float32"

    def compile(self, job: BuildJob, folder: Path) -> Compiled:
        """Write the graph and link the weights beside it (see `Backend.compile`)."""
        from slideredit_rt.export.linked_weights import WeightOptions, export_linked

        # ONNX Runtime does not follow symbolic links.
        weights = WeightOptions(job.dtype, symbolic_links=False, copy=job.settings.copy_weights)
        exported = export_linked(job.family, job.base, job.adapter, folder, weights, lowering=job.lowering)
        return Compiled(exported, exported.files, exported.links)

    def open(self, folder: Path, manifest: Manifest, *, threads: int | None = None, options: Any = None) -> OnnxRuntimeEngine:
        """Load the graph (see `Backend.open`)."""
        return OnnxRuntimeEngine(folder, manifest, threads=threads)
