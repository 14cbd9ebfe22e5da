"""Adapters: the trained A/B pairs, read from the formats they come in, compared with a base, and written in each format."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import pickle
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from slideredit_rt.assets import resolve_adapter
from slideredit_rt.errors import SliderEditError
from slideredit_rt.families import FAMILIES, KINDS, Family, Kind, RowSet, get_family
from slideredit_rt.files import atomic_file, atomic_folder
from slideredit_rt.sliders import StrengthCurve

Format = Literal["canonical", "diffusers", "peft", "slideredit-st"]
"""`canonical`: one safetensors file with metadata, which diffusers loads, too. `diffusers`: a folder with that file under the
name that `load_lora_weights` looks for. `peft`: a folder for `PeftModel.from_pretrained`. `slideredit-st`: the `torch.save`d
dictionary of the authors' ST trainer."""
FORMATS: tuple[Format, ...] = ("canonical", "diffusers", "peft", "slideredit-st")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
_PEFT_FILE, _PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_FOLDER_FILES = (_DIFFUSERS_FILE, _PEFT_FILE, "adapter_model.bin")
_PREFIX = re.compile(r"^(transformer\.|base_model\.model\.|diffusion_model\.)+")
_KEY = re.compile(r"^(?P<module>.+)\.lora_(?P<part>[AB])(\.(?P<adapter>[\w-]+))?\.weight$")


@dataclass(frozen=True)
class Member:
    """One adapter of a bank: where it came from, and its map from strength to alpha."""

    source: str
    curve: StrengthCurve = field(default_factory=StrengthCurve)


