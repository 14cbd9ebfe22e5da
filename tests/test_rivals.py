"""The trained rivals: what they learn from, each attribute by itself, and systems that start at the neutral edit."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from slideredit_rt.adapters import Adapter, load_adapter
from slideredit_rt.assets import resolve_adapter, resolve_base, resolve_offsets
from slideredit_rt.cli import main
from slideredit_rt.editor import SliderEditor
from slideredit_rt.errors import SliderEditError
from slideredit_rt.evaluation.dataset import Case
from slideredit_rt.evaluation.evaluate import run_evaluation
from slideredit_rt.evaluation.run import BenchmarkConfig
from slideredit_rt.evaluation.setup import Setup
from slideredit_rt.evaluation.systems import System
from slideredit_rt.evaluation.systems.attribute_offsets import OffsetControl
from slideredit_rt.evaluation.systems.concept_sliders import ConceptSliders
from slideredit_rt.evaluation.worlds import EVALUATION
from slideredit_rt.families import Family, get_family
from slideredit_rt.shapes.adapter_recipes import BalancedShapes
from slideredit_rt.shapes.measurer import measure, response
from slideredit_rt.shapes.world import find_instruction, held_out_examples, scene_image
from slideredit_rt.strength import StrengthCurve
from slideredit_rt.training.attribute_offsets import (
    AttributeOffsets,
    OffsetConfig,
    OffsetTrainer,
    add_offsets,
    load_offsets,
    save_offsets,
)
from slideredit_rt.training.concepts import ConceptConfig, ConceptTrainer, concept_target
from slideredit_rt.training.contrast import ContrastTrainer
from slideredit_rt.training.trainer import Trainer
from slideredit_rt.training.worlds import TRAINING

ATTRIBUTES = ("make the circle red", "make the square larger", "make the background dark")
KNOWN = [find_instruction(text) for text in ATTRIBUTES]
SHORT: dict[str, Any] = {"attributes": ATTRIBUTES, "steps": 4, "batch": 3}
CONCEPTS, OFFSETS = ConceptConfig(rank=2, **SHORT), OffsetConfig(**SHORT)
STEPS = 3


@pytest.fixture(params=["concepts", "offsets"])
def make(request: pytest.FixtureRequest, family: Family, pipeline: Any, tmp_path: Path) -> Any:
    trainer, config = {"concepts": (ConceptTrainer, CONCEPTS), "offsets": (OffsetTrainer, OFFSETS)}[request.param]

    def build(data: Any = None, name: str = "a.safetensors", **changes: Any) -> ContrastTrainer[Any]:
        made: ContrastTrainer[Any] = trainer(
            family, pipeline, data or BalancedShapes(KNOWN), replace(config, **changes), tmp_path / name
        )
        return made

    return build


class One:
    """The same attribute in every example."""

    def __init__(self, index: int) -> None:
        self.data = BalancedShapes([KNOWN[index]])

    def draw(self, rng: random.Random, batch: int) -> tuple[Tensor, list[list[str]]]:
        return self.data.draw(rng, batch)


def test_concept_target_goes_beyond_the_instruction_at_its_norm() -> None:
    g = torch.Generator().manual_seed(0)
    neutral, positive = torch.randn(3, 5, 4, generator=g), 2 * torch.randn(3, 5, 4, generator=g)
    target = concept_target(neutral, positive, 2.0)
    for i in range(3):
        direction = [n + 2 * (p - n) for n, p in zip(neutral[i].ravel().tolist(), positive[i].ravel().tolist(), strict=True)]
        size = sum(v * v for v in direction) ** 0.5
        wanted = sum(v * v for v in positive[i].ravel().tolist()) ** 0.5
        torch.testing.assert_close(target[i].ravel(), torch.tensor(direction) * (wanted / size))


def test_offsets_are_added_on_the_nouns_rows_and_add_up() -> None:
    embeddings, vectors = torch.randn(2, 6, 4), torch.randn(3, 4)
    moved = add_offsets(embeddings, [2, 4], torch.tensor([[0.5, 0.0, 0.0], [1.0, 0.0, -2.0]]), vectors)
    expected = embeddings.clone()
    for row in (2, 4):
        expected[0, row] += 0.5 * vectors[0]
        expected[1, row] += vectors[0] - 2 * vectors[2]
    torch.testing.assert_close(moved, expected)


def test_every_instruction_is_drawn_as_often_as_the_others() -> None:
    _, prompts = BalancedShapes(KNOWN).draw(random.Random(0), 9)
    assert sorted(text for (text,) in prompts) == sorted(3 * list(ATTRIBUTES))
    _, prompts = BalancedShapes(KNOWN).draw(random.Random(0), 2)
    assert len({text for (text,) in prompts}) == 2


@torch.no_grad()
def test_first_concept_loss_is_the_distance_of_the_frozen_prediction_from_its_target(
    family: Family, pipeline: Any, tmp_path: Path
) -> None:
    """Against the pipeline itself, prompt by prompt."""
    run = ConceptTrainer(family, pipeline, BalancedShapes(KNOWN), CONCEPTS, tmp_path / "a.safetensors")
    images, instructions = run.data.draw(random.Random("0/0"), 3)
    source, ids = family.encode_image(pipeline, images * 2 - 1)
    g = torch.Generator().manual_seed(0)
    sigma, noise = torch.rand(3, generator=g), torch.randn(source.shape, generator=g)
    noisy = source + sigma[:, None, None] * (noise - source)

    def velocity(prompts: list[str]) -> Tensor:
        text = family.encode_prompt(pipeline, prompts, 24)
        inputs = family.training_inputs(pipeline, noisy, source, ids, text, sigma)
        return family.run(pipeline.transformer, inputs)[:, : source.shape[1]]

    neutral, positive = velocity(["keep the image the same"] * 3), velocity([parts[0] for parts in instructions])
    far = neutral + 2 * (positive - neutral)
    target = far * (positive.flatten(1).norm(dim=1) / far.flatten(1).norm(dim=1))[:, None, None]
    assert run.loss(0).item() == pytest.approx((neutral - target).square().mean().item(), rel=1e-4)


@torch.no_grad()
def test_first_offset_loss_is_the_scale_times_the_step_to_the_instruction(
    family: Family, pipeline: Any, tmp_path: Path
) -> None:
    run = OffsetTrainer(family, pipeline, BalancedShapes(KNOWN), OFFSETS, tmp_path / "a.safetensors")
    batch = run.contrast(0)
    size = 0.1 + 4.9 * torch.rand(3, 1, generator=batch.noised.generator)
    expected = (size[:, :, None] * (batch.positive - batch.neutral)).square().mean()
    assert run.loss(0).item() == pytest.approx(expected.item(), rel=1e-4)


def test_offset_scales_reach_from_a_tenth_to_five_with_both_signs(family: Family, pipeline: Any, tmp_path: Path) -> None:
    run = OffsetTrainer(family, pipeline, BalancedShapes(KNOWN), replace(OFFSETS, batch=48), tmp_path / "a.safetensors")
    seen: list[Tensor] = []
    run.own.register_forward_hook(lambda module, args, output: seen.append(args[2]))
    with torch.no_grad():
        run.loss(0)
    scales = seen[0].sum(dim=1)
    assert ((scales.abs() >= 0.1) & (scales.abs() <= 5)).all()
    assert (scales > 1).any()
    assert (scales < -1).any()


def test_only_the_examples_own_attribute_gets_a_gradient(make: Any) -> None:
    run = make(One(1))
    run.loss(0).backward()
    found = {name: p.grad for name, p in run.own.named_parameters() if p.requires_grad}
    assert found
    for name, gradient in found.items():
        assert [bool(part.any()) for part in gradient.chunk(3)] == [False, True, False], name
    assert all(p.grad is None for name, p in run.own.named_parameters() if name not in found)


def test_training_moves_only_what_is_trained_and_lowers_the_loss(make: Any, pipeline: Any) -> None:
    before = {name: p.clone() for name, p in pipeline.transformer.named_parameters()}
    run = make(steps=30, learning_rate=5e-3)
    frozen = {name: p.clone() for name, p in run.own.named_parameters() if not p.requires_grad}
    with torch.no_grad():
        start = sum(run.loss(1000 + i).item() for i in range(3))
    run.train(progress=False)
    with torch.no_grad():
        end = sum(run.loss(1000 + i).item() for i in range(3))
    assert end < start
    after = dict(pipeline.transformer.named_parameters())
    assert all(torch.equal(p, after[name]) for name, p in before.items())
    assert all(torch.equal(p, dict(run.own.named_parameters())[name]) for name, p in frozen.items())


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(make: Any, monkeypatch: Any) -> None:
    class Interrupted(Exception):
        pass

    def stop(self: Any, step: int) -> None:
        raise Interrupted

    def values(run: Any) -> list[Tensor]:
        return [p.detach().clone() for p in run.own.parameters() if p.requires_grad]

    whole = make(name="whole.safetensors")
    whole.train(progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "sample", stop)
        with pytest.raises(Interrupted):
            make(name="cut.safetensors").train(progress=False, checkpoint_every=2, sample_every=2)
    resumed = make(name="cut.safetensors")
    resumed.train(progress=False)
    for a, b in zip(values(whole), values(resumed), strict=True):
        torch.testing.assert_close(a, b)


def test_samples_are_drawn_on_the_way(make: Any, tmp_path: Path) -> None:
    run = make(steps=1)
    run.train(progress=False, sample_every=1)
    assert (tmp_path / "a.safetensors.samples" / "step-000001.png").exists()


def test_concepts_become_a_bank_whose_alpha_is_the_strength(family: Family, pipeline: Any, tmp_path: Path) -> None:
    run = ConceptTrainer(family, pipeline, BalancedShapes(KNOWN), CONCEPTS, tmp_path / "a.safetensors")
    run.train(progress=False)
    bank = load_adapter(tmp_path / "a.safetensors", family)
    assert {name: m.curve for name, m in bank.members.items()} == dict.fromkeys(ATTRIBUTES, StrengthCurve((0, 1), (0, 1)))
    assert bank.kind == "gst"
    assert bank.training["eta"] == 2
    assert all(".attn." in name for name in bank.pairs)
    for _, b in bank.pairs.values():
        for basis in b.chunk(3, dim=1):
            torch.testing.assert_close(basis.T @ basis, torch.eye(2), atol=1e-5, rtol=0)


def test_offsets_come_back_from_their_file(tmp_path: Path, family: Family) -> None:
    offsets = AttributeOffsets(family.name, "image", ATTRIBUTES, torch.randn(3, 128), {"steps": 3})
    save_offsets(offsets, tmp_path / "a.safetensors")
    read = load_offsets(tmp_path / "a.safetensors", family)
    assert torch.equal(read.vectors, offsets.vectors)
    assert dataclasses.replace(read, vectors=offsets.vectors) == offsets
    with pytest.raises(SliderEditError, match="were trained for flux_kontext, not for qwen_image_edit"):
        load_offsets(tmp_path / "a.safetensors", get_family("qwen_image_edit"))
    save_offsets(replace(offsets, vectors=torch.full((3, 128), float("nan"))), tmp_path / "nan.safetensors")
    save_file({"vectors": torch.zeros(2, 2)}, tmp_path / "bare.safetensors")
    (tmp_path / "torch.pt").write_bytes(b"not a safetensors file")
    for name in ("nan.safetensors", "bare.safetensors", "torch.pt", "missing"):
        with pytest.raises(SliderEditError, match="does not contain attribute offsets"):
            load_offsets(tmp_path / name, family)


# ------------------------------------------------------------------------------------------------ systems


@pytest.fixture(scope="module")
def case() -> Case:
    (example,) = held_out_examples(1, 1, seed=3, known=KNOWN[:1])
    return Case("one", scene_image(example), ATTRIBUTES[0], ATTRIBUTES[:1], seed=0)


@pytest.fixture(scope="module")
def both(case: Case) -> Case:
    return replace(case, prompt=f"{ATTRIBUTES[0]} and {ATTRIBUTES[2]}", instructions=(ATTRIBUTES[0], ATTRIBUTES[2]))


@pytest.fixture(scope="module")
def bank(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    """Random concepts: what a system does with them does not depend on what they were trained for."""
    pipeline = family.load_pipeline(resolve_base("shapes-kontext"))
    out = tmp_path_factory.mktemp("concepts") / "a.safetensors"
    adapter = ConceptTrainer(family, pipeline, BalancedShapes(KNOWN), CONCEPTS, out).result()
    g = torch.Generator().manual_seed(0)
    pairs = {name: (0.05 * torch.randn(a.shape, generator=g), b) for name, (a, b) in adapter.pairs.items()}
    return replace(adapter, pairs=pairs)


@pytest.fixture(scope="module")
def offsets(family: Family) -> AttributeOffsets:
    vectors = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
    return AttributeOffsets(family.name, "image", ATTRIBUTES, vectors)


@pytest.fixture(scope="module")
def neutral(case: Case) -> Tensor:
    editor = SliderEditor.from_pretrained("shapes-kontext", "shapes-gst")
    prompt = editor.family.neutral_prompt
    return editor.render_tensor(editor.prepare(case.image, ["image"], prompt=prompt, seed=0), [[1.0]], steps=STEPS)


@pytest.fixture(scope="module", params=["concepts", "offsets-st", "offsets-bank"])
def system(request: pytest.FixtureRequest, bank: Adapter, offsets: AttributeOffsets) -> Any:
    if request.param == "concepts":
        return ConceptSliders(SliderEditor.from_pretrained("shapes-kontext", bank))
    shared = "shapes-st" if request.param == "offsets-st" else bank
    return OffsetControl(SliderEditor.from_pretrained("shapes-kontext", shared, max_batch=2), offsets)


def test_setting_zero_is_the_neutral_edit(system: Any, case: Case, neutral: Tensor) -> None:
    prepared = system.prepare(case)
    # One by one: the vendor's products of another batch may differ in the last bit.
    images = [system.render(prepared, [[value]], STEPS) for value in (0.0, 1.0, 2.0)]
    assert torch.equal(images[0], neutral)
    assert (images[1] - images[0]).abs().max() > 1e-3
    assert (images[2] - images[1]).abs().max() > 1e-3


def test_each_knob_moves_its_own_attribute(system: Any, case: Case, both: Case) -> None:
    prepared = system.prepare(both)
    images = system.render(prepared, [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], STEPS)
    alone = [system.render(system.prepare(replace(case, instructions=(name,))), [[1.0]], STEPS) for name in both.instructions]
    for together, one in zip(images[:2], alone, strict=True):
        torch.testing.assert_close(together, one[0], atol=1e-4, rtol=0)
    assert all((images[2] - other).abs().max() > 1e-3 for other in images[:2])


def test_the_base_model_makes_the_first_steps_of_a_concept_slider(bank: Adapter, case: Case) -> None:
    editor = SliderEditor.from_pretrained("shapes-kontext", bank)
    seen: list[float] = []
    inner = editor.engine
    editor.engine = lambda inputs: (seen.append(inputs["alpha"].abs().max().item()), inner(inputs))[1]  # type: ignore[func-returns-value]
    system = ConceptSliders(editor)
    system.render(system.prepare(case), [[0.5]], 28)
    assert seen == [0.0, 0.0] + [0.5] * 26


def test_offsets_run_on_a_compiled_engine_of_another_adapter(
    st_editor: SliderEditor, offsets: AttributeOffsets, case: Case
) -> None:
    eager = SliderEditor.from_pretrained("shapes-kontext", "shapes-st")
    images = []
    for editor in (st_editor, eager):
        system = OffsetControl(editor, offsets)
        images.append(system.render(system.prepare(case), [[0.0], [1.5]], STEPS))
    assert (images[0] - images[1]).abs().max() <= 1e-3


def test_attributes_without_training_are_named(system: Any, case: Case) -> None:
    with pytest.raises(SliderEditError, match=r"do not include 'make it old'; train it with slideredit-rt train"):
        system.prepare(replace(case, instructions=("make it old",)))


def test_concept_sliders_need_a_bank(st_editor: SliderEditor) -> None:
    with pytest.raises(SliderEditError, match="make one with slideredit-rt train concepts"):
        ConceptSliders(st_editor)


# ------------------------------------------------------------------------------------------------ commands


@pytest.mark.parametrize("what", ["concepts", "offsets"])
def test_the_command_trains_and_the_benchmark_takes_the_result(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = tmp_path / "edits.txt"
    lines.write_text("\n".join(ATTRIBUTES[:1]))
    out = tmp_path / "trained.safetensors"
    options = ["--instructions", str(lines), "--steps", "1", "--batch", "1", "--quiet", "--sample-every", "0"]
    assert main(["train", what, "--world", "shapes", *options, "--out", str(out)]) == 0
    assert "1 attributes" in capsys.readouterr().out
    name = {"concepts": "concept-sliders", "offsets": "attribute-offsets"}[what]
    config = BenchmarkConfig(scenes=(1,), search_scenes=1, samples=3, search_samples=3, steps=1)
    given: dict[str, Any] = {what: str(out)}
    setup = Setup("shapes-kontext", tmp_path / "run", ["shapes-st"], **given)
    report = run_evaluation(setup, config, systems=[name], instructions=ATTRIBUTES[:1], progress=False)
    assert [entry["system"] for entry in report["systems"]] == [name]


@pytest.mark.parametrize(("name", "what"), [("concept-sliders", "concepts"), ("attribute-offsets", "offsets")])
def test_a_base_without_trained_rivals_says_how_to_train_them(name: str, what: str, tmp_path: Path) -> None:
    shutil.copytree(resolve_base("shapes-kontext"), tmp_path / "base")
    setup = Setup(str(tmp_path / "base"), tmp_path / "run", ["shapes-st"])
    with pytest.raises(SliderEditError, match=rf"{name}' needs training .*slideredit-rt train {what}, then --{what}"):
        run_evaluation(setup, BenchmarkConfig(), systems=[name], progress=False)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"attributes": ()}, "list of attributes is empty"),
        ({"attributes": ("a", "a")}, "given twice"),
        ({"rank": 0}, "rank is 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(SliderEditError, match=message):
        replace(CONCEPTS, **config)


def test_data_with_another_instruction_is_refused(make: Any) -> None:
    with pytest.raises(SliderEditError, match="not one of the 3 attributes"):
        make(BalancedShapes([find_instruction("make the circle blue")])).loss(0)


def test_offsets_fill_batches_below_the_smallest_of_an_engine(
    st_editor: SliderEditor, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    offsets, accepts = load_offsets(resolve_offsets("shapes-offsets"), family), st_editor.engine
    prepared = offsets.prepare(st_editor, scene_image(held_out_examples(1, 1)[0]), seed=0)
    scales = torch.linspace(-1, 1, 5)[:, None].expand(-1, len(offsets.attributes))
    monkeypatch.setattr(st_editor, "max_batch", 4)
    expected = offsets.render(st_editor, prepared, scales, steps=2)

    def refuse_small(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        assert len(inputs["alpha"]) >= 3
        return accepts(inputs)

    monkeypatch.setattr(st_editor, "engine", refuse_small)
    monkeypatch.setattr(st_editor, "min_batch", 3)
    torch.testing.assert_close(offsets.render(st_editor, prepared, scales, steps=2), expected, atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------------------ what the package ships


@pytest.mark.parametrize(("world", "largest"), [("portraits", 3_600_000), ("shapes", 1_200_000)])
def test_the_shipped_rivals_come_from_the_shipped_recipes(world: str, largest: int, family: Family) -> None:
    bank, offsets = load_adapter(f"{world}-concepts", family), load_offsets(resolve_offsets(f"{world}-offsets"), family)
    assert tuple(bank.members) == offsets.attributes == tuple(EVALUATION[world].instructions)
    recipes = TRAINING[world]
    for training, recipe in ((bank.training, recipes.concepts()), (offsets.training, recipes.offsets())):
        assert training == json.loads(json.dumps(dataclasses.asdict(recipe)))
    assert resolve_adapter(f"{world}-concepts").stat().st_size < largest


def test_the_shipped_rivals_carry_out_an_instruction_and_leave_the_image_alone_at_zero(
    st_editor: SliderEditor, family: Family
) -> None:
    """One scene; how even and how far is the benchmark's to say."""
    (example,) = held_out_examples(1, 1, seed=3, known=[find_instruction("make the square larger")])
    case = Case("one", scene_image(example), example.prompt, (example.instructions[0].text,), seed=0)
    concepts = ConceptSliders(SliderEditor.from_pretrained("shapes-kontext", "shapes-concepts"))
    offsets = OffsetControl(st_editor, load_offsets(resolve_offsets("shapes-offsets"), family))
    systems: list[tuple[System, float]] = [(concepts, 1.0), (offsets, 3.0)]
    for system, far in systems:
        images = system.render(system.prepare(case), [[0.0], [far]], 12)
        zero, moved = (response(m, example.instructions[0], example.scene) for m in measure(images, [example.scene] * 2))
        assert abs(zero) < 0.1, system.name
        assert moved > 0.5, system.name
