"""Reading of FP8 transformers that other tools wrote: where each tensor lies, and the scales of its linear.

Known are ModelOpt's folders, single files of ComfyUI and of Black Forest Labs, and plain files whose weights were cast to
FP8. They differ in the names of modules (diffusers' or the authors', where several linears may be the rows of one), in a
prefix of all names, and in the names of scales. Files without scales mean a scale of 1.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slideredit_rt.errors import SliderEditError
from slideredit_rt.families import Family
from slideredit_rt.quantization.config import INSTEAD, hint_for
from slideredit_rt.quantization.loading import check_scale
from slideredit_rt.tensor_files import Stored, read_header, read_tensor, take_rows

FP8 = torch.float8_e4m3fn
_FLOATING = (torch.float32, torch.bfloat16, torch.float16, FP8)
_PREFIXES = ("", "model.diffusion_model.", "diffusion_model.", "transformer.")
_WEIGHT_SCALES = ("weight_scale", "scale_weight")
_INPUT_SCALES = ("input_scale", "scale_input")
# ComfyUI's marker of scaled weights; with two elements, activations are not quantised.
_MARKER = "scaled_fp8"
_METADATA = "_quantization_metadata"
_COMFY_FORMAT = "comfy_quant"
_LONGEST_FORMAT = 4096  # bytes of a description of one linear
_WEIGHTS_ONLY = "full_precision_matrix_mult"
# Tensors that only other formats have, by the end of their names.
_OTHER_FORMATS = (
    (r"\.absmax|quant_state\.bitsandbytes__\w+", "bitsandbytes"),
    (r"\.(qweight|wscales|smooth_factor)", "nunchaku"),
    (r"\.weight_scale_2", "nvfp4"),
)


@dataclass(frozen=True)
class Rows:
    """Rows of a tensor in a file.

    Attributes:
        tensor: Name of the tensor.
        first: First row.
        last: Row after the last one.
        whole: Number of rows that the tensor must have.
    """

    tensor: str
    first: int
    last: int
    whole: int

    @property
    def module(self) -> str:
        return self.tensor.rpartition(".")[0]


@dataclass(frozen=True)
class Scales:
    """Scales of a linear with an FP8 weight.

    Attributes:
        weight: Scale of each output channel, float32 `[N]`; in the file it may be the same for all.
        input: Static scale of the activations, float32 scalar; None if they are not quantised.
    """

    weight: Tensor
    input: Tensor | None


class ForeignWeights:
    """A transformer in the files of another tool. Only headers and scales are read.

    Args:
        source: A safetensors file or the folder of a transformer.
        stored: Tensors in it, by name.
        family: Family of the transformer.
        state: Tensors that the transformer needs, by diffusers' names; may be on the `meta` device.

    Attributes:
        rows: Rows of a stored tensor that each tensor of the transformer is, by diffusers' name.
        swapped: Modules, by diffusers' name, whose output features are in the other order of halves.

    Raises:
        SliderEditError: The files are of another format or architecture.
    """

    def __init__(self, source: Path, stored: Mapping[str, Stored], family: Family, state: Mapping[str, Tensor]) -> None:
        self._source = source
        self._stored = stored
        for name in stored:
            for pattern, method in _OTHER_FORMATS:
                if re.search(rf"({pattern})$", name):
                    raise SliderEditError(
                        f"{str(source)!r} holds {name}, so it cannot be used here{hint_for(method)}; {INSTEAD}"
                    )
        own = {name: Rows(name, 0, len(tensor), len(tensor)) for name, tensor in state.items()}
        layouts = [(prefix, rows) for rows in (own, _original_rows(family, state)) for prefix in _PREFIXES]

        def lacking(layout: tuple[str, dict[str, Rows]]) -> list[str]:
            return [name for name, rows in layout[1].items() if layout[0] + rows.tensor not in stored]

        self._prefix, rows = min(layouts, key=lambda layout: len(lacking(layout)))
        if missing := lacking((self._prefix, rows)):
            what = "is not one" if len(missing) > len(state) / 2 else f"lacks {self._prefix}{rows[missing[0]].tensor}"
            raise SliderEditError(
                f"{str(source)!r} should hold a {family.name} transformer of the base's size, but {what}; pass a file that "
                "fits the base, or the base that it was made from with --base"
            )
        self.rows = {name: replace(one, tensor=self._prefix + one.tensor) for name, one in rows.items()}
        self.swapped = () if rows is own else family.swapped_halves
        self._check(state)
        self._weights_only = set(self._read_weights_only())

    def place(self, name: str) -> Stored:
        """Return where a tensor of the transformer lies, by diffusers' name."""
        rows = self.rows[name]
        return take_rows(self._stored[rows.tensor], rows.first, rows.last)

    def scales(self, module: str) -> Scales:
        """Read the scales of a linear, by diffusers' name.

        Raises:
            SliderEditError: A scale has the wrong shape or dtype, or is not a positive finite number.
        """
        rows = self.rows[f"{module}.weight"]
        weight = self._scale(rows, _WEIGHT_SCALES, (1, rows.whole))
        if weight is None:
            weight = torch.ones(1)
        weight = weight.expand(rows.whole) if len(weight) == 1 else weight
        found = None if rows.module in self._weights_only else self._scale(rows, _INPUT_SCALES, (1,))
        # Any scale rounds activations consistently, so take one that bfloat16 engines have, too.
        return Scales(
            weight[rows.first : rows.last].contiguous(), None if found is None else found[0].to(torch.bfloat16).float()
        )

    def _scale(self, rows: Rows, names: tuple[str, ...], sizes: tuple[int, ...]) -> Tensor | None:
        """Return a scale as float32 `[1]` or `[N]`, None if there is none."""
        name = next((f"{rows.module}.{name}" for name in names if f"{rows.module}.{name}" in self._stored), None)
        if name is None:
            return None
        place = self._stored[name]
        if not place.dtype.is_floating_point or math.prod(place.shape) not in sizes or max(place.shape, default=1) not in sizes:
            raise SliderEditError(
                f"{str(self._source)!r} stores {name} as {place.dtype} of shape {list(place.shape)}, but a scale per "
                f"{'tensor or output channel' if len(sizes) == 2 else 'tensor'} is expected; {INSTEAD}"
            )
        scale = read_tensor(place)
        check_scale(name, scale, self._source)
        return scale.float().flatten()

    def _check(self, state: Mapping[str, Tensor]) -> None:
        """Check dtypes and shapes, and that the files hold no further weights of a larger transformer."""
        for name, rows in self.rows.items():
            place, tensor = self._stored[rows.tensor], state[name]
            if place.dtype not in _FLOATING:
                raise SliderEditError(
                    f"{str(self._source)!r} stores {rows.tensor} as {place.dtype}, but only FP8 (float8_e4m3fn) beside wider "
                    f"floating-point numbers can be imported; {INSTEAD}"
                )
            if place.shape != (wanted := (rows.whole, *tensor.shape[1:])):
                raise SliderEditError(
                    f"{str(self._source)!r} stores {rows.tensor} with shape {list(place.shape)}, but the base needs "
                    f"{list(wanted)}; pass the base that it was made from with --base"
                )
        self._check_scale_names()
        used = {rows.tensor for rows in self.rows.values()}
        blocks = {rows.tensor.removeprefix(self._prefix).partition(".")[0] for rows in self.rows.values()}
        for name in self._stored.keys() - used:
            inner = name.removeprefix(self._prefix)
            if name.startswith(self._prefix) and inner.endswith(".weight") and inner.partition(".")[0] in blocks:
                raise SliderEditError(
                    f"{str(self._source)!r} holds {name}, which the base's transformer lacks; pass the base that it was made "
                    "from with --base"
                )

    def _check_scale_names(self) -> None:
        """Refuse tensors of an FP8 linear that are not known, such as scales under another name or for another formula."""
        known = ("weight", "bias", *_WEIGHT_SCALES, *_INPUT_SCALES, _COMFY_FORMAT)
        tensors = {rows.tensor for rows in self.rows.values()}
        modules = {rows.module for rows in self.rows.values() if self._stored[rows.tensor].dtype == FP8}
        for name in self._stored:
            module, _, part = name.rpartition(".")
            if module in modules and part not in known and name not in tensors:
                raise SliderEditError(
                    f"{str(self._source)!r} holds {name} beside an FP8 weight, and what it means is not known; {INSTEAD}"
                )

    def _read_weights_only(self) -> Iterator[str]:
        """Yield the modules, by their names in the files, whose activations ComfyUI would not quantise."""
        marker = self._stored.get(self._prefix + _MARKER)
        if marker is not None and math.prod(marker.shape) == 2:
            yield from {rows.module for rows in self.rows.values()}
        for file in sorted({place.file for place in self._stored.values()}):
            # The format of linears is read from their tensors, so a damaged description may be ignored.
            with suppress(ValueError, AttributeError, TypeError, RecursionError):
                metadata = json.loads(read_header(file)[1][8:]).get("__metadata__", {})
                for module, entry in json.loads(metadata.get(_METADATA, "{}")).get("layers", {}).items():
                    if _is_weights_only(entry):
                        yield self._prefix + module.removeprefix(self._prefix)
        for name, place in self._stored.items():
            if name.endswith(f".{_COMFY_FORMAT}") and place.dtype == torch.uint8 and place.length <= _LONGEST_FORMAT:
                with suppress(ValueError, AttributeError, RecursionError):
                    if _is_weights_only(json.loads(bytes(read_tensor(place).tolist()))):
                        yield name.removesuffix(f".{_COMFY_FORMAT}")


def _is_weights_only(entry: Any) -> bool:
    return bool(entry.get(_WEIGHTS_ONLY))


def _original_rows(family: Family, state: Mapping[str, Tensor]) -> dict[str, Rows]:
    """Return the rows that each tensor is in files with the names of the model's authors."""
    names = {part: (theirs, parts) for theirs, parts in family.original_names.items() for part in parts}
    found = {}
    for name, tensor in state.items():
        numbers = re.findall(r"\.(\d+)\.", name)[:1]
        pattern = re.sub(r"\.\d+\.", ".{}.", name, count=1)
        module, _, suffix = pattern.rpartition(".")
        if pattern in names:
            theirs, parts = names[pattern]
        elif module in names:
            theirs, parts = (f"{names[module][0]}.{suffix}", tuple(f"{part}.{suffix}" for part in names[module][1]))
        else:
            theirs, parts = pattern, (pattern,)
        sizes = {part: len(state[part.format(*numbers)]) for part in parts}
        first = sum(sizes[part] for part in parts[: parts.index(pattern)])
        found[name] = Rows(theirs.format(*numbers), first, first + len(tensor), sum(sizes.values()))
    return found
