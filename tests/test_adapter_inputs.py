"""Engines that take their adapter as inputs: one build, any adapter."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from slideredit_rt.adapters import Adapter, AdapterInputs, bank_adapters, load_adapter, save_adapter
from slideredit_rt.assets import resolve_base
from slideredit_rt.cli import main
from slideredit_rt.editor import SliderEditor
from slideredit_rt.engines import BuildSettings, get_backend, open_engine, read_manifest
from slideredit_rt.engines.adapter_inputs import AdaptedEngine, AdapterBuffers
from slideredit_rt.errors import OutOfDeviceMemory, SliderEditError
from slideredit_rt.export.build import build_engine
from slideredit_rt.export.lowering import choose
from slideredit_rt.export.onnx_graph import example_inputs
from slideredit_rt.families import Family, Kind
from slideredit_rt.memory import RESERVED, ServerParts, adapters_size, engine_footprint, plan_memory
from slideredit_rt.modules import SliderBackbone, without_sliders
from slideredit_rt.sliders import Slider
from slideredit_rt.strength import StrengthCurve
from slideredit_rt.verify import Origins, verify_engine

RED, DARK = "make the circle red", "make the background dark"
MAX_RANK = 18


def like(adapter: Adapter, rank: int, *, every: int = 1, seed: int = 1) -> Adapter:
    """A random adapter for every n-th of the same modules, with a curve of its own."""
    g = torch.Generator().manual_seed(seed)
    pairs = {
        name: (0.1 * torch.randn(rank, a.shape[1], generator=g), 0.1 * torch.randn(len(b), rank, generator=g))
        for index, (name, (a, b)) in enumerate(adapter.pairs.items())
        if index % every == 0
    }
    curve = StrengthCurve((0.0, 1.0), (0.0, 1.0))
    return dataclasses.replace(adapter, pairs=pairs, rank=rank, source=f"random-{seed}", curve=curve)


@pytest.fixture(scope="module")
def shipped(family: Family, kind: str) -> Adapter:
    return load_adapter(f"shapes-{kind}", family)


@pytest.fixture(scope="module")
def others(shipped: Adapter, kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of adapters that did not exist when the engine was built."""
    folder = tmp_path_factory.mktemp(f"adapters-{kind}")
    save_adapter(like(shipped, MAX_RANK), folder / "full.safetensors")
    save_adapter(like(shipped, 3, every=2, seed=2), folder / "small.safetensors")
    return folder


