"""The benchmark on a handful of small scenes: systems against what they must equal, the run, and its report."""

import json
import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from slideredit_rt.adapters import load_adapter
from slideredit_rt.assets import resolve_adapter, resolve_base
from slideredit_rt.bench.evaluation_page import PAGE, refreshed, tables
from slideredit_rt.cli import main
from slideredit_rt.editor import SliderEditor
from slideredit_rt.errors import SliderEditError
from slideredit_rt.evaluation.dataset import Case, Scores
from slideredit_rt.evaluation.evaluate import run_evaluation
from slideredit_rt.evaluation.report import markdown_table, summarise_run
from slideredit_rt.evaluation.run import BenchmarkConfig, Row, case_continuity, lines, read_rows, usefulness, write_rows
from slideredit_rt.evaluation.setup import Setup
from slideredit_rt.evaluation.shapes import ShapesScenes, score_shapes
from slideredit_rt.evaluation.systems import SYSTEMS, System, register
from slideredit_rt.evaluation.systems.guidance import ExplicitGuidance, ImplicitGuidance
from slideredit_rt.evaluation.systems.merged_lora import MergedLoRA
from slideredit_rt.evaluation.systems.pad_interpolation import PadInterpolation, interpolated_rows
from slideredit_rt.evaluation.systems.slideredit import GloballySelective, SelectiveToken
from slideredit_rt.families import get_family
from slideredit_rt.shapes.measurer import untouched
from slideredit_rt.shapes.world import ALL_INSTRUCTIONS, Example, draw_scene, find_instruction, render

STEPS = 2
EVERYTHING = ("circle larger", "square smaller", "background dark")
RESULTS = Path(__file__).parents[1] / "bench" / "results"


@pytest.fixture(scope="module")
def eager_st() -> SliderEditor:
    return SliderEditor.from_pretrained("shapes-kontext", "shapes-st", max_batch=4)


@pytest.fixture(scope="module")
def case() -> Case:
    return ShapesScenes().cases("bench", 1, 1)[0]


def _render(system: System, case: Case, values: Sequence[float]) -> Tensor:
    return system.render(system.prepare(case), [[v] for v in values], STEPS)


def test_every_system_makes_the_same_plain_edit(eager_st: SliderEditor, case: Case) -> None:
    plain = _render(SelectiveToken(eager_st), case, [1.0])
    for system in (PadInterpolation(eager_st), ExplicitGuidance(eager_st), ImplicitGuidance(eager_st)):
        torch.testing.assert_close(_render(system, case, [system.plain]), plain, atol=1e-5, rtol=0, msg=system.name)


