"""Columns of the benches of full-size bases: which ones run, what happens when one fails, and what they are compared with.

Both benches (`gpu_model`, `gpu_e2e`) run one method after another on one transformer. A run may be cut off,
so results are written after every column, and a column that fails does not end the run.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
import torch._dynamo

from slideredit_rt.adapters import Adapter
from slideredit_rt.bench.clock import Clock
from slideredit_rt.bench.full_size import FullSize
from slideredit_rt.engines import Backend, Manifest, get_backend
from slideredit_rt.engines.inductor import Inductor, InductorEngine, engine_of
from slideredit_rt.modules import SliderBackbone
from slideredit_rt.quantization.linear import quantized_linears
from slideredit_rt.quantization.precisions import PRECISIONS

MAX_SLIDERS = 8
DEFAULT_PRECISION = "fp8"
QUANTISED_COLUMNS: Mapping[str, str] = {
    "frozen": "quantised base without an adapter",
    "ours ST, 3 sliders": "quantised base, the update added to its text rows",
    "ours GST": "quantised base, the update added to every row",
}


@dataclass(frozen=True)
class Selection:
    """Columns of a run.

    Attributes:
        precisions: Precisions that also have columns.
        names: Names of the columns to measure; None measures all of them.
    """

    precisions: tuple[str, ...] = ()
    names: frozenset[str] | None = None

    def wants(self, name: str) -> bool:
        """Return whether a column is measured."""
        return self.names is None or name in self.names

    @property
    def suffix(self) -> str:
        """End of the name of the results: a part of the columns does not replace results of all of them."""
        return "" if self.names is None else "_part"

    def options(self) -> str:
        """Return the command-line options that select these columns."""
        names = "" if self.names is None else " --columns " + " ".join(f'"{name}"' for name in sorted(self.names))
        return " ".join(["--precisions", *self.precisions]) + names


def quantised_columns(precisions: Iterable[str]) -> dict[str, str]:
    """Return the names of the columns of quantised bases, with what they are."""
    return {f"{name}, {precision}": about for precision in precisions for name, about in QUANTISED_COLUMNS.items()}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that select columns."""
    known = list(Inductor.quantised)
    parser.add_argument(
        "--precisions",
        nargs="*",
        choices=known,
        help=f"precisions of quantised bases to measure as well (default: {DEFAULT_PRECISION} if the GPU computes in it)",
    )
    parser.add_argument("--columns", nargs="+", metavar="NAME", help="columns to measure (default: all)")


def read_selection(
    parser: argparse.ArgumentParser, args: argparse.Namespace, columns: Iterable[str], card: str | None
) -> Selection:
    """Return the columns that the command line selects. Exits with status 2 if they cannot be measured.

    Args:
        parser: Parser, for the message.
        args: Parsed options.
        columns: Names of all columns besides those of quantised bases.
        card: Compute capability of the GPU, such as `sm90`; None for a CPU.
    """
    asked: list[str] | None = args.precisions
    if asked is None:
        asked = [DEFAULT_PRECISION] if card is not None and PRECISIONS[DEFAULT_PRECISION].runs_on(card) else []
    if card is not None and (refused := [name for name in asked if not PRECISIONS[name].runs_on(card)]):
        parser.error(f"argument --precisions: this GPU is {card}, which does not compute in {refused[0]}; leave it out")
    known = [*columns, *quantised_columns(asked)]
    if unknown := [name for name in args.columns or () if name not in known]:
        names = ", ".join(f'"{name}"' for name in known)
        parser.error(f"argument --columns: {unknown[0]!r} is not a column of this run; choose from {names}")
    return Selection(tuple(dict.fromkeys(asked)), frozenset(args.columns) if args.columns else None)


def card_of(device: torch.device) -> str | None:
    """Return the compute capability of a GPU, such as `sm90`; None for a CPU."""
    return "sm{}{}".format(*torch.cuda.get_device_capability(device)) if device.type == "cuda" else None


@dataclass(kw_only=True)
class Column(ABC):
    """Result of one method.

    Attributes:
        name: Name of the column.
        precision: Precision of the quantised base; None for bfloat16.
        peak_gib: Peak device memory of tensors, including the weights; None on a CPU.
        ratio_to_frozen: Ratio of the step to that of the frozen backbone in the same precision, the median of its columns.
        speed_up: Step of the frozen backbone in bfloat16 divided by this one; None for columns in bfloat16.
        peak_share: Peak memory divided by that of the frozen backbone in bfloat16; None for columns in bfloat16 and on a CPU.
    """

    name: str
    precision: str | None = None
    peak_gib: float | None = None
    ratio_to_frozen: float | None = None
    speed_up: float | None = None
    peak_share: float | None = None

    @property
    @abstractmethod
    def step(self) -> float:
        """Time of a step, in any unit."""


C = TypeVar("C", bound=Column)


def compare(columns: Sequence[Column]) -> None:
    """Set what columns are compared with, as far as the frozen backbone was measured."""
    frozen = [column for column in columns if column.name.startswith("frozen")]
    for column in columns:
        if steps := [limit.step for limit in frozen if limit.precision == column.precision]:
            column.ratio_to_frozen = column.step / statistics.median(steps)
        unquantised = [limit for limit in frozen if limit.precision is None]
        if column.precision is not None and unquantised:
            column.speed_up = statistics.median(limit.step for limit in unquantised) / column.step
            if column.peak_gib is not None and unquantised[0].peak_gib is not None:
                column.peak_share = column.peak_gib / unquantised[0].peak_gib


