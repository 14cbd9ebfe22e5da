"""What `--offload` decides from a card's free memory, what it says, and what it refuses before anything large is loaded."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from PIL import Image
from test_memory import FLUX, GIB

from slideredit_rt import cli, memory, placement
from slideredit_rt.assets import resolve_base
from slideredit_rt.editor import SliderEditor
from slideredit_rt.engines import check_run
from slideredit_rt.engines.manifest import Manifest, read_manifest
from slideredit_rt.engines.tensorrt import RuntimeOptions
from slideredit_rt.errors import SliderEditError
from slideredit_rt.families.flux_kontext import FluxKontext
from slideredit_rt.memory import Footprint, ServerParts, engine_footprint
from slideredit_rt.notes import print_notes
from slideredit_rt.placement import Placement, choose_placement
from slideredit_rt.serving.run import make_app
from slideredit_rt.serving.settings import ServeSettings
from slideredit_rt.settings import RunSettings

GPU = torch.device("cuda", 0)
STILL = dataclasses.replace(FLUX, streams=False)


class Card:
    """A GPU as far as a decision sees it: its free memory, of 80 GiB."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.free = 80.0
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 9))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(self.free * GIB), 80 * GIB))


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    return Card(monkeypatch)


@pytest.fixture
def manifest(engines: dict[str, Path]) -> Manifest:
    """An engine in bfloat16, of TensorRT and with weight streaming, as far as its manifest says."""
    own = read_manifest(engines["st"])
    return dataclasses.replace(own, backend="tensorrt", dtype="bfloat16", weight_streaming=True)


def decide(
    monkeypatch: pytest.MonkeyPatch, manifest: Manifest, run: RunSettings, footprint: Footprint = FLUX, **options: Any
) -> Placement:
    monkeypatch.setattr(placement, "engine_footprint", lambda *args: footprint)
    return choose_placement(Path("engine"), manifest, Path("base"), run, GPU, **options)


@pytest.mark.parametrize(
    ("free", "offload", "line"),
    [
        (
            79.5,
            "none",
            "keeps everything on the GPU: with everything on it, an edit takes 35.3 GiB, and cuda:0 has 79.5 GiB free",
        ),
        (
            31.0,
            "encoders",
            "keeps the text encoders in host memory: with everything on it, an edit takes 35.3 GiB, and cuda:0 has",
        ),
        (16.0, "all", "keeps the text encoders and 9.1 of 22.2 GiB of weights in host memory: with everything on it, an edit"),
    ],
)
def test_auto_keeps_on_the_card_what_fits_and_says_why(
    card: Card,
    monkeypatch: pytest.MonkeyPatch,
    manifest: Manifest,
    capsys: pytest.CaptureFixture[str],
    free: float,
    offload: str,
    line: str,
) -> None:
    card.free = free
    print_notes()
    print_notes()
    found = decide(monkeypatch, manifest, RunSettings())
    assert found.plan is not None
    assert found.run.offload == found.plan.offload == offload
    error = capsys.readouterr().err
    assert error == f"slideredit-rt: {found.reason}\n", "one line, once"
    assert found.reason.startswith(f"--offload auto {line}")
    assert found.reason.endswith(f"batches of up to {found.plan.max_batch} fit")


def test_streaming_keeps_the_weights_of_the_plan(card: Card, monkeypatch: pytest.MonkeyPatch, manifest: Manifest) -> None:
    card.free = 16.0
    found = decide(monkeypatch, manifest, RunSettings(options=RuntimeOptions(cuda_graphs=False)))
    assert found.plan is not None
    budget = int(found.plan.weights_gib * GIB)
    assert found.run.options == RuntimeOptions(weight_budget=budget, cuda_graphs=False)
    # Beside them: what is reserved, the autoencoder, and the activations of a step.
    assert 16 * GIB - budget >= memory.RESERVED + FLUX.decoder + FLUX.step - 0.01 * GIB
    card.free = 79.5
    forced = decide(monkeypatch, manifest, RunSettings(offload="all"))
    assert (forced.run.offload, forced.run.options.weight_budget) == ("all", int(22.2 * GIB))


