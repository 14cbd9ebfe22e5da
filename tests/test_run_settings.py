"""Where an edit runs: device, dtype and offloading, and what is refused before anything large is loaded."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

from slideredit_rt import cli
from slideredit_rt.editor import SliderEditor
from slideredit_rt.engines.tensorrt import TensorRTRTX
from slideredit_rt.errors import SliderEditError
from slideredit_rt.serving.settings import ServeSettings
from slideredit_rt.settings import RunSettings, pick_device
from slideredit_rt.sliders import Slider

RED = [Slider("make the circle red", 0.5)]
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "CUDA", "cuda:-1", "", "cpu:0", "mps"])
def test_what_is_not_a_device_is_refused(device: str) -> None:
    with pytest.raises(SliderEditError, match="is not a device; give auto, cpu, cuda or cuda:N"):
        RunSettings(device)


def test_what_is_not_a_dtype_is_refused() -> None:
    with pytest.raises(SliderEditError, match="'float16' is not a dtype of encoders; give auto, float32, bfloat16"):
        RunSettings("cpu", "float16")  # type: ignore[arg-type]


def test_the_dtype_follows_the_device_unless_it_is_given() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert [RunSettings().choose_dtype(device) for device in (cpu, gpu)] == [torch.float32, torch.bfloat16]
    assert RunSettings(dtype="bfloat16").choose_dtype(cpu) == torch.bfloat16
    assert RunSettings(dtype="float32").choose_dtype(gpu) == torch.float32


def test_the_device_is_the_preferred_one_unless_it_is_given() -> None:
    assert RunSettings().choose_device() == torch.device("cpu")
    assert RunSettings("cpu").choose_device(torch.device("cuda")) == torch.device("cpu")


@without_gpu
@pytest.mark.parametrize("device", ["cuda", "cuda:3"])
def test_a_gpu_that_is_not_there_is_refused(device: str, engines: dict[str, Path]) -> None:
    with pytest.raises(SliderEditError, match=rf"device is {device}, but torch finds no CUDA GPU"):
        SliderEditor.from_engine(engines["st"], run=RunSettings(device))


def test_gpus_are_counted_from_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert RunSettings("cuda").choose_device() == torch.device("cuda", 1)
    assert RunSettings("cuda:0").choose_device() == torch.device("cuda", 0)
    with pytest.raises(SliderEditError, match="device is cuda:2, but this machine has 2 GPU"):
        RunSettings("cuda:2").choose_device()


def test_onnx_runtime_without_its_cuda_provider_names_the_package(
    engines: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stream:
        cuda_stream = 0

    class Card:
        def __init__(self, device: torch.device) -> None:
            self.device, self.own = device, Stream()

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr("slideredit_rt.engines.onnxruntime.CudaDevice", Card)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(SliderEditError, match="pip install onnxruntime-gpu in place of onnxruntime"):
        SliderEditor.from_engine(engines["st"], run=RunSettings("cuda"))


def test_tensorrt_engines_do_not_run_on_the_cpu(engines: dict[str, Path]) -> None:
    with pytest.raises(SliderEditError, match="TensorRT-RTX engines run on NVIDIA GPUs; leave out --device cpu"):
        TensorRTRTX().open(engines["st"], None, RunSettings("cpu"))  # type: ignore[arg-type]


def test_encoders_and_autoencoder_may_run_in_bfloat16(engines: dict[str, Path], scene: Image.Image) -> None:
    usual = SliderEditor.from_engine(engines["st"])
    half = SliderEditor.from_engine(engines["st"], run=RunSettings("cpu", "bfloat16"))
    assert usual.pipeline.vae.dtype == torch.float32
    assert {half.pipeline.vae.dtype, half.pipeline.text_encoder.dtype} == {torch.bfloat16}
    prepared = half.prepare(scene, RED)
    assert {t.dtype for t in (prepared.conditioning.latents, *prepared.conditioning.inputs.values())} == {torch.float32}
    noise = [editor.prepare(scene, RED, seed=3).conditioning.latents for editor in (usual, half)]
    assert noise[0].equal(noise[1]), "a seed gives the same noise in every dtype"
    edits = [np.asarray(editor.edit(scene, RED, steps=4)).astype(int) for editor in (usual, half)]
    difference = np.abs(edits[0] - edits[1])
    assert 0 < difference.mean() < 3


def test_offloaded_encoders_encode_the_same(engines: dict[str, Path], scene: Image.Image) -> None:
    usual, offloaded = SliderEditor.from_engine(engines["st"]), SliderEditor.from_engine(engines["st"])
    offloaded.family.place(offloaded.pipeline, torch.device("cpu"), offload="encoders")
    hooked = [
        name for name in ("text_encoder", "text_encoder_2", "vae") if hasattr(getattr(offloaded.pipeline, name), "_hf_hook")
    ]
    assert hooked == ["text_encoder", "text_encoder_2"]
    assert next(offloaded.pipeline.text_encoder_2.parameters()).is_meta, "its weights are kept aside between calls"
    assert offloaded.pipeline.vae.use_tiling
    edits = [np.asarray(editor.edit(scene, RED, steps=2)) for editor in (usual, offloaded)]
    assert np.array_equal(edits[0], edits[1])


def test_a_cpu_has_nothing_to_offload(engines: dict[str, Path]) -> None:
    with pytest.raises(SliderEditError, match="--offload encoders frees memory of a GPU, and this engine runs on the CPU"):
        SliderEditor.from_engine(engines["st"], run=RunSettings(offload="encoders"))


@without_gpu
def test_commands_refuse_a_missing_gpu(
    engines: dict[str, Path], scene: Image.Image, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image, out = tmp_path / "scene.png", tmp_path / "out.png"
    scene.save(image)
    line = ["--image", str(image), "--slider", "make the circle red=0.5", "--out", str(out), "--device", "cuda"]
    assert cli.main(["edit", str(engines["st"]), *line]) == 2
    assert "torch finds no CUDA GPU; use --device cpu" in capsys.readouterr().err
    assert cli.main(["verify", str(engines["st"]), "--device", "cuda:1"]) == 2
    assert cli.main(["evaluate", "--adapter", "shapes-st", "--out", str(tmp_path / "run"), "--device", "cuda"]) == 2
    assert not out.exists()


@without_gpu
@pytest.mark.parametrize(
    "line",
    [
        ["train", "adapter", "--kind", "st", "--base", "nowhere", "--out", "OUT", "--device"],
        ["train", "concepts", "--base", "nowhere", "--out", "OUT", "--device"],
        ["train", "offsets", "--base", "nowhere", "--out", "OUT", "--device"],
        ["evaluate", "--adapter", "nowhere", "--out", "OUT", "--device"],
        ["evaluate", "--adapter", "nowhere", "--images", "a", "--prompts", "b", "--out", "OUT", "--scorer-device"],
        ["adapter", "calibrate", "nowhere", "OUT", "--device"],
        ["adapter", "calibrate", "nowhere", "OUT", "--images", "a", "--prompts", "b", "--scorer-device"],
    ],
)
def test_training_and_scorers_take_the_same_words_and_refuse_before_loading(
    line: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word.replace("OUT", str(tmp_path / "out")) for word in line]
    assert cli.main([*words, "cuda:1"]) == 2
    assert f"the device is cuda:1, but torch finds no CUDA GPU; use {line[-1]} cpu" in capsys.readouterr().err
    assert cli.main([*words, "gpu"]) == 2
    assert "'gpu' is not a device; give auto, cpu, cuda or cuda:N" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_without_an_engine_auto_takes_the_gpu_if_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device() == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert pick_device("auto") == torch.device("cuda", 1)
    assert pick_device("cpu") == torch.device("cpu")


def test_a_server_takes_the_same_words() -> None:
    assert ServeSettings(device="cuda:1", dtype="float32").run(None) == RunSettings("cuda:1", "float32")
    assert ServeSettings.from_arguments({"device": "cpu"}).run(None) == RunSettings("cpu")
    with pytest.raises(SliderEditError, match="'tpu' is not a device"):
        ServeSettings(device="tpu")
    names = {field.name for field in dataclasses.fields(RunSettings)} - {"options"}
    assert names <= {field.name for field in dataclasses.fields(ServeSettings)}


def test_inspect_says_whether_an_engine_fits(engines: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    def inspect(*options: str) -> Any:
        assert cli.main(["inspect", str(engines["st"]), "--json", *options]) == 0
        return json.loads(capsys.readouterr().out)

    assert "memory" not in inspect()
    plan = inspect("--vram", "24")["memory"]
    keys = ("vram_gib", "weights_gib", "encoders_gib", "decoder_gib", "activations_gib", "offload", "max_batch", "fits")
    assert set(keys) <= plan.keys()
    assert (plan["vram_gib"], plan["offload"], plan["fits"], plan["max_batch"]) == (24, "none", True, 16)
    assert inspect("--vram", "1")["memory"]["fits"] is False
    assert cli.main(["inspect", str(engines["st"]), "--vram", "24"]) == 0
    assert "24 GiB: fits, batch 16 at most, with everything on the card" in capsys.readouterr().out


@pytest.mark.parametrize("size", ["0", "-4", "nan", "inf", "much", "99999"])
def test_a_size_that_no_card_has_is_refused(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        cli.main(["inspect", "engine", "--vram", size])
    assert refused.value.code == 2
    assert "is not the memory of a card in GiB; give a number such as 24" in capsys.readouterr().err
