"""The whole projection in one kernel.

The frozen and the low-rank product share the loads of `x`, and tiles without an active row skip the low-rank product. The
kernel writes its whole output, as ahead-of-time TensorRT plugins must.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from slideredit_rt.kernels.configurations import Configuration
from slideredit_rt.kernels.spec import KernelSpec, cdiv
from slideredit_rt.kernels.triton_tiles import (
    add_low_rank,
    any_active,
    load_scale,
    project,
    project_both,
    scaled,
    store_tile,
    tile_of,
)


@triton.jit
def masked_lora_tile(
    x,
    weight,
    bias,
    lora_a,
    lora_b,
    row_scale,
    rows,
    K,
    N,
    rank,
    y,
    tile_m,
    tile_n,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RANK: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """Compute one `[BLOCK_M, BLOCK_N]` tile of `y = x Wᵀ + bias + row_scale · (x Aᵀ) Bᵀ`."""
    row = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    scale = load_scale(row_scale, row, rows)
    # Rows and columns past the end load the last one and are not stored.
    x_rows = x + tl.minimum(row, rows - 1) * K
    weight_rows = weight + tl.minimum(column, N - 1).to(tl.int64) * K
    if any_active(scale):
        accumulator, low = project_both(x_rows, weight_rows, lora_a, rank, K, BLOCK_M, BLOCK_N, BLOCK_K, RANK, EVEN_K)
        accumulator = add_low_rank(accumulator, scaled(scale, low), lora_b, column, N, rank, RANK, x.dtype.element_ty)
    else:
        accumulator = project(x_rows, weight_rows, K, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K)
    store_tile(y, accumulator, bias, row, column, rows, N)


@triton.jit(do_not_specialize=["rows"])
def masked_lora_linear_kernel(
    x,
    weight,
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
    """Compute `y = x Wᵀ + bias + row_scale · (x Aᵀ) Bᵀ`, one tile per program."""
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.cdiv(N, BLOCK_N))
    masked_lora_tile(
        x, weight, bias, lora_a, lora_b, row_scale, rows, K, N, rank, y, tile_m, tile_n, BLOCK_M, BLOCK_N, BLOCK_K, RANK, EVEN_K
    )


def grid(configuration: Configuration, rows: Any, n: Any) -> tuple[Any, Any]:
    """Return the number of programs of a launch over `rows` rows and `n` output columns."""
    return cdiv(rows, configuration.block_m) * cdiv(n, configuration.block_n), 1


SPEC = KernelSpec(
    function=masked_lora_linear_kernel,
    inputs=("x", "weight", "bias", "lora_a", "lora_b", "row_scale"),
    outputs=("y",),
    grid=grid,
)


def launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    row_scale: Tensor,
    configuration: Configuration,
    y: Tensor,
) -> None:
    """Write `y`, `[M, N]`.

    All tensors are contiguous: x `[M, K]`, weight `[N, K]`, lora_a `[R, K]`, lora_b `[N, R]`, row_scale `[M]`.
    """
    (rows, k), n, rank = x.shape, weight.shape[0], lora_a.shape[0]
    wrap_triton(masked_lora_linear_kernel)[grid(configuration, rows, n)](
        x, weight, bias, lora_a, lora_b, row_scale, rows, k, n, rank, y, **configuration.meta(k, rank)
    )
