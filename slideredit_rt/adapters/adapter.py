"""`Adapter`, which holds the trained A/B pairs of one adapter or a bank, and its JSON description."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from slideredit_rt.errors import SliderEditError
from slideredit_rt.families import Family, Kind, RowSet, get_family
from slideredit_rt.strength import StrengthCurve


@dataclass(frozen=True)
class Member:
    """One adapter of a bank: its source, its kind, and its curve from strength to alpha."""

    source: str
    kind: Kind
    curve: StrengthCurve = field(default_factory=StrengthCurve)


@dataclass(frozen=True)
class Adapter:
    """One low-rank update per linear, or a bank of several adapters with separate strengths.

    Attributes:
        family: Base-model family that it was trained for.
        kind: `st` or `gst`; a bank with members of both kinds is `gst`, because its masks cover all rows.
        rank: Largest R; for a bank, the sum over its members.
        pairs: Module name to (A `[R, K]`, B `[N, R]`), float32, with `lora_alpha / r` folded into B. In a bank of G members,
            every R is a multiple of G, and each member has R/G rows of A and columns of B, in the members' order.
        source: Path or name that it was loaded from, for messages.
        training: Training settings stored in the file.
        curve: Curve from strength to alpha. The default, `alpha = 1 − strength`, is replaced by
            `slideredit-rt adapter calibrate`.
        dtype: Dtype of the stored tensors; mixed dtypes are joined by "+".
        members: Members of a bank by name (see `bank_adapters`); empty for a single adapter. A bank's own `curve` is unused.
        ignored: Text-encoder linears that the file also updates. They have no effect here.
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
    ignored: tuple[str, ...] = ()

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
        """Return the adapter without some of its modules."""
        pairs = {name: pair for name, pair in self.pairs.items() if name not in modules}
        return dataclasses.replace(self, pairs=pairs, rank=max((len(a) for a, _ in pairs.values()), default=0))


def fill_ranks(adapter: Adapter, ranks: Mapping[str, int]) -> Adapter:
    """Raise ranks without changing the update: append zero rows to each A and zero columns to each B, in every member.

    Args:
        adapter: Single adapter or bank.
        ranks: Rank per module, a multiple of the number of members. Ranks below a module's own have no effect.
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
    """Combine adapters into a bank whose members keep separate strengths: A's stacked, B's side by side.

    In every module, each member is padded with zeros to the largest rank that any member has there. A member that does not
    update a module gets zeros only. In a bank of both kinds, the masks of ST members are empty on image rows.

    Args:
        adapters: Single adapters of one family.
        names: Names of the members, all different.

    Raises:
        SliderEditError: No adapter is given, one of them is a bank, families differ, a name is empty or occurs twice, an ST
            adapter updates image rows, or the adapters were trained on bases of different sizes.
    """
    if not adapters or len(adapters) != len(names):
        raise SliderEditError(f"a bank needs one name per adapter, got {len(adapters)} adapters and {len(names)} names")
    first = adapters[0]
    for adapter in adapters:
        if adapter.members:
            raise SliderEditError(f"adapter {adapter.source!r} is already a bank; pass the files of its members")
        if adapter.family != first.family:
            raise SliderEditError(
                f"adapters {first.source!r} ({first.family}) and {adapter.source!r} ({adapter.family}) cannot share an engine; "
                "pass adapters of one family"
            )
        check_text_rows(adapter, get_family(adapter.family))
    if twice := next((name for name, count in Counter(names).items() if count > 1 or not name.strip()), None):
        raise SliderEditError(f"two adapters would be named {twice!r} in the bank; rename one of the files")
    modules = dict.fromkeys(name for adapter in adapters for name in adapter.pairs)
    pairs = {}
    for module in modules:
        found = [adapter.pairs.get(module) for adapter in adapters]
        shapes = {(a.shape[1], b.shape[0]) for a, b in filter(None, found)}
        if len(shapes) > 1:
            raise SliderEditError(
                f"the adapters disagree on the size of {module}: {' and '.join(f'{n}×{k}' for k, n in sorted(shapes))}; "
                "pass adapters that were trained on the same base"
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
        kind=first.kind if len({adapter.kind for adapter in adapters}) == 1 else "gst",
        rank=max(len(a) for a, _ in pairs.values()),
        pairs=pairs,
        source=", ".join(adapter.source for adapter in adapters),
        training={name: adapter.training for name, adapter in zip(names, adapters, strict=True)},
        dtype="+".join(sorted({adapter.dtype for adapter in adapters})),
        members={name: Member(a.source, a.kind, a.curve) for name, a in zip(names, adapters, strict=True)},
        ignored=tuple(name for adapter in adapters for name in adapter.ignored),
    )


def check_text_rows(adapter: Adapter, family: Family) -> None:
    """Check that an ST adapter updates no linear of image rows.

    Raises:
        SliderEditError: It does.
    """
    image = [name for name in adapter.pairs if family.rows_of(name) == "image"]
    if adapter.kind == "st" and image:
        raise SliderEditError(
            f"adapter {adapter.source!r} is marked as ST but updates {image[0]}, which does not project text rows; use an ST "
            "adapter, or mark this one as gst in its metadata"
        )


def adapter_report(adapter: Adapter) -> dict[str, Any]:
    """Describe an adapter for JSON: ranks, targets with their rows, sizes and norms, metadata.

    Norms are Frobenius norms of B·A over all modules of a target or of the adapter.
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
        "ignored": list(adapter.ignored),
        "training": adapter.training,
        "strength_curve": adapter.curve.to_json(),
        "fingerprint": adapter.fingerprint,
    }


def describe_members(adapter: Adapter) -> dict[str, dict[str, Any]]:
    """Return `source`, `kind` and `strength_curve` of a bank's members, by name; empty for a single adapter."""
    return {
        name: {"source": member.source, "kind": member.kind, "strength_curve": member.curve.to_json()}
        for name, member in adapter.members.items()
    }


def _target(module: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", module, count=1)
