"""Readers for all adapter formats."""

from __future__ import annotations

import pickle
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from slideredit_rt.adapters.adapter import Adapter, Member, bank_adapters
from slideredit_rt.adapters.layouts import Layout, Pair, fits_several, read_layout, with_diffusers_names
from slideredit_rt.adapters.scales import Statement, metadata_statements, module_scale, peft_statement, read_settings
from slideredit_rt.adapters.writing import DIFFUSERS_FILE, PEFT_CONFIG, PEFT_FILE
from slideredit_rt.assets import resolve_adapter
from slideredit_rt.errors import SliderEditError
from slideredit_rt.families import FAMILIES, KINDS, Family, Kind, families_by_name, get_family
from slideredit_rt.strength import StrengthCurve

FOLDER_FILES = (DIFFUSERS_FILE, PEFT_FILE, "adapter_model.bin")
"""Names of an adapter's file in a folder, in order of preference."""

AdapterSource = str | Path | Adapter | Sequence[str | Path]
"""An adapter: an embedded name, a file, a folder, or a loaded `Adapter`. Several files make a bank."""


def load_adapters(source: AdapterSource, family: Family | None = None) -> Adapter:
    """Load one adapter with `load_adapter`, or several files as a bank.

    A bank's members are named after their files or folders without the suffix, or by their embedded names.

    Args:
        source: Adapter or adapters; a loaded `Adapter` is returned as it is.
        family: Family of the base; None recognises it.

    Raises:
        SliderEditError: See `load_adapter` and `bank_adapters`.
    """
    if isinstance(source, Adapter):
        return source
    if isinstance(source, str | Path):
        return load_adapter(source, family)
    if len(source) == 1:
        return load_adapter(source[0], family)
    return bank_adapters([load_adapter(one, family) for one in source], [resolve_adapter(one).stem for one in source])


def _is_safetensors(path: Path) -> bool:
    """Return whether a file is safetensors by its suffix, or by its content: a JSON header after its 8-byte length."""
    try:
        with path.open("rb") as file:
            return path.suffix == ".safetensors" or file.read(9)[8:] == b"{"
    except OSError as error:
        raise SliderEditError(f"cannot read adapter {str(path)!r}: {error.strerror}") from None


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise SliderEditError(f"adapter {str(path)!r} is not a readable safetensors file ({error})") from None


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError):
        raise SliderEditError(
            f"adapter {str(path)!r} is not a file of plain tensors, so it was not unpickled; "
            "convert it to safetensors on a machine where you trust it"
        ) from None
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise SliderEditError(
            f"adapter {str(path)!r} does not contain a dictionary of tensors; use the dictionary that the trainer saved"
        )
    return state


def _members(
    metadata: Mapping[str, str], ranks: Mapping[str, int], kind: Kind, source: str | Path, path: Path
) -> dict[str, Member]:
    """Return the members of a bank as its metadata lists them; empty for a single adapter.

    Members whose kind is not listed have the bank's `kind`.

    Raises:
        SliderEditError: The metadata is damaged, a kind is unknown, or a bank of kind `st` has a `gst` member.
    """
    if "members" not in metadata:
        return {}
    stored = read_settings(metadata["members"], "list of members", path)
    if not stored or any(rank % len(stored) for rank in ranks.values()):
        raise SliderEditError(
            f"adapter {str(source)!r} is a bank of {len(stored)} members, but its ranks cannot be divided evenly among them; "
            "save or download it again"
        )
    kinds = dict.fromkeys(stored, kind) | read_settings(metadata.get("member_kinds", "{}"), "kinds of members", path)
    if odd := next((name for name in stored if kinds[name] not in KINDS), None):
        raise SliderEditError(
            f"adapter {str(source)!r} has the member {odd!r} of the unknown kind {kinds[odd]!r}; known kinds: "
            f"{', '.join(KINDS)}"
        )
    if kind == "st" and (wide := next((name for name in stored if kinds[name] == "gst"), None)):
        raise SliderEditError(
            f"adapter {str(source)!r} is a bank of kind st, but its member {wide!r} is gst and scales image rows as well; make "
            "the bank again from the files of its members"
        )
    return {name: Member(str(source), kinds[name], StrengthCurve.from_json(curve)) for name, curve in stored.items()}


