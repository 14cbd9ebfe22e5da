"""The `…_triton` operators, and `masked_lora_linear` on CUDA tensors.

CPU tensors need Triton's interpreter, in a process started with `TRITON_INTERPRET=1`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from slideredit_rt.errors import SliderEditError
from slideredit_rt.kernels.arguments import MAX_RANK, check_linear, check_one_scale_per_row, check_update, empty_projection
from slideredit_rt.kernels.configurations import Configuration, configuration
from slideredit_rt.kernels.reference import member_scales
from slideredit_rt.kernels.triton_linear import launch as launch_masked_lora_linear
from slideredit_rt.kernels.triton_update import launch_low_rank, launch_update

INTERPRETED = bool(triton.knobs.runtime.interpret)


def _operator(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Define an operator that the compiler can trace into, or an opaque one under the interpreter, where it cannot."""
    define = torch.library.custom_op if INTERPRETED else torch.library.triton_op
    decorator: Callable[[Callable[..., Any]], Any] = define(f"slideredit::{name}", mutates_args=())
    return decorator


def _flat(x: Tensor) -> Tensor:
    """Return `x` as a contiguous `[M, K]`. A contiguous `x` is not copied."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def _scales(row_scale: Tensor) -> Tensor:
    return row_scale.reshape(-1).contiguous()


def _capability(x: Tensor) -> int:
    if not (x.is_cuda and torch.cuda.is_available()):
        return 80
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


def leaves_out_fences(capability: int) -> bool:
    """Return whether this version of Triton compiles no `fence.proxy.async` between `cp.async` and the products of a card.

    Versions before 3.7.1 leave it out, and on sm90, sm100 and sm103, products read shared memory through the asynchronous proxy
    (see `slideredit_rt.kernels.ptx.unfenced_product`).

    Args:
        capability: Compute capability, such as 90.
    """
    version = tuple(map(int, re.findall(r"\d+", triton.__version__)[:3]))
    return version < (3, 7, 1) and 90 <= capability < 120


def _configuration(kernel: str, x: Tensor, rank: int) -> Configuration:
    return configuration(kernel, x.shape[0], rank, x.dtype, _capability(x))


def _linear_configuration(x: Tensor, rank: int) -> Configuration:
    """Return the tile sizes of `masked_lora_linear`, in one stage where Triton would leave out a fence.

    In one stage, a kernel copies through registers instead of by `cp.async`, and every version of Triton fences such copies. It
    is slower. The other kernels do not need the fence.
    """
    tiles = _configuration("masked_lora_linear", x, rank)
    return replace(tiles, num_stages=1) if leaves_out_fences(_capability(x)) else tiles


def _require_launchable(x: Tensor) -> None:
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise SliderEditError(
            f"x is {x.dtype}; the Triton kernels take bfloat16, float16 or float32. Use the …_reference operator instead"
        )
    if not x.is_cuda and not INTERPRETED:
        raise SliderEditError(
            "x is on the CPU; the Triton kernels take CUDA tensors. For tests, start Python with TRITON_INTERPRET=1 (slow)"
        )


@_operator("masked_lora_linear_triton")
def _masked_lora_linear_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, row_scale: Tensor
) -> Tensor:
    flat, n = _flat(x), weight.shape[0]
    y = flat.new_empty(flat.shape[0], n)
    tiles = _linear_configuration(flat, lora_a.shape[0])
    launch_masked_lora_linear(
        flat, weight.contiguous(), bias, lora_a.contiguous(), lora_b.contiguous(), _scales(row_scale), tiles, y
    )
    return y.view(*x.shape[:-1], n)


# Opaque on purpose: torch's analysis of Triton kernels need not find out which arguments the launches write.
@torch.library.custom_op("slideredit::masked_lora_update_triton_", mutates_args=("y",))
def _masked_lora_update_triton_(y: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, row_scale: Tensor) -> None:
    flat, rows = _flat(x), y.view(-1, y.shape[-1])
    scales = member_scales(row_scale, x).reshape(len(flat), -1)
    own = len(lora_a) // scales.shape[1]
    # A launch takes up to 128 columns of the low-rank product: all members of a bank, or as many as fit.
    together = max(1, MAX_RANK // own)
    columns = (lora_a.split(together * own), lora_b.split(together * own, dim=1), scales.split(together, dim=1))
    for a, b, scale in zip(*columns, strict=True):
        scale, tiles = scale.contiguous(), _configuration("masked_lora_update", flat, len(a))
        low = flat.new_empty(tiles.block_k, len(flat), len(a), dtype=torch.float32)
        launch_low_rank(flat, a.contiguous(), scale, _configuration("masked_low_rank", flat, len(a)), low)
        launch_update(low, b.contiguous(), scale, tiles, rows)


_masked_lora_linear_triton.register_fake(empty_projection)


@_masked_lora_update_triton_.register_fake
def _(y: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, row_scale: Tensor) -> None:
    return None


def masked_lora_linear_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, row_scale: Tensor
) -> Tensor:
    """Compute `masked_lora_linear` in one Triton kernel. Tiles without an active row skip the low-rank product.

    The result of an inactive row does not depend on the other rows, but may differ from the vendor's GEMM in the last bit.
    The operator has no gradients. With Triton before 3.7.1, it is slower on sm90, sm100 and sm103, where it does without
    copies that such a Triton compiles wrongly.

    Args:
        x: `[..., S, K]`, bfloat16, float16 or float32.
        weight: `[N, K]`, in the dtype of `x`.
        bias: `[N]`, or None.
        lora_a: `[R, K]` with R from 1 to 128, in any floating dtype.
        lora_b: `[N, R]`, with LoRA's `lora_alpha / r` already folded in.
        row_scale: `[..., S]`, float32.

    Returns:
        `[..., S, N]` in the dtype of `x`.

    Raises:
        SliderEditError: Shapes, dtypes or devices do not match or are not supported, or `row_scale` is that of a bank.
    """
    check_linear(x, weight, bias, lora_a, lora_b, row_scale)
    _require_launchable(x)
    check_one_scale_per_row(x, row_scale)
    y: Tensor = _masked_lora_linear_triton(x, weight, bias, lora_a, lora_b, row_scale)
    return y


def masked_lora_update_triton_(y: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, row_scale: Tensor) -> Tensor:
    """Compute `y += row_scale · (x Aᵀ) Bᵀ` in place with two Triton kernels, and return `y`.

    Both skip tiles without an active row, and inactive rows of `y` are neither read nor written. Launches depend on shapes
    only, so a captured CUDA graph can be replayed with other masks and scales.

    Args:
        y: `[..., S, N]`, contiguous, in the dtype of `x`.
        x: `[..., S, K]`, bfloat16, float16 or float32.
        lora_a: `[R, K]` with R from 1 to 128 for each adapter, in any floating dtype.
        lora_b: `[N, R]`, with LoRA's `lora_alpha / r` already folded in.
        row_scale: `[..., S]`, float32; `[..., S, G]` for a bank of G adapters, whose members are added in several launches
            where R exceeds 128.

    Returns:
        The tensor `y`.

    Raises:
        SliderEditError: Shapes, dtypes or devices do not match or are not supported, or `y` is not contiguous.
    """
    check_update(y, x, lora_a, lora_b, row_scale, in_place=True)
    _require_launchable(x)
    _masked_lora_update_triton_(y, x, lora_a, lora_b, row_scale)
    return y


def linear_then_update(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, row_scale: Tensor
) -> Tensor:
    """Compute `masked_lora_linear` on CUDA tensors: the vendor's GEMM, then the update of the active rows in place.

    Rows of scale 0 equal the base model's, bit for bit.
    """
    y = F.linear(x, weight, bias).contiguous()
    _masked_lora_update_triton_(y, x, lora_a, lora_b, row_scale)
    return y
