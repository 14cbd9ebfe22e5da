"""Measures of a slider's response: continuity, monotonicity, coverage, extrapolation (benchmark of arXiv 2511.09715)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap, chisquare, spearmanr

from slideredit_rt.errors import SliderEditError


def chi_square_per_dof(scores: Sequence[float] | NDArray[np.float64]) -> float:
    """Return how unevenly a sweep's scores fill their own range: 0 is even, lower is better (the authors' notebook).

    The n scores are min-max normalised and counted in n equal bins. The result is χ² against one score per bin, divided by
    n − 1 degrees of freedom. It ignores the order of the scores, so report it together with `monotonicity`. Scores that are
    all equal fill one bin, which is the worst value.

    Raises:
        SliderEditError: There are fewer than 3 scores, or one is not finite.
    """
    values = np.asarray(scores, dtype=np.float64)
    if len(values) < 3 or not np.isfinite(values).all():
        raise SliderEditError(f"continuity needs at least 3 finite scores, got {list(scores)}; use a finer grid of strengths")
    low, high = values.min(), values.max()
    scaled = (values - low) / (high - low) if high > low else np.zeros_like(values)
    # The 1e-9 keeps a score that lies on the border of two bins from falling below it by rounding.
    counts = np.bincount(np.minimum((scaled * len(values) + 1e-9).astype(int), len(values) - 1), minlength=len(values))
    return float(chisquare(counts).statistic / (len(values) - 1))


def continuity(scores: Sequence[float] | NDArray[np.float64]) -> float:
    """Return `1 / (1 + χ²/dof)`, in (0, 1]; higher is better.

    In the paper's tables higher is better, in its notebook's χ² lower is better, and the mapping between them was not
    published. This mapping is ours: monotone, 1 for an even sweep, about 0.5 for scores drawn at random.
    """
    return 1 / (1 + chi_square_per_dof(scores))


def monotonicity(knobs: Sequence[float], scores: Sequence[float]) -> float:
    """Return Spearman's rank correlation of setting and score, or 0 if the score never changes."""
    return 0.0 if np.ptp(scores) == 0 else float(spearmanr(knobs, scores).statistic)


def coverage(scores: Sequence[float], source: float, edited: float) -> float:
    """Return the share of the way from the source to the base model's own edit that the sweep covers, in [0, 1].

    It is 1 if the sweep goes from no edit to the plain edit or beyond, and 0 if the plain edit does not change the score.

    Args:
        scores: Scores of the sweep.
        source: Score of the source image.
        edited: Score of the base model's edit without any slider.
    """
    if edited == source:
        return 0.0
    reached = [min(1.0, max(0.0, (score - source) / (edited - source))) for score in scores]
    return max(reached) - min(reached)


def extrapolation(scores: Sequence[float], source: float, edited: float) -> float:
    """Return how far the sweep reaches beyond the base model's own edit, relative to the change made by that edit.

    It is the largest `(score − edited) / (edited − source)` of the sweep: 0 if the sweep ends at the plain edit, 0.5 if it
    reaches 1.5 times the plain edit's change, negative if it never reaches the plain edit. The paper's definition was not
    published, so this one is ours.

    Args:
        scores: Scores of the sweep.
        source: Score of the source image.
        edited: Score of the base model's edit without any slider.

    Raises:
        SliderEditError: The plain edit does not change the score.
    """
    if edited == source:
        raise SliderEditError(
            f"the base model's own edit leaves the score at {edited:g}, so extrapolation is not defined; leave out the case"
        )
    return float(max((score - edited) / (edited - source) for score in scores))


@dataclass(frozen=True)
class Estimate:
    """A mean over images with a 95% confidence interval and the number of images."""

    mean: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def estimate(values: Sequence[float], seed: int = 0) -> Estimate:
    """Return the mean with a 95% bootstrap interval (percentile method, 2000 resamples, reproducible by `seed`)."""
    data: NDArray[np.float64] = np.asarray(values, dtype=np.float64)
    mean = float(data.mean())
    if len(data) < 2 or np.ptp(data) == 0:
        return Estimate(mean, mean, mean, len(data))
    interval = bootstrap(
        (data,), np.mean, n_resamples=2000, method="percentile", rng=np.random.default_rng(seed)
    ).confidence_interval
    return Estimate(mean, float(interval.low), float(interval.high), len(data))
