"""slideredit-rt: one compiled engine, every slider."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from slideredit_rt.errors import SliderEditError
from slideredit_rt.sliders import Slider
from slideredit_rt.strength import StrengthSchedule

if TYPE_CHECKING:
    from slideredit_rt.editor import SliderEditor

__all__ = ["Slider", "SliderEditError", "SliderEditor", "StrengthSchedule", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Importing diffusers takes seconds, and commands that do not use it should not wait for it.
    if name == "SliderEditor":
        from slideredit_rt.editor import SliderEditor

        return SliderEditor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
