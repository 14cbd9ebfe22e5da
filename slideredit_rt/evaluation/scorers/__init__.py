"""Learned scorers for images whose truth is not known, by the names that commands and tables use."""

from __future__ import annotations

from collections.abc import Mapping

from slideredit_rt.errors import SliderEditError
from slideredit_rt.evaluation.scorers.attributes import BlipMatching, Clip, Siglip
from slideredit_rt.evaluation.scorers.base import AttributeScorer, DistanceScorer, Scorer
from slideredit_rt.evaluation.scorers.distances import ArcFace, Dinov2, LpipsAlex, LpipsVgg

__all__ = ["SCORERS", "AttributeScorer", "DistanceScorer", "Scorer", "load_scorer"]

SCORERS: Mapping[str, type[Scorer]] = {s.name: s for s in (Clip, Siglip, BlipMatching, LpipsAlex, LpipsVgg, Dinov2, ArcFace)}


def load_scorer(name: str, source: str | None = None, device: str = "cpu") -> Scorer:
    """Load a scorer: an `AttributeScorer` or a `DistanceScorer`.

    Args:
        name: one of `SCORERS`.
        source: folder or file of the weights, or a hub repository; by default the one that the paper uses.
        device: torch's name of it.

    Raises:
        SliderEditError: an unknown name, a package that is not installed, or weights that cannot be loaded.
    """
    if name not in SCORERS:
        raise SliderEditError(f"{name!r} is no scorer; choose among {', '.join(SCORERS)}")
    kind = SCORERS[name]
    source = source or kind.source
    try:
        return kind(source, device)
    except ImportError as error:
        raise SliderEditError(
            f"scorer {name!r} needs a package that is missing ({_first_line(error)}); pip install 'slideredit-rt[{kind.extra}]'"
        ) from error
    # The packages document no exceptions of their loaders, and to a user each means the same.
    except Exception as error:
        raise SliderEditError(
            f"scorer {name!r} cannot be loaded from {source!r} ({type(error).__name__}: {_first_line(error)}); "
            "give the path of its downloaded weights, or connect to the network that they come from"
        ) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "no reason given").rstrip(".")
