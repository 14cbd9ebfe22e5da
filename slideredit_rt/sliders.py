"""Sliders: instructions with strengths, and their conversion to the engine's `alpha` and `token_mask`."""

from __future__ import annotations

import bisect
import itertools
import math
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from slideredit_rt.errors import SliderEditError

if TYPE_CHECKING:
    from torch import Tensor

JOINER = " and "


def normalise(text: str) -> str:
    """Normalise text to Unicode NFC, so that composed and decomposed accents are equal for tokenizers and span search.

    Raises:
        SliderEditError: the text contains a lone surrogate, which Python makes from bytes that are not UTF-8.
    """
    if broken := next((character for character in text if unicodedata.category(character) == "Cs"), None):
        raise SliderEditError(f"the text {text!r} contains {broken!r}, which is not a character; encode it in UTF-8")
    return unicodedata.normalize("NFC", text)


@dataclass(frozen=True)
class Slider:
    """One instruction and its strength.

    Attributes:
        instruction: text of the instruction, as it occurs in the prompt.
        strength: 0 suppresses the instruction, 1 is the base model's edit, above 1 exaggerates. In a bank, the effect is the
            one that the member was trained for.
        adapter: name of the member to scale in an engine with several adapters; None takes the member named after the
            instruction.

    Raises:
        SliderEditError: the instruction is empty, or the strength is not finite.
    """

    instruction: str
    strength: float = 1.0
    adapter: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "instruction", normalise(self.instruction).strip())
        if not self.instruction:
            raise SliderEditError("a slider has an empty instruction; pass the words of the prompt that it scales")
        check_strength(self.instruction, self.strength)


def check_strength(instruction: str, strength: float) -> None:
    """Raise a `SliderEditError` if the strength of the slider `instruction` is not finite."""
    if not math.isfinite(strength):
        raise SliderEditError(f"slider {instruction!r} has strength {strength}; pass a finite number, such as 0.5")


def linear_sweep(first: float, last: float, count: int) -> list[float]:
    """Return `count` evenly spaced strengths from `first` to `last`; `count` is at least 2."""
    return [first + (last - first) * i / (count - 1) for i in range(count)]


@dataclass(frozen=True)
class StrengthCurve:
    """Piecewise linear map from a slider's strength to the engine's alpha.

    Beyond its end points, it continues with the slope of the last segment. The default is the paper's `alpha = 1 − strength`;
    `slideredit-rt adapter calibrate` finds a curve along which edits change evenly.

    Attributes:
        strengths: two or more strengths in strictly ascending order.
        alphas: one alpha per strength, in ascending or descending order.

    Raises:
        SliderEditError: the numbers do not meet these conditions.
    """

    strengths: tuple[float, ...] = (0.0, 1.0)
    alphas: tuple[float, ...] = (1.0, 0.0)

    def __post_init__(self) -> None:
        rises = [b - a for a, b in itertools.pairwise(self.strengths)]
        steps = [b - a for a, b in itertools.pairwise(self.alphas)]
        if (
            len(self.strengths) < 2
            or len(self.strengths) != len(self.alphas)
            or not all(map(math.isfinite, (*self.strengths, *self.alphas)))
            or min(rises) <= 0
            or (min(steps) < 0 < max(steps))
        ):
            raise SliderEditError(
                f"strengths {list(self.strengths)} and alphas {list(self.alphas)} are not a strength curve; "
                "pass two or more ascending strengths and as many alphas in ascending or descending order"
            )

    def __call__(self, strength: float) -> float:
        """Return the alpha for a strength."""
        right = min(max(bisect.bisect_left(self.strengths, strength), 1), len(self.strengths) - 1)
        (x0, x1), (y0, y1) = self.strengths[right - 1 : right + 1], self.alphas[right - 1 : right + 1]
        return y0 + (y1 - y0) / (x1 - x0) * (strength - x0)

    def to_json(self) -> dict[str, list[float]]:
        return {"strengths": list(self.strengths), "alphas": list(self.alphas)}

    @classmethod
    def from_json(cls, data: Any) -> StrengthCurve:
        """Return the curve described by `to_json`; None returns the default.

        Raises:
            SliderEditError: the data does not describe a curve.
        """
        if data is None:
            return cls()
        try:
            return cls(tuple(map(float, data["strengths"])), tuple(map(float, data["alphas"])))
        except (KeyError, TypeError, ValueError) as error:
            raise SliderEditError(f"{data!r} is not a strength curve ({error}); calibrate the adapter again") from None


