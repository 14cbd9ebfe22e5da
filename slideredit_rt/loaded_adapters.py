"""`LoadedAdapters`, which keeps the adapters of an engine with adapter inputs on its device."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from slideredit_rt.adapters import Adapter, AdapterSource, load_adapters
from slideredit_rt.assets import resolve_adapter
from slideredit_rt.engines import Engine, Manifest
from slideredit_rt.engines.adapter_inputs import AdaptedEngine
from slideredit_rt.errors import SliderEditError
from slideredit_rt.families import get_family
from slideredit_rt.sliders import Controls

LOADED_BYTES = 2**30
"""Default memory for the adapters that an engine keeps on its device."""


@dataclass(frozen=True)
class LoadedAdapter:
    """One adapter on the device of an engine with adapter inputs.

    Attributes:
        key: Equal for the same adapter only.
        engine: The engine with this adapter.
        controls: Kind and strength curve of its sliders.
        tensors: Adapter inputs on the engine's device.
    """

    key: Hashable
    engine: AdaptedEngine
    controls: Controls
    tensors: tuple[Tensor, ...]

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


class LoadedAdapters:
    """Thread-safe least-recently-used cache of the adapters of one engine. Each is read once while it is kept.

    A file that was changed is read again. An adapter that is dropped while edits use it is freed after them.

    Args:
        engine: Engine with adapter inputs.
        manifest: Manifest of the engine.
        max_bytes: Device memory for all adapters together. The adapter used last is always kept.

    Attributes:
        loads: Number of adapters that were read and copied to the device.
    """

    def __init__(self, engine: Engine, manifest: Manifest, max_bytes: int = LOADED_BYTES) -> None:
        layout = manifest.layout
        assert layout is not None
        self.engine = engine
        self.manifest = manifest
        self.max_bytes = max_bytes
        self.loads = 0
        self._layout = layout
        self._lock = threading.Lock()
        self._kept: OrderedDict[Hashable, LoadedAdapter] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def bytes(self) -> int:
        """Memory of the adapters that are kept."""
        return sum(one.bytes for one in self._kept.values())

    def of(self, source: AdapterSource) -> LoadedAdapter:
        """Return an adapter on the engine's device.

        Args:
            source: Embedded name, file or folder of an adapter, or a loaded one.

        Raises:
            SliderEditError: The adapter cannot be read, the engine cannot run it (see `AdapterInputs.check`), or the device has
                no memory left for it.
        """
        key = _key(source)
        with self._lock:
            if key not in self._kept:
                adapter = self._read(source)
                # Before the copy, so that the device never holds more than `max_bytes`.
                while self._kept and self.bytes + self._layout.bytes > self.max_bytes:
                    self._kept.popitem(last=False)
                self._kept[key] = self._load(key, adapter)
                self.loads += 1
            self._kept.move_to_end(key)
            return self._kept[key]

    def _read(self, source: AdapterSource) -> Adapter:
        family, dtype = get_family(self.manifest.family), getattr(torch, self.manifest.dtype)
        adapter = load_adapters(source, family)
        self._layout.check(adapter, family)
        if not all(tensor.to(dtype).isfinite().all() for pair in adapter.pairs.values() for tensor in pair):
            raise SliderEditError(
                f"adapter {adapter.source!r} has values that are not finite in {self.manifest.dtype}, the engine's dtype; "
                "train or download it again"
            )
        return adapter

    def _load(self, key: Hashable, adapter: Adapter) -> LoadedAdapter:
        tensors = self._layout.pack(adapter, self.engine.device)
        engine, controls = AdaptedEngine(self.engine, self.manifest, tensors), Controls(adapter.kind, adapter.curve)
        return LoadedAdapter(key, engine, controls, tuple(tensors.values()))


def _key(source: AdapterSource) -> Hashable:
    """Return a key for an adapter: what a loaded one consists of, else its paths with sizes and times of change."""
    if isinstance(source, Adapter):
        return source.fingerprint, source.family, source.kind, repr(source.curve)
    if not isinstance(source, str | Path):
        return tuple(map(_key, source))
    path = resolve_adapter(source).resolve()
    try:
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        return str(path), tuple((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files)
    except OSError:
        return str(path)  # reading it will say what is wrong
