"""Sliders: strengths, prompts, and which token rows an instruction owns."""

from __future__ import annotations

import os
import unicodedata
from typing import Any, ClassVar

import pytest
import torch

from slideredit_rt.assets import resolve_base
from slideredit_rt.errors import SliderEditError
from slideredit_rt.families import Family
from slideredit_rt.sliders import Controls, Slider, compose_prompt
from slideredit_rt.spans import PromptToken, combine_row_scale, find_spans, row_mask
from slideredit_rt.strength import StrengthCurve, linear_sweep


@pytest.fixture(scope="module")
def encoders(family: Family) -> Any:
    return family.load_pipeline(resolve_base("shapes-kontext"), transformer=False)


def owned(family: Family, encoders: Any, prompt: str, *instructions: str, max_rows: int = 64) -> list[str]:
    """The words of the rows that each slider owns, put together again."""
    tokens = family.tokenize(encoders, prompt)
    spans = find_spans(prompt, [Slider(i) for i in instructions], tokens, max_rows)
    text = {t.row: t.text for t in tokens}
    return ["".join(text[row] for row in span).replace("▁", " ").strip() for span in spans]


def test_a_sweep_is_evenly_spaced_with_both_ends() -> None:
    assert linear_sweep(0.0, 1.5, 4) == [0.0, 0.5, 1.0, 1.5]
    assert linear_sweep(1.0, -1.0, 5) == [1.0, 0.5, 0.0, -0.5, -1.0]
    assert linear_sweep(-0.5, 2.0, 2) == [-0.5, 2.0]


def test_alpha_is_one_minus_strength() -> None:
    assert [StrengthCurve()(s) for s in (0, 1, 1.5)] == [1, 0, -0.5]


def test_a_curve_is_straight_between_its_points_and_beyond_them() -> None:
    curve = StrengthCurve((0.0, 0.5, 1.0), (1.0, 0.2, 0.0))
    assert [curve(s) for s in (0.0, 0.25, 0.5, 0.75, 1.0)] == pytest.approx([1.0, 0.6, 0.2, 0.1, 0.0])
    assert [curve(s) for s in (-0.5, 1.5)] == pytest.approx([1.8, -0.2])
    assert StrengthCurve.from_json(curve.to_json()) == curve
    assert StrengthCurve.from_json(None) == StrengthCurve()


@pytest.mark.parametrize(
    ("strengths", "alphas"),
    [
        ((0.0,), (1.0,)),
        ((0.0, 1.0), (1.0, 0.5, 0.0)),
        ((0.0, 0.0), (1.0, 0.0)),
        ((0.0, 0.5, 1.0), (1.0, 0.2, 0.3)),
        ((0.0, float("nan")), (1.0, 0.0)),
    ],
)
def test_what_is_no_curve_is_refused(strengths: tuple[float, ...], alphas: tuple[float, ...]) -> None:
    with pytest.raises(SliderEditError, match="not a strength curve"):
        StrengthCurve(strengths, alphas)


@pytest.mark.parametrize(
    ("prompt", "instruction"),
    [
        ("शर्ट लाल करो", "शर्ट लाल कर"),  # करो is one word: its vowel sign is a combining mark
        ("क्षत्रिय को हटाओ", "क्ष"),  # the conjunct goes on with a consonant
        ("این را می‌خواهم", "این را می"),  # a zero-width non-joiner stands inside the word
        ("add 👍🏽 here", "add 👍"),  # the skin tone belongs to the emoji
        ("add 👩‍🚀 here", "add 👩"),
        ("add 👩‍🚀 here", "🚀 here"),
        ("write x̂ here", "write x"),
    ],
)
def test_a_slider_ends_where_the_word_and_the_character_end(prompt: str, instruction: str) -> None:
    tokens = [PromptToken(c, i, i + 1, i) for i, c in enumerate(prompt)]
    with pytest.raises(SliderEditError, match="nowhere in the prompt"):
        find_spans(prompt, [Slider(instruction)], tokens, len(prompt) + 1)
    whole = prompt.removeprefix("add ").removesuffix(" here")
    first = prompt.index(whole)
    assert find_spans(prompt, [Slider(whole)], tokens, len(prompt) + 1) == [list(range(first, first + len(whole)))]


def test_text_that_is_not_utf8_is_refused() -> None:
    for text in (os.fsdecode(b"make it r\xe9d"), "make it \ud83d"):
        with pytest.raises(SliderEditError, match="is not a character; encode it in UTF-8"):
            Slider(text)
        with pytest.raises(SliderEditError, match="is not a character"):
            compose_prompt([text])


@pytest.mark.parametrize("strength", [float("nan"), float("inf"), -float("inf")])
def test_strength_must_be_finite(strength: float) -> None:
    with pytest.raises(SliderEditError, match="finite"):
        Slider("make it red", strength)


def test_empty_instruction_is_refused() -> None:
    with pytest.raises(SliderEditError, match="empty"):
        Slider("  ")


@pytest.mark.parametrize(
    ("prompt", "instruction"),
    [
        ("make the circle red", "make the circle red"),
        ("please make the circle red now", "make the circle red"),
        ('say "make the circle red" twice', "make the circle red"),
        ("(make the circle red)", "make the circle red"),
        ("make the circle red, make the square blue", "make the square blue"),
        ("make the circle red and make the background dark", "make the background dark"),
        ("add 3 cats and make 30% of them orange", "make 30% of them orange"),
        ("make the  circle red and keep it", "make the  circle red"),
    ],
)
def test_a_span_is_exactly_the_tokens_of_the_instruction(family: Family, encoders: Any, prompt: str, instruction: str) -> None:
    (words,) = owned(family, encoders, prompt, instruction)
    assert words.replace(" ", "").strip('"(),') == instruction.replace(" ", "")