@dataclass(frozen=True)
class Adapter:
    """A low-rank update per linear, or a bank of several whose strengths are set one by one.

    Attributes:
        family: base-model family it was trained for.
        kind: `st` or `gst`.
        rank: the largest R, of all members of a bank together.
        pairs: module name to (A `[R, K]`, B `[N, R]`), float32, `lora_alpha / r` folded into B. In a bank of G members every
            R is a multiple of G and each member has R/G rows of A and columns of B, in the members' order.
        source: where it came from, for messages.
        training: how it was trained, as far as the file says.
        curve: from strength to alpha; found by `slideredit-rt adapter calibrate`, else `alpha = 1 − strength`.
        dtype: of the tensors as they were stored; several, joined by "+", where they were mixed.
        members: of a bank, by name (`bank_adapters`); empty for a single adapter. A bank's own `curve` maps nothing.
    """

    family: str
    kind: Kind
    rank: int
    pairs: dict[str, tuple[Tensor, Tensor]]
    source: str
    training: dict[str, Any] = field(default_factory=dict)
    curve: StrengthCurve = field(default_factory=StrengthCurve)
    dtype: str = "float32"
    members: dict[str, Member] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over members, module names, shapes and values, independent of the file format."""
        digest = hashlib.sha256()
        for member in self.members:
            digest.update(f"{member}\n".encode())
        for name in sorted(self.pairs):
            for tensor in self.pairs[name]:
                digest.update(f"{name}{tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().float().contiguous().numpy().tobytes())
        return digest.hexdigest()

    @property
    def targets(self) -> list[str]:
        """Names of the updated linears with `*` for the block: `transformer_blocks.*.attn.add_q_proj`."""
        return sorted({_target(name) for name in self.pairs})

    def without(self, modules: Collection[str]) -> Adapter:
        """The adapter less some of its modules."""
        pairs = {name: pair for name, pair in self.pairs.items() if name not in modules}
        return dataclasses.replace(self, pairs=pairs, rank=max((len(a) for a, _ in pairs.values()), default=0))


AdapterSource = str | Path | Adapter | Sequence[str | Path]
"""An adapter: an embedded name, a file, a folder, or what was loaded from one. Several files make a bank."""


def fill_ranks(adapter: Adapter, ranks: Mapping[str, int]) -> Adapter:
    """The same update with higher ranks: rows of zeros below each A and columns of zeros beside each B, in every member.

    Args:
        ranks: by module; a multiple of the number of members. Lower ones than a module has change nothing.
    """
    count = len(adapter.members) or 1
    pairs = {}
    for name, (a, b) in adapter.pairs.items():
        more = max(ranks[name] - len(a), 0) // count
        each_a, each_b = a.unflatten(0, (count, -1)), b.unflatten(1, (count, -1))
        pairs[name] = (
            nn.functional.pad(each_a, (0, 0, 0, more)).flatten(0, 1),
            nn.functional.pad(each_b, (0, more)).flatten(1, 2),
        )
    return dataclasses.replace(adapter, pairs=pairs, rank=max(len(a) for a, _ in pairs.values()))


def bank_adapters(adapters: Sequence[Adapter], names: Sequence[str]) -> Adapter:
    """One adapter whose members keep strengths of their own: A's stacked, B's side by side.

    In every module each member is filled with zeros to the largest rank that one of them has there; a member that leaves a
    module alone has zeros.

    Args:
        adapters: single ones, of one family and kind.
        names: of the members, all different.

    Raises:
        SliderEditError: no adapter, a bank among them, two families or kinds, an empty name or one that comes twice, or sizes
            that belong to different bases.
    """
    if not adapters or len(adapters) != len(names):
        raise SliderEditError(f"a bank needs one name per adapter, got {len(adapters)} adapters and {len(names)} names")
    first = adapters[0]
    for adapter in adapters:
        if adapter.members:
            raise SliderEditError(f"adapter {adapter.source!r} is a bank already; give its members' own files")
        if (adapter.family, adapter.kind) != (first.family, first.kind):
            raise SliderEditError(
                f"adapters {first.source!r} ({first.family}, {first.kind}) and {adapter.source!r} ({adapter.family}, "
                f"{adapter.kind}) cannot share an engine; give adapters of one family and one kind"
            )
    if twice := next((name for name, count in Counter(names).items() if count > 1 or not name.strip()), None):
        raise SliderEditError(f"two adapters would be called {twice!r} in the bank; rename one of the files")
    modules = dict.fromkeys(name for adapter in adapters for name in adapter.pairs)
    pairs = {}
    for module in modules:
        found = [adapter.pairs.get(module) for adapter in adapters]
        shapes = {(a.shape[1], b.shape[0]) for a, b in filter(None, found)}
        if len(shapes) > 1:
            raise SliderEditError(
                f"the adapters update {module} as if it were {' and '.join(f'{n}×{k}' for k, n in sorted(shapes))}; "
                "give adapters that were trained on one base"
            )
        ((k, n),) = shapes
        rank = max(len(a) for a, _ in filter(None, found))
        filled = [pair or (torch.zeros(0, k), torch.zeros(n, 0)) for pair in found]
        pairs[module] = (
            torch.cat([nn.functional.pad(a, (0, 0, 0, rank - len(a))) for a, _ in filled]),
            torch.cat([nn.functional.pad(b, (0, rank - b.shape[1])) for _, b in filled], dim=1),
        )
    return Adapter(
        family=first.family,
        kind=first.kind,
        rank=max(len(a) for a, _ in pairs.values()),
        pairs=pairs,
        source=", ".join(adapter.source for adapter in adapters),
        training={name: adapter.training for name, adapter in zip(names, adapters, strict=True)},
        dtype="+".join(sorted({adapter.dtype for adapter in adapters})),
        members={name: Member(a.source, a.curve) for name, a in zip(names, adapters, strict=True)},
    )


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


def _target(module: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", module, count=1)


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


def _settings(text: str | bytes, what: str, path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(text)
        if not isinstance(settings, dict):
            raise ValueError("no JSON object")
    except ValueError as error:
        raise SliderEditError(
            f"the {what} of adapter {str(path)!r} cannot be read ({error}); save or download it again"
        ) from None
    return settings


def _members(metadata: Mapping[str, str], ranks: Mapping[str, int], source: str | Path, path: Path) -> dict[str, Member]:
    """Those of a bank, as its file names them."""
    if "members" not in metadata:
        return {}
    stored = _settings(metadata["members"], "list of members", path)
    if not stored or any(rank % len(stored) for rank in ranks.values()):
        raise SliderEditError(
            f"adapter {str(source)!r} is a bank of {len(stored)} members and has ranks that these do not share evenly; "
            "save or download it again"
        )
    return {name: Member(str(source), StrengthCurve.from_json(curve)) for name, curve in stored.items()}


def _curve(metadata: Mapping[str, str], path: Path) -> StrengthCurve:
    if "strength_curve" not in metadata:
        return StrengthCurve()
    return StrengthCurve.from_json(_settings(metadata["strength_curve"], "strength curve", path))


def _by_pattern(patterns: Any, module: str, default: Any) -> Any:
    """PEFT's rule for `rank_pattern` and `alpha_pattern`: the first pattern that matches the end of the module's name."""
    return next((value for pattern, value in (patterns or {}).items() if re.match(rf"(.*\.)?({pattern})$", module)), default)


def _stored_scale(module: str, rank: int, settings: Mapping[str, Any], source: str | Path) -> float:
    """`lora_alpha / r` from a PEFT configuration (its patterns and `use_rslora` included)."""
    try:
        stated = int(_by_pattern(settings.get("rank_pattern"), module, settings.get("r", rank)))
        alpha = float(_by_pattern(settings.get("alpha_pattern"), module, settings.get("lora_alpha", rank)))
    except (TypeError, ValueError, AttributeError, re.error) as error:
        raise SliderEditError(
            f"adapter {str(source)!r} has an unreadable rank or alpha for {module} in its configuration ({error}); "
            "save or download it again"
        ) from None
    if stated != rank:
        raise SliderEditError(
            f"adapter {str(source)!r} has rank {rank} at {module} and its configuration says {stated}, so its scale is "
            "unknown; save or download it again"
        )
    return alpha / (rank**0.5 if settings.get("use_rslora") else rank)


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
    neither), a PEFT folder (`rank_pattern`, `alpha_pattern`, `use_rslora` included), a `torch.save`d dictionary of
    tensors (read with `weights_only`), and the embedded names. Ranks may differ between modules.

    Args:
        family: of the base. None recognises it by the metadata or by the names of the linears.
        mixed_dtypes: accept a file whose tensors are not all of one dtype.

    Raises:
        SliderEditError: no such file, not a plain LoRA, an A that does not fit its B, another family's, of mixed dtypes, or
            with values that are not finite.
    """
    path = resolve_adapter(source)
    settings: dict[str, Any] = {}
    if path.is_dir():
        config = path / _PEFT_CONFIG
        if config.exists():
            settings = _settings(config.read_bytes(), _PEFT_CONFIG, path)
        found = next((path / name for name in _FOLDER_FILES if (path / name).exists()), None)
        if found is None:
            raise SliderEditError(
                f"folder {str(path)!r} holds none of {', '.join(_FOLDER_FILES)}; give the adapter's file or folder"
            )
        path = found
    if not path.exists():
        raise SliderEditError(f"adapter {str(source)!r} does not exist; give a file, a PEFT folder, shapes-st or shapes-gst")
    metadata: dict[str, str] = {}
    if _is_safetensors(path):
        state, metadata = _read_safetensors(path)
        if "lora_adapter_metadata" in metadata:
            stored = _settings(metadata["lora_adapter_metadata"], "lora_adapter_metadata", path)
            settings = {key.removeprefix("transformer."): value for key, value in stored.items()}
    else:
        state = _read_torch(path)

    halves, alphas = _halves(state, source)
    if settings.get("use_dora"):
        raise SliderEditError(f"adapter {str(source)!r} is a DoRA, which no slider can scale; give a plain LoRA")
    family = _recognise(halves, _stated_family(metadata, family, source), source)
    ranks = {module: _rank(module, parts, source) for module, parts in halves.items()}
    stored_dtypes = sorted({str(t.dtype).removeprefix("torch.") for parts in halves.values() for t in parts.values()})
    if len(stored_dtypes) > 1 and not mixed_dtypes:
        raise SliderEditError(
            f"adapter {str(source)!r} mixes {' and '.join(stored_dtypes)}; choose one with "
            "slideredit-rt adapter convert --dtype"
        )
    pairs = {}
    for module, parts in halves.items():
        rank = ranks[module]
        scale = alphas[module] / rank if module in alphas else _stored_scale(module, rank, settings, source)
        pairs[module] = (parts["A"].float().contiguous(), (parts["B"].float() * scale).contiguous())
        if not all(torch.isfinite(t).all() for t in pairs[module]):
            raise SliderEditError(
                f"adapter {str(source)!r} has values at {module} that are not finite; train or download it again"
            )
    rows = {family.rows_of(module) for module in pairs} - {None}
    kind = metadata.get("kind", "st" if rows == {"text"} else "gst")
    if kind not in KINDS:
        raise SliderEditError(f"adapter {str(source)!r} is of the unknown kind {kind!r}; known: {', '.join(KINDS)}")
    return Adapter(
        family=family.name,
        kind=kind,
        rank=max(ranks.values()),
        pairs=pairs,
        source=str(source),
        training=_settings(metadata.get("training", "{}"), "training record", path),
        curve=_curve(metadata, path),
        dtype="+".join(stored_dtypes),
        members=_members(metadata, ranks, source, path),
    )


