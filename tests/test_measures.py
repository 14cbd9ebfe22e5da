"""The benchmark's measures, on scores whose answer can be worked out by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slideredit_rt.errors import SliderEditError
from slideredit_rt.evaluation.measures import (
    chi_square_per_dof,
    continuity,
    coverage,
    estimate,
    extrapolation,
    monotonicity,
)


@pytest.mark.parametrize("count", [3, 7, 15, 64])
def test_an_even_sweep_has_continuity_one(count: int) -> None:
    assert continuity(np.linspace(-0.3, 2.1, count)) == 1


def test_a_step_is_counted_by_hand() -> None:
    # 15 scores, 8 in the first bin and 7 in the last: (49 + 36 + 13) / 14.
    assert chi_square_per_dof([0.0] * 8 + [1.0] * 7) == pytest.approx(98 / 14)


def test_scores_that_never_change_are_the_worst() -> None:
    assert chi_square_per_dof([0.5] * 7) == pytest.approx((36 + 6) / 6)
    assert monotonicity([0, 1, 2], [0.5, 0.5, 0.5]) == 0


@settings(derandomize=True)
@given(st.lists(st.integers(-1000, 1000), min_size=3, max_size=20), st.sampled_from([0.5, 3.0]), st.integers(-5, 5))
def test_scale_offset_and_order_of_the_scores_do_not_matter(scores: list[int], scale: float, offset: int) -> None:
    moved = [scale * s + offset for s in reversed(scores)]
    assert chi_square_per_dof(moved) == pytest.approx(chi_square_per_dof(scores))


@settings(derandomize=True)
@given(st.lists(st.floats(-10, 10), min_size=3, max_size=20))
def test_continuity_is_a_share(scores: list[float]) -> None:
    assert 0 < continuity(scores) <= 1


def test_extrapolation_is_a_share_of_the_plain_edit() -> None:
    assert extrapolation([0, 0.5, 1.0, 1.4], source=0.0, edited=1.0) == pytest.approx(0.4)
    assert extrapolation([0.1, 0.2], source=0.0, edited=0.8) == pytest.approx(-0.75)
    # A score that falls under the edit is read the same way.
    assert extrapolation([3.0, 1.5], source=3.0, edited=2.0) == pytest.approx(0.5)


def test_coverage_is_the_part_of_the_way_that_the_sweep_goes() -> None:
    assert coverage([0, 0.5, 1.4], source=0.0, edited=1.0) == 1
    assert coverage([0.25, 0.5], source=0.0, edited=1.0) == 0.25
    assert coverage([-1.0, -0.5], source=0.0, edited=1.0) == 0
    # A score that falls under the edit is read the same way.
    assert coverage([3.0, 2.5], source=3.0, edited=2.0) == 0.5
    assert coverage([1.0, 2.0], source=1.0, edited=1.0) == 0


def test_what_cannot_be_said_is_refused() -> None:
    with pytest.raises(SliderEditError, match="not defined"):
        extrapolation([1.0, 1.0], source=1.0, edited=1.0)
    for scores in ([0.0, 1.0], [0.0, float("nan"), 1.0]):
        with pytest.raises(SliderEditError, match="at least 3 finite scores"):
            chi_square_per_dof(scores)


def test_confidence_interval_is_reproducible_and_holds_the_mean() -> None:
    values = np.random.default_rng(1).normal(2.0, 1.0, 64).tolist()
    first = estimate(values)
    assert first == estimate(values)
    assert first.low < first.mean < first.high
    assert first.high - first.low == pytest.approx(2 * 1.96 / 8, rel=0.25)
    assert estimate([3.0]).low == 3.0
