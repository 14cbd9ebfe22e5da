"""The adapter trainer: the paper's loss, masks that must exist, resuming that changes nothing."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from slideredit_rt.adapters import load_adapter
from slideredit_rt.assets import resolve_base
from slideredit_rt.cli import main
from slideredit_rt.commands.training import default_sampling
from slideredit_rt.errors import SliderEditError
from slideredit_rt.families import Family
from slideredit_rt.shapes.adapter_recipes import ShapesData, adapter_recipe
from slideredit_rt.shapes.world import find_instruction
from slideredit_rt.strength import StrengthCurve
from slideredit_rt.training.data import FolderData
from slideredit_rt.training.suppression import SuppressionConfig, SuppressionTrainer

TINY = SuppressionConfig(kind="st", rank=4, steps=4, batch=4, learning_rate=1e-3)


@pytest.fixture
def trainer(family: Family, pipeline: Any, tmp_path: Path) -> Any:
    def make(config: SuppressionConfig = TINY, data: Any = None, name: str = "a.safetensors") -> SuppressionTrainer:
        return SuppressionTrainer(family, pipeline, data or ShapesData(), config, tmp_path / name)

    return make


def test_a_fresh_adapter_predicts_what_the_frozen_model_predicts(trainer: Any) -> None:
    """B starts at zero, so the first loss is the distance between the frozen predictions of the two prompts."""
    fixed = trainer(replace(TINY, alpha_sampling="fixed"))
    batch = fixed._batch(0)
    assert fixed.loss(0).item() > 0
    same = replace(batch, target=batch.full)
    fixed._batch = lambda step: same
    assert fixed.loss(0).item() == pytest.approx(0, abs=1e-10)


def test_uniform_alpha_moves_the_target_along(trainer: Any) -> None:
    """At the start the loss with α is α² of the loss at α = 1, example by example."""
    config = replace(TINY, batch=1)
    generator = torch.Generator().manual_seed(config.seed * 1_000_003)
    torch.rand(1, generator=generator)
    torch.randn((1, 64, 64), generator=generator)
    alpha = torch.rand(1, 1, generator=generator).item()
    uniform, fixed = trainer(config), trainer(replace(config, alpha_sampling="fixed"), name="b.safetensors")
    assert uniform.loss(0).item() == pytest.approx(alpha**2 * fixed.loss(0).item(), rel=1e-3)


def test_only_the_adapter_learns(trainer: Any, pipeline: Any, tmp_path: Path, family: Family) -> None:
    before = {n: p.clone() for n, p in pipeline.transformer.named_parameters()}
    adapter = trainer().train(progress=False)
    after = dict(pipeline.transformer.named_parameters())
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert any(b.abs().sum() > 0 for _, b in adapter.pairs.values())
    loaded = load_adapter(tmp_path / "a.safetensors", family)
    assert loaded.fingerprint == adapter.fingerprint
    assert loaded.training["alpha_sampling"] == "uniform"
    assert list(tmp_path.glob("*.state.pt")) == []


def test_training_lowers_the_loss(trainer: Any) -> None:
    run = trainer(replace(TINY, steps=60, batch=8, learning_rate=5e-3, schedule="cosine"))
    with torch.no_grad():
        before = sum(run.loss(10_000 + i).item() for i in range(4))
    run.train(progress=False)
    with torch.no_grad():
        after = sum(run.loss(10_000 + i).item() for i in range(4))
    assert after < 0.8 * before, (after, before)


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(trainer: Any, monkeypatch: Any) -> None:
    class Interrupted(Exception):
        pass

    def stop(self: SuppressionTrainer, step: int) -> None:
        raise Interrupted

    whole = trainer(name="whole.safetensors").train(progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(SuppressionTrainer, "sample", stop)
        cut = trainer(name="cut.safetensors")
        with pytest.raises(Interrupted):
            cut.train(progress=False, checkpoint_every=2, sample_every=2)
    resumed = trainer(name="cut.safetensors").train(progress=False)
    for name, (a, b) in whole.pairs.items():
        torch.testing.assert_close(resumed.pairs[name][0], a)
        torch.testing.assert_close(resumed.pairs[name][1], b)


def test_samples_are_drawn_on_the_way(trainer: Any, tmp_path: Path) -> None:
    trainer(replace(TINY, steps=2)).train(progress=False, sample_every=2)
    (strip,) = (tmp_path / "a.safetensors.samples").iterdir()
    assert strip.name == "step-000002.png"
    assert Image.open(strip).width > 6 * 64


def test_a_short_run_draws_no_samples_unless_it_is_told_to(tmp_path: Path) -> None:
    line = ["train", "adapter", "--kind", "st", "--steps", "2", "--batch", "2", "--quiet", "--device", "cpu"]
    assert main([*line, "--out", str(tmp_path / "short.safetensors")]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["short.safetensors"]
    assert main([*line, "--sample-every", "2", "--out", str(tmp_path / "told.safetensors")]) == 0
    assert (tmp_path / "told.safetensors.samples" / "step-000002.png").exists()


@pytest.mark.parametrize("steps", [20, 23, 100, 600])
def test_a_run_draws_four_samples(steps: int) -> None:
    assert steps // default_sampling(steps) == 4


def test_running_out_of_memory_names_the_options_that_help(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(SuppressionTrainer, "loss", full)
    line = ["train", "adapter", "--kind", "st", "--steps", "2", "--batch", "2", "--quiet"]
    assert main([*line, "--out", str(tmp_path / "a.safetensors")]) == 2
    assert "out of memory for this training; use --dtype bfloat16, --gradient-checkpointing" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_snapshots_are_the_adapter_as_it_was_then(trainer: Any, tmp_path: Path, family: Family) -> None:
    trainer().train(progress=False, snapshots=[2])
    # A constant learning rate: two steps of a longer run are a run of two steps.
    trainer(replace(TINY, steps=2), name="short.safetensors").train(progress=False)
    snapshot = load_adapter(tmp_path / "a-step-2.safetensors", family)
    assert snapshot.fingerprint == load_adapter(tmp_path / "short.safetensors", family).fingerprint
    with pytest.raises(SliderEditError, match="inside the run"):
        trainer().train(progress=False, snapshots=[4])


def test_a_bfloat16_base_and_gradient_checkpointing_train_too(family: Family, tmp_path: Path) -> None:
    half = family.load_pipeline(resolve_base("shapes-kontext"), dtype=torch.bfloat16)
    config = replace(TINY, steps=1, gradient_checkpointing=True)
    adapter = SuppressionTrainer(family, half, ShapesData(), config, tmp_path / "a.safetensors").train(progress=False)
    assert all(a.dtype == torch.float32 and b.abs().sum() > 0 for a, b in adapter.pairs.values())


def test_resuming_with_other_settings_is_refused(trainer: Any) -> None:
    run = trainer()
    run._save_state(2)
    with pytest.raises(SliderEditError, match="other settings"):
        trainer(replace(TINY, learning_rate=1.0)).train(progress=False)


def test_training_starts_from_a_trained_adapter(trainer: Any, tmp_path: Path, family: Family, pipeline: Any) -> None:
    """A run that hardly moves ends at the adapter that it started from, without its curve."""
    first = replace(trainer().train(progress=False), curve=StrengthCurve((0, 1), (1, 0.25)))
    still = replace(TINY, steps=1, learning_rate=1e-12)
    out = tmp_path / "b.safetensors"
    second = SuppressionTrainer(family, pipeline, ShapesData(), still, out, start=first).train(progress=False)
    for name, (a, b) in first.pairs.items():
        torch.testing.assert_close(second.pairs[name][0], a)
        torch.testing.assert_close(second.pairs[name][1], b)
    assert second.curve == StrengthCurve()
    assert load_adapter(out, family).training["started_from"] == "a.safetensors"


def test_a_run_that_started_elsewhere_is_not_resumed(trainer: Any, tmp_path: Path, family: Family, pipeline: Any) -> None:
    first = trainer().train(progress=False)
    trainer()._save_state(2)
    other = SuppressionTrainer(family, pipeline, ShapesData(), TINY, tmp_path / "a.safetensors", start=first)
    with pytest.raises(SliderEditError, match="unfinished run with other settings"):
        other.train(progress=False)
    other._save_state(2)
    assert other._resume() == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], None),
        (["--rank", "8"], "differs in transformer_blocks.0.attn.add_k_proj from what this run trains (rank 8"),
        (["--all-projections"], "differs in single_transformer_blocks.0.attn.to_k from what this run trains"),
        (["--kind", "gst"], "adapter 'shapes-st' is of kind st; start from a single gst adapter"),
        (["--world", "portraits"], "belongs to the world 'shapes', not to 'portraits'"),
    ],
)
def test_the_command_starts_from_an_adapter_that_fits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str | None
) -> None:
    line = ["train", "adapter", "--kind", "st", "--from", "shapes-st", "--steps", "1", "--batch", "2", "--quiet"]
    code = main([*line, "--device", "cpu", "--out", str(tmp_path / "a.safetensors"), *options])
    error = capsys.readouterr().err
    assert (code, bool(list(tmp_path.iterdir()))) == ((0, True) if message is None else (2, False)), error
    assert message is None or message in error


@pytest.mark.parametrize(("instruction", "message"), [("make the circle red " * 9, "is cut off"), ("  ", "empty instruction")])
def test_training_does_not_start_when_an_instruction_has_no_rows(trainer: Any, instruction: str, message: str) -> None:
    class Data:
        def draw(self, rng: random.Random, batch: int) -> tuple[torch.Tensor, list[list[str]]]:
            return torch.zeros(batch, 3, 64, 64), [[instruction]] * batch

    with pytest.raises(SliderEditError, match=message):
        trainer(data=Data())


def test_gst_covers_every_row_and_shows_the_neutral_prompt(trainer: Any, family: Family, pipeline: Any) -> None:
    run = trainer(replace(TINY, kind="gst", target="neutral"))
    batch = run._batch(0)
    assert batch.token_mask.all()
    assert batch.token_mask.shape == (4, 1, 24 + 2 * 64)
    neutral = family.encode_prompt(pipeline, [family.neutral_prompt] * 4, 24)
    assert torch.equal(batch.target["encoder_hidden_states"], neutral["encoder_hidden_states"])


def test_st_masks_only_the_suppressed_instructions(trainer: Any) -> None:
    run = trainer()
    assert run._rows(["make the circle red", "make the background dark"], {1}) == [5, 6, 7, 8]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": "nothing"}, "target is 'nothing'"),
        ({"alpha_sampling": "sometimes"}, "alpha_sampling"),
        ({"rank": 0}, "rank is 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(SliderEditError, match=message):
        replace(TINY, **change)


def test_gst_can_be_shown_a_part_of_the_prompt(trainer: Any) -> None:
    """PPS: every row is scaled, whichever instructions the frozen model was shown."""
    run = trainer(replace(TINY, kind="gst", target="remaining"))
    batch = run._batch(0)
    assert batch.token_mask.all()
    assert not torch.equal(batch.target["encoder_hidden_states"], batch.full["encoder_hidden_states"])


def test_shapes_data_draws_only_what_it_is_told() -> None:
    known = [find_instruction("make the circle red"), find_instruction("make the background dark")]
    _, prompts = ShapesData(known).draw(random.Random(0), 40)
    drawn = {text for instructions in prompts for text in instructions}
    assert drawn == {i.text for i in known}
    assert {len(p) for p in prompts} == {1, 2}
    with pytest.raises(SliderEditError, match="not an instruction of the shapes world"):
        find_instruction("make the triangle red")


def test_folder_of_images(tmp_path: Path) -> None:
    Image.new("RGB", (90, 70), (255, 0, 0)).save(tmp_path / "a.png")
    data = FolderData([tmp_path / "a.png"], ["make it blue", "add a hat"], 64)
    images, prompts = data.draw(random.Random(0), 3)
    assert images.shape == (3, 3, 64, 64)
    assert images[:, 0].min() == 1
    assert all(1 <= len(p) <= 2 for p in prompts)
    with pytest.raises(SliderEditError, match="needs images"):
        FolderData([], ["x"], 64)


@torch.no_grad()
def test_the_shipped_adapters_come_from_the_shipped_recipes(family: Family, kind: Any) -> None:
    adapter = load_adapter(f"shapes-{kind}", family)
    recipe = adapter_recipe(kind)
    # The shipped ones were trained before there was a choice of projections.
    assert adapter.training | {"all_projections": False} == recipe.__dict__
    assert any(b.any() for _, b in adapter.pairs.values())
