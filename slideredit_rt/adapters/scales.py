"""LoRA scales, read from alphas beside the tensors, PEFT's configuration and a trainer's metadata, which must agree."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slideredit_rt.errors import SliderEditError

DIFFUSERS_METADATA = "lora_adapter_metadata"
_ALPHA = re.compile(r"(ss_)?((network|lora)_)?alpha")
_RANK = re.compile(r"(ss_)?((network|lora)_)?(dim|rank|r)")
_RSLORA = re.compile(r"\b(ss_)?(use_rslora|rs_lora)\W+true", re.IGNORECASE)
# Kohya's scripts write these when the alphas and ranks of the tensors themselves apply.
_NO_NUMBERS = ("dynamic", "none")

# Initialisations that keep the base's weights. PEFT's other ones move a part of the weights into the adapter.
_PLAIN_INITIALISATIONS = ("true", "false", "gaussian", "eva", "orthogonal", "mica")
_CONVERTIBLE_INITIALISATIONS = ("pissa", "olora", "corda", "lora_ga")
# PEFT options that make an adapter more than a low-rank update of linears. The excluded configurations only act at
# initialisation, in training or at run time.
_MORE_THAN_LORA = re.compile(
    r"use_(?!rslora$).+|(?!runtime_|eva_|corda_|loftq_|lora_ga_|velora_).+_config|lora_bias|alora_invocation_tokens|"
    r"layer_replication|modules_to_save|trainable_token_indices|target_parameters"
)


def read_settings(text: str | bytes, what: str, path: Path) -> dict[str, Any]:
    """Parse the JSON object in `text`.

    Args:
        text: The JSON text.
        what: Name of the text, for messages.
        path: File of the adapter, for messages.

    Raises:
        SliderEditError: The text is not a JSON object.
    """
    try:
        settings = json.loads(text)
        if not isinstance(settings, dict):
            raise ValueError("it is not a JSON object")
    except (ValueError, RecursionError) as error:
        raise SliderEditError(
            f"the {what} of adapter {str(path)!r} cannot be read ({error}); save or download it again"
        ) from None
    return settings


@dataclass(frozen=True)
class Statement:
    """Scale settings from one place, such as PEFT's configuration, for every module of an adapter.

    Attributes:
        where: Name of the place, for messages.
        settings: `lora_alpha`, `r`, `rank_pattern`, `alpha_pattern` and `use_rslora`, as PEFT defines them.
    """

    where: str
    settings: Mapping[str, Any]

    def scales(self, module: str, rank: int, source: str | Path) -> dict[float, float]:
        """Return the scales of a module by the rank that is assumed, the stated one or that of the tensors.

        Args:
            module: Name of the module.
            rank: Rank of its tensors.
            source: Path or name of the adapter, for messages.

        Returns:
            `lora_alpha / r`, or `lora_alpha / √r` with `use_rslora`, by r; empty if the settings state no number.

        Raises:
            SliderEditError: The stated rank or alpha is not a number.
        """
        stated = self.settings.get("r") or rank
        if str(self.settings["lora_alpha"]).lower() in _NO_NUMBERS:
            return {}
        try:
            stated = float(_by_pattern(self.settings.get("rank_pattern"), module, stated))
            alpha = float(_by_pattern(self.settings.get("alpha_pattern"), module, self.settings["lora_alpha"]))
            root = 0.5 if self.settings.get("use_rslora") else 1
            return {r: alpha / r**root for r in (stated, float(rank))}
        except (TypeError, ValueError, AttributeError, ZeroDivisionError, re.error) as error:
            raise SliderEditError(
                f"adapter {str(source)!r} has an unreadable rank or alpha for {module} in its {self.where} ({error}); "
                "save or download it again"
            ) from None


def peft_statement(settings: Mapping[str, Any], where: str, source: str | Path) -> Statement:
    """Read the scale settings of a PEFT configuration.

    Args:
        settings: The configuration.
        where: Name of the place it was found in, for messages.
        source: Path or name of the adapter, for messages.

    Raises:
        SliderEditError: The configuration has no alpha, or the adapter is not plain LoRA on the base's own weights.
    """
    name = f"adapter {str(source)!r}"
    kind = str(settings.get("peft_type") or "LORA")
    if kind.upper().rpartition(".")[2] != "LORA":
        raise SliderEditError(f"{name} has PEFT type {kind}, not LORA; use a plain LoRA")
    if settings.get("use_dora"):
        raise SliderEditError(f"{name} is a DoRA, which sliders cannot scale; use a plain LoRA")
    more = next((key for key, value in settings.items() if value and _MORE_THAN_LORA.fullmatch(key)), None)
    if more or (settings.get("bias") or "none") != "none":
        raise SliderEditError(
            f"{name} was trained with PEFT's option {more or 'bias'}, so it is more than low-rank updates of linears, and "
            "sliders can scale only those; use a plain LoRA"
        )
    start = settings.get("init_lora_weights")
    if isinstance(start, str) and start.lower() not in _PLAIN_INITIALISATIONS:
        if start.lower().startswith(_CONVERTIBLE_INITIALISATIONS):
            remedy = (
                "convert it with PEFT on the machine where it was trained: "
                "save_pretrained(folder, path_initial_model_for_weight_conversion=the folder of the untrained adapter)"
            )
        else:
            remedy = "train it with another init_lora_weights, such as gaussian"
        raise SliderEditError(
            f"{name} was trained with init_lora_weights={start!r}, which changes the base's own weights, so it does not fit "
            f"the unchanged base; {remedy}"
        )
    if "lora_alpha" not in settings:
        raise SliderEditError(f"{name} has no lora_alpha in its {where}, so its scale is unknown; save or download it again")
    return Statement(where, settings)


def metadata_statements(metadata: Mapping[str, str], source: str | Path, path: Path) -> list[Statement]:
    """Read all scale settings in a safetensors file's metadata: PEFT's configuration, diffusers' copy, kohya's numbers.

    Args:
        metadata: Metadata of the file.
        source: Path or name of the adapter, for messages.
        path: File of the adapter, for messages.
    """
    statements = []
    metadata = dict(sorted(metadata.items()))  # safetensors returns it in arbitrary order
    for key, text in metadata.items():
        if key == DIFFUSERS_METADATA or (key != "training" and "lora_alpha" in text and text.lstrip().startswith("{")):
            stored = read_settings(text, key, path)
            settings = {k.removeprefix("transformer."): v for k, v in stored.items() if not k.startswith("text_encoder")}
            if settings:
                statements.append(peft_statement(settings, key, source))
    ranks: list[str | None] = [
        text for key, text in metadata.items() if _RANK.fullmatch(key) and text.lower() not in _NO_NUMBERS
    ]
    root = any(_RSLORA.search(f"{key}: {text}") for key, text in metadata.items())
    for key, text in metadata.items():
        if _ALPHA.fullmatch(key):
            numbers = {"lora_alpha": text, "use_rslora": root}
            statements += [Statement(f"metadata ({key})", numbers | {"r": rank}) for rank in ranks or [None]]
    return statements


def module_scale(module: str, rank: int, alpha: float | None, statements: Sequence[Statement], source: str | Path) -> float:
    """Return the scale of one module; 1 if it is stated nowhere.

    Args:
        module: Name of the module.
        rank: Rank of its tensors.
        alpha: Alpha stored beside them, or None.
        statements: Scale settings from other places.
        source: Path or name of the adapter, for messages.

    Raises:
        SliderEditError: The places contradict each other, or do not determine the scale.
    """
    # Other programs follow the first place.
    readings = [] if alpha is None else [("stored alpha", {float(rank): alpha / rank})]
    readings += [(statement.where, statement.scales(module, rank, source)) for statement in statements]
    readings = [(where, scales) for where, scales in readings if scales]
    if not readings and not statements:
        return 1.0
    if not readings:
        raise SliderEditError(
            f"adapter {str(source)!r} has neither a number in its {statements[0].where} nor an alpha beside {module}, so its "
            "scale is unknown; save or download it again"
        )
    (where, first), *others = readings
    # An alpha may be stored in bfloat16, which has only two to three significant digits.
    agreed = {
        r: scale
        for r, scale in first.items()
        if all(any(math.isclose(scale, other, rel_tol=0.01) for other in scales.values()) for _, scales in others)
    }
    if not agreed:
        said = ", ".join(f"{next(iter(scales.values())):.4g} in its {where}" for where, scales in readings)
        raise SliderEditError(
            f"adapter {str(source)!r} states different scales for {module}: {said}; save it again with the right one"
        )
    if len(set(agreed.values())) > 1:
        raise SliderEditError(
            f"adapter {str(source)!r} has rank {rank} at {module}, but its {where} says {next(iter(agreed)):g}, so its scale "
            "is unknown; save or download it again"
        )
    return next(iter(agreed.values()))


def _by_pattern(patterns: Any, module: str, default: Any) -> Any:
    """Look up a module in a `rank_pattern` or `alpha_pattern` as PEFT does: the first pattern that matches its name's end."""
    return next((value for pattern, value in (patterns or {}).items() if re.match(rf"(.*\.)?({pattern})$", module)), default)
