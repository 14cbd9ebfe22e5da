"""The embedded worlds as subjects of evaluation and calibration: their held-out scenes with exact scorers, and their files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from slideredit_rt.assets import base_of, resolve_adapter, resolve_offsets
from slideredit_rt.errors import SliderEditError
from slideredit_rt.evaluation.dataset import SEEDS, Dataset, Phase
from slideredit_rt.evaluation.portraits import PortraitsPeople
from slideredit_rt.evaluation.shapes import ShapesScenes
from slideredit_rt.portraits import world as portraits
from slideredit_rt.shapes import world as shapes


@dataclass(frozen=True)
class EvaluationWorld:
    """A world whose correct edits are known.

    Attributes:
        name: Name of the world, with which the names of its embedded files begin.
        instructions: Texts of all its instructions.
        open: Function that returns the dataset of some instructions, by text, with the seed of the scenes of each phase. It
            raises `SliderEditError` for a text that is not an instruction of the world.
    """

    name: str
    instructions: tuple[str, ...]
    open: Callable[[Sequence[str], dict[Phase, int]], Dataset]

    @property
    def base(self) -> str:
        """Name of the embedded editor."""
        return base_of(self.name)

    @property
    def concepts(self) -> str | None:
        """Name of the embedded concept sliders; None if there are none."""
        name = f"{self.name}-concepts"
        return name if resolve_adapter(name).exists() else None

    @property
    def offsets(self) -> str | None:
        """Name of the embedded attribute offsets; None if there are none."""
        name = f"{self.name}-offsets"
        return name if resolve_offsets(name).exists() else None

    def dataset(self, instructions: Sequence[str] | None = None, seeds: dict[Phase, int] = SEEDS) -> Dataset:
        """Return held-out scenes with exact scorers.

        Args:
            instructions: Texts of the instructions that prompts are made of; None takes all.
            seeds: Seed of the scenes of each phase.

        Raises:
            SliderEditError: The list is empty, or a text is not an instruction of the world.
        """
        if instructions is not None and not instructions:
            raise SliderEditError(
                f"the list of instructions is empty; write one of the {self.name} world, such as {self.instructions[0]!r}"
            )
        return self.open(self.instructions if instructions is None else instructions, seeds)


EVALUATION: dict[str, EvaluationWorld] = {
    world.name: world
    for world in (
        EvaluationWorld(
            "portraits",
            tuple(i.text for i in portraits.INSTRUCTIONS),
            lambda texts, seeds: PortraitsPeople([portraits.find_instruction(text) for text in texts], seeds),
        ),
        EvaluationWorld(
            "shapes",
            tuple(i.text for i in shapes.ALL_INSTRUCTIONS),
            lambda texts, seeds: ShapesScenes([shapes.find_instruction(text) for text in texts], seeds),
        ),
    )
}
"""Worlds by name."""
