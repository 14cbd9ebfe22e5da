"""Strengths: what users set for sliders, constant or over the run, and the curve that turns them into engines' alphas."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from slideredit_rt.errors import SliderEditError


@dataclass(frozen=True)
class StrengthSchedule:
    """Strength that changes over the steps of a run, piecewise linear and constant beyond its ends.

    Step i of T steps has the strength at the fraction i / T of the run.

    Attributes:
        points: Pairs of a fraction of the run, in [0, 1], and the strength there, in the order of time. Two points with the
            same fraction make the strength jump.

    Raises:
        SliderEditError: There is no point, a number is not finite, a fraction is outside [0, 1], or time goes back.
    """

    points: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        points = tuple((float(fraction), float(strength)) for fraction, strength in self.points)
        object.__setattr__(self, "points", points)
        fractions, shown = [fraction for fraction, _ in points], [list(point) for point in points]
        if not points:
            raise SliderEditError("a strength schedule has no points; pass at least one, as in [[0, 0], [0.3, 1]]")
        if not all(math.isfinite(number) for point in points for number in point):
            raise SliderEditError(f"the strength schedule {shown} has a number that is not finite; pass finite numbers")
        if not all(0 <= fraction <= 1 for fraction in fractions):
            raise SliderEditError(
                f"the strength schedule {shown} has a fraction of the run outside 0 to 1; "
                "pass pairs of a fraction and a strength, as in [[0, 0], [0.3, 1]]"
            )
        if fractions != sorted(fractions):
            raise SliderEditError(f"the strength schedule {shown} goes back in time; pass its points in ascending order")

    def __call__(self, fraction: float) -> float:
        """Return the strength at a fraction of the run."""
        right = bisect.bisect_right(self.points, fraction, key=lambda point: point[0])
        if right in (0, len(self.points)):
            return self.points[min(right, len(self.points) - 1)][1]
        (x0, y0), (x1, y1) = self.points[right - 1 : right + 1]
        return y0 + (y1 - y0) * (fraction - x0) / (x1 - x0)

    def __format__(self, spec: str) -> str:
        """Return the form that `parse` reads, with the format `spec` for each number."""
        return ",".join(f"{strength:{spec}}@{fraction:{spec}}" for fraction, strength in self.points)

    def __str__(self) -> str:
        return format(self, "g")

    def to_json(self) -> list[list[float]]:
        """Return the points as lists."""
        return [list(point) for point in self.points]

    @classmethod
    def parse(cls, text: str) -> StrengthSchedule:
        """Read `STRENGTH@FRACTION,…`, such as `0@0,1@0.3`.

        Raises:
            SliderEditError: The text has another form, or describes no schedule.
        """
        try:
            pairs = [tuple(map(float, part.split("@"))) for part in text.split(",")]
            return cls(tuple((fraction, strength) for strength, fraction in pairs))
        except ValueError:
            raise SliderEditError(
                f"{text!r} is not a strength schedule; write strengths and fractions of the run, such as 0@0,1@0.3"
            ) from None


Strength = float | StrengthSchedule
"""Strength of a slider: a number, or a schedule over the run."""


def strength_at(strength: Strength, fraction: float) -> float:
    """Return a strength at a fraction of the run."""
    return strength(fraction) if isinstance(strength, StrengthSchedule) else strength


def strength_json(strength: Strength) -> float | list[list[float]]:
    """Return a strength as it is written in JSON."""
    return strength.to_json() if isinstance(strength, StrengthSchedule) else strength


def is_constant(strengths: Sequence[Sequence[Strength]]) -> bool:
    """Return whether no strength of these settings is a schedule."""
    return not any(isinstance(strength, StrengthSchedule) for setting in strengths for strength in setting)


def check_strength(instruction: str, strength: Strength) -> None:
    """Raise a `SliderEditError` if the strength of the slider `instruction` is not finite."""
    if not isinstance(strength, StrengthSchedule) and not math.isfinite(strength):
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
        strengths: Two or more strengths in strictly ascending order.
        alphas: One alpha per strength, in ascending or descending order.

    Raises:
        SliderEditError: The numbers do not meet these conditions.
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
            SliderEditError: The data does not describe a curve.
        """
        if data is None:
            return cls()
        try:
            return cls(tuple(map(float, data["strengths"])), tuple(map(float, data["alphas"])))
        except (KeyError, TypeError, ValueError) as error:
            raise SliderEditError(f"{data!r} is not a strength curve ({error}); calibrate the adapter again") from None
