"""A resumable run of the benchmark: the same images, noise and steps for every system, one row per image."""

from __future__ import annotations

import csv
import itertools
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from slideredit_rt.errors import SliderEditError
from slideredit_rt.evaluation.dataset import Case, Dataset, Scores
from slideredit_rt.evaluation.measures import continuity, coverage, monotonicity
from slideredit_rt.files import atomic_file
from slideredit_rt.images import save_image
from slideredit_rt.strength import linear_sweep

if TYPE_CHECKING:
    # Reading a report does not need engines and models, whose packages take seconds to import.
    from slideredit_rt.evaluation.setup import Setup
    from slideredit_rt.evaluation.systems import System

SHOWN_CASES = 3
"""Number of cases whose images are kept, for each number of sliders."""
_COLUMNS = ("phase", "system", "case", "sliders", "low", "high", "sample", "knobs", "seconds")
_ATTRIBUTE, _DISTANCE = "attribute ", "distance "


@dataclass(frozen=True)
class BenchmarkConfig:
    """Settings of a run.

    Attributes:
        sliders: Numbers of sliders that move jointly (the paper's γ), each a part of the run.
        scenes: Cases for each number of sliders, or one number for all. A case with K > 1 sliders takes `joint_samples`
            to the power of K images.
        samples: Settings of a single slider (the paper's δ, 15).
        joint_samples: Settings per slider when several move (the paper's δ, 7).
        search_scenes: Cases of the search for each system's range.
        search_samples: Settings per case of that search.
        steps: Denoising steps.

    Raises:
        SliderEditError: A number is out of range.
    """

    sliders: tuple[int, ...] = (1,)
    scenes: tuple[int, ...] = (64,)
    samples: int = 15
    joint_samples: int = 7
    search_scenes: int = 12
    search_samples: int = 7
    steps: int = 12

    def __post_init__(self) -> None:
        counts = {"search_scenes": self.search_scenes, "steps": self.steps, "scenes": min(self.scenes, default=0)}
        for name, count in counts.items():
            if count < 1:
                raise SliderEditError(f"{name} is {count}; pass at least 1")
        for name in ("samples", "joint_samples", "search_samples"):
            if getattr(self, name) < 3:
                raise SliderEditError(f"{name} is {getattr(self, name)}; pass at least 3, which continuity needs")
        if not self.sliders or not set(self.sliders) <= {1, 2, 3} or len(set(self.sliders)) < len(self.sliders):
            raise SliderEditError(f"sliders is {list(self.sliders)}; pass one or more of 1, 2 and 3, each once")
        if len(self.scenes) not in (1, len(self.sliders)):
            raise SliderEditError(
                f"scenes is {list(self.scenes)} for {list(self.sliders)} sliders; pass one for each, or one for all"
            )

    def cases(self) -> dict[int, int]:
        """Return the number of cases for each number of sliders."""
        return dict(zip(self.sliders, self.scenes * (len(self.sliders) // len(self.scenes)), strict=True))


@dataclass(frozen=True)
class Row:
    """One image of the run.

    Attributes:
        phase: `base` (the source image as sample 0, the plain edit as 1), `search` or `bench`.
        system: Name of the system.
        case: Name of the case.
        sliders: Number of swept instructions.
        low: Off end of the swept range.
        high: Far end of the swept range.
        sample: Index of the image in its sweep.
        knobs: Settings, one per swept instruction.
        scores: Scores of the image.
        seconds: Rendering time of the sweep divided by its number of images.
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
    """Write a CSV file with one row per image and one column per scorer.

    The knobs of a joint sweep share one cell, separated by spaces, and so do their attribute scores. An undefined distance
    is an empty cell.
    """
    attributes, distances = list(rows[0].scores.attributes), list(rows[0].scores.distances)
    with atomic_file(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow((*_COLUMNS, *(_ATTRIBUTE + name for name in attributes), *(_DISTANCE + name for name in distances)))
        for row in rows:
            shown = [" ".join(f"{v:.6g}" for v in row.scores.attributes[name]) for name in attributes]
            apart = [row.scores.distances[name] for name in distances]
            head = (row.phase, row.system, row.case, row.sliders, f"{row.low:g}", f"{row.high:g}", row.sample)
            knobs = " ".join(f"{v:.6g}" for v in row.knobs)
            writer.writerow((*head, knobs, f"{row.seconds:.4g}", *shown, *("" if d is None else f"{d:.6g}" for d in apart)))


def read_rows(path: Path) -> list[Row]:
    """Read a CSV file written by `write_rows`.

    Raises:
        SliderEditError: The file cannot be read.
    """

    def numbers(text: str) -> tuple[float, ...]:
        return tuple(map(float, text.split()))

    def scores(cells: Mapping[str, str]) -> Scores:
        columns = list(cells)
        attributes = {c.removeprefix(_ATTRIBUTE): numbers(cells[c]) for c in columns if c.startswith(_ATTRIBUTE)}
        distances = {
            c.removeprefix(_DISTANCE): float(cells[c]) if cells[c] else None for c in columns if c.startswith(_DISTANCE)
        }
        if not attributes:
            raise ValueError("it has no scores")
        return Scores(attributes, distances)

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
                    scores=scores(r),
                    seconds=float(r["seconds"]),
                )
                for r in csv.DictReader(file)
            ]
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise SliderEditError(
            f"{str(path)!r} cannot be read as the rows of an evaluation ({error}); delete it and run again"
        ) from None


def lines(rows: Sequence[Row], index: int, scorer: str) -> list[list[float]]:
    """Return the sweeps of instruction `index`: scores in the order of its knob, one list per setting of the other knobs."""
    sweeps: dict[tuple[float, ...], list[tuple[float, float]]] = {}
    for row in rows:
        others = row.knobs[:index] + row.knobs[index + 1 :]
        sweeps.setdefault(others, []).append((row.knobs[index], row.scores.attributes[scorer][index]))
    return [[score for _, score in sorted(sweep)] for sweep in sweeps.values()]


def case_continuity(rows: Sequence[Row], scorer: str) -> float:
    """Return the mean continuity of one case over its sliders and over every setting of the other sliders."""
    return statistics.fmean(continuity(line) for index in range(len(rows[0].knobs)) for line in lines(rows, index, scorer))


def usefulness(rows: Sequence[Row], source: Scores, edited: Scores) -> float:
    """Return the criterion by which ranges are chosen: continuity × monotonicity × coverage, averaged over scorers.

    A negative monotonicity counts as 0. Without that factor, the search would prefer ranges in which the response turns
    back, because continuity ignores order and such a response still fills its bins evenly.
    """
    values = []
    for scorer in source.attributes:
        shown = [row.scores.attributes[scorer][0] for row in rows]
        covered = coverage(shown, source.attributes[scorer][0], edited.attributes[scorer][0])
        order = monotonicity([row.knobs[0] for row in rows], shown)
        values.append(case_continuity(rows, scorer) * max(0.0, order) * covered)
    return statistics.fmean(values)


class Benchmark:
    """One run in the folder `setup.out`. A killed run continues where it stopped.

    The folder receives `rows/` (one file per sweep, written atomically), `rows.csv` and images.

    Args:
        setup: Base, adapters and engines.
        systems: Systems to compare, by the name of their variant.
        reference: Function that makes the system whose `plain` setting renders the plain edit.
        dataset: Images and scorers.
        config: Settings. They must equal those of an unfinished run in the folder.
        fingerprints: Fingerprints of base, adapters and data, which must also be equal to continue a run.

    Raises:
        SliderEditError: The folder contains a run with other settings.
    """

    def __init__(
        self,
        setup: Setup,
        systems: Mapping[str, type[System]],
        reference: Callable[[], System],
        dataset: Dataset,
        config: BenchmarkConfig,
        fingerprints: Mapping[str, str],
    ) -> None:
        self.setup, self.systems, self.reference = setup, systems, reference
        self.dataset, self.config, self.out = dataset, config, setup.out
        self._made: dict[str, System] = {}
        self.settings = json.loads(json.dumps({"config": asdict(config), "fingerprints": dict(fingerprints)}))
        path = self.out / "settings.json"
        if path.exists():
            if json.loads(path.read_text()) != self.settings:
                raise SliderEditError(
                    f"{str(self.out)!r} contains an evaluation with other settings; use the same settings or another --out"
                )
        else:
            with atomic_file(path) as temporary:
                temporary.write_text(json.dumps(self.settings, indent=2) + "\n")

    def _system(self, name: str) -> System:
        """Return a system, and keep only the latest: systems run one after the other, and a base may be large."""
        if name not in self._made:
            self._made = {name: self.systems[name].make(self.setup, name)}
        return self._made[name]

    def run(self, *, progress: bool = True) -> list[Row]:
        """Render and score everything that is missing, write `rows.csv` and return all rows."""
        config = self.config
        search = self.dataset.cases("search", config.search_scenes, 1)
        bench = {sliders: self.dataset.cases("bench", count, sliders) for sliders, count in config.cases().items()}
        with tqdm(desc="evaluate", unit="image", disable=not progress, total=self._total(bench), smoothing=0.05) as bar:
            rows = [row for cases in (search, *bench.values()) for case in cases for row in self._base(case, bar)]
            plain = {row.case: row.scores for row in rows if row.sample == 1}
            source = {row.case: row.scores for row in rows if row.sample == 0}
            for name, system in self.systems.items():
                best, best_value = None, -1.0
                for ends in system.ranges:
                    values = []
                    for case in search:
                        swept = self._sweep("search", name, case, ends, config.search_samples, bar)
                        values.append(usefulness(swept, source[case.name], plain[case.name]))
                        rows += swept
                    # In a tie the first range wins, which is the narrowest.
                    if statistics.fmean(values) > best_value:
                        best, best_value = ends, statistics.fmean(values)
                assert best is not None
                for count, cases in bench.items():
                    if count > 1 and not system.joint:
                        continue
                    samples = config.samples if count == 1 else config.joint_samples
                    for index, case in enumerate(cases):
                        rows += self._sweep("bench", name, case, best, samples, bar, show=index < SHOWN_CASES)
        write_rows(self.out / "rows.csv", rows)
        return rows

    def _total(self, bench: Mapping[int, Sequence[Case]]) -> int:
        config = self.config
        total = 2 * (config.search_scenes + sum(map(len, bench.values())))
        for system in self.systems.values():
            total += len(system.ranges) * config.search_scenes * config.search_samples
            for count, cases in bench.items():
                if count == 1 or system.joint:
                    total += len(cases) * (config.samples if count == 1 else config.joint_samples**count)
        return total

    def _base(self, case: Case, bar: Any) -> list[Row]:
        """Render and score the plain edit, score the source image, and return both rows."""
        path = self.out / "rows" / f"base.{case.name}.csv"
        if not path.exists():
            system = self.reference()
            knobs = (system.plain,) * len(case.instructions)
            start = time.perf_counter()
            image = system.render(system.prepare(case), [knobs], self.config.steps)
            seconds = time.perf_counter() - start
            scores = [self.dataset.source_scores(case), self.dataset.score(case, image)[0]]
            write_rows(
                path,
                [
                    Row("base", "base", case.name, len(knobs), 0, 1, sample, (float(sample),) * len(knobs), s, seconds)
                    for sample, s in enumerate(scores)
                ],
            )
        bar.update(2)
        return read_rows(path)

    def _sweep(
        self,
        phase: str,
        name: str,
        case: Case,
        ends: tuple[float, float],
        samples: int,
        bar: Any,
        show: bool = False,
    ) -> list[Row]:
        """Render and score every combination of `samples` settings of each slider of one case."""
        sliders = len(case.instructions)
        path = self.out / "rows" / f"{phase}.{name}.{case.name}.{ends[0]:g}.{ends[1]:g}.csv"
        if not path.exists():
            system, settings = self._system(name), list(itertools.product(linear_sweep(*ends, samples), repeat=sliders))
            start = time.perf_counter()
            images = system.render(system.prepare(case), settings, self.config.steps)
            seconds = (time.perf_counter() - start) / len(settings)
            if show and sliders < 3:
                save_image(_contact_sheet(images, samples), self.out / "pictures" / f"{name}.{case.name}.png")
            scores = self.dataset.score(case, images)
            write_rows(
                path,
                [
                    Row(phase, name, case.name, sliders, *ends, index, knobs, s, seconds)
                    for index, (knobs, s) in enumerate(zip(settings, scores, strict=True))
                ],
            )
        bar.update(samples**sliders)
        return read_rows(path)


def _contact_sheet(images: Tensor, columns: int) -> Image.Image:
    """Arrange images `[N, 3, H, W]` in rows of `columns`, without gaps."""
    rows = [torch.cat(list(images[i : i + columns]), dim=2) for i in range(0, len(images), columns)]
    pixels = (torch.cat(rows, dim=1).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)
    return Image.fromarray(pixels.contiguous().numpy())
