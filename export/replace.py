"""Replacement of an engine's adapter without a rebuild."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from slideredit_rt.adapters import AdapterSource, load_adapters, save_adapter
from slideredit_rt.engines.manifest import ADAPTER_FILE, Manifest, describe_files, read_manifest, write_manifest
from slideredit_rt.errors import SliderEditError
from slideredit_rt.export.build import describe_adapter
from slideredit_rt.export.linked_weights import replace_adapter
from slideredit_rt.families import get_family


def replace_engine_adapter(folder: Path, source: AdapterSource) -> Manifest:
    """Replace the adapter of an engine that reads it from a separate file, and update the manifest.

    For an engine with adapter inputs, this is its default adapter.

    Running processes that have the engine open keep the old adapter. If the replacement is interrupted between the two writes,
    the new adapter does not match the old manifest; `read_manifest` then refuses the engine, and another call repairs it.

    Args:
        folder: Folder written by `slideredit-rt build` for a backend that keeps the adapter in a separate file.
        source: Embedded name, file or folder of an adapter of the same kind and modules, and the same or a lower rank; for a
            bank, as many of these as it has members, or a bank's file.

    Returns:
        The new manifest.

    Raises:
        SliderEditError: The folder is not an engine or has no separate adapter file, or the adapter does not fit.
    """
    manifest = read_manifest(folder, unchecked=ADAPTER_FILE)
    if manifest.adapter is None and not manifest.adapter_inputs:
        raise SliderEditError(
            f"engine {str(folder)!r} was built without an adapter and has no sliders; rebuild it with --adapter"
        )
    if ADAPTER_FILE not in manifest.files and not manifest.adapter_inputs:
        raise SliderEditError(
            f"engine {str(folder)!r} has no {ADAPTER_FILE}, because {manifest.backend} compiled its adapter into the engine; "
            "build it again with the new adapter"
        )
    family = get_family(manifest.family)
    adapter = load_adapters(source, family)
    if layout := manifest.layout:
        layout.check(adapter, family)
        save_adapter(adapter, folder / ADAPTER_FILE, dtype=torch.float32)
    else:
        replace_adapter(folder, adapter)
    files = manifest.files | describe_files(folder, [ADAPTER_FILE])
    manifest = dataclasses.replace(manifest, adapter=describe_adapter(adapter), files=files)
    write_manifest(manifest, folder)
    return manifest
