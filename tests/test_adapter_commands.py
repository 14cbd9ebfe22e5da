"""`slideredit-rt adapter show` and `convert`, `build --allow-partial`: what they print, write and refuse."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from peft import PeftModel
from refusals import refused
from safetensors.torch import load_file, save_file

from slideredit_rt.adapters import FORMATS, Adapter, load_adapter, save_adapter
from slideredit_rt.assets import resolve_adapter, resolve_base
from slideredit_rt.cli import main
from slideredit_rt.engines.manifest import read_manifest
from slideredit_rt.export import linked_weights
from slideredit_rt.export.linked_weights import LinkedExport
from slideredit_rt.families import Family


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(a) for a in arguments]) == 0
    return capsys.readouterr().out


def equal(first: Adapter, second: Adapter) -> bool:
    return first.pairs.keys() == second.pairs.keys() and all(
        torch.equal(a, b) for name in first.pairs for a, b in zip(first.pairs[name], second.pairs[name], strict=True)
    )


@pytest.fixture
def partial(family: Family, tmp_path: Path) -> Path:
    """The ST adapter with one module less and two that the base lacks."""
    adapter = load_adapter("shapes-st", family)
    pairs = dict(adapter.pairs)
    pair = pairs.pop("transformer_blocks.0.attn.add_q_proj")
    pairs |= {f"transformer_blocks.{block}.attn.add_q_proj": pair for block in (7, 8)}
    save_adapter(Adapter(family.name, "st", 16, pairs, "x"), tmp_path / "partial.safetensors")
    return tmp_path / "partial.safetensors"


def test_show(capsys: Any, family: Family) -> None:
    text = run(capsys, "adapter", "show", "shapes-gst")
    assert "gst" in text
    assert "transformer_blocks.*.ff_context.net.0.proj" in text
    report = json.loads(run(capsys, "adapter", "show", "shapes-gst", "--json"))
    adapter = load_adapter("shapes-gst", family)
    assert (report["family"], report["kind"], report["rank"], report["ranks"]) == ("flux_kontext", "gst", 4, {"4": 33})
    assert (report["dtype"], report["modules"], report["fingerprint"]) == ("float32", 33, adapter.fingerprint)
    assert report["training"]["steps"] == 600
    updates = torch.cat([(b @ a).flatten() for a, b in adapter.pairs.values()])
    assert report["norm"] == pytest.approx(updates.norm().item(), rel=1e-4)
    joint = report["targets"]["single_transformer_blocks.*.attn.to_q"]
    assert (joint["rows"], joint["modules"], joint["ranks"]) == ("joint", 3, [4])
    assert "base" not in report


def test_show_compares_with_a_base_by_name(capsys: Any, partial: Path) -> None:
    arguments = ("adapter", "show", partial, "--base", "shapes-kontext")
    base = json.loads(run(capsys, *arguments, "--json"))["base"]
    assert len(base["matched"]) == 11
    assert base["missing"] == ["transformer_blocks.0.attn.add_q_proj"]
    assert base["unexpected"] == [f"transformer_blocks.{block}.attn.add_q_proj" for block in (7, 8)]
    assert base["mismatched"] == []
    text = run(capsys, *arguments)
    assert "11 matched, 1 missing, 2 unexpected, 0 mismatched" in text
    assert "missing      transformer_blocks.0.attn.add_q_proj" in text


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_is_a_lossless_round_trip(capsys: Any, family: Family, tmp_path: Path, form: str) -> None:
    first, back = tmp_path / "first", tmp_path / "back.safetensors"
    run(capsys, "adapter", "convert", "shapes-st", first, "--to", form)
    out = json.loads(run(capsys, "adapter", "convert", first, back, "--json"))
    assert (out["kind"], out["modules"], out["dropped"]) == ("st", 12, [])
    original, returned = load_adapter("shapes-st", family), load_adapter(back, family)
    assert equal(original, returned)
    assert original.fingerprint == returned.fingerprint
    assert returned.training == ({} if form == "slideredit-st" else original.training)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back.safetensors", "first"]


def test_gst_round_trips_through_folders(capsys: Any, family: Family, tmp_path: Path) -> None:
    run(capsys, "adapter", "convert", "shapes-gst", tmp_path / "peft", "--to", "peft")
    run(capsys, "adapter", "convert", tmp_path / "peft", tmp_path / "diffusers", "--to", "diffusers")
    run(capsys, "adapter", "convert", tmp_path / "diffusers", tmp_path / "c.safetensors")
    assert equal(load_adapter("shapes-gst", family), load_adapter(tmp_path / "c.safetensors", family))
    assert "not an ST adapter" in refused(
        capsys, "adapter", "convert", "shapes-gst", tmp_path / "a.pt", "--to", "slideredit-st"
    )


def test_peft_itself_loads_what_is_written(capsys: Any, family: Family, tmp_path: Path) -> None:
    run(capsys, "adapter", "convert", "shapes-gst", tmp_path / "peft", "--to", "peft")
    base = FluxTransformer2DModel.from_pretrained(resolve_base("shapes-kontext") / "transformer")
    model = PeftModel.from_pretrained(base, tmp_path / "peft")
    for name, (a, b) in load_adapter("shapes-gst", family).pairs.items():
        layer = model.base_model.model.get_submodule(name)
        assert torch.equal(layer.lora_A["default"].weight, a)
        assert torch.equal(layer.lora_B["default"].weight * layer.scaling["default"], b)


def test_the_authors_dictionary_has_their_keys(capsys: Any, tmp_path: Path) -> None:
    run(capsys, "adapter", "convert", "shapes-st", tmp_path / "st.pt", "--to", "slideredit-st")
    state = torch.load(tmp_path / "st.pt", weights_only=True)
    assert len(state) == 24
    assert state["transformer_blocks.1.ff_context.net.0.proj.lora_A.weight"].shape == (16, 128)


def test_dtypes(capsys: Any, family: Family, tmp_path: Path) -> None:
    half, same, wide = (tmp_path / f"{name}.safetensors" for name in ("half", "same", "wide"))
    run(capsys, "adapter", "convert", "shapes-st", half, "--dtype", "bfloat16")
    assert {t.dtype for t in load_file(half).values()} == {torch.bfloat16}
    run(capsys, "adapter", "convert", half, same)
    assert {t.dtype for t in load_file(same).values()} == {torch.bfloat16}
    state = load_file(half) | {f"transformer.{m}.alpha": torch.tensor(5.0) for m in load_adapter(half, family).pairs}
    save_file(state, tmp_path / "scaled.safetensors")
    run(capsys, "adapter", "convert", tmp_path / "scaled.safetensors", wide)
    assert {t.dtype for t in load_file(wide).values()} == {torch.float32}, "5/16 of a bfloat16 is no bfloat16"
    assert equal(load_adapter(tmp_path / "scaled.safetensors", family), load_adapter(wide, family))


def test_mixed_dtypes_need_one_to_be_named(capsys: Any, tmp_path: Path) -> None:
    state = load_file(resolve_adapter("shapes-st"))
    name = min(state)
    save_file(state | {name: state[name].half()}, tmp_path / "mixed.safetensors")
    convert = ("adapter", "convert", tmp_path / "mixed.safetensors", tmp_path / "out.safetensors")
    assert "mixes float16 and float32; choose one" in refused(capsys, *convert)
    assert "mixes float16" in refused(
        capsys, "build", "--base", "shapes-kontext", "--adapter", convert[2], "--out", tmp_path / "e"
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mixed.safetensors"]
    run(capsys, *convert, "--dtype", "float32")
    assert "dtype        float16+float32" in run(capsys, "adapter", "show", tmp_path / "mixed.safetensors")


def test_refused_conversions_leave_nothing(capsys: Any, family: Family, tmp_path: Path, partial: Path) -> None:
    big = {"transformer_blocks.0.attn.to_add_out": (torch.full((2, 128), 1e5), torch.ones(128, 2))}
    save_adapter(Adapter(family.name, "st", 2, big, "x"), tmp_path / "big.safetensors")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "cut.safetensors").write_bytes(resolve_adapter("shapes-st").read_bytes()[:-10])
    run(capsys, "adapter", "convert", "shapes-st", tmp_path / "st.pt", "--to", "slideredit-st")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "st.pt").read_bytes()[:-1000])
    before = sorted(p.name for p in tmp_path.iterdir())
    out = tmp_path / "out"
    for source, options, message in (
        ("big.safetensors", ("--dtype", "float16"), "that overflow float16"),
        ("empty.safetensors", (), "not a readable safetensors"),
        ("empty.pt", (), "not a file of plain tensors"),
        ("cut.safetensors", (), "not a readable safetensors"),
        ("cut.pt", (), "not a file of plain tensors"),
        ("nothing", (), "does not exist"),
        (partial.name, ("--base", "shapes-kontext"), "only 11 of the 13 modules"),
        (partial.name, ("--allow-partial",), "name one with --base"),
        ("big.safetensors", ("--base", tmp_path / "nowhere"), "does not exist"),
    ):
        assert message in refused(capsys, "adapter", "convert", tmp_path / source, out, *options)
    assert "exists already" in refused(capsys, "adapter", "convert", "shapes-st", partial)
    assert "cannot write" in refused(capsys, "adapter", "convert", "shapes-st", partial / "under" / "a.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_convert_drops_what_the_base_lacks_if_told_so(capsys: Any, family: Family, tmp_path: Path, partial: Path) -> None:
    out = tmp_path / "out.safetensors"
    options = ("--base", "shapes-kontext", "--allow-partial", "--json")
    result = json.loads(run(capsys, "adapter", "convert", partial, out, *options))
    assert result["dropped"] == [f"transformer_blocks.{block}.attn.add_q_proj" for block in (7, 8)]
    assert len(load_adapter(out, family).pairs) == result["modules"] == 11


def test_a_partial_build_only_when_told_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, partial: Path
) -> None:
    exported: list[Adapter] = []

    real = linked_weights.export_linked

    def export(family: Family, checkpoint: Path, adapter: Adapter, *others: Any, **options: Any) -> LinkedExport:
        exported.append(adapter)
        return real(family, checkpoint, adapter, *others, **options)

    monkeypatch.setattr(linked_weights, "export_linked", export)
    engine = tmp_path / "engine"
    build = ("build", "--base", "shapes-kontext", "--adapter", partial, "--out", engine)
    message = refused(capsys, *build, "--quiet")
    assert "not found: transformer_blocks.7.attn.add_q_proj" in message
    assert "--allow-partial" in message
    assert not engine.exists()
    assert not exported
    assert main([str(a) for a in (*build, "--allow-partial")]) == 0
    notes = capsys.readouterr().err
    assert "dropped 2 modules of the adapter that the base lacks: transformer_blocks.7.attn.add_q_proj" in notes
    assert "does not update 1 linears of the standard targets: transformer_blocks.0.attn.add_q_proj" in notes
    adapter = read_manifest(engine).adapter
    assert adapter is not None
    assert (adapter["modules"], len(adapter["dropped"])) == (11, 2)
    assert adapter["fingerprint"] == exported[0].fingerprint


def test_text_encoders_are_reported_wherever_an_adapter_is_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    state = load_file(resolve_adapter("shapes-st"))
    encoder = [f"text_encoder.text_model.encoder.layers.{i}.mlp.fc1" for i in range(5)]
    extra = {f"{name}.lora_{part}.weight": torch.ones(2, 2) for name in encoder for part in "AB"}
    save_file(state | extra, tmp_path / "both.safetensors")
    assert "ignored      5 linears of the text encoders" in run(capsys, "adapter", "show", tmp_path / "both.safetensors")
    show = ("adapter", "show", tmp_path / "both.safetensors", "--base", "shapes-kontext", "--json")
    report = json.loads(run(capsys, *show))
    assert (report["ignored"], len(report["base"]["matched"]), report["base"]["unexpected"]) == (encoder, 12, [])
    convert = ("adapter", "convert", tmp_path / "both.safetensors", tmp_path / "one.safetensors", "--json")
    assert json.loads(run(capsys, *convert))["dropped"] == encoder

    build = ("build", "--base", "shapes-kontext", "--adapter", tmp_path / "both.safetensors", "--out", tmp_path / "engine")
    assert main([str(a) for a in build]) == 0
    note = f"ignored 5 text-encoder linears that the adapter also updates: {', '.join(encoder[:4])}, …"
    assert note in capsys.readouterr().err


def test_verify_leaves_out_what_the_build_left_out(
    capsys: pytest.CaptureFixture[str], engines: dict[str, Path], family: Family, tmp_path: Path
) -> None:
    adapter = load_adapter("shapes-st", family)
    extra = {"transformer_blocks.7.attn.add_q_proj": adapter.pairs["transformer_blocks.0.attn.add_q_proj"]}
    more = dataclasses.replace(adapter, pairs=adapter.pairs | extra)
    save_adapter(more, tmp_path / "more.safetensors")
    verify = ("verify", tmp_path / "engine", "--adapter", tmp_path / "more.safetensors")
    shutil.copytree(engines["st"], tmp_path / "engine", copy_function=os.link)
    assert "is not the one in engine" in refused(capsys, *verify)
    path = tmp_path / "engine" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["adapter"]["dropped"] = list(extra)
    path.unlink()
    path.write_text(json.dumps(manifest))
    assert "passed" in run(capsys, *verify)


@pytest.mark.parametrize("method", ["bitsandbytes_4bit", "torchao", "gguf"])
def test_a_quantised_checkpoint_is_refused(capsys: Any, tmp_path: Path, method: str) -> None:
    base = tmp_path / "base"
    shutil.copytree(resolve_base("shapes-kontext"), base)
    config = base / "transformer" / "config.json"
    text = json.loads(config.read_text()) | {"quantization_config": {"quant_method": method}}
    config.unlink()
    config.write_text(json.dumps(text))
    for adapter in ([], ["--adapter", "shapes-st"]):
        error = refused(capsys, "build", "--base", base, *adapter, "--out", tmp_path / "engine", "--quiet")
        assert f"is quantised ({method})" in error
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def test_an_adapter_for_the_other_family(capsys: Any, tmp_path: Path) -> None:
    qwen = {f"transformer_blocks.{i}.txt_mlp.net.2": (torch.ones(2, 512), torch.ones(128, 2)) for i in range(2)}
    save_file(
        {f"transformer.{m}.lora_{part}.weight": t for m, pair in qwen.items() for part, t in zip("AB", pair, strict=True)},
        tmp_path / "qwen.safetensors",
    )
    report = json.loads(run(capsys, "adapter", "show", tmp_path / "qwen.safetensors", "--json"))
    assert (report["family"], report["kind"]) == ("qwen_image_edit", "st")
    build = ("build", "--base", "shapes-kontext", "--adapter", tmp_path / "qwen.safetensors", "--out", tmp_path / "e")
    assert "is for qwen_image_edit, not for flux_kontext: it updates transformer_blocks.0.txt_mlp.net.2" in refused(
        capsys, *build
    )