def _curve(metadata: Mapping[str, str], path: Path) -> StrengthCurve:
    if "strength_curve" not in metadata:
        return StrengthCurve()
    return StrengthCurve.from_json(read_settings(metadata["strength_curve"], "strength curve", path))


def _recognise(modules: Collection[str], family: Family | None, source: str | Path) -> Family:
    """Return the family that these linears belong to. Refuse an adapter whose family is not `family`."""
    known = {name: sum(f.rows_of(module) is not None for module in modules) for name, f in families_by_name(family).items()}
    best = [name for name, count in known.items() if count == max(known.values())]
    if not any(known.values()):
        raise SliderEditError(
            f"adapter {str(source)!r} updates no linear that sliders can scale (first module: {min(modules)}); "
            f"use an adapter for {family.name if family else ' or '.join(FAMILIES)}"
        )
    if family is None:
        if len(best) > 1:
            raise fits_several(best, source)
        return FAMILIES[best[0]]
    if known.get(family.name, 0) < known[best[0]]:
        odd = next(m for m in sorted(modules) if family.rows_of(m) is None and FAMILIES[best[0]].rows_of(m) is not None)
        raise SliderEditError(
            f"adapter {str(source)!r} is for {best[0]}, not for {family.name}: it updates {odd}; "
            f"use it with a {best[0]} base, or use an adapter that was trained on this one"
        )
    return family


def load_adapter(source: str | Path, family: Family | None = None, *, mixed_dtypes: bool = False) -> Adapter:
    """Read an adapter.

    Supported formats:

    - safetensors with the names of diffusers (with or without the `transformer.` prefix, alphas and `lora_adapter_metadata`),
      kohya's scripts, OneTrainer, ComfyUI, XLabs and Black Forest Labs;
    - a PEFT folder or its file, including `rank_pattern`, `alpha_pattern` and `use_rslora`;
    - a `torch.save`d dictionary of tensors, read with `weights_only`;
    - the embedded names, such as `portraits-st`.

    Ranks may differ between modules. The scale is read from alphas beside the tensors, PEFT's configuration and the metadata,
    which must agree.

    Args:
        source: File, folder or embedded name.
        family: Family of the base. None recognises it by the metadata or the names of the linears.
        mixed_dtypes: Accept a file whose tensors have several dtypes.

    Raises:
        SliderEditError: The file does not exist, is not a plain LoRA on the base's own weights, belongs to another family,
            mixes dtypes or has values that are not finite; an A does not fit its B; a scale is unknown or contradictory.
    """
    path = _file_of(source)
    state, metadata, statements = _read(path, source)
    layout = read_layout(state, source)
    ranks = {module: _rank(module, parts, source) for module, parts in layout.halves.items()}
    stored_dtypes = sorted({str(t.dtype).removeprefix("torch.") for parts in layout.halves.values() for t in parts.values()})
    if len(stored_dtypes) > 1 and not mixed_dtypes:
        raise SliderEditError(
            f"adapter {str(source)!r} mixes {' and '.join(stored_dtypes)}; choose one with "
            "slideredit-rt adapter convert --dtype"
        )
    family = _stated_family(metadata, family, source)
    stated = metadata.get("family")
    pairs, named_for = with_diffusers_names(_scaled(layout, ranks, statements, source), family, source)
    family = _recognise(pairs, family or named_for, source)
    ranks = {module: len(a) for module, (a, _) in pairs.items()}
    kind = _kind(pairs, metadata, family, source)
    return Adapter(
        family=stated or family.name,
        kind=kind,
        rank=max(ranks.values()),
        pairs=pairs,
        source=str(source),
        training=read_settings(metadata.get("training", "{}"), "training record", path),
        curve=_curve(metadata, path),
        dtype="+".join(stored_dtypes),
        members=_members(metadata, ranks, kind, source, path),
        ignored=layout.ignored,
    )


