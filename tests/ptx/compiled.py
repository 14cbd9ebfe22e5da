"""Kernels compiled in a process of their own, because the tests' processes interpret Triton."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from ptx.machine import Machine
from slideredit_rt.kernels import aot
from slideredit_rt.kernels.configurations import Configuration
from slideredit_rt.kernels.ptx import parse

SYSTEM_BYTES = 1024
"""Shared memory that the system takes at the start on sm90 and newer (CUDA C++ Programming Guide, compute capability 9.0)."""


@dataclass(frozen=True)
class Compiled:
    """What `kernels build` writes for a job."""

    job: aot.Job
    text: str
    description: dict[str, Any]

    @property
    def shared_base(self) -> int:
        """Address of the first byte of a block's own shared memory."""
        return SYSTEM_BYTES if int(self.job.target[2:]) >= 90 else 0

    def machine(self, text: str | None = None, shared_bytes: int | None = None) -> Machine:
        """Return a machine that runs the kernel, or another text in its place, by default with the memory that it states."""
        shared_bytes = self.description["shared_bytes"] if shared_bytes is None else shared_bytes
        return Machine(parse(text or self.text), shared_bytes, self.shared_base)


def build(jobs: Sequence[aot.Job], folder: Path) -> dict[aot.Job, Compiled]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), environment.get("PYTHONPATH", "")])
    given = json.dumps([astuple(job) for job in jobs])
    line = [sys.executable, "-m", "ptx.compiled", str(folder)]
    done = subprocess.run(line, input=given, text=True, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    return {job: _read(job, folder) for job in jobs}


def _read(job: aot.Job, folder: Path) -> Compiled:
    stem = folder / f"{job.name}.{job.target}"
    description = json.loads(stem.with_name(f"{stem.name}.json").read_text())
    return Compiled(job, stem.with_name(f"{stem.name}.ptx").read_text(), description)


if __name__ == "__main__":
    wanted = [aot.Job(name, Configuration(*tiles), *others) for name, tiles, *others in json.load(sys.stdin)]
    aot.build(wanted, Path(sys.argv[1]), processes=1, progress=False)
