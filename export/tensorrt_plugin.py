"""The Triton kernel inside a TensorRT engine: a quickly deployable plugin, compiled ahead of time to PTX.

`slideredit::MaskedLoRALinear(x, weight, bias, lora_a, lora_b, row_scale) -> y` stands for a whole adapted projection:

    y = x Wᵀ + bias + row_scale · (x Aᵀ) Bᵀ

x `[B, S, K]`, weight `[N, K]`, bias `[N]`, lora_a `[R, K]`, lora_b `[N, R]` and y `[B, S, N]` are all bfloat16 or all float16;
row_scale `[B, S]` is float32, so strengths and masks stay run-time inputs. The engine holds the PTX and needs no Python.

Contract of the callbacks: NVIDIA's `tensorrt.plugin` package, TensorRT 10.15 and newer.
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
from slideredit_rt.kernels.dispatch import Configuration, configurations, padded_rank
from slideredit_rt.kernels.triton_linear import SPEC

NAMESPACE = "slideredit"
NAME = "MaskedLoRALinear"
PLUGIN = f"{NAMESPACE}::{NAME}"
# What TensorRT's ONNX parser wants on a node of type NAME: where to look it up, and that only the compiled kernel will do.
NODE_ATTRIBUTES: dict[str, str | int] = {"plugin_namespace": NAMESPACE, "plugin_version": "1", "aot": 1}
# By TensorRT's names in a combination.
DATA_TYPES = {"BF16": "bfloat16", "FP16": "float16"}

# Target and PTX ISA, by the name of TensorRT's plugin package: a process can register a plugin once.
_registered: dict[str, tuple[str, str]] = {}


@dataclass(frozen=True)
class Launch:
    """How a kernel is launched; sizes are integers or the symbolic expressions that they were made from.

    Attributes:
        grid: programs along x and y.
        threads: per block, along x.
        shared_bytes: dynamic shared memory per block.
        scalars: the int32 arguments between input and output pointers, in order: rows, K, N, rank.
    """

    grid: tuple[Any, Any]
    threads: int
    shared_bytes: int
    scalars: tuple[Any, ...]


def graph_rank(rank: int) -> int:
    """Rank that an adapter of rank `rank` has in the graph: the next multiple of 16, filled up with zeros."""
    return -(-rank // aot.ALIGNMENT) * aot.ALIGNMENT


def tactics(k: int, rank: int, dtype: str, target: str) -> list[Configuration]:
    """Configurations that TensorRT may choose between for a projection from `k` columns; tactic i is the i-th, from 1.

    The dispatch table's own for this rank, dtype and target, and after them its tile for 4-byte elements: the one that stays
    below the 48 KiB of shared memory that a block gets where its launcher asks for no more.

    Args:
        k: inner columns. Kernels load whole blocks, so only those whose block divides `k` are left.
        rank: the graph's.
        dtype: `bfloat16` or `float16`.
        target: such as `sm90`.
    """
    capability = int(target[2:])
    found = [
        *configurations(SPEC.name, rank, getattr(torch, dtype), capability),
        *configurations(SPEC.name, rank, torch.float32, capability),
    ]
    return [c for c in dict.fromkeys(found) if k % c.block_k == 0]


def why_not(k: int, n: int, rank: int, dtype: str, target: str) -> str | None:
    """Why the plugin has no kernel for a projection from `k` to `n` columns, in one sentence; None if it has.

    Args:
        k: inner columns.
        n: output columns.
        rank: the graph's (`graph_rank`).
        dtype: of everything but row_scale, such as `bfloat16`.
        target: compute capability, such as `sm90`.
    """
    if target not in aot.TARGETS:
        return f"no kernel is compiled for {target}, only for {', '.join(aot.TARGETS)}"
    if dtype not in DATA_TYPES.values():
        return f"the plugin computes in {' or '.join(DATA_TYPES.values())}, not in {dtype}"
    if not 1 <= rank <= MAX_RANK:
        return f"rank {rank} is outside the kernels' range 1 to {MAX_RANK}"
    if rank % aot.ALIGNMENT:
        return f"rank {rank} is not a multiple of {aot.ALIGNMENT}; fill lora_a and lora_b up with zeros to {graph_rank(rank)}"
    if n % aot.ALIGNMENT:
        return f"N = {n} is not a multiple of {aot.ALIGNMENT}"
    if not tactics(k, rank, dtype, target):
        # Every block divides 0.
        blocks = sorted({c.block_k for c in tactics(0, rank, dtype, target)})
        return f"K = {k} is not a multiple of {' or '.join(map(str, blocks))}, the blocks that the kernels load"
    return None


def _fitting_tactics(k: int, n: int, rank: int, dtype: str, target: str) -> list[Configuration]:
    if reason := why_not(k, n, rank, dtype, target):
        raise SliderEditError(f"{PLUGIN} cannot compute a projection from {k} to {n} columns: {reason}")
    return tactics(k, rank, dtype, target)


def job_of(tactic: int, k: int, n: int, rank: int, dtype: str, target: str, ptx_isa: str = aot.DEFAULT_PTX_ISA) -> aot.Job:
    """The kernel that a tactic stands for.

    Raises:
        SliderEditError: the projection does not fit (`why_not`), or there is no such tactic for it.
    """
    choices = _fitting_tactics(k, n, rank, dtype, target)
    if not 1 <= tactic <= len(choices):
        raise SliderEditError(
            f"{PLUGIN} has tactics 1 to {len(choices)} for this projection, not {tactic}; "
            "delete a timing cache that another version wrote"
        )
    return aot.Job(SPEC.name, choices[tactic - 1], dtype, padded_rank(rank), target, ptx_isa)


def launch(job: aot.Job, description: dict[str, Any], rows: Any, k: Any, n: Any, rank: Any) -> Launch:
    """Launch parameters of a compiled kernel over `rows` rows, for integer or symbolic sizes.

    Args:
        job: what was compiled.
        description: as `aot.compile_job` returns it.
        rows: B · S.
        k: inner columns.
        n: output columns.
        rank: the graph's.
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
    """PTX and its description. Kept: TensorRT asks again for every layer and every shape."""
    ptx, description = aot.compile_job(job)
    return ptx.encode(), description


