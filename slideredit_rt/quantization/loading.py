"""Loading of a quantised transformer for eager torch. Diffusers' own quantisers are not involved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slideredit_rt.checkpoint import check_complete, check_parts, meta_transformer, read_weights
from slideredit_rt.errors import SliderEditError
from slideredit_rt.quantization.linear import quantized_parts
from slideredit_rt.tensor_files import read_tensor

_SCALES = ("weight_scale", "weight_scale_2", "input_scale")


def load_transformer(folder: Path, dtype: torch.dtype) -> Any:
    """Load a transformer that `slideredit-rt quantize` wrote.

    Args:
        folder: Folder of the transformer.
        dtype: Dtype of all weights that are not quantised, and of the arithmetic.

    Raises:
        SliderEditError: A tensor is missing or damaged, or a scale is not a positive finite number.
    """
    stored, model = read_weights(folder), meta_transformer(folder)
    check_complete(model.state_dict(), stored, folder)
    check_parts(model, stored, folder)
    parts = {name: part for name, (_, part) in quantized_parts(model).items()}
    state: dict[str, Tensor] = {}
    for name in model.state_dict():
        tensor = read_tensor(stored[name])
        state[name] = tensor if name in parts or not tensor.is_floating_point() else tensor.to(dtype)
        if parts.get(name) in _SCALES:
            check_scale(name, tensor, folder)
    model.load_state_dict(state, assign=True)
    return model


def check_scale(name: str, scale: Tensor, folder: Path) -> None:
    """Refuse scales that are zero, negative, infinite or NaN.

    Args:
        name: Name of the tensor, for the message.
        scale: The scales.
        folder: Folder of the model, for the message.

    Raises:
        SliderEditError: A scale is not a positive finite number.
    """
    wide = scale.float().flatten()
    bad = ~(wide.isfinite() & (wide > 0))
    if bad.any():
        raise SliderEditError(
            f"checkpoint {str(folder)!r} has a scale of {wide[bad][0].item():g} in {name}, but scales are positive finite "
            "numbers; quantise the original checkpoint again"
        )
