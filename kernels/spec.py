"""What a launcher, the ahead-of-time compiler and a TensorRT plugin all need to know of a kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from slideredit_rt.kernels.dispatch import Configuration


def cdiv(a: Any, b: int) -> Any:
    """Division rounded up, for integers and for symbolic ones."""
    return (a + b - 1) // b


@dataclass(frozen=True)
class KernelSpec:
    """A kernel's arguments in launch order: input pointers, int32 scalars, output pointers.

    Attributes:
        function: the `triton.jit` function.
        inputs: names of the input pointers.
        outputs: names of the output pointers.
        grid: programs along x and y, from a configuration, the number of rows and the number of output columns.
    """

    function: Any
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    grid: Callable[[Configuration, int, int], tuple[int, int]]

    @property
    def name(self) -> str:
        """`masked_lora_linear` for `masked_lora_linear_kernel`."""
        return str(self.function.__name__).removesuffix("_kernel")

    @property
    def scalars(self) -> tuple[str, ...]:
        """Names of the int32 arguments: the sizes, between inputs and outputs."""
        names = [n for n in self.function.arg_names if n not in self.inputs and n not in self.outputs]
        return tuple(n for n in names if n not in CONSTANTS)


CONSTANTS = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "RANK", "EVEN_K")
