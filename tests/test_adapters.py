"""Adapters: every format gives the same pairs, scaling is folded, nothing is unpickled."""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxKontextPipeline, FluxTransformer2DModel
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from slideredit_rt.adapters import Adapter, fit_adapter, load_adapter, match_adapter, save_adapter
from slideredit_rt.errors import SliderEditError
from slideredit_rt.families import Family
from slideredit_rt.strength import StrengthCurve

MODULES = ["transformer_blocks.0.attn.to_add_out", "transformer_blocks.1.attn.add_q_proj"]


@pytest.fixture
def pairs() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    g = torch.Generator().manual_seed(0)
    return {m: (torch.randn(4, 128, generator=g), torch.randn(128, 4, generator=g)) for m in MODULES}


def flat(pairs: dict[str, tuple[torch.Tensor, torch.Tensor]], prefix: str = "") -> dict[str, torch.Tensor]:
    return {f"{prefix}{m}.lora_{part}.weight": t for m, pair in pairs.items() for part, t in zip("AB", pair, strict=True)}


def same(adapter: Adapter, pairs: dict[str, tuple[torch.Tensor, torch.Tensor]], scale: float = 1.0) -> bool:
    return set(adapter.pairs) == set(pairs) and all(
        torch.equal(adapter.pairs[m][0], a) and torch.allclose(adapter.pairs[m][1], b * scale) for m, (a, b) in pairs.items()
    )


def test_canonical_file_round_trips(family: Family, tmp_path: Path, pairs: Any) -> None:
    curve = StrengthCurve((0.0, 0.5, 1.0), (1.0, 0.75, 0.0))
    save_adapter(Adapter(family.name, "st", 4, pairs, "x", {"steps": 3}, curve), tmp_path / "a.safetensors")
    adapter = load_adapter(tmp_path / "a.safetensors", family)
    assert same(adapter, pairs)
    assert (adapter.kind, adapter.rank, adapter.training, adapter.curve) == ("st", 4, {"steps": 3}, curve)


@pytest.mark.parametrize(("form", "file"), [("canonical", ""), ("peft", "adapter_model.safetensors")])
def test_others_may_read_what_is_written(family: Family, tmp_path: Path, pairs: Any, form: Any, file: str) -> None:
    save_adapter(Adapter(family.name, "st", 4, pairs, "x"), tmp_path / "a", form)
    (tmp_path / "usual").touch()
    assert (tmp_path / "a" / file).stat().st_mode == (tmp_path / "usual").stat().st_mode


@pytest.mark.parametrize("prefix", ["", "transformer.", "base_model.model."])
def test_diffusers_files_with_and_without_prefix(family: Family, tmp_path: Path, pairs: Any, prefix: str) -> None:
    save_file(flat(pairs, prefix), tmp_path / "pytorch_lora_weights.safetensors")
    assert same(load_adapter(tmp_path, family), pairs)


def test_stored_alphas_are_folded_into_b(family: Family, tmp_path: Path, pairs: Any) -> None:
    state = flat(pairs, "transformer.") | {f"transformer.{m}.alpha": torch.tensor(8.0) for m in pairs}
    save_file(state, tmp_path / "a.safetensors")
    assert same(load_adapter(tmp_path / "a.safetensors", family), pairs, scale=2.0)


def test_diffusers_metadata_alpha_is_folded_into_b(family: Family, tmp_path: Path, pairs: Any) -> None:
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 2})}
    save_file(flat(pairs, "transformer."), tmp_path / "a.safetensors", metadata)
    assert same(load_adapter(tmp_path / "a.safetensors", family), pairs, scale=0.5)


@pytest.mark.parametrize(("settings", "scale"), [({"lora_alpha": 8}, 2.0), ({"lora_alpha": 8, "use_rslora": True}, 4.0)])
def test_peft_folder(family: Family, tmp_path: Path, pairs: Any, settings: dict[str, Any], scale: float) -> None:
    save_file(flat(pairs, "base_model.model."), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, **settings}))
    assert same(load_adapter(tmp_path, family), pairs, scale)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin", "pytorch_lora_weights.safetensors"])
