"""The Triton kernels against float64: on the device where there is one, else under Triton's interpreter.

Needs torch, triton, numpy, pytest and hypothesis only, so that it runs on a bare GPU machine (`make gpu-test`).
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import triton
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from slideredit_rt import SliderEditError, kernels
from slideredit_rt.bench import projection
from slideredit_rt.bench.projection import exact, plain
from slideredit_rt.kernels import triton_linear, triton_update
from slideredit_rt.kernels.configurations import SHARED_KIB, configuration, configurations, table

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Rows, K, N, rank: nothing is a multiple of a tile, and the last has enough inner columns for every part of the update.
ODD_SHAPES = [(1, 60, 100, 4), (63, 60, 100, 16), (129, 128, 33, 33), (300, 72, 257, 128), (20, 2040, 33, 5)]


@pytest.fixture(autouse=True)
def _memory_holds_nan_before_a_kernel_writes_it() -> Iterator[None]:
    """`torch.empty` fills with NaN, so that an element that no kernel wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    assert torch.empty(1, device=DEVICE).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def problem(
    batch: int, rows: int, k: int, n: int, rank: int, dtype: torch.dtype = torch.float32, active: float = 0.3
) -> dict[str, Tensor]:
    """The same numbers on every device; most rows are inactive."""
    p = projection.problem(batch, rows, k, n, rank, dtype, active=active)
    return {name: tensor.to(DEVICE) for name, tensor in p.items()}


def update(**p: Tensor) -> Tensor:
    """The in-place kernel beside torch's own projection."""
    y = F.linear(p["x"], p["weight"], p["bias"])
    return kernels.masked_lora_update_triton_(y, p["x"], p["lora_a"], p["lora_b"], p["row_scale"])


KERNELS: dict[str, Callable[..., Tensor]] = {
    "linear": kernels.masked_lora_linear_triton,
    "update": update,
}


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest) -> Callable[..., Tensor]:
    return KERNELS[request.param]


def run(kernel: Callable[..., Tensor], p: dict[str, Tensor]) -> Tensor:
    return kernel(**p)


def assert_close_to_exact(name: str, y: Tensor, p: dict[str, Tensor]) -> None:
    """At most twice the error of the same-dtype expression, or what rounding and summation in float32 cost."""
    expected = exact(p)
    error, allowed = ((t.double() - expected).abs().max().item() for t in (y, plain(p)))
    # Half a unit in the last place of the largest value: what rounding the exact result may cost.
    rounding = torch.finfo(y.dtype).eps / 2 * expected.abs().max().item()
    # Sums one after the other, as the kernels compute them, err by about √K half units (Higham and Mary 2019); a vendor's sums
    # in blocks err less.
    terms = exact({argument: tensor.abs() for argument, tensor in p.items()}).max().item()
    summation = p["x"].shape[-1] ** 0.5 * torch.finfo(torch.float32).eps / 2 * terms
    assert error <= max(2 * allowed, rounding, summation), f"{name}: error {error:.2e}, the plain expression's {allowed:.2e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ODD_SHAPES, ids=str)
def test_error_is_at_most_twice_that_of_the_plain_expression(
    kernel: Callable[..., Tensor], shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    p = problem(2, *shape, dtype)
    assert_close_to_exact(kernel.__name__, run(kernel, p), p)


@pytest.mark.parametrize("rank", [1, 4, 17, 64])
def test_ranks_are_padded_for_the_tensor_cores(kernel: Callable[..., Tensor], rank: int) -> None:
    p = problem(1, 40, 96, 48, rank, torch.bfloat16)
    assert_close_to_exact(kernel.__name__, run(kernel, p), p)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("active", ["none", "one", "all"])
def test_rows_of_scale_zero_get_the_frozen_projection_bit_for_bit(
    kernel: Callable[..., Tensor], active: str, dtype: torch.dtype
) -> None:
    p = problem(1, 140, 60, 100, 16, dtype, active=1.0)
    frozen = run(kernel, p | {"row_scale": torch.zeros_like(p["row_scale"])})
    if active == "one":
        p["row_scale"][0, torch.arange(140, device=DEVICE) != 133] = 0
    elif active == "none":
        p["row_scale"].zero_()
    y = run(kernel, p)
    off = p["row_scale"][0] == 0
    assert torch.equal(y[0, off], frozen[0, off])
    assert (y[0, ~off] != frozen[0, ~off]).any(dim=-1).all()
    if kernel is update:
        assert torch.equal(frozen, F.linear(p["x"], p["weight"], p["bias"])), "the vendor's bits are kept"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [-1.0, -0.25, 0.0, 1e-30, 3e4, -3e4], ids=str)
