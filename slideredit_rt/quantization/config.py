"""The `quantization_config` of a transformer's `config.json`: which linears are quantised, and how.

It has ModelOpt's keys: `quant_method`, `quant_algo`, and in `quantized_layers` the `quant_algo` of each linear.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slideredit_rt import __version__
from slideredit_rt.assets import is_embedded
from slideredit_rt.errors import SliderEditError
from slideredit_rt.files import read_json, user_path
from slideredit_rt.quantization.precisions import PRECISIONS

METHOD = "modelopt"
_MIXED = "MIXED_PRECISION"
INSTEAD = "pass the float32, bfloat16 or float16 checkpoint that it was made from, or quantise that with slideredit-rt quantize"
"""What to do about weights that cannot be used, for messages."""
_NUNCHAKU = "Nunchaku's layout is for its own kernels; --precision int4 or nvfp4 comes closest"
# By the beginning of a quant_method or of a file's name, or by its end.
_OTHER_METHODS = {
    "bitsandbytes": "NF4 and LLM.int8() need bitsandbytes at run time; --precision int4 or int8 comes closest",
    "modelopt": "slideredit-rt import makes a base of FP8 weights that ModelOpt wrote",
    "gguf": "GGUF blocks are not read; --precision int4 or int8 comes closest",
    "nunchaku": _NUNCHAKU,
    "svdq": _NUNCHAKU,
    "nvfp4": "NVFP4 files of other tools are not read; --precision nvfp4 makes such weights",
    ".safetensors": "slideredit-rt import makes a base of FP8 weights in a file",
}


@dataclass(frozen=True)
class QuantizedLayer:
    """Format of a quantised linear.

    Attributes:
        precision: Name of the precision.
        activations: True if activations are quantised; otherwise only the weight is.
    """

    precision: str
    activations: bool = False

    @property
    def algorithm(self) -> str:
        """The `quant_algo` of the linear."""
        precision = PRECISIONS[self.precision]
        algorithm = precision.algorithm if self.activations else precision.weight_only_algorithm
        if algorithm is None:
            raise ValueError(f"{self.precision} always quantises activations")
        return algorithm


_LAYERS = {
    layer.algorithm: layer
    for precision in PRECISIONS.values()
    for layer in (
        *([QuantizedLayer(precision.name)] if precision.weight_only_algorithm else []),
        *([QuantizedLayer(precision.name, activations=True)] if precision.quantises_activations else []),
    )
}


def describe_layers(
    layers: Mapping[str, QuantizedLayer], precision: str, source: str | None = None, fused: Collection[str] = ()
) -> dict[str, Any]:
    """Return the `quantization_config` for linears, by name.

    Args:
        layers: Format of each linear.
        precision: Name of the precision that the base was quantised to.
        source: Location of the original base, for `slideredit-rt verify`; None if it is not known.
        fused: Locations of the LoRAs that were added to its weights.
    """
    algorithms = sorted({layer.algorithm for layer in layers.values()})
    return {
        "quant_method": METHOD,
        "quant_algo": algorithms[0] if len(algorithms) == 1 else _MIXED,
        "producer": {"name": "slideredit-rt", "version": __version__},
        "precision": precision,
        **({"source": source} if source else {}),
        **({"fused": list(fused)} if fused else {}),
        "quantized_layers": {name: {"quant_algo": layer.algorithm} for name, layer in layers.items()},
    }


def _configuration(folder: Path) -> Any:
    """Return the `quantization_config` of a model, None if it has none or its `config.json` cannot be read."""
    try:
        return read_json(folder / "config.json").get("quantization_config")
    except (OSError, ValueError):
        return None  # reported when the model is built


def read_layers(folder: Path) -> dict[str, QuantizedLayer]:
    """Return the format of a model's quantised linears, by name; empty for a model that is not quantised.

    Args:
        folder: Folder of the model.

    Raises:
        SliderEditError: The model was quantised in a way that cannot be read.
    """
    configuration = _configuration(folder)
    if not configuration:
        return {}
    layers = configuration.get("quantized_layers") if isinstance(configuration, dict) else None
    if not isinstance(layers, dict) or configuration.get("quant_method") != METHOD or not layers:
        raise refusal(folder, configuration)
    found = {}
    for name, entry in layers.items():
        algorithm = entry.get("quant_algo") if isinstance(entry, dict) else None
        if not isinstance(algorithm, str) or algorithm not in _LAYERS:
            raise SliderEditError(
                f"checkpoint {str(folder)!r} stores {name} in the unknown quant_algo {json.dumps(algorithm)}; known: "
                f"{', '.join(_LAYERS)}; {INSTEAD}"
            )
        found[name] = _LAYERS[algorithm]
    return found


def read_precision(folder: Path) -> str | None:
    """Return the name of the precision that a model was quantised to, None if it is not quantised.

    Args:
        folder: Folder of the model.

    Raises:
        SliderEditError: The model was quantised in a way that cannot be read.
    """
    layers = read_layers(folder)
    if not layers:
        return None
    stated = _configuration(folder).get("precision")
    # Modulation may have another precision than the other linears, which are more.
    counts = [layer.precision for layer in layers.values()]
    return stated if isinstance(stated, str) and stated in PRECISIONS else max(sorted(set(counts)), key=counts.count)


def read_source(folder: Path) -> str:
    """Return the location, on this machine, of the base that a model was quantised from.

    Args:
        folder: Folder of a model that is quantised.

    Raises:
        SliderEditError: It is not recorded or not on this machine, or LoRAs were added to it.
    """
    configuration = _configuration(folder) or {}
    if configuration.get("fused"):
        raise SliderEditError(
            f"{str(folder.parent)!r} was quantised from a base with fused LoRAs, which no folder holds; save that base without "
            "quantisation and pass it with --reference"
        )
    source = configuration.get("source")
    if not isinstance(source, str) or not (is_embedded(source) or user_path(source).exists()):
        # A location elsewhere is not followed: the configuration may come from anybody.
        raise SliderEditError(
            f"{str(folder.parent)!r} was not quantised from a base that is on this machine; pass the unquantised base with "
            "--reference"
        )
    return source


def hint_for(method: str) -> str:
    """Return what to know about a foreign format, in brackets after a space; empty if it is unknown.

    Args:
        method: A `quant_method` or the name of a file.
    """
    found = (f" ({hint})" for name, hint in _OTHER_METHODS.items() if method.startswith(name) or method.endswith(name))
    return next(found, "")


def refusal(source: Path, configuration: Any) -> SliderEditError:
    """Make the error for weights whose quantisation cannot be read here.

    Args:
        source: Folder of the model, or a file.
        configuration: The folder's `quantization_config`; None for a file.
    """
    method = configuration.get("quant_method") if isinstance(configuration, Mapping) else None
    named = source.name if configuration is None else str(method)
    why = hint_for(named)
    if configuration is None:
        return SliderEditError(
            f"base {str(source)!r} is a single file, not a folder saved with save_pretrained{why}; {INSTEAD}"
        )
    return SliderEditError(
        f"checkpoint {str(source)!r} is quantised ({method or 'according to its config.json'}) in a form that cannot be used "
        f"here{why}; {INSTEAD}"
    )
