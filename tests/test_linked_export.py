"""Export without loading: initializers lie in the checkpoint's own files, results are eager's, adapters swap."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import errno
import gc
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from accelerate import init_empty_weights
from diffusers import FluxTransformer2DModel
from onnx.reference import ReferenceEvaluator
from safetensors import safe_open

from slideredit_rt.adapters import Adapter, load_adapter, save_adapter
from slideredit_rt.assets import resolve_base
from slideredit_rt.engines.backend import Lowering
from slideredit_rt.engines.manifest import ADAPTER_FILE, CONVERTED_FILE
from slideredit_rt.engines.tensorrt import TensorRT
from slideredit_rt.errors import SliderEditError
from slideredit_rt.export.linked_weights import (
    LinkedExport,
    WeightOptions,
    export_linked,
    replace_adapter,
)
from slideredit_rt.export.lowering import MaskedLoRA
from slideredit_rt.export.onnx_graph import example_inputs
from slideredit_rt.families import KINDS, Family, Kind
from slideredit_rt.modules import SliderBackbone

SEQUENCE_OPERATORS = {"SplitToSequence", "SequenceAt", "SequenceConstruct", "ConcatFromSequence", "SequenceLength"}
INDEX = "diffusion_pytorch_model.safetensors.index.json"


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> dict[torch.dtype, Path]:
    """The embedded base in several shards, in float32 and in bfloat16."""
    paths = {}
    for dtype in (torch.float32, torch.bfloat16):
        paths[dtype] = tmp_path_factory.mktemp("checkpoint")
        transformer = FluxTransformer2DModel.from_pretrained(resolve_base("shapes-kontext") / "transformer", torch_dtype=dtype)
        transformer.save_pretrained(paths[dtype] / "transformer", max_shard_size="2MB")
    return paths


@pytest.fixture(scope="module")
def two_blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with one block of each sort, which exports in a few seconds."""
    config = FluxTransformer2DModel.load_config(resolve_base("shapes-kontext") / "transformer")
    path = tmp_path_factory.mktemp("two-blocks")
    transformer = FluxTransformer2DModel.from_config(config, num_layers=1, num_single_layers=1)
    transformer.save_pretrained(path / "transformer", max_shard_size="1MB")
    return path