def _halves(state: Mapping[str, Tensor], source: str | Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, float]]:
    """A and B of each module, and the alphas stored beside them."""
    halves: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, float] = {}
    other = []
    names = set()
    for key, tensor in state.items():
        name = _PREFIX.sub("", key)
        if match := _KEY.match(name):
            halves.setdefault(match["module"], {})[match["part"]] = tensor
            names.add(match["adapter"])
        elif name.endswith(".alpha") and tensor.numel() == 1:
            alphas[name.removesuffix(".alpha")] = float(tensor)
        else:
            other.append(key)
    if not halves:
        raise SliderEditError(f"adapter {str(source)!r} holds no lora_A/lora_B weights; give a LoRA file")
    if other:
        raise SliderEditError(
            f"adapter {str(source)!r} holds {min(other)}, which is no lora_A, lora_B or alpha; "
            "only plain LoRA can be scaled by a slider, not DoRA, biases or whole weights"
        )
    if len(names) > 1:
        raise SliderEditError(f"adapter {str(source)!r} holds {len(names)} adapters; save the one to use by itself")
    return halves, alphas


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


@dataclass(frozen=True)
class AdapterMatch:
    """An adapter's modules beside a base's, by name.

    Attributes:
        matched: linears of the base that the adapter updates.
        missing: linears of the family's standard targets that the adapter leaves alone. Adapters on fewer targets are
            legitimate: this is for information.
        unexpected: modules of the adapter that the base lacks or that no slider may touch: without them it would not do what
            it was trained to do.
        mismatched: modules of the adapter whose linear is of another size in the base: it belongs to another base.
    """

    matched: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[str, ...]


