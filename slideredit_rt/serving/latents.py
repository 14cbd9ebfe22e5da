"""Latents of earlier edits: the first steps that positions of sliders share, and the results of edits made before."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

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

    def keep_first_steps(self, rows: Sequence[Row], lane: Lane) -> None:
        """Keep the latents of rows that have just made their last frozen step.

        Whether they are finite is not known yet: that would make the host wait for the step. `forget` drops them if not.

        Args:
            rows: Rows that have made a step.
            lane: Lane of the step.
        """
        for row in rows:
            if row.step == row.frozen:
                self._keep(row.first_key, row.latents, lane)

    def keep_result(self, row: Row, lane: Lane) -> None:
        """Keep the latents of a row that has made all steps.

        Args:
            row: Row whose image is finite.
            lane: Lane that has taken the latents.
        """
        self._keep(row.final_key, row.latents, lane)

    def forget(self, row: Row) -> None:
        """Drop the kept first steps of a row whose image is not finite, because they may be the cause."""
        if self._cache is not None and row.first_key is not None:
            self._cache.drop(row.first_key)

    def _keep(self, key: tuple[Hashable, ...] | None, latents: Tensor, lane: Lane) -> None:
        """Keep a copy of latents, unless the key has one or the device is out of memory for it."""
        if self._cache is None or key is None or key in self._cache:
            return
        try:
            # Clone, because the row's latents are a view of the whole batch.
            copy = latents.clone()
        except torch.OutOfMemoryError:
            return
        self._cache.keep(key, (copy, lane.mark()))

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
