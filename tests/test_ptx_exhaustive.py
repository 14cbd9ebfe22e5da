"""All kernels of all targets, run instruction by instruction (`make ptx-test`).

With special values, other orders of warps and missing barriers, and through the tests of the kernels.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ptx import compiled as compiling
from ptx.compiled import Compiled
from ptx.fault import Fault
from ptx.machine import SCHEDULES
from ptx.mutants import BARRIER
from ptx.problems import Problem, faults, problem, run, standard_problems, with_scale

from slideredit_rt.kernels import aot

pytestmark = pytest.mark.slow

TARGETS = ("sm80", "sm86", "sm89", "sm90", "sm120")
"""Targets whose kernels run in the interpreter; it knows no `tcgen05`, of sm100 and sm103."""
RANKS = (16, 32, 64, 128)
FOUND = 0.9
"""Share of the barriers that the kernels need. Triton also emits some that they do not."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ptx")


def kernels_of(target: str, folder: Path) -> list[Compiled]:
    """Every kernel of a target, compiled once."""
    jobs = aot.jobs([target], list(aot.DTYPES), RANKS)
    return list(compiling.build(jobs, folder).values())


def distinct(kernels: list[Compiled]) -> Iterator[Compiled]:
    """Kernels that differ in more than the name of their target from those before. Those of sm86 and sm89 are those of sm80."""
    for compiled in kernels:
        text = compiled.text.replace(f".target sm_{compiled.job.target[2:]}", ".target")
        if text not in _seen:
            _seen.add(text)
            yield compiled


_seen: set[str] = set()


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_agrees_with_float64(target: str, folder: Path) -> None:
    wrong = {}
    for number, compiled in enumerate(distinct(kernels_of(target, folder))):
        for p in standard_problems(compiled, number):
            if found := faults(compiled, p, *run(compiled, p)):
                wrong[compiled.job.name] = found
    assert wrong == {}


def test_kernels_of_sm100_run_or_are_refused_at_their_first_unknown_instruction(folder: Path) -> None:
    """What is not covered is said: the lines at which `tcgen05` and what belongs to it begin."""
    refused = {}
    for compiled in kernels_of("sm100", folder):
        try:
            for p in standard_problems(compiled, 2):
                assert faults(compiled, p, *run(compiled, p)) == []
        except Fault as fault:
            refused[compiled.job.name] = str(fault)
            assert "tcgen05" in compiled.text, compiled.job.name
    assert all(message.startswith("line ") and "does not know" in message for message in refused.values())
    print("\n".join(f"{name}: {message}" for name, message in refused.items()))  # noqa: T201  (the report of this target)
    assert 0 < len(refused) < len(aot.jobs(["sm100"], list(aot.DTYPES), RANKS))


def some(target: str, folder: Path) -> list[Compiled]:
    """One kernel of each configuration of a target at rank 16."""
    jobs = aot.jobs([target], ["bfloat16", "float16", "float32"], [16])
    return list(compiling.build(jobs, folder).values())


ROWS = 37


def special(compiled: Compiled) -> dict[str, Problem]:
    """Problems with special values, by what is special."""
    p = problem(compiled, ROWS, 2, "all")
    x = p.x.clone()
    x[7, 3] = torch.inf
    small_b = (p.lora_b.float() * 1e-2).to(p.lora_b.dtype)
    return {
        "-0": with_scale(p, 33, -0.0),
        "denormal": with_scale(p, 33, 1e-40),
        "tiny": with_scale(p, 33, 1e-30),
        "3e4": replace(p, row_scale=torch.full_like(p.row_scale, 3e4), lora_b=small_b),
        "-3e4": replace(p, row_scale=torch.full_like(p.row_scale, -3e4), lora_b=small_b),
        "infinity in an inactive row": with_scale(replace(p, x=x), 7, 0.0),
    }


@pytest.mark.parametrize("target", ["sm80", "sm90", "sm120"])
def test_special_values(target: str, folder: Path) -> None:
    wrong = {}
    for compiled in some(target, folder):
        for name, p in special(compiled).items():
            if found := faults(compiled, p, *run(compiled, p)):
                wrong[compiled.job.name, name] = found
    assert wrong == {}