def match_adapter(adapter: Adapter, family: Family, transformer: nn.Module) -> AdapterMatch:
    """Compare an adapter with a diffusers transformer, which may be on the `meta` device."""
    linears = {name: m for name, m in transformer.named_modules() if isinstance(m, nn.Linear) and family.rows_of(name)}
    standard = family.targets(adapter.kind)
    fits = {
        name: (b.shape[0], a.shape[1]) == (linears[name].out_features, linears[name].in_features)
        for name, (a, b) in adapter.pairs.items()
        if name in linears
    }
    return AdapterMatch(
        matched=tuple(name for name, same in fits.items() if same),
        missing=tuple(name for name in linears if standard.fullmatch(name) and name not in adapter.pairs),
        unexpected=tuple(name for name in adapter.pairs if name not in linears),
        mismatched=tuple(name for name, same in fits.items() if not same),
    )


def fit_adapter(adapter: Adapter, family: Family, transformer: nn.Module, *, allow_partial: bool = False) -> Adapter:
    """The adapter as it can be put into `transformer`.

    Args:
        allow_partial: drop modules that the transformer lacks instead of refusing the adapter.

    Raises:
        SliderEditError: modules that the transformer lacks, none that it has, or a linear of another size.
    """
    match = match_adapter(adapter, family, transformer)
    if match.mismatched:
        name = match.mismatched[0]
        (a, b), linear = adapter.pairs[name], transformer.get_submodule(name)
        raise SliderEditError(
            f"adapter {adapter.source!r} has a {b.shape[0]}×{a.shape[1]} update for {name}, which is "
            f"{linear.out_features}×{linear.in_features}; use an adapter that was trained on this base"
        )
    if match.unexpected and not (allow_partial and match.matched):
        names = f"{', '.join(match.unexpected[:4])}{', …' if len(match.unexpected) > 4 else ''}"
        raise SliderEditError(
            f"adapter {adapter.source!r} fits {len(match.matched)} of its {len(adapter.pairs)} modules onto this {family.name} "
            f"transformer; not found: {names}; use an adapter that was trained on this base"
            + (", or drop these with --allow-partial" if match.matched else "")
        )
    return adapter.without(match.unexpected)


