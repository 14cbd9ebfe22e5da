"""Compare an adapter with a base."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from slideredit_rt.adapters.adapter import Adapter
from slideredit_rt.errors import SliderEditError
from slideredit_rt.families import Family, Kind
from slideredit_rt.quantization.linear import QuantizedLinear


@dataclass(frozen=True)
class AdapterMatch:
    """Comparison of an adapter's modules with a base's, by name.

    Attributes:
        matched: Linears of the base that the adapter updates.
        missing: Linears of the family's standard targets that the adapter does not update. This is informational: adapters
            may have fewer targets.
        unexpected: Modules of the adapter that the base lacks or that sliders cannot scale. Without them the adapter would not
            act as it was trained to.
        mismatched: Modules of the adapter whose linear has another size in the base, so it was trained on another base.
    """

    matched: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[str, ...]


def _linears(family: Family, transformer: nn.Module) -> dict[str, nn.Linear | QuantizedLinear]:
    """Return the linears of a transformer that sliders can scale, by name."""
    sorts = nn.Linear | QuantizedLinear
    return {name: m for name, m in transformer.named_modules() if isinstance(m, sorts) and family.rows_of(name)}


def standard_linears(kind: Kind, family: Family, transformer: nn.Module) -> dict[str, nn.Linear | QuantizedLinear]:
    """Return the linears that adapters of a kind are trained on, by name (see `Family.targets`).

    Args:
        kind: `st` or `gst`.
        family: Family of the transformer.
        transformer: diffusers transformer, may be on the `meta` device.
    """
    standard = family.targets(kind)
    return {name: linear for name, linear in _linears(family, transformer).items() if standard.fullmatch(name)}


def match_adapter(adapter: Adapter, family: Family, transformer: nn.Module) -> AdapterMatch:
    """Compare an adapter with a diffusers transformer, which may be on the `meta` device."""
    linears = _linears(family, transformer)
    fits = {
        name: (b.shape[0], a.shape[1]) == (linears[name].out_features, linears[name].in_features)
        for name, (a, b) in adapter.pairs.items()
        if name in linears
    }
    return AdapterMatch(
        matched=tuple(name for name, same in fits.items() if same),
        missing=tuple(name for name in standard_linears(adapter.kind, family, transformer) if name not in adapter.pairs),
        unexpected=tuple(name for name in adapter.pairs if name not in linears),
        mismatched=tuple(name for name, same in fits.items() if not same),
    )


def check_rows(adapter: Adapter, family: Family) -> None:
    """Check that the rows that an adapter scales are among those that a family's sliders can scale.

    Raises:
        SliderEditError: A GST adapter scales rows of source images that the family reads without sliders.
    """
    if adapter.kind == "gst" and family.reads_images_once and adapter.family != family.name:
        raise SliderEditError(
            f"adapter {adapter.source!r} was trained for {adapter.family} on the rows of source images as well, which a "
            f"{family.name} reads without sliders; use a {adapter.family} base, or a GST adapter that was trained for "
            f"{family.name}"
        )


def fit_adapter(adapter: Adapter, family: Family, transformer: nn.Module, *, allow_partial: bool = False) -> Adapter:
    """Check that an adapter fits a transformer.

    Args:
        adapter: Single adapter or bank.
        family: Family of the transformer.
        transformer: diffusers transformer, may be on the `meta` device.
        allow_partial: Drop modules that the transformer lacks instead of refusing the adapter.

    Returns:
        The adapter, without the modules that were dropped.

    Raises:
        SliderEditError: The transformer lacks some of the modules (all of them with `allow_partial`), a size differs, or a GST
            adapter scales rows of source images that the family reads without sliders.
    """
    check_rows(adapter, family)
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
            f"only {len(match.matched)} of the {len(adapter.pairs)} modules of adapter {adapter.source!r} fit this "
            f"{family.name} transformer; not found: {names}; use an adapter that was trained on this base"
            + (", or drop these with --allow-partial" if match.matched else "")
        )
    return adapter.without(match.unexpected)