def test_negative_zero_tiny_and_huge_scales(kernel: Callable[..., Tensor], scale: float, dtype: torch.dtype) -> None:
    p = problem(1, 33, 60, 100, 16, dtype)
    # Small enough that even float16 holds the scaled result, though not the scaled low-rank product.
    p["lora_b"] = p["lora_b"] * 1e-2
    p["row_scale"] = torch.full_like(p["row_scale"], scale)
    y = run(kernel, p)
    assert y.isfinite().all()
    assert_close_to_exact(kernel.__name__, y, p)


def test_nan_in_an_inactive_row_stays_in_that_row(kernel: Callable[..., Tensor]) -> None:
    p = problem(1, 40, 60, 100, 16, torch.bfloat16, active=1.0)
    p["row_scale"][0, 7] = 0
    clean = run(kernel, p)
    p["x"][0, 7] = float("nan")
    y = run(kernel, p)
    others = torch.arange(40, device=DEVICE) != 7
    assert torch.equal(y[0, others], clean[0, others])


def test_infinity_in_an_inactive_row_gives_what_the_frozen_projection_gives(kernel: Callable[..., Tensor]) -> None:
    p = problem(1, 40, 60, 100, 16, active=1.0)
    p["row_scale"][0, 7] = 0
    p["x"][0, 7, 3] = float("inf")
    frozen = run(kernel, p | {"row_scale": torch.zeros_like(p["row_scale"])})
    assert frozen[0, 7].isinf().all()
    assert torch.equal(run(kernel, p)[0, 7], frozen[0, 7]), "0 · ∞ would be NaN"


def test_update_neither_reads_nor_writes_inactive_rows() -> None:
    p = problem(1, 700, 60, 100, 16, torch.bfloat16, active=0.1)
    off = p["row_scale"][0] == 0
    y = F.linear(p["x"], p["weight"], p["bias"])
    y[0, off] = float("nan")
    bits = y.clone().view(torch.int16)
    kernels.masked_lora_update_triton_(y, p["x"], p["lora_a"], p["lora_b"], p["row_scale"])
    assert torch.equal(y.view(torch.int16)[0, off], bits[0, off])
    assert y[0, ~off].isfinite().all()


def test_a_nan_scale_is_not_taken_for_an_idle_row(kernel: Callable[..., Tensor]) -> None:
    p = problem(1, 5, 60, 100, 4)
    p["row_scale"][0, 2] = float("nan")
    assert run(kernel, p)[0, 2].isnan().all()


@settings(max_examples=15, deadline=None, derandomize=True)
@example(mask=[True], scale=-2.0, name="linear")
@given(
    mask=st.lists(st.booleans(), min_size=1, max_size=600),
    scale=st.sampled_from([-2.0, 0.5, 1e3]),
    name=st.sampled_from(["linear", "update"]),
)
def test_any_mask(mask: list[bool], scale: float, name: str) -> None:
    # Rows that follow the mask make enough values for the largest errors of two float32 sums to compare: on a single row the
    # plain expression's may be small by luck. Small shapes are `ODD_SHAPES`'.
    mask = mask + [True] * 64
    p = problem(1, len(mask), 24, 20, 4)
    on = torch.tensor(mask, device=DEVICE)
    p["row_scale"] = on.float()[None] * scale
    y = KERNELS[name](**p)
    frozen = KERNELS[name](**p | {"row_scale": torch.zeros_like(p["row_scale"])})
    assert torch.equal(y[0, ~on], frozen[0, ~on])
    assert_close_to_exact(name, y, p)


def test_result_of_a_batch_row_does_not_depend_on_the_others(kernel: Callable[..., Tensor]) -> None:
    p = problem(3, 50, 60, 100, 16, torch.bfloat16)
    y = run(kernel, p)
    for i in range(3):
        alone = run(kernel, p | {"x": p["x"][i : i + 1], "row_scale": p["row_scale"][i : i + 1]})
        torch.testing.assert_close(y[i], alone[0], atol=0, rtol=2**-7)


def test_strided_input_missing_bias_and_two_dimensions(kernel: Callable[..., Tensor]) -> None:
    p = problem(2, 30, 60, 100, 16)
    wide = torch.randn(2, 45, 75, device=DEVICE)
    wide[:, 9:39, 5:65] = p["x"]
    strided = p | {"x": wide[:, 9:39, 5:65]}
    torch.testing.assert_close(run(kernel, strided), run(kernel, p), atol=1e-5, rtol=1e-5)
    flat = p | {"x": p["x"][0], "row_scale": p["row_scale"][0]}
    torch.testing.assert_close(run(kernel, flat), run(kernel, p)[0], atol=1e-5, rtol=1e-5)
    if kernel is not update:
        unbiased = run(kernel, p | {"bias": None})  # type: ignore[arg-type]
        torch.testing.assert_close(unbiased + p["bias"], run(kernel, p), atol=1e-4, rtol=1e-4)


