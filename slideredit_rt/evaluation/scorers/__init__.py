"""Learned scorers for images whose correct edit is not known. `SCORERS` maps the names used in commands and tables."""

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
        name: One of `SCORERS`.
        source: Folder or file of the weights, or a hub repository; None uses the weights that the paper uses.
        device: Torch device.

    Raises:
        SliderEditError: The name is unknown, a package is not installed, or the weights cannot be loaded.
    """
    if name not in SCORERS:
        raise SliderEditError(f"{name!r} is not a scorer; choose from {', '.join(SCORERS)}")
    kind = SCORERS[name]
    source = source or kind.source
    try:
        return kind(source, device)
    except ImportError as error:
        raise SliderEditError(
            f"scorer {name!r} needs a package that is missing ({_first_line(error)}); pip install 'slideredit-rt[{kind.extra}]'"
        ) from error
    # The packages do not document which exceptions their loaders raise, and all of them mean the same to a user.
    except Exception as error:
        raise SliderEditError(
            f"scorer {name!r} cannot be loaded from {source!r} ({type(error).__name__}: {_first_line(error)}); "
            "pass the path of downloaded weights, or connect to the network to download them"
        ) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "no reason given").rstrip(".")
