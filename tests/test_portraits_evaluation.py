"""Portraits as a subject of evaluation: exact scorers of held-out people, sweeps for marks, and commands on a random editor."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slideredit_rt.adapters import Adapter, save_adapter
from slideredit_rt.assets import WORLDS
from slideredit_rt.bench.marks import MEASURED, cross_fades, main, marks_of
from slideredit_rt.cli import main as cli
from slideredit_rt.errors import SliderEditError
from slideredit_rt.evaluation.dataset import CALIBRATION_SEEDS, MARKS_SEEDS, SEEDS
from slideredit_rt.evaluation.portraits import PortraitsPeople
from slideredit_rt.evaluation.sweeps import STRENGTHS, SliderSweep, linearity_by_instruction, summarise
from slideredit_rt.evaluation.worlds import EVALUATION
from slideredit_rt.families import Kind, get_family
from slideredit_rt.portraits.editor_recipe import SIZES, editor_recipe
from slideredit_rt.portraits.measurer import Reader, read_jointly
from slideredit_rt.portraits.world import INSTRUCTIONS, Example, edit, find_instruction, render

TINY = dataclasses.replace(SIZES, widths=(8, 8, 8, 8), heads=1, dual=1, single=1)
WITHOUT_BEARD = ("make the hair grey", "make the hair curly", "add a hat")


constant = pytest.mark.filterwarnings("ignore:An input array is constant")
"""For sweeps without a response, whose rank correlation is not defined."""


def drawings(example: Example, *strengths: tuple[float, ...]) -> Tensor:
    """Exact drawings of an example with its instructions at these strengths, `[M, 3, SIZE, SIZE]`."""
    given = torch.zeros(len(strengths), len(INSTRUCTIONS))
    for column, instruction in enumerate(example.instructions):
        given[:, INSTRUCTIONS.index(instruction)] = torch.tensor([row[column] for row in strengths])
    return render(edit(example.people.expand(len(given), -1), given))


def test_the_scorer_reads_exact_drawings_exactly() -> None:
    people = PortraitsPeople()
    for case in people.cases("bench", 3, 2):
        example = people.examples[case.name]
        source, half, exact = people.score(case, drawings(example, (0, 0), (0.5, 1), (1, 1)))
        assert source.attributes["response"] == pytest.approx((0, 0), abs=0.02)
        assert people.source_scores(case).attributes["response"] == pytest.approx((0, 0), abs=0.02)
        assert half.attributes["response"] == pytest.approx((0.5, 1), abs=0.02)
        assert exact.attributes["response"] == pytest.approx((1, 1), abs=0.02)
        assert exact.distances["elsewhere"] == pytest.approx(0, abs=1e-6)


def test_a_change_where_nothing_was_asked_counts_in_full() -> None:
    people = PortraitsPeople()
    (case,) = people.cases("bench", 1, 1)
    example = people.examples[case.name]
    spoiled = drawings(example, (1,)) + 0.1 * Reader(example).untouched
    (scores,) = people.score(case, spoiled)
    assert scores.distances["elsewhere"] == pytest.approx(0.1, abs=1e-5)
    assert scores.attributes["response"] == pytest.approx((1,), abs=0.02)


@pytest.mark.parametrize("texts", [("make the hair grey", "make the hair curly"), ("make the hair curly", "add a hat")])
def test_edits_that_overlap_are_read_together(texts: tuple[str, str]) -> None:
    people = PortraitsPeople([find_instruction(text) for text in texts])
    (case,) = people.cases("bench", 1, 2)
    example = people.examples[case.name]
    known = [(a, b) for a in (0.0, 0.5, 1.0) for b in (0.0, 0.5, 1.0)]
    images = drawings(example, *known)
    torch.testing.assert_close(read_jointly(example, images), torch.tensor(known), atol=0.02, rtol=0)
    assert (Reader(example).responses(images) - torch.tensor(known)).abs().max() > 0.05


def test_people_of_some_instructions_are_new_people_of_these_alone() -> None:
    known = [find_instruction(text) for text in WITHOUT_BEARD]
    people = PortraitsPeople(known)
    searched, benched = (people.cases(phase, 8, 2) for phase in ("search", "bench"))
    assert {text for case in benched for text in case.instructions} <= set(WITHOUT_BEARD)
    assert {len(case.instructions) for case in benched} == {2}
    assert len(benched) == len(searched) == 8
    faces = {people.examples[case.name].people.numpy().tobytes() for case in (*searched, *benched)}
    assert len(faces) == 16
    # A beard does not apply to everybody, and people have as many instructions as there are attributes.
    (beard,) = {case.instructions for case in PortraitsPeople([find_instruction("add a beard")]).cases("bench", 8, 3)}
    assert beard == ("add a beard",)


def test_every_purpose_has_scenes_of_its_own() -> None:
    seeds = [seed for purpose in (SEEDS, CALIBRATION_SEEDS, MARKS_SEEDS) for seed in purpose.values()]
    assert len(set(seeds)) == len(seeds)
    assert tuple(EVALUATION) == tuple(MEASURED) == WORLDS


@pytest.mark.parametrize("name", WORLDS)
def test_a_world_opens_scenes_of_its_own_instructions(name: str) -> None:
    world = EVALUATION[name]
    case = world.dataset(world.instructions[:1]).cases("bench", 1, 1)[0]
    assert case.instructions == world.instructions[:1]
    with pytest.raises(SliderEditError, match=f"is not an instruction of the {name} world"):
        world.dataset(["make it rain"])
    with pytest.raises(SliderEditError, match="the list of instructions is empty"):
        world.dataset([])


def test_rivals_that_do_not_ship_are_left_out() -> None:
    shapes = EVALUATION["shapes"]
    assert (shapes.base, shapes.concepts, shapes.offsets) == ("shapes-kontext", "shapes-concepts", "shapes-offsets")
    other = dataclasses.replace(shapes, name="landscapes")
    assert (other.concepts, other.offsets) == (None, None)


@constant
@pytest.mark.parametrize("name", WORLDS)
def test_a_sweep_of_the_source_reads_as_no_edit_and_the_autoencoder_as_its_own_measure(name: str) -> None:
    dataset = EVALUATION[name].dataset(seeds=MARKS_SEEDS)
    (case,) = dataset.cases("bench", 1, 1)
    source = torch.tensor(list(case.image.convert("RGB").tobytes())).view(case.image.height, case.image.width, 3)
    source = source.permute(2, 0, 1) / 255
    images = (source + 0.2 * torch.ones(len(STRENGTHS) + 1, 1, 1, 1)).clone()
    images[0] = source + 0.1
    found = summarise(dataset, case, 0, STRENGTHS, images)
    assert found.identity == pytest.approx(2, abs=0.05)
    assert found.erased == pytest.approx(1)
    assert found.rebuilt == pytest.approx(0.5)


def test_a_sweep_of_exact_drawings_is_straight_and_leaks_nothing() -> None:
    people = EVALUATION["portraits"].dataset(["make the hair grey", "make the hair curly"], MARKS_SEEDS)
    assert isinstance(people, PortraitsPeople)
    (case,) = people.cases("bench", 1, 2)
    example = people.examples[case.name]
    rebuilt = drawings(example, (0, 0)) + 0.01
    images = drawings(example, *((s, 1.0) for s in STRENGTHS))
    found = summarise(people, case, 0, STRENGTHS, torch.cat([rebuilt, images]))
    assert found.instruction == case.instructions[0]
    assert found.response == pytest.approx(STRENGTHS, abs=0.02)
    assert found.spearman == pytest.approx(1)
    assert found.linearity < 0.02
    assert found.leak is not None
    assert found.leak < 0.02
    assert found.identity == pytest.approx(0, abs=0.05)
    assert found.beyond
    # An image that does not return to the source at strength 0 is not erased.
    stuck = torch.cat([rebuilt, images[4:5], images[1:]])
    assert summarise(people, case, 0, STRENGTHS, stuck).erased == pytest.approx(1)


def test_marks_hold_figures_against_the_limits_of_the_world() -> None:
    row: dict[str, Any] = {"erased_below_quarter": 1.0, "spearman_at_least_0.95": 0.8, "linearity": 0.06}
    sliders = {
        "gst, 1 instruction(s)": {**row, "median_leak": None, "median_identity": 1.6},
        "st, 2 instruction(s)": {**row, "median_leak": 0.06, "median_identity": 1.0},
    }
    editor = {"people": 4, "instructions=1": {"ratio": 0.05, "psnr": 30.0}}
    found = {mark["mark"]: mark["passed"] for mark in marks_of(MEASURED["portraits"], editor, sliders)}
    assert list(found.values()) == [False, True, True, False, False, False, False, True]
    found = {mark["mark"]: mark["passed"] for mark in marks_of(MEASURED["shapes"], editor, sliders)}
    assert list(found.values()) == [True, True, False, True]


def test_a_cross_fade_begins_at_the_source_and_ends_at_the_exact_edit() -> None:
    sweeps = cross_fades(8)
    assert all(sweep.response[0] == pytest.approx(0, abs=1e-3) for sweep in sweeps)
    assert all(sweep.response[STRENGTHS.index(1.0)] == pytest.approx(1, abs=1e-3) for sweep in sweeps)
    straight = {sweep.instruction for sweep in sweeps if sweep.linearity < 1e-3}
    assert 0 < len(straight) < len(sweeps), "colours blend into colours, shapes do not blend into shapes"


@pytest.fixture(scope="module")
def random_editor(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An untrained tiny editor of people and adapters for it, by `base`, `st` and `gst`."""
    folder = tmp_path_factory.mktemp("random")
    torch.manual_seed(7)
    pipeline = editor_recipe(TINY).build()
    pipeline.save_pretrained(folder / "base")
    family = get_family("flux_kontext")
    kinds: tuple[Kind, ...] = ("st", "gst")
    for kind in kinds:
        linears = {n: m for n, m in pipeline.transformer.named_modules() if family.targets(kind).fullmatch(n)}
        pairs = {n: (torch.randn(2, m.in_features), torch.randn(m.out_features, 2)) for n, m in linears.items()}
        save_adapter(Adapter(family.name, kind, 2, pairs, "random"), folder / f"{kind}.safetensors")
    return {"base": str(folder / "base"), **{kind: str(folder / f"{kind}.safetensors") for kind in ("st", "gst")}}


