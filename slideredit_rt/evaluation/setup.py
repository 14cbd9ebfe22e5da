"""Setup of an evaluation: a base, its adapters and engines, and sliders trained for it by rival methods."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from pathlib import Path

import torch

from slideredit_rt.adapters import Adapter, load_adapter
from slideredit_rt.assets import resolve_base
from slideredit_rt.editor import SliderEditor
from slideredit_rt.engines.manifest import read_manifest
from slideredit_rt.errors import SliderEditError
from slideredit_rt.export.build import build_engine
from slideredit_rt.families import Family, family_of
from slideredit_rt.settings import RunSettings


@dataclass(frozen=True)
class SliderEngine:
    """An engine with one adapter. It exists already, or is built when it is first opened.

    Attributes:
        kind: Kind of its adapter, `st` or `gst`.
        stem: Name of the adapter or engine, which can be part of a file name.
        origin: Adapter or engine as the user named it.
        fingerprint: Fingerprint of the adapter and its strength curve.
        open: Function that returns the editor, the same one every time.
    """

    kind: str
    stem: str
    origin: str
    fingerprint: str
    open: Callable[[], SliderEditor]


@dataclass(frozen=True)
class Setup:
    """Inputs of `slideredit-rt evaluate`, loaded on first use.

    Attributes:
        base: Base checkpoint of every adapter.
        out: Folder of the run. Engines are built in its subfolder `engines`.
        adapters: Adapters; an engine is built for each.
        engines: Engine folders written by `slideredit-rt build`, with the same base.
        run: Device, threads and options of the engines. Systems in eager torch use the same device.
        concepts: Bank of concept sliders, from `slideredit-rt train concepts`. With None, `run_evaluation` uses the embedded
            bank for the embedded base on scenes of its world, and leaves the system out if there is none.
        offsets: File of attribute offsets, from `slideredit-rt train offsets`. None is treated as for `concepts`.
    """

    base: str
    out: Path
    adapters: Sequence[str] = ()
    engines: Sequence[Path] = ()
    run: RunSettings = field(default_factory=RunSettings)
    concepts: str | None = None
    offsets: str | None = None

    @cached_property
    def folder(self) -> Path:
        """Folder of the base."""
        return resolve_base(self.base)

    @cached_property
    def eager(self) -> tuple[torch.device, torch.dtype]:
        """Device and dtype of systems that run in eager torch: those of the encoders and the autoencoder beside the engines."""
        device = self.open_any().device
        return device, self.run.choose_dtype(device)

    @cached_property
    def family(self) -> Family:
        """Family of the base."""
        return family_of(self.folder)

    @cached_property
    def loaded(self) -> list[Adapter]:
        """Loaded adapters, in the order given."""
        return [load_adapter(source, self.family) for source in self.adapters]

    def adapters_of(self, kind: str) -> list[Adapter]:
        """Return the adapters of a kind, in the order given. Adapters inside `engines` are not included."""
        return [adapter for adapter in self.loaded if adapter.kind == kind]

    @cached_property
    def slider_engines(self) -> list[SliderEngine]:
        """Engines of the adapters, then the existing engines; at least one.

        Raises:
            SliderEditError: Neither an adapter nor an engine was given, two have the same name, or one has no sliders or
                holds a bank.
        """
        found = [self._of_adapter(source, adapter) for source, adapter in zip(self.adapters, self.loaded, strict=True)]
        found += [self._of_folder(folder) for folder in self.engines]
        if not found:
            raise SliderEditError("there is nothing to evaluate; pass --adapter, such as portraits-st, or --engine")
        if twice := [stem for stem, count in Counter(engine.stem for engine in found).items() if count > 1]:
            raise SliderEditError(
                f"two adapters or engines are named {twice[0]!r}; rename one, because systems are named after them"
            )
        return found

    def open_any(self) -> SliderEditor:
        """Open an engine for systems that leave its sliders at 1 and change another input."""
        return self.slider_engines[0].open()

    def build(self, adapter: Adapter, name: str) -> SliderEditor:
        """Build an ONNX Runtime engine named `name` and open it.

        An engine left by a killed run is built again. That takes seconds, and its adapter may have changed since.
        """
        path = self.out / "engines" / name
        build_engine(self.base, adapter, path, overwrite=True, progress=False)
        return SliderEditor.from_engine(path, self.base, self.run)

    def _of_adapter(self, source: str, adapter: Adapter) -> SliderEngine:
        if adapter.members:
            raise SliderEditError(
                f"adapter {source!r} is a bank; pass each member's file, or pass concept sliders as --concepts"
            )
        stem = _safe(Path(source).stem)
        # The adapter's fingerprint covers the weights only, but the curve changes the images as well.
        fingerprint = f"{adapter.fingerprint} {json.dumps(adapter.curve.to_json())}"
        return SliderEngine(adapter.kind, stem, source, fingerprint, cache(partial(self.build, adapter, stem)))

    def _of_folder(self, folder: Path) -> SliderEngine:
        manifest = read_manifest(folder)
        if manifest.adapter is None or manifest.kind is None:
            raise SliderEditError(f"engine {str(folder)!r} was built without an adapter and has no sliders; leave it out")
        if manifest.members:
            raise SliderEditError(f"engine {str(folder)!r} has a bank of adapters; evaluate each member's file instead")
        fingerprint = f"{manifest.adapter['fingerprint']} {json.dumps(manifest.curve.to_json())}"
        open_it = cache(partial(SliderEditor.from_engine, folder, self.base, self.run))
        return SliderEngine(manifest.kind, _safe(folder.resolve().name), str(folder), fingerprint, open_it)


def _safe(name: str) -> str:
    """Replace characters that cannot be part of a file name."""
    return re.sub(r"[^\w.-]+", "_", name)
