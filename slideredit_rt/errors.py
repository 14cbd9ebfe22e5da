"""The exception that the package raises for bad input."""


class SliderEditError(Exception):
    """Invalid input or a damaged file. The message says what is wrong, where, and what to do about it."""
