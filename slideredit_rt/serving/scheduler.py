"""Scheduler: selects the rows of the next step."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence

from slideredit_rt.serving.batch import Row

BACKGROUND_EVERY = 16
"""Number of consecutive preview steps after which full edits get one step."""
SHARE_BESIDE_PREVIEWS = 4
"""Divisor of the largest batch for full edits while previews arrive: the next preview has to wait for their step."""


class Scheduler:
    """Queue of rows in lanes, one lane per key and priority. A step takes the first rows of one lane.

    A lane is first come, first served, and lanes take turns. Previews (`interactive`) go first. Full edits pause meanwhile and
    keep their state, except for one step after every `BACKGROUND_EVERY` preview steps. Not thread-safe.

    Args:
        max_batch: Most rows in a step.
        step_batching: Mix rows of several owners in a step; otherwise finish one owner before the next.
    """

    def __init__(self, max_batch: int, *, step_batching: bool = True) -> None:
        self.max_batch = max_batch
        self.step_batching = step_batching
        # Lanes by priority; the first is next in turn.
        self._lanes: dict[bool, OrderedDict[Hashable, list[Row]]] = {True: OrderedDict(), False: OrderedDict()}
        self._previews_in_a_row = 0
        self._begun: tuple[bool, Hashable] | None = None

    def __len__(self) -> int:
        """Return the number of rows in all lanes."""
        return sum(len(lane) for lanes in self._lanes.values() for lane in lanes.values())

    def add(self, rows: Sequence[Row]) -> None:
        for row in rows:
            key = row.key if self.step_batching else id(row.owner)
            self._lanes[row.interactive].setdefault(key, []).append(row)

    def discard(self, gone: Callable[[Row], bool]) -> None:
        """Drop the rows for which `gone` returns true."""
        for lanes in self._lanes.values():
            for key in list(lanes):
                lanes[key] = [row for row in lanes[key] if not gone(row)]
                if not lanes[key]:
                    del lanes[key]

    def limit(self, *, interactive: bool, beside_previews: bool) -> int:
        """Return the most rows to process together, in a step or in decoding.

        Args:
            interactive: True for previews.
            beside_previews: True if previews arrived recently.
        """
        return max(1, self.max_batch // SHARE_BESIDE_PREVIEWS) if beside_previews and not interactive else self.max_batch

    def next_rows(self, *, beside_previews: bool = False) -> list[Row]:
        """Return the rows of the next step; none if no row waits. They stay in their lane until they are discarded.

        Args:
            beside_previews: True if previews arrived recently.
        """
        interactive, key = self._next_lane()
        lane = self._lanes[interactive].get(key, [])
        return lane[: self.limit(interactive=interactive, beside_previews=beside_previews)]

    def _next_lane(self) -> tuple[bool, Hashable]:
        if not self.step_batching:
            if self._begun is None or self._begun[1] not in self._lanes[self._begun[0]]:
                interactive = bool(self._lanes[True])
                self._begun = interactive, next(iter(self._lanes[interactive]), None)
            return self._begun
        previews, others = self._lanes[True], self._lanes[False]
        interactive = bool(previews) and not (others and self._previews_in_a_row >= BACKGROUND_EVERY)
        self._previews_in_a_row = self._previews_in_a_row + 1 if interactive and others else 0
        key = next(iter(self._lanes[interactive]), None)
        if key is not None:
            self._lanes[interactive].move_to_end(key)
        return interactive, key