def adapter_report(adapter: Adapter) -> dict[str, Any]:
    """What an adapter is, for JSON: ranks, targets with their rows, sizes and norms, metadata.

    A norm is the Frobenius norm of B·A, over all modules of a target or of the adapter.
    """
    family = get_family(adapter.family)
    targets: dict[str, dict[str, Any]] = {}
    squares: defaultdict[str, float] = defaultdict(float)
    for name, (a, b) in adapter.pairs.items():
        rows: RowSet | None = family.rows_of(name)
        target = targets.setdefault(_target(name), {"rows": rows, "modules": 0, "ranks": set()})
        target["modules"] += 1
        target["ranks"].add(len(a))
        # ‖BA‖² = ⟨BᵀB, AAᵀ⟩ needs no N×K matrix.
        wide_a, wide_b = a.double(), b.double()
        squares[_target(name)] += ((wide_b.T @ wide_b) * (wide_a @ wide_a.T)).sum().item()
    for name, target in targets.items():
        target |= {"ranks": sorted(target["ranks"]), "norm": math.sqrt(max(squares[name], 0))}
    return {
        "source": adapter.source,
        "family": adapter.family,
        "kind": adapter.kind,
        "rank": adapter.rank,
        "members": describe_members(adapter),
        "ranks": {str(r): n for r, n in sorted(Counter(len(a) for a, _ in adapter.pairs.values()).items())},
        "dtype": adapter.dtype,
        "modules": len(adapter.pairs),
        "parameters": sum(a.numel() + b.numel() for a, b in adapter.pairs.values()),
        "norm": math.sqrt(max(sum(squares.values()), 0)),
        "targets": dict(sorted(targets.items())),
        "training": adapter.training,
        "strength_curve": adapter.curve.to_json(),
        "fingerprint": adapter.fingerprint,
    }


def describe_members(adapter: Adapter) -> dict[str, dict[str, Any]]:
    """A bank's members by name: `source` and `strength_curve`; empty for a single adapter."""
    return {name: {"source": m.source, "strength_curve": m.curve.to_json()} for name, m in adapter.members.items()}


