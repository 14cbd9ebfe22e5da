"""Device memory of an edit, told without a GPU: what lives at one time, what fits on a card, and what leaves it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from diffusers import Flux2Transformer2DModel, FluxTransformer2DModel, QwenImageTransformer2DModel
from torch import Tensor, nn

from slideredit_rt.assets import resolve_base
from slideredit_rt.bench.full_size import FULL_SIZES
from slideredit_rt.engines.manifest import read_manifest
from slideredit_rt.export.build import build_engine
from slideredit_rt.families import get_family
from slideredit_rt.memory import RESERVED, Footprint, engine_footprint, live_peak, plan_memory
from slideredit_rt.quantization.linear import stored_parts
from slideredit_rt.quantization.precisions import PRECISIONS
from slideredit_rt.quantization.selection import select_layers
from slideredit_rt.quantization.write import QuantizeSettings, quantize_base

GIB = 2**30
# In bfloat16 at 1024 × 1024, one source image: parameters counted on `meta`, activations by `live_peak`.
BASES = {
    "FLUX.1-Kontext": Footprint(
        weights=int(22.2 * GIB),
        encoders=int(9.1 * GIB),
        largest_encoder_weight=32128 * 4096 * 2,
        decoder=int(0.16 * GIB),
        step=int(0.86 * GIB),
        decode=int(1.5 * GIB),
        tiled_decode=int(0.4 * GIB),
        max_batch=16,
        streams=True,
    ),
    "Qwen-Image-Edit": Footprint(
        weights=int(38.1 * GIB),
        encoders=int(15.5 * GIB),
        largest_encoder_weight=152064 * 3584 * 2,
        decoder=int(0.24 * GIB),
        step=int(0.73 * GIB),
        decode=int(3.4 * GIB),
        tiled_decode=int(0.2 * GIB),
        max_batch=16,
        streams=True,
    ),
    "FLUX.2-klein 4B": Footprint(
        weights=int(7.22 * GIB),
        encoders=int(7.5 * GIB),
        largest_encoder_weight=151936 * 2560 * 2,
        decoder=int(0.16 * GIB),
        step=int(1.08 * GIB),
        decode=int(1.51 * GIB),
        tiled_decode=int(0.4 * GIB),
        max_batch=16,
        streams=True,
    ),
    "FLUX.2-klein 9B": Footprint(
        weights=int(16.91 * GIB),
        encoders=int(15.3 * GIB),
        largest_encoder_weight=151936 * 4096 * 2,
        decoder=int(0.16 * GIB),
        step=int(1.43 * GIB),
        decode=int(1.51 * GIB),
        tiled_decode=int(0.4 * GIB),
        max_batch=16,
        streams=True,
    ),
}
FLUX = BASES["FLUX.1-Kontext"]
TRANSFORMERS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "FLUX.1-Kontext": ("flux_kontext", FluxTransformer2DModel, {"guidance_embeds": True}),
    "Qwen-Image-Edit": ("qwen_image_edit", QwenImageTransformer2DModel, {}),
    "FLUX.2-klein 4B": ("flux2", Flux2Transformer2DModel, dict(FULL_SIZES["flux2_klein_4b"].full)),
    "FLUX.2-klein 9B": ("flux2", Flux2Transformer2DModel, dict(FULL_SIZES["flux2_klein_9b"].full)),
}


class Chain(nn.Module):
    """Two linears and a residual, of 1 MiB of activations each in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(256, 256, device="meta")
        self.second = nn.Linear(256, 256, device="meta")

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.second(self.first(x))
        return y


def test_the_peak_counts_tensors_that_live_together_and_no_weights() -> None:
    chain, x = Chain(), torch.empty(1024, 256, device="meta")
    # The sum is made while the second linear's output lives; the first one's is gone by then. `x` is the caller's.
    assert live_peak(lambda: chain(x), chain) == 2 * 2**20


def test_views_and_operators_in_place_take_no_memory() -> None:
    module, x = nn.Identity(), torch.empty(1024, 256, device="meta")
    assert live_peak(lambda: (x + 1).view(256, 1024).T.relu_(), module) == 2**20


def test_attention_counts_without_its_scores() -> None:
    q = torch.empty(1, 4, 4096, 32, device="meta", dtype=torch.bfloat16)
    own = q.nbytes
    assert live_peak(lambda: F.scaled_dot_product_attention(q, q, q), nn.Identity()) == own


