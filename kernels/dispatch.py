"""Which path a projection takes and which tile sizes a kernel gets, read from `dispatch.json`.

The table is data: `make gpu-bench` measures every path on the card at hand and writes that card's rules beside the
defaults, with the GPU, the date and the commit that they come from.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch

ProjectionPath = Literal["update", "addmm", "accumulate", "fused"]
# Paths that begin with the vendor's own projection.
EXACT_PATHS: tuple[ProjectionPath, ...] = ("update", "addmm")
TABLE = Path(__file__).parent / "dispatch.json"
# Shared memory that one thread block can use, in KiB, by compute capability (CUDA C++ Programming Guide, technical
# specifications). Cards that are not listed are taken for the smallest.
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
        """For files and tables, such as `128x128x64-w8-s3`."""
        return f"{self.block_m}x{self.block_n}x{self.block_k}-w{self.num_warps}-s{self.num_stages}"

    def constants(self, even_k: bool, rank: int) -> dict[str, Any]:
        """Compile-time constants of the kernels; `rank` may be any, it is padded here."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "RANK": padded_rank(rank),
            "EVEN_K": even_k,
        }

    def meta(self, k: int, rank: int) -> dict[str, Any]:
        """Keyword arguments of a launch over `k` inner columns."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return self.constants(k % self.block_k == 0, rank) | options


def padded_rank(rank: int) -> int:
    """The inner size that the tensor cores take for this rank: 16, 32, 64 or 128."""
    return max(16, 1 << (rank - 1).bit_length())


@lru_cache
def table() -> dict[str, Any]:
    """The parsed `dispatch.json`."""
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
    """Tile sizes for a launch: the first rule of the kernel that holds."""
    return configurations(kernel, rank, dtype, capability, rows)[0]


def configurations(kernel: str, rank: int, dtype: torch.dtype, capability: int, rows: int | None = None) -> list[Configuration]:
    """Every configuration that some number of rows (or just `rows`) may get, the preferred one first."""
    found = []
    for rule in table()["configurations"][kernel]:
        if _fits(rule, rows, rank, dtype, capability):
            block_m, block_n, block_k = rule["blocks"]
            found.append(Configuration(block_m, block_n, block_k, rule["num_warps"], rule["num_stages"]))
            if not rule.get("min_rows"):
                # Holds for any number of rows, so that the rules after it are never reached.
                break
    return found


def path(rows: int, n: int, k: int, dtype: torch.dtype, gpu: str, *, exact: bool) -> ProjectionPath:
    """How a projection of `rows` rows from `k` to `n` columns is computed on this card.

    Rules measured on a card of that name win; among them, the nearest measured shape decides. Without any, the defaults.

    Args:
        exact: choose among the paths that leave rows of scale 0 with the vendor's bits.
    """
    measured = table()["paths"].get(gpu)
    name = str(dtype).removeprefix("torch.")
    if measured is not None and name == measured["dtype"]:
        nearest = min(measured["shapes"], key=lambda s: (abs(s["rows"] - rows), abs(s["n"] - n) + abs(s["k"] - k)))
        chosen: ProjectionPath = nearest["exact_path" if exact else "path"]
        return chosen
    # The last rule has no condition.
    rules = table()["paths"]["default"]["rules"]
    by_rule: ProjectionPath = next(r["path"] for r in rules if rows >= r.get("min_rows", 0) and name in r.get("dtypes", [name]))
    return by_rule
