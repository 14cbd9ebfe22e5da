"""The low-rank update alone, added in place to the active rows of a projection computed by a vendor GEMM.

Two kernels. The first computes `row_scale · (x Aᵀ)`; where rows are few, in parts that share the inner columns, so that it
occupies the whole GPU. The second adds the sum of the parts, times Bᵀ, to the active rows of `y`. Both skip tiles without an
active row. Launches depend on shapes only, so a captured CUDA graph can be replayed with any other mask and alpha. In a bank of
adapters, a row is active if the scale of any member is not 0.

The number of parts stands in the second kernel's configuration, as `block_k`: the low-rank columns of all parts are the inner
columns of its product.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from slideredit_rt.kernels.configurations import Configuration
from slideredit_rt.kernels.spec import KernelSpec, Size, cdiv
from slideredit_rt.kernels.triton_tiles import cast, load_lora_b, multiply_low, project_low


@triton.jit
def load_member_scales(row_scale, row, rows, rank, members, RANK: tl.constexpr):
    """Load `[rows, RANK]`: for every column of the low-rank product, the scale of the member that owns it."""
    slot = tl.arange(0, RANK)
    owner = slot // (rank // members)
    mask = (row[:, None] < rows) & (slot[None, :] < rank)
    return tl.load(row_scale + row[:, None] * members + owner[None, :], mask=mask, other=0.0)


@triton.jit
def active_rows(scale):
    """Return which rows have any scale that is not 0. NaN counts as not 0."""
    return tl.max((scale != 0).to(tl.int32), axis=1) != 0


@triton.jit(do_not_specialize=["rows"])
def masked_low_rank_kernel(
    x,
    lora_a,
    row_scale,
    rows,
    K,
    rank,
    members,
    low,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RANK: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """Compute `low[part] = row_scale · (x Aᵀ)` over the inner columns of each part, `[parts, rows, rank]`.

    Programs along the second axis of the grid are the parts. Tiles without an active row store 0 and do not read `x`.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    scale = load_member_scales(row_scale, row, rows, rank, members, RANK)
    product = tl.zeros((BLOCK_M, RANK), tl.float32)
    if tl.max(active_rows(scale).to(tl.int32), axis=0) != 0:
        columns = tl.cdiv(tl.cdiv(K, BLOCK_K), tl.num_programs(1)) * BLOCK_K
        first = tl.program_id(1) * columns
        x_rows = x + tl.minimum(row, rows - 1) * K
        product = project_low(x_rows, lora_a, rank, first, tl.minimum(first + columns, K), K, BLOCK_M, BLOCK_K, RANK, EVEN_K)
    # A member of scale 0 adds nothing, even where its product is NaN or infinite.
    scaled = cast(tl.where(scale != 0, scale * product, 0.0), low.dtype.element_ty)
    slot = tl.arange(0, RANK)
    low_rows = low + (tl.program_id(1).to(tl.int64) * rows + row) * rank
    tl.store(low_rows[:, None] + slot[None, :], scaled, mask=(row[:, None] < rows) & (slot[None, :] < rank))


@triton.jit(do_not_specialize=["rows"])
def masked_lora_update_kernel(
    low,
    lora_b,
    row_scale,
    rows,
    N,
    rank,
    members,
    y,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RANK: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """Compute `y += low Bᵀ` on the active rows, where `low` is the sum of `BLOCK_K` parts, `[BLOCK_K, rows, rank]`."""
    row = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    active = active_rows(load_member_scales(row_scale, row, rows, rank, members, RANK))
    if tl.max(active.to(tl.int32), axis=0) != 0:
        slot = tl.arange(0, RANK)
        stored = active[:, None] & (slot[None, :] < rank)
        total = tl.zeros((BLOCK_M, RANK), tl.float32)
        for part in tl.static_range(BLOCK_K):
            total += tl.load(low + (part * rows + row)[:, None] * rank + slot[None, :], mask=stored, other=0.0)
        column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        y_tile = y + row[:, None] * N + column[None, :]
        mask = active[:, None] & (column[None, :] < N)
        frozen = tl.load(y_tile, mask=mask, other=0.0).to(tl.float32)
        updated = multiply_low(total, load_lora_b(lora_b, column, N, rank, RANK), frozen, y.dtype.element_ty)
        tl.store(y_tile, cast(updated, y.dtype.element_ty), mask=mask)


def low_rank_grid(configuration: Configuration, rows: Any, n: Any) -> tuple[Any, Any]:
    """Return the number of programs of the first launch, along y by its name: as many as `low` has parts. `n` is unused."""
    return cdiv(rows, configuration.block_m), Size("parts")


def update_grid(configuration: Configuration, rows: Any, n: Any) -> tuple[Any, Any]:
    """Return the number of programs of the second launch over `rows` rows and `n` output columns."""
    return cdiv(n, configuration.block_n), cdiv(rows, configuration.block_m)


LOW_RANK_SPEC = KernelSpec(
    function=masked_low_rank_kernel,
    inputs=("x", "lora_a", "row_scale"),
    outputs=("low",),
    grid=low_rank_grid,
)
UPDATE_SPEC = KernelSpec(
    function=masked_lora_update_kernel,
    inputs=("low", "lora_b", "row_scale"),
    outputs=("y",),
    grid=update_grid,
)


def launch_low_rank(x: Tensor, lora_a: Tensor, row_scale: Tensor, configuration: Configuration, low: Tensor) -> None:
    """Write `low`, float32 `[P, M, R]`, whose sum over any number P of parts is the scaled product.

    All tensors are contiguous: x `[M, K]`, lora_a `[R, K]`, row_scale float32 `[M, G]`.
    """
    (rows, k), (rank, members) = x.shape, (lora_a.shape[0], row_scale.shape[1])
    wrap_triton(masked_low_rank_kernel)[cdiv(rows, configuration.block_m), low.shape[0]](
        x, lora_a, row_scale, rows, k, rank, members, low, **configuration.meta(k, rank)
    )


def launch_update(low: Tensor, lora_b: Tensor, row_scale: Tensor, configuration: Configuration, y: Tensor) -> None:
    """Update `y` in place.

    All tensors are contiguous: low float32 `[P, M, R]` with P of `configuration.block_k`, lora_b `[N, R]`, row_scale float32
    `[M, G]`, y `[M, N]`.
    """
    (rows, n), rank, members = y.shape, lora_b.shape[1], row_scale.shape[1]
    # The kernel has no inner columns to be even, so any number stands for them.
    wrap_triton(masked_lora_update_kernel)[update_grid(configuration, rows, n)](
        low, lora_b, row_scale, rows, n, rank, members, y, **configuration.meta(n, rank)
    )
