"""Read an adapter from the formats that it comes in."""

from __future__ import annotations

import pickle
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from slideredit_rt.adapters.adapter import Adapter, Member, bank_adapters
from slideredit_rt.adapters.layouts import Layout, Pair, read_layout, with_diffusers_names
from slideredit_rt.adapters.scales import Statement, metadata_statements, module_scale, peft_statement, read_settings
from slideredit_rt.adapters.writing import DIFFUSERS_FILE, PEFT_CONFIG, PEFT_FILE
from slideredit_rt.assets import resolve_adapter
from slideredit_rt.errors import SliderEditError
from slideredit_rt.families import FAMILIES, KINDS, Family, Kind, get_family
from slideredit_rt.sliders import StrengthCurve

_FOLDER_FILES = (DIFFUSERS_FILE, PEFT_FILE, "adapter_model.bin")

AdapterSource = str | Path | Adapter | Sequence[str | Path]
"""An adapter: an embedded name, a file, a folder, or what was loaded from one. Several files make a bank."""


def load_adapters(source: AdapterSource, family: Family | None = None) -> Adapter:
    """Whatever names an adapter, loaded: as `load_adapter` for one, a bank for several files.

    A bank's members are called as their files or folders without the suffix, or as the embedded names.

    Raises:
        SliderEditError: as `load_adapter` and `bank_adapters`.
    """
    if isinstance(source, Adapter):
        return source
    if isinstance(source, str | Path):
        return load_adapter(source, family)
    if len(source) == 1:
        return load_adapter(source[0], family)
    return bank_adapters([load_adapter(one, family) for one in source], [resolve_adapter(one).stem for one in source])


def _is_safetensors(path: Path) -> bool:
    """By its name or, whatever its name, by its content: the length of a JSON header, then the header."""
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
            f"adapter {str(path)!r} is not a file of plain tensors and was not unpickled; "
            "convert it to safetensors on a machine where you trust it"
        ) from None
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise SliderEditError(
            f"adapter {str(path)!r} holds no dictionary of tensors; give the dictionary that the trainer saved"
        )
    return state


def _members(metadata: Mapping[str, str], ranks: Mapping[str, int], source: str | Path, path: Path) -> dict[str, Member]:
    """Those of a bank, as its file names them."""
    if "members" not in metadata:
        return {}
    stored = read_settings(metadata["members"], "list of members", path)
    if not stored or any(rank % len(stored) for rank in ranks.values()):
        raise SliderEditError(
            f"adapter {str(source)!r} is a bank of {len(stored)} members and has ranks that these do not share evenly; "
            "save or download it again"
        )
    return {name: Member(str(source), StrengthCurve.from_json(curve)) for name, curve in stored.items()}


def _curve(metadata: Mapping[str, str], path: Path) -> StrengthCurve:
    if "strength_curve" not in metadata:
        return StrengthCurve()
    return StrengthCurve.from_json(read_settings(metadata["strength_curve"], "strength curve", path))


def _recognise(modules: Collection[str], family: Family | None, source: str | Path) -> Family:
    """The family whose linears these are; refuses an adapter for another one than `family`."""
    known = {name: sum(f.rows_of(module) is not None for module in modules) for name, f in FAMILIES.items()}
    best = [name for name, count in known.items() if count == max(known.values())]
    if not any(known.values()):
        raise SliderEditError(
            f"adapter {str(source)!r} updates no linear that a slider may touch (its first is {min(modules)}); "
            f"give an adapter for {family.name if family else ' or '.join(FAMILIES)}"
        )
    if family is None:
        if len(best) > 1:
            raise SliderEditError(f"adapter {str(source)!r} fits {' and '.join(best)} by its names; say which with --base")
        return FAMILIES[best[0]]
    if known.get(family.name, 0) < known[best[0]]:
        odd = next(m for m in sorted(modules) if family.rows_of(m) is None and FAMILIES[best[0]].rows_of(m) is not None)
        raise SliderEditError(
            f"adapter {str(source)!r} is for {best[0]}, not for {family.name}: it updates {odd}; "
            f"use it with a {best[0]} base, or give an adapter that was trained on this one"
        )
    return family


