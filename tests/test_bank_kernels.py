"""The masked low-rank operator with a bank of adapters: a scale per row and member, against float64 and against one adapter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from slideredit_rt import SliderEditError
from slideredit_rt.bench.projection import exact, plain, problem
from slideredit_rt.kernels import masked_lora_linear, masked_lora_update_


def bank_problem(
    batch: int, rows: int, k: int, n: int, members: int, rank: int, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """`rank` is each member's."""
    generator = torch.Generator().manual_seed(members)
    return problem(batch, rows, k, n, rank, dtype, adapter_dtype=torch.float32, members=members, generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("rows", "k", "n", "members", "rank"), [(1, 60, 100, 2, 4), (63, 60, 100, 3, 5), (129, 128, 33, 22, 7)]
)
def test_error_is_at_most_twice_that_of_the_plain_expression(
    rows: int, k: int, n: int, members: int, rank: int, dtype: torch.dtype
) -> None:
    p = bank_problem(2, rows, k, n, members, rank, dtype)
    expected = exact(p)
    error = (masked_lora_linear(**p).double() - expected).abs().max()
    allowed = (plain(p).double() - expected).abs().max()
    assert error <= 2 * allowed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_bank_of_one_is_the_single_adapter_bit_for_bit(dtype: torch.dtype) -> None:
    p = bank_problem(2, 31, 60, 100, 1, 16, dtype)
    p["row_scale"][:, ::3] = 0
    single = p | {"row_scale": p["row_scale"][..., 0]}
    assert torch.equal(masked_lora_linear(**p), masked_lora_linear(**single))


def test_scale_zero_in_every_member_is_the_frozen_projection_bit_for_bit_whatever_the_row_holds() -> None:
    p = bank_problem(1, 9, 60, 100, 3, 4, torch.bfloat16)
    p["row_scale"][0, 3:6] = 0
    p["x"][0, 4], p["x"][0, 7] = float("inf"), float("nan")
    y, frozen = masked_lora_linear(**p), F.linear(p["x"], p["weight"], p["bias"])
    assert torch.equal(y[0, [3, 5]], frozen[0, [3, 5]])
    assert torch.equal(y[0, 4].isnan(), frozen[0, 4].isnan())
    assert y[0, 7].isnan().all()
    assert y[0, [0, 1, 2, 6, 8]].isfinite().all()


def test_a_member_of_zeros_and_one_of_scale_zero_change_nothing() -> None:
    p = bank_problem(2, 17, 24, 20, 3, 4)
    p["lora_a"][4:8] = 0
    p["row_scale"][..., 2] = 0
    first = {"lora_a": p["lora_a"][:4], "lora_b": p["lora_b"][:, :4], "row_scale": p["row_scale"][..., 0]}
    torch.testing.assert_close(masked_lora_linear(**p), masked_lora_linear(**p | first), atol=1e-6, rtol=1e-6)


def test_gradients_equal_those_of_the_reference() -> None:
    p = {name: t.double() for name, t in bank_problem(2, 5, 12, 10, 3, 2).items()}
    leaves = [p[name].requires_grad_() for name in ("x", "lora_a", "lora_b")]
    assert torch.autograd.gradcheck(lambda x, a, b: masked_lora_linear(x, p["weight"], p["bias"], a, b, p["row_scale"]), leaves)


def test_gradient_reaches_only_the_members_that_acted() -> None:
    p = bank_problem(2, 5, 12, 10, 3, 2)
    p["row_scale"][..., 1] = 0
    a, b = p["lora_a"].requires_grad_(), p["lora_b"].requires_grad_()
    masked_lora_linear(**p).square().sum().backward()
    assert a.grad is not None
    assert b.grad is not None
    assert [bool(part.any()) for part in a.grad.chunk(3)] == [True, False, True]
    assert [bool(part.any()) for part in b.grad.chunk(3, dim=1)] == [True, False, True]


def test_a_frozen_matrix_gets_no_gradient() -> None:
    p = bank_problem(1, 5, 12, 10, 2, 2)
    p["lora_a"].requires_grad_()
    masked_lora_linear(**p).sum().backward()
    assert p["lora_a"].grad is not None
    assert p["lora_b"].grad is None


def test_operator_passes_torch_library_opcheck_and_compiles_as_one_graph() -> None:
    p = bank_problem(2, 5, 12, 10, 3, 2)
    p["lora_a"].requires_grad_()
    torch.library.opcheck(torch.ops.slideredit.masked_lora_linear.default, tuple(p.values()))
    compiled = torch.compile(lambda: masked_lora_linear(**p), backend="aot_eager", fullgraph=True)()
    torch.testing.assert_close(compiled, masked_lora_linear(**p), atol=0, rtol=0)


def test_update_in_place_takes_a_bank() -> None:
    p = bank_problem(2, 7, 24, 20, 3, 4)
    expected, y = masked_lora_linear(**p), F.linear(p["x"], p["weight"], p["bias"])
    low_rank = (p["lora_a"], p["lora_b"], p["row_scale"])
    assert torch.equal(masked_lora_update_(y, p["x"], *low_rank), expected)


def test_rows_without_a_batch_axis() -> None:
    p = bank_problem(1, 7, 24, 20, 3, 4)
    flat = p | {"x": p["x"][0], "row_scale": p["row_scale"][0]}
    torch.testing.assert_close(masked_lora_linear(**flat), masked_lora_linear(**p)[0])


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (torch.zeros(2, 5, 4), "4 members, which do not divide a rank of 6 evenly"),
        (torch.zeros(2, 5, 0), "0 members"),
        (torch.zeros(2, 4, 3), "or, for a bank of adapters, one per row and member"),
        (torch.zeros(2, 5, 3, 1), "or, for a bank of adapters, one per row and member"),
        (torch.zeros(2, 5, 3, dtype=torch.bfloat16), "16 bits would round the strengths"),
    ],
)
def test_scales_that_do_not_belong_to_the_bank_get_one_sentence(scale: Tensor, message: str) -> None:
    with pytest.raises(SliderEditError, match=message):
        masked_lora_linear(**bank_problem(2, 5, 12, 10, 3, 2) | {"row_scale": scale})


def test_kernels_with_one_scale_per_row_refuse_a_bank() -> None:
    triton_ops = pytest.importorskip("slideredit_rt.kernels.triton_ops")
    with pytest.raises(SliderEditError, match="one scale per member of a bank; this kernel takes one per row"):
        triton_ops.masked_lora_linear_triton(**bank_problem(2, 5, 12, 10, 3, 2))
