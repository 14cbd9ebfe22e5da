"""Several adapters in one engine, each with its own strength: files, inputs, images, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from slideredit_rt.adapters import Adapter, adapter_report, bank_adapters, fill_ranks, load_adapter, load_adapters, save_adapter
from slideredit_rt.cli import main
from slideredit_rt.editor import SliderEditor
from slideredit_rt.engines import BuildSettings, get_backend, open_engine, read_manifest
from slideredit_rt.errors import SliderEditError
from slideredit_rt.export.build import build_engine
from slideredit_rt.export.lowering import choose
from slideredit_rt.export.onnx_graph import example_inputs
from slideredit_rt.export.replace import replace_engine_adapter
from slideredit_rt.families import Family
from slideredit_rt.modules import SliderBackbone
from slideredit_rt.sliders import Slider
from slideredit_rt.spans import combine_row_scale
from slideredit_rt.strength import StrengthCurve
from slideredit_rt.verify import Origins, verify_engine

RED, DARK = "make the circle red", "make the background dark"
PROMPT = f"{RED} and {DARK}"


def like(adapter: Adapter, rank: int, *, every: int = 1, seed: int = 1) -> Adapter:
    """A random adapter for every n-th of the same modules."""
    g = torch.Generator().manual_seed(seed)
    pairs = {
        name: (0.1 * torch.randn(rank, a.shape[1], generator=g), 0.1 * torch.randn(len(b), rank, generator=g))
        for index, (name, (a, b)) in enumerate(adapter.pairs.items())
        if index % every == 0
    }
    curve = StrengthCurve((0.0, 1.0), (0.0, 1.0))
    return dataclasses.replace(adapter, pairs=pairs, rank=rank, source=f"random-{seed}", training={"steps": seed}, curve=curve)


@pytest.fixture(scope="module")
def pair(family: Family, kind: str) -> list[Adapter]:
    """The shipped adapter, and one of a higher rank that leaves every other module alone."""
    shipped = load_adapter(f"shapes-{kind}", family)
    return [shipped, like(shipped, shipped.rank + 3, every=2)]


@pytest.fixture(scope="module")
def files(pair: list[Adapter], kind: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp(f"adapters-{kind}")
    save_adapter(pair[1], folder / "other.safetensors")
    return [f"shapes-{kind}", str(folder / "other.safetensors")]


@pytest.fixture(scope="module")
def engine(files: list[str], kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bank") / kind
    build_engine("shapes-kontext", files, path, progress=False)
    return path


@pytest.fixture(scope="module")
def editor(engine: Path) -> SliderEditor:
    return SliderEditor.from_engine(engine)


def of_member(inputs: dict[str, Tensor], member: int) -> dict[str, Tensor]:
    """The same request for an engine that has only this member."""
    return inputs | {"alpha": inputs["alpha"][..., member].contiguous()}


def bank_inputs(family: Family, transformer: Any, pair: list[Adapter], config: dict[str, Any]) -> dict[str, Tensor]:
    backbone = SliderBackbone(family, transformer, bank_adapters(pair, ["a", "b"]))
    inputs = example_inputs(backbone, config, 3, 24, 128, 2)
    backbone.remove()
    return inputs


def test_every_module_has_the_largest_rank_and_zeros_where_a_member_has_nothing(pair: list[Adapter]) -> None:
    bank = bank_adapters(pair, ["a", "b"])
    assert list(bank.members) == ["a", "b"]
    assert bank.pairs.keys() == pair[0].pairs.keys()
    for name, (a, b) in bank.pairs.items():
        rank = len(a) // 2
        for half_a, half_b, adapter in zip(a.chunk(2), b.chunk(2, dim=1), pair, strict=True):
            own = adapter.pairs.get(name)
            expected = torch.zeros(len(b), a.shape[1]) if own is None else own[1] @ own[0]
            torch.testing.assert_close(half_b @ half_a, expected)
            if own is not None:
                assert torch.equal(half_a[: len(own[0])], own[0])
        assert rank == max(len(p.pairs[name][0]) for p in pair if name in p.pairs)


def test_filled_ranks_keep_each_members_update(pair: list[Adapter]) -> None:
    bank = bank_adapters(pair, ["a", "b"])
    filled = fill_ranks(bank, {name: len(a) + 6 for name, (a, _) in bank.pairs.items()})
    for name, (a, b) in filled.pairs.items():
        assert len(a) == len(bank.pairs[name][0]) + 6
        for index in range(2):
            torch.testing.assert_close(
                b.chunk(2, dim=1)[index] @ a.chunk(2)[index],
                bank.pairs[name][1].chunk(2, dim=1)[index] @ bank.pairs[name][0].chunk(2)[index],
            )


def test_a_banks_file_brings_members_and_curves_back(pair: list[Adapter], tmp_path: Path, family: Family) -> None:
    bank = bank_adapters(pair, ["one", "zwölf"])
    save_adapter(bank, tmp_path / "bank.safetensors")
    read = load_adapter(tmp_path / "bank.safetensors", family)
    assert read.fingerprint == bank.fingerprint
    assert {name: m.curve for name, m in read.members.items()} == {"one": StrengthCurve(), "zwölf": pair[1].curve}
    assert read.training == {"one": pair[0].training, "zwölf": {"steps": 1}}
    assert list(adapter_report(read)["members"]) == ["one", "zwölf"]
    assert bank_adapters(pair, ["zwölf", "one"]).fingerprint != bank.fingerprint
    for form in ("diffusers", "peft"):
        with pytest.raises(SliderEditError, match="is a bank, which only the canonical format can hold"):
            save_adapter(bank, tmp_path / form, form)  # type: ignore[arg-type]


@torch.no_grad()
def test_with_one_member_acting_the_bank_is_that_adapter(family: Family, pipeline: Any, pair: list[Adapter]) -> None:
    transformer, config = pipeline.transformer.eval(), dict(pipeline.transformer.config)
    inputs = bank_inputs(family, transformer, pair, config)
    # For a single adapter each row has one slider at most.
    inputs["token_mask"][:, 1] &= ~inputs["token_mask"][:, 0]
    for member in (0, 1):
        inputs["alpha"] *= 0
        inputs["alpha"][..., member] = torch.tensor([[0.5, -0.5], [1.0, 0.0], [0.0, 2.0]])
        single = SliderBackbone(family, transformer, pair[member])
        expected = single(of_member(inputs, member))
        single.remove()
        bank = SliderBackbone(family, transformer, bank_adapters(pair, ["a", "b"]))
        torch.testing.assert_close(bank(inputs), expected, atol=1e-5, rtol=1e-5)
        assert (bank(inputs) - bank({k: v for k, v in inputs.items() if k not in ("alpha", "token_mask")})).abs().max() > 1e-3
        bank.remove()


@torch.no_grad()
def test_alpha_zero_in_every_member_is_the_base_bit_for_bit(family: Family, pipeline: Any, pair: list[Adapter]) -> None:
    transformer, config = pipeline.transformer.eval(), dict(pipeline.transformer.config)
    inputs = bank_inputs(family, transformer, pair, config)
    inputs["alpha"] *= 0
    bank = SliderBackbone(family, transformer, bank_adapters(pair, ["a", "b"]))
    assert torch.equal(bank(inputs), bank({k: v for k, v in inputs.items() if k not in ("alpha", "token_mask")}))


@torch.no_grad()
def test_engine_equals_each_adapters_own_engine_in_a_mixed_batch(
    engine: Path,
    engines: dict[str, Path],
    files: list[str],
    family: Family,
    pipeline: Any,
    pair: list[Adapter],
    tmp_path: Path,
    kind: str,
) -> None:
    manifest, run = open_engine(engine)
    assert list(manifest.members) == [files[0], "other"]
    assert [s.shape for s in manifest.inputs if s.name == "alpha"] == [("batch", "sliders", 2)]
    inputs = bank_inputs(family, pipeline.transformer, pair, manifest.config)
    # Row 0 moves the first member, row 1 the second, row 2 neither.
    inputs["alpha"] *= 0
    inputs["alpha"][0, :, 0], inputs["alpha"][1, :, 1] = torch.tensor([0.7, -0.4]), torch.tensor([-0.6, 1.2])
    inputs["token_mask"][:, 1] &= ~inputs["token_mask"][:, 0]
    found = run(inputs).clone()
    build_engine("shapes-kontext", files[1], tmp_path / "other", progress=False)
    for member, path in enumerate((engines[kind], tmp_path / "other")):
        own = open_engine(path)[1](of_member(inputs, member))
        rows = [member, 2]
        assert (found[rows] - own[rows]).abs().max() <= 1e-5 * max(1.0, float(own.abs().max()))


@torch.no_grad()
def test_members_that_act_together_add_up_in_every_lowering(
    engine: Path, files: list[str], family: Family, pipeline: Any, pair: list[Adapter], tmp_path: Path, kind: str
) -> None:
    usual, other = ("native", "folded") if kind == "st" else ("folded", "native")
    build_engine("shapes-kontext", files, tmp_path / "engine", BuildSettings(lowering=other), progress=False)
    inputs = bank_inputs(family, pipeline.transformer, pair, read_manifest(engine).config)
    expected = SliderBackbone(family, pipeline.transformer.eval(), bank_adapters(pair, ["a", "b"]))(inputs)
    for form, path in ((usual, engine), (other, tmp_path / "engine")):
        manifest, run = open_engine(path)
        assert manifest.lowering == form
        assert (run(inputs) - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())


@pytest.mark.usefixtures("as_traced")
@torch.no_grad()
def test_an_inductor_engine_gives_each_member_its_own_strength(
    files: list[str], family: Family, pipeline: Any, pair: list[Adapter], tmp_path: Path, kind: str
) -> None:
    """One member leaves every other module alone, and their ranks differ."""
    build_engine("shapes-kontext", files, tmp_path / "engine", BuildSettings("inductor"), progress=False)
    manifest, run = open_engine(tmp_path / "engine")
    assert (manifest.lowering, len(manifest.members)) == ({"st": "operator", "gst": "folded"}[kind], 2)
    inputs = bank_inputs(family, pipeline.transformer, pair, manifest.config)
    eager = SliderBackbone(family, pipeline.transformer.eval(), bank_adapters(pair, ["a", "b"]))
    expected, bound = eager(inputs), 1e-5 * max(1.0, float(eager(inputs).abs().max()))
    assert (run(inputs) - expected).abs().max() <= bound
    swapped = inputs | {"alpha": inputs["alpha"].flip(-1)}
    assert (run(swapped) - eager(swapped)).abs().max() <= bound
    assert (eager(swapped) - expected).abs().max() >= 100 * bound


def test_row_scale_sums_sliders_member_by_member() -> None:
    mask = torch.tensor([[[1, 1, 0], [0, 1, 1]]], dtype=torch.bool)
    alpha = torch.tensor([[[0.5, 0.0], [0.0, -2.0]]])
    assert combine_row_scale(alpha, mask).tolist() == [[[0.5, 0.0], [0.5, -2.0], [0.0, -2.0]]]


def test_each_strength_goes_through_its_own_members_curve(editor: SliderEditor, files: list[str], scene: Image.Image) -> None:
    sliders = [Slider(RED, adapter="other"), Slider(DARK, adapter=files[0])]
    prepared = editor.prepare(scene, sliders, prompt=PROMPT)
    assert prepared.members == ("other", files[0])
    assert prepared.token_mask.shape[0] == 2
    # `other` maps a strength to itself, the shipped adapter to 1 − strength.
    assert editor.alphas(prepared, [[0.25, 0.25], [2.0, 1.0]]).tolist() == [
        [[0.0, 0.25], [0.75, 0.0]],
        [[0.0, 2.0], [0.0, 0.0]],
    ]


def test_an_edit_with_one_member_is_the_single_engines(
    editor: SliderEditor, files: list[str], scene: Image.Image, engines: dict[str, Path], kind: str
) -> None:
    single = SliderEditor.from_engine(engines[kind])
    expected = single.render_tensor(single.prepare(scene, [RED], prompt=PROMPT), [[0.3], [1.4]], steps=2)
    prepared = editor.prepare(scene, [Slider(RED, adapter=files[0])], prompt=PROMPT)
    assert (editor.render_tensor(prepared, [[0.3], [1.4]], steps=2) - expected).abs().max() <= 1e-4


def test_sliders_begin_to_act_at_the_fraction_of_the_steps_that_is_asked_for(
    editor: SliderEditor, files: list[str], scene: Image.Image
) -> None:
    prepared = editor.prepare(scene, [Slider(RED, adapter=files[0])], prompt=PROMPT)
    images = [editor.render_tensor(prepared, [[0.0]], steps=3, slider_start=start) for start in (0, 1 / 3, 2 / 3)]
    plain = editor.render_tensor(prepared, [[1.0]], steps=3)
    apart = [(image - plain).abs().mean().item() for image in images]
    assert apart[0] > apart[1] > apart[2] > 0
    assert torch.equal(editor.render_tensor(prepared, [[1.0]], steps=3, slider_start=2 / 3), plain)


def test_a_gst_slider_called_like_its_adapter_needs_no_words_in_the_prompt(
    family: Family, scene: Image.Image, kind: str, pair: list[Adapter]
) -> None:
    bank = bank_adapters(pair, [RED, "age"])
    eager = SliderEditor.from_pretrained("shapes-kontext", bank)
    if kind == "st":
        assert eager.prepare(scene, [RED]).members == (RED,)
        with pytest.raises(SliderEditError, match="'age' appears nowhere"):
            eager.prepare(scene, ["age"], prompt=PROMPT)
        return
    prepared = eager.prepare(scene, ["age", Slider(DARK, adapter=RED)], prompt=PROMPT)
    assert prepared.members == ("age", RED)
    assert prepared.token_mask.all()
    assert prepared.spans[0] == ()
    with pytest.raises(SliderEditError, match="'age' only names its adapter; pass a prompt as well"):
        eager.prepare(scene, ["age"])
    with pytest.raises(SliderEditError, match="two sliders scale the adapter 'age'"):
        eager.prepare(scene, ["age", Slider(RED, adapter="age")], prompt=PROMPT)


@pytest.mark.parametrize(
    ("slider", "message"),
    [
        (Slider(RED), rf"slider '{RED}' names no adapter; choose from 'shapes-(gst|st)', 'other'"),
        (Slider(RED, adapter="x"), r"names the unknown adapter 'x'; choose from"),
    ],
)
def test_a_slider_without_a_member_lists_them(editor: SliderEditor, scene: Image.Image, slider: Slider, message: str) -> None:
    with pytest.raises(SliderEditError, match=message):
        editor.prepare(scene, [slider])


def test_a_member_where_there_is_no_bank(st_editor: SliderEditor, scene: Image.Image) -> None:
    with pytest.raises(SliderEditError, match="has a single one without a name"):
        st_editor.prepare(scene, [Slider(RED, adapter="x")])


def test_adapters_that_make_no_bank_are_refused(pair: list[Adapter], files: list[str], family: Family, kind: str) -> None:
    foreign = dataclasses.replace(pair[1], family="flux2")
    cases: list[tuple[Any, str]] = [
        (lambda: bank_adapters([pair[0], foreign], ["a", "b"]), "cannot share an engine; pass adapters of one family"),
        (lambda: load_adapters([files[0], files[0]], family), f"two adapters would be named '{files[0]}' in the bank"),
        (lambda: bank_adapters(pair, ["a"]), "2 adapters and 1 names"),
        (lambda: bank_adapters([bank_adapters(pair, ["a", "b"]), pair[0]], ["c", "d"]), "is already a bank"),
        (
            lambda: choose("plugin", pair[0].kind, get_backend("tensorrt"), bank=True),
            "one scale per row, but a bank of adapters",
        ),
    ]
    for make, message in cases:
        with pytest.raises(SliderEditError, match=message):
            make()
    name = next(iter(pair[0].pairs))
    wide = dataclasses.replace(pair[1], pairs={name: (torch.zeros(2, 7), torch.zeros(9, 2))})
    with pytest.raises(SliderEditError, match="9×7"):
        bank_adapters([pair[0], wide], ["a", "b"])
    assert load_adapters([files[0]], family).members == {}


def test_a_file_whose_ranks_its_members_cannot_share(pair: list[Adapter], tmp_path: Path, family: Family) -> None:
    bank = bank_adapters(pair, ["a", "b"])
    odd = {name: (torch.cat([a, a[:1]]), torch.cat([b, b[:, :1]], dim=1)) for name, (a, b) in bank.pairs.items()}
    save_adapter(dataclasses.replace(bank, pairs=odd), tmp_path / "odd.safetensors")
    with pytest.raises(SliderEditError, match="a bank of 2 members, but its ranks cannot be divided evenly"):
        load_adapter(tmp_path / "odd.safetensors", family)


@torch.no_grad()
def test_another_bank_takes_the_engines_place_and_other_numbers_of_members_do_not(
    engine: Path, pair: list[Adapter], files: list[str], family: Family, pipeline: Any, tmp_path: Path
) -> None:
    shutil.copytree(engine, tmp_path / "engine", copy_function=os.link)
    # A lower rank in both members: each is filled up where it stands.
    new = [like(pair[0], 2, seed=5), like(pair[0], 3, seed=6)]
    save_adapter(bank_adapters(new, ["young", "old"]), tmp_path / "new.safetensors")
    manifest = replace_engine_adapter(tmp_path / "engine", str(tmp_path / "new.safetensors"))
    assert list(manifest.members) == ["young", "old"]
    assert read_manifest(tmp_path / "engine").members == {name: new[0].curve for name in ("young", "old")}
    inputs = bank_inputs(family, pipeline.transformer, pair, manifest.config)
    expected = SliderBackbone(family, pipeline.transformer.eval(), bank_adapters(new, ["young", "old"]))(inputs)
    found = open_engine(tmp_path / "engine")[1](inputs)
    assert (found - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())
    three = bank_adapters([like(pair[0], 1, seed=s) for s in range(3)], ["a", "b", "c"])
    with pytest.raises(SliderEditError, match=r"has 3 members, but the export in .* is for a bank of 2"):
        replace_engine_adapter(tmp_path / "engine", three)
    with pytest.raises(SliderEditError, match="has no members, but the export"):
        replace_engine_adapter(tmp_path / "engine", files[0])


def test_verify_passes_and_finds_the_members_files(engine: Path, scene: Image.Image, files: list[str]) -> None:
    assert verify_engine(engine, scene, [Slider(RED)], steps=1).passed
    assert verify_engine(engine, scene, [Slider(RED), Slider(DARK)], Origins(adapter=files), steps=1).passed
    with pytest.raises(SliderEditError, match="is not the one in engine"):
        verify_engine(engine, scene, [Slider(RED)], Origins(adapter=files[::-1]), steps=1)


def test_the_manifest_describes_the_members(engine: Path, files: list[str]) -> None:
    described = json.loads((engine / "manifest.json").read_text())["adapter"]["members"]
    assert {name: member["source"] for name, member in described.items()} == {files[0]: files[0], "other": files[1]}
    assert described["other"]["strength_curve"] == {"strengths": [0.0, 1.0], "alphas": [0.0, 1.0]}


@torch.no_grad()
@pytest.mark.parametrize("kind", ["st"], indirect=True)
def test_inductor_runs_a_bank(files: list[str], family: Family, pipeline: Any, pair: list[Adapter], tmp_path: Path) -> None:
    build_engine("shapes-kontext", files, tmp_path / "engine", BuildSettings("inductor"), progress=False)
    manifest, run = open_engine(tmp_path / "engine")
    inputs = bank_inputs(family, pipeline.transformer, pair, manifest.config)
    expected = SliderBackbone(family, pipeline.transformer.eval(), bank_adapters(pair, ["a", "b"]))(inputs)
    assert (run(inputs) - expected).abs().max() <= 1e-4 * max(1, expected.abs().max())


@pytest.mark.parametrize("kind", ["gst"], indirect=True)
def test_tensorrt_rtx_builds_a_bank(files: list[str], tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    from slideredit_rt.engines.tensorrt import TensorRTOptions

    options = TensorRTOptions(resolution=64, max_text_rows=24, targets=("sm89",))
    manifest = build_engine(
        "shapes-kontext",
        files,
        tmp_path / "rtx",
        BuildSettings("tensorrt-rtx", batch=(1, 1, 4), options=options),
        progress=False,
    )
    assert [s.shape for s in manifest.inputs if s.name == "alpha"] == [("batch", "sliders", 2)]
    assert read_manifest(tmp_path / "rtx").members.keys() == {files[0], "other"}


@pytest.mark.parametrize("kind", ["st"], indirect=True)
def test_commands_build_show_edit_and_replace_a_bank(
    engine: Path, files: list[str], scene: Image.Image, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(engine)]) == 0
    out = capsys.readouterr().out
    assert f"member     other (st, {files[1]})" in out
    assert "input      alpha float32 [batch, sliders, 2]" in out
    scene.save(tmp_path / "scene.png")
    image, edited = ["--image", str(tmp_path / "scene.png"), "--steps", "1", "--quiet"], str(tmp_path / "out.png")
    sliders = ["--slider", f"{RED}=0.5", "--slider", DARK]
    members = ["--member", files[0], "--member", "other"]
    assert main(["edit", str(engine), *image, *sliders, *members, "--json", "--out", edited]) == 0
    assert [s["member"] for s in json.loads(capsys.readouterr().out)["sliders"]] == [files[0], "other"]
    swept = ["--slider", f"{RED}=0:1:2", "--member", "other"]
    assert main(["sweep", str(engine), *image, *swept, "--out", edited]) == 0
    assert json.loads((tmp_path / "out.json").read_text())["sliders"][0]["member"] == "other"
    capsys.readouterr()
    assert main(["edit", str(engine), *image, *sliders, *members[:2], "--out", edited]) == 2
    assert "1 --member and 2 --slider were given" in capsys.readouterr().err
    copied = tmp_path / "engine"
    shutil.copytree(engine, copied, copy_function=os.link)
    assert main(["adapter", "replace", str(copied), *files]) == 0
    assert main(["adapter", "show", files[0]]) == 0
    assert "members" not in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["gst"], indirect=True)
def test_the_command_builds_a_bank_from_repeated_adapters(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [word for source in files for word in ("--adapter", source)]
    assert main(["build", "--base", "shapes-kontext", *options, "--out", str(tmp_path / "bank"), "--quiet"]) == 0
    assert list(read_manifest(tmp_path / "bank").members) == [files[0], "other"]
