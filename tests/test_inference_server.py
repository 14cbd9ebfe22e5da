"""A model repository says to Triton Inference Server what its models really take, and its models compute what engines do."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import onnxruntime
import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from google.protobuf import text_format
from qwen_checkpoint import save_tiny_checkpoint
from test_qwen import _adapter
from tritonclient.grpc import model_config_pb2

from slideredit_rt.adapters import save_adapter
from slideredit_rt.cli import main
from slideredit_rt.engines import open_engine, read_manifest
from slideredit_rt.engines.manifest import Manifest, describe_files, write_manifest
from slideredit_rt.engines.tensorrt import PLAN_FILE
from slideredit_rt.errors import SliderEditError
from slideredit_rt.export.build import build_engine
from slideredit_rt.export.inference_server import export_triton, give_batch_axis
from slideredit_rt.families import get_family
from slideredit_rt.settings import RunSettings

TYPES = {"tensor(float)": model_config_pb2.TYPE_FP32, "tensor(bool)": model_config_pb2.TYPE_BOOL}


@pytest.fixture(scope="module")
def qwen_engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GST on a base that marks its reference rows: every kind of input without a batch axis."""
    root, family = tmp_path_factory.mktemp("qwen"), get_family("qwen_image_edit")
    base = save_tiny_checkpoint(root / "base", plus=True, zero_cond_t=True)
    save_adapter(
        _adapter(family, "gst", QwenImageTransformer2DModel.from_pretrained(base / "transformer")), root / "gst.safetensors"
    )
    build_engine(base, root / "gst.safetensors", root / "engine", progress=False)
    return root / "engine"


@pytest.fixture(params=["st", "gst", "qwen"])
def engine(request: pytest.FixtureRequest) -> Path:
    if request.param == "qwen":
        return Path(request.getfixturevalue("qwen_engine"))
    return Path(request.getfixturevalue("engines")[request.param])


