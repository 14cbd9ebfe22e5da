"""Strengths: the numbers that users set for sliders, and the curve that turns them into the alphas that engines take."""

from __future__ import annotations

import bisect
import itertools
import math
from dataclasses import dataclass
from typing import Any

from slideredit_rt.errors import SliderEditError


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
