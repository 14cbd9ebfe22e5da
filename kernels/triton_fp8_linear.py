"""The whole projection with an FP8 weight in one kernel: `triton_linear` with a quantised frozen product.

Each program quantises the tiles of `x` that it has loaded, so that `x` is read in 16 bits and no quantised copy is written. The
low-rank product takes the same tiles before they are rounded.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from slideredit_rt.kernels.dispatch import Configuration
from slideredit_rt.kernels.spec import KernelSpec
from slideredit_rt.kernels.triton_linear import grid
from slideredit_rt.kernels.triton_tiles import (
    add_low_rank,
    any_active,
    load_scale,
    multiply_add,
    project,
    project_both,
    scaled,
    store_tile,
    tile_of,
)


@triton.jit
def dequantised(accumulator, input_scale, weight_scale, bias, column, N):
    """Return `accumulator · input_scale · weight_scale + bias`, with a scale and a bias per column.

    The fused operation is explicit. Left to the compiler, tiles with and without active rows could round differently.
    """
    factor = input_scale * tl.load(weight_scale + column, mask=column < N, other=0.0)
    offset = tl.zeros_like(factor)
    if bias is not None:
        offset = tl.load(bias + column, mask=column < N, other=0.0).to(tl.float32)
    shape: tl.constexpr = accumulator.shape
    return multiply_add(accumulator, tl.broadcast_to(factor[None, :], shape), tl.broadcast_to(offset[None, :], shape))


@triton.jit(do_not_specialize=["rows"])
def masked_lora_fp8_linear_kernel(
    x,
    weight,
    weight_scale,
    input_scale,
    bias,
    lora_a,
    lora_b,
    row_scale,
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
    """Compute `y = input_scale · weight_scale · (q(x) Wᵀ) + bias + row_scale · (x Aᵀ) Bᵀ`, one tile per program."""
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.cdiv(N, BLOCK_N))
    row = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    scale = load_scale(row_scale, row, rows)
    s = tl.load(input_scale)
    # Rows and columns past the end load the last one and are not stored.
    x_rows = x + tl.minimum(row, rows - 1) * K
    weight_rows = weight + tl.minimum(column, N - 1).to(tl.int64) * K
    if any_active(scale):
        accumulator, low = project_both(x_rows, weight_rows, s, lora_a, rank, K, BLOCK_M, BLOCK_N, BLOCK_K, RANK, EVEN_K)
        accumulator = dequantised(accumulator, s, weight_scale, bias, column, N)
        accumulator = add_low_rank(accumulator, scaled(scale, low), lora_b, column, N, rank, RANK, x.dtype.element_ty)
    else:
        accumulator = project(x_rows, weight_rows, s, K, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K)
        accumulator = dequantised(accumulator, s, weight_scale, bias, column, N)
    store_tile(y, accumulator, None, row, column, rows, N)


SPEC = KernelSpec(
    function=masked_lora_fp8_linear_kernel,
    inputs=("x", "weight", "weight_scale", "input_scale", "bias", "lora_a", "lora_b", "row_scale"),
    outputs=("y",),
    grid=grid,
    weight_type="fp8e4nv",
    dtypes=("bfloat16", "float16"),
    min_capability=89,
)


def launch(
    x: Tensor,
    weight: Tensor,
    scales: tuple[Tensor, Tensor],
    bias: Tensor | None,
    low_rank: tuple[Tensor, Tensor, Tensor],
    configuration: Configuration,
    y: Tensor,
) -> None:
    """Write `y`, `[M, N]`.

    All tensors are contiguous: x `[M, K]`, weight E4M3 `[N, K]`, the scales of the weight `[N]` and of x (a scalar), bias
    `[N]`, and of the low-rank update lora_a `[R, K]`, lora_b `[N, R]` and row_scale `[M]`.
    """
    (rows, k), n, rank = x.shape, weight.shape[0], low_rank[0].shape[0]
    wrap_triton(masked_lora_fp8_linear_kernel)[grid(configuration, rows, n)](
        x, weight, *scales, bias, *low_rank, rows, k, n, rank, y, **configuration.meta(k, rank)
    )
