"""Concept Sliders: one LoRA per attribute, trained and used at a neutral prompt (`training.concepts`)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from slideredit_rt.adapters import load_adapter
from slideredit_rt.editor import SliderEditor
from slideredit_rt.errors import SliderEditError
from slideredit_rt.evaluation.dataset import Case
from slideredit_rt.evaluation.setup import Setup
from slideredit_rt.evaluation.systems.base import System, register
from slideredit_rt.preparing import Prepared
from slideredit_rt.sliders import Slider

_FROZEN = 2 / 28
"""Share of the denoising steps that run without the sliders: the first 2 of 28."""


@register
class ConceptSliders(System):
    """Concept Sliders as members of one bank, so several can move at once. Setting 0 is the edit at the neutral prompt."""

    name, knob, plain, joint = "concept-sliders", "LoRA scale", 0.0, True
    ranges = ((0.0, 0.5), (0.0, 0.75), (0.0, 1.0), (0.0, 1.5), (0.0, 2.0))
    needs = "training on this base and its instructions (slideredit-rt train concepts, then --concepts)"
    how = "a LoRA per attribute at a neutral prompt, scales are inputs of one engine, base model for the first 2 of 28 steps"

    def __init__(self, editor: SliderEditor) -> None:
        if editor.kind != "gst" or not editor.members:
            raise SliderEditError(
                "the adapter is not a bank with one adapter per attribute, as concept sliders are; "
                "make one with slideredit-rt train concepts"
            )
        self.editor = editor

    @classmethod
    def variants(cls, setup: Setup) -> list[str]:
        return [] if setup.concepts is None else [cls.name]

    @classmethod
    def make(cls, setup: Setup, variant: str) -> System:
        assert setup.concepts is not None
        return cls(setup.build(load_adapter(setup.concepts, setup.family), variant))

    @classmethod
    def trained(cls, setup: Setup) -> tuple[str, str] | None:
        return None if setup.concepts is None else (setup.concepts, load_adapter(setup.concepts, setup.family).fingerprint)

    def prepare(self, case: Case) -> Prepared:
        if missing := next((text for text in case.instructions if text not in self.editor.members), None):
            raise SliderEditError(
                f"the concept sliders do not include {missing!r}; train it with slideredit-rt train concepts --instructions"
            )
        sliders = [Slider(text) for text in case.instructions]
        return self.editor.prepare(case.image, sliders, prompt=self.editor.family.neutral_prompt, seed=case.seed)

    def render(self, prepared: Prepared, settings: Sequence[Sequence[float]], steps: int) -> Tensor:
        return self.editor.render_tensor(prepared, settings, steps=steps, slider_start=round(steps * _FROZEN) / steps)