@dataclass(frozen=True)
class PromptToken:
    """One token of the prompt.

    Attributes:
        text: text of the token, for messages.
        start: index of its first character in the prompt.
        end: index after its last character; equal to `start` for tokens without characters (end of sequence, padding,
            template words).
        row: index of its text row.
    """

    text: str
    start: int
    end: int
    row: int


def compose_prompt(instructions: Sequence[str]) -> str:
    """Join instructions with " and ", as in the adapters' training prompts (paper, section on training data).

    Raises:
        SliderEditError: there is no instruction.
    """
    if not instructions:
        raise SliderEditError("no instruction was given; pass at least one slider or a prompt")
    return JOINER.join(normalise(i).strip() for i in instructions)


_JOINERS = "\u200c\u200d"  # zero width: non-joiners in Persian words, joiners in Indic words and emoji


def _extends(character: str) -> bool:
    """Return whether a character extends the previous one: a combining mark, a joiner or an emoji's skin tone."""
    return unicodedata.category(character)[0] == "M" or character in _JOINERS or "\U0001f3fb" <= character <= "\U0001f3ff"


def _one_word(left: str, right: str) -> bool:
    """Return whether two adjacent characters belong to one word, for scripts that separate words by spaces."""
    if _extends(right) or left in _JOINERS:
        return True
    return all((c.isalnum() or _extends(c)) and unicodedata.east_asian_width(c) not in ("W", "F") for c in (left, right))


def _occurrences(prompt: str, instruction: str) -> list[tuple[int, int]]:
    found, start = [], prompt.find(instruction)
    while start >= 0:
        end = start + len(instruction)
        # "make it red" must not match inside "make it reddish".
        opens = start == 0 or not _one_word(prompt[start - 1], instruction[0])
        closes = end == len(prompt) or not _one_word(instruction[-1], prompt[end])
        if opens and closes:
            found.append((start, end))
        start = prompt.find(instruction, end if opens and closes else start + 1)
    return found


def stands_in(prompt: str, instruction: str) -> bool:
    """Return whether `find_spans` finds an instruction in a prompt; both must be normalised."""
    return bool(instruction) and bool(_occurrences(prompt, instruction))


def find_spans(prompt: str, sliders: Sequence[Slider], tokens: Sequence[PromptToken], max_rows: int) -> list[list[int]]:
    """Find the text rows that each slider owns.

    A slider owns every token that contains a character of its instruction. The n-th slider with the same text takes the
    n-th occurrence in the prompt.

    Args:
        prompt: text that was tokenised.
        sliders: K sliders.
        tokens: untruncated tokens of `prompt`.
        max_rows: number of text rows that the backbone reads (the last one is for the end of sequence).

    Returns:
        K non-empty lists of row indices.

    Raises:
        SliderEditError: an instruction is not in the prompt, two of them share a token, or one is cut off by truncation.
    """
    seen: Counter[str] = Counter()
    owner: dict[int, int] = {}
    spans: list[list[int]] = []
    for index, slider in enumerate(sliders):
        occurrences, nth = _occurrences(prompt, slider.instruction), seen[slider.instruction]
        seen[slider.instruction] += 1
        if nth >= len(occurrences):
            shown = " ".join(t.text for t in tokens if t.end > t.start)
            how = f"{len(occurrences)} time(s), but {nth + 1} sliders ask for it" if occurrences else "nowhere"
            raise SliderEditError(
                f"slider {slider.instruction!r} appears {how} in the prompt {prompt!r} (tokens: {shown}); "
                "write the instruction exactly as in the prompt"
            )
        start, end = occurrences[nth]
        rows = [t.row for t in tokens if t.end > start and t.start < end and t.end > t.start]
        if not rows:
            raise SliderEditError(
                f"no token of the prompt contains the slider {slider.instruction!r}; use letters or digits in it"
            )
        # The tokenizer keeps the last row for its end-of-sequence token.
        if max(rows) >= max_rows - 1:
            raise SliderEditError(
                f"slider {slider.instruction!r} is cut off at the end of the prompt: it needs text row {max(rows)}, but only "
                f"{max_rows - 1} rows are available; shorten the prompt or raise the maximum sequence length"
            )
        for row in rows:
            if row in owner:
                raise SliderEditError(
                    f"sliders {sliders[owner[row]].instruction!r} and {slider.instruction!r} overlap on token "
                    f"{next(t.text for t in tokens if t.row == row)!r}, but a token can belong to one slider only; "
                    "reword the prompt so that they do not touch"
                )
            owner[row] = index
        spans.append(rows)
    return spans


