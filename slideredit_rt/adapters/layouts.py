"""LoRA state-dict layouts of different trainers, converted to diffusers' module names."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
from torch import Tensor

from slideredit_rt.checkpoint import quiet_libraries
from slideredit_rt.errors import SliderEditError
from slideredit_rt.families import FAMILIES, Family, families_by_name

Pair = tuple[Tensor, Tensor]

_PREFIX = re.compile(r"^(transformer\.|base_model\.model\.|diffusion_model\.)+")
_ADAPTER = r"(\.(?P<adapter>[\w-]+))?"
# XLabs' modules end in _lora, _lora1 and _lora2.
_KEY = re.compile(rf"^(?P<module>.+?)(\.lora_|(?<=_lora|lora[12])\.)(?P<part>A|B|down|up){_ADAPTER}\.weight$")
_ALPHA = re.compile(rf"^(?P<module>.+?)(\.lora_(A|B|down|up){_ADAPTER}(\.weight)?)?\.alpha$")
_PARTS = {"A": "A", "down": "A", "B": "B", "up": "B"}
_TEXT_ENCODER = re.compile(r"^(base_model\.model\.)?(lora_te\d?_|te\d?\.|text_encoders?(_\d)?\.|text_model\.)")
_FLAT = re.compile(r"^(lora_unet|lora_transformer|lycoris)_")
# Module names of kohya's scripts and Black Forest Labs, with and without dots.
_FOREIGN = re.compile(rf"{_FLAT.pattern}|^(double|single)_blocks\.")


@dataclass(frozen=True)
class Layout:
    """LoRA tensors of a state dictionary by module, under the file's own module names without prefixes.

    Attributes:
        halves: `A` and `B` of each module.
        alphas: Alphas stored beside them, by module.
        ignored: Text-encoder linears, which engines do not change.
    """

    halves: dict[str, dict[str, Tensor]]
    alphas: dict[str, float]
    ignored: tuple[str, ...]


def read_layout(state: Mapping[str, Tensor], source: str | Path) -> Layout:
    """Sort the tensors of a state dictionary by module.

    Args:
        state: Tensors by their names in the file.
        source: Path or name of the adapter, for messages.

    Raises:
        SliderEditError: A tensor is not plain LoRA, an alpha belongs to no module, or there are several adapters.
    """
    halves: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, float] = {}
    other, twice, ignored, adapters = [], [], set(), set()
    for key, tensor in state.items():
        match, alpha = _KEY.match(_modern(key)), _ALPHA.match(key)
        if _TEXT_ENCODER.match(key):
            ignored.add(next((found["module"] for found in (match, alpha) if found), key))
        elif match:
            parts = halves.setdefault(_module(match["module"]), {})
            if _PARTS[match["part"]] in parts:
                twice.append(key)
            parts[_PARTS[match["part"]]] = tensor
            adapters.add(match["adapter"])
        elif alpha and tensor.numel() == 1:
            module, value = _module(alpha["module"]), float(tensor)
            if alphas.setdefault(module, value) != value:
                raise SliderEditError(
                    f"adapter {str(source)!r} stores the alphas {alphas[module]:g} and {value:g} for {module}; "
                    "save it again with the right one"
                )
        # Some trainers store all-zero differences of norms and biases.
        elif not (key.endswith((".diff", ".diff_b")) and not tensor.any()):
            other.append(key)
    if not halves and ignored:
        raise SliderEditError(
            f"adapter {str(source)!r} updates no linear that sliders can scale, only a text encoder "
            f"(first module: {min(ignored)}); use an adapter for the transformer"
        )
    if not halves:
        raise SliderEditError(f"adapter {str(source)!r} has no lora_A/lora_B weights; use a LoRA file")
    if other:
        raise SliderEditError(
            f"adapter {str(source)!r} contains {min(other)}, which is not a lora_A, lora_B or alpha; "
            "sliders can scale plain LoRA only, not DoRA, biases or full weights"
        )
    if len(adapters) > 1:
        raise SliderEditError(f"adapter {str(source)!r} contains {len(adapters)} adapters; save the one to use by itself")
    if twice:
        raise SliderEditError(
            f"adapter {str(source)!r} contains {twice[0]} a second time under another name; save it again without one of them"
        )
    if lost := sorted(alphas.keys() - halves.keys()):
        raise SliderEditError(
            f"adapter {str(source)!r} stores an alpha for {lost[0]}, but no lora_A and lora_B of that name, so the scale of "
            "some linear is unknown; save or download it again"
        )
    return Layout(halves, alphas, tuple(sorted(ignored)))


def _modern(key: str) -> str:
    """Convert a key of diffusers' attention processors or its `lora.down` to PEFT's form; return others unchanged."""
    (name,) = convert_unet_state_dict_to_peft({key: None})
    return name if re.search(r"\.lora_[AB]\b", name) else key


def _module(name: str) -> str:
    """Return a module's name without prefixes. Restore the dots in flat names of linears that sliders can scale."""
    name = _PREFIX.sub("", name)
    flat = _FLAT.sub("", name)
    if flat == name:
        return name
    for family in FAMILIES.values():
        # Each dot becomes a group, so that the match gives its position in the flat name.
        pattern = family.targets("gst", all_projections=True).pattern.replace(r"\.", "(_)")
        if match := re.fullmatch(pattern, flat):
            dots = {match.start(group) for group, text in enumerate(match.groups(), 1) if text == "_"}
            return "".join("." if i in dots else letter for i, letter in enumerate(flat))
    return name