def this_card() -> str:
    """Target of the current CUDA device, such as `sm90`.

    Raises:
        SliderEditError: there is none.
    """
    if not torch.cuda.is_available():
        raise SliderEditError(
            "no CUDA device is visible, and TensorRT builds for the device at hand; build on the target machine"
        )
    major, minor = torch.cuda.get_device_capability()
    return f"sm{major}{minor}"


def register(tensorrt_module: Any = None, target: str | None = None, ptx_isa: str = aot.DEFAULT_PTX_ISA) -> Any:
    """Make `slideredit::MaskedLoRALinear` known to TensorRT in this process; again with the same target is free.

    Args:
        tensorrt_module: `tensorrt`, imported here if not given.
        target: compute capability that engines are built for, such as `sm90`; None takes the current device's.
        ptx_isa: version of the PTX instruction set; a driver takes those up to its own.

    Returns:
        The plugin's definition: called with input tensors it gives what `INetworkDefinition.add_plugin(…, aot=True)` takes.

    Raises:
        SliderEditError: TensorRT is missing or has no ahead-of-time plugins, no kernel for the target, or the process has
            registered the plugin for another one.
    """
    trtp = _plugin_package(tensorrt_module)
    target = target or this_card()
    if target not in aot.TARGETS:
        raise SliderEditError(f"no kernel is compiled for {target!r}; choose from {', '.join(aot.TARGETS)}")
    known = _registered.get(trtp.__name__)
    if known is None:
        _define(trtp, target, ptx_isa)
        _registered[trtp.__name__] = target, ptx_isa
    elif known != (target, ptx_isa):
        raise SliderEditError(
            f"{PLUGIN} is registered for {known[0]} with PTX {known[1]} in this process; "
            f"build for {target} with PTX {ptx_isa} in another"
        )
    return getattr(getattr(trtp.op, NAMESPACE), NAME)


def _plugin_package(tensorrt_module: Any) -> Any:
    """`tensorrt.plugin`, with ahead-of-time plugins."""
    extra = "pip install 'slideredit-rt[tensorrt]'"
    name = tensorrt_module.__name__ if tensorrt_module is not None else "tensorrt"
    try:
        trtp = importlib.import_module(f"{name}.plugin")
    except ImportError as error:
        raise SliderEditError(f"the plugin lowering needs TensorRT, which cannot be imported ({error}); {extra}") from error
    if not hasattr(trtp, "aot_impl"):
        raise SliderEditError(f"this version of {name} has no plugins that are compiled ahead of time; {extra}")
    return trtp


def _define(trtp: Any, target: str, ptx_isa: str) -> None:
    """Give the three callbacks to TensorRT. Their parameters must have these names, in the order of the kernel's pointers."""

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
    """K, N, rank and dtype of a projection, from TensorRT's descriptions of its inputs; a dynamic size is -1."""
    (n, k), rank = weight.shape, lora_a.shape[0]
    known = {"BF16": "bfloat16", "HALF": "float16", "FLOAT": "float32"}
    return k, n, rank, known.get(x.dtype.name, x.dtype.name)


def _typed(function: Callable[..., Any], returns: Any, parameters: dict[str, Any] | None = None) -> Callable[..., Any]:
    """TensorRT reads a callback's annotations as its schema, and those types exist only once it has been imported."""
    function.__annotations__ = {**(parameters or {}), "return": returns}
    return function
