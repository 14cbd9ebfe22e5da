"""A pool of drawn examples, from which every training step takes some at random.

Drawing an example can take longer than a training step with it. Each example is therefore used several times, with other noise
and beside other examples, before a new one replaces it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Draw = Callable[[int], tuple[Tensor, ...]]
"""Batch of examples by its number, tensors of the same length."""


class Pool:
    """The newest `size` batches of a sequence, one of which is drawn every `every` steps.

    What a step takes depends on its number alone, so a resumed run goes on as if it had not stopped.

    Args:
        draw: Function that draws a batch, with numbers from 0 on. All batches have the same shapes.
        size: Number of batches.
        every: Number of steps between new batches, which is how often an example is used if steps take as many as a batch has.
    """

    def __init__(self, draw: Draw, size: int, every: int) -> None:
        self.draw, self.size, self.every = draw, size, every
        self.drawn = 0
        self.examples: tuple[Tensor, ...] = ()

    def take(self, step: int, count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Return random examples, tensors of the length `count`.

        Args:
            step: Number of the step, not smaller than in the call before.
            count: Number of examples.
            generator: Generator on the device of the examples.
        """
        end = step // self.every + self.size
        for number in range(max(self.drawn, end - self.size), end):
            batch = self.draw(number)
            if not self.examples:
                self.examples = tuple(part.new_empty(self.size, *part.shape) for part in batch)
            for kept, part in zip(self.examples, batch, strict=True):
                kept[number % self.size] = part
        self.drawn = end
        flat = [kept.flatten(0, 1) for kept in self.examples]
        chosen = (len(flat[0]) * torch.rand(count, generator=generator, device=flat[0].device)).long()
        return tuple(kept[chosen] for kept in flat)