def engine_for(backbone: SliderBackbone, max_batch: int) -> InductorEngine:
    """Create the engine that `slideredit-rt build --backend inductor` makes, around a loaded transformer.

    It has the lowering that the build selects. The next column may need a new transformer (`spends_transformer`).
    """
    return engine_of(backbone, manifest_of(backbone, get_backend("inductor"), max_batch))


def manifest_of(backbone: SliderBackbone, backend: Backend, max_batch: int) -> Manifest:
    """Describe an engine that is not in a folder, with the lowering that the build selects."""
    family = backbone.family
    config: Any = backbone.transformer.config
    dtype = str(next(backbone.transformer.parameters()).dtype).removeprefix("torch.")
    quantised = Counter(linear.precision for linear in quantized_linears(backbone.transformer).values())
    return Manifest(
        family=family.name,
        base={},
        adapter=None,
        backend=backend.name,
        backend_version=backend.version(),
        lowering=backend.default_lowering(backbone.kind, separate=bool(quantised)),
        targets=[],
        max_batch=max_batch,
        max_sliders=MAX_SLIDERS,
        config={},
        inputs=[*family.input_specs(config, dtype), *backbone.slider_specs()],
        outputs=family.output_specs(config, dtype),
        files={},
        created="",
        versions={},
        quantised=dict(quantised),
    )


def spends_transformer(engine: InductorEngine) -> bool:
    """Return whether an engine has changed its transformer for good: folded and quantised ones cannot be restored."""
    return engine.manifest.lowering == "folded" or bool(engine.manifest.quantised)


class ColumnBench(ABC, Generic[C]):
    """Runner of columns on one transformer.

    Args:
        base: Base with random weights.
        selection: Columns to measure.
        holder: Object whose attribute `transformer` the columns run; None is replaced by a transformer when it is needed.
        small: Use the small modules.
        device: Device to run on.

    Attributes:
        columns: Measured columns.
        left_out: Names of columns for which there was no time.
        failed: Reasons of columns that failed, by name.
        after_column: Function that is called after every column.
    """

    def __init__(self, base: FullSize, selection: Selection, holder: Any, *, small: bool, device: torch.device) -> None:
        self.base, self.selection, self.small, self.device, self.family = base, selection, small, device, base.family
        self.clock = Clock(device)
        self.columns: list[C] = []
        self.left_out: list[str] = []
        self.failed: dict[str, str] = {}
        self.after_column: Callable[[], object] = lambda: None
        self._holder = holder
        self._precision: str | None = None

    @abstractmethod
    def tasks(self) -> Iterable[tuple[tuple[str, ...], Callable[[], object]]]:
        """Return the names of columns that are measured together, with the function that does it, in order."""

    def use(self, precision: str | None = None) -> Any:
        """Return a transformer in a precision with the usual weights, the current one if it is still that.

        There may be no memory for two, so the old one goes first.
        """
        if self._holder.transformer is None or self._precision != precision:
            self.drop()
            gc.collect()
            if self.clock.cuda:
                torch.cuda.empty_cache()  # for the memory pools of graphs, which cannot use the blocks of old weights
            self._holder.transformer = self.base.transformer(small=self.small, device=self.device, precision=precision)
            self._precision = precision
        return self._holder.transformer

    def drop(self) -> None:
        """Forget the transformer."""
        self._holder.transformer = None

    @contextmanager
    def engine(self, adapter: Adapter | None, max_batch: int, precision: str | None = None) -> Iterator[InductorEngine]:
        """Open an engine around a transformer. On exit, remove it and everything compiled for it."""
        torch._dynamo.reset()
        backbone = SliderBackbone(self.family, self.use(precision), adapter)
        engine = engine_for(backbone, max_batch)
        try:
            yield engine
        finally:
            engine.close()
            backbone.remove()
            del backbone
            if spends_transformer(engine):
                self.drop()

    def add(self, column: C) -> None:
        """Add a measured column."""
        self.columns.append(column)
        compare(self.columns)
        self.after_column()

    def attempt(self, names: Sequence[str], measure: Callable[[], object]) -> None:
        """Measure columns that are wanted. If that fails, note the reason and go on with another transformer.

        Args:
            names: Names of the columns.
            measure: Function that measures those of them that are wanted.
        """
        wanted = [name for name in names if self.selection.wants(name)]
        if not wanted:
            return
        try:
            measure()
        except Exception as error:
            known = {*(column.name for column in self.columns), *self.left_out, *self.failed}
            lines = str(error).strip().splitlines()
            reason = ": ".join([type(error).__name__, *lines[:1]])
            self.failed |= dict.fromkeys([name for name in wanted if name not in known] or wanted[-1:], reason)
            sys.stderr.write(f"{', '.join(wanted)}: failed: {reason}\n")
            self.drop()  # it may be half changed
        self.after_column()

    def run(self) -> None:
        """Measure the columns."""
        for names, measure in self.tasks():
            self.attempt(names, measure)

    def failures(self, cells: int) -> list[str]:
        """Return a row of a Markdown table for each failure.

        Args:
            cells: Number of cells between the name and the note.
        """
        return [
            "| " + " | ".join([name, *["–"] * cells, "failed: " + reason.replace("|", "\\|")]) + " |"
            for name, reason in self.failed.items()
        ]
