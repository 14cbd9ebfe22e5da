"""Injection: which linears an adapter reaches, what it leaves alone, and that it agrees with PEFT."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from peft import LoraConfig
from peft.tuners.lora import LoraLayer

from slideredit_rt.adapters import Adapter, load_adapter
from slideredit_rt.errors import SliderEditError
from slideredit_rt.export.onnx_graph import example_inputs
from slideredit_rt.families import Family
from slideredit_rt.modules import MaskedLoRALinear, SliderBackbone


def test_targets_on_the_full_size_model_are_those_of_the_released_adapters(family: Family) -> None:
    with torch.device("meta"):
        flux = FluxTransformer2DModel(guidance_embeds=True)
    linears = [name for name, m in flux.named_modules() if isinstance(m, torch.nn.Linear)]
    assert sum(bool(family.targets("st").fullmatch(n)) for n in linears) == 114
    assert sum(bool(family.targets("gst").fullmatch(n)) for n in linears) == 342
    every = [n for n in linears if family.targets("gst", all_projections=True).fullmatch(n)]
    assert len(every) == 342 + 2 * 38
    assert {family.rows_of(n) for n in every if n.startswith("single")} == {"joint"}
    rows = {family.rows_of(n) for n in linears if family.targets("st").fullmatch(n)}
    assert rows == {"text"}


@torch.no_grad()
def test_alpha_zero_is_the_base_model_bit_for_bit(family: Family, pipeline: Any, kind: str) -> None:
    transformer = pipeline.transformer
    backbone = SliderBackbone(family, transformer, load_adapter(f"shapes-{kind}", family))
    inputs = example_inputs(backbone, transformer.config, 3, 24, 128, 2)
    inputs["alpha"].zero_()
    adapted = backbone(inputs)
    backbone.remove()
    plain = {k: v for k, v in inputs.items() if k not in ("alpha", "token_mask")}
    assert torch.equal(adapted, transformer(**plain, return_dict=False)[0])


@torch.no_grad()
def test_gst_on_all_rows_equals_peft_at_that_scale(family: Family, pipeline: Any) -> None:
    adapter = load_adapter("shapes-gst", family)
    transformer = pipeline.transformer
    backbone = SliderBackbone(family, transformer, adapter)
    inputs = example_inputs(backbone, transformer.config, 2, 24, 128, 1)
    inputs["token_mask"].fill_(True)
    inputs["alpha"].fill_(0.7)
    ours = backbone(inputs)
    backbone.remove()
    config = LoraConfig(r=adapter.rank, lora_alpha=adapter.rank, target_modules=list(adapter.pairs), init_lora_weights=False)
    transformer.add_adapter(config)
    layers = {name: m for name, m in transformer.named_modules() if isinstance(m, LoraLayer)}
    assert set(layers) == set(adapter.pairs)
    for name, layer in layers.items():
        layer.lora_A["default"].weight.copy_(adapter.pairs[name][0])
        layer.lora_B["default"].weight.copy_(adapter.pairs[name][1])
        layer.set_scale("default", 0.7)
    plain = {k: v for k, v in inputs.items() if k not in ("alpha", "token_mask")}
    theirs = transformer(**plain, return_dict=False)[0]
    assert (ours - theirs).norm() / theirs.norm() <= 1e-5


@torch.no_grad()
def test_rows_of_a_mixed_batch_do_not_see_each_other(family: Family, pipeline: Any, kind: str) -> None:
    backbone = SliderBackbone(family, pipeline.transformer, load_adapter(f"shapes-{kind}", family))
    inputs = example_inputs(backbone, pipeline.transformer.config, 4, 24, 128, 3)
    mixed = backbone(inputs)
    for row in range(4):
        alone = {k: v if k.endswith("_ids") else v[row : row + 1] for k, v in inputs.items()}
        assert (mixed[row] - backbone(alone)[0]).abs().max() <= 1e-5


@torch.no_grad()
def test_st_changes_nothing_for_a_slider_whose_rows_are_not_in_the_mask(family: Family, pipeline: Any) -> None:
    backbone = SliderBackbone(family, pipeline.transformer, load_adapter("shapes-st", family))
    inputs = example_inputs(backbone, pipeline.transformer.config, 1, 24, 128, 2)
    inputs["token_mask"][:, 1] = False
    first = backbone(inputs)
    inputs["alpha"][:, 1] = 5.0
    assert torch.equal(first, backbone(inputs))


def test_removal_restores_linears_parameters_and_keys(family: Family, pipeline: Any) -> None:
    transformer = pipeline.transformer
    keys, weights = list(transformer.state_dict()), {n: id(p) for n, p in transformer.named_parameters()}
    backbone = SliderBackbone(family, transformer, load_adapter("shapes-st", family))
    assert set(keys) < set(transformer.state_dict())
    backbone.remove()
    assert list(transformer.state_dict()) == keys
    assert {n: id(p) for n, p in transformer.named_parameters()} == weights
    assert not any(isinstance(m, MaskedLoRALinear) for m in transformer.modules())


def _random_adapter(family: Family, names: list[str], k: int = 128, n: int = 128, rank: int = 4, kind: Any = "gst") -> Adapter:
    return Adapter(
        family.name, kind, rank, {name: (torch.ones(rank, k), torch.ones(n, rank)) for name in names}, "test-adapter"
    )


@pytest.mark.parametrize(
    ("names", "k", "kind", "message"),
    [
        (["unet.mid.to_q"], 128, "gst", "only 0 of the 1 modules"),
        (["transformer_blocks.0.attn.to_q", "transformer_blocks.7.attn.to_q"], 128, "gst", "only 1 of the 2 modules"),
        (["transformer_blocks.0.norm1.linear"], 128, "gst", "only 0 of"),
        (
            ["transformer_blocks.0.attn.to_q"],
            3072,
            "gst",
            re.escape("128×3072 update for transformer_blocks.0.attn.to_q, which is 128×128"),
        ),
        (["transformer_blocks.0.attn.to_q"], 128, "st", "does not project text rows"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_and_nothing_is_injected(
    family: Family, pipeline: Any, names: list[str], k: int, kind: Any, message: str
) -> None:
    with pytest.raises(SliderEditError, match=message):
        SliderBackbone(family, pipeline.transformer, _random_adapter(family, names, k, kind=kind))
    assert not any(isinstance(m, MaskedLoRALinear) for m in pipeline.transformer.modules())


@torch.no_grad()
def test_projections_fused_after_injection_are_refused(family: Family, pipeline: Any, kind: str) -> None:
    transformer = pipeline.transformer
    backbone = SliderBackbone(family, transformer, load_adapter(f"shapes-{kind}", family))
    inputs = example_inputs(backbone, transformer.config, 1, 16, 32, 1)
    expected = backbone(inputs)
    # diffusers builds the fused projections from the weights alone: without a word, the sliders would do nothing.
    transformer.fuse_qkv_projections()
    with pytest.raises(SliderEditError, match=r"the projections of \S+attn were fused .* call unfuse_qkv_projections"):
        backbone(inputs)
    transformer.unfuse_qkv_projections()
    assert backbone(inputs).equal(expected)
