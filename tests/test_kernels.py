"""The masked low-rank operator: numerics, row isolation, and what torch's compiler and exporter ask of it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slideredit_rt.kernels import masked_lora_linear, masked_lora_linear_reference


def problem(
    batch: int, rows: int, k: int, n: int, rank: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(batch, rows, k, generator=g).to(dtype),
        "weight": (torch.randn(n, k, generator=g) / k**0.5).to(dtype),
        "bias": torch.randn(n, generator=g).to(dtype),
        "lora_a": torch.randn(rank, k, generator=g) / k**0.5,
        "lora_b": torch.randn(n, rank, generator=g) / rank**0.5,
        "row_scale": torch.randn(batch, rows, generator=g),
    }


def exact(p: dict[str, Tensor]) -> Tensor:
    """The formula in float64."""
    d = {name: t.double() for name, t in p.items()}
    base = d["x"] @ d["weight"].T + d["bias"]
    return base + d["row_scale"].unsqueeze(-1) * (d["x"] @ d["lora_a"].T @ d["lora_b"].T)


def plain(p: dict[str, Tensor]) -> Tensor:
    """What a user would write in the dtype of `x`."""
    x, dtype = p["x"], p["x"].dtype
    low = F.linear(F.linear(x, p["lora_a"].to(dtype)), p["lora_b"].to(dtype))
    return F.linear(x, p["weight"], p["bias"]) + p["row_scale"].to(dtype).unsqueeze(-1) * low


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "k", "n", "rank"), [(1, 60, 100, 4), (63, 60, 100, 16), (129, 128, 33, 33)])
def test_error_is_at_most_twice_that_of_the_plain_expression(rows: int, k: int, n: int, rank: int, dtype: torch.dtype) -> None:
    p = problem(2, rows, k, n, rank, dtype)
    expected = exact(p)
    error = (masked_lora_linear(**p).double() - expected).abs().max()
    allowed = (plain(p).double() - expected).abs().max()
    assert error <= 2 * allowed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scale_zero_on_every_row_is_the_frozen_projection_bit_for_bit(dtype: torch.dtype) -> None:
    p = problem(2, 17, 60, 100, 16, dtype)
    p["row_scale"].zero_()
    assert torch.equal(masked_lora_linear(**p), F.linear(p["x"], p["weight"], p["bias"]))


def test_nan_in_one_row_stays_in_that_row() -> None:
    p = problem(1, 9, 60, 100, 4)
    p["x"][0, 3] = float("nan")
    y = masked_lora_linear(**p)
    assert y[0, 3].isnan().all()
    assert y[0, torch.arange(9) != 3].isfinite().all()


@settings(max_examples=25, deadline=None)
@given(mask=st.lists(st.booleans(), min_size=1, max_size=40), scale=st.sampled_from([-1e4, -1.0, 0.5, 1e4]))
def test_only_the_active_rows_differ_from_the_frozen_projection(mask: list[bool], scale: float) -> None:
    p = problem(1, len(mask), 24, 20, 4)
    active = torch.tensor(mask)
    p["row_scale"] = active.float()[None] * scale
    y, frozen = masked_lora_linear(**p), F.linear(p["x"], p["weight"], p["bias"])
    assert torch.equal(y[0, ~active], frozen[0, ~active])
    assert (y[0, active] != frozen[0, active]).any(dim=-1).all()


@pytest.mark.parametrize("bias", [True, False])
def test_two_dimensional_input_and_missing_bias(bias: bool) -> None:
    p = problem(1, 7, 24, 20, 4)
    flat = p | {"x": p["x"][0], "row_scale": p["row_scale"][0]}
    arguments = flat if bias else flat | {"bias": None}
    expected = exact(flat) - (0 if bias else p["bias"].double())
    torch.testing.assert_close(masked_lora_linear(**arguments).double(), expected, atol=1e-5, rtol=1e-5)


def test_gradients_equal_those_of_the_reference() -> None:
    p = {name: t.double() for name, t in problem(2, 5, 12, 10, 3).items()}
    leaves = [p[name].requires_grad_() for name in ("x", "lora_a", "lora_b")]
    assert torch.autograd.gradcheck(lambda x, a, b: masked_lora_linear(x, p["weight"], p["bias"], a, b, p["row_scale"]), leaves)


def test_operator_passes_torch_library_opcheck() -> None:
    p = problem(2, 5, 12, 10, 3)
    p["lora_a"].requires_grad_()
    torch.library.opcheck(torch.ops.slideredit.masked_lora_linear.default, tuple(p.values()))


def test_reference_is_what_the_operator_runs_on_the_cpu() -> None:
    p = problem(2, 31, 60, 100, 16)
    assert torch.equal(masked_lora_linear(**p), masked_lora_linear_reference(**p))
