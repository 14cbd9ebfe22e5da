"""Sliders: an instruction with a strength, the prompt composed of several, and what they do in an engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from slideredit_rt.errors import SliderEditError
from slideredit_rt.spans import PromptToken, find_spans, normalise
from slideredit_rt.strength import Strength, StrengthCurve, check_strength, strength_at

if TYPE_CHECKING:
    from torch import Tensor

JOINER = " and "


@dataclass(frozen=True)
class Slider:
    """One instruction and its strength.

    Attributes:
        instruction: Text of the instruction, as it occurs in the prompt.
        strength: 0 suppresses the instruction, 1 is the base model's edit, above 1 exaggerates. In a bank, the effect is the
            one that the member was trained for. A `StrengthSchedule` changes it over the run.
        adapter: Name of the member to scale in an engine with several adapters; None takes the member named after the
            instruction.

    Raises:
        SliderEditError: The instruction is empty, or the strength is not finite.
    """

    instruction: str
    strength: Strength = 1.0
    adapter: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "instruction", normalise(self.instruction).strip())
        if not self.instruction:
            raise SliderEditError("a slider has an empty instruction; pass the words of the prompt that it scales")
        check_strength(self.instruction, self.strength)


def compose_prompt(instructions: Sequence[str]) -> str:
    """Join instructions with " and ", as in the adapters' training prompts (paper, section on training data).

    Raises:
        SliderEditError: There is no instruction.
    """
    if not instructions:
        raise SliderEditError("no instruction was given; pass at least one slider or a prompt")
    return JOINER.join(normalise(i).strip() for i in instructions)


@dataclass(frozen=True)
class Controls:
    """Effect of an engine's sliders.

    Attributes:
        kind: Kind of the adapter, `st` or `gst`; `gst` for a bank with members of both kinds.
        curve: Curve of a single adapter from strength to alpha.
        members: Curve of each adapter of a bank, by name, in the order of the last axis of `alpha`; empty without a bank.
        kinds: Kind of members, by name; those that are not listed have the bank's.
    """

    kind: str
    curve: StrengthCurve = field(default_factory=StrengthCurve)
    members: Mapping[str, StrengthCurve] = field(default_factory=dict)
    kinds: Mapping[str, str] = field(default_factory=dict)

    def kinds_of(self, members: Sequence[str], count: int) -> list[str]:
        """Return the kind of each of `count` sliders, which scale these members of a bank."""
        return [self.kinds.get(name, self.kind) for name in members] or [self.kind] * count

    def members_of(self, sliders: Sequence[Slider]) -> tuple[str, ...]:
        """Return the bank's adapter that each slider scales; () without a bank.

        Raises:
            SliderEditError: A slider names an adapter that the engine does not have, or none although it has several, or two
                sliders scale the same GST adapter.
        """
        if not self.members:
            if named := next((s for s in sliders if s.adapter is not None), None):
                raise SliderEditError(
                    f"slider {named.instruction!r} names the adapter {named.adapter!r}, but this engine has a single one "
                    "without a name; remove the name, or build the engine with several adapters"
                )
            if self.kind == "gst" and len(sliders) > 1:
                raise SliderEditError(
                    f"a GST adapter scales the whole prompt with one slider, got {len(sliders)}; use an ST adapter for several"
                )
            return ()
        members = tuple(s.instruction if s.adapter is None else s.adapter for s in sliders)
        names = ", ".join(map(repr, self.members))
        for slider, member in zip(sliders, members, strict=True):
            if member not in self.members:
                fault = "names no adapter" if slider.adapter is None else f"names the unknown adapter {slider.adapter!r}"
                raise SliderEditError(f"slider {slider.instruction!r} {fault}; choose from {names}")
        scaling_all = [m for m, kind in zip(members, self.kinds_of(members, len(members)), strict=True) if kind == "gst"]
        if twice := next((m for m in scaling_all if scaling_all.count(m) > 1), None):
            raise SliderEditError(f"two sliders scale the adapter {twice!r}, which scales every row; pass one slider for it")
        return members

    def spoken(self, sliders: Sequence[Slider]) -> list[bool]:
        """Return whether each slider's words are in the prompt: all except GST sliders that are named after their adapter."""
        kinds = [self.kinds.get(s.instruction if s.adapter is None else s.adapter, self.kind) for s in sliders]
        named = [s.adapter is not None for s in sliders]
        return [kind == "st" or not self.members or name for kind, name in zip(kinds, named, strict=True)]

    def find_spans(
        self, prompt: str, sliders: Sequence[Slider], tokens: Sequence[PromptToken], max_rows: int
    ) -> list[list[int]]:
        """Find the text rows of the sliders that are `spoken` (see the function `find_spans`); the others have no rows."""
        spoken = self.spoken(sliders)
        found = iter(find_spans(prompt, [s for s, stands in zip(sliders, spoken, strict=True) if stands], tokens, max_rows))
        return [next(found) if stands else [] for stands in spoken]

    def curves_of(self, members: Sequence[str], count: int) -> list[StrengthCurve]:
        """Return the curve of each of `count` sliders, which scale these members of a bank."""
        return [self.members[name] for name in members] or [self.curve] * count

    def alphas(
        self,
        instructions: Sequence[str],
        members: Sequence[str],
        strengths: Sequence[Sequence[Strength]],
        fraction: float = 0.0,
    ) -> Tensor:
        """Convert N settings of K strengths to the engine's alphas.

        Args:
            instructions: Instruction of each of the K sliders.
            members: Member of a bank that each slider scales; empty without a bank.
            strengths: N settings of K strengths each.
            fraction: Fraction of the run, for strengths that are schedules.

        Returns:
            Float32 `[N, K]`, for a bank `[N, K, G]`.

        Raises:
            SliderEditError: There is no setting, a setting does not have K strengths, or a strength is not finite or its alpha
                exceeds float32.
        """
        import torch

        if not strengths or any(len(setting) != len(instructions) for setting in strengths):
            raise SliderEditError(
                f"expected one or more settings of {len(instructions)} strength(s) each, got {[list(s) for s in strengths]}"
            )
        for setting in strengths:
            for name, strength in zip(instructions, setting, strict=True):
                check_strength(name, strength)
        curves = self.curves_of(members, len(instructions))
        values = torch.tensor(
            [[curve(strength_at(s, fraction)) for curve, s in zip(curves, setting, strict=True)] for setting in strengths]
        )
        for row, k in (~values.isfinite()).nonzero().tolist():
            raise SliderEditError(
                f"slider {instructions[k]!r} has strength {strengths[row][k]:g}, which exceeds float32; "
                "pass a number such as 0.5"
            )
        return self.by_member(values, members)

    def by_member(self, alpha: Tensor, members: Sequence[str]) -> Tensor:
        """Expand alphas `[N, K]` of sliders that scale these members to `[N, K, G]`; without a bank, return them unchanged."""
        if not members:
            return alpha
        columns = [list(self.members).index(name) for name in members]
        wide = alpha.new_zeros(*alpha.shape, len(self.members))
        wide[:, range(len(columns)), columns] = alpha
        return wide