def test_an_explicit_weight_budget_wins(card: Card, monkeypatch: pytest.MonkeyPatch, manifest: Manifest) -> None:
    card.free = 16.0
    budgets: tuple[Any, ...] = (4 * GIB, "auto")
    for budget in budgets:
        run = RunSettings(options=RuntimeOptions(weight_budget=budget))
        found = decide(monkeypatch, manifest, run).run
        assert (found.offload, found.options) == ("encoders" if budget != "auto" else "all", run.options)
        forced = dataclasses.replace(run, offload="all")
        assert decide(monkeypatch, manifest, forced) == Placement(forced)
    with pytest.raises(SliderEditError, match="lower --weight-budget-mib"):
        decide(monkeypatch, manifest, RunSettings(options=RuntimeOptions(weight_budget=20 * GIB)))


def test_what_was_asked_for_is_not_questioned(card: Card, monkeypatch: pytest.MonkeyPatch, manifest: Manifest) -> None:
    card.free = 1.0
    for run in (RunSettings(offload="none"), RunSettings(offload="encoders")):
        assert decide(monkeypatch, manifest, run) == Placement(run)


@pytest.mark.parametrize(
    ("changes", "footprint", "run", "message"),
    [
        (
            {},
            FLUX,
            RunSettings(offload="all"),
            r"^1\.1 GiB are missing on cuda:0: an edit of one image takes 5\.1 GiB with the text encoders and 90% of the "
            r"weights in host memory, and 4\.0 GiB are free; free some of the 76\.0 GiB in use$",
        ),
        (
            {"weight_streaming": False},
            STILL,
            RunSettings(),
            r"21\.1 GiB are missing .* build with --weight-streaming, or free some",
        ),
        ({"backend": "inductor", "weight_streaming": False}, STILL, RunSettings(), "--backend tensorrt --weight-streaming"),
        ({"dtype": "float32"}, FLUX, RunSettings(), "; build with --dtype bfloat16, or free some"),
        (
            {"backend": "onnxruntime", "dtype": "float32"},
            FLUX,
            RunSettings(),
            "build with --dtype bfloat16 and --backend inductor or tensorrt, or",
        ),
        ({}, FLUX, RunSettings(dtype="float32"), "; leave out --dtype float32, or"),
    ],
)
def test_a_card_that_is_too_small_names_what_is_missing_and_what_helps(
    card: Card,
    monkeypatch: pytest.MonkeyPatch,
    manifest: Manifest,
    changes: dict[str, Any],
    footprint: Footprint,
    run: RunSettings,
    message: str,
) -> None:
    card.free = 4.0
    with pytest.raises(SliderEditError, match=message):
        decide(monkeypatch, dataclasses.replace(manifest, **changes), run, footprint)


def test_verification_plans_with_the_engine_alone(card: Card, monkeypatch: pytest.MonkeyPatch, manifest: Manifest) -> None:
    card.free = 26.0
    alone = decide(monkeypatch, manifest, RunSettings(), encoders=False)
    assert (alone.run.offload, decide(monkeypatch, manifest, RunSettings()).run.offload) == ("none", "encoders")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backend": "onnxruntime"}, "ONNX Runtime engines cannot stream weights from host memory, as --offload all asks"),
        ({"backend": "inductor"}, "Inductor engines cannot stream weights from host memory, as --offload all asks"),
        ({"weight_streaming": False}, "the engine was built without weight streaming.*build it again with --weight-streaming"),
    ],
)
def test_all_is_refused_where_weights_cannot_be_streamed(
    card: Card, monkeypatch: pytest.MonkeyPatch, manifest: Manifest, changes: dict[str, Any], message: str
) -> None:
    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: providers)
    monkeypatch.setattr("slideredit_rt.engines.tensorrt.TensorRT.check_environment", lambda *args: None)
    with pytest.raises(SliderEditError, match=message):
        check_run(Path("engine"), dataclasses.replace(manifest, **changes), RunSettings("cuda", offload="all"))


