"""Sliders: an instruction with a strength, found in the tokenised prompt and turned into `alpha` and `token_mask`."""

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
    """Unicode NFC, so that a composed and a decomposed accent are the same text to tokenizers and to span search.

    Raises:
        SliderEditError: half of a surrogate pair: what Python makes of bytes that are not UTF-8, and no tokenizer takes.
    """
    if broken := next((character for character in text if unicodedata.category(character) == "Cs"), None):
        raise SliderEditError(f"the text {text!r} holds {broken!r}, which is not a character; write it in UTF-8")
    return unicodedata.normalize("NFC", text)


@dataclass(frozen=True)
class Slider:
    """One instruction and its strength: 0 suppressed, 1 as the base model edits, above 1 exaggerated.

    `adapter` names the member that it scales where several adapters share an engine. What a strength does there is what that
    member was trained to do. Without it, the member is the one that is called like the instruction.
    """

    instruction: str
    strength: float = 1.0
    adapter: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "instruction", normalise(self.instruction).strip())
        if not self.instruction:
            raise SliderEditError("a slider has an empty instruction; give it the words of the prompt that it scales")
        check_strength(self.instruction, self.strength)


def check_strength(instruction: str, strength: float) -> None:
    """Refuse a strength of the slider `instruction` that is not a finite number."""
    if not math.isfinite(strength):
        raise SliderEditError(f"slider {instruction!r} has strength {strength}; give a finite number, such as 0.5")


def linear_sweep(first: float, last: float, count: int) -> list[float]:
    """Return `count` evenly spaced settings, 2 or more, from `first` to `last`."""
    return [first + (last - first) * i / (count - 1) for i in range(count)]


@dataclass(frozen=True)
class StrengthCurve:
    """From the strength that people set to the alpha that engines take.

    Straight between its points and, beyond them, on as between the last two. The default is the paper's `alpha = 1 − strength`;
    `slideredit-rt adapter calibrate` finds one whose edits follow the strength evenly.

    Attributes:
        strengths: rising, two or more.
        alphas: one per strength, never turning back.

    Raises:
        SliderEditError: numbers that are no such curve.
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
                f"strengths {list(self.strengths)} and alphas {list(self.alphas)} are no strength curve; "
                "give two or more rising strengths and as many alphas that rise or fall throughout"
            )

    def __call__(self, strength: float) -> float:
        """The alpha for a strength."""
        right = min(max(bisect.bisect_left(self.strengths, strength), 1), len(self.strengths) - 1)
        (x0, x1), (y0, y1) = self.strengths[right - 1 : right + 1], self.alphas[right - 1 : right + 1]
        return y0 + (y1 - y0) / (x1 - x0) * (strength - x0)

    def to_json(self) -> dict[str, list[float]]:
        return {"strengths": list(self.strengths), "alphas": list(self.alphas)}

    @classmethod
    def from_json(cls, data: Any) -> StrengthCurve:
        """The curve that `to_json` described; None gives the default.

        Raises:
            SliderEditError: not such a description.
        """
        if data is None:
            return cls()
        try:
            return cls(tuple(map(float, data["strengths"])), tuple(map(float, data["alphas"])))
        except (KeyError, TypeError, ValueError) as error:
            raise SliderEditError(f"{data!r} is no strength curve ({error}); calibrate the adapter again") from None


@dataclass(frozen=True)
class PromptToken:
    """One token of the prompt. `start`, `end`: its characters in the prompt; `row`: its index on the text rows.

    Tokens that stand for no characters (end of sequence, padding, template words) have `start == end`.
    """

    text: str
    start: int
    end: int
    row: int


def compose_prompt(instructions: Sequence[str]) -> str:
    """The instructions joined by " and ", as the adapters were trained (paper, section on training data)."""
    if not instructions:
        raise SliderEditError("no instruction was given; name at least one slider or a prompt")
    return JOINER.join(normalise(i).strip() for i in instructions)


_JOINERS = "\u200c\u200d"  # zero width: non-joiners within Persian words, joiners within Indic words and emoji


def _extends(character: str) -> bool:
    """Whether a character belongs to the one before it: a combining mark, a joiner or the skin tone of an emoji."""
    return unicodedata.category(character)[0] == "M" or character in _JOINERS or "\U0001f3fb" <= character <= "\U0001f3ff"


def _one_word(left: str, right: str) -> bool:
    """Whether two neighbouring characters belong to one word, as far as spaces separate the words of their script."""
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
    """Whether `find_spans` finds an instruction in a prompt; both normalised."""
    return bool(instruction) and bool(_occurrences(prompt, instruction))


def find_spans(prompt: str, sliders: Sequence[Slider], tokens: Sequence[PromptToken], max_rows: int) -> list[list[int]]:
    """The text rows that each slider owns.

    A slider owns every token that holds a character of its instruction. The n-th slider with the same text takes the
    n-th occurrence in the prompt.

    Args:
        prompt: the text that was tokenised.
        sliders: K sliders.
        tokens: the untruncated tokens of `prompt`.
        max_rows: how many text rows the backbone sees (the last one is the end of sequence).

    Returns:
        K lists of row indices, none of them empty.

    Raises:
        SliderEditError: an instruction is not in the prompt, two share a token, or one was cut off by truncation.
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
                "write the instruction exactly as it stands in the prompt"
            )
        start, end = occurrences[nth]
        rows = [t.row for t in tokens if t.end > start and t.start < end and t.end > t.start]
        if not rows:
            raise SliderEditError(
                f"no token of the prompt holds the slider {slider.instruction!r}; use letters or digits in it"
            )
        # The tokenizer keeps the last row for its end-of-sequence token.
        if max(rows) >= max_rows - 1:
            raise SliderEditError(
                f"slider {slider.instruction!r} falls off the end of the prompt: it needs text row {max(rows)} and only "
                f"{max_rows - 1} rows carry text; shorten the prompt or raise the maximum sequence length"
            )
        for row in rows:
            if row in owner:
                raise SliderEditError(
                    f"sliders {sliders[owner[row]].instruction!r} and {slider.instruction!r} overlap on token "
                    f"{next(t.text for t in tokens if t.row == row)!r}; a token can belong to one slider only"
                )
            owner[row] = index
        spans.append(rows)
    return spans


