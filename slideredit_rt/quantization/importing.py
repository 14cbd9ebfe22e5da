"""Import of FP8 transformers that other tools wrote: a base whose weights are the file itself, linked.

The folder has an index of shards with a list of slices (see `slideredit_rt.checkpoint.SLICES`), because a fused projection of
the file is several linears of the transformer. One more shard holds what cannot be linked: a scale per output channel, and
tensors whose halves are swapped, FP8 tensors that are not the weight of a quantised linear, and tensors of another dtype.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from slideredit_rt.assets import resolve_base
from slideredit_rt.checkpoint import CONFIG_FILE, INDEX_FILE, SLICES, meta_transformer, read_weights
from slideredit_rt.errors import SliderEditError
from slideredit_rt.export.linked_weights import link_or_copy
from slideredit_rt.families import Family, family_of
from slideredit_rt.files import atomic_file, atomic_folder, read_json
from slideredit_rt.quantization.config import INSTEAD, QuantizedLayer, describe_layers, hint_for
from slideredit_rt.quantization.foreign import FP8, ForeignWeights, Scales
from slideredit_rt.quantization.precisions import Part
from slideredit_rt.quantization.write import check_output, check_space, link_components
from slideredit_rt.tensor_files import Stored, make_header, read_header, read_tensor, write_tensors

_SHARD = "diffusion_pytorch_model-{:05d}-of-{:05d}.safetensors"
_INDEX = "diffusion_pytorch_model.safetensors.index.json"


@dataclass(frozen=True)
class ImportedBase:
    """Result of `import_base`.

    Attributes:
        layers: Number of quantised linears by `quant_algo`.
        kept: Number of other linears.
        linked_bytes: Bytes of the weights that stay where they lie in the source.
        converted_bytes: Bytes of the tensors that were written.
        links: True if the source's files are hard-linked, false if they had to be copied.
    """

    layers: dict[str, int]
    kept: int
    linked_bytes: int
    converted_bytes: int
    links: bool


@dataclass(frozen=True)
class _Converted:
    """A tensor to write, and a function that returns it."""

    part: Part
    read: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        return math.prod(self.part.shape) * self.part.dtype.itemsize


@dataclass(frozen=True)
class _Plan:
    """Tensors of a transformer by their own names: the places of those that are linked, and conversions of the others."""

    layers: dict[str, QuantizedLayer]
    linked: dict[str, Stored]
    converted: dict[str, _Converted]


def import_base(source: Path, base: str | Path | None, out: Path, *, overwrite: bool = False) -> ImportedBase:
    """Write a base whose transformer is an FP8 file or folder of another tool. Weights are linked where possible.

    Args:
        source: safetensors file with a transformer, folder of a transformer, or folder of a pipeline.
        base: Embedded name, folder or hub repository of the base that the file was made from. Everything but the weights of
            the transformer is taken from it. None if `source` is the folder of a pipeline.
        out: Folder to create. It is written atomically.
        overwrite: Replace an existing folder.

    Raises:
        SliderEditError: The source is of another format or does not fit the base, a scale is not a positive finite number, or
            the base or the output folder cannot be used.
    """
    if base is None and not (source / INDEX_FILE).exists():
        raise SliderEditError(f"{str(source)!r} is a transformer alone; pass the base that it was made from with --base")
    folder = resolve_base(source if base is None else base)
    check_output([source, folder], out, overwrite=overwrite)
    family = family_of(folder)
    family.check_base(folder, transformer=False)
    transformer = meta_transformer(folder / "transformer", {})
    weights = ForeignWeights(source, _read_stored(source), family, transformer.state_dict())
    plan = _plan(weights, family, transformer, source)
    files = sorted({place.file for place in plan.linked.values()})
    check_space(out, sum(one.bytes for one in plan.converted.values()))
    with atomic_folder(out, overwrite=overwrite) as temporary:
        link_components(folder, temporary)
        target = temporary / "transformer"
        target.mkdir()
        links = _write(target, plan, weights, files)
        configuration = read_json(folder / "transformer" / CONFIG_FILE)
        configuration["quantization_config"] = describe_layers(plan.layers, "fp8")
        with atomic_file(target / CONFIG_FILE) as file:
            file.write_text(json.dumps(configuration, indent=2) + "\n")
    return ImportedBase(
        layers=dict(Counter(layer.algorithm for layer in plan.layers.values())),
        kept=sum(isinstance(module, nn.Linear) for module in transformer.modules()) - len(plan.layers),
        linked_bytes=sum(place.length for place in plan.linked.values()),
        converted_bytes=sum(one.bytes for one in plan.converted.values()),
        links=links,
    )


def _read_stored(source: Path) -> dict[str, Stored]:
    """Return the tensors of a file or folder, by name."""
    if not source.exists():
        raise SliderEditError(f"{str(source)!r} does not exist; pass a safetensors file or a folder that you downloaded")
    if source.is_dir():
        return read_weights(source / "transformer" if (source / INDEX_FILE).exists() else source)
    if source.suffix != ".safetensors":
        raise SliderEditError(f"{str(source)!r} is not a safetensors file{hint_for(source.suffix.strip('.'))}; {INSTEAD}")
    return read_header(source)[0]


def _plan(weights: ForeignWeights, family: Family, transformer: nn.Module, source: Path) -> _Plan:
    """Choose the linears that stay quantised, and what is linked. Scales are read and checked."""
    linears = {name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)}
    dtypes = {weights.place(name).dtype for name in weights.rows} - {FP8}
    dtype = dtypes.pop() if dtypes in ({torch.float32}, {torch.bfloat16}) else torch.bfloat16
    plan = _Plan({}, {}, {})
    for name in weights.rows:
        place, (module, _, suffix) = weights.place(name), name.rpartition(".")
        scales = weights.scales(module) if module in linears and suffix == "weight" else None
        quantised = family.rows_of(module) is not None or family.is_modulation(module)
        if scales is not None and place.dtype == FP8 and quantised:
            plan.layers[module] = QuantizedLayer("fp8", activations=scales.input is not None)
            plan.linked[name] = place
            plan.converted.update({f"{module}.{part}": one for part, one in _stored_scales(scales).items()})
        elif place.dtype == dtype and module not in weights.swapped and _is_plain(scales):
            plan.linked[name] = place
        else:
            swap = module in weights.swapped
            plan.converted[name] = _Converted(Part(dtype, place.shape), _reading(place, scales, dtype, swap=swap))
    if not plan.layers:
        raise SliderEditError(
            f"{str(source)!r} holds no FP8 weights of projections; quantise a base with slideredit-rt quantize instead"
        )
    return plan


def _is_plain(scales: Scales | None) -> bool:
    """Return whether a weight is what its file says, without a scale."""
    return scales is None or bool((scales.weight == 1).all())


def _stored_scales(scales: Scales) -> dict[str, _Converted]:
    """Return the scales of a quantised linear, by the names of its parts."""
    found = {"weight_scale": scales.weight} | ({} if scales.input is None else {"input_scale": scales.input})
    parts = {name: Part(scale.dtype, tuple(scale.shape)) for name, scale in found.items()}
    return {name: _Converted(parts[name], partial(torch.clone, scale)) for name, scale in found.items()}


def _reading(place: Stored, scales: Scales | None, dtype: torch.dtype, *, swap: bool) -> Callable[[], Tensor]:
    """Return a function that reads a tensor and converts it."""

    def read() -> Tensor:
        wide = read_tensor(place).float()
        if scales is not None:
            wide = wide * scales.weight[:, None]
        if swap:
            wide = torch.cat(wide.chunk(2)[::-1])
        return wide.to(dtype)

    return read


def _write(folder: Path, plan: _Plan, weights: ForeignWeights, files: list[Path]) -> bool:
    """Link the source's files and write the other tensors and the index; return whether all files are links."""
    count = len(files) + 1
    # Converted tensors come first: where names meet, readers of whole files take the first.
    own, *names = [_SHARD.format(number + 1, count) for number in range(count)]
    shards = dict(zip(files, names, strict=True))
    links = [link_or_copy(file, folder / name) is not None for file, name in shards.items()]
    header = make_header({name: (one.part.dtype, one.part.shape) for name, one in plan.converted.items()}, {"format": "pt"})
    write_tensors(folder / own, header, _tensors(plan.converted))
    slices = {}
    for name, place in plan.linked.items():
        rows = weights.rows[name]
        if rows.tensor != name or place.shape[0] != rows.whole:
            slices[name] = {"tensor": rows.tensor, "rows": [rows.first, rows.last]}
    weight_map = dict.fromkeys(plan.converted, own) | {name: shards[place.file] for name, place in plan.linked.items()}
    size = sum(os.path.getsize(folder / name) for name in (own, *names))
    with atomic_file(folder / _INDEX) as file:
        index = {"metadata": {"total_size": size}, "weight_map": weight_map, SLICES: slices}
        file.write_text(json.dumps(index, indent=2) + "\n")
    return all(links)


def _tensors(converted: Mapping[str, _Converted]) -> Iterator[Tensor]:
    for one in converted.values():
        yield one.read()