@pytest.mark.parametrize("system", [ExplicitGuidance, ImplicitGuidance])
def test_guidance_fills_batches_below_the_smallest_of_an_engine(
    eager_st: SliderEditor, case: Case, system: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    values, accepts = [1.0, 2.0, 3.0, 4.0, 5.0], eager_st.engine
    expected = _render(system(eager_st), case, values)

    def refuse_small(inputs: dict[str, Tensor]) -> Tensor:
        assert len(inputs["alpha"]) >= 3
        return accepts(inputs)

    monkeypatch.setattr(eager_st, "engine", refuse_small)
    monkeypatch.setattr(eager_st, "min_batch", 3)
    found = _render(system(eager_st), case, values)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_explicit_guidance_of_zero_is_the_edit_without_a_prompt(eager_st: SliderEditor, case: Case) -> None:
    # More settings than a batch holds, so that every row is seen to keep its own weight.
    images = _render(ExplicitGuidance(eager_st), case, [0.5, 1.0, 0.0, 1.5, 0.25])
    conditioning = eager_st.prepare(case.image, case.instructions, true_cfg_scale=2.0, negative_prompt="", seed=case.seed)
    inputs = eager_st.family.batch_inputs(
        eager_st.config, conditioning.conditioning, torch.zeros(1, 1), conditioning.token_mask[None]
    )
    assert conditioning.conditioning.negative is not None
    inputs |= conditioning.conditioning.negative
    without = eager_st.denoise(SelectiveToken(eager_st).prepare(case).conditioning, inputs, STEPS)
    torch.testing.assert_close(images[2:3], without, atol=1e-5, rtol=0)


def test_what_stands_in_fully_interpolated_rows_cannot_be_read(eager_st: SliderEditor, case: Case) -> None:
    """With β = 1 the image does not depend on the rows' own content, and it does without: all layers are reached."""
    prepared = PadInterpolation(eager_st).prepare(case)
    rows = prepared.conditioning.text_rows
    inputs = eager_st.family.batch_inputs(eager_st.config, prepared.conditioning, torch.zeros(1, 1), prepared.token_mask[None])
    inputs["timestep"].fill_(0.7)
    weight = prepared.token_mask.float()[:, :rows]
    garbled = inputs["encoder_hidden_states"].clone()
    garbled[:, prepared.token_mask[0, :rows]] *= -2
    with interpolated_rows(eager_st.pipeline.transformer, weight, rows - 1):
        interpolated, unread = eager_st.engine(inputs), eager_st.engine(inputs | {"encoder_hidden_states": garbled})
    plain, read = eager_st.engine(inputs), eager_st.engine(inputs | {"encoder_hidden_states": garbled})
    torch.testing.assert_close(unread, interpolated, atol=1e-5, rtol=0)
    assert (read - plain).abs().max() > 0.01
    assert (interpolated - plain).abs().max() > 0.01


def test_merged_lora_equals_the_unmasked_adapter_at_any_strength_in_any_order(case: Case) -> None:
    family = get_family("flux_kontext")
    pipeline = family.load_pipeline(resolve_base("shapes-kontext"))
    merged = MergedLoRA(family, pipeline, load_adapter("shapes-gst", family))
    gst = GloballySelective(SliderEditor.from_pretrained("shapes-kontext", "shapes-gst"))
    # 1 leaves a scale of 0 behind; what follows must not be multiplied by it.
    values = [1.0, 0.25, -0.5, 1.0, 2.0, 0.25]
    torch.testing.assert_close(_render(merged, case, values), _render(gst, case, values), atol=1e-4, rtol=0)


def test_the_scorer_reads_exact_scenes_exactly() -> None:
    scenes = ShapesScenes()
    for case in scenes.cases("bench", 24, 2):
        (exact,) = scenes.score(case, render([scenes.examples[case.name].target]))
        assert exact.attributes["response"] == pytest.approx((1, 1), abs=0.06)
        elsewhere = exact.distances["elsewhere"]
        assert elsewhere is not None
        assert elsewhere < 1e-6
        assert scenes.source_scores(case).attributes["response"] == pytest.approx((0, 0), abs=0.06)


def test_a_change_where_nothing_was_asked_counts_in_full() -> None:
    scenes = ShapesScenes()
    (case,) = scenes.cases("bench", 1, 1)
    example = scenes.examples[case.name]
    image = render([example.target])
    image[:, :, untouched(example)] += 0.1
    assert score_shapes(example, image)[0].distances["elsewhere"] == pytest.approx(0.1, abs=1e-6)


def test_where_everything_may_change_there_is_no_distance() -> None:
    example = Example(draw_scene(random.Random(0)), tuple(find_instruction(f"make the {t}") for t in EVERYTHING))
    assert not untouched(example).any()
    (scores,) = score_shapes(example, render([example.target]))
    assert scores.distances == {"elsewhere": None}


def test_scenes_of_some_instructions_are_new_scenes_of_these_alone() -> None:
    known = [i for i in ALL_INSTRUCTIONS if i.subject == "square"]
    searched, benched = (ShapesScenes(known).cases(phase, 20, 2) for phase in ("search", "bench"))
    assert {text for case in benched for text in case.instructions} <= {i.text for i in known}
    assert not {case.name for case in searched} & {case.name for case in benched}


def _row(
    knobs: Sequence[float], attributes: Sequence[float], phase: str = "bench", sample: int = 0, distance: float | None = 0.1
) -> Row:
    scores = Scores({"response": tuple(attributes)}, {"elsewhere": distance})
    return Row(phase, "st", "a", len(knobs), 0.0, 1.0, sample, tuple(knobs), scores, 0.01)


def test_lines_of_a_joint_sweep_are_sorted_by_their_own_knob() -> None:
    rows = [_row((a, b), (a + 10 * b, b)) for a in (2.0, 0.0, 1.0) for b in (1.0, 0.0)]
    assert lines(rows, 0, "response") == [[10, 11, 12], [0, 1, 2]]
    assert lines(rows, 1, "response") == [[0, 1]] * 3
    joint = [_row((a, b), (a, b)) for a in (2.0, 0.0, 1.0) for b in (1.0, 0.0, 2.0)]
    assert case_continuity(joint, "response") == 1


def test_rows_survive_the_file(tmp_path: Path) -> None:
    rows = [_row((0.5, -1.25), (0.1, 1.5), sample=3), _row((0.5, 1.0), (0.1, 1.5), sample=4, distance=None)]
    write_rows(tmp_path / "rows.csv", rows)
    assert read_rows(tmp_path / "rows.csv") == rows
    (tmp_path / "rows.csv").write_text("phase,system\nbench,st\n")
    with pytest.raises(SliderEditError, match="delete it and run again"):
        read_rows(tmp_path / "rows.csv")


def _named(row: Row, case: str) -> Row:
    return replace(row, case=case)


def test_edits_that_the_base_cannot_make_are_counted_not_extrapolated() -> None:
    """Three plain edits reach 1 and one a tenth of it, less than a quarter of what is usual."""
    rows = []
    for case, full in (("a", 1.0), ("b", 1.0), ("c", 1.0), ("d", 0.1)):
        rows += [_named(_row((v,), (full * v,), "base", int(v)), case) for v in (0.0, 1.0)]
        rows += [_named(_row((v,), (2 * full * v,), sample=i), case) for i, v in enumerate((0.0, 0.5, 1.0))]
    (entry,) = summarise_run(rows)
    assert entry["attributes"]["response"]["edits_left_out_of_extrapolation"] == 1
    assert entry["attributes"]["response"]["extrapolation"]["mean"] == 1
    assert entry["attributes"]["response"]["extrapolation"]["count"] == 3
    base = [_row((v,), (-v,), "base", int(v)) for v in (0.0, 1.0)]
    (backwards,) = summarise_run([*base, *(_row((v,), (v,)) for v in (0.0, 0.5, 1.0))])
    assert backwards["attributes"]["response"]["extrapolation"] is None
    assert "| – |" in markdown_table([backwards])


def test_distances_that_cannot_be_told_are_counted() -> None:
    base = [_row((v,), (v,), "base", int(v)) for v in (0.0, 1.0)]
    swept = [_row((v,), (v,), sample=i, distance=d) for i, (v, d) in enumerate(((0.0, 0.2), (0.5, None), (1.0, 0.4)))]
    (entry,) = summarise_run([*base, *swept])
    assert entry["distances"]["elsewhere"]["distance"]["mean"] == pytest.approx(0.3)
    assert entry["distances"]["elsewhere"]["untold"] == 1
    assert "(1 n/a)" in markdown_table([entry])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 2}, "at least 3"),
        ({"sliders": (4,)}, "1, 2 and 3"),
        ({"scenes": (0,)}, "at least 1"),
        ({"sliders": (1, 2, 3), "scenes": (4, 4)}, "one for all"),
    ],
)
def test_settings_that_measure_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SliderEditError, match=message):
        BenchmarkConfig(**options)


