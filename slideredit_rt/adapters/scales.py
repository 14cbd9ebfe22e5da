"""Where a scale is stated: beside the tensors, in PEFT's configuration, in a trainer's metadata. Statements must agree."""

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
# What kohya's scripts write where the tensors' own alphas and ranks count.
_NO_NUMBERS = ("dynamic", "none")

# Initialisations that leave the base's weights as they are. PEFT's others move a part of them into the adapter.
_PLAIN_INITIALISATIONS = ("true", "false", "gaussian", "eva", "orthogonal", "mica")
_CONVERTIBLE_INITIALISATIONS = ("pissa", "olora", "corda", "lora_ga")
# Options of PEFT that make an adapter more than a low-rank update of linears. The configurations that are excepted act at
# initialisation, in training or at run time.
_MORE_THAN_LORA = re.compile(
    r"use_(?!rslora$).+|(?!runtime_|eva_|corda_|loftq_|lora_ga_|velora_).+_config|lora_bias|alora_invocation_tokens|"
    r"layer_replication|modules_to_save|trainable_token_indices|target_parameters"
)


def read_settings(text: str | bytes, what: str, path: Path) -> dict[str, Any]:
    """The JSON object in `text`.

    Raises:
        SliderEditError: it is none.
    """
    try:
        settings = json.loads(text)
        if not isinstance(settings, dict):
            raise ValueError("no JSON object")
    except (ValueError, RecursionError) as error:
        raise SliderEditError(
            f"the {what} of adapter {str(path)!r} cannot be read ({error}); save or download it again"
        ) from None
    return settings


@dataclass(frozen=True)
class Statement:
    """A place that states a scale for every module of an adapter.

    Attributes:
        where: name of the place, for messages.
        settings: `lora_alpha`, `r`, `rank_pattern`, `alpha_pattern` and `use_rslora`, as PEFT means them.
    """

    where: str
    settings: Mapping[str, Any]

    def scales(self, module: str, rank: int, source: str | Path) -> dict[float, float]:
        """`lora_alpha / r` by the ranks that it may mean, the stated one and the tensors'; empty if it states no number."""
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
    """What PEFT's configuration states.

    Raises:
        SliderEditError: it states no alpha, or an adapter that is not plain LoRA on the base's own weights.
    """
    name = f"adapter {str(source)!r}"
    kind = str(settings.get("peft_type") or "LORA")
    if kind.upper().rpartition(".")[2] != "LORA":
        raise SliderEditError(f"{name} is of PEFT's type {kind}, not LORA; give a plain LoRA")
    if settings.get("use_dora"):
        raise SliderEditError(f"{name} is a DoRA, which no slider can scale; give a plain LoRA")
    more = next((key for key, value in settings.items() if value and _MORE_THAN_LORA.fullmatch(key)), None)
    if more or (settings.get("bias") or "none") != "none":
        raise SliderEditError(
            f"{name} was trained with PEFT's option {more or 'bias'}, so it is more than low-rank updates of linears, which "
            "are all that a slider can scale; give a plain LoRA"
        )
    start = settings.get("init_lora_weights")
    if isinstance(start, str) and start.lower() not in _PLAIN_INITIALISATIONS:
        if start.lower().startswith(_CONVERTIBLE_INITIALISATIONS):
            remedy = (
                "convert it with PEFT where it was trained: "
                "save_pretrained(folder, path_initial_model_for_weight_conversion=the folder of the untrained adapter)"
            )
        else:
            remedy = "train it with another init_lora_weights, such as gaussian"
        raise SliderEditError(
            f"{name} was trained with init_lora_weights {start!r}, which changes the base's own weights, so it does not fit "
            f"the unchanged base; {remedy}"
        )
    if "lora_alpha" not in settings:
        raise SliderEditError(f"{name} has no lora_alpha in its {where}, so its scale is unknown; save or download it again")
    return Statement(where, settings)


def metadata_statements(metadata: Mapping[str, str], source: str | Path, path: Path) -> list[Statement]:
    """What the metadata of a safetensors file states: PEFT's configuration, diffusers' copy of it, kohya's numbers."""
    statements = []
    metadata = dict(sorted(metadata.items()))  # safetensors gives it in any order
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
    """The scale of one module, by all that states it; 1 where nothing does.

    Args:
        rank: of the module's tensors.
        alpha: stored beside them, None where none is.

    Raises:
        SliderEditError: statements contradict each other, or leave the scale open.
    """
    # The first place is the one that other programs follow.
    readings = [] if alpha is None else [("stored alpha", {float(rank): alpha / rank})]
    readings += [(statement.where, statement.scales(module, rank, source)) for statement in statements]
    readings = [(where, scales) for where, scales in readings if scales]
    if not readings and not statements:
        return 1.0
    if not readings:
        raise SliderEditError(
            f"adapter {str(source)!r} has no number in its {statements[0].where} and no alpha beside {module}, so its scale is "
            "unknown; save or download it again"
        )
    (where, first), *others = readings
    # An alpha may be stored in bfloat16, which has two to three digits.
    agreed = {
        r: scale
        for r, scale in first.items()
        if all(any(math.isclose(scale, other, rel_tol=0.01) for other in scales.values()) for _, scales in others)
    }
    if not agreed:
        said = ", ".join(f"{next(iter(scales.values())):.4g} by its {where}" for where, scales in readings)
        raise SliderEditError(
            f"adapter {str(source)!r} states different scales for {module}: {said}; save it again with the right one"
        )
    if len(set(agreed.values())) > 1:
        raise SliderEditError(
            f"adapter {str(source)!r} has rank {rank} at {module} and its {where} says {next(iter(agreed)):g}, so its scale is "
            "unknown; save or download it again"
        )
    return next(iter(agreed.values()))


def _by_pattern(patterns: Any, module: str, default: Any) -> Any:
    """PEFT's rule for `rank_pattern` and `alpha_pattern`: the first pattern that matches the end of the module's name."""
    return next((value for pattern, value in (patterns or {}).items() if re.match(rf"(.*\.)?({pattern})$", module)), default)
