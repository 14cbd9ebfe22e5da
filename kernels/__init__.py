"""The masked low-rank update: `y = x Wᵀ + bias + row_scale · (x Aᵀ) Bᵀ`, as an operator that torch and ONNX can carry."""

from slideredit_rt.kernels.ops import masked_lora_linear
from slideredit_rt.kernels.reference import masked_lora_linear_reference

__all__ = ["masked_lora_linear", "masked_lora_linear_reference"]
