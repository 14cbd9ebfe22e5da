"""The recipe of the portraits editor: batches on the device, stages that resume, budgets, and guidance by distillation."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn

from slideredit_rt.assets import resolve_base
from slideredit_rt.cli import main
from slideredit_rt.errors import SliderEditError
from slideredit_rt.families import get_family
from slideredit_rt.families.flux_kontext import FluxKontext
from slideredit_rt.portraits import editor_recipe as recipe_module
from slideredit_rt.portraits.adapter_recipes import BalancedPortraits, PortraitsData
from slideredit_rt.portraits.editor_recipe import SIZES, editor_recipe, evaluate_editor, guidance_losses, guided
from slideredit_rt.portraits.prompts import MOST, Prompts, some_prompts
from slideredit_rt.portraits.world import INSTRUCTIONS, draw_people, render, sample_instructions
from slideredit_rt.shapes.editor_recipe import editor_recipe as shapes_recipe
from slideredit_rt.training.checkpoint import load_checkpoint
from slideredit_rt.training.embedded import recipe as recipe_in_training
from slideredit_rt.training.embedded.flow import bfloat16_blocks
from slideredit_rt.training.embedded.loop import Budget, Loop, learning_rate
from slideredit_rt.training.embedded.pool import Pool
from slideredit_rt.training.embedded.recipe import EditorRecipe, finished_stages, train_editor, train_stages
from slideredit_rt.training.worlds import TRAINING

CPU = torch.device("cpu")
TINY = dataclasses.replace(SIZES, widths=(8, 8, 8, 8), heads=1, dual=1, single=1)
STAGES = ("autoencoder", "decoder", "editor", "guidance")


@pytest.fixture(autouse=True)
def small_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pools that are filled in no time."""
    monkeypatch.setattr(recipe_module, "_POOLED_BATCHES", 2)


def tiny(**changes: Any) -> EditorRecipe:
    """The recipe with a tiny model, two examples a step and an evaluation of one person in one step."""
    recipe = editor_recipe(TINY)
    stages = tuple(dataclasses.replace(stage, batch={"cpu": 2}) for stage in recipe.stages)
    evaluate: Any = lambda pipeline, _: evaluate_editor(pipeline, None, number=1, steps=1)  # noqa: E731
    return dataclasses.replace(recipe, stages=stages, evaluate=evaluate, **changes)


def weights(path: Path) -> dict[str, Tensor]:
    state = load_checkpoint(path)
    assert state is not None
    return {name: value for key in ("transformer", "t5") for name, value in state[key].items()}


def test_tokens_put_together_are_those_of_the_whole_prompts() -> None:
    pipeline = tiny().build()
    prompts, generator = Prompts(pipeline, CPU), torch.Generator().manual_seed(0)
    people = draw_people(100, generator)
    order = prompts.draw_order(sample_instructions(people, torch.arange(100) % 4, generator), generator)
    texts = [*(i.text for i in INSTRUCTIONS), "and", "", FluxKontext.neutral_prompt]
    whole = [" and ".join(texts[i] for i in row if texts[i]) for row in order.tolist()]
    assert {"", FluxKontext.neutral_prompt} < set(whole)
    assert {text.count(" and ") for text in whole} == set(range(MOST))
    for rows in (prompts.longest, prompts.longest + 6):
        wanted = pipeline.tokenizer_2(whole, padding="max_length", max_length=rows, return_tensors="pt").input_ids
        assert torch.equal(prompts.ids(order, rows), wanted)
    assert prompts.longest <= pipeline.tokenizer_2.model_max_length
    empty = pipeline.tokenizer_2([""], padding="max_length", max_length=20, return_tensors="pt").input_ids
    assert torch.equal(prompts.ids(prompts.nothing(1), 20), empty)


def test_pooled_vectors_are_those_of_prompts() -> None:
    pipeline = tiny().build()
    prompts = Prompts(pipeline, CPU)
    one = prompts.draw_pooled(1, torch.Generator().manual_seed(3))
    place = int((prompts.pooled - one).abs().sum(1).argmin())
    torch.testing.assert_close(one, pipeline._get_clip_prompt_embeds([some_prompts(1024)[place]]), atol=1e-5, rtol=1e-5)