def test_a_configuration_counts_for_the_file_beside_it(family: Family, tmp_path: Path, pairs: Any, name: str) -> None:
    state = flat(pairs, "base_model.model.")
    (torch.save if name.endswith("bin") else save_file)(state, tmp_path / name)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8}))
    assert same(load_adapter(tmp_path / name, family), pairs, scale=2.0)
    assert same(load_adapter(tmp_path, family), pairs, scale=2.0)
    (tmp_path / name).rename(tmp_path / "other.bin")
    assert same(load_adapter(tmp_path / "other.bin", family), pairs), "it may be anybody's"


KOHYA = "lora_unet_" + MODULES[0].replace(".", "_")
ALPHAS: dict[str, dict[str, float]] = {
    "with kohya's names": {f"lora_unet_{m.replace('.', '_')}.alpha": 8.0 for m in MODULES},
    "with another prefix": {f"base_model.model.{m}.alpha": 8.0 for m in MODULES},
    "beside lora_A": {f"{m}.lora_A.alpha": 8.0 for m in MODULES},
    "twice": {f"{m}{part}.alpha": 8.0 for m in MODULES for part in ("", ".lora_A", ".lora_B.default")},
}


@pytest.mark.parametrize("alphas", ALPHAS.values(), ids=ALPHAS)
def test_alphas_under_other_names_are_matched(family: Family, tmp_path: Path, pairs: Any, alphas: dict[str, float]) -> None:
    save_file(flat(pairs, "transformer.") | {k: torch.tensor(v) for k, v in alphas.items()}, tmp_path / "a.safetensors")
    assert same(load_adapter(tmp_path / "a.safetensors", family), pairs, scale=2.0)


METADATA: dict[str, tuple[dict[str, str], float]] = {
    "kohya": ({"ss_network_alpha": "8", "ss_network_dim": "4"}, 2.0),
    "kohya's rank is a float": ({"ss_network_alpha": "8.0", "ss_network_dim": "4.0"}, 2.0),
    "lora": ({"lora_alpha": "2", "rank": "4"}, 0.5),
    "network": ({"network_alpha": "1"}, 0.25),
    "alpha": ({"alpha": "4", "r": "4"}, 1.0),
    "rslora": ({"lora_alpha": "4", "lora_rank": "4", "use_rslora": "True"}, 2.0),
    "network arguments": ({"ss_network_alpha": "4", "ss_network_args": '{"rs_lora": "True"}'}, 2.0),
    "PEFT's configuration": ({"peft_config": json.dumps({"r": 4, "lora_alpha": 8, "use_rslora": True})}, 4.0),
    "a rank alone": ({"rank": "8", "ss_network_dim": "8"}, 1.0),
    "a trainer's record": ({"training": json.dumps({"lora_alpha": 8})}, 1.0),
    "a text encoder's": ({"lora_adapter_metadata": json.dumps({"text_encoder.r": 4, "text_encoder.lora_alpha": 8})}, 1.0),
}


@pytest.mark.parametrize(("metadata", "scale"), METADATA.values(), ids=METADATA)
def test_a_scale_in_the_metadata(family: Family, tmp_path: Path, pairs: Any, metadata: dict[str, str], scale: float) -> None:
    save_file(flat(pairs), tmp_path / "a.safetensors", metadata)
    assert same(load_adapter(tmp_path / "a.safetensors", family), pairs, scale)


