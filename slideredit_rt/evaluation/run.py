"""Run the benchmark: the same pictures, noise and steps for every system, one row per image, resumable."""

from __future__ import annotations

import csv
import itertools
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from slideredit_rt.errors import SliderEditError
from slideredit_rt.evaluation.measures import continuity, monotonicity
from slideredit_rt.evaluation.shapes import Scores, score_shapes, shapes_cases, source_scores
from slideredit_rt.evaluation.systems import Case, System
from slideredit_rt.files import atomic_file
from slideredit_rt.images import save_image
from slideredit_rt.training.shapes_world import Example

BENCH_SEED, SEARCH_SEED = 1, 2
PICTURED = 3
"""Scenes whose pictures are kept."""
_COLUMNS = ("phase", "system", "case", "sliders", "low", "high", "sample", "knobs", "attributes", "elsewhere", "seconds")


@dataclass(frozen=True)
class BenchmarkConfig:
    """Settings of a run.

    Attributes:
        scenes: held-out pictures for one slider.
        joint_scenes: for two and three sliders jointly, which take `joint_samples` to the power of the sliders images each.
        samples, joint_samples: settings per slider (the paper's δ: 15 for one, 7 for several).
        sliders: how many are moved jointly, in turn (the paper's γ).
        search_scenes, search_samples: for finding each system's range.
        steps: denoising steps.
    """

    scenes: int = 64
    joint_scenes: int = 64
    samples: int = 15
    joint_samples: int = 7
    sliders: tuple[int, ...] = (1,)
    search_scenes: int = 12
    search_samples: int = 7
    steps: int = 12

    def __post_init__(self) -> None:
        for name in ("scenes", "joint_scenes", "search_scenes", "steps"):
            if getattr(self, name) < 1:
                raise SliderEditError(f"{name} is {getattr(self, name)}; give at least 1")
        for name in ("samples", "joint_samples", "search_samples"):
            if getattr(self, name) < 3:
                raise SliderEditError(f"{name} is {getattr(self, name)}; continuity needs at least 3 settings")
        if not self.sliders or not set(self.sliders) <= {1, 2, 3} or len(set(self.sliders)) < len(self.sliders):
            raise SliderEditError(f"sliders is {list(self.sliders)}; give some of 1, 2 and 3, each once")


