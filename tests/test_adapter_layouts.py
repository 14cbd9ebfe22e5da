"""LoRA files as other trainers name them: the linears and scales that diffusers gives them, and nothing lost on the way."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel, QwenImageEditPipeline, QwenImageTransformer2DModel
from flux2_checkpoint import tiny_transformer
from safetensors.torch import load_file, save_file
from test_adapters import expected_updates, gives
from torch import Tensor

from slideredit_rt.adapters import Adapter, load_adapter
from slideredit_rt.assets import resolve_base
from slideredit_rt.checkpoint import meta_transformer
from slideredit_rt.errors import SliderEditError
from slideredit_rt.families import Family, get_family

DUAL, SINGLE = "transformer_blocks", "single_transformer_blocks"
# Black Forest Labs' name of a projection, and the linears that diffusers splits it into.
BFL = {
    "double_blocks.0.txt_attn.qkv": [f"{DUAL}.0.attn.add_{x}_proj" for x in "qkv"],
    "double_blocks.0.img_attn.qkv": [f"{DUAL}.0.attn.to_{x}" for x in "qkv"],
    "double_blocks.0.txt_attn.proj": [f"{DUAL}.0.attn.to_add_out"],
    "double_blocks.1.img_attn.proj": [f"{DUAL}.1.attn.to_out.0"],
    "double_blocks.1.txt_mlp.0": [f"{DUAL}.1.ff_context.net.0.proj"],
    "double_blocks.1.img_mlp.2": [f"{DUAL}.1.ff.net.2"],
    "single_blocks.2.linear2": [f"{SINGLE}.2.proj_out"],
}
XLABS = {
    "double_blocks.0.processor.qkv_lora2": BFL["double_blocks.0.txt_attn.qkv"],
    "double_blocks.0.processor.qkv_lora1": BFL["double_blocks.0.img_attn.qkv"],
    "double_blocks.1.processor.proj_lora1": BFL["double_blocks.1.img_attn.proj"],
    "double_blocks.1.processor.proj_lora2": [f"{DUAL}.1.attn.to_add_out"],
    "single_blocks.1.processor.qkv_lora": [f"{SINGLE}.1.attn.to_{x}" for x in "qkv"],
    "single_blocks.1.processor.proj_lora": [f"{SINGLE}.1.proj_out"],
}
NATIVE = [name for names in BFL.values() for name in names]
ATTENTION = [name for name in NATIVE if ".attn." in name]
QWEN = [
    *(f"{DUAL}.0.attn.{x}" for x in ("add_q_proj", "to_add_out", "to_k", "to_out.0")),
    *(f"{DUAL}.1.{stream}_mlp.net.{x}" for stream in ("txt", "img") for x in ("0.proj", "2")),
]
# FLUX.2's, by Black Forest Labs' names, and of the first single-stream block.
BFL2 = {
    "double_blocks.0.txt_attn.qkv": [f"{DUAL}.0.attn.add_{x}_proj" for x in "qkv"],
    "double_blocks.0.img_attn.qkv": [f"{DUAL}.0.attn.to_{x}" for x in "qkv"],
    "double_blocks.1.txt_attn.proj": [f"{DUAL}.1.attn.to_add_out"],
    "double_blocks.1.img_attn.proj": [f"{DUAL}.1.attn.to_out.0"],
    "double_blocks.0.txt_mlp.0": [f"{DUAL}.0.ff_context.linear_in"],
    "double_blocks.1.img_mlp.2": [f"{DUAL}.1.ff.linear_out"],
    "single_blocks.0.linear1": [f"{SINGLE}.0.attn.to_qkv_mlp_proj"],
    "single_blocks.1.linear2": [f"{SINGLE}.1.attn.to_out"],
}
NATIVE2 = [name for names in BFL2.values() for name in names]
RANK = 4


def alone(names: Sequence[str], prefix: str, *, flat: bool = False) -> dict[str, list[str]]:
    return {prefix + (name.replace(".", "_") if flat else name): [name] for name in names}


def flattened(names: dict[str, list[str]], prefix: str) -> dict[str, list[str]]:
    return {prefix + name.replace(".", "_"): linears for name, linears in names.items()}


# Layout: the file's names with their linears, what follows a name in the file, and the alphas, of which some layouts have none.
FLUX_LAYOUTS: dict[str, tuple[dict[str, list[str]], str, bool]] = {
    "kohya": (flattened(BFL, "lora_unet_"), ".lora_down", True),
    "comfyui": ({f"diffusion_model.{name}": linears for name, linears in BFL.items()}, ".lora_down", True),
    "xlabs": (XLABS, ".down", False),
    "onetrainer": (alone(ATTENTION, "lora_transformer_", flat=True), ".lora_down", True),
    "old-diffusers": (alone(ATTENTION, "transformer."), ".lora.down", False),
}
# What diffusers misreads: it takes these for no LoRA, drops the alphas, or gives the feed-forward linears one name.
FLUX_LAYOUTS_OF_OURS = {
    "ai-toolkit": ({f"diffusion_model.{name}": linears for name, linears in BFL.items()}, ".lora_A", True),
    "black-forest-labs": (BFL, ".lora_A", False),
    "fal": ({f"base_model.model.{name}": linears for name, linears in BFL.items()}, ".lora_A", False),
    "onetrainer-mlp": (alone(NATIVE, "lora_transformer_", flat=True), ".lora_down", True),
    "lora_down": (alone(NATIVE, "transformer."), ".lora_down", True),
    "lycoris": (alone(NATIVE, "lycoris_", flat=True), ".lora_down", True),
}
FLUX2_LAYOUTS = {
    "kohya": (flattened(BFL2, "lora_unet_"), ".lora_down", True),
    "ai-toolkit": ({f"diffusion_model.{name}": linears for name, linears in BFL2.items()}, ".lora_A", False),
    "peft": ({f"base_model.model.{name}": linears for name, linears in BFL2.items()}, ".lora_A", False),
    "diffusers": (alone(NATIVE2, "transformer."), ".lora_A", False),
}
# What diffusers refuses, or takes for no LoRA.
FLUX2_LAYOUTS_OF_OURS = {
    "ai-toolkit-alphas": ({f"diffusion_model.{name}": linears for name, linears in BFL2.items()}, ".lora_A", True),
    "comfyui": ({f"diffusion_model.{name}": linears for name, linears in BFL2.items()}, ".lora_down", True),
    "black-forest-labs": (BFL2, ".lora_A", False),
    "onetrainer": (alone(NATIVE2, "lora_transformer_", flat=True), ".lora_down", True),
}
QWEN_LAYOUTS = {
    "kohya": (alone(QWEN, "lora_unet_", flat=True), ".lora_down", True),
    "lightning": (alone(QWEN, ""), ".lora_down", True),
    "comfyui": (alone(QWEN, "diffusion_model."), ".lora_A", True),
    "default": (alone(QWEN, "diffusion_model."), ".lora_A.default", False),
}


def write(
    path: Path, names: dict[str, list[str]], down: str, alphas: bool, transformer: Any, /, **more: Tensor
) -> dict[str, Tensor]:
    """A file in a layout; returns the update that it makes to each linear."""
    g = torch.Generator().manual_seed(0)
    linears = dict(transformer.named_modules())
    up = down.replace("down", "up").replace("lora_A", "lora_B")
    state, updates = dict(more), dict[str, Tensor]()
    for i, (name, targets) in enumerate(names.items()):
        a = torch.randn(RANK, linears[targets[0]].in_features, generator=g)
        sizes = [linears[target].out_features for target in targets]
        b = torch.randn(sum(sizes), RANK, generator=g)
        state |= {f"{name}{down}.weight": a, f"{name}{up}.weight": b}
        if alphas:
            state[f"{name}.alpha"] = torch.tensor(1.0 + i)
        scale = (1 + i) / RANK if alphas else 1
        updates |= {t: scale * rows @ a for t, rows in zip(targets, b.split(sizes), strict=True)}
    save_file(state, path)
    return updates


@pytest.fixture(scope="module")
def flux() -> Any:
    return meta_transformer(resolve_base("shapes-kontext") / "transformer")


@pytest.fixture(scope="module")
def flux2() -> Any:
    torch.manual_seed(0)
    return tiny_transformer()


@pytest.fixture(scope="module")
def qwen() -> Any:
    torch.manual_seed(0)
    return QwenImageTransformer2DModel(
        in_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=32,
        axes_dims_rope=(4, 6, 6),
    )


@pytest.mark.parametrize("layout", FLUX_LAYOUTS)
def test_flux_layouts_give_what_diffusers_loads(family: Family, pipeline: Any, tmp_path: Path, layout: str) -> None:
    updates = write(tmp_path / "a.safetensors", *FLUX_LAYOUTS[layout], pipeline.transformer)
    # By diffusers' own names the attention's linears may be either family's.
    for known in (family, None) if layout in ("kohya", "comfyui", "xlabs") else (family,):
        adapter = load_adapter(tmp_path / "a.safetensors", known)
        assert adapter.family == "flux_kontext"
        assert gives(adapter, updates)
    pipeline.load_lora_weights(tmp_path, weight_name="a.safetensors")
    assert gives(adapter, expected_updates(pipeline.transformer))


@pytest.mark.parametrize("layout", FLUX_LAYOUTS_OF_OURS)
def test_flux_layouts_that_diffusers_misreads(family: Family, flux: Any, tmp_path: Path, layout: str) -> None:
    updates = write(tmp_path / "a.safetensors", *FLUX_LAYOUTS_OF_OURS[layout], flux)
    assert gives(load_adapter(tmp_path / "a.safetensors", family), updates)


@pytest.mark.parametrize("layout", QWEN_LAYOUTS)
def test_qwen_layouts_give_what_diffusers_loads(qwen: Any, tmp_path: Path, layout: str) -> None:
    updates = write(tmp_path / "a.safetensors", *QWEN_LAYOUTS[layout], qwen)
    for known in (get_family("qwen_image_edit"), None):
        adapter = load_adapter(tmp_path / "a.safetensors", known)
        assert adapter.family == "qwen_image_edit"
        assert gives(adapter, updates)
    loaded = QwenImageTransformer2DModel.from_config(qwen.config)
    loaded.load_lora_adapter(QwenImageEditPipeline.lora_state_dict(str(tmp_path), weight_name="a.safetensors"))
    assert gives(adapter, expected_updates(loaded))


@pytest.mark.parametrize("layout", FLUX2_LAYOUTS)
def test_flux2_layouts_give_what_diffusers_loads(flux2: Any, tmp_path: Path, layout: str) -> None:
    updates = write(tmp_path / "a.safetensors", *FLUX2_LAYOUTS[layout], flux2)
    for known in (get_family("flux2"), None):
        adapter = load_adapter(tmp_path / "a.safetensors", known)
        assert adapter.family == "flux2"
        assert gives(adapter, updates)
    loaded = Flux2Transformer2DModel.from_config(flux2.config)
    loaded.load_lora_adapter(Flux2KleinPipeline.lora_state_dict(str(tmp_path), weight_name="a.safetensors"))
    assert gives(adapter, expected_updates(loaded))


@pytest.mark.parametrize("layout", FLUX2_LAYOUTS_OF_OURS)
def test_flux2_layouts_that_diffusers_misreads(flux2: Any, tmp_path: Path, layout: str) -> None:
    updates = write(tmp_path / "a.safetensors", *FLUX2_LAYOUTS_OF_OURS[layout], flux2)
    for known in (get_family("flux2"), None):
        adapter = load_adapter(tmp_path / "a.safetensors", known)
        assert adapter.family == "flux2"
        assert gives(adapter, updates)


def test_names_that_both_families_of_flux_share_need_a_base(flux: Any, flux2: Any, tmp_path: Path) -> None:
    attention = {name: linears for name, linears in BFL2.items() if "attn" in name}
    updates = write(tmp_path / "attention.safetensors", flattened(attention, "lora_unet_"), ".lora_down", True, flux2)
    with pytest.raises(SliderEditError, match="fits flux_kontext and flux2; choose one with --base"):
        load_adapter(tmp_path / "attention.safetensors")
    for name in ("flux_kontext", "flux2"):
        assert gives(load_adapter(tmp_path / "attention.safetensors", get_family(name)), updates)
    # The proportions of the feed-forward linears tell the families apart.
    for transformer, layouts, name in ((flux, FLUX_LAYOUTS, "flux_kontext"), (flux2, FLUX2_LAYOUTS, "flux2")):
        write(tmp_path / "a.safetensors", *layouts["kohya"], transformer)
        assert load_adapter(tmp_path / "a.safetensors").family == name
        (other,) = {"flux_kontext", "flux2"} - {name}
        with pytest.raises(SliderEditError, match=f"is for {name}, not for {other}, by the names and sizes of its linears"):
            load_adapter(tmp_path / "a.safetensors", get_family(other))


def test_a_torch_file_of_another_trainer(family: Family, flux: Any, tmp_path: Path) -> None:
    updates = write(tmp_path / "a.safetensors", *FLUX_LAYOUTS["kohya"], flux)
    torch.save(load_file(tmp_path / "a.safetensors"), tmp_path / "a.pt")
    assert gives(load_adapter(tmp_path / "a.pt", family), updates)


def test_the_fused_projections_of_the_full_size_model(family: Family, tmp_path: Path) -> None:
    """A single-stream block's, which has four parts, and one trained on split projections: block-diagonal, a third each."""
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 3072, generator=g), torch.randn(3 * 3072 + 12288, 2, generator=g)
    split_a, split_b = torch.randn(3, 2, 3072, generator=g), torch.randn(3, 3072, 2, generator=g)
    single, dual = "lora_unet_single_blocks_37_linear1", "lora_unet_double_blocks_18_txt_attn_qkv"
    state = {
        f"{single}.lora_down.weight": a,
        f"{single}.lora_up.weight": b,
        f"{single}.alpha": torch.tensor(1.0),
        f"{dual}.lora_down.weight": split_a.flatten(0, 1),
        f"{dual}.lora_up.weight": torch.block_diag(*split_b),
        f"{dual}.alpha": torch.tensor(3.0),
    }
    save_file(state, tmp_path / "a.safetensors")
    adapter = load_adapter(tmp_path / "a.safetensors", family)
    parts = zip(("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), b.split([3072, 3072, 3072, 12288]), strict=True)
    expected = {f"{SINGLE}.37.{name}": (a, rows / 2) for name, rows in parts}
    expected |= {f"{DUAL}.18.attn.add_{x}_proj": (split_a[i], split_b[i] / 2) for i, x in enumerate("qkv")}
    assert set(adapter.pairs) == set(expected)
    for name, pair in expected.items():
        assert all(torch.equal(*both) for both in zip(adapter.pairs[name], pair, strict=True)), name


TEXT_ENCODERS = {
    f"{name}.lora_{part}.weight": torch.ones(2, 2)
    for name in ("lora_te1_text_model_encoder_layers_0_mlp_fc1", "text_encoders.t5xxl.transformer.encoder.block.0.k")
    for part in ("down", "up")
} | {"lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha": torch.tensor(1.0)}


def test_text_encoders_are_reported(family: Family, flux: Any, tmp_path: Path) -> None:
    updates = write(tmp_path / "a.safetensors", *FLUX_LAYOUTS["kohya"], flux, **TEXT_ENCODERS)
    adapter = load_adapter(tmp_path / "a.safetensors", family)
    assert gives(adapter, updates)
    assert adapter.ignored == (
        "lora_te1_text_model_encoder_layers_0_mlp_fc1",
        "text_encoders.t5xxl.transformer.encoder.block.0.k",
    )
    save_file(TEXT_ENCODERS, tmp_path / "b.safetensors")
    with pytest.raises(SliderEditError, match="updates no linear that sliders can scale, only a text encoder"):
        load_adapter(tmp_path / "b.safetensors", family)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"lora_unet_double_blocks_0_img_attn_qkv.dora_scale": torch.ones(384)}, "plain LoRA only"),
        ({"lora_unet_double_blocks_0_img_mod_lin.diff_b": torch.ones(4)}, "plain LoRA only"),
        ({"double_blocks.0.img_attn.norm.query_norm.scale": torch.ones(16)}, "plain LoRA only"),
        ({"lora_unet_double_blocks_1_img_attn_qkv.alpha": torch.tensor(2.0)}, "some linear is unknown"),
        (
            {f"{DUAL}.0.attn.to_add_out.lora_{part}.weight": torch.ones(4, 4) for part in "AB"},
            "stores alphas for other modules but none for",
        ),
        (
            {
                f"{DUAL}.0.attn.to_add_out.lora_A.weight": torch.ones(4, 128),
                f"{DUAL}.0.attn.to_add_out.lora_B.weight": torch.ones(128, 4),
                f"{DUAL}.0.attn.to_add_out.alpha": torch.tensor(4.0),
            },
            f"updates {DUAL}.0.attn.to_add_out twice",
        ),
        (
            {f"lora_unet_input_blocks_4_0_q.lora_{part}.weight": torch.ones(4, 4) for part in ("down", "up")}
            | {"lora_unet_input_blocks_4_0_q.alpha": torch.tensor(4.0)},
            "that diffusers cannot convert",
        ),
    ],
)
def test_what_diffusers_would_leave_out_is_refused(
    family: Family, flux: Any, tmp_path: Path, more: dict[str, Tensor], message: str
) -> None:
    write(tmp_path / "a.safetensors", *FLUX_LAYOUTS["kohya"], flux, **more)
    with pytest.raises(SliderEditError, match=message):
        load_adapter(tmp_path / "a.safetensors", family)


