"""Adapters: trained A/B pairs, read from many file formats, matched with a base, and written in each format."""

from slideredit_rt.adapters.adapter import Adapter, Member, adapter_report, bank_adapters, describe_members, fill_ranks
from slideredit_rt.adapters.fusing import Fused, Updates, read_updates
from slideredit_rt.adapters.inputs import AdapterInputs
from slideredit_rt.adapters.matching import AdapterMatch, fit_adapter, match_adapter
from slideredit_rt.adapters.reading import AdapterSource, load_adapter, load_adapters
from slideredit_rt.adapters.writing import DTYPES, FORMATS, Format, save_adapter

__all__ = [
    "DTYPES",
    "FORMATS",
    "Adapter",
    "AdapterInputs",
    "AdapterMatch",
    "AdapterSource",
    "Format",
    "Fused",
    "Member",
    "Updates",
    "adapter_report",
    "bank_adapters",
    "describe_members",
    "fill_ranks",
    "fit_adapter",
    "load_adapter",
    "load_adapters",
    "match_adapter",
    "read_updates",
    "save_adapter",
]
