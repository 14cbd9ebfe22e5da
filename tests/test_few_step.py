"""The few-step trainer: the base's own trajectory as the target, and a file that can be fused."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from qwen_checkpoint import random_image, save_tiny_checkpoint
from torch import Tensor

from slideredit_rt.adapters import Fused, load_adapter
from slideredit_rt.cli import main
from slideredit_rt.editor import SliderEditor
from slideredit_rt.errors import SliderEditError
from slideredit_rt.families import Family, family_of
from slideredit_rt.families.flux_kontext import FluxKontext
from slideredit_rt.modules import without_sliders
from slideredit_rt.shapes.adapter_recipes import ShapesData
from slideredit_rt.sliders import Slider
from slideredit_rt.training.data import FolderData
from slideredit_rt.training.few_step import FewStepConfig, FewStepTrainer
from slideredit_rt.training.trainer import to_pil

TINY = FewStepConfig(few_steps=2, substeps=2, rank=4, steps=2, batch=2, learning_rate=1e-3)
RED = "make the circle red"


class OneScene:
    """The same scene and instruction in every example."""

    def draw(self, rng: random.Random, batch: int) -> tuple[Tensor, list[list[str]]]:
        images, _ = ShapesData().draw(random.Random(0), 1)
        return images.expand(batch, -1, -1, -1), [[RED]] * batch


@pytest.fixture
def trainer(family: Family, pipeline: Any, tmp_path: Path) -> Any:
    def make(data: Any = None, **settings: Any) -> FewStepTrainer:
        config = dataclasses.replace(TINY, **settings)
        return FewStepTrainer(family, pipeline, data or ShapesData(), config, tmp_path / "turbo.safetensors")

    return make


@torch.no_grad()
def test_a_fresh_lora_makes_the_steps_of_the_base(trainer: Any) -> None:
    """B starts at zero, so the error is 0 where both take the same steps, and that of coarser steps where they do not."""
    assert trainer(substeps=1).loss(0).item() == pytest.approx(0, abs=1e-10)
    assert trainer(substeps=4).loss(0).item() > 1e-6


@torch.no_grad()
def test_the_target_is_an_edit_of_the_base(trainer: Any, family: Family, pipeline: Any) -> None:
    run = trainer(OneScene(), few_steps=4, substeps=1, batch=1)
    edits = run.edits(0)
    target = family.decode(pipeline, run.trajectory(edits)[-1], 64, 64)
    frozen = SliderEditor.from_pretrained("shapes-kontext", "shapes-st")
    prepared = frozen.prepare(to_pil(OneScene().draw(random.Random(0), 1)[0][0]), [RED])
    conditioning = dataclasses.replace(prepared.conditioning, latents=edits.noise)
    images = frozen.denoise(conditioning, frozen.frozen_inputs(prepared, 1), 4)
    # The editor gets the scene in 8 bits.
    torch.testing.assert_close(target, images, atol=0.01, rtol=0)


def test_substeps_refine_the_target_towards_the_trajectory(trainer: Any) -> None:
    edits = trainer(few_steps=1, batch=4).edits(0)
    ends = {n: trainer(few_steps=1, substeps=n, batch=4).trajectory(edits)[-1] for n in (1, 4, 16)}
    far, near = ((ends[n] - ends[16]).square().mean().item() for n in (1, 4))
    assert near < 0.25 * far


def test_training_brings_one_step_closer_to_many(trainer: Any) -> None:
    run = trainer(OneScene(), few_steps=1, substeps=4, steps=12, learning_rate=5e-3, schedule="cosine")
    with torch.no_grad():
        before = sum(run.loss(10_000 + i).item() for i in range(2))
    run.train(progress=False)
    with torch.no_grad():
        after = sum(run.loss(10_000 + i).item() for i in range(2))
    assert after < 0.8 * before, (after, before)


def test_each_step_is_learned_from_where_the_last_one_ended(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer()
    calls: list[tuple[Tensor, Tensor]] = []
    forward = type(run.own).forward

    def spy(module: Any, inputs: dict[str, Tensor]) -> Tensor:
        output: Tensor = forward(module, inputs)
        if without_sliders(inputs).keys() != inputs.keys():
            calls.append((inputs["hidden_states"][:, :64], output[:, :64].detach()))
        return output

    monkeypatch.setattr(type(run.own), "forward", spy)
    run.loss(0)
    (first, velocity), (second, _) = calls
    delta = run.edits(0).schedule.deltas[0]
    torch.testing.assert_close(second, first + delta * velocity)
    assert not second.requires_grad


def test_the_file_can_be_fused_and_gives_the_edit_of_the_trainer(trainer: Any, family: Family, tmp_path: Path) -> None:
    run = trainer(steps=4, learning_rate=1e-2)
    lora = run.train(progress=False)
    loaded = load_adapter(tmp_path / "turbo.safetensors", family)
    assert loaded.fingerprint == lora.fingerprint
    assert loaded.training["few_steps"] == 2
    # Every projection of 2 dual-stream blocks (12 each) and of 3 single-stream blocks (5 each).
    assert len(loaded.pairs) == 39
    assert loaded.curve(1.0) == 1.0
    scene = random_image()
    title, scales, images = run.strip(scene, [RED])
    assert (title, scales) == (f"{RED}, LoRA at", (0.0, 0.5, 1.0))
    for scale, image in zip(scales, images, strict=True):
        fuse = [Fused(tmp_path / "turbo.safetensors", scale)] if scale else []
        editor = SliderEditor.from_pretrained("shapes-kontext", "shapes-st", fuse=fuse)
        expected = editor.edit(scene, [Slider(RED)], prompt=RED, steps=2)
        assert max(abs(a - b) for a, b in zip(image.tobytes(), expected.tobytes(), strict=True)) <= 1
    assert images[0].tobytes() != images[2].tobytes()


def test_a_guided_base_is_distilled_into_a_single_pass(tmp_path: Path) -> None:
    base = save_tiny_checkpoint(tmp_path / "base")
    family, file = family_of(base), tmp_path / "image.png"
    random_image().save(file)
    pipeline = family.load_pipeline(base)
    data = FolderData([file], [RED, "add a hat"], family.side(pipeline))
    run = FewStepTrainer(family, pipeline, data, TINY, tmp_path / "lightning.safetensors")
    edits = run.edits(0)
    assert edits.negative is not None
    alone = dataclasses.replace(edits, negative=None)
    assert not torch.allclose(run.trajectory(edits)[-1], run.trajectory(alone)[-1])
    lora = run.train(progress=False)
    assert any(b.abs().sum() > 0 for _, b in lora.pairs.values())
    assert load_adapter(tmp_path / "lightning.safetensors", family).fingerprint == lora.fingerprint


@pytest.mark.parametrize(("scale", "unguided"), [(1.0, ""), (3.0, " --default-true-cfg-scale 1")])
def test_the_command_trains_and_says_how_to_use_the_file(
    scale: float, unguided: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guided base is distilled with its guidance, so an engine with the LoRA must not guide again."""
    monkeypatch.setattr(FluxKontext, "default_true_cfg_scale", lambda *_: scale)
    out = tmp_path / "turbo.safetensors"
    line = ["train", "few-step", "--steps", "2", "--batch", "2", "--few-steps", "3", "--substeps", "1", "--rank", "2"]
    assert main([*line, "--device", "cpu", "--quiet", "--out", str(out)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said == [f"wrote {out}", f"use it with build --fuse {out} --default-steps 3{unguided}"]
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_samples_show_the_lora_at_several_scales(trainer: Any, tmp_path: Path) -> None:
    trainer().train(progress=False, sample_every=2)
    assert Image.open(tmp_path / "turbo.safetensors.samples" / "step-000002.png").width > 3 * 64


@pytest.mark.parametrize("name", ["few_steps", "substeps", "rank"])
def test_counts_below_one_are_refused(name: str) -> None:
    with pytest.raises(SliderEditError, match=f"{name} is 0; pass at least 1"):
        dataclasses.replace(TINY, **{name: 0})  # type: ignore[arg-type]
