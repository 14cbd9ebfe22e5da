"""Whole edits on a GPU, from a PIL image and a prompt to a PIL image, beside diffusers with PEFT (`make gpu-e2e`).

The pipeline has the sizes of a released base and random bfloat16 weights, text encoders and autoencoder included: speed and
memory do not depend on their values. Every column edits the same image with the same prompt, steps and dtype, and true
classifier-free guidance as the family's default asks. Columns such as "ours GST, fp8" run a quantised transformer with the same
random weights, in every precision of `--precisions`. Results are written after each column, and a column that fails does not
end the run. `--rehearse` runs the same code on small modules, on a CPU too; its times are meaningless.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import torch._dynamo
from tqdm import tqdm

try:
    from slideredit_rt.adapters import Adapter
    from slideredit_rt.bench import columns, full_size, gpu_model
    from slideredit_rt.bench.clock import Clock, compiled_graphs
    from slideredit_rt.bench.columns import ColumnBench, Selection, card_of, quantised_columns, read_selection
    from slideredit_rt.bench.full_size import FULL_SIZES, FullSize, noise_image
    from slideredit_rt.bench.gpu_model import peft_adapter, random_adapter
    from slideredit_rt.bench.results import Mark, save_run, verdicts
    from slideredit_rt.checkpoint import quiet_libraries
    from slideredit_rt.editor import SliderEditor
    from slideredit_rt.engines import inductor
    from slideredit_rt.engines.inductor import RECOMPILE_LIMIT
    from slideredit_rt.errors import SliderEditError
    from slideredit_rt.families import KINDS, Kind
    from slideredit_rt.sliders import Controls, Slider, compose_prompt
    from slideredit_rt.strength import StrengthCurve
except ModuleNotFoundError as missing:
    sys.exit(f"gpu_e2e: the package {missing.name} is missing; install slideredit-rt's dependencies into GPU_PYTHON")

INSTRUCTIONS = ("make the circle red", "make the square blue", "make the background dark")
PROMPT = compose_prompt(INSTRUCTIONS)
STRENGTH = 0.5
SWEEP = tuple(0.25 * i for i in range(7))
FEWEST_STEPS = 2
COLUMNS = {
    "frozen": "our engine without an adapter: the limit",
    "ours GST": "every row, with folded projections",
    "ours ST, 3 sliders": "three instructions",
    "ours ST, 1 slider": "one instruction of the prompt",
    "diffusers + PEFT": "diffusers' pipeline in eager mode, GST; a moved slider keeps its prompt embeddings",
    "published ST": "diffusers' pipeline in eager mode with the authors' module",
    "diffusers + PEFT, compiled": "diffusers + PEFT with compiled blocks; every new strength compiles again",
}


@dataclass(frozen=True)
class Size:
    """Sizes of the measurement.

    Attributes:
        side: Edge of the image, in pixels.
        steps: Denoising steps of an edit.
        repeats: Edits per figure.
        true_cfg_scale: Scale of true classifier-free guidance; 1 runs without a negative pass.
        budget: Seconds after which no further column is measured.
    """

    side: int
    steps: int
    repeats: int
    true_cfg_scale: float
    budget: float

    @property
    def sweep_steps(self) -> int:
        """Denoising steps of each strength of a sweep, so that a sweep takes about as long as one edit."""
        return max(FEWEST_STEPS, self.steps // len(SWEEP))


@dataclass(kw_only=True)
class Column(columns.Column):
    """One way to edit (see `columns.Column`).

    Attributes:
        first_seconds: An edit whose image and prompt are new; nothing is left to compile.
        moved_seconds: Another strength on the same image and prompt.
        sweep_seconds: Seven strengths on the same image and prompt, with `Size.sweep_steps` each; None if every strength
            compiles.
        compile_seconds: Compilation and capture, which only the very first edit includes.
        encode_seconds: The part of a first edit ahead of its first step.
        denoise_seconds: All steps of a first edit.
        decode_seconds: The part of a first edit after its last step.
        step_seconds: One step: one call of the transformer, two with true classifier-free guidance.
        outside_share: Share of a moved slider's edit that is not spent in its steps, for the family's default number of steps.
        synchronisations: Waits of the host between the first and the last step of an edit; None on a CPU.
        recompilations: Graphs captured by dynamo after the first edit.
        captures: Sets of shapes for which our engine captured a CUDA graph after the first edit; None for diffusers.
    """

    first_seconds: float
    moved_seconds: float
    sweep_seconds: float | None
    compile_seconds: float
    encode_seconds: float
    denoise_seconds: float
    decode_seconds: float
    step_seconds: float
    outside_share: float
    synchronisations: int | None
    recompilations: int
    captures: int | None
    notes: list[str] = field(default_factory=list)

    @property
    def step(self) -> float:
        return self.step_seconds


class Edit(Protocol):
    """An edit by one of the methods."""

    def __call__(self, strength: float, steps: int, *, encoded: bool, after_step: Callable[[], None] | None = None) -> object:
        """Edit the image.

        Args:
            strength: Strength of every slider.
            steps: Denoising steps.
            encoded: Use the encodings that were made before.
            after_step: Function that is called after each step.
        """


class Parts:
    """The parts of one edit, and the waits of the host between its first and its last step.

    Args:
        clock: Clock.
        edit: Method.
        steps: Denoising steps, at least 2.
    """

    def __init__(self, clock: Clock, edit: Edit, steps: int) -> None:
        self.clock, self.steps, self._times = clock, steps, [0.0, 0.0]
        self._done = 0
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            start = clock.now()
            try:
                edit(STRENGTH, steps, encoded=False, after_step=self._after_step)
            finally:
                self._report_waits("default")  # an edit that fails between its steps does not get to the last one
            end = clock.now()
        first, last = self._times
        self.total = end - start
        self.step = (last - first) / (steps - 1)
        self.decode = end - last
        self.encode = max(0.0, self.total - self.decode - steps * self.step)
        self.waits = sum("synchroniz" in str(warning.message) for warning in found) if clock.cuda else None

    def _after_step(self) -> None:
        self._done += 1
        if self._done == 1:
            self._times[0] = self.clock.now()
            self._report_waits("warn")
        if self._done == self.steps:
            self._report_waits("default")
            self._times[1] = self.clock.now()

    def _report_waits(self, mode: str) -> None:
        if self.clock.cuda:
            torch.cuda.set_sync_debug_mode(mode)


class StepBar(tqdm):  # type: ignore[type-arg]
    """A hidden progress bar that calls a function after each step."""

    def __init__(self, after_step: Callable[[], None]) -> None:
        super().__init__(disable=True)
        self._after_step = after_step

    def update(self, n: float | None = 1) -> bool | None:
        self._after_step()
        return None


class Bench(ColumnBench[Column]):
    """Runs the columns on one pipeline.

    Args:
        base: Base with random weights.
        size: Sizes of the edits.
        selection: Columns to measure.
        small: Use the small modules.
        device: Device to run on.
    """

    def __init__(self, base: FullSize, size: Size, selection: Selection, *, small: bool, device: torch.device) -> None:
        self.started = time.perf_counter()
        self.pipeline, self.size = base.pipeline(small=small, device=device), size
        self.options = base.options(self.pipeline, size.true_cfg_scale)
        super().__init__(base, selection, self.pipeline, small=small, device=device)
        self.pipeline.set_progress_bar_config(disable=True)
        self.family.place(self.pipeline, device)
        self.image = noise_image(size.side)
        self.negative = self.family.negative_prompt if size.true_cfg_scale > 1 else None
        self.adapters = {kind: random_adapter(self.family, self.pipeline.transformer, kind) for kind in KINDS}
        self._longest = 0.0

    def elapsed(self) -> float:
        """Return the seconds since the start, creation of the weights included."""
        return time.perf_counter() - self.started

    def has_time(self, name: str) -> bool:
        """Return whether the budget allows a column as long as the longest so far; if not, note that it is left out."""
        if self.elapsed() + self._longest <= self.size.budget:
            return True
        self.left_out.append(name)
        sys.stderr.write(f"{name}: left out, because --budget {self.size.budget:g} would not suffice\n")
        return False

    def measure(
        self,
        name: str,
        edit: Edit,
        *,
        captures: Callable[[], int] | None = None,
        constant: bool = False,
        precision: str | None = None,
    ) -> Column:
        """Time the rows of the table.

        Args:
            name: Name of the column.
            edit: Method.
            captures: Function that counts captured graphs; None for methods that capture none.
            constant: The strength is a constant of compiled code, so that every new one compiles.
            precision: Precision of the quantised base; None for bfloat16.
        """
        size, clock, began = self.size, self.clock, self.elapsed()
        torch._dynamo.utils.counters.clear()
        clock.forget_peak()
        cold = clock.seconds(lambda: edit(STRENGTH, FEWEST_STEPS, encoded=False))
        graphs, captured = compiled_graphs(), captures() if captures else 0
        parts = sorted((Parts(clock, edit, size.steps) for _ in range(size.repeats)), key=lambda p: p.total)[size.repeats // 2]
        strengths = [0.01 * (i + 1) for i in range(1 if constant else size.repeats)]
        moved = statistics.median(clock.seconds(partial(edit, s, size.steps, encoded=True)) for s in strengths)
        sweep = None if constant else clock.seconds(lambda: [edit(s, size.sweep_steps, encoded=True) for s in SWEEP])
        outside = moved - size.steps * parts.step
        column = Column(
            name=name,
            precision=precision,
            first_seconds=parts.total,
            moved_seconds=moved,
            sweep_seconds=sweep,
            compile_seconds=max(0.0, cold - parts.encode - FEWEST_STEPS * parts.step - parts.decode),
            encode_seconds=parts.encode,
            denoise_seconds=size.steps * parts.step,
            decode_seconds=parts.decode,
            step_seconds=parts.step,
            outside_share=outside / (outside + self.family.num_inference_steps * parts.step),
            synchronisations=parts.waits,
            recompilations=compiled_graphs() - graphs,
            captures=captures() - captured if captures else None,
            peak_gib=clock.peak_gib(),
        )
        self.add(column)
        self._longest = max(self._longest, self.elapsed() - began)
        sys.stderr.write(
            f"{name}: first edit {parts.total:.3f} s, moved slider {moved:.3f} s, compilation {column.compile_seconds:.1f} s, "
            f"{self.elapsed():.0f} s so far\n"
        )
        return column

    @contextmanager
    def editor(self, kind: Kind | None, precision: str | None = None) -> Iterator[SliderEditor]:
        """Make an editor on the pipeline with a transformer; for the frozen backbone, one whose sliders do nothing."""
        adapter: Adapter | None = self.adapters[kind] if kind else None
        controls = Controls(kind or "st", StrengthCurve(), {})
        limits = {"max_batch": self.base.batch, "max_sliders": columns.MAX_SLIDERS}
        with self.engine(adapter, self.base.batch, precision) as engine:
            config = dict(self.pipeline.transformer.config)
            yield SliderEditor(self.family, self.pipeline, engine, config, controls, **limits)

    def ours(self, kind: Kind | None, edits: Mapping[str, tuple[str, ...]], precision: str | None = None) -> None:
        """Measure columns of ours that share compiled code.

        Args:
            kind: Kind of the adapter; None for the frozen backbone.
            edits: Instructions of the sliders by column.
            precision: Precision of the quantised base; None for bfloat16.
        """
        with self.editor(kind, precision) as editor:
            for name, instructions in edits.items():
                if self.selection.wants(name) and self.has_time(name):
                    edit, bindings = self.our_edit(editor, instructions), editor.engine._bindings  # type: ignore[attr-defined]
                    column = self.measure(name, edit, captures=partial(len, bindings), precision=precision)
                    if len(instructions) == len(INSTRUCTIONS) and precision is None:
                        self.sweep_at_once(editor, column)

    def our_edit(self, editor: SliderEditor, instructions: tuple[str, ...]) -> Edit:
        """Return our way to edit, with the same calls as `SliderEditor.edit`."""
        sliders = [Slider(text) for text in instructions]
        prepare = partial(
            editor.prepare, self.image, sliders, prompt=PROMPT, true_cfg_scale=self.size.true_cfg_scale, steps=self.size.steps
        )
        known = prepare()

        def edit(strength: float, steps: int, *, encoded: bool, after_step: Callable[[], None] | None = None) -> object:
            prepared = known if encoded else prepare()
            inputs = editor.backbone_inputs(prepared, editor.alphas(prepared, [[strength] * len(sliders)]))
            bar = StepBar(after_step) if after_step else None
            pixels = editor.denoise(prepared.conditioning, inputs, steps, self.size.true_cfg_scale, bar)
            return editor.to_images(pixels)

        return edit

    def sweep_at_once(self, editor: SliderEditor, column: Column) -> None:
        """Note what a sweep takes when one batch holds all strengths, for bases whose `batch` allows it."""
        if self.base.batch < len(SWEEP) or self.elapsed() + self._longest > self.size.budget:
            return
        prepared = editor.prepare(
            self.image, INSTRUCTIONS, prompt=PROMPT, true_cfg_scale=self.size.true_cfg_scale, steps=self.size.sweep_steps
        )
        together = partial(editor.render, prepared, [[s] * len(INSTRUCTIONS) for s in SWEEP])
        together()  # compiles for the larger batch
        column.notes.append(f"7 strengths in one batch: {self.clock.seconds(together):.3f} s")

    def diffusers(self, name: str, set_strength: Callable[[float], None], *, compile_blocks: bool = False) -> None:
        """Measure diffusers' own pipeline with something in its transformer that scales an edit."""
        torch._dynamo.reset()
        self._run_blocks_eagerly()
        if compile_blocks:
            self.pipeline.transformer.compile_repeated_blocks(fullgraph=True, dynamic=False, backend=inductor.COMPILER)
        # Every strength of PEFT is a constant of compiled code and compiles again.
        limits = {"recompile_limit": RECOMPILE_LIMIT, "accumulated_recompile_limit": RECOMPILE_LIMIT}
        with torch._dynamo.config.patch(limits):  # type: ignore[attr-defined]
            self.measure(name, self.diffusers_edit(set_strength), constant=compile_blocks)
        self._run_blocks_eagerly()

    def diffusers_edit(self, set_strength: Callable[[float], None]) -> Edit:
        """Return diffusers' way to edit."""
        texts = {"prompt": PROMPT} | ({} if self.negative is None else {"negative_prompt": self.negative})
        embeddings = self.embeddings()

        def edit(strength: float, steps: int, *, encoded: bool, after_step: Callable[[], None] | None = None) -> object:
            def after(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
                assert after_step is not None
                after_step()
                return {}

            set_strength(strength)
            words = embeddings if encoded else texts
            callback = after if after_step else None
            return self.pipeline(
                image=self.image, num_inference_steps=steps, callback_on_step_end=callback, **self.options, **words
            )

        return edit

    @torch.no_grad()
    def embeddings(self) -> dict[str, Any]:
        """Return the prompts as diffusers encodes them."""
        return self.base.embeddings(self.pipeline, self.image, PROMPT, self.negative)

    def _run_blocks_eagerly(self) -> None:
        for module in self.pipeline.transformer.modules():
            module._compiled_call_impl = None

    def peft(self, name: str, *, compile_blocks: bool = False) -> None:
        """Measure diffusers' pipeline with PEFT."""
        with peft_adapter(self.use(), self.adapters["gst"]) as set_strength:
            self.diffusers(name, set_strength, compile_blocks=compile_blocks)

    def published(self, name: str) -> None:
        """Measure diffusers' pipeline with the published module."""
        transformer, text_rows = self.use(), self.embeddings()["prompt_embeds"].shape[1]
        rows = gpu_model.Size(text_rows, 0, (8, 16, 32) if text_rows > 64 else (2, 3, 4), 1)
        with gpu_model.published(transformer, self.adapters["st"], rows) as set_strength:
            self.diffusers(name, set_strength)

    def tasks(self) -> Iterable[tuple[tuple[str, ...], Callable[[], object]]]:
        """Return the columns of the marks first, then those of quantised bases."""
        three, one = INSTRUCTIONS, INSTRUCTIONS[:1]
        st = {"ours ST, 3 sliders": three, "ours ST, 1 slider": one}
        yield ("frozen",), partial(self.ours, None, {"frozen": one})
        yield ("ours GST",), partial(self.ours, "gst", {"ours GST": one})
        yield tuple(st), partial(self.ours, "st", st)
        yield ("diffusers + PEFT",), partial(self.peft, "diffusers + PEFT")
        for precision in self.selection.precisions:
            frozen, three_sliders, gst = quantised_columns([precision])
            yield (frozen,), partial(self.ours, None, {frozen: one}, precision)
            yield (three_sliders,), partial(self.ours, "st", {three_sliders: three}, precision)
            yield (gst,), partial(self.ours, "gst", {gst: one}, precision)
        yield ("published ST",), partial(self.published, "published ST")
        compiled = "diffusers + PEFT, compiled"
        yield (compiled,), partial(self.peft, compiled, compile_blocks=True)

    def attempt(self, names: Sequence[str], measure: Callable[[], object]) -> None:
        wanted = [name for name in names if self.selection.wants(name)]
        if wanted and not self.has_time(wanted[0]):
            self.left_out += wanted[1:]
        else:
            super().attempt(names, measure)

    def run(self) -> None:
        with self.base.edits_of(self.size.side):
            super().run()


def marks(bench: Bench) -> list[Mark]:
    """Return what the run is judged by, as far as its columns were measured."""
    of = {column.name: column for column in bench.columns}
    frozen, st, gst, peft = (of.get(name) for name in ("frozen", "ours ST, 3 sliders", "ours GST", "diffusers + PEFT"))
    ours = [column for column in (st, gst) if column]
    found = []
    if gst and peft:
        ratio = peft.first_seconds / gst.first_seconds
        found.append(Mark("first edit, diffusers + PEFT / ours GST", ratio, ">=", 2.2))
    if ours:
        share, graphs = max(c.outside_share for c in ours), max(c.recompilations + (c.captures or 0) for c in ours)
        found.append(Mark("moved slider, share outside the steps", share, "<=", 0.03))
        found.append(Mark("recompilations and captures after the first edit", graphs, "<=", 0, counted=True))
        if bench.clock.cuda:
            waits = max(c.synchronisations or 0 for c in ours)
            found.append(Mark("host synchronisations in the loop", waits, "<=", 0, counted=True))
    for name, column, limit in (("GST", gst, 1.02), ("ST", st, 1.005)):
        if frozen and column:
            found.append(Mark(f"{name} step / frozen", column.step_seconds / frozen.step_seconds, "<=", limit))
    return found


def table(bench: Bench) -> str:
    """Return the columns in Markdown."""
    fields = {
        "first edit s": "first_seconds",
        "moved slider s": "moved_seconds",
        f"7 strengths of {bench.size.sweep_steps} steps s": "sweep_seconds",
        "encode s": "encode_seconds",
        "denoise s": "denoise_seconds",
        "decode s": "decode_seconds",
        "step ms": "step_seconds",
        "outside steps": "outside_share",
        "waits": "synchronisations",
        "recompiled": "recompilations",
        "captured": "captures",
        "step / frozen": "ratio_to_frozen",
        "bf16 frozen / step": "speed_up",
        "peak GiB": "peak_gib",
        "peak / bf16 frozen": "peak_share",
        "compilation s": "compile_seconds",
    }
    lines = ["| | " + " | ".join(fields) + " | |", "|" + "---|" * (len(fields) + 2)]
    names = COLUMNS | quantised_columns(bench.selection.precisions)
    for column in bench.columns:
        values = [getattr(column, name) for name in fields.values()]
        scaled = [v * 1e3 if name == "step ms" else v for name, v in zip(fields, values, strict=True)]
        cells = ["–" if v is None else str(v) if isinstance(v, int) else f"{v:.3f}" for v in scaled]
        about = "; ".join([names[column.name], *column.notes])
        lines.append(f"| {column.name} | " + " | ".join(cells) + f" | {about} |")
    lines += bench.failures(len(fields))
    if bench.left_out:
        lines += ["", f"Left out for lack of time (`--budget {bench.size.budget:g}`): {', '.join(bench.left_out)}."]
    return "\n".join(lines) + "\n"


def number_from(least: int) -> Callable[[str], int]:
    """Return a parser of whole numbers that are not below `least`."""

    def parse(text: str) -> int:
        if text.isdecimal() and int(text) >= least:
            return int(text)
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} upwards")

    return parse


