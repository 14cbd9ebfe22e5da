"""TensorRT plugin that runs the Triton kernel: a quickly deployable plugin, compiled ahead of time to PTX.

`slideredit::MaskedLoRALinear(x, weight, bias, lora_a, lora_b, row_scale) -> y` is a complete adapted projection::

    y = x Wᵀ + bias + row_scale · (x Aᵀ) Bᵀ

x `[B, S, K]`, weight `[N, K]`, bias `[N]`, lora_a `[R, K]`, lora_b `[N, R]` and y `[B, S, N]` are all bfloat16 or all float16.
row_scale `[B, S]` is float32; strengths and masks remain run-time inputs. The engine contains the PTX and does not need Python.

The callbacks follow the contract of NVIDIA's `tensorrt.plugin` package, TensorRT 10.15 and newer.
"""

from __future__ import annotations

import importlib
import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import Any

import torch

from slideredit_rt.errors import SliderEditError
from slideredit_rt.kernels import aot
from slideredit_rt.kernels.arguments import MAX_RANK
from slideredit_rt.kernels.configurations import Configuration, configurations, padded_rank
from slideredit_rt.kernels.triton_linear import SPEC

NAMESPACE = "slideredit"
NAME = "MaskedLoRALinear"
PLUGIN = f"{NAMESPACE}::{NAME}"
# Attributes that TensorRT's ONNX parser needs on a node of type NAME: where to find the plugin, and to use its AOT kernel.
NODE_ATTRIBUTES: dict[str, str | int] = {"plugin_namespace": NAMESPACE, "plugin_version": "1", "aot": 1}
# dtypes by TensorRT's names in a combination.
DATA_TYPES = {"BF16": "bfloat16", "FP16": "float16"}

# Target and PTX ISA, by the name of TensorRT's plugin package. A process can register a plugin only once.
_registered: dict[str, tuple[str, str]] = {}


@dataclass(frozen=True)
class Launch:
    """Launch parameters of a kernel; sizes are integers or symbolic expressions.

    Attributes:
        grid: Number of programs along x and y.
        threads: Number of threads per block, along x.
        shared_bytes: Dynamic shared memory per block, in bytes.
        scalars: Int32 arguments between input and output pointers, in order: rows, K, N, rank.
    """

    grid: tuple[Any, Any]
    threads: int
    shared_bytes: int
    scalars: tuple[Any, ...]


