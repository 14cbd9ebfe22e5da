"""Attribute offsets (Continuous Attribute Control): a trained vector per attribute, added to the noun's text embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from slideredit_rt.assets import resolve_offsets
from slideredit_rt.editor import SliderEditor
from slideredit_rt.errors import SliderEditError
from slideredit_rt.evaluation.dataset import Case
from slideredit_rt.evaluation.setup import Setup
from slideredit_rt.evaluation.systems.base import System, register
from slideredit_rt.files import sha256
from slideredit_rt.preparing import Prepared

if TYPE_CHECKING:
    from slideredit_rt.training.attribute_offsets import AttributeOffsets


@dataclass(frozen=True)
class _Encoded:
    """An encoded image with the neutral prompt, and the attribute indices that its knobs move."""

    prepared: Prepared
    attributes: list[int]


@register
class OffsetControl(System):
    """Attribute offsets on any engine: text embeddings are an input per row. Setting 0 is the edit at the neutral prompt."""

    name, knob, plain, joint = "attribute-offsets", "offset scale", 0.0, True
    ranges = ((0.0, 1.0), (0.0, 1.5), (0.0, 2.0), (0.0, 3.0), (0.0, 5.0))
    needs = "training on this base and its instructions (slideredit-rt train offsets, then --offsets)"
    how = "an offset per attribute on the noun's embeddings of a neutral prompt, an input of the same engine"

    def __init__(self, editor: SliderEditor, offsets: AttributeOffsets) -> None:
        self.editor, self.offsets = editor, offsets

    @classmethod
    def variants(cls, setup: Setup) -> list[str]:
        return [] if setup.offsets is None else [cls.name]

    @classmethod
    def make(cls, setup: Setup, variant: str) -> System:
        assert setup.offsets is not None
        return cls(setup.open_any(), cls._load(setup.offsets, setup))

    @classmethod
    def trained(cls, setup: Setup) -> tuple[str, str] | None:
        if setup.offsets is None:
            return None
        cls._load(setup.offsets, setup)
        return setup.offsets, sha256(resolve_offsets(setup.offsets))

    @staticmethod
    def _load(offsets: str, setup: Setup) -> AttributeOffsets:
        # Imported here, because it imports the trainer, which no other system needs.
        from slideredit_rt.training.attribute_offsets import load_offsets

        return load_offsets(resolve_offsets(offsets), setup.family)

    def prepare(self, case: Case) -> _Encoded:
        names = self.offsets.attributes
        if missing := next((text for text in case.instructions if text not in names), None):
            raise SliderEditError(
                f"the attribute offsets do not include {missing!r}; train it with slideredit-rt train offsets --instructions"
            )
        prepared = self.offsets.prepare(self.editor, case.image, case.seed)
        return _Encoded(prepared, [names.index(text) for text in case.instructions])

    def render(self, prepared: _Encoded, settings: Sequence[Sequence[float]], steps: int) -> Tensor:
        scales = torch.zeros(len(settings), len(self.offsets.attributes))
        scales[:, prepared.attributes] = torch.tensor(settings, dtype=torch.float32)
        return self.offsets.render(self.editor, prepared.prepared, scales, steps)
