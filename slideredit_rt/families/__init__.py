"""Base-model families, by name and by diffusers pipeline class."""

from __future__ import annotations

from pathlib import Path

from slideredit_rt.checkpoint import read_index
from slideredit_rt.errors import SliderEditError
from slideredit_rt.families.base import (
    KINDS,
    Backbone,
    Conditioning,
    EncodedImages,
    Family,
    Kind,
    Reader,
    RowSet,
    Schedule,
    TensorSpec,
)
from slideredit_rt.families.flux2 import Flux2
from slideredit_rt.families.flux2_kv import Flux2KV
from slideredit_rt.families.flux_kontext import FluxKontext
from slideredit_rt.families.qwen_image_edit import QwenImageEdit

FAMILIES: dict[str, Family] = {family.name: family for family in (FluxKontext(), QwenImageEdit(), Flux2(), Flux2KV())}

__all__ = [
    "FAMILIES",
    "KINDS",
    "Backbone",
    "Conditioning",
    "EncodedImages",
    "Family",
    "Kind",
    "Reader",
    "RowSet",
    "Schedule",
    "TensorSpec",
    "families_by_name",
    "family_of",
    "get_family",
]


def get_family(name: str) -> Family:
    """Return the family named `name`.

    Raises:
        SliderEditError: There is no such family.
    """
    if name not in FAMILIES:
        raise SliderEditError(f"unknown family {name!r}; known: {', '.join(FAMILIES)}")
    return FAMILIES[name]


def families_by_name(wanted: Family | None = None) -> dict[str, Family]:
    """Return the families that the names of linears tell apart: without variants, apart from the wanted family."""
    return {name: family for name, family in FAMILIES.items() if family.variant_of is None or family is wanted}


def family_of(base: Path) -> Family:
    """Return the family of a diffusers checkpoint folder, from the pipeline class in its `model_index.json`.

    Raises:
        SliderEditError: The folder is not a checkpoint, or belongs to no known family.
    """
    pipeline_class = read_index(base)["_class_name"]
    for family in FAMILIES.values():
        if pipeline_class in family.pipeline_classes:
            return family
    known = ", ".join(name for family in FAMILIES.values() for name in family.pipeline_classes)
    raise SliderEditError(f"base {str(base)!r} is a {pipeline_class}, which is not supported; supported: {known}")
