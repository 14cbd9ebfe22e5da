"""Report of a run: `report.json`, a Markdown table, plots and images."""

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
from slideredit_rt.evaluation.measures import Estimate, coverage, estimate, extrapolation, monotonicity
from slideredit_rt.evaluation.run import Row, case_continuity, lines
from slideredit_rt.files import atomic_file
from slideredit_rt.images import draw_grid, save_image

_MEASURES = ("continuity", "monotonicity", "coverage", "extrapolation")
_SMALL_EDIT = 0.25
"""Extrapolation leaves out plain edits that change the score by less than this share of the median plain edit."""
_SHOWN = 8
"""Largest number of frames in a strip."""


def _attribute_measures(rows: Sequence[Row], base: Mapping[str, Sequence[Row]], scorer: str) -> dict[str, Any]:
    """Return continuity, monotonicity, coverage and extrapolation of one system by one scorer, as JSON values."""
    cases: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        cases[row.case].append(row)
    indices = range(rows[0].sliders)
    ends = {name: [row.scores.attributes[scorer] for row in base[name]] for name in cases}
    typical = statistics.median(edited[i] - source[i] for source, edited in ends.values() for i in indices)
    evenness, order, covered, reach, left_out = [], [], [], [], 0
    for name, swept in cases.items():
        source, edited = ends[name]
        evenness.append(case_continuity(swept, scorer))
        sweeps = [line for index in indices for line in lines(swept, index, scorer)]
        order.append(statistics.fmean(monotonicity(range(len(line)), line) for line in sweeps))
        shown = {i: [row.scores.attributes[scorer][i] for row in swept] for i in indices}
        covered.append(statistics.fmean(coverage(shown[i], source[i], edited[i]) for i in indices))
        usable = [i for i in indices if edited[i] - source[i] > max(0.0, _SMALL_EDIT * typical)]
        left_out += len(source) - len(usable)
        if usable:
            reach.append(statistics.fmean(extrapolation(shown[i], source[i], edited[i]) for i in usable))
    return {
        "continuity": asdict(estimate(evenness)),
        "monotonicity": asdict(estimate(order)),
        "coverage": asdict(estimate(covered)),
        "extrapolation": asdict(estimate(reach)) if reach else None,
        "edits_left_out_of_extrapolation": left_out,
    }


def _distance_measures(rows: Sequence[Row], scorer: str) -> dict[str, Any]:
    """Return the mean distance to the source, over each sweep and then over cases, and the number of images without one."""
    cases: dict[str, list[float]] = defaultdict(list)
    untold = 0
    for row in rows:
        if (distance := row.scores.distances[scorer]) is None:
            untold += 1
        else:
            cases[row.case].append(distance)
    return {"distance": asdict(estimate([statistics.fmean(c) for c in cases.values()])) if cases else None, "untold": untold}


def summarise_system(rows: Sequence[Row], base: Mapping[str, Sequence[Row]]) -> dict[str, Any]:
    """Return the measures of one system at one number of sliders.

    Args:
        rows: Rows of the system in the phase `bench`.
        base: Rows of the source image and of the plain edit, by case.
    """
    return {
        "system": rows[0].system,
        "sliders": rows[0].sliders,
        "cases": len({row.case for row in rows}),
        "range": [rows[0].low, rows[0].high],
        "attributes": {name: _attribute_measures(rows, base, name) for name in rows[0].scores.attributes},
        "distances": {name: _distance_measures(rows, name) for name in rows[0].scores.distances},
        "median_seconds_per_image": statistics.median(row.seconds for row in rows),
    }