def test_joining_words_and_end_of_sequence_belong_to_nobody(family: Family, encoders: Any) -> None:
    prompt = "make the circle red and make the square blue"
    tokens = family.tokenize(encoders, prompt)
    spans = find_spans(prompt, [Slider("make the circle red"), Slider("make the square blue")], tokens, 24)
    free = [t.text for t in tokens if all(t.row not in span for span in spans)]
    assert free == ["▁and", "</s>"]


def test_the_nth_slider_with_the_same_text_takes_the_nth_occurrence(family: Family, encoders: Any) -> None:
    prompt = "make the circle red and make the circle red"
    tokens = family.tokenize(encoders, prompt)
    first, second = find_spans(prompt, [Slider("make the circle red")] * 2, tokens, 24)
    assert first == [0, 1, 2, 3]
    assert second == [5, 6, 7, 8]


def test_part_of_a_longer_word_is_not_an_occurrence(family: Family, encoders: Any) -> None:
    prompt = "make it reddish, then make it red"
    (words,) = owned(family, encoders, prompt, "make it red")
    tokens = family.tokenize(encoders, prompt)
    (span,) = find_spans(prompt, [Slider("make it red")], tokens, 64)
    assert min(t.start for t in tokens if t.row in span and t.end > t.start) >= prompt.index("make it red", 5)
    assert words.endswith("red")


def test_composed_and_decomposed_accents_are_the_same_instruction(family: Family, encoders: Any) -> None:
    decomposed = unicodedata.normalize("NFD", "make the café red")
    prompt = compose_prompt([decomposed, "make the square blue"])
    spans = find_spans(prompt, [Slider(decomposed)], family.tokenize(encoders, prompt), 64)
    assert spans[0][0] == 0


def test_unknown_characters_still_have_rows(family: Family, encoders: Any) -> None:
    prompt = "空を暗く and make the circle red"
    spans = find_spans(prompt, [Slider("空を暗く"), Slider("make the circle red")], family.tokenize(encoders, prompt), 64)
    assert all(spans)
    assert not set(spans[0]) & set(spans[1])


def test_missing_instruction_is_an_error_that_shows_the_tokens(family: Family, encoders: Any) -> None:
    with pytest.raises(SliderEditError, match=r"nowhere.*▁circle"):
        owned(family, encoders, "make the circle red", "make the square red")


def test_more_sliders_than_occurrences_is_an_error(family: Family, encoders: Any) -> None:
    with pytest.raises(SliderEditError, match=r"1 time\(s\), but 2"):
        owned(family, encoders, "make the circle red", "make the circle red", "make the circle red")


def test_overlapping_spans_are_an_error(family: Family, encoders: Any) -> None:
    with pytest.raises(SliderEditError, match="overlap"):
        owned(family, encoders, "make the circle red", "make the circle", "circle red")


def test_truncation_names_the_slider_that_fell_off(family: Family, encoders: Any) -> None:
    prompt = "make the circle red and make the square blue"
    with pytest.raises(SliderEditError, match=r"make the square blue.*is cut off"):
        owned(family, encoders, prompt, "make the circle red", "make the square blue", max_rows=9)
    assert len(owned(family, encoders, prompt, "make the circle red", "make the square blue", max_rows=10)) == 2


def test_an_empty_span_never_becomes_a_silent_mask() -> None:
    with pytest.raises(SliderEditError, match="no row"):
        row_mask([[0, 1], []], 4)


def test_row_scale_sums_the_sliders_of_a_row() -> None:
    mask = torch.tensor([[[1, 1, 0, 0], [0, 0, 1, 0]]], dtype=torch.bool)
    scale = combine_row_scale(torch.tensor([[0.5, -2.0]]), mask)
    assert scale.tolist() == [[0.5, 0.5, -2.0, 0.0]]


def test_an_unused_slot_and_no_slot_at_all_scale_nothing() -> None:
    mask = torch.ones(1, 1, 4, dtype=torch.bool)
    assert combine_row_scale(torch.zeros(1, 1), mask).tolist() == [[0, 0, 0, 0]]
    assert combine_row_scale(torch.zeros(1, 0), mask[:, :0]).tolist() == [[0, 0, 0, 0]]


class TestControls:
    tokens: ClassVar = [PromptToken("red", 0, 3, 0), PromptToken("old", 4, 7, 1)]
    bank: ClassVar = {"age": StrengthCurve(), "colour": StrengthCurve((0.0, 1.0), (2.0, 0.0))}

    @pytest.mark.parametrize(
        ("controls", "spans"),
        [
            (Controls("st", members=bank), [[0], [1]]),
            (Controls("gst", members=bank), [[], [1]]),
        ],
    )
    def test_words_of_a_gst_slider_that_is_called_like_its_adapter_are_not_looked_up(
        self, controls: Controls, spans: list[list[int]]
    ) -> None:
        first = Slider("age") if controls.kind == "gst" else Slider("red", adapter="age")
        sliders = [first, Slider("old", adapter="colour")]
        assert controls.spoken(sliders) == [bool(span) for span in spans]
        assert controls.find_spans("red old", sliders, self.tokens, 8) == spans
        assert controls.members_of(sliders) == ("age", "colour")

    def test_alphas_stand_in_the_columns_of_their_members(self) -> None:
        alpha = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        wide = Controls("st", members=self.bank).by_member(alpha, ("colour", "age"))
        assert wide.tolist() == [[[0.0, 1.0], [2.0, 0.0]], [[0.0, 3.0], [4.0, 0.0]]]
        assert Controls("st").by_member(alpha, ()) is alpha
