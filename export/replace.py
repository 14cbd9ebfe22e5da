"""Give an engine another adapter without building it again."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from slideredit_rt.adapters import AdapterSource, load_adapters
from slideredit_rt.engines.manifest import ADAPTER_FILE, Manifest, describe_files, read_manifest, write_manifest
from slideredit_rt.errors import SliderEditError
from slideredit_rt.export.build import describe_adapter
from slideredit_rt.export.linked_weights import replace_adapter
from slideredit_rt.families import get_family


def replace_engine_adapter(folder: Path, source: AdapterSource) -> Manifest:
    """Swap the adapter of an engine whose graph reads it from a file of its own, and describe the new one in the manifest.

    Running processes that have the engine open keep the old adapter. An interruption leaves the old pair of adapter and
    manifest, the new one, or the new adapter beside the old manifest, which `read_manifest` refuses and another call repairs.

    Args:
        folder: written by `slideredit-rt build`, of a backend that reads the graph itself.
        source: embedded name, file or folder of an adapter of the same kind and modules, of the same rank or a lower one; for a
            bank, as many as it has members, or a bank's own file.

    Returns:
        The new manifest.

    Raises:
        SliderEditError: not an engine, one without an adapter file of its own, or an adapter that does not fit it.
    """
    manifest = read_manifest(folder, unchecked=ADAPTER_FILE)
    if manifest.adapter is None:
        raise SliderEditError(
            f"engine {str(folder)!r} was built without an adapter and has no sliders; rebuild it with --adapter"
        )
    if ADAPTER_FILE not in manifest.files:
        raise SliderEditError(
            f"engine {str(folder)!r} holds no {ADAPTER_FILE}, its adapter is inside what {manifest.backend} compiled; "
            "build it again with the new one"
        )
    adapter = load_adapters(source, get_family(manifest.family))
    replace_adapter(folder, adapter)
    files = manifest.files | describe_files(folder, [ADAPTER_FILE])
    manifest = dataclasses.replace(manifest, adapter=describe_adapter(adapter), files=files)
    write_manifest(manifest, folder)
    return manifest
