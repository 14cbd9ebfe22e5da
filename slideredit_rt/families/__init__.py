"""Base-model families, by name and by the diffusers pipeline they belong to."""

from __future__ import annotations

import json
from pathlib import Path

from slideredit_rt.errors import SliderEditError
from slideredit_rt.families.base import KINDS, Conditioning, Family, Kind, RowSet, TensorSpec
from slideredit_rt.families.flux_kontext import FluxKontext
from slideredit_rt.families.qwen_image_edit import QwenImageEdit

FAMILIES: dict[str, Family] = {family.name: family for family in (FluxKontext(), QwenImageEdit())}

__all__ = ["FAMILIES", "KINDS", "Conditioning", "Family", "Kind", "RowSet", "TensorSpec", "family_of", "get_family"]


def get_family(name: str) -> Family:
    """The family called `name`."""
    if name not in FAMILIES:
        raise SliderEditError(f"unknown family {name!r}; known: {', '.join(FAMILIES)}")
    return FAMILIES[name]


def family_of(base: Path) -> Family:
    """The family of a diffusers checkpoint folder, from the pipeline class in its `model_index.json`."""
    index = base / "model_index.json"
    try:
        pipeline_class = json.loads(index.read_text())["_class_name"]
    except FileNotFoundError:
        what = "is not a diffusers checkpoint: model_index.json is missing" if base.exists() else "does not exist"
        raise SliderEditError(
            f"base {str(base)!r} {what}; give a folder saved with save_pretrained, or shapes-kontext"
        ) from None
    except (KeyError, ValueError, UnicodeDecodeError) as error:
        raise SliderEditError(
            f"{str(index)!r} is not a diffusers model index ({error}); download the checkpoint again"
        ) from None
    for family in FAMILIES.values():
        if pipeline_class in family.pipeline_classes:
            return family
    known = ", ".join(name for family in FAMILIES.values() for name in family.pipeline_classes)
    raise SliderEditError(f"base {str(base)!r} is a {pipeline_class}, which no family here knows; known: {known}")
