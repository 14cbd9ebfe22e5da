"""What the benchmark asks of a system: render this picture and prompt at these settings of its knob."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from PIL import Image
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One edit of the benchmark.

    Attributes:
        name: tells it from the others; file-name safe.
        image: source picture, RGB.
        prompt: holds every instruction.
        instructions: the swept ones, one knob each.
        seed: of the initial noise, the same for every system.
    """

    name: str
    image: Image.Image
    prompt: str
    instructions: tuple[str, ...]
    seed: int


class System:
    """A way to scale an edit continuously.

    Attributes:
        name: in commands, files and tables.
        knob: what its number is.
        plain: setting at which the base model edits as it would without the system.
        ranges: candidates for the swept range, `(off, far)`; the benchmark searches among them on scenes of its own.
        joint: whether each instruction of a prompt has a knob of its own.
        how: one sentence for the report.
    """

    name: ClassVar[str]
    knob: ClassVar[str]
    plain: ClassVar[float] = 1.0
    ranges: ClassVar[tuple[tuple[float, float], ...]]
    joint: ClassVar[bool] = False
    how: ClassVar[str]

    def prepare(self, case: Case) -> Any:
        """Encode a case once."""
        raise NotImplementedError

    def render(self, prepared: Any, settings: Sequence[Sequence[float]], steps: int) -> Tensor:
        """One image per setting of the knobs, all from the case's noise; float32 `[N, 3, H, W]` in [0, 1]."""
        raise NotImplementedError
