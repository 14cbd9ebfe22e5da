"""Serving: many edits share one engine, step by step."""

from slideredit_rt.serving.service import (
    Cancelled,
    Closed,
    DeadlineExceeded,
    EditRequest,
    EditService,
    EngineFailure,
    Observer,
    Outcome,
    Partial,
    QueueFull,
    Stats,
    Ticket,
)

__all__ = [
    "Cancelled",
    "Closed",
    "DeadlineExceeded",
    "EditRequest",
    "EditService",
    "EngineFailure",
    "Observer",
    "Outcome",
    "Partial",
    "QueueFull",
    "Stats",
    "Ticket",
]