def test_adapter_in_float32_beside_a_bfloat16_base(kernel: Callable[..., Tensor]) -> None:
    p = problem(1, 40, 60, 100, 16, torch.bfloat16)
    wide = p | {"lora_a": p["lora_a"].float(), "lora_b": p["lora_b"].float()}
    assert_close_to_exact(kernel.__name__, run(kernel, wide), p)


@pytest.mark.parametrize("name", ["update", "low_rank", "linear"])
def test_addresses_beyond_two_to_the_31(name: str) -> None:
    """The last row of `x` starts past 2³¹ elements."""
    if name == "linear" and DEVICE == "cpu":
        pytest.skip("reads 4 GiB: hours under the interpreter")
    rows, k = 2**15 + 1, 2**16
    p = problem(1, 1, k, 16, 4, torch.bfloat16, active=1.0)
    p["weight"].zero_()
    p["bias"].zero_()
    scale = torch.zeros(1, rows, device=DEVICE)
    scale[0, -1] = 0.5
    # Only the pages that are touched become real.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    x = torch.empty(1, rows, k, dtype=torch.bfloat16, device=DEVICE)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    if DEVICE == "cuda":
        x.zero_()
    x[0, -1] = p["x"][0, 0]
    expected = exact(p | {"row_scale": scale[:, -1:]})[0, 0]
    if name == "low_rank":
        low = torch.empty(2, rows, 4, device=DEVICE)
        tiles = configuration("masked_low_rank", rows, 4, x.dtype, 80)
        triton_update.launch_low_rank(x[0], p["lora_a"], scale[0, :, None], tiles, low)
        low = low.sum(0)
        last, others = low[-1].double() @ p["lora_b"].double().T, low[:-1]
    else:
        y = run(KERNELS[name], p | {"x": x, "row_scale": scale}) if name != "update" else x.new_zeros(1, rows, 16)
        if name == "update":
            kernels.masked_lora_update_triton_(y, x, p["lora_a"], p["lora_b"], scale)
        last, others = y[0, -1].double(), y[0, :-1]
    torch.testing.assert_close(last, expected, atol=1e-2, rtol=1e-2)
    assert not others.any()


OPERATORS = ["linear", "update"]


@pytest.mark.parametrize("name", OPERATORS)
def test_operator_passes_torch_library_opcheck(name: str) -> None:
    p = problem(2, 5, 12, 10, 3)
    arguments = {
        "update": (torch.zeros(2, 5, 10, device=DEVICE), p["x"], p["lora_a"], p["lora_b"], p["row_scale"]),
    }.get(name, tuple(p.values()))
    suffix = "triton_" if name == "update" else "triton"
    operator = getattr(torch.ops.slideredit, f"masked_lora_{name}_{suffix}").default
    torch.library.opcheck(operator, arguments)


