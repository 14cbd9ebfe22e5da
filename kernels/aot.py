"""Kernels compiled to PTX ahead of time, without a GPU, each with a JSON file that describes its launch.

The parameters of `<name>.<target>.ptx` are exactly those listed under `arguments` in its JSON file. To launch it through
the CUDA driver, use the grid given by `grid` (in thread blocks), blocks of `num_warps` · 32 threads, and `shared_bytes` of
dynamic shared memory. Set `CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES` to at least that size first.

`masked_low_rank` writes `low`, `[parts, rows, rank]`, in as many parts as its grid has along y, and `masked_lora_update` adds
up the number of parts that its JSON file names.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from slideredit_rt.errors import SliderEditError
from slideredit_rt.files import atomic_file
from slideredit_rt.kernels import ptx as ptx_check
from slideredit_rt.kernels import triton_linear, triton_update
from slideredit_rt.kernels.arguments import MAX_RANK
from slideredit_rt.kernels.configurations import SHARED_KIB, Configuration, configurations, padded_rank
from slideredit_rt.kernels.ptx import parse, unfenced_product
from slideredit_rt.kernels.spec import UNALIGNED, KernelSpec, Size

SPECS = (
    triton_linear.SPEC,
    triton_update.LOW_RANK_SPEC,
    triton_update.UPDATE_SPEC,
)
DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
TARGETS = tuple(f"sm{capability}" for capability in SHARED_KIB)
# Newer PTX needs newer drivers. 8.7 is the first version with sm_120, and the driver of CUDA 12.8 accepts it.
DEFAULT_PTX_ISA = "8.7"
# In bytes. Pointers returned by cudaMalloc and torch are aligned to more than this.
ALIGNMENT = 16


@dataclass(frozen=True)
class Job:
    """One PTX file to build.

    Attributes:
        spec_name: Name of the kernel.
        configuration: Tile sizes, warps and pipeline stages.
        dtype: Dtype of the tensors, such as `bfloat16`.
        rank: Padded rank: 16, 32, 64 or 128.
        target: Compute capability, such as `sm90`.
        ptx_isa: PTX version, such as `8.7`.
    """

    spec_name: str
    configuration: Configuration
    dtype: str
    rank: int
    target: str
    ptx_isa: str

    @property
    def spec(self) -> KernelSpec:
        """Specification of the kernel."""
        return next(spec for spec in SPECS if spec.name == self.spec_name)

    @property
    def name(self) -> str:
        """File name without the target and the extension."""
        return f"{self.spec_name}-{DTYPES[self.dtype]}-r{self.rank}-{self.configuration.name}"


def jobs(targets: Sequence[str], dtypes: Sequence[str], ranks: Iterable[int], ptx_isa: str = DEFAULT_PTX_ISA) -> list[Job]:
    """List a job for every configuration that the table may choose for these targets, dtypes and ranks.

    Raises:
        SliderEditError: A target or dtype is unknown, a rank is out of range, or `ptx_isa` is not a version.
    """
    if unknown := [t for t in targets if t not in TARGETS]:
        raise SliderEditError(f"unknown target {unknown[0]!r}; choose from {', '.join(TARGETS)}")
    if unknown := [d for d in dtypes if d not in DTYPES]:
        raise SliderEditError(f"unknown dtype {unknown[0]!r}; choose from {', '.join(DTYPES)}")
    if out := [r for r in ranks if not 1 <= r <= MAX_RANK]:
        raise SliderEditError(f"rank {out[0]} is outside the kernels' range 1 to {MAX_RANK}")
    if not re.fullmatch(r"[789]\.\d", ptx_isa):
        raise SliderEditError(f"PTX ISA {ptx_isa!r} is not a version; write it as {DEFAULT_PTX_ISA}")
    return [
        Job(spec.name, configuration, dtype, rank, target, ptx_isa)
        for target in targets
        for spec in SPECS
        for dtype in dtypes
        for rank in sorted({padded_rank(r) for r in ranks})
        for configuration in configurations(spec.name, rank, getattr(torch, dtype), int(target[2:]))
    ]


def argument_types(spec: KernelSpec, dtype: str) -> list[dict[str, str]]:
    """Return `[{name, type}]` in launch order. `*bf16` is a pointer, `i32` a 32-bit integer; scales are always float32."""

    def kind(name: str) -> str:
        if name in spec.scalars:
            return "i32"
        return "*fp32" if name in ("row_scale", "low") else f"*{DTYPES[dtype]}"

    return [{"name": name, "type": kind(name)} for name in (*spec.inputs, *spec.scalars, *spec.outputs)]


def compile_job(job: Job) -> tuple[str, dict[str, Any]]:
    """Compile one kernel and return its PTX and its description.

    Raises:
        SliderEditError: Triton's interpreter is on, the kernel needs scratch memory, ptxas rejects it, or Triton has left out
            a fence that the kernel needs, as versions before 3.7.1 do on sm90, sm100 and sm103.
    """
    if triton.knobs.runtime.interpret:
        raise SliderEditError("TRITON_INTERPRET is set, so Triton does not compile kernels; unset it")
    spec, source_sha256 = job.spec, content_hash(job)
    arguments = argument_types(spec, job.dtype)
    compiled = _compile(job, arguments)
    metadata = compiled.metadata
    scratch = {"global_scratch_bytes": metadata.global_scratch_size, "profile_scratch_bytes": metadata.profile_scratch_size}
    if any(scratch.values()):
        raise SliderEditError(
            f"{job.name} for {job.target} needs scratch memory ({scratch}), which launchers outside Triton do not provide; "
            "choose another configuration in configurations.json"
        )
    ptx = _without_scratch_pointers(_without_debug_information(compiled.asm["ptx"]), len(arguments), job)
    if product := unfenced_product(parse(ptx)):
        raise SliderEditError(
            f"{job.name} for {job.target} may compute wrong results: Triton {triton.__version__} puts no fence.proxy.async "
            f"between cp.async and {product.opcode}.{product.modifiers[0]}; install Triton 3.7.1 or newer"
        )
    return ptx, {
        "kernel": spec.name,
        "target": job.target,
        "entry": str(metadata.name),
        "arguments": arguments,
        "grid": [str(size) for size in spec.grid(job.configuration, Size("rows"), Size("N"))],
        **({"parts": job.configuration.block_k} if spec is triton_update.UPDATE_SPEC else {}),
        "num_warps": metadata.num_warps,
        "shared_bytes": metadata.shared,
        "ptx_isa": job.ptx_isa,
        **_resources(ptx, job),
        **scratch,
        "dtype": job.dtype,
        "rank": job.rank,
        "configuration": job.configuration.name,
        "multiples": {
            "address": ALIGNMENT,
            **{name: ALIGNMENT for name in spec.scalars if name not in UNALIGNED},
            **({"K": job.configuration.block_k} if "K" in spec.scalars else {}),
        },
        "triton": triton.__version__,
        "source_sha256": source_sha256,
    }


def _compile(job: Job, arguments: list[dict[str, str]]) -> Any:
    """Return the kernel as compiled by Triton."""
    function = job.spec.function
    constants = job.configuration.constants(even_k=True, rank=job.rank)
    aligned = [a["name"] for a in arguments if a["name"] not in UNALIGNED]
    position = {name: i for i, name in enumerate(function.arg_names)}
    source = ASTSource(
        fn=function,
        signature={**{a["name"]: a["type"] for a in arguments}, **dict.fromkeys(constants, "constexpr")},
        constexprs={(position[name],): value for name, value in constants.items()},
        attrs={(position[name],): [["tt.divisibility", ALIGNMENT]] for name in aligned},
    )
    options = {
        "num_warps": job.configuration.num_warps,
        "num_stages": job.configuration.num_stages,
        "ptx_version": int(job.ptx_isa.replace(".", "")),
        "enable_fp_fusion": True,
    }
    return triton.compile(source, target=GPUTarget("cuda", int(job.target[2:]), 32), options=options)


def parameters(ptx: str) -> list[str]:
    """Return the types of the entry's parameters, such as `u64` and `u32`, in order."""
    header = ptx[ptx.index(".visible .entry") : ptx.index("{", ptx.index(".visible .entry"))]
    return re.findall(r"\.param \.(\w+)", header)


