from __future__ import annotations


class Fault(Exception):
    """The kernel did something that hardware would not forgive, or that the interpreter does not know."""
