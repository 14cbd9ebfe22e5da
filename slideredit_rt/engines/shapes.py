"""A cache for values that engines keep per set of shapes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class ShapeCache(Generic[T]):
    """LRU cache of values by set of shapes. Not thread-safe.

    Args:
        most: Number of values to keep, at least 1.
        release: Function that is called with each value before it is dropped.
    """

    def __init__(self, most: int, release: Callable[[T], object] | None = None) -> None:
        self._most = most
        self._release = release
        self._values: OrderedDict[Hashable, T] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return the value of `key`. If there is none, drop old values to make room and call `make`."""
        if key not in self._values:
            while len(self._values) >= self._most:
                self._drop(last=False)
            self._values[key] = make()
        self._values.move_to_end(key)
        return self._values[key]

    def clear(self) -> None:
        """Release and drop all values."""
        while self._values:
            self._drop(last=True)

    def _drop(self, *, last: bool) -> None:
        _, value = self._values.popitem(last=last)
        if self._release is not None:
            self._release(value)
