"""What an evaluation compares systems on: a base, adapters and engines for it, and sliders that were trained for it."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path

from slideredit_rt.adapters import Adapter, load_adapter
from slideredit_rt.assets import resolve_base
from slideredit_rt.editor import SliderEditor
from slideredit_rt.engines.manifest import read_manifest
from slideredit_rt.errors import SliderEditError
from slideredit_rt.export.build import build_engine
from slideredit_rt.families import Family, family_of


@dataclass(frozen=True)
class SliderEngine:
    """An engine with one adapter: one that is there, or one that is built when it is first opened.

    Attributes:
        kind: kind of its adapter, `st` or `gst`.
        stem: name of the adapter or engine; file-name safe.
        origin: the adapter or engine as it was given.
        fingerprint: adapter and strength curve.
        open: returns the editor, the same one every time.
    """

    kind: str
    stem: str
    origin: str
    fingerprint: str
    open: Callable[[], SliderEditor]


@dataclass(frozen=True)
class Setup:
    """What `slideredit-rt evaluate` was given, read when a system first asks for it.

    Attributes:
        base: checkpoint that every adapter is for.
        out: folder of the run; engines are built in its subfolder `engines`.
        adapters: an engine is built for each.
        engines: folders written by `slideredit-rt build`, of the same base.
        threads: CPU threads of the engines; None leaves the choice to the backend.
        concepts: a bank of concept sliders, from `slideredit-rt train concepts`. None takes the embedded one for the embedded
            base on scenes of its own world, and none elsewhere.
        offsets: a file of attribute offsets, from `slideredit-rt train offsets`; None as for `concepts`.
    """

    base: str
    out: Path
    adapters: Sequence[str] = ()
    engines: Sequence[Path] = ()
    threads: int | None = None
    concepts: str | None = None
    offsets: str | None = None

    @cached_property
    def folder(self) -> Path:
        """Folder of the base."""
        return resolve_base(self.base)

    @cached_property
    def family(self) -> Family:
        """Family of the base."""
        return family_of(self.folder)

    @cached_property
    def loaded(self) -> list[Adapter]:
        """The adapters, in the order given."""
        return [load_adapter(source, self.family) for source in self.adapters]

    def adapters_of(self, kind: str) -> list[Adapter]:
        """The adapters of a kind, in the order given; not those that stand in engines."""
        return [adapter for adapter in self.loaded if adapter.kind == kind]

    @cached_property
    def slider_engines(self) -> list[SliderEngine]:
        """An engine per adapter, then the engines that are there; one or more.

        Raises:
            SliderEditError: none was given, two have one name, or one has no sliders or a bank's.
        """
        found = [self._of_adapter(source, adapter) for source, adapter in zip(self.adapters, self.loaded, strict=True)]
        found += [self._of_folder(folder) for folder in self.engines]
        if not found:
            raise SliderEditError("nothing to evaluate was given; pass --adapter, such as shapes-st, or --engine")
        if twice := [stem for stem, count in Counter(engine.stem for engine in found).items() if count > 1]:
            raise SliderEditError(
                f"two adapters or engines are called {twice[0]!r}; rename one, since systems go by these names"
            )
        return found

    def open_any(self) -> SliderEditor:
        """An engine for systems that leave its sliders at 1 and move another input."""
        return self.slider_engines[0].open()

    def build(self, adapter: Adapter, name: str) -> SliderEditor:
        """Build an ONNX Runtime engine called `name` and open it.

        The engine of a killed run is built anew: it takes seconds, and its adapter may have changed since.
        """
        path = self.out / "engines" / name
        build_engine(self.base, adapter, path, overwrite=True, progress=False)
        return SliderEditor.from_engine(path, self.base, threads=self.threads)

    def _of_adapter(self, source: str, adapter: Adapter) -> SliderEngine:
        if adapter.members:
            raise SliderEditError(
                f"adapter {source!r} is a bank; give its members' own files, or concept sliders as --concepts"
            )
        stem = _safe(Path(source).stem)
        # The curve is no part of the weights, and moves the images all the same.
        fingerprint = f"{adapter.fingerprint} {json.dumps(adapter.curve.to_json())}"
        return SliderEngine(adapter.kind, stem, source, fingerprint, cache(partial(self.build, adapter, stem)))

    def _of_folder(self, folder: Path) -> SliderEngine:
        manifest = read_manifest(folder)
        if manifest.adapter is None or manifest.kind is None:
            raise SliderEditError(f"engine {str(folder)!r} was built without an adapter and has no sliders; leave it out")
        if manifest.members:
            raise SliderEditError(f"engine {str(folder)!r} has a bank of adapters; evaluate its members' own files")
        fingerprint = f"{manifest.adapter['fingerprint']} {json.dumps(manifest.curve.to_json())}"
        open_it = cache(partial(SliderEditor.from_engine, folder, self.base, threads=self.threads))
        return SliderEngine(manifest.kind, _safe(folder.resolve().name), str(folder), fingerprint, open_it)


def _safe(name: str) -> str:
    """A name that can be part of a file name."""
    return re.sub(r"[^\w.-]+", "_", name)
