"""Launches of the kernels on random problems, and what is wrong with their results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ptx.compiled import Compiled
from ptx.machine import Machine
from ptx.memory import Buffer
from slideredit_rt.kernels.reference import scaled_low_rank

DTYPES = {"*bf16": torch.bfloat16, "*fp16": torch.float16, "*fp32": torch.float32}
UNIT = 2.0**-24
"""Largest relative error of one float32 operation."""
TF32_UNIT = 2.0**-11
"""Largest relative error of rounding to TF32."""


@dataclass
class Problem:
    """Arguments of a projection, all by their names in the kernels.

    Attributes:
        x: `[rows, K]`.
        weight: `[N, K]`.
        bias: `[N]`.
        lora_a: `[rank, K]`.
        lora_b: `[N, rank]`.
        row_scale: Float32 `[rows, members]`.
        parts: Number of parts of the low-rank product.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor
    lora_a: Tensor
    lora_b: Tensor
    row_scale: Tensor
    parts: int

    @property
    def sizes(self) -> dict[str, int]:
        (rows, k), (n, rank) = self.x.shape, self.lora_b.shape
        return {"rows": rows, "K": k, "N": n, "rank": rank, "members": self.row_scale.shape[1]}

    @property
    def active(self) -> Tensor:
        return (self.row_scale != 0).any(1)

    def low(self) -> Tensor:
        """Return parts of the low-rank product, float32 `[parts, rows, rank]`, whose sum is it. Inactive rows hold NaN."""
        whole = scaled_low_rank(self.x.float(), self.lora_a.float(), self.row_scale)
        whole[~self.active] = torch.nan
        shares = torch.linspace(0.5, 1.5, self.parts) / self.parts
        return whole * shares[:, None, None]


MASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "all": lambda scale: torch.where(scale == 0, 1.0, scale),
    "none": torch.zeros_like,
    "one": lambda scale: torch.where(torch.arange(len(scale))[:, None] == len(scale) - 2, -1 - scale.abs(), 0.0),
    "random": lambda scale: scale * (torch.arange(len(scale)) % 7 % 3 == 0)[:, None],
}