def test_differences_of_zero_change_nothing(family: Family, flux: Any, tmp_path: Path) -> None:
    zero = {"lora_unet_double_blocks_0_img_mod_lin.diff_b": torch.zeros(4)}
    updates = write(tmp_path / "a.safetensors", *FLUX_LAYOUTS["kohya"], flux, **zero)
    assert gives(load_adapter(tmp_path / "a.safetensors", family), updates)


def test_another_familys_file_is_refused_by_name(flux: Any, qwen: Any, tmp_path: Path) -> None:
    write(tmp_path / "flux.safetensors", *FLUX_LAYOUTS["kohya"], flux)
    with pytest.raises(SliderEditError, match="is for flux_kontext, not for qwen_image_edit"):
        load_adapter(tmp_path / "flux.safetensors", get_family("qwen_image_edit"))
    attention = flattened({"double_blocks.0.txt_attn.proj": [f"{DUAL}.0.attn.to_add_out"]}, "lora_unet_")
    write(tmp_path / "attention.safetensors", attention, ".lora_down", True, flux)
    with pytest.raises(SliderEditError, match="is for flux_kontext or flux2, not for qwen_image_edit"):
        load_adapter(tmp_path / "attention.safetensors", get_family("qwen_image_edit"))
    write(tmp_path / "qwen.safetensors", *QWEN_LAYOUTS["kohya"], qwen)
    with pytest.raises(SliderEditError, match="is for qwen_image_edit, not for flux_kontext"):
        load_adapter(tmp_path / "qwen.safetensors", get_family("flux_kontext"))


