"""What the benchmark asks of a system, and how a system joins it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from slideredit_rt.errors import SliderEditError
from slideredit_rt.evaluation.dataset import Case
from slideredit_rt.evaluation.setup import Setup


class System:
    """A way to scale an edit continuously: renders an image and prompt at the settings of its knob.

    Attributes:
        name: in commands, files and tables.
        knob: what its number is.
        needs: what a setup must have for it, as the end of "system … needs".
        plain: setting at which the base model edits as it would without the system.
        ranges: candidates for the swept range, `(off, far)`; the benchmark searches among them on scenes of its own.
        joint: whether each instruction of a prompt has a knob of its own.
        how: one sentence for the report.
        reference: whether its `plain` setting is the run's plain edit; the first system that is one makes it.
    """

    name: ClassVar[str]
    knob: ClassVar[str]
    needs: ClassVar[str]
    plain: ClassVar[float] = 1.0
    ranges: ClassVar[tuple[tuple[float, float], ...]]
    joint: ClassVar[bool] = False
    how: ClassVar[str]
    reference: ClassVar[bool] = False

    @classmethod
    def variants(cls, setup: Setup) -> Sequence[str]:
        """Names under which it is compared, one per adapter where it has several; none where the setup lacks what it needs."""
        return [cls.name]

    @classmethod
    def make(cls, setup: Setup, variant: str) -> System:
        """Make one of `variants(setup)`. Called when it is first needed, so engines and models are opened here."""
        raise NotImplementedError

    @classmethod
    def trained(cls, setup: Setup) -> tuple[str, str] | None:
        """Origin and fingerprint of what was trained for it beforehand, where that is neither an adapter nor an engine."""
        return None

    def prepare(self, case: Case) -> Any:
        """Encode a case once."""
        raise NotImplementedError

    def render(self, prepared: Any, settings: Sequence[Sequence[float]], steps: int) -> Tensor:
        """One image per setting of the knobs, all from the case's noise; float32 `[N, 3, H, W]` in [0, 1]."""
        raise NotImplementedError


SYSTEMS: dict[str, type[System]] = {}
"""Every registered system by its name, in the order of tables."""
_S = TypeVar("_S", bound=type[System])


def register(system: _S) -> _S:
    """Add a system to `SYSTEMS`; a class decorator.

    Raises:
        SliderEditError: another one has its name.
    """
    if system.name in SYSTEMS:
        raise SliderEditError(f"there is a system {system.name!r} already; give the new one another name")
    SYSTEMS[system.name] = system
    return system