def test_the_compiler_sees_the_kernel_and_that_it_writes_only_its_output() -> None:
    """Traced for a card that is not here: the graph holds the launch, and torch's analysis finds one written argument."""
    script = """
        from types import SimpleNamespace
        import torch, triton
        from torch._subclasses import FakeTensorMode
        from torch._subclasses.functional_tensor import dispatch_functionalize
        from torch.fx.experimental.proxy_tensor import make_fx
        from triton.backends.compiler import GPUTarget
        from slideredit_rt import kernels

        target = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0)
        triton.runtime.driver.set_active(target)
        with FakeTensorMode():
            def empty(*shape):
                return torch.empty(*shape, device="cuda", dtype=torch.bfloat16)
            arguments = (empty(2, 512, 3072), empty(3072, 3072), empty(3072), empty(16, 3072), empty(3072, 16))
            graph = make_fx(dispatch_functionalize(kernels.masked_lora_linear_triton), tracing_mode="fake")(
                *arguments, torch.empty(2, 512, device="cuda")
            )
        calls = [n for n in graph.graph.nodes if "triton_kernel_wrapper" in str(n.target)]
        print(len(calls), *calls[0].kwargs["tensors_to_clone"])
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.stdout.split() == ["1", "y"], done.stderr


def test_update_in_place_refuses_an_output_with_gaps() -> None:
    p = problem(1, 4, 24, 16, 4)
    beside = torch.zeros(1, 4, 32, device=DEVICE)
    with pytest.raises(SliderEditError, match="y is not contiguous"):
        kernels.masked_lora_update_triton_(beside[..., :16], p["x"], p["lora_a"], p["lora_b"], p["row_scale"])
    assert not beside.any()


def bank(rows: int, members: int, rank: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """A bank whose rows use any number of members, also none."""
    p = projection.problem(2, rows, 60, 100, rank, dtype, members=members, active=0.6)
    p["row_scale"] *= torch.rand(p["row_scale"].shape, generator=torch.Generator().manual_seed(1)) < 0.5
    return {name: tensor.to(DEVICE) for name, tensor in p.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "members", "rank"), [(63, 2, 4), (129, 3, 5), (300, 22, 7), (40, 2, 128)])
def test_update_of_a_bank_in_as_many_launches_as_its_ranks_need(rows: int, members: int, rank: int, dtype: torch.dtype) -> None:
    p = bank(rows, members, rank, dtype)
    y = update(**p)
    assert_close_to_exact("bank", y, p)
    off = (p["row_scale"] == 0).all(dim=-1)
    assert off.any()
    assert torch.equal(y[off], F.linear(p["x"], p["weight"], p["bias"])[off])


def test_update_of_a_bank_of_one_has_the_bits_of_one_adapter() -> None:
    p = bank(40, 1, 16, torch.bfloat16)
    assert torch.equal(update(**p), update(**p | {"row_scale": p["row_scale"][..., 0]}))


def test_a_member_of_scale_zero_adds_nothing_even_where_its_product_is_nan() -> None:
    p = bank(40, 3, 4, torch.float32)
    p["row_scale"][..., 1] = 0
    without = update(**p)
    p["lora_a"][4:8] = float("nan")
    assert torch.equal(update(**p), without)


@pytest.mark.parametrize("members", [None, 3])
def test_nothing_on_a_gpu_computes_with_the_reference(members: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `masked_lora_linear` calls for CUDA tensors, here under the interpreter."""
    from slideredit_rt.kernels import reference, triton_ops

    p = {n: t.to(DEVICE) for n, t in projection.problem(2, 40, 60, 100, 4, torch.bfloat16, members=members).items()}

    def refuse(*arguments: object) -> None:
        raise AssertionError("the reference ran")

    for name in ("_updated", "scaled_low_rank"):
        monkeypatch.setattr(reference, name, refuse)
    y = kernels.masked_lora_linear(**p) if DEVICE == "cuda" else triton_ops.linear_then_update(**p)
    assert_close_to_exact("on a GPU", y, p)


@pytest.mark.parametrize(
    ("version", "capability", "one_stage"),
    [
        ("3.6.0", 90, True),
        ("3.7.0+git12ab34", 90, True),
        ("3.6.0", 100, True),
        ("3.7.1", 90, False),
        ("3.10.0", 90, False),
        ("3.6.0", 89, False),
        ("3.6.0", 120, False),
    ],
)
def test_one_stage_where_this_triton_would_leave_out_a_fence(
    version: str, capability: int, one_stage: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only copies that are pipelined go through `cp.async`."""
    from slideredit_rt.kernels import triton_ops

    launched, launch = [], triton_linear.launch

    def record(*arguments: Any) -> None:
        launched.append(arguments[6])
        launch(*arguments)

    monkeypatch.setattr(triton, "__version__", version)
    monkeypatch.setattr(triton_ops, "_capability", lambda x: capability)
    monkeypatch.setattr(triton_ops, "launch_masked_lora_linear", record)
    p = problem(1, 5, 64, 16, 4, torch.bfloat16)
    assert_close_to_exact("linear", kernels.masked_lora_linear_triton(**p), p)
    table_choice = configuration("masked_lora_linear", 5, 4, torch.bfloat16, capability)
    assert launched == [replace(table_choice, num_stages=1) if one_stage else table_choice]
    assert table_choice.num_stages > 1


def test_bad_arguments_get_one_sentence(kernel: Callable[..., Tensor]) -> None:
    p = problem(1, 5, 12, 10, 3)
    with pytest.raises(SliderEditError, match="row_scale has shape"):
        kernel(**p | {"row_scale": p["row_scale"][:, :4]})
    with pytest.raises(SliderEditError, match="do not fit a projection from 12 to 10"):
        kernel(**p | {"lora_b": p["lora_b"][:9]})
    with pytest.raises(SliderEditError, match="would round the strengths"):
        kernel(**p | {"row_scale": p["row_scale"].bfloat16()})


def test_every_shipped_configuration_is_reachable_and_every_shape_has_one() -> None:
    for name, rules in table().items():
        reached = set()
        for capability in SHARED_KIB:
            for rank in (4, 16, 33, 128):
                for dtype in DTYPES:
                    found = configurations(name, rank, dtype, capability)
                    assert configuration(name, 1, rank, dtype, capability) == found[-1]
                    reached.update(found)
        assert {tuple(rule["blocks"]) for rule in rules} == {(c.block_m, c.block_n, c.block_k) for c in reached}