def guidance(text: str) -> float:
    """Parse a scale of true classifier-free guidance."""
    try:
        scale = float(text)
    except ValueError:
        scale = 0.0
    if not 1 <= scale <= 100:
        raise argparse.ArgumentTypeError(f"{text!r} is not a scale from 1 to 100")
    return scale


def options() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = ", ".join(f"{base.steps} for {name}" for name, base in FULL_SIZES.items())
    parser.add_argument("--family", choices=tuple(FULL_SIZES), default="flux_kontext", help="base (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="results folder (default: bench/results; none for a rehearsal)")
    parser.add_argument("--steps", type=number_from(FEWEST_STEPS), help=f"denoising steps of an edit (default: {steps})")
    parser.add_argument("--repeats", type=number_from(1), default=1, help="edits per figure (default: %(default)s)")
    parser.add_argument(
        "--true-cfg-scale", type=guidance, help="scale of the negative pass; 1 runs without it (default: the family's)"
    )
    parser.add_argument(
        "--budget",
        type=number_from(1),
        default=520,
        help="seconds after which no further column is measured (default: %(default)s)",
    )
    columns.add_options(parser)
    parser.add_argument("--rehearse", action="store_true", help="small modules on any machine; the times are meaningless")
    return parser


def report(bench: Bench, out: Path | None) -> str:
    """Write the results so far, and return them in Markdown.

    Args:
        bench: Bench with at least its pipeline.
        out: Results folder; None writes nothing.
    """
    size, base, usual = bench.size, bench.base, bench.family.true_cfg_scale
    about = {
        **asdict(size),
        "sweep_steps": size.sweep_steps,
        "family": base.name,
        "rehearsal": bench.small,
        "seconds": round(bench.elapsed(), 1),
    }
    content = {
        "columns": [asdict(column) for column in bench.columns],
        "left_out": bench.left_out,
        "failed": bench.failed,
    }
    found = verdicts(marks(bench), timed=not bench.small)
    given = f"--family {base.name} --steps {size.steps} --repeats {size.repeats} --budget {size.budget:g}"
    given += "" if size.true_cfg_scale == usual else f" --true-cfg-scale {size.true_cfg_scale:g}"
    command = f"make gpu-e2e BENCH_OPTIONS='{given} {bench.selection.options()}'"
    name = f"e2e_{base.name}" + ("" if size.true_cfg_scale == usual else f"_cfg_{size.true_cfg_scale:g}")
    return save_run(name + bench.selection.suffix, command, bench.device, about, content, table(bench), found, out)


def main() -> int:
    """Run the bench and return the exit status: 1 if a column failed, 0 also where a mark is missed, which the table says."""
    parser = options()
    args = parser.parse_args()
    rehearse: bool = args.rehearse
    cuda = torch.cuda.is_available()
    if not cuda and not rehearse:
        sys.stderr.write("gpu_e2e: no CUDA device found; pass --rehearse to run small modules on the CPU\n")
        return 2
    base = FULL_SIZES[args.family]
    scale = args.true_cfg_scale or base.family.true_cfg_scale
    size = Size(full_size.SIDE, args.steps or base.steps, args.repeats, scale, args.budget)
    if rehearse:
        inductor.COMPILER, size = "eager", Size(full_size.SMALL_SIDE, FEWEST_STEPS, 1, scale, args.budget)
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    selection = read_selection(parser, args, COLUMNS, card_of(device))
    out = args.out if rehearse else args.out or Path("bench/results")
    with quiet_libraries():
        try:
            bench = Bench(base, size, selection, small=rehearse, device=device)
        except torch.OutOfMemoryError:
            sys.stderr.write(f"gpu_e2e: out of GPU memory; {base.name} needs a card of {base.gib} GB\n")
            return 2
        except SliderEditError as error:
            sys.stderr.write(f"gpu_e2e: {error}\n")
            return 2
        bench.after_column = partial(report, bench, out)
        bench.run()
    sys.stdout.write(report(bench, out))
    return 1 if bench.failed else 0


if __name__ == "__main__":
    sys.exit(main())