@dataclass(frozen=True)
class Controls:
    """What the sliders of an engine do.

    Attributes:
        kind: of its adapter, `st` or `gst`.
        curve: from strength to alpha, as the adapter brought it.
        members: the same for each adapter of a bank, by name, in the order of the last axis of `alpha`; empty without a bank.
    """

    kind: str
    curve: StrengthCurve = StrengthCurve()
    members: Mapping[str, StrengthCurve] = field(default_factory=dict)

    def members_of(self, sliders: Sequence[Slider]) -> tuple[str, ...]:
        """The bank's adapter that each slider scales; () without a bank.

        Raises:
            SliderEditError: a slider that names an adapter where there is none, or none where there are several; two sliders
                that would scale every row with the same adapter.
        """
        if not self.members:
            if named := next((s for s in sliders if s.adapter is not None), None):
                raise SliderEditError(
                    f"slider {named.instruction!r} names the adapter {named.adapter!r} and this engine has a single one, "
                    "without a name; leave the name out, or build the engine with several adapters"
                )
            if self.kind == "gst" and len(sliders) > 1:
                raise SliderEditError(
                    f"a GST adapter scales the whole prompt with one slider, got {len(sliders)}; use an ST engine for several"
                )
            return ()
        members = tuple(s.instruction if s.adapter is None else s.adapter for s in sliders)
        names = ", ".join(map(repr, self.members))
        for slider, member in zip(sliders, members, strict=True):
            if member not in self.members:
                fault = "says no adapter" if slider.adapter is None else f"names the adapter {slider.adapter!r}, unknown here"
                raise SliderEditError(f"slider {slider.instruction!r} {fault}; this engine has {names}")
        if self.kind == "gst" and len(set(members)) < len(members):
            twice = next(m for m in members if members.count(m) > 1)
            raise SliderEditError(f"two sliders scale the adapter {twice!r}, which scales every row; give one slider for it")
        return members

    def spoken(self, sliders: Sequence[Slider]) -> list[bool]:
        """Whether each slider's words stand in the prompt: not where a slider of a GST bank is called like its adapter."""
        return [self.kind == "st" or not self.members or s.adapter is not None for s in sliders]

    def find_spans(
        self, prompt: str, sliders: Sequence[Slider], tokens: Sequence[PromptToken], max_rows: int
    ) -> list[list[int]]:
        """As the function `find_spans`, for the sliders that are `spoken`; no rows for the others."""
        spoken = self.spoken(sliders)
        found = iter(find_spans(prompt, [s for s, stands in zip(sliders, spoken, strict=True) if stands], tokens, max_rows))
        return [next(found) if stands else [] for stands in spoken]

    def curves_of(self, members: Sequence[str], count: int) -> list[StrengthCurve]:
        """The curve of each of `count` sliders, which scale these members of a bank."""
        return [self.members[name] for name in members] or [self.curve] * count

    def by_member(self, alpha: Tensor, members: Sequence[str]) -> Tensor:
        """Alphas `[N, K]` of sliders that scale these members as an engine takes them: `[N, K, G]`; as given without a bank."""
        if not members:
            return alpha
        columns = [list(self.members).index(name) for name in members]
        wide = alpha.new_zeros(*alpha.shape, len(self.members))
        wide[:, range(len(columns)), columns] = alpha
        return wide


def row_mask(spans: Sequence[Sequence[int]], rows: int) -> Tensor:
    """Bool `[K, rows]`: which rows each slider owns. Refuses an empty span, which would be a silent no-op."""
    # Here and not above: the command's help and its complaints about arguments would wait seconds for it.
    import torch

    mask = torch.zeros(len(spans), rows, dtype=torch.bool)
    for index, span in enumerate(spans):
        if not span:
            raise SliderEditError(f"slider {index} owns no row; its mask would do nothing")
        mask[index, list(span)] = True
    return mask


def combine_row_scale(alpha: Tensor, token_mask: Tensor) -> Tensor:
    """`row_scale[b, s] = Σ_k alpha[b, k] · token_mask[b, k, s]`; float32 `[B, K]` and bool `[B, K, S]` to float32 `[B, S]`.

    For a bank, every member g by itself: alpha `[B, K, G]` to `[B, S, G]`. An alpha of 0 is exact, and K may be 0.
    """
    mask = token_mask.to(alpha.dtype)
    # Products and a sum, not a matrix product: a GPU would round its factors to 10 bits.
    return (alpha.unsqueeze(2) * (mask.unsqueeze(-1) if alpha.ndim == 3 else mask)).sum(dim=1)