AGREEING: dict[str, dict[str, str]] = {
    "alpha": {"ss_network_alpha": "8", "ss_network_dim": "16"},
    "ratio": {"ss_network_alpha": "32", "ss_network_dim": "16"},
    "dynamic": {"ss_network_alpha": "Dynamic", "ss_network_dim": "Dynamic"},
    "both": {"ss_network_alpha": "8", "lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 8})},
}


@pytest.mark.parametrize("metadata", AGREEING.values(), ids=AGREEING)
def test_stored_alphas_and_metadata_that_agree(family: Family, tmp_path: Path, pairs: Any, metadata: dict[str, str]) -> None:
    state = flat(pairs) | {f"{m}.alpha": torch.tensor(8.0) for m in MODULES}
    save_file(state, tmp_path / "a.safetensors", metadata)
    assert same(load_adapter(tmp_path / "a.safetensors", family), pairs, scale=2.0)


def test_the_authors_dictionary_of_tensors(family: Family, tmp_path: Path, pairs: Any) -> None:
    torch.save(flat(pairs), tmp_path / "stlora.pt")
    adapter = load_adapter(tmp_path / "stlora.pt", family)
    assert same(adapter, pairs)
    assert adapter.kind == "st"


def test_kind_is_gst_as_soon_as_an_image_linear_is_updated(family: Family, tmp_path: Path, pairs: Any) -> None:
    pairs["transformer_blocks.0.attn.to_q"] = pairs[MODULES[0]]
    torch.save(flat(pairs), tmp_path / "lora.pt")
    assert load_adapter(tmp_path / "lora.pt", family).kind == "gst"


class Trap:
    """Pickles into a call that leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_a_pickle_is_refused_and_not_executed(family: Family, tmp_path: Path) -> None:
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Trap(tmp_path / "trapped")))
    with pytest.raises(SliderEditError, match="not unpickled"):
        load_adapter(tmp_path / "evil.pt", family)
    torch.save({"x": Trap(tmp_path / "trapped")}, tmp_path / "evil2.pt")
    with pytest.raises(SliderEditError, match="not unpickled"):
        load_adapter(tmp_path / "evil2.pt", family)
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize("name", ["missing.safetensors", "empty"])
def test_missing_files_say_so(family: Family, tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(SliderEditError, match=r"does not exist|contains none of"):
        load_adapter(tmp_path / name, family)


def test_truncated_safetensors(family: Family, tmp_path: Path, pairs: Any) -> None:
    path = tmp_path / "a.safetensors"
    save_file(flat(pairs), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(SliderEditError, match="not a readable safetensors"):
        load_adapter(path, family)


def test_a_file_without_lora_weights_or_with_half_a_pair(family: Family, tmp_path: Path, pairs: Any) -> None:
    save_file({"weight": torch.zeros(2)}, tmp_path / "a.safetensors")
    with pytest.raises(SliderEditError, match="no lora_A"):
        load_adapter(tmp_path / "a.safetensors", family)
    state = flat(pairs)
    del state[f"{MODULES[1]}.lora_B.weight"]
    save_file(state, tmp_path / "b.safetensors")
    with pytest.raises(SliderEditError, match=f"incomplete at {MODULES[1]}: lora_B is missing"):
        load_adapter(tmp_path / "b.safetensors", family)


def test_values_must_be_finite(family: Family, tmp_path: Path, pairs: Any) -> None:
    pairs[MODULES[0]][0][0, 0] = float("nan")
    save_file(flat(pairs), tmp_path / "a.safetensors")
    with pytest.raises(SliderEditError, match="not finite"):
        load_adapter(tmp_path / "a.safetensors", family)


def test_another_familys_adapter_is_refused(family: Family, tmp_path: Path, pairs: Any) -> None:
    save_adapter(Adapter("qwen_image_edit", "st", 4, pairs, "x"), tmp_path / "a.safetensors")
    with pytest.raises(SliderEditError, match="trained for qwen_image_edit"):
        load_adapter(tmp_path / "a.safetensors", family)


def test_fingerprint_follows_the_values_not_the_file(family: Family, tmp_path: Path, pairs: Any) -> None:
    torch.save(flat(pairs), tmp_path / "a.pt")
    save_file(flat(pairs, "transformer."), tmp_path / "a.safetensors")
    first = load_adapter(tmp_path / "a.pt", family).fingerprint
    assert first == load_adapter(tmp_path / "a.safetensors", family).fingerprint
    pairs[MODULES[0]][0][0, 0] += 1
    torch.save(flat(pairs), tmp_path / "b.pt")
    assert first != load_adapter(tmp_path / "b.pt", family).fingerprint


# Files that PEFT and diffusers wrote themselves.

TARGETS = ["attn.to_q", "attn.add_q_proj", "ff_context.net.0.proj", "ff_context.net.2"]


def peft_config(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 4, "target_modules": TARGETS, "init_lora_weights": "gaussian"} | options)


@pytest.fixture
def transformer() -> Any:
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=8,
        num_layers=2,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4),
    ).eval()


def expected_updates(transformer: Any) -> dict[str, torch.Tensor]:
    """scale · B A of every linear that PEFT adapted, with values in B that are not zero."""
    return {
        name: layer.scaling[adapter] * (layer.lora_B[adapter].weight @ layer.lora_A[adapter].weight)
        for name, layer in transformer.named_modules()
        if isinstance(layer, LoraLayer)
        for adapter in layer.lora_A
    }


def fill(transformer: Any) -> None:
    for name, parameter in transformer.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)


def gives(adapter: Adapter, updates: dict[str, torch.Tensor]) -> bool:
    return set(adapter.pairs) == set(updates) and all(
        torch.allclose(b @ a, updates[name], rtol=1e-5, atol=1e-6) for name, (a, b) in adapter.pairs.items()
    )


CONFIGS = {
    "plain": {},
    "alpha": {"lora_alpha": 10},
    "rslora": {"lora_alpha": 3, "use_rslora": True},
    # A pattern may be an expression; the first that matches counts, in the order of their names, as PEFT writes them.
    "patterns": {
        "rank_pattern": {"attn.add_q_proj": 2, r"1\.ff_context\.net\.2": 3, "attn.to_q": 1},
        "alpha_pattern": {"ff_context.net.2": 7, "net.2": 1, "attn.to_q": 5},
    },
}


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
def test_what_peft_saves(family: Family, transformer: Any, tmp_path: Path, options: dict[str, Any]) -> None:
    model = get_peft_model(transformer, peft_config(**options))
    fill(transformer)
    updates = expected_updates(transformer)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_config.json").exists()
    adapter = load_adapter(tmp_path, family)
    assert gives(adapter, updates)
    assert adapter.kind == "gst"
    for file in (p for p in tmp_path.iterdir() if p.suffix == ".safetensors"):
        torch.save(load_file(file), tmp_path / "adapter_model.bin")
        file.unlink()
    assert gives(load_adapter(tmp_path, family), updates)


def run_peft(transformer: Any, folder: Path, start: Any, **save: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """Train, as it were, with PEFT from an initialisation; returns what it does to each linear of the unchanged base."""
    before = {name: m.weight.clone() for name, m in transformer.named_modules() if isinstance(m, torch.nn.Linear)}
    options = {"loftq_config": {"loftq_bits": 4, "loftq_iter": 1}} if start == "loftq" else {}
    model = get_peft_model(transformer, peft_config(init_lora_weights=start, lora_alpha=6, **options))
    # PEFT starts its conversion from the adapter as it was before training.
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(folder / "untrained")
    model.peft_config["default"].init_lora_weights = start
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn(parameter.shape, generator=g))
    updates = expected_updates(transformer)
    for name in updates:
        updates[name] = updates[name] + transformer.get_submodule(name).base_layer.weight - before[name]
    model.save_pretrained(folder / "trained", **save)
    return model, updates


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal", "mica"])
def test_initialisations_that_leave_the_base_alone(family: Family, transformer: Any, tmp_path: Path, start: Any) -> None:
    _, updates = run_peft(transformer, tmp_path, start)
    assert gives(load_adapter(tmp_path / "trained", family), updates)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_2", "olora"])
def test_initialisations_that_change_the_base(family: Family, transformer: Any, tmp_path: Path, start: str) -> None:
    model, updates = run_peft(transformer, tmp_path, start)
    with pytest.raises(SliderEditError, match=f"'{start}', which changes the base.*path_initial_model_for_weight_conversion"):
        load_adapter(tmp_path / "trained", family)
    initial = str(tmp_path / "untrained")
    model.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=initial)
    adapter = load_adapter(tmp_path / "converted", family)
    assert {len(a) for a, _ in adapter.pairs.values()} == {8}
    assert all(torch.allclose(b @ a, updates[name], atol=1e-4) for name, (a, b) in adapter.pairs.items())


@pytest.mark.parametrize("start", ["pissa", "corda", "lora_ga", "loftq", "a_later_one"])
def test_initialisations_named_in_diffusers_metadata(family: Family, tmp_path: Path, pairs: Any, start: str) -> None:
    config = {"transformer.r": 4, "transformer.lora_alpha": 4, "transformer.init_lora_weights": start}
    save_file(flat(pairs, "transformer."), tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(config)})
    with pytest.raises(SliderEditError, match=f"init_lora_weights='{start}', which "):
        load_adapter(tmp_path / "a.safetensors", family)


def test_every_option_of_peft_is_known(family: Family, tmp_path: Path, pairs: Any) -> None:
    """A configuration with PEFT's defaults is plain; what PEFT itself calls a variant of LoRA is refused, VeLoRA excepted,
    which is another backward pass."""
    save_file(flat(pairs), tmp_path / "adapter_model.safetensors")
    config = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS).to_dict()
    config["target_modules"] = TARGETS

    def loaded(**changes: Any) -> Adapter:
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | changes))
        return load_adapter(tmp_path, family)

    plain = {"runtime_config": {"ephemeral_gpu_offload": True}, "eva_config": {"rho": 2.0}, "lora_dropout": 0.1}
    assert same(loaded(**plain, fan_in_fan_out=True, velora_config={"scale": 1.0}), pairs, scale=2.0)
    variants = {field.name for field in dataclasses.fields(LoraConfig) if field.metadata.get("is_lora_variant")}
    others = {"use_qalora", "lora_bias", "layer_replication", "megatron_config", "modules_to_save", "trainable_token_indices"}
    for name in {*variants, *others, "target_parameters", "use_a_later_one"} - {"velora_config", "use_dora"}:
        with pytest.raises(SliderEditError, match=f"PEFT's option {name},"):
            loaded(**{name: [1]})
    for changes, message in (
        ({"bias": "all"}, "option bias"),
        ({"peft_type": "LOHA"}, "type LOHA"),
        ({"use_dora": True}, "is a DoRA"),
    ):
        with pytest.raises(SliderEditError, match=message):
            loaded(**changes)


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
def test_what_diffusers_saves(family: Family, transformer: Any, tmp_path: Path, options: dict[str, Any]) -> None:
    transformer.add_adapter(peft_config(**options))
    fill(transformer)
    updates = expected_updates(transformer)
    layers = get_peft_model_state_dict(transformer)
    metadata = {"transformer_lora_adapter_metadata": transformer.peft_config["default"].to_dict()}
    FluxKontextPipeline.save_lora_weights(tmp_path / "with", transformer_lora_layers=layers, **metadata)
    assert gives(load_adapter(tmp_path / "with", family), updates)
    transformer.save_lora_adapter(tmp_path / "bare", adapter_name="default")
    assert gives(load_adapter(tmp_path / "bare", family), updates)


def test_what_diffusers_saves_without_alphas(family: Family, transformer: Any, tmp_path: Path) -> None:
    transformer.add_adapter(peft_config())
    fill(transformer)
    layers = get_peft_model_state_dict(transformer)
    FluxKontextPipeline.save_lora_weights(tmp_path, transformer_lora_layers=layers)
    assert gives(load_adapter(tmp_path, family), expected_updates(transformer))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_exactly(family: Family, transformer: Any, tmp_path: Path, dtype: torch.dtype) -> None:
    transformer.add_adapter(peft_config())
    fill(transformer)
    transformer.to(dtype)
    transformer.save_lora_adapter(tmp_path, adapter_name="default")
    adapter = load_adapter(tmp_path, family)
    assert adapter.dtype == str(dtype).removeprefix("torch.")
    for name, (a, b) in adapter.pairs.items():
        layer = transformer.get_submodule(name)
        assert a.dtype == b.dtype == torch.float32
        assert torch.equal(a, layer.lora_A["default"].weight.float())
        assert torch.equal(b, layer.lora_B["default"].weight.float())


@pytest.mark.parametrize("form", ["canonical", "diffusers"])
def test_diffusers_loads_what_is_written_with_the_scale_of_every_module(
    family: Family, transformer: Any, pipeline: Any, tmp_path: Path, form: Any
) -> None:
    g = torch.Generator().manual_seed(0)
    linears = dict(pipeline.transformer.named_modules())
    pairs = {}
    for rank, name in enumerate((*MODULES, "single_transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_q"), start=1):
        k, n = linears[name].in_features, linears[name].out_features
        pairs[name] = torch.randn(min(rank, 3), k, generator=g), torch.randn(n, min(rank, 3), generator=g)
    path = tmp_path / ("a.safetensors" if form == "canonical" else "a")
    save_adapter(Adapter(family.name, "gst", 3, pairs, "x", {"steps": 3}), path, form)
    pipeline.load_lora_weights(tmp_path if form == "canonical" else path, weight_name=path.name if path.suffix else None)
    updates = expected_updates(pipeline.transformer)
    assert set(updates) == set(pairs)
    for name, (a, b) in pairs.items():
        assert torch.allclose(updates[name], b @ a, atol=1e-5), name
    again = load_adapter(path, family)
    assert same(again, pairs)
    assert (again.kind, again.training) == ("gst", {"steps": 3})


def test_the_canonical_file_says_what_it_is(family: Family, tmp_path: Path, pairs: Any) -> None:
    save_adapter(Adapter(family.name, "st", 4, pairs, "x", {"steps": 3}), tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert {k: metadata[k] for k in ("family", "kind", "rank")} == {"family": family.name, "kind": "st", "rank": "4"}
    assert json.loads(metadata["targets"]) == ["transformer_blocks.*.attn.add_q_proj", "transformer_blocks.*.attn.to_add_out"]
    assert json.loads(metadata["training"]) == {"steps": 3}


def test_the_family_and_the_kind_by_names_or_by_metadata(family: Family, tmp_path: Path, pairs: Any) -> None:
    torch.save(flat({"transformer_blocks.0.ff_context.net.2": pairs[MODULES[0]]}), tmp_path / "flux.pt")
    assert load_adapter(tmp_path / "flux.pt").family == family.name
    save_file(flat(pairs), tmp_path / "attention.safetensors")
    with pytest.raises(SliderEditError, match=r"fits flux_kontext, qwen_image_edit and flux2; choose one with --base"):
        load_adapter(tmp_path / "attention.safetensors")
    save_adapter(Adapter(family.name, "gst", 4, pairs, "x"), tmp_path / "told.safetensors")
    told = load_adapter(tmp_path / "told.safetensors")
    assert (told.family, told.kind) == (family.name, "gst")


def altered(pairs: Any, **changes: Any) -> dict[str, torch.Tensor]:
    """A file's tensors with `A` or `B` of the first module replaced, or others added."""
    replaced = {f"{MODULES[0]}.lora_{part}.weight": changes.pop(part) for part in ("A", "B") if part in changes}
    return flat(pairs) | replaced | {f"{MODULES[0]}.{key}": value for key, value in changes.items()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"B": torch.ones(128, 8)}, "a lora_A of rank 4 and a lora_B of rank 8"),
        ({"A": torch.ones(0, 128), "B": torch.ones(128, 0)}, "be the same and at least 1"),
        ({"A": torch.ones(4, 128, 1, 1)}, "does not have two floating-point matrices"),
        ({"A": torch.ones(4, 128, dtype=torch.int8)}, "not quantised"),
        ({"lora_magnitude_vector": torch.ones(128)}, "plain LoRA only"),
        ({"lora_B.bias": torch.ones(128)}, "plain LoRA only"),
        ({"A": torch.ones(4, 128).half()}, "mixes float16 and float32"),
        ({"lora_A.second.weight": torch.ones(4, 128)}, "contains 2 adapters"),
    ],
)
def test_what_is_no_plain_adapter(family: Family, tmp_path: Path, pairs: Any, changes: dict[str, Any], message: str) -> None:
    save_file(altered(pairs, **changes), tmp_path / "a.safetensors")
    with pytest.raises(SliderEditError, match=message):
        load_adapter(tmp_path / "a.safetensors", family)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "adapter_config.json of adapter"),
        ("[]", "not a JSON object"),
        ('{"r": 8, "lora_alpha": 8}', "rank 4 at .* but its configuration says 8"),
        ('{"r": 4, "lora_alpha": "much"}', "unreadable rank or alpha"),
        ('{"r": 4, "lora_alpha": 4, "use_dora": true}', "is a DoRA"),
    ],
)
def test_a_peft_configuration_that_does_not_fit(family: Family, tmp_path: Path, pairs: Any, config: str, message: str) -> None:
    save_file(flat(pairs), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(config)
    with pytest.raises(SliderEditError, match=message):
        load_adapter(tmp_path, family)


@pytest.mark.parametrize(
    ("alphas", "metadata", "message"),
    [
        ({"lora_unet_double_blocks_0_txt_attn_proj": 8.0}, {}, "an alpha for lora_unet_double_blocks_0_txt_attn_proj, but no"),
        ({"transformer_blocks.5.attn.to_q": 8.0}, {}, "scale of some linear is unknown"),
        ({MODULES[0]: 8.0}, {}, f"stores alphas for other modules but none for {MODULES[1]}"),
        ({MODULES[0]: 8.0, KOHYA: 4.0}, {}, f"stores the alphas (8 and 4|4 and 8) for {MODULES[0]}"),
        ({}, {"ss_network_alpha": "8", "ss_network_dim": "16"}, "rank 4 at .* says 16, so its scale is unknown"),
        ({}, {"ss_network_alpha": "Dynamic"}, "neither a number in its metadata"),
        ({}, {"lora_alpha": "much"}, "unreadable rank or alpha"),
        (
            {},
            {"lora_alpha": "8", "network_alpha": "4"},
            "different scales .* 2 in its .*lora_alpha.*, 1 in its .*network_alpha",
        ),
        ({}, {"lora_adapter_metadata": '{"transformer.r": 4}'}, "no lora_alpha in its lora_adapter_metadata"),
        (
            {MODULES[0]: 8.0, MODULES[1]: 8.0},
            {"lora_adapter_metadata": '{"transformer.r": 4, "transformer.lora_alpha": 4}'},
            "different scales .* 2 in its stored alpha, 1 in its lora_adapter_metadata",
        ),
    ],
)
def test_a_scale_that_is_unknown_or_contradicted(
    family: Family, tmp_path: Path, pairs: Any, alphas: dict[str, float], metadata: dict[str, str], message: str
) -> None:
    state = flat(pairs) | {f"{name}.alpha": torch.tensor(value) for name, value in alphas.items()}
    save_file(state, tmp_path / "a.safetensors", metadata)
    with pytest.raises(SliderEditError, match=message):
        load_adapter(tmp_path / "a.safetensors", family)


def test_a_module_under_two_names(family: Family, tmp_path: Path, pairs: Any) -> None:
    save_file(
        flat(pairs) | flat({m: (a * 2, b * 2) for m, (a, b) in pairs.items()}, "transformer."), tmp_path / "a.safetensors"
    )
    with pytest.raises(SliderEditError, match="a second time under another name"):
        load_adapter(tmp_path / "a.safetensors", family)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"kind": "both"}, "unknown kind 'both'"),
        ({"family": "sd3"}, "trained for sd3"),
        ({"training": "no"}, "training record"),
        ({"lora_adapter_metadata": "{"}, "lora_adapter_metadata"),
    ],
)
def test_metadata_that_cannot_be_read(
    family: Family, tmp_path: Path, pairs: Any, metadata: dict[str, str], message: str
) -> None:
    save_file(flat(pairs), tmp_path / "a.safetensors", metadata)
    with pytest.raises(SliderEditError, match=message):
        load_adapter(tmp_path / "a.safetensors", family)


