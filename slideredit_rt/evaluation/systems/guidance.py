"""Classifier-free guidance as a slider. Both variants run on any engine, with its sliders at 1 and guidance set per row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from slideredit_rt.denoising import fill_batch
from slideredit_rt.editor import SliderEditor
from slideredit_rt.errors import SliderEditError
from slideredit_rt.evaluation.dataset import Case
from slideredit_rt.evaluation.setup import Setup
from slideredit_rt.evaluation.systems.base import System, register
from slideredit_rt.preparing import Prepared


class _Guidance(System):
    def __init__(self, editor: SliderEditor) -> None:
        self.editor = editor

    @classmethod
    def make(cls, setup: Setup, variant: str) -> System:
        return cls(setup.open_any())

    def _denoise(self, prepared: Prepared, values: Sequence[float], steps: int, *, embedded: bool) -> Tensor:
        editor, images = self.editor, []
        scale: float | Tensor
        for chunk in torch.tensor(values, dtype=torch.float32).split(editor.max_batch):
            filled = fill_batch(chunk, editor.min_batch)
            inputs, scale = editor.frozen_inputs(prepared, len(filled)), 1.0
            if embedded:
                inputs["guidance"] = filled.to(inputs["guidance"])
            else:
                scale = filled[:, None, None].to(prepared.conditioning.latents)
            images.append(editor.denoise(prepared.conditioning, inputs, steps, scale)[: len(chunk)])
        return torch.cat(images)


@register
class ImplicitGuidance(_Guidance):
    """Implicit CFG: the guidance scale that the backbone embeds."""

    name, knob, plain = "implicit-cfg", "guidance", 3.5
    ranges = ((1.0, 3.5), (1.0, 5.0), (1.0, 7.0), (0.0, 10.5), (0.0, 30.0))
    needs = "a base with embedded guidance"
    how = "embedded guidance scalar, an input of the same engine"

    def __init__(self, editor: SliderEditor) -> None:
        if editor.family.guidance_scale is None:
            raise SliderEditError(f"{editor.family.name} does not embed a guidance scale; remove implicit-cfg from --systems")
        super().__init__(editor)

    @classmethod
    def variants(cls, setup: Setup) -> list[str]:
        return [cls.name] if setup.family.guidance_scale is not None else []

    def prepare(self, case: Case) -> Prepared:
        return self.editor.prepare(case.image, case.instructions[:1], prompt=case.prompt, seed=case.seed)

    def render(self, prepared: Prepared, settings: Sequence[Sequence[float]], steps: int) -> Tensor:
        return self._denoise(prepared, [value for (value,) in settings], steps, embedded=True)


@register
class ExplicitGuidance(_Guidance):
    """Explicit CFG: `v(∅) + w (v(P) − v(∅))`, two passes per step. A family may rescale it, as Qwen-Image-Edit does."""

    name, knob = "explicit-cfg", "guidance weight"
    ranges = ((0.0, 1.0), (0.0, 1.5), (0.0, 2.0), (0.0, 3.0), (0.0, 5.0))
    needs = "an adapter or an engine (--adapter, --engine)"
    how = "two passes per step on the same engine"

    def prepare(self, case: Case) -> Prepared:
        # Any scale above 1 turns the negative pass on. The weight of each row is set when rendering.
        return self.editor.prepare(
            case.image, case.instructions[:1], prompt=case.prompt, seed=case.seed, true_cfg_scale=2.0, negative_prompt=""
        )

    def render(self, prepared: Prepared, settings: Sequence[Sequence[float]], steps: int) -> Tensor:
        return self._denoise(prepared, [value for (value,) in settings], steps, embedded=False)
