"""The ONNX Runtime engine: same numbers as eager torch, one session for every setting, checked inputs."""

from __future__ import annotations

import collections
import os
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from slideredit_rt.adapters import load_adapter
from slideredit_rt.assets import resolve_base
from slideredit_rt.editor import SliderEditor
from slideredit_rt.engines import open_engine
from slideredit_rt.engines.shapes import ShapeCache
from slideredit_rt.errors import SliderEditError
from slideredit_rt.export.onnx_graph import example_inputs
from slideredit_rt.families import Family
from slideredit_rt.files import sha256
from slideredit_rt.modules import SliderBackbone

SHAPES = [(1, 24, 128, 1), (3, 24, 128, 2), (5, 17, 96, 8), (2, 31, 60, 1)]


@pytest.fixture
def backbone(family: Family, pipeline: Any, kind: str) -> SliderBackbone:
    return SliderBackbone(family, pipeline.transformer.eval(), load_adapter(f"shapes-{kind}", family))


@torch.no_grad()
@pytest.mark.parametrize("alpha", [-0.5, 0.0, 0.5, 1.0])
def test_one_step_agrees_with_eager_within_1e_4(
    engines: dict[str, Path], backbone: SliderBackbone, kind: str, alpha: float
) -> None:
    manifest, engine = open_engine(engines[kind])
    inputs = example_inputs(backbone, manifest.config, 2, 24, 128, 1)
    inputs["alpha"].fill_(alpha)
    assert (engine(inputs) - backbone(inputs)).abs().max() <= 1e-4


@torch.no_grad()
@pytest.mark.parametrize(("batch", "text_rows", "image_rows", "sliders"), SHAPES)
def test_batch_rows_and_sliders_are_dynamic(
    engines: dict[str, Path], backbone: SliderBackbone, kind: str, batch: int, text_rows: int, image_rows: int, sliders: int
) -> None:
    manifest, engine = open_engine(engines[kind])
    inputs = example_inputs(backbone, manifest.config, batch, text_rows, image_rows, sliders, seed=batch)
    assert (engine(inputs) - backbone(inputs)).abs().max() <= 1e-4


def test_row_of_a_mixed_batch_equals_the_same_request_alone(
    engines: dict[str, Path], backbone: SliderBackbone, kind: str
) -> None:
    manifest, engine = open_engine(engines[kind])
    inputs = example_inputs(backbone, manifest.config, 4, 24, 128, 3)
    mixed = engine(inputs).clone()
    for row in range(4):
        alone = {k: v if k.endswith("_ids") else v[row : row + 1].contiguous() for k, v in inputs.items()}
        assert (mixed[row] - engine(alone)[0]).abs().max() <= 1e-5


def test_the_manifest_counts_what_became_of_every_adapted_linear(engines: dict[str, Path], kind: str) -> None:
    manifest, _ = open_engine(engines[kind])
    assert manifest.adapter is not None
    nodes = collections.Counter(n.op_type for n in onnx.load(engines[kind] / "model.onnx", load_external_data=False).graph.node)
    form = {"st": "native", "gst": "folded"}[kind]
    assert (manifest.lowering, manifest.updates) == (form, {form: manifest.adapter["modules"]})
    assert nodes["MaskedLoRA"] == manifest.updates.get("native", 0)
    assert nodes["MaskedLoRALinear"] == 0


def test_weights_of_the_base_are_linked_and_not_copied(engines: dict[str, Path], kind: str) -> None:
    manifest, _ = open_engine(engines[kind])
    source = resolve_base("shapes-kontext") / "transformer"
    for name, link in manifest.links.items():
        file = source / name
        assert link == {"sha256": sha256(file), "bytes": file.stat().st_size, "kind": "hard"}
    written = sum(file["bytes"] for name, file in manifest.files.items() if name not in os.listdir(source))
    assert written < sum(f.stat().st_size for f in source.glob("*.safetensors")) / 4


def test_a_step_reuses_its_output_and_binds_inputs_where_they_lie(
    engines: dict[str, Path], backbone: SliderBackbone, kind: str
) -> None:
    manifest, engine = open_engine(engines[kind])
    inputs = example_inputs(backbone, manifest.config, 2, 24, 128, 1)
    first = engine(inputs)
    before = first.clone()
    inputs["alpha"].add_(0.5)
    second = engine(inputs)
    assert second.data_ptr() == first.data_ptr()
    assert not torch.equal(before, second)


def test_output_is_written_whole(engines: dict[str, Path], backbone: SliderBackbone, kind: str) -> None:
    manifest, engine = open_engine(engines[kind])
    inputs = example_inputs(backbone, manifest.config, 2, 24, 128, 1)
    expected = engine(inputs).clone()
    engine(inputs).fill_(float("nan"))
    assert torch.equal(engine(inputs), expected)


def test_new_strengths_use_the_loaded_session(st_editor: SliderEditor, scene: Any) -> None:
    prepared = st_editor.prepare(scene, ["make the circle red"])
    session = st_editor.engine.session  # type: ignore[attr-defined]
    images = [st_editor.render_tensor(prepared, [[s]], steps=2) for s in (0.0, 1.0, 0.0)]
    assert st_editor.engine.session is session  # type: ignore[attr-defined]
    assert torch.equal(images[0], images[2])
    assert not torch.equal(images[0], images[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: i.pop("alpha"), "'alpha' is missing"),
        (lambda i: i.update(alpha=i["alpha"].double()), "must be contiguous float32"),
        (lambda i: i.update(token_mask=i["token_mask"][:, :, :3].contiguous()), "expected"),
        (lambda i: i.update(hidden_states=i["hidden_states"].transpose(0, 1)), "must be contiguous"),
        (lambda i: i.update(timestep=torch.rand(5)), "'timestep' has shape"),
    ],
)
def test_wrong_inputs_are_refused_before_the_backend_sees_them(
    engines: dict[str, Path], backbone: SliderBackbone, kind: str, change: Any, message: str
) -> None:
    manifest, engine = open_engine(engines[kind])
    inputs = example_inputs(backbone, manifest.config, 2, 24, 128, 1)
    change(inputs)
    with pytest.raises(SliderEditError, match=message):
        engine(inputs)


def test_limits_of_the_manifest_hold(engines: dict[str, Path], backbone: SliderBackbone, kind: str) -> None:
    manifest, engine = open_engine(engines[kind])
    for batch, sliders, axis in ((manifest.max_batch + 1, 1, "batch"), (1, manifest.max_sliders + 1, "sliders")):
        with pytest.raises(SliderEditError, match=f"built for 1 to .* in the axis '{axis}'"):
            engine(example_inputs(backbone, manifest.config, batch, 8, 8, sliders))


def test_shapes_that_were_not_used_for_longest_go_first() -> None:
    made: list[str] = []
    released: list[str] = []

    def use(key: str) -> str:
        def make() -> str:
            made.append(key)
            return key.upper()

        return cache.get(key, make)

    cache: ShapeCache[str] = ShapeCache(2, released.append)
    assert [use(key) for key in "abaca"] == ["A", "B", "A", "C", "A"]
    assert (made, released, len(cache)) == (["a", "b", "c"], ["B"], 2)
    with pytest.raises(ZeroDivisionError):
        cache.get("d", lambda: str(1 // 0))
    assert (released, len(cache)) == (["B", "C"], 1), "room is made first, and nothing is kept of what failed"
    cache.clear()
    assert (released, len(cache)) == (["B", "C", "A"], 0)
