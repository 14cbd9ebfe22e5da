"""Kernel arguments and grids, as launchers, the ahead-of-time compiler and the TensorRT plugin need them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from slideredit_rt.kernels.configurations import Configuration


def cdiv(a: Any, b: int) -> Any:
    """Divide and round up. `a` may be an integer, a symbolic expression or a `Size`."""
    return (a + (b - 1)) // b


class Size(str):
    """Name of a size, or an expression of sizes and integers, as text that Python and C with integer division agree on."""

    def __add__(self, other: object) -> Size:
        return Size(f"({self} + {other})")

    def __mul__(self, other: object) -> Size:
        return Size(f"({self} * {other})")

    def __floordiv__(self, other: object) -> Size:
        return Size(f"({self} // {other})")


@dataclass(frozen=True)
class KernelSpec:
    """A kernel's arguments in launch order: input pointers, int32 scalars, output pointers.

    Attributes:
        function: `triton.jit` function.
        inputs: Names of the input pointers.
        outputs: Names of the output pointers.
        grid: Function of the configuration, the number of rows and the number of output columns that returns the number of
            programs along x and y.
    """

    function: Any
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    grid: Callable[[Configuration, Any, Any], tuple[Any, Any]]

    @property
    def name(self) -> str:
        """Name without the suffix `_kernel`."""
        return str(self.function.__name__).removesuffix("_kernel")

    @property
    def scalars(self) -> tuple[str, ...]:
        """Names of the int32 arguments: sizes, which follow the inputs and precede the outputs."""
        names = [n for n in self.function.arg_names if n not in self.inputs and n not in self.outputs]
        return tuple(n for n in names if n not in CONSTANTS)


UNALIGNED = ("rows", "members")
"""Scalars that may have any value. All other sizes of a projection are multiples of 16."""
CONSTANTS = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "RANK", "EVEN_K")