def test_people_are_evaluated_with_the_systems_that_can_run(
    random_editor: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", "--world", "portraits", "--base", random_editor["base"], "--adapter", random_editor["st"], "--quiet"]
    size = ["--scenes", "1", "--samples", "3", "--search-scenes", "1", "--steps", "1"]
    assert cli([*command, *size, "--systems", "st,implicit-cfg", "--out", str(tmp_path / "run"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [entry["system"] for entry in report["systems"]] == ["st", "implicit-cfg"]
    assert "portraits" in report["fingerprints"]
    assert (tmp_path / "run" / "rows" / "base.person-1-1-000.csv").exists()
    assert cli([*command, *size, "--systems", "concept-sliders", "--out", str(tmp_path / "other")]) == 2
    assert "system 'concept-sliders' needs training on this base and its instructions" in capsys.readouterr().err
    edits = tmp_path / "edits.txt"
    edits.write_text("make the circle red\n")
    assert cli([*command, *size, "--instructions", str(edits), "--out", str(tmp_path / "other")]) == 2
    assert "is not an instruction of the portraits world" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_linearity_is_averaged_by_instruction_and_the_worst_comes_first() -> None:
    sweep = SliderSweep("smile", (0.0, 1.0), (0.0, 1.0), 1.0, 0.1, 0.0, 0.0, None, None, None)
    sweeps = [dataclasses.replace(sweep, instruction=text, linearity=value) for text, value in (("red", 0.0), ("blue", 0.5))]
    found = linearity_by_instruction([sweep, *sweeps, dataclasses.replace(sweep, linearity=0.3)])
    assert list(found.items()) == [("blue", 0.5), ("smile", 0.2), ("red", 0.0)]


@constant
def test_the_command_of_marks_writes_them(
    random_editor: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "marks.json"
    files = [word for name in ("base", "st", "gst") for word in (f"--{name}", random_editor[name])]
    main(["--world", "portraits", *files, "--scenes", "1", "--out", str(out)])
    written = json.loads(out.read_text())
    assert set(written["sliders"]) == {"st, 1 instruction(s)", "st, 2 instruction(s)", "gst, 1 instruction(s)"}
    assert {row["scenes"] for row in written["sliders"].values()} == {1}
    assert all([row["linearity"]] == list(row["linearity_by_instruction"].values()) for row in written["sliders"].values())
    assert len(written["marks"]) == 3 * 2 + 2 * 4 + 2
    assert [written["cross_fade"]["linearity"]] == list(written["cross_fade"]["linearity_by_instruction"].values())
    assert str(random_editor["base"]) in written["command"]