def test_linears_that_no_slider_touches_keep_their_names(tmp_path: Path, flux: Any, qwen: Any) -> None:
    """They are there to be reported beside a base."""
    names = {"lora_unet_double_blocks_0_txt_attn_proj": [f"{DUAL}.0.attn.to_add_out"]}
    odd = {f"lora_unet_double_blocks_0_img_mod_lin.lora_{part}.weight": torch.ones(2, 2) for part in ("down", "up")}
    write(tmp_path / "flux.safetensors", names, ".lora_down", False, flux, **odd)
    assert set(load_adapter(tmp_path / "flux.safetensors").pairs) == {f"{DUAL}.0.attn.to_add_out", f"{DUAL}.0.norm1.linear"}
    names = alone([f"{DUAL}.0.txt_mlp.net.2"], "lora_unet_", flat=True)
    odd = {f"lora_unet_{DUAL}_0_img_mod_1.lora_{part}.weight": torch.ones(2, 2) for part in ("down", "up")}
    write(tmp_path / "qwen.safetensors", names, ".lora_down", False, qwen, **odd)
    adapter: Adapter = load_adapter(tmp_path / "qwen.safetensors")
    assert set(adapter.pairs) == {f"{DUAL}.0.txt_mlp.net.2", f"{DUAL}.0.img_mod.1"}
