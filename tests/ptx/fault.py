from __future__ import annotations


class Fault(Exception):
    """The kernel did something that is an error on hardware, or that the interpreter does not know."""
