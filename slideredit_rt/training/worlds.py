"""The embedded worlds as subjects of training: the recipes of each one's editor, adapters and rival sliders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from slideredit_rt.families import Kind
from slideredit_rt.portraits import adapter_recipes as portraits
from slideredit_rt.portraits.editor_recipe import editor_recipe as portraits_editor
from slideredit_rt.shapes import adapter_recipes as shapes
from slideredit_rt.shapes.editor_recipe import editor_recipe as shapes_editor
from slideredit_rt.shapes.world import ALL_INSTRUCTIONS, find_instruction
from slideredit_rt.training.attribute_offsets import OffsetConfig
from slideredit_rt.training.concepts import ConceptConfig
from slideredit_rt.training.data import Data
from slideredit_rt.training.embedded.recipe import EditorRecipe
from slideredit_rt.training.few_step import FewStepConfig
from slideredit_rt.training.suppression import SuppressionConfig

MakeData = Callable[[Sequence[str] | None, torch.device], Data]
"""Data with these instructions, all of the world if None, drawn for a device."""


@dataclass(frozen=True)
class TrainingWorld:
    """Recipes of a world.

    Attributes:
        editor: Recipe of the editor.
        data: Examples with one to three instructions.
        balanced: Examples with one instruction, in which all instructions are equally frequent.
        adapter: Settings of an adapter of a kind.
        concepts: Settings of its concept sliders.
        offsets: Settings of its attribute offsets.
        few_step: Settings of its few-step LoRA.
    """

    editor: Callable[[], EditorRecipe]
    data: MakeData
    balanced: MakeData
    adapter: Callable[[Kind], SuppressionConfig]
    concepts: Callable[[], ConceptConfig]
    offsets: Callable[[], OffsetConfig]
    few_step: Callable[[], FewStepConfig]


def _shapes_data(sort: Callable[..., Data]) -> MakeData:
    def make(texts: Sequence[str] | None, device: torch.device) -> Data:
        return sort(ALL_INSTRUCTIONS if texts is None else [find_instruction(text) for text in texts])

    return make


TRAINING: dict[str, TrainingWorld] = {
    "portraits": TrainingWorld(
        editor=portraits_editor,
        data=portraits.PortraitsData,
        balanced=portraits.BalancedPortraits,
        adapter=portraits.adapter_recipe,
        concepts=portraits.concepts_recipe,
        offsets=portraits.offsets_recipe,
        few_step=portraits.few_step_recipe,
    ),
    "shapes": TrainingWorld(
        editor=shapes_editor,
        data=_shapes_data(shapes.ShapesData),
        balanced=_shapes_data(shapes.BalancedShapes),
        adapter=shapes.adapter_recipe,
        concepts=shapes.concepts_recipe,
        offsets=shapes.offsets_recipe,
        few_step=shapes.few_step_recipe,
    ),
}
