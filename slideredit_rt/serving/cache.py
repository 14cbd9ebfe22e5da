"""Cache of encodings and latents, keyed by content and bounded in memory."""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Mapping
from threading import Lock
from typing import Any, TypeVar

from torch import Tensor

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Caching:
    """Settings of what a service keeps between requests.

    Attributes:
        max_bytes: Memory for encodings and latents; 0 keeps nothing.
        latents: Keep the latents of first steps without sliders and of finished edits, so that a moved slider does not repeat
            these steps and an edit that was made before makes none.
    """

    max_bytes: int = 256 * 2**20
    latents: bool = True


def size_of(value: Any) -> int:
    """Return the bytes that a value keeps alive: the storage of every tensor in it, once, and `sys.getsizeof` of the rest."""
    storages: dict[int, int] = {}

    def count(item: Any) -> int:
        if isinstance(item, Tensor):
            storage = item.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            return 0
        size = sys.getsizeof(item)
        if dataclasses.is_dataclass(item):
            return size + sum(count(getattr(item, field.name)) for field in dataclasses.fields(item))
        if isinstance(item, Mapping):
            return size + sum(count(key) + count(part) for key, part in item.items())
        return size + sum(map(count, item)) if isinstance(item, (tuple, list)) else size

    return count(value) + sum(storages.values())


class EncodingCache:
    """Thread-safe least-recently-used cache; implements `slideredit_rt.preparing.Remember`.

    Args:
        max_bytes: Limit of all values and keys together. A larger value is not kept, and 0 keeps nothing.
        observe: Called on every lookup with the key's first part (its kind) and whether the key was found.
    """

    def __init__(self, max_bytes: int, observe: Callable[[str, bool], None] | None = None) -> None:
        self.max_bytes = max_bytes
        self.bytes_by_kind: Counter[str] = Counter()
        self.hits: dict[str, int] = {}
        self.misses: dict[str, int] = {}
        self._observe = observe
        self._values: OrderedDict[tuple[Hashable, ...], tuple[Any, int]] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: tuple[Hashable, ...]) -> bool:
        """Return whether a value is cached under `key`; this does not count as a lookup."""
        with self._lock:
            return key in self._values

    def __call__(self, key: tuple[Hashable, ...], encode: Callable[[], T]) -> T:
        """Return the value cached under `key`, or make it with `encode`. Threads that miss at the same time all encode."""
        found: T | None = self.find(key)
        if found is not None:
            return found
        value = encode()
        self.keep(key, value)
        return value

    def find(self, key: tuple[Hashable, ...]) -> Any:
        """Return the value cached under `key`, or None."""
        kind = str(key[0])
        with self._lock:
            found = self._values.get(key)
            counts = self.misses if found is None else self.hits
            counts[kind] = counts.get(kind, 0) + 1
            if found is not None:
                self._values.move_to_end(key)
        if self._observe is not None:
            self._observe(kind, found is not None)
        return None if found is None else found[0]

    def keep(self, key: tuple[Hashable, ...], value: Any) -> None:
        """Cache a value under `key`, unless the key has one or the value is larger than the limit."""
        size = size_of(value) + size_of(key)
        with self._lock:
            if key in self._values or size > self.max_bytes:
                return
            self._values[key] = value, size
            self.bytes_by_kind[str(key[0])] += size
            while self.bytes > self.max_bytes:
                old, (_, freed) = self._values.popitem(last=False)
                self.bytes_by_kind[str(old[0])] -= freed

    def drop(self, key: tuple[Hashable, ...]) -> None:
        """Drop the value cached under `key`, if there is one."""
        with self._lock:
            _, freed = self._values.pop(key, (None, 0))
            if freed:
                self.bytes_by_kind[str(key[0])] -= freed

    @property
    def bytes(self) -> int:
        """Current size of all values and keys together."""
        return sum(self.bytes_by_kind.values())

    def sizes(self) -> dict[str, int]:
        """Return the current size of the values of each kind, in bytes."""
        with self._lock:
            return dict(self.bytes_by_kind)

    def clear(self) -> None:
        with self._lock:
            self._values.clear()
            self.bytes_by_kind.clear()
