"""SliderEdit's own adapters on our runtime: every setting is an input of one engine."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from slideredit_rt.editor import Prepared, SliderEditor
from slideredit_rt.evaluation.systems.base import Case, System


class SelectiveToken(System):
    """ST: the text rows of the slider's own instruction are scaled (paper, section on selective tokens)."""

    name, knob, joint = "st", "strength", True
    ranges = ((0.0, 1.0), (0.0, 1.5), (0.0, 2.0), (0.0, 3.0), (-0.5, 2.0))
    how = "ST adapter, strength is an input of one engine"

    def __init__(self, editor: SliderEditor) -> None:
        self.editor = editor

    def prepare(self, case: Case) -> Prepared:
        return self.editor.prepare(case.image, case.instructions, prompt=case.prompt, seed=case.seed)

    def render(self, prepared: Prepared, settings: Sequence[Sequence[float]], steps: int) -> Tensor:
        return self.editor.render_tensor(prepared, settings, steps=steps)


class GloballySelective(SelectiveToken):
    """GST: every row is scaled, so that one slider moves the whole prompt."""

    name, joint = "gst", False
    how = "GST adapter, strength is an input of one engine"
