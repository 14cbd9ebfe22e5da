"""Description of how a base stores its transformer."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from torch import nn

from slideredit_rt.checkpoint import meta_transformer, read_weights
from slideredit_rt.families import family_of
from slideredit_rt.quantization.config import read_layers, read_precision


def describe_base(base: Path) -> dict[str, Any]:
    """Describe a base for JSON. Only headers are read.

    Args:
        base: Folder of a diffusers pipeline.

    Returns:
        `family`, `precision` (None if it is not quantised), `layers` (number of quantised linears by `quant_algo`), `kept`
        (number of other linears) and `stored` (bytes of the transformer by dtype).

    Raises:
        SliderEditError: The folder is not a base, is damaged, or was quantised in a way that cannot be read.
    """
    family, source = family_of(base), base / "transformer"
    layers = read_layers(source)
    stored: Counter[str] = Counter()
    for place in read_weights(source).values():
        stored[str(place.dtype).removeprefix("torch.")] += place.length
    return {
        "family": family.name,
        "precision": read_precision(source),
        "layers": dict(Counter(layer.algorithm for layer in layers.values()).most_common()),
        "kept": sum(isinstance(module, nn.Linear) for module in meta_transformer(source).modules()),
        "stored": dict(stored.most_common()),
    }