@dataclass(frozen=True)
class Controls:
    """Effect of an engine's sliders.

    Attributes:
        kind: kind of the adapter, `st` or `gst`.
        curve: curve of a single adapter from strength to alpha.
        members: curve of each adapter of a bank, by name, in the order of the last axis of `alpha`; empty without a bank.
    """

    kind: str
    curve: StrengthCurve = StrengthCurve()
    members: Mapping[str, StrengthCurve] = field(default_factory=dict)

    def members_of(self, sliders: Sequence[Slider]) -> tuple[str, ...]:
        """Return the bank's adapter that each slider scales; () without a bank.

        Raises:
            SliderEditError: a slider names an adapter that the engine does not have, or none although it has several, or two
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
        if self.kind == "gst" and len(set(members)) < len(members):
            twice = next(m for m in members if members.count(m) > 1)
            raise SliderEditError(f"two sliders scale the adapter {twice!r}, which scales every row; pass one slider for it")
        return members

    def spoken(self, sliders: Sequence[Slider]) -> list[bool]:
        """Return whether each slider's words are in the prompt: all except GST sliders that are named after their adapter."""
        return [self.kind == "st" or not self.members or s.adapter is not None for s in sliders]

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

    def by_member(self, alpha: Tensor, members: Sequence[str]) -> Tensor:
        """Expand alphas `[N, K]` of sliders that scale these members to `[N, K, G]`; without a bank, return them unchanged."""
        if not members:
            return alpha
        columns = [list(self.members).index(name) for name in members]
        wide = alpha.new_zeros(*alpha.shape, len(self.members))
        wide[:, range(len(columns)), columns] = alpha
        return wide


def row_mask(spans: Sequence[Sequence[int]], rows: int) -> Tensor:
    """Return the rows that each slider owns as a mask, bool `[K, rows]`.

    Raises:
        SliderEditError: a span is empty, so its slider would silently have no effect.
    """
    # Imported here, because the command's help and argument errors would otherwise wait for it for seconds.
    import torch

    mask = torch.zeros(len(spans), rows, dtype=torch.bool)
    for index, span in enumerate(spans):
        if not span:
            raise SliderEditError(f"slider {index} owns no row, so it would have no effect; pass a non-empty span")
        mask[index, list(span)] = True
    return mask


def combine_row_scale(alpha: Tensor, token_mask: Tensor) -> Tensor:
    """Compute `row_scale[b, s] = Σ_k alpha[b, k] · token_mask[b, k, s]`, for a bank separately for each member.

    An alpha of 0 gives exactly 0, and K may be 0.

    Args:
        alpha: float32 `[B, K]`, for a bank `[B, K, G]`.
        token_mask: bool `[B, K, S]`.

    Returns:
        Float32 `[B, S]`, for a bank `[B, S, G]`.
    """
    mask = token_mask.to(alpha.dtype)
    # Use products and a sum instead of a matrix product, whose factors a GPU may round to 10 bits (TF32).
    return (alpha.unsqueeze(2) * (mask.unsqueeze(-1) if alpha.ndim == 3 else mask)).sum(dim=1)