SMALL = ["--scenes", "1", "--samples", "3", "--search-scenes", "1", "--steps", "2", "--quiet"]


def test_a_run_can_be_killed_continued_and_reported_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["evaluate", "--adapter", "shapes-st", "--systems", "st,explicit-cfg", "--out", str(tmp_path / "run"), *SMALL]
    assert main(command) == 0
    first = json.loads((tmp_path / "run/report.json").read_text())
    rows = [replace(row, seconds=0) for row in read_rows(tmp_path / "run/rows.csv")]
    assert first["pictures"] == ["curves.png", "trajectories.png", "strips.png"]
    for name in ("table.md", *first["pictures"]):
        assert (tmp_path / "run" / name).stat().st_size > 100
    # As a run that was killed before its second system was swept.
    (done,) = (tmp_path / "run/rows").glob("bench.st.*")
    (lost,) = (tmp_path / "run/rows").glob("bench.explicit-cfg.*")
    before = done.stat().st_mtime_ns
    lost.unlink()
    (tmp_path / "run/rows.csv").unlink()
    assert main(command) == 0
    assert done.stat().st_mtime_ns == before
    assert [replace(row, seconds=0) for row in read_rows(tmp_path / "run/rows.csv")] == rows
    again = json.loads((tmp_path / "run/report.json").read_text())
    assert again["systems"][0] == first["systems"][0]
    capsys.readouterr()
    assert main([*command, "--steps", "3"]) == 2
    assert "other settings" in capsys.readouterr().err


