"""The PTX that is shipped for sm80 and sm90, run instruction by instruction and compared with float64."""

from __future__ import annotations

import operator
from dataclasses import replace
from functools import reduce

import pytest
import sympy
import torch
from ptx import compiled as compiling
from ptx.compiled import Compiled
from ptx.fault import Fault
from ptx.memory import Buffer
from ptx.mutants import MUTANTS, Mutant
from ptx.problems import Launch, Problem, faults, output_of, problem, raw, run, standard_problems

from slideredit_rt.export import tensorrt_plugin
from slideredit_rt.kernels import aot

# Either 16-bit type is multiplied by instructions of its own: one on each target here, all of them in `make ptx-test`.
DTYPES = {"sm80": "float16", "sm90": "bfloat16"}


def one_of_each_configuration() -> list[aot.Job]:
    """One job for every configuration of the table that a target may get."""
    found: dict[tuple[str, str, str], aot.Job] = {}
    for target, dtype in DTYPES.items():
        for job in aot.jobs([target], [dtype, "float32"], [16, 32, 64, 128]):
            found.setdefault((job.target, job.spec_name, job.configuration.name), job)
    return list(found.values())


def plugin_jobs() -> list[aot.Job]:
    """Every tactic of the plugin for one projection, on both targets."""
    return [
        tensorrt_plugin.job_of(tactic, *PROJECTION, dtype, target)
        for target, dtype in DTYPES.items()
        for tactic in range(1, 1 + len(tensorrt_plugin.tactics(PROJECTION[0], PROJECTION[2], dtype, target)))
    ]


PROJECTION = (192, 272, 16)  # K, N, rank
JOBS = one_of_each_configuration()
ONE_STAGE = [
    replace(job, configuration=replace(job.configuration, num_stages=1))
    for job in JOBS
    if (job.target, job.spec_name) == ("sm90", "masked_lora_linear")
]
"""What `masked_lora_linear_triton` launches where Triton would leave out a fence."""


def label(job: aot.Job) -> str:
    return f"{job.target}-{job.name}"


BY_LABEL = {label(job): job for job in JOBS}


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[aot.Job, Compiled]:
    """All kernels of this file, compiled in one process."""
    return compiling.build(list(dict.fromkeys([*JOBS, *plugin_jobs(), *ONE_STAGE])), tmp_path_factory.mktemp("ptx"))


@pytest.mark.parametrize("number", range(len(JOBS)), ids=[label(job) for job in JOBS])
def test_every_shipped_configuration_agrees_with_float64(kernels: dict[aot.Job, Compiled], number: int) -> None:
    """Of odd sizes, with every mask, with NaN in an inactive row; every byte of the output is written once."""
    compiled = kernels[JOBS[number]]
    for p in standard_problems(compiled, number):
        assert faults(compiled, p, *run(compiled, p)) == []


@pytest.mark.parametrize("number", range(len(ONE_STAGE)), ids=[label(job) for job in ONE_STAGE])
def test_kernels_of_one_stage_copy_through_registers(kernels: dict[aot.Job, Compiled], number: int) -> None:
    compiled = kernels[ONE_STAGE[number]]
    assert "cp.async" not in compiled.text
    for p in standard_problems(compiled, number):
        assert faults(compiled, p, *run(compiled, p)) == []


def test_every_tile_is_computed_once_where_tile_rows_advance_in_groups(kernels: dict[aot.Job, Compiled]) -> None:
    """Nine tile rows of 32: a group of eight, and one of one."""
    job = next(job for job in JOBS if job.spec_name == "masked_lora_linear" and job.configuration.block_m == 32)
    p = problem(kernels[job], 8 * 32 + 1, 1, "one", n=80)
    launch, y = run(kernels[job], p)
    assert launch.grid == [9 * 3, 1]
    assert faults(kernels[job], p, launch, y) == []


def is_caught(compiled: Compiled, text: str) -> bool:
    """Whether a kernel with another text fails on one of the standard problems."""
    machine = compiled.machine(text)
    for number in (1, 2):
        for p in standard_problems(compiled, number):
            try:
                if faults(compiled, p, *run(compiled, p, machine)):
                    return True
            except Fault:
                return True
    return False


@pytest.mark.parametrize(
    ("key", "mutant"),
    [(key, mutant) for key, mutants in MUTANTS.items() for mutant in mutants],
    ids=[f"{key}: {mutant.name}" for key, mutants in MUTANTS.items() for mutant in mutants],
)
def test_a_mistake_is_found(kernels: dict[aot.Job, Compiled], key: str, mutant: Mutant) -> None:
    compiled = kernels[BY_LABEL[key]]
    assert is_caught(compiled, mutant.apply(compiled.text))


@pytest.mark.parametrize("key", MUTANTS)
def test_a_kernel_without_a_mistake_passes_the_same_check(kernels: dict[aot.Job, Compiled], key: str) -> None:
    compiled = kernels[BY_LABEL[key]]
    assert not is_caught(compiled, compiled.text)


@pytest.mark.parametrize("job", plugin_jobs(), ids=label)
def test_the_plugins_launch_parameters_launch_the_kernel(kernels: dict[aot.Job, Compiled], job: aot.Job) -> None:
    """As TensorRT does: made from symbols when the engine is built, and evaluated for every shape of x."""
    (k, n, rank), compiled = PROJECTION, kernels[job]
    shape = sympy.symbols("B S", integer=True, positive=True)
    how = tensorrt_plugin.launch(job, compiled.description, reduce(operator.mul, shape), *map(sympy.Integer, (k, n, rank)))
    for batch, rows, mask in ((1, 1, "all"), (2, 77, "random")):
        p = problem(compiled, batch * rows, k // job.configuration.block_k, mask, n=n)
        launch = plugin_launch(how, p, dict(zip(shape, (batch, rows), strict=True)))
        machine = compiled.machine(shared_bytes=how.shared_bytes)
        assert machine.kernel.threads == how.threads
        machine.launch(launch.grid, launch.arguments)
        assert faults(compiled, p, launch, output_of(compiled, p, launch)) == []


def plugin_launch(how: tensorrt_plugin.Launch, p: Problem, shape: dict[sympy.Symbol, int]) -> Launch:
    """Return the launch that TensorRT makes: its input tensors in the plugin's order, the scalars, its output tensor."""
    names = ("x", "weight", "bias", "lora_a", "lora_b", "row_scale")
    buffers = {name: Buffer(place, raw(getattr(p, name)), name) for place, name in enumerate(names)}
    y = torch.full((p.sizes["rows"], p.sizes["N"]), torch.nan, dtype=p.x.dtype)
    output = Buffer(len(names), raw(y), "y")

    def value(size: sympy.Expr) -> int:
        return int(sympy.sympify(size).subs(shape))

    arguments: list[Buffer | int] = [*buffers.values(), *map(value, how.scalars), output]
    return Launch(buffers | {"y": output}, arguments, [value(size) for size in how.grid])
