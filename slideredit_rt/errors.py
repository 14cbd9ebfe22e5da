"""The one exception that users of the package meet."""


class SliderEditError(Exception):
    """Bad input or a broken file. The message says what was wrong, where, and what to do about it."""