@pytest.fixture(scope="module")
def linked(
    sharded: dict[torch.dtype, Path], tmp_path_factory: pytest.TempPathFactory, family: Family, kind: str
) -> tuple[Path, LinkedExport]:
    folder = tmp_path_factory.mktemp(f"linked-{kind}")
    return folder, export_linked(family, sharded[torch.float32], load_adapter(f"shapes-{kind}", family), folder)


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """For gigabytes: gone after the test, where pytest keeps the folders of three runs."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def _graph(folder: Path) -> onnx.ModelProto:
    # onnx itself refuses data in files with several hard links.
    return onnx.load(folder / "model.onnx", load_external_data=False)


def _places(model: onnx.ModelProto) -> dict[str, dict[str, str]]:
    return {t.name: {e.key: e.value for e in t.external_data} for t in model.graph.initializer if t.external_data}


def _bytes_at(folder: Path, place: dict[str, str]) -> bytes:
    with (folder / place["location"]).open("rb") as file:
        file.seek(int(place["offset"]))
        return file.read(int(place["length"]))


def _run(folder: Path, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Weights stay where they are mapped: no transposed or packed copies, which keeps the full-width test small.
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {k: v.numpy() for k, v in inputs.items()})[0])


def _adapter_like(adapter: Adapter, scale: float, rank: int | None = None) -> Adapter:
    generator = torch.Generator().manual_seed(1)
    pairs = {
        name: (
            torch.randn(rank or len(a), a.shape[1], generator=generator) * scale,
            torch.randn(len(b), rank or b.shape[1], generator=generator) * scale,
        )
        for name, (a, b) in adapter.pairs.items()
    }
    return dataclasses.replace(adapter, pairs=pairs, rank=rank or adapter.rank, source="other-adapter")


def _adapter_for(family: Family, transformer: torch.nn.Module, kind: Kind, scale: float = 0.05) -> Adapter:
    """A random rank-16 adapter on the linears that adapters of this kind are trained on."""
    target = family.targets(kind)
    linears = {n: m for n, m in transformer.named_modules() if isinstance(m, torch.nn.Linear) and target.fullmatch(n)}
    generator = torch.Generator().manual_seed(2)
    pairs = {
        name: (
            torch.randn(16, m.in_features, generator=generator) * scale,
            torch.randn(m.out_features, 16, generator=generator) * scale,
        )
        for name, m in linears.items()
    }
    return Adapter(family.name, kind, 16, pairs, "random-adapter")


@torch.no_grad()
def test_linked_export_computes_what_the_copied_export_does(
    sharded: dict[torch.dtype, Path],
    linked: tuple[Path, LinkedExport],
    pipeline: Any,
    family: Family,
    kind: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "link", _no_hard_links)
    adapter = load_adapter(f"shapes-{kind}", family)
    copied = export_linked(family, sharded[torch.float32], adapter, tmp_path, WeightOptions(symbolic_links=False))
    assert copied.links == {}
    assert set(linked[1].links) <= set(copied.files), "the weights are files of its own"
    backbone = SliderBackbone(family, pipeline.transformer.eval(), adapter)
    for sizes in ((2, 24, 128, 2), (1, 7, 60, 1), (3, 31, 96, 5)):
        inputs = example_inputs(backbone, copied.config, *sizes)
        found = _run(linked[0], inputs)
        assert torch.equal(found, _run(tmp_path, inputs))
        assert (found - backbone(inputs)).abs().max() <= 1e-4


def test_initializers_point_into_the_shards_and_nothing_is_copied(
    sharded: dict[torch.dtype, Path], linked: tuple[Path, LinkedExport]
) -> None:
    (folder, result), source = linked, sharded[torch.float32] / "transformer"
    shards = sorted(p.name for p in source.glob("*.safetensors"))
    assert len(shards) > 1
    assert result.links == dict.fromkeys(shards, "hard")
    assert all((folder / name).samefile(source / name) for name in shards)
    assert sorted(p.name for p in folder.iterdir()) == sorted([*shards, *result.files])
    state = FluxTransformer2DModel.from_pretrained(source).state_dict()
    places = _places(_graph(folder))
    assert {f"transformer.{name}" for name in state} <= set(places)
    for name, tensor in state.items():
        place = places[f"transformer.{name}"]
        assert place["location"] in shards
        assert _bytes_at(folder, place) == tensor.contiguous().numpy().tobytes()
    # What remains inside the graph is small.
    inside = [t for t in _graph(folder).graph.initializer if not t.external_data]
    assert max(math.prod(t.dims) for t in inside) <= 1024
    assert result.bytes_written == sum((folder / name).stat().st_size for name in result.files)


def test_the_adapter_lies_in_a_file_of_its_own_that_loads_as_one(
    linked: tuple[Path, LinkedExport], family: Family, kind: str
) -> None:
    folder, _ = linked
    adapter, written = load_adapter(f"shapes-{kind}", family), load_adapter(folder / ADAPTER_FILE, family)
    assert (written.kind, written.rank, written.fingerprint) == (adapter.kind, adapter.rank, adapter.fingerprint)
    places = _places(_graph(folder))
    for name, pair in adapter.pairs.items():
        for part, tensor in zip("AB", pair, strict=True):
            place = places[f"transformer.{name}.lora_{part}"]
            assert place["location"] == ADAPTER_FILE
            assert _bytes_at(folder, place) == tensor.numpy().tobytes()


def test_no_sequence_operators_remain_and_each_linear_has_its_slider_node(
    linked: tuple[Path, LinkedExport], family: Family, kind: str
) -> None:
    model = _graph(linked[0])
    nodes = collections.Counter(node.op_type for node in model.graph.node)
    assert not SEQUENCE_OPERATORS & set(nodes)
    assert nodes["MaskedLoRA"] == len(load_adapter(f"shapes-{kind}", family).pairs)
    assert [(f.domain, f.name) for f in model.functions] == [("slideredit", "MaskedLoRA")]


@pytest.mark.parametrize("form", TensorRT.lowerings)
def test_a_bfloat16_checkpoint_stays_bfloat16_between_float32_inputs_and_output(
    sharded: dict[torch.dtype, Path], tmp_path: Path, family: Family, form: Lowering
) -> None:
    adapter = load_adapter("shapes-gst", family)
    result = export_linked(family, sharded[torch.bfloat16], adapter, tmp_path, lowering=form, target="sm90")
    assert (result.dtype, result.updates, result.notes) == ("bfloat16", {form: len(adapter.pairs)}, [])
    model = _graph(tmp_path)
    # Raises where the types of a node's inputs do not belong together.
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    types = {t.name: t.data_type for t in model.graph.initializer}
    types |= {v.name: v.type.tensor_type.elem_type for v in [*inferred.graph.value_info, *inferred.graph.input]}
    assert {types[name] for name in _places(model)} == {onnx.TensorProto.BFLOAT16}
    for node in model.graph.node:
        if node.op_type == "MaskedLoRALinear":
            assert [types[name] for name in node.input] == [onnx.TensorProto.BFLOAT16] * 5 + [onnx.TensorProto.FLOAT]
        if node.op_type in ("MatMul", "Gemm"):
            assert {types[name] for name in node.input} == {onnx.TensorProto.BFLOAT16}, node.name
        if node.op_type == "MaskedLoRA":
            assert [types[name] for name in node.input] == [onnx.TensorProto.BFLOAT16] * 4 + [onnx.TensorProto.FLOAT]
    boundary = [v for v in [*model.graph.input, *model.graph.output] if v.name != "token_mask"]
    assert {v.type.tensor_type.elem_type for v in boundary} == {onnx.TensorProto.FLOAT}


def test_the_bfloat16_update_errs_at_most_twice_as_much_as_the_same_expression_in_torch() -> None:
    generator = torch.Generator().manual_seed(3)
    y, x = torch.randn(2, 9, 40, generator=generator), torch.randn(2, 9, 64, generator=generator)
    a, b = torch.randn(16, 64, generator=generator) / 8, torch.randn(40, 16, generator=generator) / 4
    y, x, a, b = (t.bfloat16() for t in (y, x, a, b))
    scale = torch.rand(2, 9, generator=generator) * 3 - 1
    scale[:, ::3] = 0
    exact = y.double() + scale.double()[..., None] * (x.double() @ a.double().T @ b.double().T)
    torchs = y + ((x @ a.T).float() * scale[..., None]).bfloat16() @ b.T
    narrow = [t.float().numpy().astype(ml_dtypes.bfloat16) for t in (y, x, a, b)]
    names = dict(zip(MaskedLoRA.to_function_proto().input, [*narrow, scale[..., None].numpy()], strict=True))
    found = ReferenceEvaluator(MaskedLoRA.to_function_proto()).run(None, names, attributes={})[0]
    assert found.dtype == ml_dtypes.bfloat16
    ours = torch.from_numpy(np.asarray(found, dtype=np.float64))
    assert (ours - exact).norm() <= 2 * (torchs.double() - exact).norm()
    assert torch.equal(ours[scale == 0], y.double()[scale == 0])


@torch.no_grad()
def test_conversion_writes_a_file_of_its_own_and_links_nothing(
    sharded: dict[torch.dtype, Path], tmp_path: Path, family: Family
) -> None:
    adapter = load_adapter("shapes-st", family)
    result = export_linked(family, sharded[torch.bfloat16], adapter, tmp_path, WeightOptions(torch.float32))
    assert (result.dtype, result.links) == ("float32", {})
    assert CONVERTED_FILE in result.files
    transformer = FluxTransformer2DModel.from_pretrained(sharded[torch.bfloat16] / "transformer", torch_dtype=torch.float32)
    backbone = SliderBackbone(family, transformer, adapter)
    inputs = example_inputs(backbone, result.config, 2, 24, 128, 2)
    assert (_run(tmp_path, inputs) - backbone(inputs)).abs().max() <= 1e-4


@torch.no_grad()
@pytest.mark.parametrize("less", [0, 3])
def test_replacing_the_adapter_gives_the_other_adapters_results(
    sharded: dict[torch.dtype, Path], linked: tuple[Path, LinkedExport], family: Family, kind: str, less: int
) -> None:
    folder, result = linked
    first = load_adapter(f"shapes-{kind}", family)
    other = _adapter_like(first, 0.2, first.rank - less)
    graph = (folder / "model.onnx").read_bytes()
    transformer = FluxTransformer2DModel.from_pretrained(sharded[torch.float32] / "transformer")
    inputs = example_inputs(SliderBackbone(family, transformer, other), result.config, 2, 24, 128, 2)
    before = _run(folder, inputs)
    replace_adapter(folder, other)
    try:
        after = _run(folder, inputs)
        assert (after - SliderBackbone(family, transformer, other)(inputs)).abs().max() <= 1e-4 * after.abs().max()
        assert (after - before).abs().max() > 0.1
    finally:
        replace_adapter(folder, first)
    assert torch.equal(_run(folder, inputs), before)
    assert (folder / "model.onnx").read_bytes() == graph


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: _adapter_like(a, 0.1, rank=17), "a higher rank or another base"),
        (lambda a: dataclasses.replace(a, kind="gst" if a.kind == "st" else "st"), "export again for it"),
        (lambda a: dataclasses.replace(a, pairs=dict(list(a.pairs.items())[1:])), "which are not the same"),
    ],
)
def test_a_higher_rank_another_kind_or_set_of_modules_is_refused_and_the_file_stays(
    linked: tuple[Path, LinkedExport], family: Family, kind: str, change: Any, message: str
) -> None:
    before = (linked[0] / ADAPTER_FILE).read_bytes()
    with pytest.raises(SliderEditError, match=message):
        replace_adapter(linked[0], change(load_adapter(f"shapes-{kind}", family)))
    assert (linked[0] / ADAPTER_FILE).read_bytes() == before


def test_a_folder_without_an_adapter_file_has_none_to_replace(tmp_path: Path, family: Family) -> None:
    with pytest.raises(SliderEditError, match="no adapter to replace"):
        replace_adapter(tmp_path, load_adapter("shapes-st", family))


def test_float16_is_refused_with_the_reason(sharded: dict[torch.dtype, Path], tmp_path: Path, family: Family) -> None:
    with pytest.raises(SliderEditError, match="cannot run in float16: its activations exceed 65504"):
        export_linked(family, sharded[torch.bfloat16], None, tmp_path, WeightOptions(torch.float16))
    assert not list(tmp_path.iterdir())


def _no_hard_links(*_: Any) -> None:
    raise OSError(errno.EXDEV, "Invalid cross-device link")


def test_across_file_systems_the_link_is_symbolic_and_onnx_runtime_would_refuse_it(
    two_blocks: Path, tmp_path: Path, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", _no_hard_links)
    result = export_linked(family, two_blocks, None, tmp_path)
    assert set(result.links.values()) == {"symbolic"}
    assert all((tmp_path / name).readlink().samefile(tmp_path / name) for name in result.links)
    with pytest.raises(Exception, match="escapes model directory"):
        _run(tmp_path, {})


def test_a_folder_that_takes_neither_links_nor_copies_says_so(
    two_blocks: Path, tmp_path: Path, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "link", _no_hard_links)
    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(
        SliderEditError, match=r"cannot link or copy the weights .*No space left on device.*choose another folder"
    ):
        export_linked(family, two_blocks, None, tmp_path, WeightOptions(symbolic_links=False))


def test_a_folder_that_holds_the_link_already_is_refused(two_blocks: Path, tmp_path: Path, family: Family) -> None:
    taken = tmp_path / sorted((two_blocks / "transformer").glob("*.safetensors"))[0].name
    taken.write_bytes(b"mine")
    with pytest.raises(SliderEditError, match="export into an empty folder"):
        export_linked(family, two_blocks, None, tmp_path)
    assert taken.read_bytes() == b"mine"


def test_a_checkpoint_reached_through_links_is_linked_at_its_real_files(
    two_blocks: Path, tmp_path: Path, family: Family
) -> None:
    source, cache = two_blocks / "transformer", tmp_path / "cache"
    (cache / "transformer").mkdir(parents=True)
    for file in source.iterdir():
        (cache / "transformer" / file.name).symlink_to(file)
    (tmp_path / "engine").mkdir()
    result = export_linked(family, cache, None, tmp_path / "engine")
    assert set(result.links.values()) == {"hard"}
    assert not any((tmp_path / "engine" / name).is_symlink() for name in result.links)


def _truncate(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[0]
    os.truncate(shard, shard.stat().st_size - 8)


def _edit_index(folder: Path, change: Any) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def _rename_shard(folder: Path, name: str) -> None:
    first = sorted(folder.glob("*.safetensors"))[0]
    first.rename(folder / name)
    _edit_index(folder, lambda m: m.update({k: name for k, v in m.items() if v == first.name}))


def _edit_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, "is incomplete"),
        (lambda f: sorted(f.glob("*.safetensors"))[0].write_bytes(b"pickle"), "header does not fit"),
        (lambda f: sorted(f.glob("*.safetensors"))[0].unlink(), "No such file"),
        (lambda f: (f / INDEX).unlink(), "stored as safetensors"),
        (lambda f: (f / INDEX).write_text("[]"), "not an index of shards"),
        (lambda f: _edit_index(f, lambda m: m.update(extra="../elsewhere.safetensors")), "not a plain file name"),
        (lambda f: _rename_shard(f, ADAPTER_FILE), "like one of the engine's own files"),
        (lambda f: _edit_config(f, num_layers=9), "lacks the tensor transformer_blocks"),
        (lambda f: _edit_config(f, in_channels=48), "its configuration expects"),
        (lambda f: _edit_config(f, _class_name="DiffusionPipeline"), "is not a model"),
        (lambda f: (f / "config.json").unlink(), "No such file"),
    ],
)
def test_a_damaged_checkpoint_is_refused_before_anything_is_written(
    sharded: dict[torch.dtype, Path], tmp_path: Path, family: Family, damage: Any, message: str
) -> None:
    copy, out = tmp_path / "base" / "transformer", tmp_path / "engine"
    copy.mkdir(parents=True)
    out.mkdir()
    for file in (sharded[torch.float32] / "transformer").iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    damage(copy)
    with pytest.raises(SliderEditError, match=message):
        export_linked(family, tmp_path / "base", None, out)
    assert not list(out.iterdir())


def test_a_checkpoint_of_mixed_dtypes_needs_a_choice(sharded: dict[torch.dtype, Path], tmp_path: Path, family: Family) -> None:
    transformer = FluxTransformer2DModel.from_pretrained(sharded[torch.float32] / "transformer")
    transformer.proj_out.to(torch.bfloat16)
    transformer.save_pretrained(tmp_path / "base" / "transformer")
    (tmp_path / "engine").mkdir()
    with pytest.raises(SliderEditError, match="mixes bfloat16 and float32; choose one"):
        export_linked(family, tmp_path / "base", None, tmp_path / "engine")


@torch.no_grad()
def test_a_full_width_checkpoint_in_shards_runs_from_where_it_lies(scratch: Path, family: Family) -> None:
    with init_empty_weights():
        transformer = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True).eval()
    transformer.to_empty(device="cpu")
    torch.manual_seed(4)
    for parameter in transformer.parameters():
        parameter.uniform_(-0.03, 0.03)
    transformer.save_pretrained(scratch / "base" / "transformer", max_shard_size="600MB")
    cases = {}
    for kind in KINDS:
        adapter = _adapter_for(family, transformer, kind)
        backbone = SliderBackbone(family, transformer, adapter)
        inputs = example_inputs(backbone, transformer.config, 1, 16, 32, 2)
        adapted = backbone(inputs)
        backbone.remove()
        frozen = backbone({k: v for k, v in inputs.items() if k not in ("alpha", "token_mask")})
        cases[kind] = adapter, inputs, adapted, (adapted - frozen).abs().max()
    # The session maps as much again.
    del backbone, transformer
    gc.collect()
    for kind, (adapter, inputs, adapted, effect) in cases.items():
        folder = scratch / kind
        folder.mkdir()
        result = export_linked(family, scratch / "base", adapter, folder)
        assert len(result.links) > 2
        assert result.bytes_written < 0.02 * sum((folder / name).stat().st_size for name in result.links)
        error = (_run(folder, inputs) - adapted).abs().max()
        assert error <= 1e-4 * adapted.abs().max()
        assert error <= 1e-2 * effect


def sparse_checkpoint(folder: Path, transformer: Any, shards: int = 3) -> None:
    """A transformer on meta in bfloat16 as files of their full size: random values up to 4 MiB, holes beyond."""
    folder.mkdir(parents=True)
    transformer.save_config(folder)
    names = list(transformer.state_dict())
    generator, weight_map = torch.Generator().manual_seed(5), {}
    for shard in range(shards):
        file = f"diffusion_pytorch_model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        header: dict[str, Any] = {}
        end = 0
        part = names[shard * len(names) // shards : (shard + 1) * len(names) // shards]
        for name in part:
            shape = list(transformer.get_parameter(name).shape)
            start, end = end, end + 2 * math.prod(shape)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
            weight_map[name] = file
        raw = json.dumps(header).encode()
        with (folder / file).open("wb") as stream:
            stream.write(len(raw).to_bytes(8, "little") + raw)
            stream.truncate(8 + len(raw) + end)
            for name in part:
                start, end = header[name]["data_offsets"]
                if end - start <= 2**22:
                    stream.seek(8 + len(raw) + start)
                    stream.write(torch.randn((end - start) // 2, generator=generator).bfloat16().view(torch.uint8).numpy().data)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


FULL_SIZE = """
import json, resource, sys, time
from pathlib import Path
from slideredit_rt.adapters import load_adapter
from slideredit_rt.export.linked_weights import export_linked
from slideredit_rt.families import get_family
base, folder, lowering, family = Path(sys.argv[1]), Path(sys.argv[3]), sys.argv[4], get_family(sys.argv[5])
adapter, started, worked = load_adapter(sys.argv[2], family), time.perf_counter(), time.process_time()
result = export_linked(family, base, adapter, folder, lowering=lowering, target="sm90")
seconds, processor = time.perf_counter() - started, time.process_time() - worked
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
figures = {"seconds": seconds, "processor_seconds": processor, "peak_bytes": peak, "bytes_written": result.bytes_written}
print(json.dumps(figures | {"links": result.links, "updates": result.updates}))
"""


def export_apart(family: Family, base: Path, adapter: Adapter, folder: Path, form: Lowering) -> dict[str, Any]:
    """Export in a process of its own, whose peak memory is the export's; return its figures."""
    save_adapter(adapter, base.parent / "adapter.safetensors")
    folder.mkdir()
    places = map(str, (base, base.parent / "adapter.safetensors", folder))
    command = [sys.executable, "-c", FULL_SIZE, *places, form, family.name]
    run = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    figures: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return figures | {"linked_bytes": sum((folder / name).stat().st_size for name in figures["links"])}