def save_adapter(adapter: Adapter, path: Path, form: Format = "canonical", *, dtype: torch.dtype | None = None) -> None:
    """Write an adapter; the file or folder appears whole or not at all.

    Every format states a scale of 1 for every module, since `lora_alpha / r` is in B already, and reading it gives the same
    float32 numbers back. Family, kind, training and strength curve are kept by all but `slideredit-st`.

    Args:
        path: a file; for `diffusers` and `peft` a folder, which must not exist.
        dtype: of the tensors in the file. None keeps the dtype that they were stored in if it holds them exactly, else float32.

    Raises:
        SliderEditError: `path` cannot be written, a value exceeds the dtype, or the format cannot express the adapter.
    """
    if form == "slideredit-st" and (adapter.kind != "st" or len({len(a) for a, _ in adapter.pairs.values()}) > 1):
        raise SliderEditError(
            f"adapter {adapter.source!r} is not an ST adapter of one rank, which is all that slideredit-st holds; "
            "use canonical, diffusers or peft"
        )
    if form != "canonical" and adapter.members:
        raise SliderEditError(
            f"adapter {adapter.source!r} is a bank, which only the canonical format holds; use --to canonical"
        )
    prefix = {"slideredit-st": "", "peft": "base_model.model."}.get(form, "transformer.")
    tensors = {}
    dtype = _exact_dtype(adapter) if dtype is None else dtype
    for module, pair in adapter.pairs.items():
        for part, tensor in zip("AB", pair, strict=True):
            # A copy of its own: safetensors refuses tensors that share memory.
            stored = tensor.detach().to("cpu", dtype, copy=True).contiguous()
            if not torch.isfinite(stored).all():
                raise SliderEditError(
                    f"adapter {adapter.source!r} has values at {module} beyond what {str(dtype).removeprefix('torch.')} holds; "
                    "use bfloat16 or float32"
                )
            tensors[f"{prefix}{module}.lora_{part}.weight"] = stored
    config = _lora_config(adapter)
    metadata = {
        "format": "pt",
        "family": adapter.family,
        "kind": adapter.kind,
        "rank": str(adapter.rank),
        "targets": json.dumps(adapter.targets),
        "training": json.dumps(adapter.training, sort_keys=True),
        "strength_curve": json.dumps(adapter.curve.to_json()),
    }
    if adapter.members:
        metadata["members"] = json.dumps({name: member.curve.to_json() for name, member in adapter.members.items()})
    if form in ("canonical", "diffusers"):
        metadata["lora_adapter_metadata"] = json.dumps({f"transformer.{key}": value for key, value in config.items()})
    if form in ("diffusers", "peft"):
        with atomic_folder(path) as folder:
            # The library's save_file lets nobody but the owner read the file.
            (folder / (_PEFT_FILE if form == "peft" else _DIFFUSERS_FILE)).write_bytes(save(tensors, metadata))
            if form == "peft":
                (folder / _PEFT_CONFIG).write_text(json.dumps({"peft_type": "LORA", **config}, indent=2) + "\n")
    else:
        with atomic_file(path) as temporary:
            if form == "canonical":
                temporary.write_bytes(save(tensors, metadata))
            else:
                torch.save(tensors, temporary)


def _exact_dtype(adapter: Adapter) -> torch.dtype:
    dtype = DTYPES.get(adapter.dtype, torch.float32)
    exact = all(torch.equal(t.to(dtype).float(), t.float()) for pair in adapter.pairs.values() for t in pair)
    return dtype if exact else torch.float32


def _lora_config(adapter: Adapter) -> dict[str, Any]:
    """PEFT's configuration of the adapter, with alpha equal to the rank in every module."""
    ranks = {name: len(a) for name, (a, _) in adapter.pairs.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    pattern = {name: r for name, r in ranks.items() if r != rank}
    return {
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": sorted(ranks),
    }
