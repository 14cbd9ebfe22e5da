"""Continuous Attribute Control: an offset per attribute on the noun's embeddings (`training.attribute_offsets`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slideredit_rt.editor import Prepared, SliderEditor
from slideredit_rt.errors import SliderEditError
from slideredit_rt.evaluation.systems.base import Case, System
from slideredit_rt.training.attribute_offsets import AttributeOffsets


@dataclass(frozen=True)
class _Encoded:
    """A picture with the neutral prompt, and which attributes its knobs move."""

    prepared: Prepared
    attributes: list[int]


class OffsetControl(System):
    """Runs on any engine of ours: text embeddings are an input per row. Setting 0 is the edit at the neutral prompt."""

    name, knob, plain, joint = "attribute-offsets", "offset scale", 0.0, True
    ranges = ((0.0, 1.0), (0.0, 1.5), (0.0, 2.0), (0.0, 3.0), (0.0, 5.0))
    how = "an offset per attribute on the noun's embeddings of a neutral prompt, an input of the same engine"

    def __init__(self, editor: SliderEditor, offsets: AttributeOffsets) -> None:
        self.editor, self.offsets = editor, offsets

    def prepare(self, case: Case) -> _Encoded:
        names = self.offsets.attributes
        if missing := next((text for text in case.instructions if text not in names), None):
            raise SliderEditError(
                f"the attribute offsets have none for {missing!r}; train one with slideredit-rt train offsets --instructions"
            )
        prepared = self.offsets.prepare(self.editor, case.image, case.seed)
        return _Encoded(prepared, [names.index(text) for text in case.instructions])

    def render(self, prepared: _Encoded, settings: Sequence[Sequence[float]], steps: int) -> Tensor:
        scales = torch.zeros(len(settings), len(self.offsets.attributes))
        scales[:, prepared.attributes] = torch.tensor(settings, dtype=torch.float32)
        return self.offsets.render(self.editor, prepared.prepared, scales, steps)
