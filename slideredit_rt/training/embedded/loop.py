"""Training loop of one stage of a recipe: a budget of steps or seconds, a schedule, averaged weights, state on disk."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from slideredit_rt.errors import SliderEditError
from slideredit_rt.training.checkpoint import load_checkpoint, save_checkpoint

_WARM_UP = 100
_SHOWN_EVERY = 50
_AVERAGE = 0.999

Losses = tuple[Tensor, Tensor]
"""Loss to minimise and the squared error to show, both scalars."""


@dataclass(frozen=True)
class Budget:
    """Length of a stage, in optimiser steps or in seconds of training. A stage that is resumed has what is left of it.

    Attributes:
        steps: Number of steps; None if `seconds` is given.
        seconds: Seconds; None if `steps` is given. The result then depends on the speed of the machine.

    Raises:
        SliderEditError: Neither or both are given, or the one that is given is not positive.
    """

    steps: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.seconds is None):
            raise SliderEditError("the length of a stage is a number of steps or of seconds; give one of the two")
        if not self.total > 0:
            raise SliderEditError(f"the length of a stage is {self.total:g}; give a positive number")

    @property
    def total(self) -> float:
        """The whole budget, in its own unit."""
        return float(self.steps if self.seconds is None else self.seconds)  # type: ignore[arg-type]

    def used(self, step: int, seconds: float) -> float:
        """Return what `step` steps that took `seconds` have used of the budget, in its unit."""
        return step if self.seconds is None else seconds


def learning_rate(step: int, used: float, warm: float, total: float, peak: float) -> float:
    """Return the learning rate of a step: a linear warm-up of 100 steps, then half a cosine to 0 at the end of the budget.

    Args:
        step: Number of the step.
        used: Share of the budget used before the step, in the unit of `total`.
        warm: Share of the budget that the warm-up used.
        total: The whole budget.
        peak: Learning rate after the warm-up.
    """
    if step < _WARM_UP:
        return peak * (step + 1) / _WARM_UP
    share = (used - warm) / max(1e-6, total - warm)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


class Average:
    """Exponential moving average of parameters, with a shorter memory in the first steps.

    Args:
        parameters: Parameters to follow, which are not changed.
    """

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self.values = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Follow the parameters after a step."""
        decay = min(_AVERAGE, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.values, [p.detach() for p in self.parameters], 1 - decay)

    @torch.no_grad()
    def apply(self) -> None:
        """Set the parameters to the average."""
        for parameter, value in zip(self.parameters, self.values, strict=True):
            parameter.copy_(value)


class Loop:
    """Training of some modules by AdamW with clipped gradients.

    Args:
        name: Name of the stage, for the progress bar.
        modules: Modules to train, by the names that they have in the state.
        peak: Peak learning rate.
        path: File of the state, which is read if it exists.
        average: Follow the parameters with an average, which replaces them at the end.
        save_every: Seconds between saved states.
    """

    def __init__(
        self,
        name: str,
        modules: Mapping[str, nn.Module],
        peak: float,
        path: Path,
        *,
        average: bool = False,
        save_every: float = 60.0,
    ) -> None:
        self.name, self.modules, self.peak, self.path, self.save_every = name, modules, peak, path, save_every
        self.parameters = [p for module in modules.values() for p in module.parameters() if p.requires_grad]
        fused = self.parameters[0].device.type == "cuda"
        self.optimizer = torch.optim.AdamW(self.parameters, lr=peak, betas=(0.9, 0.99), weight_decay=1e-3, fused=fused or None)
        self.average = Average(self.parameters) if average else None
        self.step, self.seconds, self.warm, self.finished = 0, 0.0, 0.0, False
        self.errors: list[tuple[int, float]] = []
        self.load()

    def load(self) -> None:
        """Read the saved state, if there is one. A finished one leaves the averaged parameters in the modules."""
        state = load_checkpoint(self.path)
        if state is None:
            return
        for key, module in self.modules.items():
            module.load_state_dict(state[key])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds, self.warm, self.finished = (state[k] for k in ("step", "seconds", "warm", "finished"))
        self.errors = [(step, error) for step, error in state["errors"]]
        if self.average is not None:
            for value, saved in zip(self.average.values, state["average"], strict=True):
                value.copy_(saved)
            if self.finished:
                self.average.apply()

    def _save(self) -> None:
        state: dict[str, Any] = {key: module.state_dict() for key, module in self.modules.items()}
        state |= {"optimizer": self.optimizer.state_dict(), "errors": self.errors}
        state |= {key: getattr(self, key) for key in ("step", "seconds", "warm", "finished")}
        if self.average is not None:
            state["average"] = self.average.values
        save_checkpoint(self.path, state)

    def train(self, losses: Callable[[int], Losses], budget: Budget, *, progress: bool = True) -> None:
        """Train until the budget is used up, save the state, and leave the averaged parameters in the modules.

        Args:
            losses: Losses of a step, by its number.
            budget: Length of the stage, what earlier runs used included.
            progress: Show a progress bar with the error on standard error.
        """
        before, start = self.seconds, time.monotonic()
        saved, shown, counted = start, torch.zeros((), device=self.parameters[0].device), 0
        with tqdm(desc=self.name, initial=self.step, total=budget.steps, mininterval=1, disable=not progress) as bar:
            while (used := budget.used(self.step, self.seconds)) < budget.total:
                self.finished = False
                if self.step <= _WARM_UP:
                    self.warm = used
                rate = learning_rate(self.step, used, self.warm, budget.total, self.peak)
                shown += self._update(losses(self.step), rate)
                self.step, counted = self.step + 1, counted + 1
                bar.update()
                if self.step % _SHOWN_EVERY == 0:
                    # Reading a value waits for the device, so it is not done in every step.
                    self.errors.append((self.step, shown.item() / counted))
                    shown, counted = torch.zeros_like(shown), 0
                    bar.set_postfix(error=f"{self.errors[-1][1]:.5f}", seconds=f"{self.seconds:.0f}", refresh=False)
                now = time.monotonic()
                self.seconds = before + now - start
                if now - saved >= self.save_every:
                    self._save()
                    saved = now
        if not self.finished:
            self.finished = True
            self._save()
        if self.average is not None:
            self.average.apply()

    def _update(self, losses: Losses, rate: float) -> Tensor:
        """Take one step of the optimiser and return the error to show."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss, error = losses
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update(self.step)
        return error.detach()
