"""Choice of tile sizes per card and shape, read from `configurations.json`.

Those of 16-bit dtypes are the fastest of a few on one H200 (bench/NOTES.md). The others were chosen by arithmetic.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

TABLE = Path(__file__).parent / "configurations.json"
# Largest shared memory of a thread block, in KiB, by compute capability (CUDA C++ Programming Guide, technical
# specifications). Capabilities that are not listed get the smallest of these.
SHARED_KIB = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99}


@dataclass(frozen=True)
class Configuration:
    """Tile sizes of a launch: `[block_m, block_k]` of `x`, `[block_n, block_k]` of the weight, warps and pipeline stages."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    @property
    def name(self) -> str:
        """Short name for files and tables, such as `128x128x64-w8-s3`."""
        return f"{self.block_m}x{self.block_n}x{self.block_k}-w{self.num_warps}-s{self.num_stages}"

    def constants(self, even_k: bool, rank: int) -> dict[str, Any]:
        """Return the kernels' compile-time constants. `rank` is padded here."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "RANK": padded_rank(rank),
            "EVEN_K": even_k,
        }

    def meta(self, k: int, rank: int) -> dict[str, Any]:
        """Return the keyword arguments of a launch over `k` inner columns."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return self.constants(k % self.block_k == 0, rank) | options


def padded_rank(rank: int) -> int:
    """Return the rank padded to a tensor-core size: 16, 32, 64 or 128."""
    return max(16, 1 << (rank - 1).bit_length())


@lru_cache
def table() -> dict[str, Any]:
    """Return the rules by kernel."""
    parsed: dict[str, Any] = json.loads(TABLE.read_text())
    return parsed


def _fits(rule: dict[str, Any], rows: int | None, rank: int, dtype: torch.dtype, capability: int) -> bool:
    return (
        dtype.itemsize == rule.get("element_bytes", dtype.itemsize)
        and padded_rank(rank) <= rule.get("max_rank", 128)
        and SHARED_KIB.get(capability, 99) >= rule.get("min_shared_kib", 0)
        and (rows is None or rule.get("min_rows", 0) <= rows)
    )


def configuration(kernel: str, rows: int, rank: int, dtype: torch.dtype, capability: int) -> Configuration:
    """Return the tile sizes of a launch: those of the first matching rule of the kernel."""
    return configurations(kernel, rank, dtype, capability, rows)[0]


def configurations(kernel: str, rank: int, dtype: torch.dtype, capability: int, rows: int | None = None) -> list[Configuration]:
    """Return the configurations that a launch may get, preferred first: for any number of rows, or for `rows` only."""
    found = []
    for rule in table()[kernel]:
        if _fits(rule, rows, rank, dtype, capability):
            block_m, block_n, block_k = rule["blocks"]
            found.append(Configuration(block_m, block_n, block_k, rule["num_warps"], rule["num_stages"]))
            if not rule.get("min_rows"):
                # This rule matches any number of rows, so later rules are unreachable.
                break
    return found