def _without_debug_information(ptx: str) -> str:
    """Remove source positions: they name paths of the machine that compiled, or that filled Triton's cache."""
    ptx = re.sub(r"^\s*\.(file|loc)\b.*\n", "", ptx, flags=re.MULTILINE)
    return re.sub(r"^\s*\.section\s+\.debug_\w+\s*\{[^}]*\}", "", ptx, flags=re.MULTILINE)


def _without_scratch_pointers(ptx: str, count: int, job: Job) -> str:
    """Remove the two scratch pointers that Triton appends, so that the parameters match the description."""
    extra = re.compile(r",\s*\.param [^,()]*_param_(\d+)(?=\s*\))")
    for index in reversed(range(count, len(parameters(ptx)))):
        match = extra.search(ptx)
        if match is None or int(match[1]) != index or len(re.findall(rf"_param_{index}\b", ptx)) != 1:
            raise SliderEditError(
                f"{job.name} for {job.target} reads a parameter that Triton added; report this with your Triton version"
            )
        ptx = ptx[: match.start()] + ptx[match.end() :]
    return ptx


def _resources(ptx: str, job: Job) -> dict[str, int]:
    """Return the registers per thread and the spilled bytes that ptxas reports."""
    arch = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    assert arch is not None
    tools = triton.knobs.nvidia
    tool = tools.ptxas_blackwell if int(job.target[2:]) >= 100 and hasattr(tools, "ptxas_blackwell") else tools.ptxas
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [tool.path, "-v", f"--gpu-name={arch[1]}", str(source), "-o", str(source.with_suffix(".cubin"))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    registers = re.search(r"Used (\d+) registers", done.stderr)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    if done.returncode or registers is None or spills is None:
        raise SliderEditError(f"ptxas rejects {job.name} for {job.target}: {done.stderr.strip()[:300]}")
    return {"registers": int(registers[1]), "spill_bytes": max(int(spills[1]), int(spills[2]))}


@cache
def _source_hashes() -> dict[str, str]:
    """Return Triton's hash of each kernel's source and of the functions that it calls.

    All are taken together, in one order: in Triton 3.7, a hash depends on which functions were hashed before.
    """
    return {spec.name: spec.function.cache_key for spec in SPECS}


def content_hash(job: Job) -> str:
    """Return a SHA-256 of what determines the PTX and its checks: kernel source, callees, options, target, Triton version."""
    checks = (Path(__file__).read_text(), Path(ptx_check.__file__).read_text())
    parts = (_source_hashes()[job.spec_name], repr(job), triton.__version__, *checks)
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()


def _paths(job: Job, folder: Path) -> tuple[Path, Path]:
    return folder / f"{job.name}.{job.target}.ptx", folder / f"{job.name}.{job.target}.json"


def _up_to_date(job: Job, folder: Path) -> bool:
    ptx, description = _paths(job, folder)
    try:
        known = json.loads(description.read_text())
        return bool(
            known["source_sha256"] == content_hash(job) and known["ptx_sha256"] == hashlib.sha256(ptx.read_bytes()).hexdigest()
        )
    except (OSError, ValueError, KeyError):
        return False


def _write(job: Job, folder: Path, ptx: str, description: dict[str, Any]) -> None:
    ptx_path, json_path = _paths(job, folder)
    with atomic_file(ptx_path) as temporary:
        temporary.write_text(ptx)
    # The description is written last, because PTX without a description does not count as built.
    with atomic_file(json_path) as temporary:
        described = description | {"ptx_sha256": hashlib.sha256(ptx.encode()).hexdigest()}
        temporary.write_text(json.dumps(described, indent=2) + "\n")


def build(work: Sequence[Job], folder: Path, *, processes: int | None = None, progress: bool = True) -> tuple[int, int]:
    """Compile the kernels that are missing or out of date in `folder`.

    Files are written once all of them have compiled, so an interrupted build leaves nothing.

    Args:
        work: Kernels that the folder shall hold.
        folder: Output folder; it is created if needed.
        processes: Number of compiler processes; None uses every CPU core.
        progress: Show a progress bar.

    Returns:
        The number of kernels compiled and the number that were already up to date.

    Raises:
        SliderEditError: A kernel cannot be compiled (see `compile_job`). Nothing has been written then.
    """
    pending = [job for job in work if not _up_to_date(job, folder)]
    workers = min(processes or os.cpu_count() or 1, len(pending))
    compiled = {}
    with tqdm(total=len(pending), desc="kernels", unit="kernel", disable=not progress or not pending) as bar:
        for job, result in _compile_all(pending, workers):
            compiled[job] = result
            bar.set_postfix_str(job.name)
            bar.update()
    folder.mkdir(parents=True, exist_ok=True)
    for job, (ptx, description) in compiled.items():
        _write(job, folder, ptx, description)
    return len(pending), len(work) - len(pending)


def _compile_all(pending: Sequence[Job], workers: int) -> Iterator[tuple[Job, tuple[str, dict[str, Any]]]]:
    if workers <= 1:
        for job in pending:
            yield job, compile_job(job)
        return
    # Spawn, because forking is unsafe once the compiler has started threads.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(compile_job, job): job for job in pending}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def built(folder: Path) -> list[dict[str, Any]]:
    """Return the descriptions of the kernels in `folder`, sorted by name, each with the name of its PTX file as `file`.

    Raises:
        SliderEditError: The folder does not exist or holds no kernels, or a description cannot be read.
    """
    if not folder.is_dir():
        raise SliderEditError(
            f"{str(folder)!r} is not a folder; build kernels with 'slideredit-rt kernels build --out {folder}'"
        )
    found = []
    for path in sorted(folder.glob("*.sm*.json")):
        try:
            found.append({"file": path.with_suffix(".ptx").name} | json.loads(path.read_text()))
        except ValueError as error:
            raise SliderEditError(f"{str(path)!r} is not a kernel description ({error}); build it again") from error
    if not found:
        raise SliderEditError(f"no kernels in {str(folder)!r}; build them with 'slideredit-rt kernels build --out {folder}'")
    return found
