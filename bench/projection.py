"""Random arguments of one adapted projection with exact and plain results, for kernel tests and benchmarks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def problem(
    batch: int,
    rows: int,
    k: int,
    n: int,
    rank: int,
    dtype: torch.dtype = torch.float32,
    *,
    adapter_dtype: torch.dtype | None = None,
    members: int | None = None,
    active: float = 1.0,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Return the arguments of `masked_lora_linear` by name, on the generator's device.

    Args:
        batch: Batch size of x, `[batch, rows, k]`.
        rows: Rows of x per batch item.
        k: Inner columns.
        n: Output columns; the weight is `[n, k]`.
        rank: Rank of A `[rank, k]` and B `[n, rank]`.
        dtype: Dtype of x, weight and bias.
        adapter_dtype: Dtype of A and B; None uses `dtype`.
        members: Number of adapters in a bank, each of rank `rank` and with a column of `row_scale`; None makes a single one.
        active: Share of the rows whose scale is not 0.
        generator: Generator of the numbers; None uses one on the CPU with seed 0.
    """
    g = torch.Generator().manual_seed(0) if generator is None else generator

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device=g.device)

    count = members or 1
    scale = normal(batch, rows, *([members] if members else []))
    keep = torch.rand(batch, rows, generator=g, device=g.device) < active
    return {
        "x": normal(batch, rows, k).to(dtype),
        "weight": (normal(n, k) / k**0.5).to(dtype),
        "bias": normal(n).to(dtype),
        "lora_a": (normal(count * rank, k) / k**0.5).to(adapter_dtype or dtype),
        "lora_b": (normal(n, count * rank) / rank**0.5).to(adapter_dtype or dtype),
        "row_scale": scale * (keep.unsqueeze(-1) if members else keep),
    }


def exact(p: dict[str, Tensor]) -> Tensor:
    """Evaluate the formula in float64, one member of a bank after the other, and return `[batch, rows, n]`."""
    d = {name: tensor.double() for name, tensor in p.items()}
    scales = d["row_scale"].unbind(-1) if d["row_scale"].ndim == 3 else [d["row_scale"]]
    y = d["x"] @ d["weight"].T + d["bias"]
    for a, b, scale in zip(d["lora_a"].chunk(len(scales)), d["lora_b"].chunk(len(scales), dim=1), scales, strict=True):
        y = y + scale.unsqueeze(-1) * (d["x"] @ a.T @ b.T)
    return y


def plain(p: dict[str, Tensor]) -> Tensor:
    """Evaluate the formula in the dtype of x as PEFT does, with the row scale in place of PEFT's scaling.

    The scales of a bank multiply the columns of the low-rank product. The result is `[batch, rows, n]`.
    """
    x, dtype, scale = p["x"], p["x"].dtype, p["row_scale"].to(p["x"].dtype)
    y, low = F.linear(x, p["weight"], p["bias"]), F.linear(x, p["lora_a"].to(dtype))
    if scale.ndim == 3:
        return y + F.linear(low * scale.repeat_interleave(len(p["lora_a"]) // scale.shape[-1], dim=-1), p["lora_b"].to(dtype))
    return y + F.linear(low, p["lora_b"].to(dtype)) * scale.unsqueeze(-1)
