"""The `…_triton` operators and the paths that dispatch chooses from on CUDA tensors.

On CPU tensors they run under Triton's interpreter, in a process that was started with `TRITON_INTERPRET=1`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from slideredit_rt.errors import SliderEditError
from slideredit_rt.kernels import dispatch
from slideredit_rt.kernels.arguments import (
    check_linear,
    check_one_scale_per_row,
    check_qkv,
    check_update,
    empty_projection,
    empty_qkv,
)
from slideredit_rt.kernels.triton_accumulate import launch_linear as launch_accumulate_linear
from slideredit_rt.kernels.triton_accumulate import launch_low_rank
from slideredit_rt.kernels.triton_linear import launch as launch_masked_lora_linear
from slideredit_rt.kernels.triton_qkv import launch as launch_masked_lora_qkv
from slideredit_rt.kernels.triton_update import launch as launch_masked_lora_update

INTERPRETED = bool(triton.knobs.runtime.interpret)


def _operator(name: str) -> Callable[[Callable[..., Any]], Any]:
    """A transparent operator; an opaque one under the interpreter, whose kernels no compiler can trace."""
    define = torch.library.custom_op if INTERPRETED else torch.library.triton_op
    decorator: Callable[[Callable[..., Any]], Any] = define(f"slideredit::{name}", mutates_args=())
    return decorator


def _flat(x: Tensor) -> Tensor:
    """`[M, K]`, contiguous; copies only where rows do not follow each other in memory."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def _scales(row_scale: Tensor) -> Tensor:
    return row_scale.reshape(-1).contiguous()


def _configuration(kernel: str, x: Tensor, rank: int) -> dispatch.Configuration:
    capability = 80
    if x.is_cuda and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability(x.device)
        capability = 10 * major + minor
    return dispatch.configuration(kernel, x.shape[0], rank, x.dtype, capability)


def _require_launchable(x: Tensor, row_scale: Tensor) -> None:
    check_one_scale_per_row(x, row_scale)
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise SliderEditError(
            f"the Triton kernels take bfloat16, float16 or float32, not {x.dtype}; use the …_reference operator"
        )
    if not x.is_cuda and not INTERPRETED:
        raise SliderEditError(
            "the Triton kernels run on CUDA tensors; for CPU tensors start Python with TRITON_INTERPRET=1 (slow, for tests)"
        )


@_operator("masked_lora_linear_triton")
def _masked_lora_linear_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, row_scale: Tensor
) -> Tensor:
    flat, n = _flat(x), weight.shape[0]
    y = flat.new_empty(flat.shape[0], n)
    configuration = _configuration("masked_lora_linear", flat, lora_a.shape[0])
    launch_masked_lora_linear(
        flat, weight.contiguous(), bias, lora_a.contiguous(), lora_b.contiguous(), _scales(row_scale), configuration, y
    )
    return y.view(*x.shape[:-1], n)


@_operator("masked_lora_accumulate_triton")
def _masked_lora_accumulate_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, row_scale: Tensor
) -> Tensor:
    flat, n, rank = _flat(x), weight.shape[0], lora_a.shape[0]
    low = flat.new_empty(flat.shape[0], rank, dtype=torch.float32)
    launch_low_rank(flat, lora_a.contiguous(), _scales(row_scale), _configuration("masked_low_rank", flat, rank), low)
    y = flat.new_empty(flat.shape[0], n)
    launch_accumulate_linear(
        flat, weight.contiguous(), bias, low, lora_b.contiguous(), _configuration("accumulate_linear", flat, rank), y
    )
    return y.view(*x.shape[:-1], n)


@_operator("masked_lora_addmm_triton")
def _masked_lora_addmm_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, row_scale: Tensor
) -> Tensor:
    flat, rank = _flat(x), lora_a.shape[0]
    low = flat.new_empty(flat.shape[0], rank)
    launch_low_rank(flat, lora_a.contiguous(), _scales(row_scale), _configuration("masked_low_rank", flat, rank), low)
    y = F.linear(flat, weight, bias).addmm_(low, lora_b.to(x.dtype).T)
    return y.view(*x.shape[:-1], weight.shape[0])


# Opaque on purpose: the rows that the kernel stores to come out of `row_scale`, which torch's analysis of Triton kernels
# therefore takes for written and would clone before each launch.
@torch.library.custom_op("slideredit::masked_lora_update_triton_", mutates_args=("y",))
def _masked_lora_update_triton_(y: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, row_scale: Tensor) -> None:
    flat = _flat(x)
    configuration = _configuration("masked_lora_update", flat, lora_a.shape[0])
    launch_masked_lora_update(
        flat, lora_a.contiguous(), lora_b.contiguous(), _scales(row_scale), configuration, y.view(-1, y.shape[-1])
    )