def test_latents_are_centred_features_of_about_unit_size() -> None:
    people = recipe_module.varied_people(64, torch.Generator().manual_seed(5), CPU)
    images, latents = recipe_module.ideal_latents(CPU)(people)
    assert images.shape == (64, 3, 128, 128)
    assert latents.shape == (64, SIZES.channels, 16, 16)
    assert latents.std().item() == pytest.approx(1, abs=0.1)
    assert latents.mean(dim=(0, 2, 3)).abs().max() < 0.5
    # Flat colour varies more than fine detail, but no channel is negligible.
    spread = latents.std(dim=(0, 2, 3))
    assert spread.argmax() == 0
    assert spread.min() > 0.1


def test_drawings_for_the_autoencoder_are_used_several_times(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = Mock(side_effect=recipe_module.varied_people)
    monkeypatch.setattr(recipe_module, "varied_people", drawn)
    take = recipe_module._image_draw(CPU, 2)
    drawn.reset_mock()
    for step in range(16):
        images, latents = take(step, 3)
        assert (images.shape, latents.shape) == ((3, 3, 128, 128), (3, SIZES.channels, 16, 16))
    assert drawn.call_count == 3, "two batches at the start, another after eight steps"


def test_the_guidance_stage_gets_sources_as_the_autoencoder_encodes_them() -> None:
    pipeline, weight = tiny().build(), torch.ones(2)
    ideal = recipe_module._Edits(pipeline, CPU).draw(weight, torch.Generator().manual_seed(4))
    with torch.no_grad():
        source, target, order = recipe_module._Edits(pipeline, CPU, encode=True).draw(weight, torch.Generator().manual_seed(4))
        images = render(draw_people(2, torch.Generator().manual_seed(4)))
        encoded = pipeline.vae.encode(images * 2 - 1).latent_dist.mean
    torch.testing.assert_close(source, pipeline._pack_latents(encoded, *encoded.shape))
    assert torch.equal(target, ideal[1])
    assert torch.equal(order, ideal[2])


def test_guidance_stands_for_classifier_free_guidance() -> None:
    nothing, prompt = torch.zeros(3, 4, 2), torch.full((3, 4, 2), 2.0)
    weight = torch.tensor([1.0, 3.5, 5.0]) / FluxKontext.guidance_scale
    assert guided(nothing, prompt, weight)[:, 0, 0].tolist() == pytest.approx([2 / 3.5, 2.0, 10 / 3.5])


def test_at_the_default_guidance_the_teacher_teaches_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of one has no example of the first stage, so the loss is the distance to the teacher alone."""
    pipeline = tiny().build()
    assert guidance_losses(pipeline, CPU, 1)(0)[1].item() > 1e-6
    for name in ("_LEAST_GUIDANCE", "_MOST_GUIDANCE"):
        monkeypatch.setattr(recipe_module, name, FluxKontext.guidance_scale)
    assert guidance_losses(pipeline, CPU, 1)(0)[1].item() < 1e-10


def test_only_the_blocks_compute_in_bfloat16() -> None:
    """The noise level stays exact: the transformer multiplies it by 1000 and embeds it."""
    transformer = tiny().build().transformer
    seen: dict[str, torch.dtype] = {}
    transformer.time_text_embed.timestep_embedder.register_forward_hook(lambda _, given, __: seen.update(time=given[0].dtype))
    transformer.transformer_blocks[0].attn.to_q.register_forward_hook(lambda *call: seen.update(block=call[-1].dtype))
    inputs = {
        "hidden_states": torch.randn(1, 4, transformer.config.in_channels),
        "encoder_hidden_states": torch.randn(1, 3, transformer.config.joint_attention_dim),
        "pooled_projections": torch.randn(1, transformer.config.pooled_projection_dim),
        "timestep": torch.tensor([0.9]),
        "guidance": torch.tensor([3.5]),
        "img_ids": torch.zeros(4, 3),
        "txt_ids": torch.zeros(3, 3),
    }
    exact = transformer(**inputs).sample
    with bfloat16_blocks(transformer, CPU):
        rounded = transformer(**inputs).sample
    assert seen == {"time": torch.float32, "block": torch.bfloat16}
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).norm() / exact.norm() < 0.02
    assert torch.equal(transformer(**inputs).sample, exact)


def numbered(number: int) -> tuple[Tensor, Tensor]:
    return torch.full((2,), number), torch.full((2, 3), float(number))


def test_a_pool_holds_the_newest_batches() -> None:
    pool, generator = Pool(numbered, size=3, every=2), torch.Generator().manual_seed(0)
    for step, held in ((0, {0, 1, 2}), (1, {0, 1, 2}), (2, {1, 2, 3}), (7, {3, 4, 5})):
        names, values = pool.take(step, 200, generator)
        assert (set(names.tolist()), values.shape) == (held, (200, 3))
        assert torch.equal(values[:, 0], names.float())


def test_what_a_pool_gives_depends_on_the_step_alone() -> None:
    first, second = Pool(numbered, size=3, every=1), Pool(numbered, size=3, every=1)
    for step in range(5):
        passed = first.take(step, 8, torch.Generator().manual_seed(step))
    resumed = second.take(4, 8, torch.Generator().manual_seed(4))
    assert all(torch.equal(one, other) for one, other in zip(passed, resumed, strict=True))


def test_every_stage_trains_its_own_modules_and_the_result_is_written(tmp_path: Path) -> None:
    recipe, out = tiny(), tmp_path / "kontext"
    untrained = {name: p.clone() for name, p in recipe.build().transformer.named_parameters()}
    report = train_editor(
        recipe, out, recipe.plan(("autoencoder", "editor"), {"autoencoder": 1, "editor": 2}), CPU, progress=False
    )
    assert report["missing"] == ["decoder", "guidance"]
    assert not out.exists()
    report = train_editor(recipe, out, recipe.plan(("decoder", "guidance"), {"decoder": 1, "guidance": 1}), CPU, progress=False)
    assert report["missing"] == []
    assert {name: row["steps"] for name, row in report["stages"].items()} == dict(zip(STAGES, (1, 1, 2, 1), strict=True))
    assert report == json.loads((out / "evaluation.json").read_text())
    assert report["instructions=3"]["psnr"] > 0
    pipeline = get_family("flux_kontext").load_pipeline(out)
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    assert {p.dtype for part in parts.values() for p in part.parameters()} == {torch.float32}
    assert any(not torch.equal(p, untrained[name].bfloat16().float()) for name, p in parts["transformer"].named_parameters())
    sizes = {name: sum(file.stat().st_size for file in (out / name).glob("*.safetensors")) for name in parts}
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    assert all(sizes[name] < 2 * counts[name] + 40_000 for name in parts), "weights are stored in 16 bits"
    with pytest.raises(SliderEditError, match="exists already"):
        train_editor(recipe, out, recipe.plan(), CPU)


def test_training_starts_from_another_editor(tmp_path: Path) -> None:
    recipe = tiny()
    first, second = tmp_path / "first", tmp_path / "second"
    train_editor(recipe, first, recipe.plan((), dict.fromkeys(STAGES, 1)), CPU, progress=False)
    report = train_editor(recipe, second, recipe.plan(("decoder",), {"decoder": 1}), CPU, start=first, progress=False)
    assert (report["missing"], report["started_from"], list(report["stages"])) == ([], "first", ["decoder"])
    before, after = (get_family("flux_kontext").load_pipeline(folder) for folder in (first, second))
    for part in ("transformer", "text_encoder_2", "text_encoder"):
        theirs = getattr(after, part).state_dict()
        assert all(torch.equal(value, theirs[name]) for name, value in getattr(before, part).state_dict().items())
    encoder, decoder = after.vae.encoder.state_dict(), after.vae.decoder.state_dict()
    assert all(torch.equal(value, encoder[name]) for name, value in before.vae.encoder.state_dict().items())
    assert any(not torch.equal(value, decoder[name]) for name, value in before.vae.decoder.state_dict().items())


def test_the_command_starts_from_an_editor_by_name_or_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    def train(*_: Any, start: Path, **__: Any) -> dict[str, Any]:
        started.append(start)
        return {"stages": {}, "missing": ["editor"]}

    monkeypatch.setattr(recipe_in_training, "train_editor", train)
    for start in ("shapes-kontext", str(tmp_path)):
        assert main(["train", "editor", "--from", start, "--out", str(tmp_path / "new"), "--quiet"]) == 0
    assert started == [resolve_base("shapes-kontext"), tmp_path]


def test_an_editor_of_another_world_is_no_start(tmp_path: Path) -> None:
    with pytest.raises(SliderEditError, match=r"shapes-kontext' has other sizes .*; leave --from out"):
        train_stages(tiny(), tmp_path, {}, CPU, start=resolve_base("shapes-kontext"))


def test_the_weights_take_at_most_12_mb() -> None:
    pipeline = editor_recipe().build()
    parts = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    assert 2 * sum(p.numel() for part in parts for p in part.parameters()) <= 12_000_000


def test_a_stage_that_is_interrupted_ends_where_an_uninterrupted_one_does(tmp_path: Path) -> None:
    recipe, plan = tiny(), {"editor": Budget(steps=4)}
    train_stages(recipe, tmp_path / "whole", plan, CPU, progress=False)
    pipeline, stage = recipe.build(), recipe.stage("editor")
    losses, modules = stage.prepare(pipeline, CPU, 2), stage.modules(pipeline)

    def cut(step: int) -> Any:
        if step == 2:
            raise KeyboardInterrupt
        return losses(step)

    loop = Loop("editor", modules, stage.peak, tmp_path / "cut" / "editor.pt", average=True, save_every=0)
    with pytest.raises(KeyboardInterrupt):
        loop.train(cut, plan["editor"], progress=False)
    assert finished_stages(recipe, tmp_path / "cut") == {}
    train_stages(recipe, tmp_path / "cut", plan, CPU, progress=False)
    whole, resumed = weights(tmp_path / "whole" / "editor.pt"), weights(tmp_path / "cut" / "editor.pt")
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_the_error_shown_is_the_mean_over_the_steps_since_the_start(tmp_path: Path) -> None:
    """A resumed run has counted fewer steps at its first multiple of fifty."""
    line = Line()
    loop = Loop("line", {"line": line}, 1e-3, tmp_path / "line.pt")
    for steps in (30, 50):
        loop.train(lambda _: (line.weight.square().sum(), torch.tensor(2.0)), Budget(steps=steps), progress=False)
    assert loop.errors == [(50, 2.0)]


class Line(nn.Module):
    """A model of one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def losses(self, step: int) -> tuple[Tensor, Tensor]:
        error = (self.weight - 1).square().sum()
        return error, error


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[], float]:
    """A clock that moves half a second each time that it is read."""
    times = iter(range(100_000))

    def tick() -> float:
        return next(times) / 2

    monkeypatch.setattr("time.monotonic", tick)
    return tick