@dataclass(frozen=True)
class Row:
    """One image of the run.

    Attributes:
        phase: `base` (the source picture as sample 0, the plain edit as 1), `search` or `bench`.
        low, high: ends of the swept range.
        knobs: settings, one per swept instruction.
        scores: of the image.
        seconds: per image, of the batch that it was rendered in.
    """

    phase: str
    system: str
    case: str
    sliders: int
    low: float
    high: float
    sample: int
    knobs: tuple[float, ...]
    scores: Scores
    seconds: float


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """CSV, one row per image; several knobs or attributes stand in one cell, separated by spaces."""
    with atomic_file(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(_COLUMNS)
        for row in rows:
            knobs, attributes = (" ".join(f"{v:.6g}" for v in values) for values in (row.knobs, row.scores.attributes))
            head = (row.phase, row.system, row.case, row.sliders, f"{row.low:g}", f"{row.high:g}", row.sample)
            writer.writerow((*head, knobs, attributes, f"{row.scores.elsewhere:.6g}", f"{row.seconds:.4g}"))


def read_rows(path: Path) -> list[Row]:
    """The rows of a CSV file that `write_rows` wrote."""

    def numbers(text: str) -> tuple[float, ...]:
        return tuple(map(float, text.split()))

    try:
        with path.open(newline="") as file:
            return [
                Row(
                    phase=r["phase"],
                    system=r["system"],
                    case=r["case"],
                    sliders=int(r["sliders"]),
                    low=float(r["low"]),
                    high=float(r["high"]),
                    sample=int(r["sample"]),
                    knobs=numbers(r["knobs"]),
                    scores=Scores(numbers(r["attributes"]), float(r["elsewhere"])),
                    seconds=float(r["seconds"]),
                )
                for r in csv.DictReader(file)
            ]
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise SliderEditError(
            f"{str(path)!r} cannot be read as the rows of an evaluation ({error}); delete it and run again"
        ) from None


def evenly(low: float, high: float, count: int) -> list[float]:
    """`count` settings from `low` to `high`."""
    return [low + (high - low) * i / (count - 1) for i in range(count)]


def lines(rows: Sequence[Row], index: int) -> list[list[float]]:
    """Sweeps of instruction `index`: its scores in the knob's order, one list per setting of the other knobs."""
    sweeps: dict[tuple[float, ...], list[tuple[float, float]]] = {}
    for row in rows:
        others = row.knobs[:index] + row.knobs[index + 1 :]
        sweeps.setdefault(others, []).append((row.knobs[index], row.scores.attributes[index]))
    return [[score for _, score in sorted(sweep)] for sweep in sweeps.values()]


def case_continuity(rows: Sequence[Row]) -> float:
    """Mean continuity of one case over its sliders, and for several over every setting of the others."""
    return statistics.fmean(continuity(line) for index in range(len(rows[0].knobs)) for line in lines(rows, index))


def usefulness(rows: Sequence[Row], source: float, edited: float) -> float:
    """What a range is chosen by: continuity × rank correlation × share of the way from source to plain edit that it covers.

    Without the correlation, which counts as 0 below 0, ranges would win in which the response turns back: folded, it fills its
    bins evenly.
    """
    reached = [min(1.0, max(0.0, (row.scores.attributes[0] - source) / (edited - source))) for row in rows]
    order = monotonicity([row.knobs[0] for row in rows], [row.scores.attributes[0] for row in rows])
    return case_continuity(rows) * max(0.0, order) * (max(reached) - min(reached))


class Benchmark:
    """One run in the folder `out`; a killed run continues where it stopped.

    Args:
        systems: by name, each made when it is first needed.
        reference: makes the plain edit, at its `plain` setting.
        config: settings; those of an unfinished run in `out` must be the same.
        out: gets `rows/` (one file per case, written whole), `rows.csv`, and pictures.
        fingerprints: of base and adapters, so that a continued run does not mix two.
    """

    def __init__(
        self,
        systems: Mapping[str, Callable[[], System]],
        reference: Callable[[], System],
        config: BenchmarkConfig,
        out: Path,
        fingerprints: Mapping[str, str],
    ) -> None:
        self.makers, self.reference, self.config, self.out = systems, reference, config, out
        self.made: dict[str, System] = {}
        self.settings = json.loads(json.dumps({"config": asdict(config), "fingerprints": dict(fingerprints)}))
        path = out / "settings.json"
        if path.exists():
            if json.loads(path.read_text()) != self.settings:
                raise SliderEditError(
                    f"{str(out)!r} holds an evaluation with other settings; continue with those or choose another --out"
                )
        else:
            with atomic_file(path) as temporary:
                temporary.write_text(json.dumps(self.settings, indent=2) + "\n")

    def system(self, name: str) -> System:
        if name not in self.made:
            self.made[name] = self.makers[name]()
        return self.made[name]

    def run(self, *, progress: bool = True) -> list[Row]:
        """Render and score everything that is not there yet; returns all rows and writes them to `rows.csv`."""
        config = self.config
        search = shapes_cases(config.search_scenes, 1, SEARCH_SEED)
        bench = {
            count: shapes_cases(config.scenes if count == 1 else config.joint_scenes, count, BENCH_SEED)
            for count in config.sliders
        }
        with tqdm(desc="evaluate", unit="image", disable=not progress, total=self._total(bench), smoothing=0.05) as bar:
            rows = [row for cases in (search, *bench.values()) for case in cases.values() for row in self._base(case, bar)]
            plain = {row.case: row.scores.attributes for row in rows if row.sample == 1}
            source = {row.case: row.scores.attributes for row in rows if row.sample == 0}
            for name in self.makers:
                best, best_value = None, -1.0
                for ends in self.system(name).ranges:
                    values = []
                    for case in search.values():
                        swept = self._sweep("search", name, case, ends, config.search_samples, bar)
                        values.append(usefulness(swept, source[case[0].name][0], plain[case[0].name][0]))
                        rows += swept
                    # The first, narrowest range wins a tie.
                    if statistics.fmean(values) > best_value:
                        best, best_value = ends, statistics.fmean(values)
                assert best is not None
                for count, cases in bench.items():
                    if count > 1 and not self.system(name).joint:
                        continue
                    samples = config.samples if count == 1 else config.joint_samples
                    for index, case in enumerate(cases.values()):
                        rows += self._sweep("bench", name, case, best, samples, bar, pictures=index < PICTURED)
        write_rows(self.out / "rows.csv", rows)
        return rows

    def _total(self, bench: Mapping[int, Mapping[str, Any]]) -> int:
        config, systems = self.config, [self.system(name) for name in self.makers]
        total = 2 * (config.search_scenes + sum(map(len, bench.values())))
        for system in systems:
            total += len(system.ranges) * config.search_scenes * config.search_samples
            for count, cases in bench.items():
                if count == 1 or system.joint:
                    total += len(cases) * (config.samples if count == 1 else config.joint_samples**count)
        return total

    def _base(self, case: tuple[Case, Example], bar: Any) -> list[Row]:
        """The source picture and the plain edit."""
        path = self.out / "rows" / f"base.{case[0].name}.csv"
        if not path.exists():
            system = self.reference()
            knobs = (system.plain,) * len(case[0].instructions)
            start = time.perf_counter()
            image = system.render(system.prepare(case[0]), [knobs], self.config.steps)
            seconds = time.perf_counter() - start
            scores = [source_scores([case[1]])[0], score_shapes(case[1], image)[0]]
            write_rows(
                path,
                [
                    Row("base", "base", case[0].name, len(knobs), 0, 1, sample, (float(sample),) * len(knobs), s, seconds)
                    for sample, s in enumerate(scores)
                ],
            )
        bar.update(2)
        return read_rows(path)

    def _sweep(
        self,
        phase: str,
        name: str,
        case: tuple[Case, Example],
        ends: tuple[float, float],
        samples: int,
        bar: Any,
        pictures: bool = False,
    ) -> list[Row]:
        """Every combination of `samples` settings of each slider of one case."""
        sliders = len(case[0].instructions)
        stem = f"{phase}.{name}.{case[0].name}.{ends[0]:g}.{ends[1]:g}"
        path, strip = self.out / "rows" / f"{stem}.csv", self.out / "pictures" / f"{name}.{case[0].name}.png"
        if not path.exists():
            system, settings = self.system(name), list(itertools.product(evenly(*ends, samples), repeat=sliders))
            start = time.perf_counter()
            images = system.render(system.prepare(case[0]), settings, self.config.steps)
            seconds = (time.perf_counter() - start) / len(settings)
            if pictures and sliders < 3:
                save_image(_contact_sheet(images, samples), strip)
            scores = score_shapes(case[1], images)
            write_rows(
                path,
                [
                    Row(phase, name, case[0].name, sliders, *ends, index, knobs, s, seconds)
                    for index, (knobs, s) in enumerate(zip(settings, scores, strict=True))
                ],
            )
        bar.update(samples**sliders)
        return read_rows(path)


def _contact_sheet(images: Tensor, columns: int) -> Image.Image:
    """Pictures `[N, 3, H, W]` in rows of `columns`, without gaps."""
    rows = [torch.cat(list(images[i : i + columns]), dim=2) for i in range(0, len(images), columns)]
    pixels = (torch.cat(rows, dim=1).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)
    return Image.fromarray(pixels.contiguous().numpy())
