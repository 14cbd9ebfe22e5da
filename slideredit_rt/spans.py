"""Spans: instructions found in the tokenised prompt, as the text rows that they own, token masks and row scales."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from slideredit_rt.errors import SliderEditError

if TYPE_CHECKING:
    from torch import Tensor

    from slideredit_rt.sliders import Slider


def normalise(text: str) -> str:
    """Normalise text to Unicode NFC, so that composed and decomposed accents are equal for tokenizers and span search.

    Raises:
        SliderEditError: The text contains a lone surrogate, which Python makes from bytes that are not UTF-8.
    """
    if broken := next((character for character in text if unicodedata.category(character) == "Cs"), None):
        raise SliderEditError(f"the text {text!r} contains {broken!r}, which is not a character; encode it in UTF-8")
    return unicodedata.normalize("NFC", text)


@dataclass(frozen=True)
class PromptToken:
    """One token of the prompt.

    Attributes:
        text: Text of the token, for messages.
        start: Index of its first character in the prompt.
        end: Index after its last character; equal to `start` for tokens without characters (end of sequence, padding,
            template words).
        row: Index of its text row.
    """

    text: str
    start: int
    end: int
    row: int


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
        prompt: Text that was tokenised.
        sliders: K sliders.
        tokens: Untruncated tokens of `prompt`.
        max_rows: Number of text rows that the backbone reads (the last one is for the end of sequence).

    Returns:
        K non-empty lists of row indices.

    Raises:
        SliderEditError: An instruction is not in the prompt, two of them share a token, or one is cut off by truncation.
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


def row_mask(spans: Sequence[Sequence[int]], rows: int) -> Tensor:
    """Return the rows that each slider owns as a mask, bool `[K, rows]`.

    Raises:
        SliderEditError: A span is empty, so its slider would silently have no effect.
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
        token_mask: Bool `[B, K, S]`.

    Returns:
        Float32 `[B, S]`, for a bank `[B, S, G]`.
    """
    mask = token_mask.to(alpha.dtype)
    # Use products and a sum instead of a matrix product, whose factors a GPU may round to 10 bits (TF32).
    return (alpha.unsqueeze(2) * (mask.unsqueeze(-1) if alpha.ndim == 3 else mask)).sum(dim=1)