def load_adapter(source: str | Path, family: Family | None = None, *, mixed_dtypes: bool = False) -> Adapter:
    """Read an adapter.

    Formats: safetensors as diffusers writes them (`transformer.` prefix or not, stored alphas, `lora_adapter_metadata` or
    neither), as kohya's scripts, OneTrainer, ComfyUI, XLabs and Black Forest Labs name them, a PEFT folder or the file in it
    (`rank_pattern`, `alpha_pattern`, `use_rslora` included), a `torch.save`d dictionary of tensors (read with `weights_only`),
    and the embedded names. Ranks may differ between modules. A scale counts wherever it is stated: beside the tensors, in
    PEFT's configuration or in the metadata.

    Args:
        family: of the base. None recognises it by the metadata or by the names of the linears.
        mixed_dtypes: accept a file whose tensors are not all of one dtype.

    Raises:
        SliderEditError: no such file, not a plain LoRA on the base's own weights, an A that does not fit its B, a scale that is
            unknown or stated in two ways, another family's, of mixed dtypes, or with values that are not finite.
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
    pairs, named_for = with_diffusers_names(_scaled(layout, ranks, statements, source), source)
    if family and named_for and family.name != named_for.name:
        raise SliderEditError(
            f"adapter {str(source)!r} is for {named_for.name}, not for {family.name}: so are its linears named"
        )
    family = _recognise(pairs, family or named_for, source)
    ranks = {module: len(a) for module, (a, _) in pairs.items()}
    return Adapter(
        family=family.name,
        kind=_kind(pairs, metadata, family, source),
        rank=max(ranks.values()),
        pairs=pairs,
        source=str(source),
        training=read_settings(metadata.get("training", "{}"), "training record", path),
        curve=_curve(metadata, path),
        dtype="+".join(stored_dtypes),
        members=_members(metadata, ranks, source, path),
        ignored=layout.ignored,
    )


def _file_of(source: str | Path) -> Path:
    """The file that holds the tensors of what names an adapter."""
    path = resolve_adapter(source)
    if path.is_dir():
        found = next((path / name for name in _FOLDER_FILES if (path / name).exists()), None)
        if found is None:
            raise SliderEditError(
                f"folder {str(path)!r} holds none of {', '.join(_FOLDER_FILES)}; give the adapter's file or folder"
            )
        return found
    if not path.exists():
        raise SliderEditError(f"adapter {str(source)!r} does not exist; give a file, a PEFT folder, shapes-st or shapes-gst")
    return path


def _read(path: Path, source: str | Path) -> tuple[dict[str, Tensor], dict[str, str], list[Statement]]:
    """A file's tensors and metadata, and what these and a configuration beside the file state about scales."""
    statements = []
    config = path.with_name(PEFT_CONFIG)
    if path.name in _FOLDER_FILES and config.is_file():
        settings = read_settings(config.read_bytes(), PEFT_CONFIG, path)
        statements.append(peft_statement(settings, "configuration", source))
    if not _is_safetensors(path):
        return _read_torch(path), {}, statements
    state, metadata = _read_safetensors(path)
    return state, metadata, [*statements, *metadata_statements(metadata, source, path)]


def _scaled(layout: Layout, ranks: Mapping[str, int], statements: Sequence[Statement], source: str | Path) -> dict[str, Pair]:
    """A and B of each module under the file's own names, in float32, its scale folded into B."""
    scaled = {}
    for module, parts in layout.halves.items():
        alpha = layout.alphas.get(module)
        if layout.alphas and alpha is None and not statements:
            raise SliderEditError(
                f"adapter {str(source)!r} stores alphas, but none for {module}, so its scale is unknown; "
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
    """The kind that the file states, or that follows from the rows of its linears."""
    rows = {family.rows_of(module) for module in modules} - {None}
    kind = metadata.get("kind", "st" if rows == {"text"} else "gst")
    if kind not in KINDS:
        raise SliderEditError(f"adapter {str(source)!r} is of the unknown kind {kind!r}; known: {', '.join(KINDS)}")
    return kind


def _stated_family(metadata: Mapping[str, str], family: Family | None, source: str | Path) -> Family | None:
    stated = metadata.get("family")
    if stated is None:
        return family
    if family is not None and stated != family.name:
        raise SliderEditError(f"adapter {str(source)!r} was trained for {stated}, not for {family.name}")
    return get_family(stated)


def _rank(module: str, parts: Mapping[str, Tensor], source: str | Path) -> int:
    if set(parts) != {"A", "B"}:
        raise SliderEditError(
            f"adapter {str(source)!r} is incomplete at {module}: lora_{'B' if 'A' in parts else 'A'} is missing; "
            "save or download it again"
        )
    a, b = parts["A"], parts["B"]
    if a.ndim != 2 or b.ndim != 2 or not (a.is_floating_point() and b.is_floating_point()):
        raise SliderEditError(
            f"adapter {str(source)!r} has no matrices of floating-point numbers at {module} "
            f"({a.dtype} {list(a.shape)}, {b.dtype} {list(b.shape)}); give an adapter for linears that is not quantised"
        )
    if len(a) != b.shape[1] or not len(a):
        raise SliderEditError(
            f"adapter {str(source)!r} has a lora_A of rank {len(a)} and a lora_B of rank {b.shape[1]} at {module}; "
            "they must agree and be 1 or more: save or download it again"
        )
    return len(a)