def test_a_weight_budget_needs_weight_streaming(card: Card, monkeypatch: pytest.MonkeyPatch, manifest: Manifest) -> None:
    monkeypatch.setattr("slideredit_rt.engines.tensorrt.TensorRT.check_environment", lambda *args: None)
    run = RunSettings(options=RuntimeOptions(weight_budget=3))
    assert check_run(Path("engine"), manifest, run) == GPU
    with pytest.raises(SliderEditError, match="leave out --offload all and --weight-budget-mib"):
        check_run(Path("engine"), dataclasses.replace(manifest, weight_streaming=False), run)


class Opened(Exception):
    """Something large would have been loaded."""


def test_the_editor_opens_and_places_as_decided(card: Card, engines: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    opened: list[RunSettings] = []
    placed: list[Any] = []

    def open_nothing(folder: Path, run: RunSettings, manifest: Manifest) -> Any:
        opened.append(run)
        return manifest, type("Engine", (), {"device": torch.device("cpu")})()

    def place(self: Any, pipeline: Any, device: torch.device, *, offload: str) -> None:
        placed.append(offload)

    monkeypatch.setattr("slideredit_rt.editor.open_engine", open_nothing)
    monkeypatch.setattr(FluxKontext, "place", place)
    footprint = engine_footprint(engines["st"], read_manifest(engines["st"]), resolve_base("shapes-kontext"))
    needed = footprint.weights + footprint.encoders + footprint.decoder + footprint.step + footprint.decode + memory.RESERVED
    for free, offload in ((needed, "none"), (needed - footprint.encoders // 2, "encoders")):
        card.free = free / GIB
        editor = SliderEditor.from_engine(engines["st"], run=RunSettings("cuda"))
        assert (editor.placement.run.offload, opened.pop().offload, placed.pop()) == (offload,) * 3
        assert f"--offload auto keeps {'everything' if offload == 'none' else 'the text encoders'}" in editor.placement.reason


def test_what_a_server_keeps_counts(
    card: Card, monkeypatch: pytest.MonkeyPatch, manifest: Manifest, engines: dict[str, Path]
) -> None:
    """The decision for the same card with and without a server's cache."""
    own, base = read_manifest(engines["st"]), resolve_base("shapes-kontext")
    own = dataclasses.replace(own, backend="tensorrt")
    footprint = engine_footprint(engines["st"], own, base)
    needed = footprint.weights + footprint.encoders + footprint.decoder + footprint.step + footprint.decode + memory.RESERVED
    server = ServerParts(cache=256 * 2**20)
    card.free = needed / GIB
    assert choose_placement(engines["st"], own, base, RunSettings(), GPU).run.offload == "none"
    with pytest.raises(SliderEditError) as refused:
        choose_placement(engines["st"], own, base, RunSettings(), GPU, server=server)
    assert "with 0.2 GiB of adapters, preview decoder and cache" in str(refused.value)
    assert "or lower --cache-mib" in str(refused.value)
    assert "--adapters-mib" not in str(refused.value), "the engine contains its adapter"
    card.free = (needed + server.cache) / GIB
    found = choose_placement(engines["st"], own, base, RunSettings(), GPU, server=server)
    assert found.run.offload == "none"
    assert "GiB with 0.2 GiB of adapters, preview decoder and cache, and cuda:0 has" in found.reason


def test_a_server_says_what_it_keeps(engines: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def opened(*arguments: Any) -> None:
        asked.append(arguments[3])
        raise Opened

    monkeypatch.setattr(SliderEditor, "from_engine", opened)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderTiny"}))
    chosen = {"adapters": tmp_path, "adapters_mib": 7, "preview_decoder": str(tmp_path), "cache_mib": 3}
    for options in ({}, {"adapters_mib": 7}, chosen):
        with pytest.raises(Opened):
            make_app(ServeSettings(engines["st"], **options), None)
    default = ServerParts(cache=256 * 2**20, caches_keys_values=True)
    assert asked == [default, default, ServerParts(7 * 2**20, tmp_path, 3 * 2**20)]


def test_inspect_counts_what_a_server_keeps(engines: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    line = ["inspect", str(engines["st"]), "--vram", "8", "--json"]

    def memory_of(*options: str) -> dict[str, Any]:
        assert cli.main([*line, *options]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)["memory"]
        return found

    alone, served = memory_of(), memory_of("--cache-mib", "2048")
    assert (alone["cache_gib"], served["cache_gib"]) == (0, 2)
    assert served["needed_gib"] == pytest.approx(alone["needed_gib"] + 2, abs=0.02)
    assert cli.main([*line[:-1], "--cache-mib", "2048"]) == 0
    assert "preview decoder 0, cache 2 GiB" in capsys.readouterr().out
    for options, message in (
        (["--vram", "8", "--adapters-mib", "4"], "contains its adapter; leave --adapters-mib out"),
        (["--cache-mib", "4"], "--cache-mib belongs to the estimate of --vram; pass --vram as well, or leave it out"),
    ):
        assert cli.main(["inspect", str(engines["st"]), *options]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main([*line, "--adapters-mib", "-1"])
    assert "'-1' is not a number of MiB" in capsys.readouterr().err


def test_on_a_cpu_there_is_nothing_to_decide(
    engines: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", None)
    monkeypatch.setattr(placement, "engine_footprint", None)
    print_notes()
    found = SliderEditor.from_engine(engines["st"]).placement
    assert (found.run.offload, found.plan, found.reason) == ("none", None, "")
    assert "offload" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("free", "options", "message"),
    [
        (1.0, [], "0.5 GiB are missing on cuda:0"),
        (80.0, ["--offload", "all"], "cannot stream weights from host memory, as --offload all asks"),
    ],
)
def test_a_command_refuses_before_anything_large_is_loaded(
    card: Card,
    engines: dict[str, Path],
    scene: Image.Image,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    free: float,
    options: list[str],
    message: str,
) -> None:
    def loads(*args: Any, **more: Any) -> None:
        raise Opened

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr("slideredit_rt.editor.open_engine", loads)
    monkeypatch.setattr("slideredit_rt.verify.open_engine", loads)
    monkeypatch.setattr("slideredit_rt.families.base.load_components", loads)
    card.free = free
    scene.save(tmp_path / "scene.png")
    line = ["--image", str(tmp_path / "scene.png"), "--slider", "make the circle red=0.5", "--device", "cuda", *options]
    assert cli.main(["edit", str(engines["st"]), *line, "--out", str(tmp_path / "out.png")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert cli.main(["verify", str(engines["st"]), "--device", "cuda", *options]) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scene.png"]


def test_activations_are_counted_once(engines: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    own, base = read_manifest(engines["st"]), resolve_base("shapes-kontext")
    first = engine_footprint(engines["st"], own, base)
    (kept,) = (tmp_path / "slideredit-rt" / "activations").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(memory, "live_peak", None)
        assert engine_footprint(engines["st"], own, base) == first
        with pytest.raises(TypeError):
            engine_footprint(engines["st"], dataclasses.replace(own, dtype="bfloat16"), base)
    with monkeypatch.context() as patch:
        patch.setattr(memory, "_decoding_pipeline", None)
        assert engine_footprint(engines["st"], own, base) == first, "nothing else is made for a base without keys and values"
    for damaged in ("", "{}", json.dumps(json.loads(kept.read_text()) | {"step": "much"})):
        kept.write_text(damaged)
        assert engine_footprint(engines["st"], own, base) == first
    wide = engine_footprint(engines["st"], own, base, torch.float32)
    assert (wide.encoders, wide.decoder) == (2 * first.encoders, 2 * first.decoder)
    assert wide.decode > first.decode
