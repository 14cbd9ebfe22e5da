"""Selection of the linears of a transformer that are quantised, and of their precisions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from slideredit_rt.errors import SliderEditError
from slideredit_rt.families import Family
from slideredit_rt.quantization.config import QuantizedLayer
from slideredit_rt.quantization.precisions import PRECISIONS, get_precision


def select_layers(
    family: Family, transformer: nn.Module, precision: str, keep: Sequence[str] = ()
) -> dict[str, QuantizedLayer]:
    """Choose the format of each linear that is quantised.

    Projections whose rows sliders can scale get the precision itself. Modulation gets 8-bit weights. Embedders, the last norm,
    the last projection and what the family or `keep` names stay as they are.

    Args:
        family: Family of the transformer.
        transformer: Transformer that is not quantised; may be on the `meta` device.
        precision: Name of the precision.
        keep: Patterns of linears to keep, in which `*` stands for any characters.

    Raises:
        SliderEditError: The precision is unknown, a pattern matches no linear, or no linear is left.
    """
    form = get_precision(precision)
    config: Mapping[str, Any] = transformer.config  # type: ignore[assignment]
    linears = {name: m for name, m in transformer.named_modules() if isinstance(m, nn.Linear)}
    if unused := [p for p in keep if not any(fnmatchcase(name, p) for name in linears)]:
        raise SliderEditError(
            f"--keep {unused[0]!r} matches no linear of this {family.name} transformer; name linears such as "
            f"{next(iter(linears))}, with * for any characters"
        )
    layers = {}
    for name, linear in linears.items():
        if family.keeps_precision(name, config) or any(fnmatchcase(name, pattern) for pattern in keep):
            continue
        if family.rows_of(name) is not None and form.takes(linear.in_features):
            layers[name] = QuantizedLayer(precision, form.quantises_activations)
        elif family.is_modulation(name) and PRECISIONS[form.modulation].takes(linear.in_features):
            layers[name] = QuantizedLayer(form.modulation)
    if not layers:
        raise SliderEditError(f"no linear is left to be stored as {precision}; pass fewer --keep patterns or another base")
    return layers
