"""The folded form that Inductor gives GST adapters: eager's numbers with one GEMM and one low-rank product for q, k and v."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slideredit_rt.adapters import Adapter, bank_adapters, load_adapter
from slideredit_rt.bench.projection import exact, plain, problem
from slideredit_rt.engines.folding import FoldedLoRALinear, fold
from slideredit_rt.export.onnx_graph import example_inputs
from slideredit_rt.families import Family
from slideredit_rt.modules import MaskedLoRALinear, RowScales, SliderBackbone


def linear_of(p: dict[str, Tensor], scales: RowScales) -> MaskedLoRALinear:
    base = nn.Linear(p["x"].shape[-1], len(p["weight"]))
    base.weight, base.bias = nn.Parameter(p["weight"]), nn.Parameter(p["bias"])
    return MaskedLoRALinear(base, "joint", scales, p["lora_a"], p["lora_b"])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("members", [None, 3])
def test_error_is_at_most_twice_that_of_the_plain_expression(members: int | None, dtype: torch.dtype) -> None:
    """Three projections of one input, of other ranks than the GEMM's alignment."""
    scales = RowScales()
    problems = [
        problem(2, 33, 60, n, rank, dtype, members=members, generator=torch.Generator().manual_seed(n))
        for n, rank in ((40, 3), (40, 5), (24, 4))
    ]
    shared = {name: problems[0][name] for name in ("x", "row_scale")}
    problems = [p | shared for p in problems]
    scales.set(shared["row_scale"], 0)
    y = FoldedLoRALinear([linear_of(p, scales) for p in problems], members or 0)(shared["x"])
    assert y.shape == (2, 33, 104)
    for part, p in zip(y.split([40, 40, 24], dim=-1), problems, strict=True):
        expected = exact(p)
        assert (part.double() - expected).abs().max() <= 2 * (plain(p).double() - expected).abs().max()


@torch.no_grad()
def test_without_scales_it_is_the_frozen_projection() -> None:
    p, scales = problem(1, 9, 16, 12, 4), RowScales()
    folded = FoldedLoRALinear([linear_of(p, scales)])
    torch.testing.assert_close(folded(p["x"]), F.linear(p["x"], p["weight"], p["bias"]))


def folded_and_not(family: Family, pipeline: Any, adapter: Adapter) -> tuple[SliderBackbone, SliderBackbone]:
    reference = SliderBackbone(family, copy.deepcopy(pipeline.transformer), adapter)
    folded = SliderBackbone(family, copy.deepcopy(pipeline.transformer), adapter)
    fold(folded)
    return folded, reference


@torch.no_grad()
def test_folded_backbone_agrees_with_the_eager_one(family: Family, pipeline: Any) -> None:
    folded, reference = folded_and_not(family, pipeline, load_adapter("shapes-gst", family))
    inputs = example_inputs(reference, pipeline.transformer.config, 3, 24, 128, 2)
    assert (folded(inputs) - reference(inputs)).abs().max() <= 1e-5
    inputs.pop("alpha"), inputs.pop("token_mask")
    assert (folded(inputs) - reference(inputs)).abs().max() <= 1e-5, "the adapter is off"


@torch.no_grad()
def test_bank_scales_each_column_by_its_member(family: Family, pipeline: Any) -> None:
    one = load_adapter("shapes-gst", family)
    # The second member is negative and twice as strong, so that a swap shows.
    other = dataclasses.replace(one, source="other", pairs={name: (a, -2 * b) for name, (a, b) in one.pairs.items()})
    bank = bank_adapters([one, other], ["one", "other"])
    folded, reference = folded_and_not(family, pipeline, bank)
    inputs = example_inputs(reference, pipeline.transformer.config, 2, 24, 128, 3)
    expected = reference(inputs)
    assert (folded(inputs) - expected).abs().max() <= 1e-5
    swapped = inputs | {"alpha": inputs["alpha"].flip(-1)}
    assert (folded(swapped) - expected).abs().max() >= 1e-3
    assert (folded(swapped) - reference(swapped)).abs().max() <= 1e-5


def test_query_key_and_value_become_one_projection_and_nothing_keeps_their_weights(family: Family, pipeline: Any) -> None:
    adapter = load_adapter("shapes-gst", family)
    folded, _ = folded_and_not(family, pipeline, adapter)
    transformer: Any = folded.transformer
    block, single = transformer.transformer_blocks[0].attn, transformer.single_transformer_blocks[0].attn
    assert {type(m) for m in (block.to_qkv, block.to_added_qkv, single.to_qkv)} == {FoldedLoRALinear}
    assert not hasattr(block, "to_q")
    assert not any(isinstance(m, MaskedLoRALinear) for m in transformer.modules())
    columns = -(-3 * adapter.rank // 8) * 8
    assert block.to_qkv.weight.shape == (3 * block.inner_dim, block.inner_dim + columns)


@torch.no_grad()
def test_an_attention_of_which_a_part_is_frozen_keeps_its_projections_apart(family: Family, pipeline: Any) -> None:
    adapter = load_adapter("shapes-gst", family).without(["transformer_blocks.0.attn.add_k_proj"])
    folded, reference = folded_and_not(family, pipeline, adapter)
    transformer: Any = folded.transformer
    attention = transformer.transformer_blocks[0].attn
    assert isinstance(attention.to_q, FoldedLoRALinear)
    assert type(attention.add_k_proj) is nn.Linear
    inputs = example_inputs(reference, pipeline.transformer.config, 1, 24, 128, 1)
    assert (folded(inputs) - reference(inputs)).abs().max() <= 1e-5