def test_a_budget_of_seconds_ends_the_stage_and_the_learning_rate_with_it(tmp_path: Path, clock: Callable[[], float]) -> None:
    model = Line()
    loop = Loop("line", {"line": model}, 1e-2, tmp_path / "line.pt", save_every=40)
    rates = []

    def losses(step: int) -> Any:
        rates.append(loop.optimizer.param_groups[0]["lr"])
        return model.losses(step)

    loop.train(losses, Budget(seconds=100), progress=False)
    assert (loop.step, loop.seconds, loop.finished) == (200, 100.0, True)
    assert max(rates) == pytest.approx(1e-2, rel=0.02)
    assert rates[-1] < 1e-4
    again = Loop("line", {"line": Line()}, 1e-2, tmp_path / "line.pt")
    again.train(losses, Budget(seconds=100), progress=False)
    assert (again.step, len(rates)) == (200, 200), "nothing was left of the budget"


def test_the_schedule_warms_up_and_falls_to_zero() -> None:
    rates = [learning_rate(step, step, 100, 1100, 1.0) for step in (0, 99, 100, 600, 1100)]
    assert rates == pytest.approx([0.01, 1.0, 1.0, 0.5, 0.0])


def test_the_average_replaces_the_weights_of_a_finished_stage(tmp_path: Path) -> None:
    model, plain = Line(), Line()
    Loop("a", {"line": model}, 1e-1, tmp_path / "a.pt", average=True).train(model.losses, Budget(steps=60), progress=False)
    Loop("b", {"line": plain}, 1e-1, tmp_path / "b.pt").train(plain.losses, Budget(steps=60), progress=False)
    assert 0 < model.weight.item() < plain.weight.item()
    again = Line()
    Loop("a", {"line": again}, 1e-1, tmp_path / "a.pt", average=True)
    assert torch.equal(again.weight, model.weight)


