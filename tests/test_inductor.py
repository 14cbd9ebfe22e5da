"""The Inductor engine: eager's numbers, no compilation for new strengths, other sliders or other masks.

What dynamo compiles and when does not depend on what compiles its graphs, so most tests let it run them as they are; those
that say so compile C++.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import weakref
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from torch._dynamo.utils import counters

from slideredit_rt import cli
from slideredit_rt.adapters import load_adapter
from slideredit_rt.assets import resolve_base
from slideredit_rt.checkpoint import meta_transformer
from slideredit_rt.engines import BuildSettings, inductor, open_engine
from slideredit_rt.engines.manifest import read_manifest
from slideredit_rt.errors import SliderEditError
from slideredit_rt.export.build import build_engine
from slideredit_rt.export.onnx_graph import example_inputs
from slideredit_rt.families import Family
from slideredit_rt.modules import SliderBackbone

SIZES = (2, 8, 16)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("inductor")
    for kind in ("st", "gst"):
        build_engine("shapes-kontext", f"shapes-{kind}", root / kind, BuildSettings("inductor"), progress=False)
    return {kind: root / kind for kind in ("st", "gst")}


def backbone(family: Family, kind: str, dtype: torch.dtype = torch.float32) -> SliderBackbone:
    transformer = family.load_pipeline(resolve_base("shapes-kontext"), dtype=dtype).transformer
    found = SliderBackbone(family, transformer, load_adapter(f"shapes-{kind}", family))
    return found.to(dtype).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def eager(family: Family) -> dict[str, SliderBackbone]:
    return {kind: backbone(family, kind) for kind in ("st", "gst")}


def compiled() -> int:
    return int(counters["stats"]["unique_graphs"])


@pytest.mark.usefixtures("as_traced")
def test_fifty_settings_compile_nothing(folders: dict[str, Path], eager: dict[str, SliderBackbone], kind: str) -> None:
    manifest, engine = open_engine(folders[kind])
    first = example_inputs(eager[kind], manifest.config, *SIZES, 3)
    address = engine(first).data_ptr()
    before = compiled()
    assert before > 0
    for seed in range(50):
        inputs = example_inputs(eager[kind], manifest.config, *SIZES, 1 + seed % manifest.max_sliders, seed=seed)
        if seed % 5 == 0:
            inputs["alpha"].zero_()
        if seed % 7 == 0:
            inputs["token_mask"][:, 0] = False
        if seed % 11 == 0:
            inputs["token_mask"].zero_()
        actual = engine(inputs)
        assert actual.data_ptr() == address
        if seed % 10 == 0:
            assert (actual - eager[kind](inputs)).abs().max() <= 1e-5
    assert compiled() == before
    assert not counters["graph_break"]


@pytest.mark.usefixtures("as_traced")
def test_another_shape_compiles_once_and_leaves_the_first_one_alone(
    folders: dict[str, Path], eager: dict[str, SliderBackbone]
) -> None:
    manifest, engine = open_engine(folders["st"])
    small, large = (example_inputs(eager["st"], manifest.config, batch, 8, 16, 2) for batch in (1, 3))
    kept = engine(small).clone()
    one = compiled()
    engine(large)
    two = compiled()
    assert two > one
    assert torch.equal(engine(small), kept)
    engine(large)
    assert compiled() == two


@pytest.mark.usefixtures("as_traced")
def test_filling_up_the_sliders_changes_no_bit(folders: dict[str, Path], eager: dict[str, SliderBackbone]) -> None:
    manifest, engine = open_engine(folders["st"])
    inputs = example_inputs(eager["st"], manifest.config, *SIZES, manifest.max_sliders)
    inputs["alpha"][:, 2:] = 0
    full = engine(inputs).clone()
    inputs |= {name: inputs[name][:, :2].contiguous() for name in ("alpha", "token_mask")}
    assert torch.equal(engine(inputs), full)
    assert torch.equal(full, eager["st"](inputs))


@pytest.mark.usefixtures("as_traced")
def test_alpha_zero_is_the_frozen_backbone(folders: dict[str, Path], eager: dict[str, SliderBackbone], kind: str) -> None:
    """Bit for bit with the operator; a folded projection sums the same products in another order."""
    manifest, engine = open_engine(folders[kind])
    inputs = example_inputs(eager[kind], manifest.config, *SIZES, 1)
    inputs["alpha"].zero_()
    plain = {name: value for name, value in inputs.items() if name not in ("alpha", "token_mask")}
    bound = {"operator": 0, "folded": 1e-5}[manifest.lowering]
    assert (engine(inputs) - eager[kind](plain)).abs().max() <= bound


@pytest.mark.usefixtures("as_traced")
def test_more_shapes_than_dynamo_keeps_by_default_still_run(
    folders: dict[str, Path], eager: dict[str, SliderBackbone], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inductor, "_MAX_BINDINGS", 3)
    manifest, engine = open_engine(folders["st"])
    with torch._dynamo.config.patch(recompile_limit=2):
        for text_rows in range(4, 8):
            inputs = example_inputs(eager["st"], manifest.config, 1, text_rows, 16, 1)
            assert (engine(inputs) - eager["st"](inputs)).abs().max() <= 1e-5
    assert len(engine._bindings) == 3  # type: ignore[attr-defined]


@pytest.mark.usefixtures("as_traced")
def test_limits_and_wrong_inputs_are_refused(folders: dict[str, Path], eager: dict[str, SliderBackbone]) -> None:
    manifest, engine = open_engine(folders["st"])
    with pytest.raises(SliderEditError, match="built for 1 to 8 in the axis 'sliders'"):
        engine(example_inputs(eager["st"], manifest.config, 1, 8, 8, manifest.max_sliders + 1))
    inputs = example_inputs(eager["st"], manifest.config, 1, 8, 8, 1)
    with pytest.raises(SliderEditError, match="must be contiguous float32"):
        engine(inputs | {"alpha": inputs["alpha"].double()})


@pytest.mark.usefixtures("as_traced")
def test_a_closed_engine_says_so_and_holds_no_weights(folders: dict[str, Path], eager: dict[str, SliderBackbone]) -> None:
    manifest, engine = open_engine(folders["st"])
    inputs = example_inputs(eager["st"], manifest.config, 1, 8, 8, 1)
    engine(inputs)
    weight = weakref.ref(engine._backbone.transformer.x_embedder.weight)  # type: ignore[attr-defined]
    engine.close()  # type: ignore[attr-defined]
    engine.close()  # type: ignore[attr-defined]
    gc.collect()
    assert weight() is None
    with pytest.raises(SliderEditError, match="is closed"):
        engine(inputs)


@pytest.mark.usefixtures("as_traced")
def test_bfloat16_converts_at_the_build_and_errs_as_eager_does(
    tmp_path: Path, family: Family, eager: dict[str, SliderBackbone]
) -> None:
    manifest = build_engine(
        "shapes-kontext", "shapes-st", tmp_path / "e", BuildSettings("inductor", dtype="bfloat16"), progress=False
    )
    assert (manifest.dtype, manifest.links, sorted(manifest.files)) == (
        "bfloat16",
        {},
        ["adapter.safetensors", "config.json", "converted.safetensors"],
    )
    _, engine = open_engine(tmp_path / "e")
    same = backbone(family, "st", torch.bfloat16)
    inputs = example_inputs(eager["st"], manifest.config, *SIZES, 2)
    actual, expected, exact = engine(inputs), same(inputs).float(), eager["st"](inputs)
    assert actual.dtype == torch.float32
    assert (actual - exact).norm() <= 1.1 * (expected - exact).norm()


@pytest.mark.usefixtures("as_traced")
def test_frozen_backbone_takes_no_sliders(tmp_path: Path, eager: dict[str, SliderBackbone]) -> None:
    manifest = build_engine("shapes-kontext", None, tmp_path / "e", BuildSettings("inductor"), progress=False)
    assert "alpha" not in {s.name for s in manifest.inputs}
    _, engine = open_engine(tmp_path / "e")
    inputs = example_inputs(eager["st"], manifest.config, 1, 8, 16, 1)
    plain = {s.name: inputs[s.name] for s in manifest.inputs}
    assert torch.equal(engine(plain), eager["st"](plain))


def test_engine_folder_links_the_checkpoint_and_names_torch(folders: dict[str, Path]) -> None:
    manifest = read_manifest(folders["gst"])
    assert (manifest.backend, manifest.backend_version, manifest.lowering) == ("inductor", version("torch"), "folded")
    assert manifest.updates == {"folded": manifest.adapter["modules"]}  # type: ignore[index]
    assert list(manifest.links) == ["diffusion_pytorch_model.safetensors"]
    assert sorted(manifest.files) == ["adapter.safetensors", "config.json"]


def test_a_lowering_for_graphs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SliderEditError, match="inductor does not support the lowering 'native'"):
        build_engine("shapes-kontext", "shapes-gst", tmp_path / "e", BuildSettings("inductor", "native"), progress=False)
    assert not list(tmp_path.iterdir())


def test_a_weight_that_no_file_holds_is_one_sentence(folders: dict[str, Path]) -> None:
    transformer = meta_transformer(folders["st"])
    with pytest.raises(SliderEditError, match=r"lack the weight context_embedder\.bias"):
        inductor.load_weights(transformer, [folders["st"] / "adapter.safetensors"], torch.device("cpu"))
    with pytest.raises(SliderEditError, match="cannot read the weights"):
        inductor.load_weights(transformer, [folders["st"] / "config.json"], torch.device("cpu"))


@pytest.mark.usefixtures("as_traced")
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), r"out of memory for the sizes .*smaller batch"),
        (
            torch._dynamo.exc.TorchDynamoException("no g++\nlong story"),
            r"cannot compile the engine on this machine \(no g\+\+\)",
        ),
    ],
)
def test_what_fails_in_the_first_call_is_one_sentence_and_can_be_tried_again(
    folders: dict[str, Path], eager: dict[str, SliderBackbone], monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    manifest, engine = open_engine(folders["st"])
    inputs = example_inputs(eager["st"], manifest.config, 1, 8, 8, 1)

    def fail(*_: Any) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(engine._backbone, "forward", fail)  # type: ignore[attr-defined]
        with pytest.raises(SliderEditError, match=message):
            engine(inputs)
    assert (engine(inputs) - eager["st"](inputs)).abs().max() <= 1e-5


@pytest.mark.usefixtures("as_traced")
def test_an_adapter_is_replaced_without_a_build(tmp_path: Path, eager: dict[str, SliderBackbone], capsys: Any) -> None:
    folder = tmp_path / "e"
    build_engine("shapes-kontext", "shapes-st", folder, BuildSettings("inductor"), progress=False)
    assert cli.main(["adapter", "replace", str(folder), "shapes-st", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["manifest"]["backend"] == "inductor"
    manifest, engine = open_engine(folder)
    inputs = example_inputs(eager["st"], manifest.config, 1, 8, 8, 1)
    assert (engine(inputs) - eager["st"](inputs)).abs().max() <= 1e-5


@pytest.mark.usefixtures("as_traced")
def test_sweep_and_inspect(folders: dict[str, Path], scene: Any, tmp_path: Path, capsys: Any) -> None:
    scene.save(tmp_path / "scene.png")
    slider = "make the circle red=0:1:3"
    out = ["--out", str(tmp_path / "strip.png"), "--steps", "2", "--quiet"]
    assert cli.main(["sweep", str(folders["st"]), "--image", str(tmp_path / "scene.png"), "--slider", slider, *out]) == 0
    assert (tmp_path / "strip.png").exists()
    capsys.readouterr()
    assert cli.main(["inspect", str(folders["st"])]) == 0
    assert "backend    inductor" in capsys.readouterr().out


def test_compiled_code_agrees_with_eager_and_fifty_settings_compile_nothing(
    folders: dict[str, Path], eager: dict[str, SliderBackbone]
) -> None:
    """Compiles C++, at the one shape."""
    manifest, engine = open_engine(folders["st"])
    engine(example_inputs(eager["st"], manifest.config, 1, 24, 128, 2))
    before = compiled()
    for seed in range(50):
        inputs = example_inputs(eager["st"], manifest.config, 1, 24, 128, 1 + seed % 4, seed=seed)
        actual = engine(inputs)
        if seed % 10 == 0:
            assert (actual - eager["st"](inputs)).abs().max() <= 1e-4
    assert compiled() == before


@pytest.mark.slow
def test_verify_passes_on_compiled_code(folders: dict[str, Path], kind: str) -> None:
    """Compiles C++ for the five batch sizes that a verification takes."""
    line = [sys.executable, "-m", "slideredit_rt.cli", "verify", str(folders[kind])]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed: max abs" in done.stdout
