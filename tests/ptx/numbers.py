"""Types of PTX and their NumPy counterparts, and conversions that NumPy lacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Mask = Array | None
"""Lanes of the block that take part, as booleans; None is all of them."""

SIZE = {
    "pred": 1,
    **dict.fromkeys(("b8", "u8", "s8"), 1),
    **dict.fromkeys(("b16", "u16", "s16", "f16", "bf16"), 2),
    **dict.fromkeys(("b32", "u32", "s32", "f32", "f16x2", "bf16x2"), 4),
    **dict.fromkeys(("b64", "u64", "s64"), 8),
}
UNSIGNED: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
NUMPY: dict[str, Any] = {
    **{f"{kind}{8 * size}": unsigned for kind in "bu" for size, unsigned in UNSIGNED.items()},
    **{"s8": np.int8, "s16": np.int16, "s32": np.int32, "s64": np.int64, "f32": np.float32},
    # Bits: NumPy has no bfloat16, and no instruction of the kernels computes in 16 bits.
    **dict.fromkeys(("f16", "bf16"), np.uint16),
}
TF32_BITS = np.uint32(0xFFFFE000)
"""Sign, exponent and the 10 bits of the fraction that TF32 keeps."""
NAN_16 = np.uint16(0x7FFF)
"""The NaN that conversions to bf16 and f16 return."""


def bf16_bits(values: Array) -> Array:
    """Round float32 to the nearest bfloat16, ties to even; returns the bits."""
    bits = values.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)).astype(np.uint16)
    return np.where(np.isnan(values), NAN_16, rounded)


def f16_bits(values: Array) -> Array:
    """Round float32 to the nearest float16, ties to even; returns the bits."""
    return np.where(np.isnan(values), NAN_16, values.astype(np.float16).view(np.uint16))


def tf32_bits(bits: Array) -> Array:
    """Round the bits of float32 to the nearest TF32, ties away from zero (`cvt.rna.tf32.f32`); NaN stays NaN."""
    rounded = (bits + np.uint32(0x1000)) & TF32_BITS
    return np.where(np.isnan(bits.view(np.float32)), np.uint32(0x7FFFFFFF) & TF32_BITS, rounded)


def bf16_values(bits: Array) -> Array:
    """Return bfloat16 bits (uint16) as float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f16_values(bits: Array) -> Array:
    """Return float16 bits (uint16) as float32."""
    return bits.view(np.float16).astype(np.float32)


WIDENED: dict[str, Callable[[Array], Array]] = {"bf16": bf16_values, "f16": f16_values}
"""Float32 values of 16-bit floats, by type."""
NARROWED: dict[str, Callable[[Array], Array]] = {"bf16": bf16_bits, "f16": f16_bits}
"""Bits of float32 rounded to 16-bit floats, by type."""


def operands_of_tensor_cores(bits: Array, kind: str) -> Array:
    """Return what tensor cores multiply, as float32, of 32-bit registers whose last axis is contiguous.

    A register holds two 16-bit values, the first in its low half, or one of TF32, whose low 13 bits are dropped.
    """
    if kind == "tf32":
        return (bits.view(np.uint32) & TF32_BITS).view(np.float32)
    return WIDENED[kind](bits.view(np.uint16))
