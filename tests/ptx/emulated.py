"""A pytest plugin: every launch of a Triton kernel is compiled for a target and run by the interpreter of PTX.

`python -m pytest --noconftest -p ptx.emulated --ptx-target sm80 tests/test_triton_kernels.py`, with `tests` on the path.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

# Read when Triton is imported, here and by what the tests start.
os.environ.pop("TRITON_INTERPRET", None)

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ptx.compiled import SYSTEM_BYTES
from ptx.fault import Fault
from ptx.machine import Machine
from ptx.memory import Buffer
from ptx.problems import content, raw
from slideredit_rt.kernels import aot, triton_linear, triton_ops, triton_update
from slideredit_rt.kernels.ptx import parse

TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
OPTIONS = ("num_warps", "num_stages")


class Emulator:
    """Launches of kernels on CPU tensors, each compiled once for its specialisation as Triton's launcher makes it.

    Attributes:
        launches: Number of launches.
    """

    def __init__(self, target: str) -> None:
        self.capability, self.launches = int(target[2:]), 0
        self._machines: dict[Any, Machine] = {}

    def wrap(self, kernel: Any) -> Any:
        """Return what `torch.library.wrap_triton` does: a kernel to be indexed by its grid and called."""
        return _Indexed(lambda grid, *arguments, **constants: self._launch(kernel, grid, arguments, constants))

    def _launch(self, kernel: Any, grid: tuple[int, int], arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
        options = {name: constants.pop(name) for name in OPTIONS}
        values = dict(zip(kernel.arg_names, arguments, strict=False))
        fixed = constants | {name: value for name, value in values.items() if _is_constant(kernel, name, value)}
        passed = {name: value for name, value in values.items() if name not in fixed}
        buffers = {
            name: Buffer(place, raw(value.detach()), name)
            for place, (name, value) in enumerate(passed.items())
            if isinstance(value, Tensor)
        }
        machine = self._machine(kernel, passed, fixed, options)
        # Triton appends two pointers to scratch memory, which the kernels do not use.
        spare = [
            Buffer(40 + place, torch.zeros(0).numpy(), "scratch")
            for place in range(len(machine.kernel.parameters) - len(passed))
        ]
        machine.launch(grid, [*(buffers.get(name, passed[name]) for name in passed), *spare])
        self.launches += 1
        for name, buffer in buffers.items():
            if buffer.written.max(initial=0) > 1:
                raise Fault(f"{name} is written twice")
            if buffer.written.any():
                passed[name].detach().copy_(content(buffer, passed[name].dtype, *passed[name].shape))

    def _machine(self, kernel: Any, passed: Mapping[str, Any], fixed: Mapping[str, Any], options: Mapping[str, int]) -> Machine:
        types = {name: TYPES[value.dtype] if isinstance(value, Tensor) else "i32" for name, value in passed.items()}
        aligned = tuple(name for name, value in passed.items() if _is_aligned(kernel, name, value))
        key = (kernel.__name__, *(tuple(sorted(d.items(), key=repr)) for d in (types, fixed, options)), aligned)
        if key not in self._machines:
            self._machines[key] = self._compiled(kernel, types, fixed, aligned, options)
        return self._machines[key]

    def _compiled(
        self,
        kernel: Any,
        types: Mapping[str, str],
        fixed: Mapping[str, Any],
        aligned: tuple[str, ...],
        options: Mapping[str, int],
    ) -> Machine:
        place = {name: number for number, name in enumerate(kernel.arg_names)}
        source = ASTSource(
            fn=kernel,
            signature={name: types.get(name, "constexpr") for name in kernel.arg_names},
            constexprs={(place[name],): value for name, value in fixed.items()},
            attrs={(place[name],): [["tt.divisibility", aot.ALIGNMENT]] for name in aligned},
        )
        version = int(aot.DEFAULT_PTX_ISA.replace(".", ""))
        built = triton.compile(
            source,
            target=GPUTarget("cuda", self.capability, 32),
            options={**options, "ptx_version": version, "enable_fp_fusion": True},
        )
        base = SYSTEM_BYTES if self.capability >= 90 else 0
        return Machine(parse(built.asm["ptx"]), built.metadata.shared, base)


class _Indexed:
    def __init__(self, launch: Callable[..., None]) -> None:
        self._launch = launch

    def __getitem__(self, grid: tuple[int, int]) -> Callable[..., None]:
        return lambda *arguments, **constants: self._launch(grid, *arguments, **constants)


def _is_constant(kernel: Any, name: str, value: Any) -> bool:
    """Triton compiles None and the number 1 in, except for arguments that it is told not to specialise."""
    return value is None or (type(value) is int and value == 1 and not _unspecialised(kernel, name))


def _is_aligned(kernel: Any, name: str, value: Any) -> bool:
    if isinstance(value, Tensor):
        return True  # as allocated: the interpreter's buffers are
    return value % aot.ALIGNMENT == 0 and not _unspecialised(kernel, name)


def _unspecialised(kernel: Any, name: str) -> bool:
    return any(p.name == name and p.do_not_specialize for p in kernel.params)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--ptx-target", default="sm80", choices=aot.TARGETS, help="compute capability (default: %(default)s)")


@pytest.fixture(autouse=True, scope="session")
def _emulator(request: pytest.FixtureRequest) -> Any:
    """Launch through the interpreter, as on a GPU of the target."""
    emulator = Emulator(request.config.getoption("--ptx-target"))
    with pytest.MonkeyPatch.context() as patch:
        for module in (triton_linear, triton_update):
            patch.setattr(module, "wrap_triton", emulator.wrap)
        patch.setattr(triton_ops, "INTERPRETED", True)
        patch.setattr(triton_ops, "_capability", lambda x: emulator.capability)
        yield
    assert emulator.launches