def test_several_adapters_and_engines_go_by_their_names(tmp_path: Path, engines: dict[str, Path]) -> None:
    shutil.copy(resolve_adapter("shapes-st"), tmp_path / "mine.safetensors")
    given = ["--adapter", "shapes-st", "--adapter", str(tmp_path / "mine.safetensors"), "--engine", str(engines["gst"])]
    arguments = ["evaluate", *given, "--systems", "st,gst", "--out", str(tmp_path / "run"), *SMALL, "--sliders", "2"]
    assert main([*arguments, "--joint-samples", "3"]) == 0
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert [(s["system"], s["sliders"]) for s in report["systems"]] == [("shapes-st", 2), ("mine", 2)]
    # The same adapter under two names.
    first, second = (s["attributes"] for s in report["systems"])
    assert first == second
    assert report["pictures"] == ["lattices.png", "grid.shapes-st.png", "grid.mine.png"]


@pytest.fixture
def crossfade() -> Iterator[type[System]]:
    """A rival system, all of it: the source fades into the plain edit."""

    @register
    class Crossfade(System):
        name, knob, how = "crossfade", "opacity", "the plain edit laid over the source"
        needs = "an adapter or an engine (--adapter, --engine)"
        ranges = ((0.0, 1.0),)

        def __init__(self, editor: SliderEditor) -> None:
            self.editor = editor

        @classmethod
        def make(cls, setup: Setup, variant: str) -> System:
            return cls(setup.open_any())

        def prepare(self, case: Case) -> tuple[Any, Tensor]:
            source = torch.from_numpy(np.array(case.image)).permute(2, 0, 1) / 255
            return self.editor.prepare(case.image, case.instructions, prompt=case.prompt, seed=case.seed), source

        def render(self, prepared: tuple[Any, Tensor], settings: Sequence[Sequence[float]], steps: int) -> Tensor:
            encoded, source = prepared
            edited = self.editor.render_tensor(encoded, [[1.0]], steps=steps)[0]
            return torch.stack([torch.lerp(source, edited, opacity) for (opacity,) in settings])

    yield Crossfade
    del SYSTEMS[Crossfade.name]


