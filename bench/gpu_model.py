"""One denoising step of a full-size base on a GPU: sliders, the frozen backbone and other methods (`make gpu-model`).

The transformer has random bfloat16 weights, created on the device, because speed and memory do not depend on their values.
Every column runs the same transformer with a different adapter through the same engine, with `torch.compile`d blocks in one
CUDA graph. The frozen backbone is measured first and last. Columns such as "ours GST, fp8" run a quantised transformer with the
same random weights, in every precision of `--precisions`. Results are written after each column, and a column that fails does
not end the run. `--rehearse` runs the same code on small blocks, also on a CPU,
where dynamo captures the graphs but does not compile them. Times of a rehearsal are meaningless.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn

try:
    import peft
    from peft.tuners.lora import LoraLayer

    from slideredit_rt.adapters import Adapter
    from slideredit_rt.bench import columns
    from slideredit_rt.bench.clock import compiled_graphs
    from slideredit_rt.bench.columns import ColumnBench, Selection, card_of, quantised_columns, read_selection
    from slideredit_rt.bench.full_size import DTYPE, FULL_SIZES, FluxKontextBase, FullSize, fill
    from slideredit_rt.bench.results import Mark, save_run, verdicts
    from slideredit_rt.engines import inductor
    from slideredit_rt.engines.inductor import InductorEngine
    from slideredit_rt.errors import SliderEditError
    from slideredit_rt.families import KINDS, Family, Kind
except ModuleNotFoundError as missing:
    sys.exit(f"gpu_model: the package {missing.name} is missing; install slideredit-rt's dependencies into GPU_PYTHON")

RANK, SCALE = 16, 0.5
BATCH = 4
SETTINGS = 20
SWEEP, SWEEP_STEPS = 15, 4
COLUMNS = {
    "frozen": "no adapter, the lower limit",
    "ours ST, 1 slider": "16 text rows scaled",
    "ours ST, 3 sliders": "8 + 16 + 32 text rows scaled",
    "ours GST": "every row scaled, projections folded",
    "PEFT GST": "`peft.inject_adapter_in_model`, no mask",
    "published ST": "a masked LoRA per linear: the update of every row, multiplied by a bfloat16 scale and a mask",
    "merged GST": "W + scale · BA written into the weights",
    "frozen, again": "drift of the card",
}
EXTRAS = ("sweep", "batch of 4")
"""Measurements beside the columns, which `--columns` also selects."""


@dataclass(frozen=True)
class Size:
    """Size of the measurement: rows of a request, rows of each slider, and timed steps per column."""

    text_rows: int
    image_rows: int
    spans: tuple[int, int, int]
    steps: int


@dataclass(kw_only=True)
class Column(columns.Column):
    """Result of one method of running the backbone (see `columns.Column`).

    Attributes:
        milliseconds: Median time of a step.
        first_call_seconds: Time of compilation, capture and one step.
        compiled_graphs: Number of graphs that dynamo captured.
        strength_change_ms: Time to change every strength; None without strengths.
        recompilations: Recompilations in the steps after a change.
        allocations: Allocations of device memory over 20 changes with a step after each; None on a CPU and for other methods.
    """

    milliseconds: float
    first_call_seconds: float
    compiled_graphs: int
    strength_change_ms: float | None = None
    recompilations: int | None = None
    allocations: int | None = None

    @property
    def step(self) -> float:
        return self.milliseconds


def random_adapter(family: Family, transformer: nn.Module, kind: Kind) -> Adapter:
    """Create a random adapter of rank 16 on the usual linears, in the transformer's dtype and on its device."""
    pairs = {}
    for name, linear in transformer.named_modules():
        if isinstance(linear, nn.Linear) and family.targets(kind).fullmatch(name):
            a, b = linear.weight.new_empty(RANK, linear.in_features), linear.weight.new_empty(linear.out_features, RANK)
            fill(f"{name}.lora_A", a)
            fill(f"{name}.lora_B", b)
            pairs[name] = (a, b * 0.1)
    return Adapter(family.name, kind, RANK, pairs, f"random {kind}")