def parse(model: Path) -> Any:
    """By Triton's own schema: an unknown field or value is an error."""
    return text_format.Parse((model / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


def open_session(model: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(model / "1" / "model.onnx", providers=["CPUExecutionProvider"])


def requests_of(manifest: Manifest, count: int) -> list[dict[str, torch.Tensor]]:
    """Requests of equal shapes that agree in nothing: other sliders, other steps, other positions of as many rows."""
    family, requests = get_family(manifest.family), []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        inputs = family.random_inputs(manifest.config, 1, 11, 24, generator)
        rows = 11 if manifest.kind == "st" else 35
        inputs["alpha"] = torch.rand(1, 2, generator=generator) * 2 - 1
        inputs["token_mask"] = torch.rand(1, 2, rows, generator=generator) < 0.3
        for spec in manifest.inputs:
            if spec.shape[0] != "batch":
                order = torch.randperm(len(inputs[spec.name]), generator=generator)
                inputs[spec.name] = inputs[spec.name][order].contiguous()
        requests.append(inputs)
    return requests


def test_configuration_is_what_the_graph_takes(engine: Path, tmp_path: Path) -> None:
    export_triton(engine, tmp_path, name="backbone", max_queue_delay_us=250)
    config, session, manifest = parse(tmp_path / "backbone"), open_session(tmp_path / "backbone"), read_manifest(engine)
    assert (config.name, config.platform, config.max_batch_size) == ("backbone", "onnxruntime_onnx", manifest.max_batch)
    assert config.dynamic_batching.max_queue_delay_microseconds == 250
    for declared, real in ((config.input, session.get_inputs()), (config.output, session.get_outputs())):
        assert [tensor.name for tensor in declared] == [tensor.name for tensor in real]
        for tensor, graph in zip(declared, real, strict=True):
            assert tensor.data_type == TYPES[graph.type]
            # What Triton's ONNX Runtime backend refuses at loading: a first axis of fixed size, dims that are not the rest.
            assert isinstance(graph.shape[0], str)
            dims = list(tensor.reshape.shape) if tensor.HasField("reshape") else list(tensor.dims)
            assert dims == [-1 if isinstance(axis, str) else axis for axis in graph.shape[1:]]
            # What Triton refuses in a configuration.
            assert len(tensor.dims) >= 1
    assert [tensor.name for tensor in config.input] == [spec.name for spec in manifest.inputs]


def test_requests_that_share_a_batch_are_what_the_engine_makes_of_each_alone(engine: Path, tmp_path: Path) -> None:
    model = Path(export_triton(engine, tmp_path)["model"])
    manifest, alone = open_engine(engine, RunSettings(threads=1))
    requests = requests_of(manifest, 3)
    expected = torch.cat([alone(request).clone() for request in requests])
    # As Triton puts a batch together: along the first axis of what each request sent.
    batch = {
        spec.name: np.concatenate(
            [r[spec.name].numpy() if spec.shape[0] == "batch" else r[spec.name].numpy()[None] for r in requests]
        )
        for spec in manifest.inputs
    }
    (result,) = open_session(model).run(None, batch)
    assert np.abs(result - expected.numpy()).max() < 1e-5
    for spec in manifest.inputs:
        if spec.name in ("img_ids", "image_rotary_cos", "reference_rows"):  # so each request's own positions counted
            batch[spec.name] = np.repeat(batch[spec.name][:1], 3, axis=0)
            (same,) = open_session(model).run(None, batch)
            assert np.abs(same - expected.numpy())[1:].max() > 1e-3


def test_files_are_real_and_cost_no_space(engines: dict[str, Path], tmp_path: Path) -> None:
    result = export_triton(engines["st"], tmp_path, name="backbone")
    weights = tmp_path / "backbone" / "1" / "diffusion_pytorch_model.safetensors"
    assert not any(path.is_symlink() for path in tmp_path.rglob("*"))
    assert sorted(os.listdir(tmp_path)) == ["backbone"]
    assert result["files"] == [
        "1/adapter.safetensors",
        "1/diffusion_pytorch_model.safetensors",
        "1/model.onnx",
        "config.pbtxt",
    ]
    if engines["st"].stat().st_dev == tmp_path.stat().st_dev:
        assert weights.samefile(engines["st"] / weights.name)


def test_a_plan_takes_whole_batches(engines: dict[str, Path], tmp_path: Path) -> None:
    """Its graph cannot be given a batch axis for position ids any more. The plan's content plays no part."""
    folder = tmp_path / "engine"
    folder.mkdir()
    (folder / PLAN_FILE).write_bytes(b"a plan")
    manifest = read_manifest(engines["st"])
    write_manifest(
        dataclasses.replace(manifest, backend="tensorrt", files=describe_files(folder, [PLAN_FILE]), links={}), folder
    )
    export_triton(folder, tmp_path / "repository", max_queue_delay_us=250)
    model = tmp_path / "repository" / "slider_backbone"
    config = parse(model)
    assert (config.platform, config.max_batch_size) == ("tensorrt_plan", 0)
    assert not config.HasField("dynamic_batching")
    dims = {tensor.name: list(tensor.dims) for tensor in (*config.input, *config.output)}
    assert dims == {
        spec.name: [-1 if isinstance(axis, str) else axis for axis in spec.shape] for spec in manifest.inputs + manifest.outputs
    }
    assert (model / "1" / "model.plan").read_bytes() == b"a plan"


@pytest.mark.parametrize("backend", ["inductor", "tensorrt-rtx"])
def test_backends_that_triton_lacks_are_refused(backend: str, engines: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "engine"
    folder.mkdir()
    write_manifest(dataclasses.replace(read_manifest(engines["st"]), backend=backend, files={}, links={}), folder)
    with pytest.raises(SliderEditError, match=f"was built for {backend}, which Triton Inference Server cannot run"):
        export_triton(folder, tmp_path / "repository")
    assert not (tmp_path / "repository").exists()


def test_a_graph_that_mixes_positions_otherwise_is_refused() -> None:
    def value(name: str, shape: list[int | str]) -> onnx_ir.Value:
        return onnx_ir.Input(name, onnx_ir.Shape(shape), onnx_ir.TensorType(onnx_ir.DataType.FLOAT))

    ids, x = value("ids", ["rows", 3]), value("x", ["batch", 3])
    product = onnx_ir.node("Gemm", [x, ids], {"transB": 1})
    product.outputs[0].name, product.outputs[0].shape = "y", onnx_ir.Shape(["batch", "rows"])
    graph = onnx_ir.Graph([ids, x], product.outputs, nodes=[product], opset_imports={"": 20}, name="main")
    with pytest.raises(SliderEditError, match="uses ids in Gemm, which cannot take one value per request"):
        give_batch_axis(onnx_ir.Model(graph, ir_version=10), ["ids"])


def test_command(engines: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "repository")
    assert main(["export-triton", str(engines["st"]), "--out", out, "--max-queue-delay-us", "100", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["max_batch_size"] == 16
    assert main(["export-triton", str(engines["gst"]), "--out", out, "--name", "second"]) == 0
    assert sorted(os.listdir(out)) == ["second", "slider_backbone"]
    for options, sentence in (
        ([], "exists already"),
        (["--name", "a/b"], "is not a valid Triton model name"),
        (["--name", "other", "--max-queue-delay-us", "-1"], "pass 0 or more"),
    ):
        assert main(["export-triton", str(engines["st"]), "--out", out, *options]) == 2
        assert sentence in capsys.readouterr().err
