"""Two kernels for calls in which all rows are active.

The first computes the low-rank product once per row. The second adds it to the projection as one more inner step of the
GEMM, so `y` is written once and never read. The output of the first kernel can also go to the vendor's `addmm`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from slideredit_rt.kernels.dispatch import Configuration
from slideredit_rt.kernels.spec import KernelSpec, cdiv
from slideredit_rt.kernels.triton_tiles import (
    add_low_rank,
    any_active,
    cast,
    load_scale,
    project,
    project_low,
    scaled,
    store_tile,
    tile_of,
)


@triton.jit(do_not_specialize=["rows"])
def masked_low_rank_kernel(
    x,
    lora_a,
    row_scale,
    rows,
    K,
    rank,
    low,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RANK: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """Compute `low = row_scale · (x Aᵀ)`, `[rows, rank]`. Tiles without an active row store 0 and do not read `x`."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    scale = load_scale(row_scale, row, rows)
    product = tl.zeros((BLOCK_M, RANK), tl.float32)
    if any_active(scale):
        x_rows = x + tl.minimum(row, rows - 1) * K
        product = project_low(x_rows, lora_a, rank, K, BLOCK_M, BLOCK_K, RANK, EVEN_K)
    slot = tl.arange(0, RANK)
    mask = (row[:, None] < rows) & (slot[None, :] < rank)
    tl.store(low + row[:, None] * rank + slot[None, :], cast(scaled(scale, product), low.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def accumulate_linear_kernel(
    x,
    weight,
    bias,
    low,
    lora_b,
    rows,
    K,
    N,
    rank,
    y,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RANK: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """Compute `y = x Wᵀ + bias + low Bᵀ`, one `[BLOCK_M, BLOCK_N]` tile per program."""
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.cdiv(N, BLOCK_N))
    row = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    slot = tl.arange(0, RANK)
    mask = (row[:, None] < rows) & (slot[None, :] < rank)
    low_tile = tl.load(low + row[:, None] * rank + slot[None, :], mask=mask, other=0.0)
    x_rows = x + tl.minimum(row, rows - 1) * K
    weight_rows = weight + tl.minimum(column, N - 1).to(tl.int64) * K
    accumulator = project(x_rows, weight_rows, None, K, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K)
    accumulator = add_low_rank(accumulator, low_tile, lora_b, column, N, rank, RANK, x.dtype.element_ty)
    store_tile(y, accumulator, bias, row, column, rows, N)


def low_rank_grid(configuration: Configuration, rows: int, n: int) -> tuple[int, int]:
    """Return the number of programs of the first launch. `n` is unused."""
    return cdiv(rows, configuration.block_m), 1


def linear_grid(configuration: Configuration, rows: int, n: int) -> tuple[int, int]:
    """Return the number of programs of the second launch over `rows` rows and `n` output columns."""
    return cdiv(rows, configuration.block_m) * cdiv(n, configuration.block_n), 1


LOW_RANK_SPEC = KernelSpec(
    function=masked_low_rank_kernel,
    inputs=("x", "lora_a", "row_scale"),
    outputs=("low",),
    grid=low_rank_grid,
)
LINEAR_SPEC = KernelSpec(
    function=accumulate_linear_kernel,
    inputs=("x", "weight", "bias", "low", "lora_b"),
    outputs=("y",),
    grid=linear_grid,
)


def launch_low_rank(x: Tensor, lora_a: Tensor, row_scale: Tensor, configuration: Configuration, low: Tensor) -> None:
    """Write `low`, `[M, R]`. All tensors are contiguous: x `[M, K]`, lora_a `[R, K]`, row_scale `[M]`."""
    (rows, k), rank = x.shape, lora_a.shape[0]
    wrap_triton(masked_low_rank_kernel)[low_rank_grid(configuration, rows, rank)](
        x, lora_a, row_scale, rows, k, rank, low, **configuration.meta(k, rank)
    )


def launch_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, low: Tensor, lora_b: Tensor, configuration: Configuration, y: Tensor
) -> None:
    """Write `y`, `[M, N]`. All tensors are contiguous: x `[M, K]`, weight `[N, K]`, low float32 `[M, R]`, lora_b `[N, R]`."""
    (rows, k), n, rank = x.shape, weight.shape[0], lora_b.shape[1]
    wrap_triton(accumulate_linear_kernel)[linear_grid(configuration, rows, n)](
        x, weight, bias, low, lora_b, rows, k, n, rank, y, **configuration.meta(k, rank)
    )
