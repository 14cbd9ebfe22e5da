"""Writing of a quantised base: tensors are read, fused, quantised and written one at a time."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from slideredit_rt.adapters import Fused, Updates, read_updates
from slideredit_rt.assets import from_anywhere, resolve_base
from slideredit_rt.checkpoint import (
    CONFIG_FILE,
    INDEX_FILE,
    component_files,
    components,
    meta_transformer,
    read_weights,
)
from slideredit_rt.errors import SliderEditError
from slideredit_rt.export.linked_weights import link_or_copy
from slideredit_rt.families import family_of
from slideredit_rt.files import atomic_file, atomic_folder, read_json, user_path
from slideredit_rt.quantization.calibrate import ActivationRun, calibration_cases, measure_activations
from slideredit_rt.quantization.config import QuantizedLayer, describe_layers, read_precision
from slideredit_rt.quantization.linear import stored_parts
from slideredit_rt.quantization.precisions import PRECISIONS, Part
from slideredit_rt.quantization.selection import select_layers
from slideredit_rt.tensor_files import Stored, make_header, read_tensor, write_tensors

SHARD_BYTES = 4_000_000_000
_STEM = "diffusion_pytorch_model"
_FLOATING = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class QuantizeSettings:
    """Settings of `quantize_base`.

    Attributes:
        precision: Name of the precision, from `slideredit_rt.quantization.precisions.PRECISIONS`.
        keep: Patterns of linears that are not quantised, in which `*` stands for any characters.
        fuse: LoRAs that are added to the weights first.
        calibration: Edits that are run to find the ranges of activations; unused if the precision does not quantise them.
    """

    precision: str
    keep: tuple[str, ...] = ()
    fuse: tuple[Fused, ...] = ()
    calibration: ActivationRun = field(default_factory=ActivationRun)


@dataclass(frozen=True)
class QuantizedBase:
    """Result of `quantize_base`.

    Attributes:
        precision: Name of the precision.
        layers: Number of linears by `quant_algo`.
        kept: Number of linears that were not quantised.
        fused: Number of linears with a fused LoRA.
        ignored: Linears of text encoders that fused LoRAs also update, which were left out.
        transformer_bytes: Bytes of the transformer's weight files.
        source_bytes: Bytes of the weights that they replace.
    """

    precision: str
    layers: dict[str, int]
    kept: int
    fused: int
    ignored: tuple[str, ...]
    transformer_bytes: int
    source_bytes: int


@dataclass(frozen=True)
class _Entry:
    """A tensor of the source, and the tensors that it becomes, by name."""

    name: str
    place: Stored
    layer: QuantizedLayer | None
    outputs: dict[str, Part]

    @property
    def module(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def bytes(self) -> int:
        return sum(math.prod(part.shape) * part.dtype.itemsize for part in self.outputs.values())


def quantize_base(
    base: str | Path,
    out: Path,
    settings: QuantizeSettings,
    *,
    maxima: Mapping[str, float] | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> QuantizedBase:
    """Write a copy of a base whose transformer is quantised. Its other weights are linked to those of the original.

    Args:
        base: Embedded name, folder or hub repository of a diffusers pipeline in float32, bfloat16 or float16.
        out: Folder to create. It is written atomically.
        settings: Precision, linears to keep, LoRAs to fuse and calibration.
        maxima: Largest absolute input of each linear from an earlier `measure_activations`; None runs the calibration.
        overwrite: Replace an existing folder.
        progress: Show progress bars on standard error.

    Raises:
        SliderEditError: The base, a LoRA, the calibration, the output folder or a setting cannot be used.
    """
    folder = resolve_base(base)
    family, source = family_of(folder), folder / "transformer"
    run = settings.calibration
    read = [folder, *(user_path(lora.source) for lora in settings.fuse), *(path for path in (run.images, run.prompts) if path)]
    check_output(read, out, overwrite=overwrite)
    if (found := read_precision(source)) is not None:
        raise SliderEditError(f"base {str(folder)!r} is quantised already ({found}); pass the base that it was made from")
    family.check_base(folder)
    transformer = meta_transformer(source)
    layers = select_layers(family, transformer, settings.precision, settings.keep)
    updates = read_updates(settings.fuse, family, transformer)
    stored = read_weights(source)
    entries = _plan({name: stored[name] for name in transformer.state_dict()}, layers, source)
    check_space(out, sum(entry.bytes for entry in entries))
    calibrated = [name for name, layer in layers.items() if layer.activations]
    if calibrated and maxima is None:
        calibration_cases(settings.calibration, family, folder)
        maxima = measure_activations(family, folder, calibrated, settings.calibration, updates, progress=progress)
    with atomic_folder(out, overwrite=overwrite) as temporary:
        link_components(folder, temporary)
        target = temporary / "transformer"
        target.mkdir()
        written = _write_shards(target, entries, updates, maxima or {}, progress=progress)
        configuration = describe_layers(
            layers, settings.precision, from_anywhere(base), [from_anywhere(lora.source) for lora in settings.fuse]
        )
        with atomic_file(target / CONFIG_FILE) as file:
            file.write_text(
                json.dumps(read_json(source / CONFIG_FILE) | {"quantization_config": configuration}, indent=2) + "\n"
            )
    return QuantizedBase(
        precision=settings.precision,
        layers=dict(Counter(layer.algorithm for layer in layers.values())),
        kept=sum(isinstance(m, torch.nn.Linear) for m in transformer.modules()) - len(layers),
        fused=len(updates.pairs),
        ignored=updates.ignored,
        transformer_bytes=written,
        source_bytes=sum(entry.place.length for entry in entries),
    )


def check_output(sources: Sequence[Path], out: Path, *, overwrite: bool) -> None:
    """Refuse an output folder that exists, or that holds a source: replacing it would delete the source.

    Args:
        sources: Folders and files that are read.
        out: Folder to create.
        overwrite: Accept a folder that exists.

    Raises:
        SliderEditError: The folder cannot be used.
    """
    for source in sources:
        if out.exists() and out.resolve() in (source.resolve(), *source.resolve().parents):
            raise SliderEditError(f"{str(out)!r} holds {str(source)!r}, which is read; choose another folder with --out")
    if out.exists() and not overwrite:
        raise SliderEditError(f"{str(out)!r} exists already; choose another name or pass --overwrite")


def check_space(out: Path, needed: int) -> None:
    """Refuse to start if the disk is too small for the weights."""
    existing = next(folder for folder in out.absolute().parents if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise SliderEditError(
            f"the quantised weights take {needed / 1e9:.1f} GB, but {str(existing)!r} has {free / 1e9:.1f} GB free; free some, "
            "or choose a folder on another disk"
        )


def _plan(places: Mapping[str, Stored], layers: Mapping[str, QuantizedLayer], source: Path) -> list[_Entry]:
    """Return what becomes of each tensor, in the order in which they are stored."""
    entries = []
    for name, place in sorted(places.items(), key=lambda item: (item[1].file, item[1].offset)):
        if place.dtype not in _FLOATING:
            raise SliderEditError(
                f"checkpoint {str(source)!r} stores {name} as {place.dtype}; pass the float32, bfloat16 or float16 checkpoint "
                "that it was made from"
            )
        module, _, kind = name.rpartition(".")
        layer = layers.get(module) if kind == "weight" else None
        outputs = {name: Part(place.dtype, place.shape)}
        if layer is not None:
            parts = stored_parts(PRECISIONS[layer.precision], *place.shape, activations=layer.activations)
            outputs = {f"{module}.{suffix}": part for suffix, part in parts.items()}
        entries.append(_Entry(name, place, layer, outputs))
    return entries


def _split(entries: list[_Entry], limit: int) -> list[list[_Entry]]:
    """Split entries into shards of at most `limit` bytes."""
    shards: list[list[_Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.bytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.bytes
    return shards


def _write_shards(folder: Path, entries: list[_Entry], updates: Updates, maxima: Mapping[str, float], *, progress: bool) -> int:
    """Write the weights of the transformer, and an index if there are several shards; return their size in bytes."""
    shards = _split(entries, SHARD_BYTES)
    names = [f"{_STEM}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = [f"{_STEM}.safetensors"]
    total = sum(entry.place.length for entry in entries)
    with tqdm(total=total, desc="quantize", unit="B", unit_scale=True, disable=not progress) as bar:
        for name, shard in zip(names, shards, strict=True):
            outputs = {k: (part.dtype, part.shape) for entry in shard for k, part in entry.outputs.items()}
            tensors = _tensors(shard, updates, maxima, bar.update)
            write_tensors(folder / name, make_header(outputs, {"format": "pt"}), tensors)
    if len(shards) > 1:
        weight_map = {k: name for name, shard in zip(names, shards, strict=True) for entry in shard for k in entry.outputs}
        size = sum(entry.bytes for entry in entries)
        with atomic_file(folder / f"{_STEM}.safetensors.index.json") as file:
            file.write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}, indent=2) + "\n")
    return sum((folder / name).stat().st_size for name in names)


def _tensors(
    entries: list[_Entry], updates: Updates, maxima: Mapping[str, float], advance: Callable[[int], Any]
) -> Iterator[Tensor]:
    """Yield the tensors of a shard in the order of its header."""
    for entry in entries:
        yield from _converted(entry, updates, maxima).values()
        advance(entry.place.length)


def _converted(entry: _Entry, updates: Updates, maxima: Mapping[str, float]) -> dict[str, Tensor]:
    """Read, fuse and quantise one tensor; return its parts by name, in the order of its outputs."""
    tensor = read_tensor(entry.place)
    fused = entry.name == f"{entry.module}.weight" and entry.module in updates.pairs
    if not fused and entry.layer is None:
        return {entry.name: tensor}
    wide = updates.apply(entry.module, tensor, torch.float32) if fused else tensor.float()
    if not all(bound.isfinite() for bound in wide.aminmax()):
        raise SliderEditError(f"{entry.name} holds NaN or infinity; download the base again")
    if entry.layer is None:
        return {entry.name: wide.to(tensor.dtype)}
    precision = PRECISIONS[entry.layer.precision]
    parts = {f"{entry.module}.{suffix}": part for suffix, part in precision.quantise(wide).items()}
    if entry.layer.activations:
        parts[f"{entry.module}.input_scale"] = torch.tensor(precision.input_scale(maxima[entry.module]))
    return {name: parts[name] for name in entry.outputs}


def link_components(base: Path, out: Path) -> None:
    """Link the weights of all other components into a folder, and copy their settings and the files beside them."""
    for name, (library, _) in components(base).items():
        for file in component_files(base / name, library) if name != "transformer" else ():
            target = out / file.relative_to(base)
            target.parent.mkdir(parents=True, exist_ok=True)
            if file.suffix == ".safetensors":
                link_or_copy(file, target)
            else:
                shutil.copyfile(file, target)
    shutil.copyfile(base / INDEX_FILE, out / INDEX_FILE)
    for file in base.glob("LICENSE*"):
        shutil.copyfile(file, out / file.name)