def random_inputs(family: Family, config: Any, size: Size, batch: int, device: torch.device) -> dict[str, Tensor]:
    """Create the backbone's own inputs on the device."""
    made = family.random_inputs(config, batch, size.text_rows, size.image_rows, torch.Generator().manual_seed(0))
    return {name: tensor.to(device).contiguous() for name, tensor in made.items()}


def slider_inputs(kind: Kind, size: Size, spans: tuple[int, ...], batch: int, device: torch.device) -> dict[str, Tensor]:
    """Create slider inputs with alpha 0.5 and a span of text rows per slider, or every row for GST."""
    rows = size.text_rows + (size.image_rows if kind == "gst" else 0)
    mask = torch.zeros(batch, len(spans), rows, dtype=torch.bool)
    start = 0 if kind == "gst" else 2
    for slider, span in enumerate(spans):
        mask[:, slider, start : start + span] = True
        start += span
    return {"alpha": torch.full((batch, len(spans)), SCALE, device=device), "token_mask": mask.to(device)}


class PublishedLinear(nn.Module):
    """The authors' released ST module, in the base's dtype: it computes the update of every row, then scales and masks it.

    `scale` is bfloat16 `[B, S, 1]`, `mask` is bool `[B, S]`. A pass may have fewer rows than S, such as that of a shorter
    negative prompt.
    """

    def __init__(self, base: nn.Linear, lora_a: Tensor, lora_b: Tensor, scale: Tensor, mask: Tensor) -> None:
        super().__init__()
        self.base, self.scale, self.mask = base, scale, mask
        self.lora_A = nn.Parameter(lora_a, requires_grad=False)
        self.lora_B = nn.Parameter(lora_b, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, S, K]` to `[B, S, N]`."""
        update = nn.functional.linear(nn.functional.linear(x, self.lora_A), self.lora_B) * self.scale[:, : x.shape[1]]
        y: Tensor = self.base(x) + update * self.mask[:, : x.shape[1]].to(update.dtype).unsqueeze(-1)
        return y


def replace(transformer: nn.Module, name: str, module: nn.Module) -> None:
    """Replace a submodule."""
    owner, _, leaf = name.rpartition(".")
    setattr(transformer.get_submodule(owner), leaf, module)


@contextmanager
def published(transformer: nn.Module, adapter: Adapter, size: Size) -> Iterator[Callable[[float], None]]:
    """Install the published module on every linear of an ST adapter, and yield a function that sets the strength."""
    device = next(transformer.parameters()).device
    mask = slider_inputs("st", size, (sum(size.spans),), 1, device)["token_mask"][:, 0]
    scale = torch.full((1, size.text_rows, 1), SCALE, dtype=DTYPE, device=device)
    linears = {name: transformer.get_submodule(name) for name in adapter.pairs}

    def set_strength(alpha: float) -> None:
        scale.fill_(alpha)

    for name, linear in linears.items():
        assert isinstance(linear, nn.Linear)
        replace(transformer, name, PublishedLinear(linear, *adapter.pairs[name], scale, mask))
    try:
        yield set_strength
    finally:
        for name, linear in linears.items():
            replace(transformer, name, linear)


@contextmanager
def peft_adapter(transformer: nn.Module, adapter: Adapter) -> Iterator[Callable[[float], None]]:
    """Install PEFT's layers on every linear of an adapter, and yield a function that sets the strength."""
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(adapter.pairs), init_lora_weights=False)
    peft.inject_adapter_in_model(config, transformer)
    layers = {name: m for name, m in transformer.named_modules() if isinstance(m, LoraLayer)}
    for name, layer in layers.items():
        for part, tensor in zip((layer.lora_A, layer.lora_B), adapter.pairs[name], strict=True):
            part["default"].weight = nn.Parameter(tensor, requires_grad=False)

    def set_strength(alpha: float) -> None:
        for layer in layers.values():
            layer.set_scale("default", alpha)

    set_strength(SCALE)
    try:
        yield set_strength
    finally:
        for name, layer in layers.items():
            replace(transformer, name, layer.get_base_layer())


@contextmanager
def merged(transformer: nn.Module, adapter: Adapter) -> Iterator[Callable[[float], None]]:
    """Merge the update into the weights, yield a function that sets the strength, and restore the weights on exit."""
    current = 0.0

    @torch.no_grad()
    def set_strength(alpha: float) -> None:
        nonlocal current
        for name, (a, b) in adapter.pairs.items():
            transformer.get_parameter(f"{name}.weight").addmm_(b, a, alpha=alpha - current)
        current = alpha

    set_strength(SCALE)
    try:
        yield set_strength
    finally:
        with torch.no_grad():
            for name in adapter.pairs:
                fill(f"{name}.weight", transformer.get_parameter(f"{name}.weight"))


class Bench(ColumnBench[Column]):
    """Runner of all columns on one transformer.

    Args:
        base: Base to measure.
        size: Size of the requests.
        selection: Columns to measure.
        small: Use the small transformer.
        device: Device to run on.
    """

    def __init__(self, base: FullSize, size: Size, selection: Selection, *, small: bool, device: torch.device) -> None:
        super().__init__(base, selection, SimpleNamespace(transformer=None), small=small, device=device)
        self.size, self.cuda = size, self.clock.cuda
        transformer = self.use()
        self.config = transformer.config
        self.parameters = sum(p.numel() for p in transformer.parameters())
        self.inputs = random_inputs(self.family, self.config, size, 1, self.device)
        self.adapters: dict[str, Adapter] = {kind: random_adapter(self.family, transformer, kind) for kind in KINDS}
        self.extra: dict[str, Any] = {}

    def milliseconds(self, call: Callable[[], object]) -> float:
        """Return the time of one call, by CUDA events, or by the clock on a CPU."""
        if not self.cuda:
            return 1e3 * self.clock.seconds(call)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end))

    def allocations(self) -> int:
        """Return the number of allocations of device memory so far; 0 on a CPU."""
        return int(torch.cuda.memory_stats(self.device)["allocation.all.allocated"]) if self.cuda else 0

    def column(self, name: str, engine: InductorEngine, inputs: Mapping[str, Tensor], precision: str | None = None) -> Column:
        """Compile, warm up and time a step, and return its column."""
        self.clock.forget_peak()
        before = compiled_graphs()
        first = self.clock.seconds(lambda: engine(inputs))
        for _ in range(2):
            engine(inputs)
        times = [self.milliseconds(lambda: engine(inputs)) for _ in range(self.size.steps)]
        column = Column(
            name=name,
            precision=precision,
            milliseconds=statistics.median(times),
            first_call_seconds=first,
            compiled_graphs=compiled_graphs() - before,
            peak_gib=self.clock.peak_gib(),
        )
        self.add(column)
        sys.stderr.write(f"{name}: {column.milliseconds:.3f} ms a step, first call {first:.1f} s\n")
        return column

    def frozen(self, name: str, precision: str | None = None) -> None:
        """Measure the frozen backbone."""
        with self.engine(None, BATCH, precision) as engine:
            self.column(name, engine, self.inputs, precision)

    def spans(self, kind: Kind) -> tuple[int, ...]:
        """Return the rows of each slider: three sliders for ST, one with every row for GST."""
        return self.size.spans if kind == "st" else (self.size.text_rows + self.size.image_rows,)

    def adapted(self, name: str, kind: Kind, precision: str | None = None) -> None:
        """Measure an adapter with the sliders of `spans`."""
        with self.engine(self.adapters[kind], BATCH, precision) as engine:
            inputs = self.inputs | slider_inputs(kind, self.size, self.spans(kind), 1, self.device)
            self.move(self.column(name, engine, inputs, precision), engine, inputs)

    def st(self) -> None:
        """Measure ST with one and three sliders, a sweep and a batch with mixed sliders, which share compiled code."""
        with self.engine(self.adapters["st"], BATCH) as engine:
            for name, spans in (("ours ST, 1 slider", self.size.spans[1:2]), ("ours ST, 3 sliders", self.size.spans)):
                if self.selection.wants(name):
                    inputs = self.inputs | slider_inputs("st", self.size, spans, 1, self.device)
                    self.move(self.column(name, engine, inputs), engine, inputs)
            if self.selection.wants("sweep"):
                self.sweep(engine, self.inputs | slider_inputs("st", self.size, self.size.spans, 1, self.device))
            if self.selection.wants("batch of 4"):
                self.mixed_batch(engine)

    def move(self, column: Column, engine: InductorEngine, inputs: dict[str, Tensor]) -> None:
        """Measure a change of every strength, which only writes the caller's `alpha` on the device."""
        settings = torch.rand(SETTINGS, *inputs["alpha"].shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
        times = [1e3 * self.clock.seconds(partial(inputs["alpha"].copy_, new)) for new in settings]
        engine(inputs)
        compiled, allocated, reference = compiled_graphs(), self.allocations(), engine(inputs).data_ptr()
        for new in settings:
            inputs["alpha"].copy_(new)
            same = engine(inputs).data_ptr() == reference
            assert same, "the output of an engine has moved in memory"
        column.strength_change_ms = statistics.median(times)
        column.recompilations = compiled_graphs() - compiled
        column.allocations = self.allocations() - allocated if self.cuda else None

    def mixed_batch(self, engine: InductorEngine) -> None:
        """Compare a batch of four equal slider settings with a batch of four different ones, in turns."""
        inputs = random_inputs(self.family, self.config, self.size, BATCH, self.device)
        equal = inputs | slider_inputs("st", self.size, self.size.spans, BATCH, self.device)
        mixed = {name: tensor.clone() for name, tensor in equal.items()}
        for row in range(BATCH):
            # Each request has other rows and other strengths, and some have fewer sliders.
            mixed["token_mask"][row] = mixed["token_mask"][row].roll(3 * row, dims=-1)
            mixed["token_mask"][row, : min(row, 2)] = False
            mixed["alpha"][row] = 0.25 * row - 0.5
        self.clock.forget_peak()
        engine(equal)
        before = compiled_graphs()
        times: dict[str, list[float]] = {"uniform": [], "mixed": []}
        for _ in range(self.size.steps):
            for name, batch in (("uniform", equal), ("mixed", mixed)):
                times[name].append(self.milliseconds(partial(engine, batch)))
        medians = {name: statistics.median(found) for name, found in times.items()}
        self.extra["batch of 4"] = {
            "uniform_ms": round(medians["uniform"], 3),
            "mixed_ms": round(medians["mixed"], 3),
            "mixed_over_uniform": round(medians["mixed"] / medians["uniform"], 4),
            "recompilations": compiled_graphs() - before,
            "peak_gib": None if (peak := self.clock.peak_gib()) is None else round(peak, 2),
        }

    def sweep(self, engine: InductorEngine, inputs: dict[str, Tensor]) -> None:
        """Compare a sweep of 15 strengths that encodes once with one that encodes for every image. For FLUX only."""
        if not isinstance(self.base, FluxKontextBase):
            self.extra["sweep"] = {"note": "measured for FLUX.1-Kontext only; make gpu-e2e measures whole edits of every base"}
            return
        encode, decode = flux_calls(self.base, self.size, small=self.small, device=self.device)

        def denoise() -> None:
            for _ in range(SWEEP_STEPS):
                engine(inputs)

        def shared() -> None:
            encode()
            for value in range(SWEEP):
                inputs["alpha"].fill_(value / SWEEP)
                denoise()
                decode()

        def separate() -> None:
            for value in range(SWEEP):
                encode()
                inputs["alpha"].fill_(value / SWEEP)
                denoise()
                decode()

        encode()
        decode()
        found = {"shared_s": self.clock.seconds(shared), "separate_s": self.clock.seconds(separate)}
        self.extra["sweep"] = {name: round(value, 3) for name, value in found.items()} | {
            "separate_over_shared": round(found["separate_s"] / found["shared_s"], 4),
            "encode_ms": round(1e3 * self.clock.seconds(encode), 3),
            "what": f"{SWEEP} strengths, {SWEEP_STEPS} steps each, batch 1; eager T5 and CLIP text encoders, VAE encoder and "
            "decoder with random weights, as wide as FLUX's; the decoder runs on constant latents",
        }

    def published(self) -> None:
        """Measure the published module."""
        with published(self.use(), self.adapters["st"], self.size) as set_strength, self.engine(None, BATCH) as engine:
            self.set(self.column("published ST", engine, self.inputs), engine, set_strength)

    def peft(self) -> None:
        """Measure PEFT."""
        with peft_adapter(self.use(), self.adapters["gst"]) as set_strength, self.engine(None, BATCH) as engine:
            self.set(self.column("PEFT GST", engine, self.inputs), engine, set_strength, stale=True)

    def merged(self) -> None:
        """Measure merged weights."""
        with merged(self.use(), self.adapters["gst"]) as set_strength, self.engine(None, BATCH) as engine:
            self.set(self.column("merged GST", engine, self.inputs), engine, set_strength)

    def set(self, column: Column, engine: InductorEngine, set_strength: Callable[[float], None], stale: bool = False) -> None:
        """Measure a change of strength. A `stale` method keeps the strength in Python and must compile and capture again."""
        before = compiled_graphs()

        def change() -> None:
            set_strength(-SCALE)
            if stale:
                engine.forget_shapes()
                engine(self.inputs)

        column.strength_change_ms = 1e3 * self.clock.seconds(change)
        column.recompilations = compiled_graphs() - before

    def tasks(self) -> Iterable[tuple[tuple[str, ...], Callable[[], object]]]:
        """Return the columns of the marks first, then those of quantised bases."""
        yield ("frozen",), partial(self.frozen, "frozen")
        yield ("ours ST, 1 slider", "ours ST, 3 sliders", *EXTRAS), self.st
        yield ("ours GST",), partial(self.adapted, "ours GST", "gst")
        yield ("PEFT GST",), self.peft
        for precision in self.selection.precisions:
            frozen, st, gst = quantised_columns([precision])
            yield (frozen,), partial(self.frozen, frozen, precision)
            yield (st,), partial(self.adapted, st, "st", precision)
            yield (gst,), partial(self.adapted, gst, "gst", precision)
        yield ("published ST",), self.published
        yield ("merged GST",), self.merged
        yield ("frozen, again",), partial(self.frozen, "frozen, again")


def flux_calls(
    base: FluxKontextBase, size: Size, *, small: bool, device: torch.device
) -> tuple[Callable[[], object], Callable[[], object]]:
    """Return functions that encode a prompt and an image, and decode an image, with FLUX's encoders and autoencoder."""
    text, pooled, vae = base.encoders(small=small, device=device)
    side = vae.config.sample_size
    tokens = torch.zeros(1, size.text_rows, dtype=torch.long, device=device)
    image = torch.zeros(1, 3, side, side, dtype=DTYPE, device=device)
    latents = torch.zeros(1, 16, side // 8, side // 8, dtype=DTYPE, device=device)

    @torch.no_grad()
    def encode() -> None:
        text(tokens)
        pooled(tokens[:, :77])
        vae.encode(image)

    @torch.no_grad()
    def decode() -> None:
        vae.decode(latents)

    return encode, decode


def marks(bench: Bench) -> list[Mark]:
    """Return the marks of a run with their values and limits, as far as their columns were measured. They are for bfloat16."""
    of = {column.name: column for column in bench.columns}
    ours = [column for column in bench.columns if column.name.startswith("ours") and column.precision is None]
    found = []
    if st := [column.ratio_to_frozen for column in ours if "ST, " in column.name and column.ratio_to_frozen is not None]:
        found.append(Mark("ST step / frozen step", max(st), "<=", 1.005))
    gst, peft_gst = of.get("ours GST"), of.get("PEFT GST")
    if gst and gst.ratio_to_frozen is not None:
        found.append(Mark("GST step / frozen step", gst.ratio_to_frozen, "<=", 1.02))
    if gst and peft_gst:
        found.append(Mark("PEFT GST step / ours", peft_gst.milliseconds / gst.milliseconds, ">=", 1.08))
    # A column whose change of strength failed has its step time only.
    moved = [column for column in ours if column.strength_change_ms is not None]
    if moved:
        found.append(Mark("strength change, ms", max(c.strength_change_ms or 0.0 for c in moved), "<", 0.1))
        count = max(c.recompilations or 0 for c in moved)
        found.append(Mark("strength change, recompilations", count, "<=", 0, counted=True))
    if "batch of 4" in bench.extra:
        found.append(Mark("mixed batch / uniform batch", bench.extra["batch of 4"]["mixed_over_uniform"], "<=", 1.01))
    if bench.cuda and moved:
        found.append(Mark("strength change, allocations", max(c.allocations or 0 for c in moved), "<=", 0, counted=True))
    return found


def table(bench: Bench) -> str:
    """Return a Markdown table of the columns, and the other results."""
    lines = [
        "| | step ms | step / frozen | bf16 frozen / step | peak GiB | peak / bf16 frozen | first call s | strength change ms "
        "| recompilations | allocations | |",
        "|" + "---|" * 11,
    ]
    abouts = COLUMNS | quantised_columns(bench.selection.precisions)
    for column in bench.columns:
        numbers = [
            "–" if value is None else form.format(value)
            for value, form in (
                (column.milliseconds, "{:.3f}"),
                (column.ratio_to_frozen, "{:.4f}"),
                (column.speed_up, "{:.3f}"),
                (column.peak_gib, "{:.2f}"),
                (column.peak_share, "{:.3f}"),
                (column.first_call_seconds, "{:.1f}"),
                (column.strength_change_ms, "{:.3f}"),
                (column.recompilations, "{}"),
                (column.allocations, "{}"),
            )
        ]
        lines.append("| " + " | ".join([column.name, *numbers, abouts[column.name]]) + " |")
    lines += bench.failures(cells=9)
    for name, values in bench.extra.items():
        lines += ["", f"{name}: " + ", ".join(f"{key} {value}" for key, value in values.items())]
    return "\n".join(lines) + "\n"


def options() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=tuple(FULL_SIZES), default="flux_kontext", help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, help="results folder (default: bench/results; none in a rehearsal)")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each column (default: %(default)s)")
    columns.add_options(parser)
    parser.add_argument("--rehearse", action="store_true", help="run small blocks on any machine; times are meaningless")
    return parser


def report(bench: Bench, started: float, out: Path | None) -> str:
    """Write the results so far, and return them in Markdown.

    Args:
        bench: Bench with at least its transformer.
        started: Time of the start by `time.perf_counter`.
        out: Results folder; None writes nothing.
    """
    about = {
        "family": bench.base.name,
        "parameters": bench.parameters,
        "text_rows": bench.size.text_rows,
        "image_rows": bench.size.image_rows,
        "steps": bench.size.steps,
        "rehearsal": bench.small,
        "seconds": round(time.perf_counter() - started, 1),
    }
    content = {"columns": [asdict(column) for column in bench.columns], "failed": bench.failed, **bench.extra}
    given = f"--family {bench.base.name} --steps {bench.size.steps} {bench.selection.options()}"
    found = verdicts(marks(bench), timed=not bench.small)
    name = f"model_{bench.base.name}{bench.selection.suffix}"
    return save_run(name, f"make gpu-model BENCH_OPTIONS='{given}'", bench.device, about, content, table(bench), found, out)


def main() -> int:
    """Run the benchmark and return the exit status: 1 if a column failed, 0 also where a mark is missed."""
    parser = options()
    args = parser.parse_args()
    rehearse: bool = args.rehearse
    cuda = torch.cuda.is_available()
    if not cuda and not rehearse:
        sys.stderr.write("gpu_model: no CUDA device found; pass --rehearse to run small blocks on the CPU\n")
        return 2
    size = Size(512, 8192, (8, 16, 32), args.steps)
    if rehearse:
        inductor.COMPILER, size = "eager", Size(16, 32, (2, 3, 4), 2)
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    selection = read_selection(parser, args, [*COLUMNS, *EXTRAS], card_of(device))
    base, started = FULL_SIZES[args.family], time.perf_counter()
    try:
        bench = Bench(base, size, selection, small=rehearse, device=device)
    except torch.OutOfMemoryError:
        sys.stderr.write(f"gpu_model: out of GPU memory; {base.name} needs a card of {base.gib} GB\n")
        return 2
    except SliderEditError as error:
        sys.stderr.write(f"gpu_model: {error}\n")
        return 2
    out = args.out if rehearse else args.out or Path("bench/results")
    bench.after_column = partial(report, bench, started, out)
    bench.run()
    sys.stdout.write(report(bench, started, out))
    return 1 if bench.failed else 0


if __name__ == "__main__":
    sys.exit(main())
