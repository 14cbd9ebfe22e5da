"""Adapters: every format gives the same pairs, scaling is folded, nothing is unpickled."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from slideredit_rt.adapters import Adapter, load_adapter, save_adapter
from slideredit_rt.errors import SliderEditError
from slideredit_rt.families import Family

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
    save_adapter(Adapter(family.name, "st", 4, pairs, "x", {"steps": 3}), tmp_path / "a.safetensors")
    adapter = load_adapter(tmp_path / "a.safetensors", family)
    assert same(adapter, pairs)
    assert (adapter.kind, adapter.rank, adapter.training) == ("st", 4, {"steps": 3})


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
    with pytest.raises(SliderEditError, match=r"does not exist|holds none of"):
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
    with pytest.raises(SliderEditError, match=f"incomplete at {MODULES[1]}"):
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
