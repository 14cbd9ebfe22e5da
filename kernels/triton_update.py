"""The low-rank update alone, added in place to the active rows of a projection computed by a vendor GEMM.

Each program gathers the active rows of its chunk into dense tiles on the device. The launch depends on shapes only, so a
captured CUDA graph can be replayed with any other mask and alpha. In a bank of adapters, a row is active if the scale of any
member is not 0.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from slideredit_rt.kernels.dispatch import Configuration
from slideredit_rt.kernels.spec import KernelSpec, cdiv
from slideredit_rt.kernels.triton_tiles import cast, load_lora_b, multiply_low, project_low

# CHUNK is the number of rows compacted together; SPLIT programs share the tiles of one chunk and column range.
CHUNK: tl.constexpr = tl.constexpr(256)
SPLIT: tl.constexpr = tl.constexpr(4)


@triton.jit(do_not_specialize=["rows"])
def masked_lora_update_kernel(
    x,
    lora_a,
    lora_b,
    row_scale,
    rows,
    K,
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
    """Compute `y += row_scale · (x Aᵀ) Bᵀ` on the rows with a scale that is not 0. `row_scale` is `[rows, members]`."""
    chunk = tl.arange(0, CHUNK)
    chunk_start = (tl.program_id(1) // SPLIT).to(tl.int64) * CHUNK
    active = chunk < 0
    for member in range(0, members):
        row = chunk_start + chunk
        active |= tl.load(row_scale + row * members + member, mask=row < rows, other=0.0) != 0
    # Position of each active row among the active ones of the chunk.
    position = tl.cumsum(active.to(tl.int32), axis=0) - 1
    count = tl.sum(active.to(tl.int32), axis=0)
    first = (tl.program_id(1) % SPLIT) * BLOCK_M
    if first < count:
        column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        b = load_lora_b(lora_b, column, N, rank, RANK)
        slot = tl.arange(0, RANK)
        owner = slot // (rank // members)
        for start in range(first, count, SPLIT * BLOCK_M):
            wanted = start + tl.arange(0, BLOCK_M)
            hit = active[None, :] & (position[None, :] == wanted[:, None])
            # Positions past the last active row match no row. They load the chunk's first row and are not stored.
            row = chunk_start + tl.sum(tl.where(hit, chunk[None, :], 0), axis=1)
            owned = (wanted[:, None] < count) & (slot[None, :] < rank)
            scale = tl.load(row_scale + row[:, None] * members + owner[None, :], mask=owned, other=0.0)
            y_tile = y + row[:, None] * N + column[None, :]
            mask = (wanted[:, None] < count) & (column[None, :] < N)
            base = tl.load(y_tile, mask=mask, other=0.0)
            low = project_low(x + row * K, lora_a, rank, K, BLOCK_M, BLOCK_K, RANK, EVEN_K)
            # A member of scale 0 adds nothing, even where `low` is NaN or infinite.
            scaled_low = tl.where(scale != 0, scale * low, 0.0)
            updated = multiply_low(scaled_low, b, base.to(tl.float32), x.dtype.element_ty)
            tl.store(y_tile, cast(updated, y.dtype.element_ty), mask=mask)


def grid(configuration: Configuration, rows: int, n: int) -> tuple[int, int]:
    """Return the number of programs of a launch over `rows` rows and `n` output columns."""
    return cdiv(n, configuration.block_n), cdiv(rows, CHUNK.value) * SPLIT.value


SPEC = KernelSpec(
    function=masked_lora_update_kernel,
    inputs=("x", "lora_a", "lora_b", "row_scale"),
    outputs=("y",),
    grid=grid,
)


def launch(x: Tensor, lora_a: Tensor, lora_b: Tensor, row_scale: Tensor, configuration: Configuration, y: Tensor) -> None:
    """Update `y` in place.

    All tensors are contiguous: x `[M, K]`, lora_a `[R, K]`, lora_b `[N, R]`, row_scale `[M, G]`, y `[M, N]`.
    """
    (rows, k), n, (rank, members) = x.shape, y.shape[1], (lora_a.shape[0], row_scale.shape[1])
    wrap_triton(masked_lora_update_kernel)[grid(configuration, rows, n)](
        x, lora_a, lora_b, row_scale, rows, k, n, rank, members, y, **configuration.meta(k, rank)
    )
