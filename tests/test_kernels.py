"""The masked low-rank operator: numerics, row isolation, and what torch's compiler and exporter ask of it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slideredit_rt import SliderEditError
from slideredit_rt.bench.projection import exact, plain, problem
from slideredit_rt.kernels import (
    masked_lora_linear,
    masked_lora_linear_reference,
    masked_lora_update_,
    masked_lora_update_reference_,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "k", "n", "rank"), [(1, 60, 100, 4), (63, 60, 100, 16), (129, 128, 33, 33)])
def test_error_is_at_most_twice_that_of_the_plain_expression(rows: int, k: int, n: int, rank: int, dtype: torch.dtype) -> None:
    p = problem(2, rows, k, n, rank, dtype, adapter_dtype=torch.float32)
    expected = exact(p)
    error = (masked_lora_linear(**p).double() - expected).abs().max()
    allowed = (plain(p).double() - expected).abs().max()
    assert error <= 2 * allowed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scale_zero_on_every_row_is_the_frozen_projection_bit_for_bit(dtype: torch.dtype) -> None:
    p = problem(2, 17, 60, 100, 16, dtype, adapter_dtype=torch.float32)
    p["row_scale"].zero_()
    assert torch.equal(masked_lora_linear(**p), F.linear(p["x"], p["weight"], p["bias"]))


def test_nan_in_one_row_stays_in_that_row() -> None:
    p = problem(1, 9, 60, 100, 4)
    p["x"][0, 3] = float("nan")
    y = masked_lora_linear(**p)
    assert y[0, 3].isnan().all()
    assert y[0, torch.arange(9) != 3].isfinite().all()


@settings(max_examples=25, deadline=None, derandomize=True)
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


def arguments_of(name: str, p: dict[str, Tensor]) -> tuple[object, ...]:
    if name == "masked_lora_update_":
        return (torch.zeros(*p["x"].shape[:-1], p["weight"].shape[0]), p["x"], p["lora_a"], p["lora_b"], p["row_scale"])
    return tuple(p.values())


OPERATORS = {
    "masked_lora_linear": masked_lora_linear,
    "masked_lora_update_": masked_lora_update_,
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operator_passes_torch_library_opcheck(name: str) -> None:
    p = problem(2, 5, 12, 10, 3)
    if name == "masked_lora_linear":
        p["lora_a"].requires_grad_()
    torch.library.opcheck(getattr(torch.ops.slideredit, name).default, arguments_of(name, p))


@pytest.mark.parametrize("name", OPERATORS)
def test_compiles_as_one_graph_and_exports(name: str) -> None:
    class Module(torch.nn.Module):
        def forward(self, *arguments: object) -> object:
            # A new y, as after a projection: the caller's would be changed twice.
            first = arguments[0] + 1  # type: ignore[operator]
            return OPERATORS[name](first, *arguments[1:])  # type: ignore[operator]

    arguments = arguments_of(name, problem(2, 5, 12, 10, 3))
    expected = Module()(*arguments)
    compiled = torch.compile(Module(), backend="aot_eager", fullgraph=True)(*arguments)
    exported = torch.export.export(Module(), arguments)
    torch.testing.assert_close(compiled, expected, atol=0, rtol=0)
    torch.testing.assert_close(exported.module()(*arguments), expected, atol=0, rtol=0)
    assert name in str(exported.graph), "the operator stays one node"


def test_update_in_place_keeps_the_bits_of_inactive_rows() -> None:
    p = problem(1, 9, 24, 20, 4)
    p["row_scale"][0, ::2] = 0
    p["x"][0, 2] = float("nan")
    y = F.linear(p["x"], p["weight"], p["bias"]).nan_to_num(7.0)
    before = y.clone()
    returned = masked_lora_update_(y, p["x"], p["lora_a"], p["lora_b"], p["row_scale"])
    assert returned is y
    assert torch.equal(y[0, ::2], before[0, ::2])
    assert torch.equal(y, masked_lora_update_reference_(before, p["x"], p["lora_a"], p["lora_b"], p["row_scale"]))
    assert (y[0, 1::2] != F.linear(p["x"], p["weight"], p["bias"])[0, 1::2]).any(dim=-1).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(10, 11)}, r"weight has shape \(10, 11\); pass \[N, 12\]"),
        ({"weight": torch.zeros(10, 12, dtype=torch.float16)}, "pass both in the same dtype"),
        ({"bias": torch.zeros(9)}, r"bias has shape \(9,\); pass \[10\]"),
        ({"lora_a": torch.zeros(3, 11)}, "do not fit a projection from 12 to 10"),
        ({"row_scale": torch.zeros(2, 4)}, "pass one scale per row of x"),
        ({"row_scale": torch.zeros(2, 5, dtype=torch.bfloat16)}, "16 bits would round the strengths"),
        ({"row_scale": torch.zeros(2, 5, device="meta")}, "row_scale is on meta and x on cpu"),
    ],
)
def test_arguments_that_do_not_belong_together_get_one_sentence(change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(SliderEditError, match=message):
        masked_lora_linear(**problem(2, 5, 12, 10, 3) | change)


def test_update_refuses_an_output_that_it_could_not_write_in_place() -> None:
    p = problem(2, 5, 12, 10, 3)
    rest = (p["x"], p["lora_a"], p["lora_b"], p["row_scale"])
    with pytest.raises(SliderEditError, match="y is not contiguous"):
        masked_lora_update_(torch.zeros(2, 5, 20)[..., ::2], *rest)
    with pytest.raises(SliderEditError, match="pass tensors with the same rows and dtype"):
        masked_lora_update_(torch.zeros(2, 4, 10), *rest)


def test_reference_is_what_the_operator_runs_on_the_cpu() -> None:
    p = problem(2, 31, 60, 100, 16)
    assert torch.equal(masked_lora_linear(**p), masked_lora_linear_reference(**p))