def _file_of(source: str | Path) -> Path:
    """Return the file that holds the tensors of an adapter, which may be a file, a folder or an embedded name."""
    path = resolve_adapter(source)
    if path.is_dir():
        found = next((path / name for name in FOLDER_FILES if (path / name).exists()), None)
        if found is None:
            raise SliderEditError(
                f"folder {str(path)!r} contains none of {', '.join(FOLDER_FILES)}; pass the adapter's file or folder"
            )
        return found
    if not path.exists():
        raise SliderEditError(
            f"adapter {str(source)!r} does not exist; pass a file, a PEFT folder or a name such as portraits-st"
        )
    return path


def _read(path: Path, source: str | Path) -> tuple[dict[str, Tensor], dict[str, str], list[Statement]]:
    """Read a file's tensors and metadata, and the scales stated in the metadata and in a configuration beside the file."""
    statements = []
    config = path.with_name(PEFT_CONFIG)
    if path.name in FOLDER_FILES and config.is_file():
        settings = read_settings(config.read_bytes(), PEFT_CONFIG, path)
        statements.append(peft_statement(settings, "configuration", source))
    if not _is_safetensors(path):
        return _read_torch(path), {}, statements
    state, metadata = _read_safetensors(path)
    return state, metadata, [*statements, *metadata_statements(metadata, source, path)]


def _scaled(layout: Layout, ranks: Mapping[str, int], statements: Sequence[Statement], source: str | Path) -> dict[str, Pair]:
    """Return A and B of each module, under the file's own names, in float32, with the scale folded into B."""
    scaled = {}
    for module, parts in layout.halves.items():
        alpha = layout.alphas.get(module)
        if layout.alphas and alpha is None and not statements:
            raise SliderEditError(
                f"adapter {str(source)!r} stores alphas for other modules but none for {module}, so its scale is unknown; "
                "save or download it again"
            )
        scale = module_scale(module, ranks[module], alpha, statements, source)
        pair = parts["A"].float().contiguous(), (parts["B"].float() * scale).contiguous()
        if not all(torch.isfinite(t).all() for t in pair):
            raise SliderEditError(
                f"adapter {str(source)!r} has values at {module} that are not finite; train or download it again"
            )
        scaled[module] = pair
    return scaled


def _kind(modules: Collection[str], metadata: Mapping[str, str], family: Family, source: str | Path) -> Kind:
    """Return the kind that the file states or, if it states none, the kind that follows from the rows of its linears."""
    rows = {family.rows_of(module) for module in modules} - {None}
    kind = metadata.get("kind", "st" if rows == {"text"} else "gst")
    if kind not in KINDS:
        raise SliderEditError(f"adapter {str(source)!r} has the unknown kind {kind!r}; known kinds: {', '.join(KINDS)}")
    return kind


def _stated_family(metadata: Mapping[str, str], family: Family | None, source: str | Path) -> Family | None:
    stated = metadata.get("family")
    if stated is None:
        return family
    if family is not None and stated not in (family.name, family.variant_of):
        raise SliderEditError(
            f"adapter {str(source)!r} was trained for {stated}, not for {family.name}; use it with a {stated} base"
        )
    return family or get_family(stated)


def _rank(module: str, parts: Mapping[str, Tensor], source: str | Path) -> int:
    if set(parts) != {"A", "B"}:
        raise SliderEditError(
            f"adapter {str(source)!r} is incomplete at {module}: lora_{'B' if 'A' in parts else 'A'} is missing; "
            "save or download it again"
        )
    a, b = parts["A"], parts["B"]
    if a.ndim != 2 or b.ndim != 2 or not (a.is_floating_point() and b.is_floating_point()):
        raise SliderEditError(
            f"adapter {str(source)!r} does not have two floating-point matrices at {module} "
            f"({a.dtype} {list(a.shape)}, {b.dtype} {list(b.shape)}); use an adapter for linears that is not quantised"
        )
    if len(a) != b.shape[1] or not len(a):
        raise SliderEditError(
            f"adapter {str(source)!r} has a lora_A of rank {len(a)} and a lora_B of rank {b.shape[1]} at {module}; "
            "both must be the same and at least 1; save or download it again"
        )
    return len(a)