@pytest.fixture(scope="module")
def engine(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine for any adapter of the kind, whose default is the shipped one."""
    path = tmp_path_factory.mktemp("inputs") / kind
    build_engine(
        "shapes-kontext", f"shapes-{kind}", path, BuildSettings(adapter_inputs=True, max_rank=MAX_RANK), progress=False
    )
    return path


@pytest.fixture(scope="module")
def editor(engine: Path) -> SliderEditor:
    return SliderEditor.from_engine(engine)


def with_adapter(run: Any, manifest: Any, adapter: Adapter) -> AdaptedEngine:
    return AdaptedEngine(run, manifest, manifest.layout.pack(adapter, torch.device("cpu")))


def edit_inputs(backbone: SliderBackbone, config: dict[str, Any]) -> dict[str, Tensor]:
    return example_inputs(backbone, config, 3, 24, 128, 2)


def test_zeros_fill_up_ranks_and_linears(shipped: Adapter) -> None:
    layout = AdapterInputs.of_adapter(shipped, MAX_RANK)
    small = like(shipped, 3, every=2)
    tensors = layout.pack(small, torch.device("cpu"))
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {s.name: s.shape for s in layout.specs()}
    assert len(tensors) == 4, "linears of the same size share an input"
    for name, (a, b) in layout.unpack(tensors, torch.float32).items():
        assert len(a) == b.shape[1] == MAX_RANK
        own = small.pairs.get(name)
        torch.testing.assert_close(b @ a, torch.zeros(len(b), a.shape[1]) if own is None else own[1] @ own[0])
    assert AdapterInputs.from_json(json.loads(json.dumps(layout.to_json()))) == layout


@torch.no_grad()
@pytest.mark.parametrize("name", ["default", "full", "small"])
def test_the_engine_equals_eager_torch_with_each_adapter(
    engine: Path, editor: SliderEditor, others: Path, family: Family, pipeline: Any, shipped: Adapter, name: str
) -> None:
    adapter = shipped if name == "default" else load_adapter(others / f"{name}.safetensors", family)
    run = (editor if name == "default" else editor.use_adapter(others / f"{name}.safetensors")).engine
    eager = SliderBackbone(family, pipeline.transformer.eval(), adapter)
    inputs = edit_inputs(eager, editor.config)
    expected, bound = eager(inputs), 1e-5 * max(1.0, float(eager(inputs).abs().max()))
    actual = run(inputs).clone()
    assert (actual - expected).abs().max() <= bound
    assert (expected - eager(without_sliders(inputs))).abs().max() >= 100 * bound, "the adapter acts"
    rows = [run({k: v[i : i + 1] if v.shape[0] == 3 else v for k, v in inputs.items()}).clone() for i in range(3)]
    assert (torch.cat(rows) - actual).abs().max() <= bound, "a row gives what the request gives alone"


@pytest.mark.usefixtures("as_traced")
@torch.no_grad()
@pytest.mark.parametrize("kind", ["gst"], indirect=True)
def test_an_inductor_engine_takes_any_adapter(
    others: Path, family: Family, pipeline: Any, shipped: Adapter, tmp_path: Path
) -> None:
    settings = BuildSettings("inductor", adapter_inputs=True, max_rank=MAX_RANK, kind="gst")
    manifest = build_engine("shapes-kontext", None, tmp_path / "engine", settings, progress=False)
    assert (manifest.lowering, manifest.updates, manifest.adapter) == ("operator", {"operator": len(shipped.pairs)}, None)
    manifest, run = open_engine(tmp_path / "engine")
    for adapter in (shipped, load_adapter(others / "small.safetensors", family), shipped):
        eager = SliderBackbone(family, pipeline.transformer.eval(), adapter)
        inputs = edit_inputs(eager, manifest.config)
        expected, actual = eager(inputs), with_adapter(run, manifest, adapter)(inputs)
        eager.remove()
        assert (actual - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("kind", ["st"], indirect=True)
def test_tensorrt_rtx_builds_adapter_inputs(tmp_path: Path, shipped: Adapter) -> None:
    pytest.importorskip("tensorrt_rtx")
    from slideredit_rt.engines.tensorrt import TensorRTOptions

    options = TensorRTOptions(resolution=64, max_text_rows=24, targets=("sm89",))
    settings = BuildSettings("tensorrt-rtx", batch=(1, 1, 4), options=options, adapter_inputs=True, max_rank=16)
    build_engine("shapes-kontext", None, tmp_path / "rtx", settings, progress=False)
    manifest = read_manifest(tmp_path / "rtx")
    assert (manifest.kind, manifest.lowering) == ("st", "native")
    assert manifest.inputs[-4:] == AdapterInputs.of_adapter(shipped, 16).specs()


@pytest.mark.parametrize("kind", ["st"], indirect=True)
def test_buffers_are_filled_only_when_the_adapter_changes(engine: Path, shipped: Adapter) -> None:
    manifest = read_manifest(engine)
    assert manifest.layout is not None
    buffers = AdapterBuffers(manifest, torch.device("cpu"))
    one, two = (manifest.layout.pack(a, torch.device("cpu")) for a in (shipped, like(shipped, 4)))
    for given, copied in ((one, True), (one, False), (two, True), (one, True)):
        before = {name: tensor._version for name, tensor in buffers.tensors.items()}
        buffers.fill(given)
        assert {name: tensor._version > before[name] for name, tensor in buffers.tensors.items()} == dict.fromkeys(one, copied)
        assert all(torch.equal(tensor, given[name]) for name, tensor in buffers.tensors.items())


def test_switching_rebuilds_no_session_and_reads_each_adapter_once(engine: Path, others: Path, scene: Image.Image) -> None:
    editor = SliderEditor.from_engine(engine)
    assert editor.adapters is not None
    before, session = editor.adapters.loads, editor.adapters.engine.session  # type: ignore[attr-defined]
    seen = []
    for name in ("full", "small", "full", "small"):
        chosen = editor.use_adapter(others / f"{name}.safetensors")
        assert isinstance(chosen.engine, AdaptedEngine)
        assert chosen.engine.runs is editor.adapters.engine
        seen.append(chosen.edit(scene, [Slider(RED, 0.5)], steps=1).tobytes())
    assert editor.adapters.engine.session is session  # type: ignore[attr-defined]
    assert editor.adapters.loads == before + 2
    assert seen[:2] == seen[2:]
    assert len({*seen, editor.edit(scene, [Slider(RED, 0.5)], steps=1).tobytes()}) == 3


@pytest.mark.parametrize("kind", ["st"], indirect=True)
def test_the_least_recently_used_adapter_leaves_the_device(engine: Path, others: Path, shipped: Adapter) -> None:
    editor = SliderEditor.from_engine(engine)
    adapters = editor.adapters
    assert adapters is not None
    adapters.max_bytes = 2 * adapters.bytes
    full = editor.use_adapter(others / "full.safetensors")
    assert (len(adapters), adapters.loads) == (2, 2)
    editor.use_adapter(others / "small.safetensors")
    assert (len(adapters), adapters.bytes, adapters.loads) == (2, adapters.max_bytes, 3)
    assert editor.use_adapter(others / "full.safetensors").engine is full.engine
    save_adapter(like(shipped, 2, seed=5), others / "changed.safetensors")
    first = editor.use_adapter(others / "changed.safetensors").engine
    save_adapter(like(shipped, 4, seed=6), others / "changed.safetensors")
    assert editor.use_adapter(others / "changed.safetensors").engine is not first, "a changed file is read again"
    (others / "changed.safetensors").unlink()


@pytest.mark.parametrize("kind", ["st"], indirect=True)
def test_room_is_made_before_an_adapter_is_copied(engine: Path, others: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapters, pack, kept = SliderEditor.from_engine(engine).adapters, AdapterInputs.pack, []
    assert adapters is not None
    adapters.max_bytes = adapters.bytes

    def watched(layout: AdapterInputs, adapter: Adapter, device: torch.device) -> dict[str, Tensor]:
        kept.append(len(adapters))
        return pack(layout, adapter, device)

    monkeypatch.setattr(AdapterInputs, "pack", watched)
    with pytest.raises(SliderEditError, match="does not exist"):
        adapters.of(others / "missing.safetensors")
    assert len(adapters) == 1, "an adapter that cannot be read pushes no other out"
    adapters.of(others / "full.safetensors")
    assert (kept, len(adapters)) == ([0], 1)


def test_a_full_device_is_named(shipped: Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Tensor:
        raise torch.OutOfMemoryError

    layout = AdapterInputs.of_adapter(shipped)
    assert layout.bytes == sum(tensor.nbytes for tensor in layout.pack(shipped, torch.device("cpu")).values())
    monkeypatch.setattr(Tensor, "to", full)
    with pytest.raises(OutOfDeviceMemory, match=r"out of memory for the \d+ MiB of adapter .*--adapters-mib"):
        layout.pack(shipped, torch.device("cpu"))


@pytest.mark.parametrize("kind", ["st"], indirect=True)
def test_adapter_inputs_are_planned_with(engine: Path, editor: SliderEditor) -> None:
    footprint = engine_footprint(engine, read_manifest(engine), resolve_base("shapes-kontext"))
    assert editor.adapter is not None
    assert footprint.adapters == 2 * editor.adapter.bytes
    without, beside = (
        plan_memory(dataclasses.replace(footprint, adapters=size), RESERVED + 2**31) for size in (0, 2**31 - 2**20)
    )
    assert (without.fits, beside.fits, beside.adapters_gib) == (True, False, 2.0)
    assert beside.needed_gib == pytest.approx(without.needed_gib + 2, abs=0.02)


@pytest.mark.parametrize("kind", ["st"], indirect=True)
def test_the_adapters_of_a_server_are_planned_with(engine: Path, engines: dict[str, Path], others: Path) -> None:
    manifest, editor = read_manifest(engine), SliderEditor.from_engine(engine)
    own, adapters = editor.adapter, editor.adapters
    assert own is not None
    assert adapters is not None
    one, copies = adapters.bytes, [others / f"{number}.safetensors" for number in range(3)]
    for file in copies:
        shutil.copy(others / "full.safetensors", file)
    for limit, kept in ((0, 1), (one - 1, 1), (one, 1), (3 * one - 1, 2), (3 * one, 3)):
        # The editor holds the engine's own adapter for as long as it lives, and the buffers of the engine hold one more.
        assert adapters_size(manifest, limit) == (kept + 2) * one
        planned = engine_footprint(engine, manifest, resolve_base("shapes-kontext"), server=ServerParts(adapters=limit))
        assert planned.adapters == (kept + 2) * one
        adapters.max_bytes = limit
        held = [own, *[adapters.of(file) for file in copies][-kept:]]
        assert adapters.bytes == kept * one
        tensors = {id(tensor): tensor.nbytes for adapter in held for tensor in adapter.tensors}
        assert sum(tensors.values()) == (kept + 1) * one
    assert adapters_size(manifest) == 2 * one
    assert adapters_size(read_manifest(engines["st"]), 3 * one) == 0, "an engine that contains its adapter"


@pytest.mark.parametrize("kind", ["st"], indirect=True)
def test_the_strength_curve_comes_with_the_adapter(editor: SliderEditor, others: Path, scene: Image.Image) -> None:
    other = editor.use_adapter(others / "full.safetensors")
    prepared = other.prepare(scene, [RED])
    assert other.alphas(prepared, [[0.25]]).item() == 0.25
    assert editor.alphas(prepared, [[0.25]]).item() == pytest.approx(load_adapter("shapes-st").curve(0.25))


def poisoned(adapter: Adapter) -> Adapter:
    a, b = next(iter(adapter.pairs.values()))
    return dataclasses.replace(adapter, pairs={**adapter.pairs, next(iter(adapter.pairs)): (a.clone().fill_(torch.nan), b)})


def test_adapters_that_the_engine_cannot_run(editor: SliderEditor, shipped: Adapter, kind: str) -> None:
    name, (a, b) = next(iter(shipped.pairs.items()))
    other_kind: Kind = "gst" if kind == "st" else "st"
    wide = dataclasses.replace(shipped, pairs={name: (torch.zeros(4, 64), b[:, :4])}, rank=4)
    foreign = dataclasses.replace(shipped, pairs={"context_embedder": (a, b)})
    for adapter, message in (
        (like(shipped, MAX_RANK + 1), f"has rank {MAX_RANK + 1}, but the engine's adapter inputs take at most {MAX_RANK}"),
        (dataclasses.replace(shipped, kind=other_kind), f"is {other_kind}, but the engine's adapter inputs are for {kind}"),
        (wide, "use an adapter that was trained on this base"),
        (foreign, "updates context_embedder, which has no adapter input in the engine"),
        (poisoned(shipped), "values that are not finite in float32"),
        (bank_adapters([shipped, like(shipped, 2)], ["a", "b"]), "is a bank, but adapter inputs take one adapter at a time"),
    ):
        assert editor.adapters is not None
        loads = editor.adapters.loads
        with pytest.raises(SliderEditError, match=message):
            editor.use_adapter(adapter)
        assert editor.adapters.loads == loads


def test_a_loaded_adapter_is_checked_again_when_its_kind_changes(editor: SliderEditor, shipped: Adapter, kind: str) -> None:
    editor.use_adapter(shipped)
    other_kind: Kind = "gst" if kind == "st" else "st"
    with pytest.raises(SliderEditError, match=f"is {other_kind}, but the engine's adapter inputs are for {kind}"):
        editor.use_adapter(dataclasses.replace(shipped, kind=other_kind))


@pytest.mark.parametrize("kind", ["st"], indirect=True)
def test_without_an_adapter_nothing_is_read_or_encoded(editor: SliderEditor, tmp_path: Path) -> None:
    bare = copy.copy(editor)
    bare.adapter = None
    with pytest.raises(SliderEditError, match="takes its adapter as an input and has no default; choose one"):
        bare.prepare(tmp_path / "missing.png", [RED])


@pytest.mark.parametrize("kind", ["st"], indirect=True)
def test_an_engine_that_cannot_read_images_gets_the_same_message_with_adapter_inputs(
    engine: Path, editor: SliderEditor, shipped: Adapter, scene: Image.Image
) -> None:
    def steps_only(inputs: Any) -> Tensor:
        return torch.zeros(1)

    plain = copy.copy(editor)
    plain.engine = steps_only
    message = "a flux_kontext base reads its source images in a call of its own, which this engine does not have"
    with pytest.raises(SliderEditError, match=message):
        plain.read(editor.family.encode_sources(editor.pipeline, [scene]))
    with pytest.raises(SliderEditError, match=message):
        with_adapter(steps_only, read_manifest(engine), shipped).read({})


def test_engines_that_contain_their_adapter_take_no_other(st_editor: SliderEditor) -> None:
    with pytest.raises(SliderEditError, match="contains its adapter, so it cannot run another one"):
        st_editor.use_adapter("shapes-st")


def test_lowerings_that_would_rebuild_weights_are_refused() -> None:
    for backend, lowering in (("onnxruntime", "folded"), ("tensorrt", "plugin"), ("inductor", "folded")):
        with pytest.raises(SliderEditError, match=f"{lowering!r} cannot be combined with adapter inputs"):
            choose(lowering, "gst", get_backend(backend), separate="adapter inputs")
    assert choose("auto", "gst", get_backend("tensorrt"), separate="adapter inputs") == "native"


@pytest.mark.parametrize("kind", ["st"], indirect=True)
def test_verify_compares_the_engine_with_any_adapter(engine: Path, others: Path, scene: Image.Image) -> None:
    for adapter in (None, str(others / "small.safetensors")):
        assert verify_engine(engine, scene, [Slider(RED)], Origins(adapter=adapter), steps=1).passed


@pytest.mark.parametrize("kind", ["st"], indirect=True)
def test_commands_build_show_edit_and_replace(
    others: Path, scene: Image.Image, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, small = str(tmp_path / "engine"), str(others / "small.safetensors")
    assert main(["build", "--base", "shapes-kontext", "--adapter-inputs", "--max-rank", "18", "--out", out, "--quiet"]) == 0
    capsys.readouterr()
    assert main(["inspect", out]) == 0
    shown = capsys.readouterr().out
    assert "adapter    none" in shown
    assert "takes      any st adapter of rank 18 at most, for 12 linears" in shown
    scene.save(tmp_path / "scene.png")
    edit = ["edit", out, "--image", str(tmp_path / "scene.png"), "--slider", RED, "--steps", "1", "--quiet"]
    edit += ["--out", str(tmp_path / "out.png")]
    assert main(edit) == 2
    assert "takes its adapter as an input and has no default; choose one" in capsys.readouterr().err
    assert not (tmp_path / "out.png").exists()
    assert main([*edit, "--adapter", small]) == 0
    chosen = (tmp_path / "out.png").read_bytes()
    capsys.readouterr()
    monkeypatch.chdir(others)
    sweep = ["sweep", *edit[1:], "--slider", f"{RED}=0:1:2", "--steps", "2", "--slider-start", "0.5"]
    sweep.remove(RED)
    sweep.remove("--slider")
    for command, given, adapter, frozen in ((edit, "small.safetensors", small, 0), (sweep, "shapes-st", "shapes-st", 1)):
        assert main([*command, "--adapter", given, "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert (told["adapter"], told["frozen_steps"]) == (adapter, frozen)
    assert json.loads((tmp_path / "out.json").read_text())["adapter"] == "shapes-st"
    assert main(["verify", out]) == 2
    assert "has no default adapter; pass one" in capsys.readouterr().err
    assert main(["adapter", "replace", out, small]) == 0, "this is its default from now on"
    assert main(edit) == 0
    assert (tmp_path / "out.png").read_bytes() == chosen
    assert read_manifest(Path(out)).adapter == load_description(small)
    assert main(["export-triton", out, "--out", str(tmp_path / "models")]) == 2
    assert "takes its adapter as inputs" in capsys.readouterr().err


def load_description(path: str) -> dict[str, Any]:
    from slideredit_rt.export.build import describe_adapter

    return describe_adapter(load_adapter(path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-rank", "8"], "--max-rank and --kind describe adapter inputs; pass --adapter-inputs as well"),
        (["--adapter-inputs", "--max-rank", "0"], "can have a rank of 1 to 1024, got 0"),
        (["--adapter-inputs", "--adapter", "shapes-gst", "--kind", "st"], "is gst, but --kind is st; leave out --kind"),
        (
            ["--adapter-inputs", "--adapter", "shapes-st", "--max-rank", "2"],
            "take at most 2; build an engine with --max-rank 16",
        ),
        (["--adapter-inputs", "--lowering", "folded"], "'folded' cannot be combined with adapter inputs"),
    ],
)
def test_builds_that_are_refused(options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", "--base", "shapes-kontext", *options, "--out", str(tmp_path / "engine"), "--quiet"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "engine").exists()


@pytest.mark.parametrize("kind", ["st"], indirect=True)
def test_a_manifest_whose_inputs_contradict_its_layout(engine: Path, tmp_path: Path) -> None:
    data = json.loads((engine / "manifest.json").read_text())
    data["adapter_inputs"]["max_rank"] = 4
    (tmp_path / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(SliderEditError, match="inputs are not those that adapter_inputs describes"):
        read_manifest(tmp_path)