def summarise_run(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return one entry per number of sliders and system: fewest sliders first, systems in the order of the rows."""
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
    """Return the summary as a Markdown table of means with 95% confidence intervals."""

    def cell(value: Mapping[str, Any] | None) -> str:
        return "–" if value is None else str(Estimate(**value))

    attributes, distances = list(summary[0]["attributes"]), list(summary[0]["distances"])
    measures = [
        (name, measure) for name in attributes for measure in ("continuity", "monotonicity", "coverage", "extrapolation")
    ]
    head = [
        *("sliders", "system", "range"),
        *(f"{measure} ↑" if len(attributes) == 1 else f"{measure} {name} ↑" for name, measure in measures),
        *(f"{name} ↓" for name in distances),
    ]
    out = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for entry in summary:
        told = [entry["distances"][name] for name in distances]
        cells = [
            str(entry["sliders"]),
            entry["system"],
            "{:g} to {:g}".format(*entry["range"]),
            *(cell(entry["attributes"][name][measure]) for name, measure in measures),
            *(cell(d["distance"]) + (f" ({d['untold']} n/a)" if d["untold"] else "") for d in told),
        ]
        out.append("| " + " | ".join(cells) + " |")
    return "\n".join(out) + "\n"


def new_figure(panels: int, **options: Any) -> tuple[Any, list[Any]]:
    """Return a matplotlib figure and its panels, three in a row. `options` go to `Figure.subplots`."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SliderEditError("plots need matplotlib; pip install 'slideredit-rt[evaluation]'") from None
    columns = min(3, panels)
    rows = -(-panels // columns)
    figure = Figure(figsize=(4.2 * columns, 3.4 * rows), layout="constrained")
    found = list(np.ravel(figure.subplots(rows, columns, squeeze=False, **options)))
    for panel in found[panels:]:
        panel.set_visible(False)
    return figure, found[:panels]


def save_figure(figure: Any, path: Path) -> None:
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def _by_system(rows: Sequence[Row], sliders: int) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row.phase == "bench" and row.sliders == sliders:
            groups[row.system].append(row)
    return groups


def draw_curves(rows: Sequence[Row], path: Path) -> None:
    """Plot the response over the swept range by the first scorer: the median over cases, the middle 50% and 90%."""
    groups = _by_system(rows, 1)
    scorer = next(iter(rows[0].scores.attributes))
    figure, panels = new_figure(len(groups), sharey=True)
    everything = []
    for panel, (name, group) in zip(panels, groups.items(), strict=True):
        samples = sorted({row.sample for row in group})
        knobs = [next(row.knobs[0] for row in group if row.sample == s) for s in samples]
        values = np.array([[r.scores.attributes[scorer][0] for r in group if r.sample == s] for s in samples])
        for spread, shade in ((45, 0.15), (25, 0.3)):
            low, high = np.percentile(values, [50 - spread, 50 + spread], axis=1)
            panel.fill_between(knobs, low, high, color="tab:blue", alpha=shade, linewidth=0)
        panel.plot(knobs, np.median(values, axis=1), color="tab:blue")
        everything.append(np.percentile(values, [2, 98]))
        panel.set_title(name)
        panel.set_xlabel("swept setting")
    for sample in (0, 1):
        level = statistics.median(r.scores.attributes[scorer][0] for r in rows if r.phase == "base" and r.sample == sample)
        for panel in panels:
            panel.axhline(level, color="gray", linewidth=0.6)
    low, high = np.min(everything), np.max(everything)
    panels[0].set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    panels[0].set_ylabel(f"{scorer} (lines: source, plain edit)")
    save_figure(figure, path)


def draw_trajectories(rows: Sequence[Row], path: Path) -> None:
    """Plot the mean distance to the source against the mean attribute score, from the off end of the range to the far end."""
    groups = _by_system(rows, 1)
    scorer, distances = next(iter(rows[0].scores.attributes)), list(rows[0].scores.distances)
    figure, panels = new_figure(len(distances))
    # Make room for the legend beside the panels.
    figure.set_figwidth(figure.get_figwidth() + 2.2)
    for panel, distance in zip(panels, distances, strict=True):
        for number, (name, group) in enumerate(groups.items()):
            points = []
            for sample in sorted({row.sample for row in group}):
                of = [row for row in group if row.sample == sample]
                told = [d for row in of if (d := row.scores.distances[distance]) is not None]
                if told:
                    points.append((statistics.fmean(r.scores.attributes[scorer][0] for r in of), statistics.fmean(told)))
            if points:
                # There are ten colours. Further systems, as in the ablations, reuse them with dotted lines.
                style = {"color": f"C{number % 10}", "linestyle": ("-", ":")[number // 10 % 2]}
                panel.plot(*zip(*points, strict=True), marker=".", linewidth=1, label=name, **style)
                panel.plot(*points[-1], marker="o", color=style["color"])
        panel.set_xlabel(f"{scorer} (dot: far end)")
        panel.set_ylabel(f"{distance}, distance to the source")
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=7, loc="outside right upper")
    save_figure(figure, path)


def draw_lattices(rows: Sequence[Row], path: Path) -> None:
    """Plot the mean scores of both instructions at every pair of settings. Independent sliders give a square lattice."""
    groups = _by_system(rows, 2)
    scorer = next(iter(rows[0].scores.attributes))
    figure, panels = new_figure(len(groups), sharex=True, sharey=True)
    for panel, (name, group) in zip(panels, groups.items(), strict=True):
        side = round(len({row.sample for row in group}) ** 0.5)
        shown: dict[int, list[tuple[float, ...]]] = defaultdict(list)
        for row in group:
            shown[row.sample].append(row.scores.attributes[scorer])
        lattice = np.array([np.mean(shown[sample], axis=0) for sample in sorted(shown)]).reshape(side, side, 2)
        for line in (*lattice, *lattice.transpose(1, 0, 2)):
            panel.plot(line[:, 0], line[:, 1], color="tab:blue", linewidth=0.8, marker=".")
        panel.set_title(name)
        panel.set_xlabel(f"{scorer}, first instruction")
    panels[0].set_ylabel(f"{scorer}, second instruction")
    save_figure(figure, path)


def _cells(sheet: Image.Image, rows: int, columns: int) -> list[list[Image.Image]]:
    """Cut a contact sheet into its images."""
    width, height = sheet.width // columns, sheet.height // rows
    return [
        [sheet.crop((x * width, y * height, (x + 1) * width, (y + 1) * height)) for x in range(columns)] for y in range(rows)
    ]


def draw_strips(rows: Sequence[Row], images: Path, path: Path) -> None:
    """Draw the first kept case of one slider, swept by every system, one row each."""
    groups = _by_system(rows, 1)
    first = next(iter(groups.values()))[0].case
    strips = []
    for name, group in groups.items():
        samples = len({row.sample for row in group})
        (frames,) = _cells(Image.open(images / f"{name}.{first}.png"), 1, samples)
        strips.append([frames[i] for i in np.linspace(0, samples - 1, min(_SHOWN, samples)).round().astype(int)])
    blank = [""] * len(strips[0])
    save_image(draw_grid(strips, blank, list(groups), "each system over its own range, off to far", 100), path)


def draw_joint_images(rows: Sequence[Row], images: Path, folder: Path) -> list[str]:
    """Draw the first kept case of two sliders as one grid `grid.SYSTEM.png` per system, and return the file names."""
    names = []
    for name, group in _by_system(rows, 2).items():
        side = round(len({row.sample for row in group}) ** 0.5)
        cells = _cells(Image.open(images / f"{name}.{group[0].case}.png"), side, side)
        settings = [f"{k:g}" for k in sorted({round(row.knobs[0], 3) for row in group})]
        title = f"{name}: first instruction down, second instruction across"
        names.append(f"grid.{name}.png")
        save_image(draw_grid(cells, settings, settings, title, 70), folder / names[-1])
    return names


def write_report(rows: Sequence[Row], out: Path, about: Mapping[str, Any]) -> dict[str, Any]:
    """Write `report.json`, `table.md` and the images.

    Args:
        rows: All rows of the run.
        out: Folder of the run.
        about: Settings, versions and fingerprints to include in the report.

    Returns:
        The contents of `report.json`, with the names of the images.
    """
    summary = summarise_run(rows)
    counts, drawn = {entry["sliders"] for entry in summary}, []
    if 1 in counts:
        draw_curves(rows, out / "curves.png")
        draw_trajectories(rows, out / "trajectories.png")
        draw_strips(rows, out / "pictures", out / "strips.png")
        drawn += ["curves.png", "trajectories.png", "strips.png"]
    if 2 in counts:
        draw_lattices(rows, out / "lattices.png")
        drawn += ["lattices.png", *draw_joint_images(rows, out / "pictures", out)]
    with atomic_file(out / "table.md") as temporary:
        temporary.write_text(markdown_table(summary))
    report = {**about, "systems": summary, "pictures": drawn}
    with atomic_file(out / "report.json") as temporary:
        temporary.write_text(json.dumps(report, indent=2) + "\n")
    return report