@_operator("masked_lora_qkv_triton")
def _masked_lora_qkv_triton(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    row_scale: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    flat, n = _flat(x), weights[0].shape[0]
    outputs = [flat.new_empty(flat.shape[0], n) for _ in range(3)]
    launch_masked_lora_qkv(
        flat,
        [t.contiguous() for t in weights],
        biases,
        [t.contiguous() for t in lora_as],
        [t.contiguous() for t in lora_bs],
        _scales(row_scale),
        _configuration("masked_lora_qkv", flat, lora_as[0].shape[0]),
        outputs,
    )
    q, k, v = (y.view(*x.shape[:-1], n) for y in outputs)
    return q, k, v


for _projection in (_masked_lora_linear_triton, _masked_lora_accumulate_triton, _masked_lora_addmm_triton):
    _projection.register_fake(empty_projection)
_masked_lora_qkv_triton.register_fake(empty_qkv)


@_masked_lora_update_triton_.register_fake
def _(y: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, row_scale: Tensor) -> None:
    return None


def masked_lora_linear_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, row_scale: Tensor
) -> Tensor:
    """`masked_lora_linear` in one Triton kernel: tiles without an active row cost what the frozen projection costs.

    Shapes as in `masked_lora_linear_reference`; bfloat16, float16 or float32; rank 1 to 128. For inference: no gradients.
    An inactive row's result does not depend on the other rows; it may differ from the vendor's GEMM in the last bit.

    Raises:
        SliderEditError: shapes, dtypes or devices that the kernels do not take.
    """
    check_linear(x, weight, bias, lora_a, lora_b, row_scale)
    _require_launchable(x, row_scale)
    y: Tensor = _masked_lora_linear_triton(x, weight, bias, lora_a, lora_b, row_scale)
    return y


def masked_lora_accumulate_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, row_scale: Tensor
) -> Tensor:
    """`masked_lora_linear` for rows that are all active: `row_scale · x Aᵀ` once, then one more inner step of the GEMM.

    Arguments and errors as in `masked_lora_linear_triton`.
    """
    check_linear(x, weight, bias, lora_a, lora_b, row_scale)
    _require_launchable(x, row_scale)
    y: Tensor = _masked_lora_accumulate_triton(x, weight, bias, lora_a, lora_b, row_scale)
    return y


def masked_lora_addmm_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, row_scale: Tensor
) -> Tensor:
    """`masked_lora_linear` for rows that are all active: `row_scale · x Aᵀ` by Triton, the rest by the vendor's `addmm`.

    Arguments and errors as in `masked_lora_linear_triton`, but no float16: it could not hold a large scale times a product.
    """
    check_linear(x, weight, bias, lora_a, lora_b, row_scale)
    _require_launchable(x, row_scale)
    if x.dtype == torch.float16:
        raise SliderEditError("the addmm path would overflow float16 at large strengths; use masked_lora_accumulate_triton")
    y: Tensor = _masked_lora_addmm_triton(x, weight, bias, lora_a, lora_b, row_scale)
    return y


def masked_lora_update_triton_(y: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, row_scale: Tensor) -> Tensor:
    """`masked_lora_update_` in one Triton kernel; returns `y`.

    The launch depends on shapes only, so a captured CUDA graph replays with other masks and scales. Inactive rows of `y`
    are neither read nor written. Shapes as in `masked_lora_update_reference_`, errors as in `masked_lora_linear_triton`.
    """
    check_update(y, x, lora_a, lora_b, row_scale)
    _require_launchable(x, row_scale)
    _masked_lora_update_triton_(y, x, lora_a, lora_b, row_scale)
    return y


def masked_lora_qkv_triton(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    row_scale: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """`masked_lora_qkv` in one launch. Errors as in `masked_lora_linear_triton`."""
    check_qkv(x, weights, biases, lora_as, lora_bs, row_scale)
    _require_launchable(x, row_scale)
    q, k, v = _masked_lora_qkv_triton(x, weights, biases, lora_as, lora_bs, row_scale)
    return q, k, v


def _by_update(x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, row_scale: Tensor) -> Tensor:
    """The vendor's GEMM, then the active rows in place."""
    y = F.linear(x, weight, bias).contiguous()
    _masked_lora_update_triton_(y, x, lora_a, lora_b, row_scale)
    return y


PATHS: dict[dispatch.ProjectionPath, Callable[..., Tensor]] = {
    "update": _by_update,
    "addmm": _masked_lora_addmm_triton,
    "accumulate": _masked_lora_accumulate_triton,
    "fused": _masked_lora_linear_triton,
}


def linear_by_dispatch(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, row_scale: Tensor
) -> Tensor:
    """`masked_lora_linear` of CUDA tensors by the path that `dispatch.json` names for this card and shape.

    Only paths that keep the vendor's bits: with every scale 0 the result is the base model's, bit for bit.
    """
    n, k = weight.shape
    path = dispatch.path(row_scale.numel(), n, k, x.dtype, torch.cuda.get_device_name(x.device), exact=True)
    return PATHS[path](x, weight, bias, lora_a, lora_b, row_scale)


def qkv_by_dispatch(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    row_scale: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """`masked_lora_qkv` of CUDA tensors: one launch where the fused kernel is the best path, else three projections."""
    n, k = weights[0].shape
    path = dispatch.path(row_scale.numel(), n, k, x.dtype, torch.cuda.get_device_name(x.device), exact=False)
    if path == "fused":
        q, k_, v = _masked_lora_qkv_triton(x, weights, biases, lora_as, lora_bs, row_scale)
    else:
        q, k_, v = (PATHS[path](x, weights[i], biases[i], lora_as[i], lora_bs[i], row_scale) for i in range(3))
    return q, k_, v
