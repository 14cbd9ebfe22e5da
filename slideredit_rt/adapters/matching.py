"""Compare an adapter with a base."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from slideredit_rt.adapters.adapter import Adapter
from slideredit_rt.errors import SliderEditError
from slideredit_rt.families import Family


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
