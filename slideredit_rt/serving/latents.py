"""Latents of earlier edits: the first steps that positions of sliders share, and the results of edits made before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from slideredit_rt.engines.cuda import Lane
from slideredit_rt.serving.batch import Row
from slideredit_rt.serving.cache import EncodingCache


class Latents:
    """Lets rows begin where an earlier row with the same content was.

    Rows of one request share their frozen steps in any case. Between requests, latents are kept in a cache, under the kinds
    `first_steps` (after the frozen steps) and `latents` (after all steps).

    Args:
        cache: Cache of the latents, each with the mark of the work that wrote it; None keeps none.
    """

    def __init__(self, cache: EncodingCache | None) -> None:
        self._cache = cache

    def resume(self, rows: Sequence[Row]) -> list[Row]:
        """Let the new rows of a request begin with kept latents, or follow a row that makes their frozen steps.

        Returns:
            The rows that can make a step now. The others are done, or follow one of these.
        """
        leaders: dict[int, Row] = {}
        ready = []
        for row in rows:
            if (final := self._find(row.final_key)) is not None:
                row.continue_from(final[0], row.steps)
                row.made = final[1]
                continue
            if row.frozen and (leader := leaders.get(row.seed)) is not None:
                leader.followers.append(row)
                continue
            if row.frozen and (first := self._find(row.first_key)) is not None:
                row.continue_from(first[0], row.frozen)
            elif row.frozen:
                leaders[row.seed] = row
            ready.append(row)
        return ready

    def keep(self, rows: Sequence[Row], lane: Lane) -> None:
        """Keep the latents of rows that have made their last frozen step or their last step.

        Args:
            rows: Rows that have made a step.
            lane: Lane of the step.
        """
        if self._cache is None:
            return
        for row in rows:
            key = row.final_key if row.done else row.first_key if row.frozen == row.step else None
            if key is not None:
                # Clone, because the row's latents are a view of the whole batch.
                latents = row.latents.clone()
                self._cache.keep(key, (latents, lane.mark()))

    def _find(self, key: Any) -> Any:
        return None if self._cache is None or key is None else self._cache.find(key)


def take_followers(rows: Sequence[Row]) -> list[Row]:
    """Return the rows that follow those of these rows which have made their frozen steps; they continue from there."""
    taken = []
    for row in rows:
        if row.followers and row.step == row.frozen:
            for follower in row.followers:
                follower.continue_from(row.latents, row.frozen)
            taken += row.followers
            row.followers = []
    return taken