def test_an_engine_takes_what_its_files_hold(engines: dict[str, Path]) -> None:
    found = engine_footprint(engines["st"], read_manifest(engines["st"]), resolve_base("shapes-kontext"))
    shard = (engines["st"] / "diffusion_pytorch_model.safetensors").stat().st_size
    adapter = (engines["st"] / "adapter.safetensors").stat().st_size
    assert 0.99 * (shard + adapter) < found.weights < shard + adapter, "all but the headers"
    text, vae = (
        sum(f.stat().st_size for name in names for f in (resolve_base("shapes-kontext") / name).glob("*.safetensors"))
        for names in (("text_encoder", "text_encoder_2"), ("vae",))
    )
    # Stored in 16 bits as they are deployed, or in 32.
    assert found.encoders in range(text // 2 - 10_000, text)
    assert found.decoder in range(vae // 2 - 50_000, vae)
    assert found.step > 0
    assert 0 < found.tiled_decode <= found.decode
    assert not found.streams


@pytest.mark.parametrize(
    ("vram", "offload"),
    [(80, "none"), (48, "none"), (36, "none"), (32, "encoders"), (26, "encoders"), (25, "all"), (24, "all"), (16, "all")],
)
def test_what_leaves_a_card_of_a_given_size(vram: int, offload: str) -> None:
    plan = plan_memory(FLUX, vram * GIB)
    assert (plan.offload, plan.fits) == (offload, True)
    assert plan.vram_gib == vram
    assert 1 <= plan.max_batch <= FLUX.max_batch


def test_a_plan_never_promises_more_than_the_card_has() -> None:
    for vram in range(1, 100):
        plan = plan_memory(FLUX, vram * GIB)
        if plan.fits:
            resident = plan.weights_gib + plan.decoder_gib + (plan.encoders_gib if plan.offload == "none" else 0)
            assert plan.offload != "all" or plan.max_batch == 1
            assert resident + plan.max_batch * FLUX.step / GIB + RESERVED / GIB <= vram + 0.1
        else:
            assert plan.max_batch == 0


def test_what_a_server_keeps_leaves_less_for_edits() -> None:
    kept: dict[str, Any] = {"adapters": GIB, "preview_decoder": GIB // 4, "cache": GIB // 2}
    plan, served = plan_memory(FLUX, 36 * GIB), plan_memory(replace(FLUX, **kept), 36 * GIB)
    assert (served.adapters_gib, served.preview_decoder_gib, served.cache_gib) == (1, 0.25, 0.5)
    assert served.needed_gib == pytest.approx(plan.needed_gib + 1.75, abs=0.02)
    assert (plan.offload, served.offload) == ("none", "encoders")
    for name in kept:
        large: dict[str, Any] = {name: 20 * GIB}
        alone = plan_memory(replace(FLUX, **large), 36 * GIB)
        assert (alone.offload, alone.fits) == ("all", True), name


def test_without_weight_streaming_a_small_card_does_not_fit() -> None:
    still = Footprint(**{**vars(FLUX), "streams": False})
    plan = plan_memory(still, 16 * GIB)
    assert (plan.fits, plan.max_batch, plan.offload) == (False, 0, "encoders")
    assert plan_memory(FLUX, 16 * GIB).fits


def in_precision(name: str, precision: str) -> Footprint:
    """The footprint of a base of which `slideredit-rt quantize` stores the linears in a precision."""
    family, model_class, config = TRANSFORMERS[name]
    with init_empty_weights():
        transformer = model_class(**config)
    size = 2 * sum(parameter.numel() for parameter in transformer.parameters())
    assert size == pytest.approx(BASES[name].weights, rel=0.01)
    for module, layer in select_layers(get_family(family), transformer, precision).items():
        linear = transformer.get_submodule(module)
        form = PRECISIONS[layer.precision]
        parts = stored_parts(form, linear.out_features, linear.in_features, activations=layer.activations)
        size += sum(math.prod(part.shape) * part.dtype.itemsize for part in parts.values()) - 2 * linear.weight.numel()
    return replace(BASES[name], weights=size)


def test_the_documentation_has_what_the_plan_says() -> None:
    how = {"none": "everything", "encoders": "`--offload encoders`", "all": "weight streaming"}
    page = (Path(__file__).parents[1] / "docs" / "engines.md").read_text()
    rows = {f"{name}, bfloat16": footprint for name, footprint in BASES.items()}
    rows |= {f"{name}, {precision}": in_precision(name, precision) for name in BASES for precision in ("fp8", "int4")}
    for row, footprint in rows.items():
        plans = [plan_memory(footprint, vram * GIB) for vram in (16, 24, 32, 48, 80)]
        cells = [f"{how[plan.offload]}, batch {plan.max_batch}" if plan.fits else "does not fit" for plan in plans]
        assert f"| {row} | {footprint.weights / GIB:.1f} GiB | {' | '.join(cells)} |" in page


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_quantised_engine_takes_what_its_weights_and_scales_are_stored_in(tmp_path: Path, precision: str) -> None:
    quantize_base("shapes-kontext", tmp_path / "base", QuantizeSettings(precision), progress=False)
    manifest = build_engine(tmp_path / "base", None, tmp_path / "engine", progress=False)
    found = engine_footprint(tmp_path / "engine", manifest, tmp_path / "base")
    shard = (tmp_path / "base" / "transformer" / "diffusion_pytorch_model.safetensors").stat().st_size
    # ONNX Runtime has a scale for each block of 128 inputs, where the base may have one per channel.
    assert 0.98 * shard < found.weights < 1.1 * shard
