"""SliderEdit adapters on this runtime: every setting is an input of one engine."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from slideredit_rt.editor import SliderEditor
from slideredit_rt.evaluation.dataset import Case
from slideredit_rt.evaluation.setup import Setup, SliderEngine
from slideredit_rt.evaluation.systems.base import System, register
from slideredit_rt.preparing import Prepared
from slideredit_rt.strength import StrengthSchedule


@register
class SelectiveToken(System):
    """ST (selective token): the update is scaled on the text rows of the slider's own instruction."""

    name, knob, joint = "st", "strength", True
    ranges = ((0.0, 1.0), (0.0, 1.5), (0.0, 2.0), (0.0, 3.0), (-0.5, 2.0))
    needs = "an adapter or an engine of its kind (--adapter, --engine)"
    how, reference = "ST adapter, strength is an input of one engine", True

    def __init__(self, editor: SliderEditor) -> None:
        self.editor = editor

    @classmethod
    def variants(cls, setup: Setup) -> list[str]:
        return list(cls._engines(setup))

    @classmethod
    def make(cls, setup: Setup, variant: str) -> System:
        return cls(cls._engines(setup)[variant].open())

    @classmethod
    def _engines(cls, setup: Setup) -> dict[str, SliderEngine]:
        """Return the engines of this kind. A single one is named after the system, several keep their own names."""
        own = [engine for engine in setup.slider_engines if engine.kind == cls.name]
        return {cls.name if len(own) == 1 else engine.stem: engine for engine in own}

    def prepare(self, case: Case) -> Prepared:
        return self.editor.prepare(case.image, case.instructions, prompt=case.prompt, seed=case.seed)

    def render(self, prepared: Prepared, settings: Sequence[Sequence[float]], steps: int) -> Tensor:
        return self.editor.render_tensor(prepared, settings, steps=steps)


RAMP = 1 / 3
"""Fraction of the run over which a scheduled slider moves from the base model's strength to its own."""


@register
class ScheduledToken(SelectiveToken):
    """Scheduled ST: the strength moves from 1, the base model's, to the slider's own during the first part of the run."""

    name = "scheduled-st"
    how = f"ST adapter, strength moves from 1 to its own over the first {RAMP:.0%} of the run"
    reference = False

    @classmethod
    def _engines(cls, setup: Setup) -> dict[str, SliderEngine]:
        own = SelectiveToken._engines(setup)
        return {cls.name if len(own) == 1 else f"{cls.name}-{name}": engine for name, engine in own.items()}

    def render(self, prepared: Prepared, settings: Sequence[Sequence[float]], steps: int) -> Tensor:
        ramps = [[StrengthSchedule(((0.0, self.plain), (RAMP, strength))) for strength in setting] for setting in settings]
        return self.editor.render_tensor(prepared, ramps, steps=steps)


@register
class GloballySelective(SelectiveToken):
    """GST (globally selective token): the update is scaled on every row, so one slider controls the whole prompt."""

    name, joint = "gst", False
    how = "GST adapter, strength is an input of one engine"
