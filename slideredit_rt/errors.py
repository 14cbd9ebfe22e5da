"""Exceptions of the package."""


class SliderEditError(Exception):
    """Invalid input or a damaged file. The message says what is wrong, where, and what to do about it."""


class OutOfDeviceMemory(SliderEditError):
    """The device has no memory left for a call or for weights."""
