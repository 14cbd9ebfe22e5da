"""Columns of the benches of full-size bases: their selection, what they are compared with, and what happens when one fails."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from slideredit_rt.bench import columns, gpu_e2e, gpu_model
from slideredit_rt.bench.columns import Selection, add_options, compare, read_selection
from slideredit_rt.engines import inductor

Run = Callable[..., tuple[int, dict[str, Any], str]]


def selection(card: str | None, *line: str) -> Selection:
    parser = argparse.ArgumentParser()
    add_options(parser)
    return read_selection(parser, parser.parse_args(line), ["frozen", "ours GST"], card)


@pytest.mark.parametrize(
    ("card", "line", "precisions"),
    [
        ("sm90", (), ("fp8",)),
        ("sm80", (), ()),
        (None, (), ()),
        ("sm90", ("--precisions",), ()),
        ("sm80", ("--precisions", "int8", "int4"), ("int8", "int4")),
        (None, ("--precisions", "fp8", "fp8"), ("fp8",)),
    ],
)
def test_precisions_are_those_asked_for_or_what_the_gpu_computes_in(
    card: str | None, line: tuple[str, ...], precisions: tuple[str, ...]
) -> None:
    assert selection(card, *line) == Selection(precisions)


def test_selected_columns_are_measured_and_named_in_the_command() -> None:
    chosen = selection("sm90", "--columns", "frozen", "ours GST, fp8")
    assert [chosen.wants(name) for name in ("frozen", "ours GST", "ours GST, fp8")] == [True, False, True]
    assert chosen.options() == '--precisions fp8 --columns "frozen" "ours GST, fp8"'
    assert Selection().options() == "--precisions"
    assert Selection().wants("ours GST")


@pytest.mark.parametrize(
    ("card", "line", "message"),
    [
        ("sm80", ("--precisions", "fp8"), "this GPU is sm80, which does not compute in fp8; leave it out"),
        ("sm90", ("--precisions", "nvfp4"), "invalid choice: 'nvfp4'"),
        (
            None,
            ("--precisions", "int8", "--columns", "frozen", "PEFT"),
            '\'PEFT\' is not a column of this run; choose from "frozen", "ours GST", "frozen, int8", '
            '"ours ST, 3 sliders, int8", "ours GST, int8"',
        ),
    ],
)
def test_columns_that_cannot_be_measured_are_refused(
    card: str | None, line: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refused:
        selection(card, *line)
    assert refused.value.code == 2
    assert message in capsys.readouterr().err


@dataclass(kw_only=True)
class Column(columns.Column):
    seconds: float

    @property
    def step(self) -> float:
        return self.seconds


def test_columns_are_compared_with_the_frozen_backbone_in_their_precision_and_in_bfloat16() -> None:
    found = [
        Column(name="frozen", seconds=3.0, peak_gib=20.0),
        Column(name="ours GST", seconds=5.0, peak_gib=21.0),
        Column(name="frozen, fp8", precision="fp8", seconds=2.0, peak_gib=12.0),
        Column(name="ours GST, fp8", precision="fp8", seconds=2.5, peak_gib=13.0),
        Column(name="ours GST, int8", precision="int8", seconds=8.0, peak_gib=None),
        Column(name="frozen, again", seconds=5.0, peak_gib=20.0),
    ]
    compare(found)
    assert [column.ratio_to_frozen for column in found] == [0.75, 1.25, 1.0, 1.25, None, 1.25]
    assert [column.speed_up for column in found] == [None, None, 2.0, 1.6, 0.5, None]
    assert [column.peak_share for column in found] == [None, None, 0.6, 0.65, None, None]
    alone = [Column(name="ours GST, fp8", precision="fp8", seconds=2.5)]
    compare(alone)
    assert (alone[0].ratio_to_frozen, alone[0].speed_up) == (None, None)


@pytest.fixture(params=[gpu_model, gpu_e2e], ids=["gpu_model", "gpu_e2e"])
def module(request: pytest.FixtureRequest) -> Any:
    """One of the two benches."""
    return request.param


@pytest.fixture
def rehearse(module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Rehearse a bench with the columns of some names; return its exit status, its report and its table."""
    if torch.cuda.is_available():
        pytest.skip("a rehearsal is for machines without a GPU")
    stem = module.__name__.rpartition("_")[2]

    def run(*names: str) -> tuple[int, dict[str, Any], str]:
        line = ["bench", "--rehearse", "--precisions", "int8", "--out", str(tmp_path), "--columns", *names]
        monkeypatch.setattr(sys, "argv", line)
        monkeypatch.setattr(inductor, "COMPILER", inductor.COMPILER)  # the rehearsal changes it
        try:
            status = module.main()
        except KeyboardInterrupt:
            status = 130
        # A run of some columns does not replace the results of all of them.
        name = f"{stem}_flux_kontext_part"
        written = tmp_path / "none"
        assert sorted(path.name for path in written.iterdir()) == [f"{name}.json", f"{name}.md"]
        return status, json.loads((written / f"{name}.json").read_text()), (written / f"{name}.md").read_text()

    return run


def breaking(error: BaseException) -> Callable[..., Any]:
    """Return a stand-in for `published` that fails when a part of the transformer is changed."""

    @contextmanager
    def published(transformer: Any, *_: object) -> Iterator[None]:
        transformer.proj_out = None
        raise error
        yield

    return published


def test_a_column_that_fails_is_noted_and_the_others_are_measured(
    module: Any, rehearse: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_model, "published", breaking(RuntimeError("no kernel | for this card\nat 0x7f")))
    last = list(module.COLUMNS)[-1]
    status, report, table = rehearse("frozen", "ours GST, int8", "published ST", last)
    assert status == 1
    assert [column["name"] for column in report["columns"]] == ["frozen", "ours GST, int8", last]
    assert report["failed"] == {"published ST": "RuntimeError: no kernel | for this card"}
    rows = [line.replace("\\|", "/").count("|") for line in table.splitlines() if line.startswith("| ")][:5]
    assert len(set(rows)) == 1, "every row of the table has the same cells"
    assert "| published ST | – |" in table
    assert "failed: RuntimeError: no kernel \\| for this card |" in table
    assert "published ST: failed: RuntimeError: no kernel" in capsys.readouterr().err
    quantised = report["columns"][1]
    assert quantised["speed_up"] > 0
    assert quantised["ratio_to_frozen"] is None, "there is no frozen column in int8"


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_a_run_that_ends_early_leaves_the_columns_before(module: Any, rehearse: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    # It ends after a column, in a measurement that shares its engine.
    extra = {gpu_model: "sweep", gpu_e2e: "sweep_at_once"}[module]
    monkeypatch.setattr(module.Bench, extra, interrupt)
    status, report, table = rehearse("frozen", "ours ST, 3 sliders", *(["sweep"] if module is gpu_model else []))
    assert status == 130
    assert [column["name"] for column in report["columns"]] == ["frozen", "ours ST, 3 sliders"]
    assert "| ours ST, 3 sliders |" in table


def test_a_run_that_ends_early_leaves_the_failures_before(module: Any, rehearse: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_model, "published", breaking(RuntimeError("no kernel")))
    next_one = {gpu_model: ("merged GST", "merged"), gpu_e2e: ("diffusers + PEFT, compiled", "peft")}[module]
    monkeypatch.setattr(module.Bench, next_one[1], interrupt)
    status, report, _ = rehearse("published ST", next_one[0])
    assert (status, report["columns"]) == (130, [])
    assert report["failed"] == {"published ST": "RuntimeError: no kernel"}