def test_a_new_system_takes_one_class(
    crossfade: type[System], tmp_path: Path, engines: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    command = ["evaluate", "--engine", str(engines["st"]), "--systems", "crossfade", "--out", str(run), *SMALL, "--json"]
    assert main(command) == 0
    report = json.loads(capsys.readouterr().out)
    assert [(entry["system"], entry["range"]) for entry in report["systems"]] == [("crossfade", [0, 1])]
    assert report["how"] == {"crossfade": "the plain edit laid over the source; the knob is opacity"}
    assert "| crossfade |" in (run / "table.md").read_text()
    (source, plain), swept = (
        [row.scores for row in read_rows(run / "rows.csv") if row.phase == phase and row.case.startswith("scene-1")]
        for phase in ("base", "bench")
    )
    ends = [scores.attributes["response"][0] for scores in (source, plain)]
    shown = [scores.attributes["response"][0] for scores in swept]
    assert shown == pytest.approx([ends[0], sum(ends) / 2, ends[1]], abs=0.02)
    assert swept[2].distances["elsewhere"] == pytest.approx(plain.distances["elsewhere"], abs=1e-5)
    # The same run from Python, which finds everything there.
    config = BenchmarkConfig(scenes=(1,), samples=3, search_scenes=1, steps=2)
    setup = Setup("shapes-kontext", run, engines=[engines["st"]])
    again = run_evaluation(setup, config, systems=["crossfade"], progress=False)
    assert again["systems"] == report["systems"]


def test_the_name_of_a_system_is_its_own(crossfade: type[System]) -> None:
    with pytest.raises(SliderEditError, match="a system named 'crossfade' is registered already"):
        register(crossfade)


def test_what_a_setup_allows_is_told_before_an_engine_is_built(tmp_path: Path) -> None:
    shutil.copy(resolve_adapter("shapes-st"), tmp_path / "mine.safetensors")
    out, mine = tmp_path / "run", str(tmp_path / "mine.safetensors")
    allowed = {}
    for adapters in (["shapes-gst"], [mine, "shapes-gst", "shapes-st"]):
        setup = Setup("shapes-kontext", out, adapters, concepts="shapes-concepts")
        allowed[len(adapters)] = [variant for system in SYSTEMS.values() for variant in system.variants(setup)]
    rest = ["implicit-cfg", "explicit-cfg", "merged-lora", "concept-sliders"]
    st = ["mine", "shapes-st", "scheduled-st-mine", "scheduled-st-shapes-st"]
    assert allowed == {1: ["gst", *rest], 3: [*st, "gst", "pad-interpolation", *rest]}
    assert not out.exists()


def test_systems_stand_in_the_order_of_the_committed_table() -> None:
    report = json.loads((RESULTS / "evaluation" / "report.json").read_text())
    assert list(dict.fromkeys(entry["system"] for entry in report["systems"])) == list(SYSTEMS)


def test_an_adapter_may_not_go_by_the_name_of_another_system(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(resolve_adapter("shapes-st"), tmp_path / "gst.safetensors")
    adapters = [str(tmp_path / "gst.safetensors"), "shapes-st", "shapes-gst"]
    given = [word for adapter in adapters for word in ("--adapter", adapter)]
    assert main(["evaluate", *given, "--out", str(tmp_path / "run"), *SMALL]) == 2
    assert "two systems would be named 'gst'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--adapter", "shapes-st", "--systems", "gst"], "needs an adapter or an engine of its kind"),
        (["--adapter", "shapes-st", "--systems", "prompt-weights"], "is not a system of this benchmark"),
        (["--adapter", "shapes-st", "--adapter", "shapes-st"], "are named 'shapes-st'"),
        ([], "there is nothing to evaluate"),
        (["--adapter", "shapes-st", "--images", "images"], "need both --images and --prompts"),
        (["--adapter", "shapes-st", "--scorer", "clip"], "has no source"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", *arguments, "--out", str(tmp_path / "run"), *SMALL]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("folder", sorted({p.parent for p in RESULTS.glob("**/rows.csv")}), ids=lambda p: p.name)
def test_committed_tables_are_what_their_rows_say(folder: Path) -> None:
    summary = summarise_run(read_rows(folder / "rows.csv"))
    assert json.loads((folder / "report.json").read_text())["systems"] == summary
    assert (folder / "table.md").read_text() == markdown_table(summary)


def test_the_page_shows_the_committed_tables() -> None:
    page = PAGE.read_text()
    assert refreshed(page) == page
    assert page.count("<!-- table") == len(tables())


def test_the_page_names_the_attributes_whose_offsets_never_act() -> None:
    asked = {case.name: case.instructions[0] for case in ShapesScenes().cases("bench", 64, 1)}
    most = dict.fromkeys(asked.values(), 0.0)
    for row in read_rows(RESULTS / "evaluation" / "rows.csv"):
        if (row.phase, row.system) == ("bench", "attribute-offsets") and row.case in asked:
            most[asked[row.case]] = max(most[asked[row.case]], row.scores.attributes["response"][0])
    assert len(most) == 20
    never = {"make the background dark", "make the circle green", "make the circle white"}
    assert {instruction for instruction, response in most.items() if response < 0.9} == never


def test_a_range_in_which_the_response_turns_back_is_not_chosen() -> None:
    source, edited = (Scores({"response": (v,)}, {}) for v in (0.0, 1.0))
    straight = [_row((v,), (min(v, 0.9),)) for v in (0.0, 0.25, 0.5, 0.75, 1.0)]
    folded = [_row((v,), (r,)) for v, r in ((0.0, 0.0), (1.0, 0.5), (2.0, 1.0), (3.0, 0.75), (4.0, 0.25))]
    assert case_continuity(folded, "response") > case_continuity(straight, "response")
    assert usefulness(folded, source, edited) < usefulness(straight, source, edited)
    assert usefulness(straight, source, source) == 0
