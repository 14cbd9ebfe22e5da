"""The ways to scale an edit that the benchmark compares, one module each behind `System`."""

from slideredit_rt.evaluation.systems.base import Case, System

__all__ = ["Case", "System"]
