"""How trainers name a LoRA's tensors: every layout that diffusers reads, brought to diffusers' names of the linears."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
from torch import Tensor

from slideredit_rt.errors import SliderEditError
from slideredit_rt.families import FAMILIES, Family

Pair = tuple[Tensor, Tensor]

_PREFIX = re.compile(r"^(transformer\.|base_model\.model\.|diffusion_model\.)+")
_ADAPTER = r"(\.(?P<adapter>[\w-]+))?"
# XLabs' modules end in _lora, _lora1 and _lora2.
_KEY = re.compile(rf"^(?P<module>.+?)(\.lora_|(?<=_lora|lora[12])\.)(?P<part>A|B|down|up){_ADAPTER}\.weight$")
_ALPHA = re.compile(rf"^(?P<module>.+?)(\.lora_(A|B|down|up){_ADAPTER}(\.weight)?)?\.alpha$")
_PARTS = {"A": "A", "down": "A", "B": "B", "up": "B"}
_TEXT_ENCODER = re.compile(r"^(base_model\.model\.)?(lora_te\d?_|te\d?\.|text_encoders?(_\d)?\.|text_model\.)")
_FLAT = re.compile(r"^(lora_unet|lora_transformer|lycoris)_")
# Names of kohya's and Black Forest Labs' making, with and without dots.
_FOREIGN = re.compile(rf"{_FLAT.pattern}|^(double|single)_blocks\.")


@dataclass(frozen=True)
class Layout:
    """A state dictionary's LoRA, module by module, under the file's own names or diffusers', where these are the same.

    Attributes:
        halves: `A` and `B` of each module.
        alphas: stored beside them.
        ignored: linears of the text encoders, which no engine changes.
    """

    halves: dict[str, dict[str, Tensor]]
    alphas: dict[str, float]
    ignored: tuple[str, ...]


def read_layout(state: Mapping[str, Tensor], source: str | Path) -> Layout:
    """Sort a state dictionary's tensors.

    Raises:
        SliderEditError: tensors that are not plain LoRA, an alpha that belongs to no module, or several adapters.
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
        # Some trainers write differences of norms and biases that are zero.
        elif not (key.endswith((".diff", ".diff_b")) and not tensor.any()):
            other.append(key)
    if not halves and ignored:
        raise SliderEditError(
            f"adapter {str(source)!r} updates no linear that a slider may touch, only a text encoder's "
            f"(its first is {min(ignored)}); give an adapter of the transformer"
        )
    if not halves:
        raise SliderEditError(f"adapter {str(source)!r} holds no lora_A/lora_B weights; give a LoRA file")
    if other:
        raise SliderEditError(
            f"adapter {str(source)!r} holds {min(other)}, which is no lora_A, lora_B or alpha; "
            "only plain LoRA can be scaled by a slider, not DoRA, biases or whole weights"
        )
    if len(adapters) > 1:
        raise SliderEditError(f"adapter {str(source)!r} holds {len(adapters)} adapters; save the one to use by itself")
    if twice:
        raise SliderEditError(f"adapter {str(source)!r} holds {twice[0]} under another name, too; save it again without one")
    if lost := sorted(alphas.keys() - halves.keys()):
        raise SliderEditError(
            f"adapter {str(source)!r} stores an alpha for {lost[0]} and no lora_A and lora_B under that name, so the scale of "
            "some linear would be lost; save or download it again"
        )
    return Layout(halves, alphas, tuple(sorted(ignored)))


def _modern(key: str) -> str:
    """The key as PEFT writes it, of diffusers' attention processors and its `lora.down`; others as they are."""
    (name,) = convert_unet_state_dict_to_peft({key: None})
    return name if re.search(r"\.lora_[AB]\b", name) else key


def _module(name: str) -> str:
    """A module's name without prefixes; with dots, where it is a linear that sliders may touch and was written without."""
    name = _PREFIX.sub("", name)
    flat = _FLAT.sub("", name)
    if flat == name:
        return name
    for family in FAMILIES.values():
        # Each dot becomes a group, whose place in the flat name is then known.
        pattern = family.targets("gst", all_projections=True).pattern.replace(r"\.", "(_)")
        if match := re.fullmatch(pattern, flat):
            dots = {match.start(group) for group, text in enumerate(match.groups(), 1) if text == "_"}
            return "".join("." if i in dots else letter for i, letter in enumerate(flat))
    return name


def with_diffusers_names(pairs: Mapping[str, Pair], source: str | Path) -> tuple[dict[str, Pair], Family | None]:
    """Pairs under diffusers' names, and the family that the file's own names belong to; None if they are diffusers'.

    Fused projections become several, as diffusers splits them.

    Raises:
        SliderEditError: names that no family's converter knows, or two for one linear.
    """
    foreign = {name: pair for name, pair in pairs.items() if _FOREIGN.match(name)}
    if not foreign:
        return dict(pairs), None
    attempts = []
    reason: Exception | None = None
    for family in FAMILIES.values():
        try:
            attempts.append((family, [item for name, pair in foreign.items() for item in _convert(family, name, pair)]))
        except Exception as error:  # diffusers says by any exception that it does not know a name or a size
            reason = error
    if not attempts:
        raise SliderEditError(
            f"adapter {str(source)!r} names linears in a way that diffusers cannot read, or has other sizes than these have "
            f"(its first is {min(foreign)}: {type(reason).__name__}); give a LoRA for {' or '.join(FAMILIES)}"
        )
    family, converted = max(attempts, key=lambda attempt: sum(attempt[0].rows_of(name) is not None for name, _ in attempt[1]))
    named = {name: pair for name, pair in pairs.items() if name not in foreign}
    for name, pair in converted:
        if name in named:
            raise SliderEditError(f"adapter {str(source)!r} updates {name} twice; save the one to use by itself")
        named[name] = pair
    return named, family


def _convert(family: Family, name: str, pair: Pair) -> list[tuple[str, Pair]]:
    """One module by diffusers' converter for `family`: alone, so that nothing can be left out without a word."""
    loader = getattr(diffusers, family.pipeline_classes[0])
    if ".processor." in name:
        state = {f"{name}.down.weight": pair[0], f"{name}.up.weight": pair[1]}
    else:
        name = name if _FLAT.match(name) else f"diffusion_model.{name}"
        # The scale is in B already; some layouts must have an alpha.
        alpha = torch.tensor(float(len(pair[0])))
        state = {f"{name}.lora_down.weight": pair[0], f"{name}.lora_up.weight": pair[1], f"{name}.alpha": alpha}
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in loader.lora_state_dict(state).items():
        match = _KEY.match(_PREFIX.sub("", key))
        if match is None:
            raise ValueError(f"{name} became {key}")
        halves.setdefault(match["module"], {})[match["part"]] = tensor
    if not halves:
        raise ValueError(f"{name} became nothing")
    return [(module, (parts["A"].contiguous(), parts["B"].contiguous())) for module, parts in halves.items()]