@pytest.mark.parametrize(
    ("given", "message"), [({}, "give one of the two"), ({"steps": 0}, "positive"), ({"seconds": -1.0}, "positive")]
)
def test_a_budget_that_makes_no_sense_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(SliderEditError, match=message):
        Budget(**given)


def test_minutes_are_divided_by_the_shares_of_the_stages() -> None:
    recipe = editor_recipe()
    plan = recipe.plan(minutes=6)
    assert sum(budget.total for budget in plan.values()) == pytest.approx(360)
    assert plan["editor"].total == max(budget.total for budget in plan.values())
    assert recipe.plan(("decoder",), minutes=2) == {"decoder": Budget(seconds=120)}
    assert recipe.plan(steps={"editor": 7})["editor"] == Budget(steps=7)
    with pytest.raises(SliderEditError, match="cannot be combined"):
        recipe.plan(steps={"editor": 7}, minutes=1)
    with pytest.raises(SliderEditError, match="'x' is not a stage of portraits-kontext; choose from autoencoder"):
        recipe.plan(("x",))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--stages", "guidance"], "needs 'autoencoder', which is not finished"),
        (["--steps", "editor"], "not a stage and its number of steps"),
        (["--minutes", "0"], "give a positive number"),
    ],
)
def test_a_command_that_cannot_train_says_why(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["train", "editor", "--world", "portraits", "--device", "cpu", "--quiet", "--out", str(tmp_path / "kontext")]
    try:
        code = main([*line, *options])
    except SystemExit as error:
        code = int(error.code or 0)
    assert code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_adapters_train_on_people_with_instructions() -> None:
    images, prompts = PortraitsData().draw(random.Random(1), 24)
    assert images.shape == (24, 3, 128, 128)
    assert {len(texts) for texts in prompts} == {1, 2, 3}
    again, _ = PortraitsData().draw(random.Random(1), 24)
    assert torch.equal(images, again)
    known = ["add a hat", "make the hair red"]
    _, prompts = PortraitsData(known).draw(random.Random(1), 40)
    assert len(prompts) == 40
    assert {text for texts in prompts for text in texts} == set(known)
    _, prompts = BalancedPortraits().draw(random.Random(2), len(INSTRUCTIONS))
    assert sorted(texts[0] for texts in prompts) == sorted(i.text for i in INSTRUCTIONS)


def test_every_world_has_recipes_for_its_instructions() -> None:
    for name, world in TRAINING.items():
        assert world.editor().name == f"{name}-kontext"
        assert world.concepts().attributes == world.offsets().attributes
        _, prompts = world.balanced(None, CPU).draw(random.Random(0), len(world.concepts().attributes))
        assert {texts[0] for texts in prompts} == set(world.concepts().attributes)
        assert {world.adapter(kind).kind for kind in ("st", "gst")} == {"st", "gst"}  # type: ignore[arg-type]


def test_the_shapes_recipe_trains_what_it_trained_before() -> None:
    """The tokenizers are the shipped ones, and the losses were recorded before the recipe shared its parts."""
    recipe = shapes_recipe()
    pipeline, shipped = recipe.build(), resolve_base("shapes-kontext")
    for name, tokenizer in (("tokenizer", pipeline.tokenizer), ("tokenizer_2", pipeline.tokenizer_2)):
        assert tokenizer.get_vocab() == type(tokenizer).from_pretrained(shipped / name).get_vocab()
    first = {stage.name: stage.prepare(pipeline, CPU, 8)(0)[0].item() for stage in recipe.stages if stage.name != "decoder"}
    assert first == {"autoencoder": pytest.approx(3.12316, rel=1e-3), "editor": pytest.approx(1.519, rel=1e-3)}