def test_modules_of_no_family(family: Family, tmp_path: Path, pairs: Any) -> None:
    save_file(flat({"text_encoder.layers.0.q": pairs[MODULES[0]]}), tmp_path / "a.safetensors")
    for known in (None, family):
        with pytest.raises(SliderEditError, match="no linear that sliders can scale"):
            load_adapter(tmp_path / "a.safetensors", known)


def test_matching_tells_every_module_apart(family: Family, transformer: Any, pairs: Any) -> None:
    g = torch.Generator().manual_seed(0)
    fitting = {"transformer_blocks.0.attn.add_q_proj": (torch.randn(2, 16, generator=g), torch.randn(16, 2, generator=g))}
    adapter = Adapter(family.name, "st", 4, fitting | {"proj_out": fitting[MODULES[1].replace("1", "0")]}, "x")
    match = match_adapter(adapter, family, transformer)
    assert match.matched == tuple(fitting)
    assert match.unexpected == ("proj_out",), "a linear that the base has and sliders cannot scale"
    assert len(match.missing) == 11
    assert "transformer_blocks.1.ff_context.net.2" in match.missing
    with pytest.raises(SliderEditError, match=r"only 1 of the 2 modules .* drop these with --allow-partial"):
        fit_adapter(adapter, family, transformer)
    fitted = fit_adapter(adapter, family, transformer, allow_partial=True)
    assert (list(fitted.pairs), fitted.rank) == (list(fitting), 2)
    other_base = Adapter(family.name, "st", 4, pairs, "x")
    assert match_adapter(other_base, family, transformer).mismatched == tuple(pairs)
    with pytest.raises(SliderEditError, match=r"128×128 update for .*, which is 16×16"):
        fit_adapter(other_base, family, transformer, allow_partial=True)
    with pytest.raises(SliderEditError, match="only 0 of the 1 modules"):
        fit_adapter(adapter.without(fitting), family, transformer, allow_partial=True)
