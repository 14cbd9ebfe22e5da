"""`manifest.json`: what an engine folder holds, what it was built from, and what it takes."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slideredit_rt.errors import SliderEditError
from slideredit_rt.families import TensorSpec
from slideredit_rt.files import folder_fingerprint, sha256
from slideredit_rt.sliders import StrengthCurve

SCHEMA_VERSION = 1
NAME = "manifest.json"


@dataclass(frozen=True)
class Manifest:
    """An engine's description.

    Attributes:
        family: base-model family.
        base: `source` (embedded name, hub repository or folder) and `fingerprint`, SHA-256 per pipeline component.
        adapter: `source`, `fingerprint`, `kind`, `rank`, `modules`, `strength_curve`, and for a bank `members`, by name, each
            with its `source` and `strength_curve`; None for an engine of the frozen backbone.
        backend, backend_version: what executes it.
        lowering: how the masked update was asked to be expressed: `native`, `folded` or `plugin`,
            or `operator`: ours, run by torch.
        targets: CUDA compute capabilities it was built for; empty for a CPU engine.
        max_batch, max_sliders: the largest B and K that it accepts.
        config: the transformer's configuration.
        inputs, outputs: names, dtypes and shapes.
        files: name to SHA-256 and size in bytes.
        created: UTC, ISO 8601.
        versions: packages that it was built with.
        ranges: smallest, usual and largest size of each axis, where the backend compiles for a range.
        dtype: of the weights and the arithmetic, torch's name; floating-point inputs and outputs stay float32.
        updates: number of adapted linears by the lowering that each ended in.
        layers: number of layers by type in the network that the builder was given, before it fused them.
        compatibility: what beside the build machine's own TensorRT version and GPU a plan takes: `versions` (bool, later ones
            of the same major) and `hardware` (`none`, `ampere_plus` or `same_compute_capability`).
        links: checkpoint files that lie in the folder as links: name to size in bytes and `kind`, `hard` or `symbolic`.
            Not hashed again: the base's fingerprint covers them.
    """

    family: str
    base: dict[str, Any]
    adapter: dict[str, Any] | None
    backend: str
    backend_version: str
    lowering: str
    targets: list[str]
    max_batch: int
    max_sliders: int
    config: dict[str, Any]
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    files: dict[str, dict[str, Any]]
    created: str
    versions: dict[str, str]
    ranges: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    dtype: str = "float32"
    updates: dict[str, int] = dataclasses.field(default_factory=dict)
    layers: dict[str, int] = dataclasses.field(default_factory=dict)
    compatibility: dict[str, Any] = dataclasses.field(default_factory=dict)
    links: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    @property
    def kind(self) -> str | None:
        return self.adapter["kind"] if self.adapter else None

    @property
    def curve(self) -> StrengthCurve:
        """From strength to alpha, as the adapter brought it."""
        return StrengthCurve.from_json(self.adapter and self.adapter.get("strength_curve"))

    @property
    def members(self) -> dict[str, StrengthCurve]:
        """A bank's members in the order of the last axis of `alpha`, each with its strength curve; empty without a bank."""
        described = (self.adapter or {}).get("members", {})
        return {name: StrengthCurve.from_json(member["strength_curve"]) for name, member in described.items()}

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def fingerprint_base(base: Path, skip: str | None = None) -> dict[str, str]:
    """SHA-256 of each component folder of a diffusers checkpoint, but for the one called `skip`."""
    folders = [f for f in sorted(base.iterdir()) if f.is_dir() and f.name != skip and not f.name.startswith(".")]
    return {folder.name: folder_fingerprint(folder) for folder in folders}


def describe_files(folder: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    """SHA-256 and size of files in an engine folder."""
    return {name: {"sha256": sha256(folder / name), "bytes": (folder / name).stat().st_size} for name in names}


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """Write the manifest as the last file of a folder that is still under its temporary name."""
    (folder / NAME).write_text(json.dumps(manifest.to_json(), indent=2) + "\n")


def read_manifest(folder: Path, *, unchecked: str | None = None) -> Manifest:
    """Read a manifest and check that the files it lists are there, whole and unchanged.

    Args:
        folder: of an engine.
        unchecked: name of a file that the caller is about to write anew.

    Raises:
        SliderEditError: not an engine folder, another schema version, or a missing, truncated or changed file.
    """
    path = folder / NAME
    try:
        data = json.loads(path.read_text())
        version = data["schema_version"]
    except FileNotFoundError:
        what = "is not an engine folder: manifest.json is missing" if folder.exists() else "does not exist"
        raise SliderEditError(f"engine {str(folder)!r} {what}; build one with slideredit-rt build") from None
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise SliderEditError(f"{str(path)!r} is damaged ({type(error).__name__}: {error}); build the engine again") from None
    if version != SCHEMA_VERSION:
        raise SliderEditError(
            f"engine {str(folder)!r} has manifest schema {version}, this version reads {SCHEMA_VERSION}; build the engine again"
        )
    try:
        specs = {
            key: [TensorSpec(s["name"], s["dtype"], tuple(s["shape"])) for s in data[key]] for key in ("inputs", "outputs")
        }
        manifest = Manifest(**(data | specs))
    except (TypeError, KeyError) as error:
        raise SliderEditError(f"{str(path)!r} is damaged ({error}); build the engine again") from None
    for name, expected in manifest.files.items():
        if name == unchecked:
            continue
        file = folder / name
        if not file.is_file():
            raise SliderEditError(f"engine {str(folder)!r} lacks its file {name}; build the engine again")
        if file.stat().st_size != expected["bytes"]:
            raise SliderEditError(
                f"engine file {str(file)!r} has {file.stat().st_size} bytes instead of {expected['bytes']}; "
                "build the engine again"
            )
        if sha256(file) != expected["sha256"]:
            raise SliderEditError(f"engine file {str(file)!r} was changed after the build; build the engine again")
    for name, expected in manifest.links.items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != expected["bytes"]:
            raise SliderEditError(
                f"engine {str(folder)!r} needs the checkpoint's file {name} as it was at the build, and it is gone or changed; "
                "build the engine again"
            )
    return manifest
