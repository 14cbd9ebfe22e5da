"""Device functions shared by the kernels: tile order, loads and stores, and the frozen and low-rank products of a tile."""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
# Number of tile rows that advance through the columns together, so that weight tiles are reused while they are in L2.
GROUP_M: tl.constexpr = tl.constexpr(8)


@triton.jit
def multiply(a, b, accumulator, PRECISION: tl.constexpr):
    """Return `accumulator + a @ b` in float32. `PRECISION` applies to float32 operands only."""
    if INTERPRETED:
        # The interpreter would multiply the raw bits of bfloat16. Products of 16-bit floats are exact in float32.
        return tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator)
    return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def cast(value, dtype: tl.constexpr):
    """Convert to `dtype`, rounding to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16 and value.dtype == tl.float32:
        # The hardware rounds, but the interpreter truncates.
        bits = value.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)).to(tl.float32, bitcast=True)
        value = tl.where(value == value, rounded, value)
    return value.to(dtype)


@triton.jit
def tile_of(program, tiles_m, tiles_n):
    """Return the tile row and tile column of a program."""
    group = program // (GROUP_M * tiles_n)
    group_m = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    within = program % (GROUP_M * tiles_n)
    return group * GROUP_M + within % group_m, within // group_m


@triton.jit
def load_scale(row_scale, row, rows):
    """Load row scales. Rows past the end get 0."""
    return tl.load(row_scale + row, mask=row < rows, other=0.0)


@triton.jit
def any_active(scale):
    """Return whether any scale is not 0. NaN counts as not 0."""
    return tl.max((scale != 0).to(tl.int32), axis=0) != 0


@triton.jit
def scaled(scale, low):
    """Return `scale · low` row by row. Rows of scale 0 become 0, even where `low` is NaN or infinite."""
    return tl.where((scale != 0)[:, None], scale[:, None] * low, 0.0)


@triton.jit
def load_rows(row_pointers, inner, K, EVEN_K: tl.constexpr):
    """Load `[rows, BLOCK_K]` at the inner columns `inner`. Columns past K are 0."""
    pointers = row_pointers[:, None] + inner[None, :]
    if EVEN_K:
        return tl.load(pointers)
    return tl.load(pointers, mask=inner[None, :] < K, other=0.0)


@triton.jit
def load_lora_a(lora_a, inner, K, rank, RANK: tl.constexpr, EVEN_K: tl.constexpr):
    """Load `[RANK, BLOCK_K]` of A at the inner columns `inner`. Rows past `rank` and columns past K are 0."""
    slot = tl.arange(0, RANK)
    pointers = lora_a + slot[:, None] * K + inner[None, :]
    if EVEN_K:
        return tl.load(pointers, mask=slot[:, None] < rank, other=0.0)
    return tl.load(pointers, mask=(slot[:, None] < rank) & (inner[None, :] < K), other=0.0)


@triton.jit
def load_lora_b(lora_b, column, N, rank, RANK: tl.constexpr):
    """Load `[BLOCK_N, RANK]` of B. Columns past `rank` and rows past N are 0."""
    slot = tl.arange(0, RANK)
    mask = (column[:, None] < N) & (slot[None, :] < rank)
    return tl.load(lora_b + column[:, None] * rank + slot[None, :], mask=mask, other=0.0)


@triton.jit
def project(x_rows, weight_rows, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr):
    """Return `x Wᵀ`, float32 `[BLOCK_M, BLOCK_N]`. `x_rows` and `weight_rows` point to the first element of each row."""
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        x = load_rows(x_rows, inner, K, EVEN_K)
        w = load_rows(weight_rows, inner, K, EVEN_K)
        accumulator = multiply(x, w.T, accumulator, "ieee")
    return accumulator


@triton.jit
def project_low(
    x_rows,
    lora_a,
    rank,
    first,
    last,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RANK: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """Return `x Aᵀ` over the inner columns from `first` to `last`, float32 `[BLOCK_M, RANK]`."""
    low = tl.zeros((BLOCK_M, RANK), tl.float32)
    for start in range(first, last, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        x = load_rows(x_rows, inner, K, EVEN_K)
        a = cast(load_lora_a(lora_a, inner, K, rank, RANK, EVEN_K), x.dtype)
        low = multiply(x, a.T, low, "ieee")
    return low


@triton.jit
def project_both(
    x_rows,
    weight_rows,
    lora_a,
    rank,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RANK: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """Return `x Wᵀ` and `x Aᵀ`, computed from the same loads of `x`."""
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    low = tl.zeros((BLOCK_M, RANK), tl.float32)
    for start in range(0, K, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        x = load_rows(x_rows, inner, K, EVEN_K)
        w = load_rows(weight_rows, inner, K, EVEN_K)
        a = cast(load_lora_a(lora_a, inner, K, rank, RANK, EVEN_K), x.dtype)
        accumulator = multiply(x, w.T, accumulator, "ieee")
        low = multiply(x, a.T, low, "ieee")
    return accumulator, low


@triton.jit
def rounded_to_tf32(value):
    """Round float32 values to TF32. Triton's interpreter multiplies in full, and they stay as they are."""
    if INTERPRETED:
        return value
    return tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,r", [value], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def multiply_low(low, b, accumulator, dtype: tl.constexpr):
    """Return `accumulator + low Bᵀ`.

    `low` includes the scale, at which 16 bits could overflow. For 16-bit dtypes the operands are therefore TF32. Tensor cores
    drop the low bits, which alone would make every update smaller, so `low` and `b` are rounded first.
    """
    if dtype == tl.float32:
        return multiply(low, b.to(tl.float32).T, accumulator, "ieee")
    return multiply(rounded_to_tf32(low), rounded_to_tf32(b.to(tl.float32)).T, accumulator, "tf32")


@triton.jit
def add_low_rank(accumulator, low, lora_b, column, N, rank, RANK: tl.constexpr, dtype: tl.constexpr):
    """Load B for the columns of a tile and return `accumulator + low Bᵀ`."""
    return multiply_low(low, load_lora_b(lora_b, column, N, rank, RANK), accumulator, dtype)


@triton.jit
def store_tile(y, accumulator, bias, row, column, rows, N):
    """Add the bias, round once and store the tile. `row` is int64, because `rows · N` may exceed 2³¹."""
    if bias is not None:
        accumulator += tl.load(bias + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    mask = (row[:, None] < rows) & (column[None, :] < N)
    tl.store(y + row[:, None] * N + column[None, :], cast(accumulator, y.dtype.element_ty), mask=mask)
