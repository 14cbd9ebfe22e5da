"""Put the tables of the committed evaluations into `docs/evaluation.md` (`python -m slideredit_rt.bench.evaluation_page`)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr

from slideredit_rt.files import atomic_file

RESULTS = Path(__file__).parent / "results"
PORTRAITS = "evaluation-portraits"
PAGE = RESULTS.parents[1] / "docs" / "evaluation.md"
_BLOCK = re.compile(r"(<!-- table (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)

# SliderEdit, arXiv 2511.09715, table 1 (FLUX.1-Kontext, one slider, 15 settings): continuity by CLIP, LPIPS (alex).
_TABLE_1: Mapping[str, tuple[float, float]] = {
    "gst": (0.2998, 0.1868),
    "st": (0.2538, 0.1902),
    "explicit-cfg": (0.1993, 0.2465),
    "attribute-offsets": (0.1891, 0.1973),
    "concept-sliders": (0.1803, 0.2174),
    "implicit-cfg": (0.1547, 0.2149),
}
# Table 2, FLUX.1-Kontext, ST, 7 settings: extrapolation, continuity, disentanglement by number of sliders.
_TABLE_2: Mapping[int, tuple[float, float, float]] = {
    1: (0.2630, 0.2709, 0.1912),
    2: (0.2776, 0.2409, 0.2509),
    3: (0.2970, 0.3691, 0.2762),
}


def _report(name: str) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((RESULTS / name / "report.json").read_text())
    return report


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)) + "\n"


def _mean(entry: Mapping[str, Any] | None) -> str:
    return "–" if entry is None else f"{entry['mean']:.3f}"


def beside_table_1(run: str) -> str:
    """Return a table of the paper's methods with its figures and ours, and the rank correlation of the two.

    Args:
        run: Folder of our evaluation in the results. Methods that it lacks are left out.
    """
    found = {e["system"]: e for e in _report(run)["systems"] if e["sliders"] == 1}
    rows, pairs = [], []
    for name, (continuity, lpips) in _TABLE_1.items():
        if name not in found:
            continue
        ours, apart = found[name]["attributes"]["response"], found[name]["distances"]["elsewhere"]["distance"]
        rows.append([name, f"{continuity:.4f}", _mean(ours["continuity"]), f"{lpips:.4f}", _mean(apart)])
        pairs.append((continuity, ours["continuity"]["mean"], lpips, apart["mean"]))
    columns = list(zip(*pairs, strict=True))
    agree = [f"{spearmanr(columns[i], columns[i + 1]).statistic:.2f}" for i in (0, 2)]
    rows.append(["rank correlation of the two columns", "", agree[0], "", agree[1]])
    return _table(["system", "continuity, paper ↑", "here ↑", "LPIPS, paper ↓", "elsewhere, here ↓"], rows)


def beside_table_2(run: str) -> str:
    """Return a table of ST with one, two and three sliders, with the paper's figures and ours.

    Args:
        run: Folder of our evaluation in the results.
    """
    found = {e["sliders"]: e for e in _report(run)["systems"] if e["system"] == "st"}
    rows = []
    for count, (extrapolation, continuity, disentanglement) in _TABLE_2.items():
        ours, apart = found[count]["attributes"]["response"], found[count]["distances"]["elsewhere"]["distance"]
        paper = [f"{value:.4f}" for value in (extrapolation, continuity, disentanglement)]
        here = [_mean(ours["extrapolation"]), _mean(ours["continuity"]), _mean(apart)]
        rows.append([str(count), *(value for pair in zip(paper, here, strict=True) for value in pair)])
    head = [
        "sliders",
        "extrapolation, paper ↑",
        "here ↑",
        "continuity, paper ↑",
        "here ↑",
        "disentanglement, paper ↓",
        "here ↓",
    ]
    return _table(head, rows)


def tables() -> dict[str, str]:
    """Return every table of the page, by the name in its marker."""
    runs = {"variants": "ablations/variants", **{n: f"ablations/{n}" for n in ("seen", "unseen-change", "unseen-shape")}}
    runs |= {"evaluation": "evaluation", "portraits": PORTRAITS}
    found = {name: (RESULTS / folder / "table.md").read_text() for name, folder in runs.items()}
    for name, run in (("", "evaluation"), ("-portraits", PORTRAITS)):
        found |= {f"paper-1{name}": beside_table_1(run), f"paper-2{name}": beside_table_2(run)}
    return found


def refreshed(page: str) -> str:
    """Return the page with its tables replaced by those of the current results."""
    found = tables()
    return _BLOCK.sub(lambda match: f"{match[1]}{found[match['name']]}{match[3]}", page)


if __name__ == "__main__":
    text = refreshed(PAGE.read_text())
    with atomic_file(PAGE) as temporary:
        temporary.write_text(text)