@pytest.mark.slow
@pytest.mark.parametrize("form", TensorRT.lowerings)
def test_the_full_12b_transformer_exports_in_three_minutes_3_gb_and_200_mb(
    scratch: Path, family: Family, kind: Kind, form: Lowering, capsys: pytest.CaptureFixture[str]
) -> None:
    if shutil.disk_usage(scratch).free < 4 * 2**30:
        pytest.skip("needs 4 GiB of free disk")
    with init_empty_weights():
        transformer = FluxTransformer2DModel(guidance_embeds=True)
    sparse_checkpoint(scratch / "base" / "transformer", transformer)
    adapter = _adapter_for(family, transformer, kind)
    assert len(adapter.pairs) == {"st": 114, "gst": 342}[kind]
    folder = scratch / "engine"
    figures = export_apart(family, scratch / "base", adapter, folder, form)
    with capsys.disabled():
        print(  # noqa: T201
            f"\n{kind}, {form}: {figures['seconds']:.0f} s, peak {figures['peak_bytes'] / 1e9:.2f} GB, "
            f"written {figures['bytes_written'] / 1e6:.0f} MB, linked {figures['linked_bytes'] / 1e9:.1f} GB"
        )
    assert set(figures["links"].values()) == {"hard"}
    assert figures["linked_bytes"] > 23e9
    assert figures["seconds"] < 180
    assert figures["peak_bytes"] < 3e9
    assert figures["bytes_written"] < 200e6
    model = _graph(folder)
    nodes = collections.Counter(node.op_type for node in model.graph.node)
    slider_nodes = {"native": nodes["MaskedLoRA"], "plugin": nodes["MaskedLoRALinear"], "folded": 0}
    assert slider_nodes[form] == (0 if form == "folded" else len(adapter.pairs))
    assert not SEQUENCE_OPERATORS & set(nodes)
    places = _places(model)
    weight_map = json.loads((scratch / "base" / "transformer" / INDEX).read_text())["weight_map"]
    with contextlib.ExitStack() as stack:
        shards = {n: stack.enter_context(safe_open(folder / n, framework="pt")) for n in set(weight_map.values())}
        for name in [n for n in weight_map if n.endswith(("bias", "norm_q.weight"))]:
            place = places[f"transformer.{name}"]
            assert place["location"] == weight_map[name]
            stored = shards[weight_map[name]].get_tensor(name).view(torch.uint8)
            assert _bytes_at(folder, place) == stored.numpy().tobytes()