def graph_rank(rank: int) -> int:
    """Return the rank in the graph of an adapter of rank `rank`: the next multiple of 16, padded with zeros."""
    return -(-rank // aot.ALIGNMENT) * aot.ALIGNMENT


def tactics(k: int, rank: int, dtype: str, target: str) -> list[Configuration]:
    """Return the configurations that TensorRT can choose from for a projection; tactic i is the i-th, counted from 1.

    These are the table's configurations for this rank, dtype and target, followed by its tile for 4-byte elements.
    The latter needs less than 48 KiB of shared memory, the most that a block has unless its launcher requests more.

    Args:
        k: Number of inner columns. Kernels load whole blocks, so only configurations whose block divides `k` are returned.
        rank: Rank in the graph.
        dtype: `bfloat16` or `float16`.
        target: Compute capability, such as `sm90`.
    """
    capability = int(target[2:])
    found = [
        *configurations(SPEC.name, rank, getattr(torch, dtype), capability),
        *configurations(SPEC.name, rank, torch.float32, capability),
    ]
    return [c for c in dict.fromkeys(found) if k % c.block_k == 0]


def why_not(k: int, n: int, rank: int, dtype: str, target: str) -> str | None:
    """Return the reason why the plugin has no kernel for a projection, or None if it has one.

    Args:
        k: Number of inner columns.
        n: Number of output columns.
        rank: Rank in the graph (see `graph_rank`).
        dtype: Dtype of all tensors except row_scale, such as `bfloat16`.
        target: Compute capability, such as `sm90`.
    """
    if target not in aot.TARGETS:
        return f"no kernel is compiled for {target}, only for {', '.join(aot.TARGETS)}"
    if dtype not in DATA_TYPES.values():
        return f"the plugin computes in {' or '.join(DATA_TYPES.values())}, not in {dtype}"
    if not 1 <= rank <= MAX_RANK:
        return f"rank {rank} is outside the kernels' range 1 to {MAX_RANK}"
    if rank % aot.ALIGNMENT:
        return f"rank {rank} is not a multiple of {aot.ALIGNMENT}; pad lora_a and lora_b with zeros to {graph_rank(rank)}"
    if n % aot.ALIGNMENT:
        return f"N = {n} is not a multiple of {aot.ALIGNMENT}"
    if not tactics(k, rank, dtype, target):
        # With k = 0, every block divides k, so all blocks are listed.
        blocks = sorted({c.block_k for c in tactics(0, rank, dtype, target)})
        return f"K = {k} is not a multiple of {' or '.join(map(str, blocks))}, the block sizes of the kernels"
    return None


def _fitting_tactics(k: int, n: int, rank: int, dtype: str, target: str) -> list[Configuration]:
    if reason := why_not(k, n, rank, dtype, target):
        raise SliderEditError(f"{PLUGIN} cannot compute a projection from {k} to {n} columns: {reason}")
    return tactics(k, rank, dtype, target)


def job_of(tactic: int, k: int, n: int, rank: int, dtype: str, target: str, ptx_isa: str = aot.DEFAULT_PTX_ISA) -> aot.Job:
    """Return the compile job of a tactic.

    Args:
        tactic: Number of the tactic, from 1.
        k: Number of inner columns.
        n: Number of output columns.
        rank: Rank in the graph.
        dtype: `bfloat16` or `float16`.
        target: Compute capability, such as `sm90`.
        ptx_isa: Version of the PTX instruction set.

    Raises:
        SliderEditError: The plugin has no kernel for the projection (see `why_not`), or there is no such tactic.
    """
    choices = _fitting_tactics(k, n, rank, dtype, target)
    if not 1 <= tactic <= len(choices):
        raise SliderEditError(
            f"{PLUGIN} has tactics 1 to {len(choices)} for this projection, got {tactic}; "
            "delete the timing cache if another version wrote it"
        )
    return aot.Job(SPEC.name, choices[tactic - 1], dtype, padded_rank(rank), target, ptx_isa)


def launch(job: aot.Job, description: dict[str, Any], rows: Any, k: Any, n: Any, rank: Any) -> Launch:
    """Return the launch parameters of a compiled kernel, for integer or symbolic sizes.

    Args:
        job: Compile job of the kernel.
        description: Description from `aot.compile_job`.
        rows: Number of rows, B · S.
        k: Number of inner columns.
        n: Number of output columns.
        rank: Rank in the graph.
    """
    sizes = {"rows": rows, "K": k, "N": n, "rank": rank}
    return Launch(
        grid=job.spec.grid(job.configuration, rows, n),
        threads=32 * description["num_warps"],
        shared_bytes=description["shared_bytes"],
        scalars=tuple(sizes[name] for name in job.spec.scalars),
    )


@lru_cache
def compiled(job: aot.Job) -> tuple[bytes, dict[str, Any]]:
    """Compile a job to PTX and its description. Cached, because TensorRT asks again for every layer and shape."""
    ptx, description = aot.compile_job(job)
    return ptx.encode(), description


def this_card() -> str:
    """Return the compute capability of the current CUDA device, such as `sm90`.

    Raises:
        SliderEditError: There is no CUDA device.
    """
    if not torch.cuda.is_available():
        raise SliderEditError(
            "no CUDA device is visible, but TensorRT builds for this machine's GPU; build on the target machine"
        )
    major, minor = torch.cuda.get_device_capability()
    return f"sm{major}{minor}"


def register(tensorrt_module: Any = None, target: str | None = None, ptx_isa: str = aot.DEFAULT_PTX_ISA) -> Any:
    """Register `slideredit::MaskedLoRALinear` with TensorRT in this process. Idempotent for the same target.

    Args:
        tensorrt_module: The module `tensorrt`; None imports it.
        target: Compute capability that engines are built for, such as `sm90`; None takes the current device's.
        ptx_isa: Version of the PTX instruction set; drivers support versions up to their own.

    Returns:
        The plugin's definition. Call it with input tensors to get the argument of `INetworkDefinition.add_plugin(…, aot=True)`.

    Raises:
        SliderEditError: TensorRT is missing or has no ahead-of-time plugins, there is no kernel for the target, Triton compiles
            it wrongly (see `aot.compile_job`), or the process has already registered the plugin for another target.
    """
    trtp = _plugin_package(tensorrt_module)
    target = target or this_card()
    if target not in aot.TARGETS:
        raise SliderEditError(f"no kernel is compiled for {target!r}; choose from {', '.join(aot.TARGETS)}")
    known = _registered.get(trtp.__name__)
    if known is None:
        # Compile one kernel before the builder asks for others: an exception in a callback has to pass through native code.
        compiled(job_of(1, 64, 16, 16, "bfloat16", target, ptx_isa))
        _define(trtp, target, ptx_isa)
        _registered[trtp.__name__] = target, ptx_isa
    elif known != (target, ptx_isa):
        raise SliderEditError(
            f"{PLUGIN} is already registered for {known[0]} with PTX {known[1]} in this process; "
            f"build for {target} with PTX {ptx_isa} in another process"
        )
    return getattr(getattr(trtp.op, NAMESPACE), NAME)


def _plugin_package(tensorrt_module: Any) -> Any:
    """Import `tensorrt.plugin` and check that it supports ahead-of-time plugins."""
    extra = "pip install 'slideredit-rt[tensorrt]'"
    name = tensorrt_module.__name__ if tensorrt_module is not None else "tensorrt"
    try:
        trtp = importlib.import_module(f"{name}.plugin")
    except ImportError as error:
        raise SliderEditError(f"the plugin lowering needs TensorRT, which cannot be imported ({error}); {extra}") from error
    if not hasattr(trtp, "aot_impl"):
        raise SliderEditError(f"this version of {name} does not support ahead-of-time plugins; {extra}")
    return trtp


def _define(trtp: Any, target: str, ptx_isa: str) -> None:
    """Register the three callbacks. TensorRT requires these parameter names, in the order of the kernel's pointers."""

    def describe(x: Any, weight: Any, bias: Any, lora_a: Any, lora_b: Any, row_scale: Any) -> Any:
        return trtp.from_shape_expr((*x.shape_expr[:-1], weight.shape_expr[0]), x.dtype)

    def combinations(x: Any, weight: Any, bias: Any, lora_a: Any, lora_b: Any, row_scale: Any, outputs: Any) -> list[Any]:
        choices = _fitting_tactics(*_sizes(x, weight, lora_a), target)
        shared = "|".join(DATA_TYPES)
        types = ["FP32" if name == "row_scale" else shared for name in (*SPEC.inputs, *SPEC.outputs)]
        return [trtp.AutoTuneCombination(", ".join(types), "LINEAR", list(range(1, len(choices) + 1)))]

    def implement(
        x: Any, weight: Any, bias: Any, lora_a: Any, lora_b: Any, row_scale: Any, outputs: Any, tactic: int
    ) -> tuple[str, bytes, Any, Any]:
        job = job_of(tactic, *_sizes(x, weight, lora_a), target, ptx_isa)
        ptx, description = compiled(job)
        rows = reduce(operator.mul, x.shape_expr[:-1])
        (n, k), rank = weight.shape_expr, lora_a.shape_expr[0]
        how = launch(job, description, rows, k, n, rank)
        parameters = trtp.KernelLaunchParams(
            grid_x=how.grid[0], grid_y=how.grid[1], block_x=how.threads, shared_mem=how.shared_bytes
        )
        scalars = trtp.SymIntExprs.from_tuple(tuple(trtp.SymInt32(size) for size in how.scalars))
        return description["entry"], ptx, parameters, scalars

    trtp.register(PLUGIN)(_typed(describe, trtp.TensorDesc, dict.fromkeys(SPEC.inputs, trtp.TensorDesc)))
    trtp.autotune(PLUGIN)(_typed(combinations, list[trtp.AutoTuneCombination]))
    trtp.aot_impl(PLUGIN)(_typed(implement, tuple[str, bytes, trtp.KernelLaunchParams, trtp.SymIntExprs]))


def _sizes(x: Any, weight: Any, lora_a: Any) -> tuple[int, int, int, str]:
    """Return K, N, rank and dtype of a projection, from TensorRT's descriptions of its inputs; dynamic sizes are -1."""
    (n, k), rank = weight.shape, lora_a.shape[0]
    known = {"BF16": "bfloat16", "HALF": "float16", "FLOAT": "float32"}
    return k, n, rank, known.get(x.dtype.name, x.dtype.name)


def _typed(function: Callable[..., Any], returns: Any, parameters: dict[str, Any] | None = None) -> Callable[..., Any]:
    """Set a callback's annotations, which TensorRT reads as its schema. The types only exist after TensorRT is imported."""
    function.__annotations__ = {**(parameters or {}), "return": returns}
    return function
