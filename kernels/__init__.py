"""The masked low-rank update: `y = x Wᵀ + bias + row_scale · (x Aᵀ) Bᵀ`.

Each operation has three forms: the plain name dispatches by device and shape, `…_reference` is the plain PyTorch
expression, and `…_triton` always runs the Triton kernel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from slideredit_rt.kernels.ops import masked_lora_linear, masked_lora_update, masked_lora_update_
from slideredit_rt.kernels.quantized import quantized_linear, quantized_linear_reference
from slideredit_rt.kernels.reference import (
    masked_lora_linear_reference,
    masked_lora_update_reference,
    masked_lora_update_reference_,
)

if TYPE_CHECKING:
    from slideredit_rt.kernels.triton_ops import (
        masked_lora_linear_triton,
        masked_lora_update_triton_,
    )

__all__ = [
    "masked_lora_linear",
    "masked_lora_linear_reference",
    "masked_lora_linear_triton",
    "masked_lora_update",
    "masked_lora_update_",
    "masked_lora_update_reference",
    "masked_lora_update_reference_",
    "masked_lora_update_triton_",
    "quantized_linear",
    "quantized_linear_reference",
]


def __getattr__(name: str) -> Any:
    # Triton is available on Linux only and takes a second to import. The reference does not need it.
    if name in __all__:
        from slideredit_rt.kernels import triton_ops

        return getattr(triton_ops, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