def problem(
    compiled: Compiled, rows: int, blocks: int, mask: str, *, n: int | None = None, members: int = 1, spare_rank: int = 0
) -> Problem:
    """Return a random problem for a kernel.

    Args:
        compiled: Kernel whose tile sizes, dtype and rank are met.
        rows: Rows of x.
        blocks: Inner columns, in blocks of the kernel.
        mask: Name of a mask in `MASKS`. If it leaves rows inactive, one of them holds NaN in x.
        n: Output columns; None is a tile and a few more.
        members: Members of a bank.
        spare_rank: Number by which the rank is below the kernel's.
    """
    tiles, g = compiled.job.configuration, torch.Generator().manual_seed(rows)
    dtype, rank = getattr(torch, compiled.job.dtype), compiled.job.rank - spare_rank
    # The update kernel has no inner columns, and its `block_k` is the number of parts.
    updates = "parts" in compiled.description
    k = blocks * (32 if updates else tiles.block_k)
    n = n or tiles.block_n + 16

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    scale = MASKS[mask](normal(rows, members))
    x = normal(rows, k).to(dtype)
    inactive = torch.nonzero((scale == 0).all(1)).ravel()
    if len(inactive):
        x[inactive[len(inactive) // 2]] = torch.nan
    return Problem(
        x,
        weight=(normal(n, k) / k**0.5).to(dtype),
        bias=normal(n).to(dtype),
        lora_a=(normal(rank, k) / k**0.5).to(dtype),
        lora_b=(normal(n, rank) / rank**0.5).to(dtype),
        row_scale=scale,
        parts=tiles.block_k if updates else 3,
    )


@dataclass
class Expected:
    """What a kernel shall write.

    Attributes:
        values: Float64, in the shape of the output, of which the sum over the first axis counts if there are three.
        bound: Largest error of each value before it is rounded to the output's dtype.
        gained: What the low-rank product contributes.
        written: Rows that are written; None is all of them.
    """

    values: Tensor
    bound: Tensor
    gained: Tensor
    written: Tensor | None = None


def _low_rank(p: Problem) -> tuple[Tensor, Tensor]:
    """Return the scaled product in float64 and a bound of the error of its float32 sum, both `[rows, rank]`."""
    x, a, scale = p.x.double(), p.lora_a.double(), p.row_scale.double()
    owned = (p.row_scale != 0).repeat_interleave(len(a) // scale.shape[1], 1)
    low = torch.where(owned, scaled_low_rank(x, a, scale), 0.0)
    terms = torch.where(owned, scaled_low_rank(x.abs(), a.abs(), scale.abs()), 0.0)
    return low, UNIT * (x.shape[1] + 4) * terms


def _expect_low(p: Problem) -> Expected:
    low, bound = _low_rank(p)
    return Expected(low, bound, low)


def _expect_linear(p: Problem) -> Expected:
    low, low_bound = _low_rank(p)
    x, w, b = p.x.double(), p.weight.double(), p.lora_b.double()
    gained = low @ b.T
    values = x @ w.T + p.bias.double() + gained
    terms = x.abs() @ w.abs().T + p.bias.double().abs() + low.abs() @ b.abs().T
    bound = UNIT * (x.shape[1] + len(p.lora_a) + 4) * terms + (low_bound + _tf32_error(p, low)) @ b.abs().T
    return Expected(values, bound, gained)


def _expect_update(p: Problem) -> Expected:
    base, b = base_of(p).double(), p.lora_b.double()
    low = p.low().double().sum(0)
    gained = torch.where(p.active[:, None], low @ b.T, 0.0)
    terms = base.abs() + low.abs() @ b.abs().T
    bound = UNIT * (p.parts + len(p.lora_a) + 4) * terms + _tf32_error(p, low) @ b.abs().T
    return Expected(base + gained, torch.where(p.active[:, None], bound, 0.0), gained, p.active)


def _tf32_error(p: Problem, low: Tensor) -> Tensor:
    """Bound the error of rounding `low`; B is exact in TF32. Kernels of float32 do not round."""
    return low.abs() * (0.0 if p.x.dtype == torch.float32 else TF32_UNIT)


def base_of(p: Problem) -> Tensor:
    """Return the frozen projection that the update is added to, `[rows, N]`."""
    return torch.nn.functional.linear(p.x, p.weight, p.bias)


EXPECTED: dict[str, Callable[[Problem], Expected]] = {
    "masked_lora_linear": _expect_linear,
    "masked_low_rank": _expect_low,
    "masked_lora_update": _expect_update,
}


@dataclass
class Launch:
    """Buffers of a launch by name, and the grid."""

    buffers: dict[str, Buffer]
    arguments: list[Buffer | int]
    grid: list[int]
    output: str = field(default="y")


def prepare(compiled: Compiled, p: Problem) -> Launch:
    """Return the arguments in the order of the kernel's description, and the grid that it states."""
    d = compiled.description
    names = {"rows": p.sizes["rows"], "N": p.sizes["N"], "parts": p.parts}
    launch = Launch({}, [], [int(eval(size, {}, names)) for size in d["grid"]], compiled.job.spec.outputs[0])
    for place, argument in enumerate(d["arguments"]):
        name = argument["name"]
        if argument["type"] == "i32":
            launch.arguments.append(p.sizes[name])
        else:
            tensor = _content(compiled, p, name)
            assert tensor.dtype == DTYPES[argument["type"]], name
            launch.buffers[name] = Buffer(place, raw(tensor), name)
            launch.arguments.append(launch.buffers[name])
    return launch


def _content(compiled: Compiled, p: Problem, name: str) -> Tensor:
    """Return the tensor of an argument. Outputs that are not updated in place start as NaN."""
    output, rows = name in compiled.job.spec.outputs, p.sizes["rows"]
    if name == "low":
        return torch.full((p.parts, rows, p.sizes["rank"]), torch.nan) if output else p.low()
    if name == "y":
        in_place = compiled.job.spec_name == "masked_lora_update"
        return base_of(p) if in_place else torch.full((rows, p.sizes["N"]), torch.nan, dtype=p.x.dtype)
    tensor: Tensor = getattr(p, name)
    return tensor


def raw(tensor: Tensor) -> Any:
    """Return a tensor's bits as a NumPy array."""
    return tensor.contiguous().view(torch.int16 if tensor.itemsize == 2 else torch.int32).numpy()


def content(buffer: Buffer, dtype: torch.dtype, *shape: int) -> Tensor:
    """Return a buffer as a tensor."""
    bits = np.int16 if dtype.itemsize == 2 else np.int32
    return torch.from_numpy(buffer.array(bits, shape).copy()).view(dtype)


def run(compiled: Compiled, p: Problem, machine: Machine | None = None, schedule: str = "together") -> tuple[Launch, Tensor]:
    """Run a kernel and return its launch and its output."""
    launch = prepare(compiled, p)
    (machine or compiled.machine()).launch(launch.grid, launch.arguments, schedule)
    return launch, output_of(compiled, p, launch)


def output_of(compiled: Compiled, p: Problem, launch: Launch) -> Tensor:
    """Return `y`, `[rows, N]`, or the parts of `low`, `[parts, rows, rank]`."""
    rows = p.sizes["rows"]
    shape = (p.parts, rows, p.sizes["rank"]) if launch.output == "low" else (rows, p.sizes["N"])
    dtype = torch.float32 if launch.output == "low" else p.x.dtype
    return content(launch.buffers[launch.output], dtype, *shape)


def faults(compiled: Compiled, p: Problem, launch: Launch, y: Tensor) -> list[str]:
    """Return what is wrong with a launch: values against float64, and which bytes it read and wrote."""
    expected = EXPECTED[compiled.job.spec_name](p)
    return [*_wrong_accesses(launch, p.sizes["rows"], expected), *wrong_values(y, expected)]


def wrong_values(y: Tensor, expected: Expected) -> list[str]:
    """Return what is wrong with values: NaN and infinity in other places, errors beyond their bound, or a biased update."""
    want, found = expected.values, (y.double().sum(0) if y.ndim == 3 else y.double())
    finite = want.isfinite()
    if not torch.equal(found.nan_to_num(0.5, 2.0, -2.0)[~finite], want.nan_to_num(0.5, 2.0, -2.0)[~finite]):
        return ["values that should be infinite or NaN are not"]
    if not found[finite].isfinite().all():
        return [f"{int((~found[finite].isfinite()).sum())} values are not finite"]
    kind = torch.finfo(y.dtype)
    rounding = kind.eps / 2 * want.abs() + kind.smallest_normal * kind.eps
    error = torch.where(finite, found - want, 0.0)
    over = (error.abs() > rounding + expected.bound) & finite
    wrong = [f"{int(over.sum())} of {over.numel()} values are wrong, by up to {error.abs().max():.2e}"] if over.any() else []
    return wrong + _bias(error, torch.where(finite, rounding, 0.0), torch.where(finite, expected.gained, 0.0))


def _bias(error: Tensor, rounding: Tensor, gained: Tensor) -> list[str]:
    """Errors of rounding cancel out: on average, the update is as large as it should be, to 1/10,000."""
    size = gained.square().sum()
    if size == 0:
        return []
    gain = (error * gained).sum() / size
    noise = (rounding * gained).square().sum().sqrt() / size
    return [f"the update is {gain:+.1e} too large"] if gain.abs() > 1e-4 + 4 * noise else []


def _wrong_accesses(launch: Launch, rows: int, expected: Expected) -> list[str]:
    wrong = [f"{name} is written" for name, b in launch.buffers.items() if name != launch.output and b.written.any()]
    output = launch.buffers[launch.output]
    if expected.written is None:
        return wrong + ([] if (output.written == 1).all() else [f"bytes of {launch.output} are not written once"])
    on = expected.written.numpy()
    written = output.written.reshape(rows, -1)
    if (written[on] != 1).any():
        wrong.append("bytes of active rows are not written once")
    if written[~on].any() or output.read.reshape(rows, -1)[~on].any():
        wrong.append("inactive rows are read or written")
    return wrong


def standard_problems(compiled: Compiled, number: int) -> Sequence[Problem]:
    """Return the two problems that every configuration runs: long and masked at random, short and masked by turns."""
    rows = compiled.job.configuration.block_m
    bank = 2 if "members" in compiled.job.spec.scalars else 1
    spare = 16 if compiled.job.rank > 16 else 0
    return (
        problem(compiled, rows + 5, 5, "random"),
        problem(compiled, rows - 3, 1, ("none", "one", "all")[number % 3], members=bank, spare_rank=spare),
    )


def with_scale(p: Problem, row: int, value: float) -> Problem:
    """Return the problem with another scale in one row."""
    scale = p.row_scale.clone()
    scale[row] = value
    return replace(p, row_scale=scale)
