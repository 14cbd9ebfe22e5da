"""Banks with ST and GST members: the rows of each slider, files, and engines in every lowering."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from test_adapter_inputs import like
from torch import Tensor

from slideredit_rt.adapters import Adapter, bank_adapters, load_adapter, load_adapters, save_adapter
from slideredit_rt.cli import main
from slideredit_rt.editor import SliderEditor
from slideredit_rt.engines import BuildSettings, open_engine, read_manifest
from slideredit_rt.errors import SliderEditError
from slideredit_rt.export.build import build_engine
from slideredit_rt.export.onnx_graph import example_inputs
from slideredit_rt.families import Family
from slideredit_rt.modules import SliderBackbone, without_sliders
from slideredit_rt.sliders import Slider
from slideredit_rt.verify import Origins, verify_engine

RED, DARK = "make the circle red", "make the background dark"
PROMPT = f"{RED} and {DARK}"
FILES = ["shapes-st", "shapes-gst"]
TEXT_ROWS, IMAGE_ROWS = 24, 128


@pytest.fixture(scope="module")
def bank(family: Family) -> Adapter:
    return load_adapters(FILES, family)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mixed") / "engine"
    build_engine("shapes-kontext", FILES, path, progress=False)
    return path


@pytest.fixture(scope="module")
def editor(engine: Path) -> SliderEditor:
    return SliderEditor.from_engine(engine)


def mixed_inputs(backbone: SliderBackbone, config: dict[str, Any]) -> dict[str, Tensor]:
    """A batch of three: both members act, the ST member alone, the GST member alone."""
    inputs = example_inputs(backbone, config, 3, TEXT_ROWS, IMAGE_ROWS, 2)
    inputs["token_mask"][:, 0, TEXT_ROWS:] = False  # slider 0 scales the ST member
    inputs["token_mask"][:, 1] = True
    inputs["alpha"] = torch.tensor([[[0.7, 0], [0, -0.4]], [[-0.6, 0], [0, 0]], [[0, 0], [0, 1.2]]])
    return inputs


def agree(actual: Tensor, expected: Tensor) -> bool:
    return float((actual - expected).abs().max()) <= 1e-5 * max(1.0, float(expected.abs().max()))


def test_a_file_keeps_the_kind_of_each_member(bank: Adapter, tmp_path: Path, family: Family) -> None:
    assert bank.kind == "gst", "its masks cover all rows"
    save_adapter(bank, tmp_path / "bank.safetensors")
    read = load_adapter(tmp_path / "bank.safetensors", family)
    assert {name: member.kind for name, member in read.members.items()} == {"shapes-st": "st", "shapes-gst": "gst"}
    assert read.fingerprint == bank.fingerprint
    assert bank_adapters([load_adapter("shapes-st"), like(load_adapter("shapes-st"), 2)], ["a", "b"]).kind == "st"


@torch.no_grad()
def test_each_member_alone_is_its_own_adapter(bank: Adapter, family: Family, pipeline: Any) -> None:
    transformer = pipeline.transformer.eval()
    together = SliderBackbone(family, transformer, bank)
    inputs = mixed_inputs(together, dict(pipeline.transformer.config))
    found = together(inputs)
    together.remove()
    for row, (name, mask) in (
        (1, ("shapes-st", inputs["token_mask"][..., :TEXT_ROWS])),
        (2, ("shapes-gst", inputs["token_mask"])),
    ):
        single = SliderBackbone(family, transformer, load_adapter(name))
        own = inputs | {"alpha": inputs["alpha"][..., row - 1].contiguous(), "token_mask": mask.contiguous()}
        assert agree(found[row], single(own)[row])
        assert not agree(single(without_sliders(own))[row], single(own)[row])
        single.remove()


@torch.no_grad()
@pytest.mark.parametrize("lowering", ["folded", "native"])
def test_onnx_runtime_equals_eager_torch(
    engine: Path, bank: Adapter, family: Family, pipeline: Any, tmp_path: Path, lowering: str
) -> None:
    if lowering == "native":
        engine = tmp_path / "engine"
        build_engine("shapes-kontext", FILES, engine, BuildSettings(lowering="native"), progress=False)
    manifest, run = open_engine(engine)
    assert (manifest.lowering, manifest.kind, manifest.member_kinds) == (
        lowering,
        "gst",
        {"shapes-st": "st", "shapes-gst": "gst"},
    )
    eager = SliderBackbone(family, pipeline.transformer.eval(), bank)
    inputs = mixed_inputs(eager, manifest.config)
    actual = run(inputs).clone()
    assert agree(actual, eager(inputs))
    rows = [run({k: v[i : i + 1] if len(v) == 3 else v for k, v in inputs.items()}).clone() for i in range(3)]
    assert agree(torch.cat(rows), actual), "a row gives what the request gives alone"


@pytest.mark.usefixtures("as_traced")
@torch.no_grad()
@pytest.mark.parametrize("lowering", ["operator", "folded"])
def test_inductor_equals_eager_torch(bank: Adapter, family: Family, pipeline: Any, tmp_path: Path, lowering: str) -> None:
    build_engine("shapes-kontext", FILES, tmp_path / "engine", BuildSettings("inductor", lowering=lowering), progress=False)
    manifest, run = open_engine(tmp_path / "engine")
    eager = SliderBackbone(family, pipeline.transformer.eval(), bank)
    inputs = mixed_inputs(eager, manifest.config)
    assert agree(run(inputs), eager(inputs))


def test_tensorrt_rtx_builds_a_mixed_bank(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    from slideredit_rt.engines.tensorrt import TensorRTOptions

    options = TensorRTOptions(resolution=64, max_text_rows=24, targets=("sm89",))
    settings = BuildSettings("tensorrt-rtx", batch=(1, 1, 4), options=options)
    build_engine("shapes-kontext", FILES, tmp_path / "rtx", settings, progress=False)
    manifest = read_manifest(tmp_path / "rtx")
    assert {s.name: s.shape for s in manifest.inputs if s.name in ("alpha", "token_mask")} == {
        "alpha": ("batch", "sliders", 2),
        "token_mask": ("batch", "sliders", "rows"),
    }


def test_an_st_slider_scales_its_words_and_a_gst_slider_everything(editor: SliderEditor, scene: Image.Image) -> None:
    sliders = [Slider(RED, adapter="shapes-st"), Slider(DARK, adapter="shapes-st"), Slider("shapes-gst")]
    prepared = editor.prepare(scene, sliders, prompt=PROMPT)
    rows = [mask.nonzero().flatten().tolist() for mask in prepared.token_mask]
    assert rows[:2] == [list(span) for span in prepared.spans[:2]]
    assert rows[2] == list(range(prepared.conditioning.text_rows + prepared.conditioning.image_rows))
    assert not {*rows[0]} & {*rows[1]}
    with pytest.raises(SliderEditError, match="two sliders scale the adapter 'shapes-gst', which scales every row"):
        editor.prepare(scene, [Slider("shapes-gst"), Slider(RED, adapter="shapes-gst")], prompt=PROMPT)
    with pytest.raises(SliderEditError, match="'shapes-st' appears nowhere"):
        editor.prepare(scene, [Slider("shapes-st")], prompt=PROMPT)


@pytest.mark.parametrize("kind", ["st", "gst"], indirect=True)
def test_an_edit_with_one_member_is_that_of_its_own_engine(
    editor: SliderEditor, engines: dict[str, Path], scene: Image.Image, kind: str
) -> None:
    single = SliderEditor.from_engine(engines[kind])
    expected = single.render_tensor(single.prepare(scene, [RED], prompt=PROMPT), [[0.3], [1.4]], steps=2)
    prepared = editor.prepare(scene, [Slider(RED, adapter=f"shapes-{kind}")], prompt=PROMPT)
    assert (editor.render_tensor(prepared, [[0.3], [1.4]], steps=2) - expected).abs().max() <= 1e-4


def test_verify_refuses_a_bank_whose_members_have_other_kinds(
    engine: Path, bank: Adapter, scene: Image.Image, tmp_path: Path
) -> None:
    members = bank.members | {"shapes-st": dataclasses.replace(bank.members["shapes-st"], kind="gst")}
    changed = dataclasses.replace(bank, members=members)
    assert changed.fingerprint == bank.fingerprint
    save_adapter(changed, tmp_path / "bank.safetensors")
    with pytest.raises(SliderEditError, match="is not the one in engine"):
        verify_engine(engine, scene, [Slider(RED), Slider(DARK)], Origins(adapter=str(tmp_path / "bank.safetensors")), steps=1)


def test_verify_passes(engine: Path, scene: Image.Image) -> None:
    assert verify_engine(engine, scene, [Slider(RED), Slider(DARK)], steps=1).passed


def test_an_st_member_that_updates_image_rows_is_refused() -> None:
    gst = load_adapter("shapes-gst")
    wrong = dataclasses.replace(gst, kind="st", source="wrong")
    with pytest.raises(SliderEditError, match=r"'wrong' is marked as ST but updates .*, which does not project text rows"):
        bank_adapters([gst, wrong], ["a", "b"])


def test_an_st_bank_with_a_gst_member_is_refused(engine: Path, bank: Adapter, tmp_path: Path, family: Family) -> None:
    save_adapter(dataclasses.replace(bank, kind="st"), tmp_path / "bank.safetensors")
    with pytest.raises(SliderEditError, match="is a bank of kind st, but its member 'shapes-gst' is gst"):
        load_adapter(tmp_path / "bank.safetensors", family)
    manifest = json.loads((engine / "manifest.json").read_text())
    manifest["adapter"]["kind"] = "st"
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(SliderEditError, match=r"is damaged .*a bank of kind st with a member of kind gst"):
        read_manifest(tmp_path)


def test_commands_build_show_and_edit(
    engine: Path, scene: Image.Image, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scene.save(tmp_path / "scene.png")
    assert main(["inspect", str(engine)]) == 0
    shown = capsys.readouterr().out
    assert "member     shapes-st (st, shapes-st)" in shown
    assert "member     shapes-gst (gst, shapes-gst)" in shown
    edit = [
        "edit",
        str(engine),
        "--image",
        str(tmp_path / "scene.png"),
        "--prompt",
        PROMPT,
        "--steps",
        "1",
        "--quiet",
        "--json",
    ]
    sliders = ["--slider", f"{RED}=0.5", "--member", "shapes-st", "--slider", f"{DARK}=0.7", "--member", "shapes-gst"]
    assert main([*edit, *sliders, "--out", str(tmp_path / "out.png")]) == 0
    assert [s["member"] for s in json.loads(capsys.readouterr().out)["sliders"]] == FILES