def with_diffusers_names(
    pairs: Mapping[str, Pair], family: Family | None, source: str | Path
) -> tuple[dict[str, Pair], Family | None]:
    """Rename modules to diffusers' names with diffusers' own converters, which also split fused projections.

    Args:
        pairs: A and B by module, under the file's own names.
        family: Family of the base, which decides if the names fit several families; None if it is not known.
        source: Path or name of the adapter, for messages.

    Returns:
        The renamed pairs, and the family whose converter was used; None if the names were already diffusers'.

    Raises:
        SliderEditError: No family's converter knows the names, they are another family's, they fit several families and none
            was given, or two names stand for one linear.
    """
    foreign = {name: pair for name, pair in pairs.items() if _FOREIGN.match(name)}
    if not foreign:
        return dict(pairs), None
    family, converted = _best_conversion(foreign, family, source)
    named = {name: pair for name, pair in pairs.items() if name not in foreign}
    for name, pair in converted:
        if name in named:
            raise SliderEditError(f"adapter {str(source)!r} updates {name} twice; save the one to use by itself")
        named[name] = pair
    return named, family


def _best_conversion(
    foreign: Mapping[str, Pair], family: Family | None, source: str | Path
) -> tuple[Family, list[tuple[str, Pair]]]:
    """Return the family whose converter gives the most linears that its sliders can scale, and what it gives."""
    attempts = []
    reason: Exception | None = None
    for candidate in families_by_name(family).values():
        try:
            # Converters of other families warn about names that they do not know.
            with quiet_libraries():
                converted = [item for name, pair in foreign.items() for item in _convert(candidate, name, pair)]
        except Exception as error:  # diffusers raises various exceptions for names and sizes that it does not know
            reason = error
        else:
            attempts.append((sum(candidate.rows_of(name) is not None for name, _ in converted), candidate, converted))
    if not attempts:
        raise SliderEditError(
            f"adapter {str(source)!r} has module names or sizes that diffusers cannot convert "
            f"(first module: {min(foreign)}: {type(reason).__name__}); use a LoRA for {' or '.join(FAMILIES)}"
        )
    most = max(count for count, _, _ in attempts)
    best = {candidate.name: (candidate, converted) for count, candidate, converted in attempts if count == most}
    # Feed-forward linears of different families may share a name in the file, but not their proportions.
    best = {name: attempt for name, attempt in best.items() if _has_proportions(*attempt)} or best
    if family is not None and family.name in best:
        return best[family.name]
    if family is not None:
        raise SliderEditError(
            f"adapter {str(source)!r} is for {' or '.join(best)}, not for {family.name}, by the names and sizes of its "
            f"linears; use it with a {' or '.join(best)} base"
        )
    if len(best) > 1:
        raise fits_several(best, source)
    return next(iter(best.values()))


def _has_proportions(family: Family, pairs: Sequence[tuple[str, Pair]]) -> bool:
    return all(family.has_proportions(name, a.shape[1], b.shape[0]) for name, (a, b) in pairs)


def fits_several(names: Collection[str], source: str | Path) -> SliderEditError:
    """Make the error for an adapter whose linears exist in several families."""
    *first, last = names
    return SliderEditError(f"adapter {str(source)!r} fits {', '.join(first)} and {last}; choose one with --base")


def _convert(family: Family, name: str, pair: Pair) -> list[tuple[str, Pair]]:
    """Convert a single module with diffusers' converter for `family`. One at a time, so that none is dropped silently.

    The scale is already in B, but some layouts require an alpha and others refuse it.
    """
    a, b = pair
    if ".processor." in name:
        return _converted(family, name, {f"{name}.down.weight": a, f"{name}.up.weight": b})
    flat = _FLAT.match(name)
    full, alpha = name if flat else f"diffusion_model.{name}", torch.tensor(float(len(a)))
    try:
        state = {f"{full}.lora_down.weight": a, f"{full}.lora_up.weight": b, f"{full}.alpha": alpha}
        return _converted(family, name, state)
    except Exception:  # see `_best_conversion`
        if flat:
            raise
        return _converted(family, name, {f"{full}.lora_A.weight": a, f"{full}.lora_B.weight": b})


def _converted(family: Family, name: str, state: dict[str, Tensor]) -> list[tuple[str, Pair]]:
    """Convert the tensors of one module, and check that they became complete pairs."""
    loader = getattr(diffusers, family.pipeline_classes[0])
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in loader.lora_state_dict(state).items():
        match = _KEY.match(_PREFIX.sub("", key))
        if match is None or _FOREIGN.match(match["module"]):
            raise ValueError(f"{name} became {key}")
        halves.setdefault(match["module"], {})[match["part"]] = tensor
    if not halves:
        raise ValueError(f"{name} became nothing")
    return [(module, (parts["A"].contiguous(), parts["B"].contiguous())) for module, parts in halves.items()]
