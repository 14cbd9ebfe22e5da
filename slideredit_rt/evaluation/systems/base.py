"""Interface of the systems that the benchmark compares, and their registry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from slideredit_rt.errors import SliderEditError
from slideredit_rt.evaluation.dataset import Case
from slideredit_rt.evaluation.setup import Setup


class System:
    """A method that scales an edit continuously. It renders an image and prompt at given settings of its knob.

    Attributes:
        name: Name in commands, files and tables.
        knob: Name of the quantity that is swept.
        needs: Requirements on a setup, worded to complete the message "system … needs …".
        plain: Setting at which the result is the base model's own edit.
        ranges: Candidate sweep ranges `(off, far)`. The benchmark chooses one on separate scenes.
        joint: True if each instruction of a prompt has its own knob.
        how: Short description for the report.
        reference: True if its `plain` setting can render the run's plain edit. The first such system does.
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
        """Return the names under which the system is compared, one per adapter. Empty if the setup lacks what it needs."""
        return [cls.name]

    @classmethod
    def make(cls, setup: Setup, variant: str) -> System:
        """Create one of `variants(setup)`. It is called on first use, so engines and models are opened here."""
        raise NotImplementedError

    @classmethod
    def trained(cls, setup: Setup) -> tuple[str, str] | None:
        """Return the origin and fingerprint of a trained file that is neither an adapter nor an engine, or None."""
        return None

    def prepare(self, case: Case) -> Any:
        """Encode a case, once for all settings."""
        raise NotImplementedError

    def render(self, prepared: Any, settings: Sequence[Sequence[float]], steps: int) -> Tensor:
        """Render one image per setting of the knobs, all from the case's noise, as float32 `[N, 3, H, W]` in [0, 1]."""
        raise NotImplementedError


SYSTEMS: dict[str, type[System]] = {}
"""Registered systems by name, in the order of the tables."""
_S = TypeVar("_S", bound=type[System])


def register(system: _S) -> _S:
    """Add a system class to `SYSTEMS`. For use as a class decorator.

    Raises:
        SliderEditError: A system of that name is registered already.
    """
    if system.name in SYSTEMS:
        raise SliderEditError(f"a system named {system.name!r} is registered already; choose another name")
    SYSTEMS[system.name] = system
    return system
