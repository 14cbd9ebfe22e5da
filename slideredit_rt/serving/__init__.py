"""Serving: concurrent edits share one engine, batched per denoising step."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slideredit_rt.serving.job import Ticket
    from slideredit_rt.serving.requests import (
        Cancelled,
        Closed,
        DeadlineExceeded,
        EditRequest,
        EngineFailure,
        NoMemory,
        Observer,
        Outcome,
        Partial,
        QueueFull,
        Stats,
    )
    from slideredit_rt.serving.service import EditService

__all__ = [
    "Cancelled",
    "Closed",
    "DeadlineExceeded",
    "EditRequest",
    "EditService",
    "EngineFailure",
    "NoMemory",
    "Observer",
    "Outcome",
    "Partial",
    "QueueFull",
    "Stats",
    "Ticket",
]


def __getattr__(name: str) -> Any:
    # The command line reads `serving.settings`; importing the service as well would load diffusers, which takes seconds.
    if name in __all__:
        module = {"EditService": "service", "Ticket": "job"}.get(name, "requests")
        return getattr(import_module(f"slideredit_rt.serving.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
