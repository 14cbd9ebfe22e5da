"""Query, key and value projections of the same rows in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

from slideredit_rt.kernels.dispatch import Configuration
from slideredit_rt.kernels.spec import KernelSpec, cdiv
from slideredit_rt.kernels.triton_linear import masked_lora_tile
from slideredit_rt.kernels.triton_tiles import tile_of


@triton.jit(do_not_specialize=["rows"])
def masked_lora_qkv_kernel(
    x,
    weight_q,
    weight_k,
    weight_v,
    bias_q,
    bias_k,
    bias_v,
    lora_a_q,
    lora_a_k,
    lora_a_v,
    lora_b_q,
    lora_b_k,
    lora_b_v,
    row_scale,
    rows,
    K,
    N,
    rank,
    y_q,
    y_k,
    y_v,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RANK: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """Compute `y = x Wᵀ + bias + row_scale · (x Aᵀ) Bᵀ` for query, key and value, one tile of one of them per program."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    tile_m, tile = tile_of(tl.program_id(0), tl.cdiv(rows, BLOCK_M), 3 * tiles_n)
    if tile < tiles_n:
        weight, bias, lora_a, lora_b, y = weight_q, bias_q, lora_a_q, lora_b_q, y_q
    elif tile < 2 * tiles_n:
        weight, bias, lora_a, lora_b, y = weight_k, bias_k, lora_a_k, lora_b_k, y_k
    else:
        weight, bias, lora_a, lora_b, y = weight_v, bias_v, lora_a_v, lora_b_v, y_v
    tile_n = tile % tiles_n
    masked_lora_tile(
        x, weight, bias, lora_a, lora_b, row_scale, rows, K, N, rank, y, tile_m, tile_n, BLOCK_M, BLOCK_N, BLOCK_K, RANK, EVEN_K
    )


def grid(configuration: Configuration, rows: int, n: int) -> tuple[int, int]:
    """Return the number of programs of a launch over `rows` rows and three times `n` output columns."""
    return cdiv(rows, configuration.block_m) * cdiv(n, configuration.block_n) * 3, 1


def _three(name: str) -> tuple[str, str, str]:
    return f"{name}_q", f"{name}_k", f"{name}_v"


SPEC = KernelSpec(
    function=masked_lora_qkv_kernel,
    inputs=("x", *_three("weight"), *_three("bias"), *_three("lora_a"), *_three("lora_b"), "row_scale"),
    outputs=_three("y"),
    grid=grid,
)


def launch(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    row_scale: Tensor,
    configuration: Configuration,
    ys: Sequence[Tensor],
) -> None:
    """Write the three outputs. Shapes are those of `triton_linear.launch`, the same for all three."""
    (rows, k), n, rank = x.shape, weights[0].shape[0], lora_as[0].shape[0]
    wrap_triton(masked_lora_qkv_kernel)[grid(configuration, rows, n)](
        x,
        *weights,
        *biases,
        *lora_as,
        *lora_bs,
        row_scale,
        rows,
        k,
        n,
        rank,
        *ys,
        **configuration.meta(k, rank),
    )
