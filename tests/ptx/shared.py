"""Shared memory of a block: bounds, copies in flight, races between warps, and visibility to the asynchronous proxy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ptx.fault import Fault
from ptx.memory import check_same_places
from ptx.numbers import UNSIGNED, Array

OWNERS = 64
"""Accesses are remembered as `epoch · OWNERS + owner`: a warp, a warpgroup's tensor core, or several."""
WARPGROUP = 40
"""Owner of what the first warpgroup's tensor core accesses."""
SEVERAL = OWNERS - 1


@dataclass
class Copy:
    """Bytes that a `cp.async` is bringing: `place` counts in elements of `data.shape[1]` bytes."""

    lanes: Array
    group: Array
    place: Array
    data: Array

    def only(self, chosen: Array) -> Copy:
        return Copy(self.lanes[chosen], self.group[chosen], self.place[chosen], self.data[chosen])


class Shared:
    """Memory that starts as 0xFF (NaN in every float) and forgets who accessed it at every `bar.sync`.

    Args:
        size: Number of bytes, as given to the launch.
        base: Address of the first byte.
        threads: Number of threads in the block.
    """

    def __init__(self, size: int, base: int, threads: int) -> None:
        self.size, self.base, self._threads = size, base, threads
        self._warp = np.arange(threads) // 32
        self.reset()

    def reset(self) -> None:
        """Forget everything: a new block."""
        room = -(-self.size // 16) * 16
        self._bytes = np.full(room, 0xFF, np.uint8)
        self._inflight = np.zeros(room, bool)
        self._unfenced = np.zeros(room, bool)
        self._wrote, self._seen, self._epoch = np.zeros(room, np.int32), np.zeros(room, np.int32), 1
        self._copies: list[Copy] = []
        self._committed = np.zeros(self._threads, np.int64)

    def places(self, address: Array, size: int) -> Array:
        """Return each lane's place, in elements of `size` bytes."""
        offset = address - self.base
        if offset.min() < 0 or offset.max() + size > self.size:
            raise Fault(f"access to bytes {offset.min()} to {offset.max() + size} of {self.size} bytes of shared memory")
        if (offset % size).any() or (address % size).any():
            raise Fault(f"{size} bytes of shared memory are misaligned")
        return offset // size

    def load(self, place: Array, lanes: Array, width: int, count: int) -> Array:
        """Return `[lanes, count]` unsigned integers of `width` bytes."""
        self._check_read(place, width * count, self._owner(lanes))
        data: Array = self._bytes.view(UNSIGNED[width]).reshape(-1, count)[place]
        return data

    def store(self, place: Array, lanes: Array, data: Array) -> None:
        """Write `[lanes, count]` unsigned integers."""
        check_same_places(place, data, "shared memory")
        raw = np.ascontiguousarray(data).view(np.uint8).reshape(len(place), -1)
        self._check_write(place, raw.shape[1], lanes, raw)
        self._bytes.reshape(-1, raw.shape[1])[place] = raw
        self._unfenced.reshape(-1, raw.shape[1])[place] = True

    def barrier(self) -> None:
        """All warps have met: what was written is visible, and what was read may be overwritten."""
        self._epoch += 1

    # cp.async (ISA: Data Movement and Conversion Instructions, cp.async, .commit_group, .wait_group)

    def begin_copy(self, place: Array, lanes: Array, data: Array) -> None:
        """Start copies of `[lanes, bytes]`. Until its wait a place holds nothing that may be accessed."""
        size = data.shape[1]
        if np.unique(place).size != place.size:
            raise Fault("lanes copy to the same place")
        self._check_write(place, size, lanes, None)
        self._bytes.reshape(-1, size)[place] = 0xFF
        self._inflight.reshape(-1, size)[place] = True
        self._copies.append(Copy(lanes, self._committed[lanes].copy(), place, data))

    def commit(self, lanes: Array) -> None:
        """Close the lanes' current group of copies."""
        self._committed[lanes] += 1

    def wait(self, lanes: Array, pending: int) -> None:
        """Let the lanes' own copies arrive, except those of their last `pending` groups."""
        waiting = np.zeros(self._threads, bool)
        waiting[lanes] = True
        left = []
        for copy in self._copies:
            done = (copy.group < self._committed[copy.lanes] - pending) & waiting[copy.lanes]
            if done.any():
                self._arrive(copy.only(done))
            if not done.all():
                left.append(copy.only(~done))
        self._copies = left

    def _arrive(self, copy: Copy) -> None:
        size = copy.data.shape[1]
        self._inflight.reshape(-1, size)[copy.place] = False
        self._check_write(copy.place, size, copy.lanes, copy.data)
        self._bytes.reshape(-1, size)[copy.place] = copy.data
        self._unfenced.reshape(-1, size)[copy.place] = True

    # The asynchronous proxy (ISA: Memory Consistency Model, Proxies)

    def fence(self) -> None:
        """`fence.proxy.async`: writes so far are visible to the tensor cores of warpgroups."""
        self._unfenced[:] = False

    def load_by_warpgroup(self, place: Array, team: int) -> Array:
        """Return `[places, 16]` bytes as a warpgroup's tensor core reads them."""
        if self._unfenced.reshape(-1, 16)[place].any():
            raise Fault("a warpgroup reads shared memory whose writes no fence.proxy.async has followed")
        self.hold_by_warpgroup(place, team)
        return self.peek(place)

    def hold_by_warpgroup(self, place: Array, team: int) -> None:
        """Remember that a warpgroup's tensor core may still be reading these 16-byte places."""
        owner = np.full((len(place), 1), self._epoch * OWNERS + WARPGROUP + team)
        self._check_read(place, 16, owner)

    def peek(self, place: Array) -> Array:
        """Return `[places, 16]` bytes without an access."""
        return self._bytes.reshape(-1, 16)[place].copy()

    # Races: two warps access a place, one of them writes, and no bar.sync lies between.

    def _owner(self, lanes: Array) -> Array:
        owner: Array = (self._epoch * OWNERS + self._warp[lanes])[:, None]
        return owner

    def _check_arrived(self, place: Array, size: int) -> None:
        if self._inflight.reshape(-1, size)[place].any():
            raise Fault("access to shared memory that a cp.async without a wait is filling")

    def _check_read(self, place: Array, size: int, owner: Array) -> None:
        self._check_arrived(place, size)
        now = self._epoch * OWNERS
        wrote = self._wrote.reshape(-1, size)[place]
        if ((wrote >= now) & (wrote != owner)).any():
            raise Fault("race: read after another warp's write, without bar.sync in between")
        self._mark(self._seen.reshape(-1, size), place, owner)

    def _check_write(self, place: Array, size: int, lanes: Array, data: Array | None) -> None:
        """`data` is `[lanes, size]` bytes; None if they are not known yet, so that other warps cannot write the same."""
        self._check_arrived(place, size)
        now, owner = self._epoch * OWNERS, self._owner(lanes)
        seen = self._seen.reshape(-1, size)[place]
        if ((seen >= now) & (seen != owner)).any():
            raise Fault("race: write after another warp's read, without bar.sync in between")
        wrote = self._wrote.reshape(-1, size)[place]
        other = (wrote >= now) & (wrote != owner)
        if other.any() and (data is None or (self._bytes.reshape(-1, size)[place] != data)[other].any()):
            raise Fault("race: write after another warp's write, without bar.sync in between")
        self._mark(self._wrote.reshape(-1, size), place, owner)

    def _mark(self, table: Array, place: Array, owner: Array) -> None:
        before = table[place]
        shared = (before >= self._epoch * OWNERS) & (before != owner)
        table[place] = np.where(shared, self._epoch * OWNERS + SEVERAL, owner)
        # Lanes of several warps at one place: the last one's mark has replaced the others'.
        mixed = table[place] != owner
        table[place] = np.where(mixed, self._epoch * OWNERS + SEVERAL, table[place])
