"""From a run's rows to `report.json`, a Markdown table, and the pictures that a person looks at."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from slideredit_rt.errors import SliderEditError
from slideredit_rt.evaluation.measures import Estimate, estimate, extrapolation, monotonicity
from slideredit_rt.evaluation.run import Row, case_continuity, lines
from slideredit_rt.files import atomic_file
from slideredit_rt.images import draw_grid, save_image

_SMALL_EDIT = 0.25
"""A plain edit that carries out less of its instruction than this is no base to measure extrapolation against."""


def summarise_system(rows: Sequence[Row], base: Mapping[str, Sequence[Row]]) -> dict[str, Any]:
    """Measures of one system at one number of sliders.

    Args:
        rows: of the phase `bench`.
        base: by case, the rows of the source picture and of the plain edit.
    """
    cases: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        cases[row.case].append(row)
    evenness, order, reach, elsewhere, left_out = [], [], [], [], 0
    for name, swept in cases.items():
        source, edited = (row.scores.attributes for row in base[name])
        evenness.append(case_continuity(swept))
        sweeps = [(index, line) for index in range(rows[0].sliders) for line in lines(swept, index)]
        order.append(statistics.fmean(monotonicity(range(len(line)), line) for _, line in sweeps))
        elsewhere.append(statistics.fmean(row.scores.elsewhere for row in swept))
        usable = [i for i in range(rows[0].sliders) if edited[i] - source[i] >= _SMALL_EDIT]
        left_out += len(source) - len(usable)
        if usable:
            reach.append(
                statistics.fmean(extrapolation([r.scores.attributes[i] for r in swept], source[i], edited[i]) for i in usable)
            )
    measures: dict[str, Estimate | None] = {
        "continuity": estimate(evenness),
        "monotonicity": estimate(order),
        "extrapolation": estimate(reach) if reach else None,
        "elsewhere": estimate(elsewhere),
    }
    return {
        "system": rows[0].system,
        "sliders": rows[0].sliders,
        "cases": len(cases),
        "range": [rows[0].low, rows[0].high],
        **{name: None if value is None else asdict(value) for name, value in measures.items()},
        "edits_left_out_of_extrapolation": left_out,
        "median_seconds_per_image": statistics.median(row.seconds for row in rows),
    }


def summarise_run(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One entry per number of sliders and system, in the order of the rows; the plain edit first."""
    base: dict[str, list[Row]] = defaultdict(list)
    groups: dict[tuple[int, str], list[Row]] = defaultdict(list)
    for row in rows:
        if row.phase == "base":
            base[row.case].append(row)
        elif row.phase == "bench":
            groups[row.sliders, row.system].append(row)
    if not groups:
        raise SliderEditError("the run has no benchmark rows; let slideredit-rt evaluate finish first")
    return [summarise_system(group, base) for _, group in sorted(groups.items(), key=lambda item: item[0][0])]


def markdown_table(summary: Sequence[Mapping[str, Any]]) -> str:
    """The summary for people; means with 95% confidence intervals."""

    def cell(value: Mapping[str, Any] | None) -> str:
        return "–" if value is None else str(Estimate(**value))

    head = ("sliders", "system", "range", "continuity ↑", "monotonicity ↑", "extrapolation ↑", "elsewhere ↓", "ms per image")
    out = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for entry in summary:
        cells = [
            str(entry["sliders"]),
            entry["system"],
            "{:g} to {:g}".format(*entry["range"]),
            *(cell(entry[name]) for name in ("continuity", "monotonicity", "extrapolation", "elsewhere")),
            f"{1000 * entry['median_seconds_per_image']:.0f}",
        ]
        out.append("| " + " | ".join(cells) + " |")
    return "\n".join(out) + "\n"


def draw_curves(rows: Sequence[Row], path: Path) -> None:
    """Response over the swept range, per system: median over the scenes with the middle half and the middle 90%."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SliderEditError("plots need matplotlib; pip install 'slideredit-rt[evaluation]'") from None
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row.phase == "bench" and row.sliders == 1:
            groups[row.system].append(row)
    columns = min(3, len(groups))
    figure = Figure(figsize=(4.2 * columns, 3.4 * -(-len(groups) // columns)), layout="constrained")
    panels = np.atleast_1d(figure.subplots(-(-len(groups) // columns), columns, sharey=True, squeeze=False)).ravel()
    for panel, (name, group) in zip(panels, groups.items(), strict=False):
        knobs = sorted({row.knobs[0] for row in group})
        values = np.array([[r.scores.attributes[0] for r in group if r.knobs[0] == knob] for knob in knobs])
        for spread, shade in ((45, 0.15), (25, 0.3)):
            low, high = np.percentile(values, [50 - spread, 50 + spread], axis=1)
            panel.fill_between(knobs, low, high, color="tab:blue", alpha=shade, linewidth=0)
        panel.plot(knobs, np.median(values, axis=1), color="tab:blue")
        panel.axhline(0, color="gray", linewidth=0.6)
        panel.axhline(1, color="gray", linewidth=0.6)
        panel.set_title(name)
        panel.set_xlabel("swept setting")
        panel.set_ylim(-0.5, 2.0)
    for panel in panels[len(groups) :]:
        panel.set_visible(False)
    panels[0].set_ylabel("response (0 source, 1 as asked)")
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def draw_strips(rows: Sequence[Row], pictures: Path, path: Path) -> None:
    """The first pictured scene swept by every system, one row each."""
    first = next(row.case for row in rows if row.phase == "bench" and row.sliders == 1)
    strips, labels = [], []
    for name in dict.fromkeys(row.system for row in rows if row.phase == "bench" and row.sliders == 1):
        sheet = Image.open(pictures / f"{name}.{first}.png")
        side = sheet.height
        frames = [sheet.crop((x, 0, x + side, side)) for x in range(0, sheet.width, side)]
        strips.append(frames[:: max(1, (len(frames) - 1) // 7)])
        labels.append(name)
    blank = [""] * len(strips[0])
    save_image(draw_grid(strips, blank, labels, "each system over its own range, off to far", 100), path)


def write_report(rows: Sequence[Row], out: Path, about: Mapping[str, Any]) -> dict[str, Any]:
    """Write `report.json`, `table.md`, `curves.png` and `strips.png` into `out`; returns the report.

    Args:
        about: settings, versions and fingerprints, put into the report as they are.
    """
    summary = summarise_run(rows)
    report = {**about, "systems": summary}
    if any(entry["sliders"] == 1 for entry in summary):
        draw_curves(rows, out / "curves.png")
        draw_strips(rows, out / "pictures", out / "strips.png")
    with atomic_file(out / "table.md") as temporary:
        temporary.write_text(markdown_table(summary))
    with atomic_file(out / "report.json") as temporary:
        temporary.write_text(json.dumps(report, indent=2) + "\n")
    return report