@pytest.mark.parametrize("target", ["sm80", "sm90", "sm120"])
def test_a_scale_of_nan_reaches_its_own_row_and_no_other(target: str, folder: Path) -> None:
    for compiled in some(target, folder):
        _, y = run(compiled, with_scale(problem(compiled, ROWS, 2, "all"), 33, torch.nan))
        rows = y.reshape(-1, ROWS, y.shape[-1]).isnan()
        # Parts of the low-rank product that have no inner columns of their own are 0 times NaN, too.
        assert rows[:, 33].all(), compiled.job.name
        assert not rows[:, torch.arange(ROWS) != 33].any(), compiled.job.name


@pytest.mark.parametrize("target", ["sm80", "sm90", "sm120"])
def test_the_order_of_the_warps_changes_no_bit(target: str, folder: Path) -> None:
    """Kernels with `wgmma` run all warps together."""
    compared = 0
    for compiled in some(target, folder):
        if "wgmma" in compiled.text:
            continue
        p = problem(compiled, ROWS, 5, "random")
        found = [run(compiled, p, schedule=schedule)[1].view(torch.uint8) for schedule in SCHEDULES]
        assert all(torch.equal(found[0], other) for other in found[1:]), compiled.job.name
        compared += 1
    assert compared


def test_a_barrier_that_is_left_out_is_found_or_changes_nothing(folder: Path) -> None:
    """Each barrier of each kernel of sm80, one at a time; kernels of the second 16-bit type have the same ones.

    Those that are not found lie beside another barrier or between copies to different buffers: without them, every order of the
    warps gives the same bits.
    """
    removed, missed = 0, []
    for job in aot.jobs(["sm80"], ["bfloat16", "float32"], RANKS):
        compiled = compiling.build([job], folder)[job]
        for place in range(len(BARRIER.matches(compiled.text))):
            removed += 1
            text = replace(BARRIER, place=place).apply(compiled.text)
            if not is_caught(compiled, text):
                missed.append((job.name, place))
                assert changes_nothing(compiled, text), (job.name, place)
    print(f"{removed - len(missed)} of {removed} missing barriers found; not found: {missed}")  # noqa: T201
    assert len(missed) <= (1 - FOUND) * removed


def changes_nothing(compiled: Compiled, text: str) -> bool:
    """Whether another text gives the same bits in every order of the warps."""
    p = problem(compiled, compiled.job.configuration.block_m + 5, 3, "random")
    _, expected = run(compiled, p)
    others = [run(compiled, p, compiled.machine(text), schedule)[1] for schedule in SCHEDULES]
    return all(torch.equal(expected.view(torch.uint8), other.view(torch.uint8)) for other in others)


def is_caught(compiled: Compiled, text: str) -> bool:
    """Whether a mistake shows: with every tile in the loop, without an active row, and with one block of inner columns."""
    machine, rows = compiled.machine(text), compiled.job.configuration.block_m
    for mask, blocks in (("random", 5), ("none", 5), ("all", 1)):
        p = problem(compiled, rows + 5, blocks, mask)
        try:
            if faults(compiled, p, *run(compiled, p, machine)):
                return True
        except Fault:
            return True
    return False


@pytest.mark.parametrize("target", ["sm80", "sm90", "sm120"])
def test_the_tests_of_the_kernels_pass_through_compiled_ptx(target: str) -> None:
    tests = Path(__file__).parent
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(tests), environment.get("PYTHONPATH", "")])
    line = [
        sys.executable,
        "-m",
        "pytest",
        "--noconftest",
        "-p",
        "ptx.emulated",
        "--ptx-target",
        target,
        "-p",
        "no:cacheprovider",
    ]
    # PyTorch traces operators with tensors that have no content, which the interpreter needs.
    line += ["-n", "0", "-k", "not opcheck", str(tests / "test_triton_kernels.py")]
    done = subprocess.run(line, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
