"""What a slider's response says: continuity, order, extrapolation (SliderEdit, arXiv 2511.09715, benchmark section)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap, chisquare, spearmanr

from slideredit_rt.errors import SliderEditError


def chi_square_per_dof(scores: Sequence[float] | NDArray[np.float64]) -> float:
    """How unevenly a sweep's scores fill their own range; 0 is even, lower is better (the authors' released notebook).

    The n scores are min-max normalised and counted in n equal bins; χ² against one score per bin, over n − 1 degrees of
    freedom. The order of the scores does not matter: read it beside `monotonicity`. Scores that are all equal count as one
    full bin, the worst there is.

    Raises:
        SliderEditError: fewer than 3 scores, or one that is not finite.
    """
    values = np.asarray(scores, dtype=np.float64)
    if len(values) < 3 or not np.isfinite(values).all():
        raise SliderEditError(f"continuity needs at least 3 finite scores, got {list(scores)}; use a finer grid of strengths")
    low, high = values.min(), values.max()
    scaled = (values - low) / (high - low) if high > low else np.zeros_like(values)
    # A score that lies on a border by its value must not fall below it by rounding.
    counts = np.bincount(np.minimum((scaled * len(values) + 1e-9).astype(int), len(values) - 1), minlength=len(values))
    return float(chisquare(counts).statistic / (len(values) - 1))


def continuity(scores: Sequence[float] | NDArray[np.float64]) -> float:
    """`1 / (1 + χ²/dof)`, in (0, 1], higher is better.

    The paper's tables are read "higher is better" and its notebook's χ² is not; the mapping between them was not published.
    This one is ours: monotone, 1 for an even sweep, about 0.5 for scores drawn at random.
    """
    return 1 / (1 + chi_square_per_dof(scores))


def monotonicity(knobs: Sequence[float], scores: Sequence[float]) -> float:
    """Spearman's rank correlation of setting and score; 0 where the score never changes."""
    return 0.0 if np.ptp(scores) == 0 else float(spearmanr(knobs, scores).statistic)


def coverage(scores: Sequence[float], source: float, edited: float) -> float:
    """How much of the way from the source to the base model's own edit the sweep covers, in [0, 1].

    1 where it goes from nothing to the plain edit or beyond; 0 where the plain edit does not change the score.

    Args:
        scores: of the sweep.
        source: score of the source image.
        edited: score of the base model's edit without any slider.
    """
    if edited == source:
        return 0.0
    reached = [min(1.0, max(0.0, (score - source) / (edited - source))) for score in scores]
    return max(reached) - min(reached)


def extrapolation(scores: Sequence[float], source: float, edited: float) -> float:
    """How far the sweep reaches beyond the base model's own edit, as a share of what that edit does.

    `max over the sweep of (score − edited) / (edited − source)`: 0 where nothing passes the plain edit, 0.5 where half as much
    again was reached, negative where the plain edit is never reached. The paper's definition was not published; this is ours.

    Args:
        scores: of the sweep.
        source: score of the source image.
        edited: score of the base model's edit without any slider.

    Raises:
        SliderEditError: the plain edit does not change the score, so that nothing can be said.
    """
    if edited == source:
        raise SliderEditError("the base model's own edit leaves the score as it was; extrapolation is not defined for it")
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
    """Mean with a 95% bootstrap interval (percentile, 2000 resamples of `scipy.stats.bootstrap`, reproducible by `seed`)."""
    data: NDArray[np.float64] = np.asarray(values, dtype=np.float64)
    mean = float(data.mean())
    if len(data) < 2 or np.ptp(data) == 0:
        return Estimate(mean, mean, mean, len(data))
    interval = bootstrap(
        (data,), np.mean, n_resamples=2000, method="percentile", rng=np.random.default_rng(seed)
    ).confidence_interval
    return Estimate(mean, float(interval.low), float(interval.high), len(data))
