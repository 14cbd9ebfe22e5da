"""Masked low-rank projections on a GPU, compared with other implementations (`make gpu-bench`).

Every candidate is captured in a CUDA graph together with a write that evicts L2, ten times, and the time of the same graph
without the candidate is subtracted. Launches therefore cost what they cost in a replayed graph, and data is cold. Candidates
with a wrong result are not timed. A second table compares FP8 forms of the projections at batch 1. `--rehearse` runs every path
once on small shapes without timing, on any machine (with `TRITON_INTERPRET=1` on a CPU).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from slideredit_rt import kernels
from slideredit_rt.bench.projection import exact, plain, problem
from slideredit_rt.files import atomic_file
from slideredit_rt.quantization.precisions import FP8, to_fp8

RANK = 16
REPEATS = 10
TEXT_ROWS, IMAGE_ROWS = 512, 8192
# Inner and output columns. FLUX.1-Kontext and Qwen-Image-Edit are both 3072 wide with an MLP of 12288.
PROJECTIONS = {"q, k, v, out": (3072, 3072), "MLP up": (3072, 12288), "MLP down": (12288, 3072)}
SINGLE_PROJECTIONS = {"q, k, v": (3072, 3072), "MLP up": (3072, 12288), "out": (15360, 3072)}
PATHS = {
    "update": "vendor GEMM, then the active rows in place by two kernels",
    "fused": "one kernel, as in TensorRT plugins",
    "folded": "vendor GEMM on `x` and its low-rank product side by side, as in GST engines; `x` is already in the wider matrix",
}
FP8_FORMS = {
    "fp8 base": "activations rounded by a compiled kernel, then the vendor's FP8 GEMM, without an update",
    "fp8 vendor + update": "the same, then the active rows in place",
}


@dataclass(frozen=True)
class Case:
    """One projection with `rows` rows per batch item, of which `active` are scaled."""

    kind: str
    stream: str
    projection: str
    batch: int
    rows: int
    active: int
    k: int
    n: int

    @property
    def flops(self) -> int:
        """Floating-point operations of the base product."""
        return 2 * self.batch * self.rows * self.k * self.n

    @property
    def bytes(self) -> int:
        """Bytes that the base product must move at least, with 16-bit elements."""
        return 2 * (self.batch * self.rows * (self.k + self.n) + self.k * self.n)


@dataclass
class Measurement:
    """One line of the result. `microseconds` is None if it was not timed; `note` has the reason."""

    case: Case
    candidate: str
    error: float
    allowed_error: float
    microseconds: float | None = None
    ratio_to_base: float | None = None
    tflops: float | None = None
    gbytes_per_s: float | None = None
    note: str = ""


def cases(batches: tuple[int, ...] = (1, 2, 4)) -> Iterator[Case]:
    """Yield the cases: ST with few active text rows, GST with all rows of each stream."""
    for batch in batches:
        for name, (k, n) in PROJECTIONS.items():
            for active in (8, 32, 128):
                yield Case("ST", "text", name, batch, TEXT_ROWS, active, k, n)
            yield Case("GST", "text", name, batch, TEXT_ROWS, TEXT_ROWS, k, n)
            yield Case("GST", "image", name, batch, IMAGE_ROWS, IMAGE_ROWS, k, n)
        for name, (k, n) in SINGLE_PROJECTIONS.items():
            rows = TEXT_ROWS + IMAGE_ROWS
            yield Case("GST", "joint", name, batch, rows, rows, k, n)


def rehearsal_cases() -> Iterator[Case]:
    """Yield small cases with odd sizes."""
    yield Case("ST", "text", "rehearsal", 2, 33, 5, 72, 40)
    yield Case("GST", "image", "rehearsal", 1, 150, 150, 64, 48)


def inputs(case: Case, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Return the arguments of a projection. The active rows are one span per batch item, like those of an instruction."""
    p = problem(case.batch, case.rows, case.k, case.n, RANK, dtype, generator=torch.Generator(device).manual_seed(0))
    scale = torch.zeros_like(p["row_scale"])
    start = (case.rows - case.active) // 2
    scale[:, start : start + case.active] = 0.5
    return p | {"row_scale": scale}


def base(p: dict[str, Tensor]) -> Tensor:
    """Compute the frozen projection alone, which is the lower limit."""
    return F.linear(p["x"], p["weight"], p["bias"])


def peft_addmm(p: dict[str, Tensor]) -> Tensor:
    """Compute the formula like `plain`, but add the second product to the first with `addmm`."""
    y = F.linear(p["x"], p["weight"], p["bias"])
    low = F.linear(p["x"], p["lora_a"]) * p["row_scale"].to(y.dtype).unsqueeze(-1)
    return y.view(-1, y.shape[-1]).addmm_(low.view(-1, RANK), p["lora_b"].T).view_as(y)


def upcast(p: dict[str, Tensor]) -> Tensor:
    """Compute the formula like the authors' ST code: convert the input, update in float32 and convert back."""
    y = F.linear(p["x"], p["weight"], p["bias"])
    update = F.linear(F.linear(p["x"].float(), p["lora_a"].float()), p["lora_b"].float())
    return (y.float() + p["row_scale"].unsqueeze(-1) * update).to(y.dtype)


def by_update(p: dict[str, Tensor]) -> Tensor:
    """Run the path `update`."""
    return kernels.masked_lora_update_triton_(base(p), p["x"], p["lora_a"], p["lora_b"], p["row_scale"])


def by_folding(p: dict[str, Tensor]) -> Callable[[dict[str, Tensor]], Tensor]:
    """Return a projection from `[x | row_scale · (x Aᵀ)]` by `[W | B]`, whose part that does not change is written here."""
    wide, weight = (
        torch.cat([p["x"], p["x"].new_empty(*p["x"].shape[:-1], RANK)], dim=-1),
        torch.cat([p["weight"], p["lora_b"]], 1),
    )

    def project(p: dict[str, Tensor]) -> Tensor:
        torch.mul(F.linear(p["x"], p["lora_a"]), p["row_scale"].unsqueeze(-1), out=wide[..., -RANK:])
        return F.linear(wide, weight, p["bias"])

    return project


OURS: dict[str, Callable[[dict[str, Tensor]], Tensor]] = {
    "update": by_update,
    "fused": lambda p: kernels.masked_lora_linear_triton(**p),
}
OTHERS: dict[str, Callable[[dict[str, Tensor]], Tensor]] = {
    "PEFT eager": plain,
    "PEFT addmm": peft_addmm,
    "upcast": upcast,
}


def fp8_inputs(case: Case, dtype: torch.dtype, device: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the arguments of a 16-bit projection, and those of the same projection in FP8."""
    p, form = inputs(case, dtype, device), FP8()
    scale = torch.tensor(form.input_scale(float(p["x"].abs().max())), device=device)
    return p, p | form.quantise(p["weight"].float()) | {"input_scale": scale}


def fp8_expected(p: dict[str, Tensor]) -> Tensor:
    """Return the exact result of the first batch item, from activations that torch rounds in float32."""
    weight = p["weight"].double() * p["weight_scale"].double()[:, None]
    x = FP8().fake_quantise(p["x"].float(), p["input_scale"]).double()
    scaled_low = p["x"].double() @ p["lora_a"].double().T * p["row_scale"].double().unsqueeze(-1)
    return (x @ weight.T + p["bias"].double() + scaled_low @ p["lora_b"].double().T)[0]


def rounded(x: Tensor, input_scale: Tensor) -> Tensor:
    """Return the rows of `x` in E4M3, `[M, K]`."""
    return to_fp8(x.flatten(0, -2).float() / input_scale)


@dataclass
class FP8Candidates:
    """FP8 forms of a projection.

    Attributes:
        quantise: `rounded`, or its compiled form, as engines run it.
        row_scales: Input scale of each row, float32 `[M, 1]`, as the vendor's GEMM takes it.
    """

    quantise: Callable[[Tensor, Tensor], Tensor]
    row_scales: Tensor

    def base(self, p: dict[str, Tensor]) -> Tensor:
        """Round the activations and multiply with the vendor's GEMM, which scales and adds the bias where it can."""
        x, weight = self.quantise(p["x"], p["input_scale"]), p["weight"].T
        if x.is_cuda:
            channels = p["weight_scale"][None]
            y = torch._scaled_mm(x, weight, self.row_scales, channels, bias=p["bias"], out_dtype=p["x"].dtype)
        else:
            one = torch.ones_like(p["input_scale"])
            wide = torch._scaled_mm(x, weight, scale_a=p["input_scale"], scale_b=one, out_dtype=torch.float32)
            y = (wide * p["weight_scale"] + p["bias"]).to(p["x"].dtype)
        return y.view(*p["x"].shape[:-1], -1)

    def by_update(self, p: dict[str, Tensor]) -> Tensor:
        """Update the result of `base` in place."""
        return kernels.masked_lora_update_triton_(self.base(p), p["x"], p["lora_a"], p["lora_b"], p["row_scale"])

    def by_name(self) -> dict[str, Callable[[dict[str, Tensor]], Tensor]]:
        """Return the candidates by name."""
        return dict(zip(FP8_FORMS, (self.base, self.by_update), strict=True))


class GraphTimer:
    """Timer of a call inside a replayed CUDA graph with cold L2, in microseconds."""

    def __init__(self) -> None:
        # Four times the size of L2, to evict it entirely.
        self.evict = torch.empty(4 * torch.cuda.get_device_properties(0).L2_cache_size, dtype=torch.uint8, device="cuda")
        self.empty = self._replays(lambda: None)

    def _replays(self, call: Callable[[], object]) -> float:
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(2):
                call()
        side.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(REPEATS):
                self.evict.zero_()
                call()
        times: list[float] = []
        spent = time.perf_counter()
        while len(times) < 5 or (len(times) < 30 and time.perf_counter() - spent < 0.25):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e3 / REPEATS)
        return statistics.median(times)

    def __call__(self, call: Callable[[], object]) -> float:
        """Return the median time of a call over replays, in microseconds."""
        return self._replays(call) - self.empty


def compared(case: Case) -> slice:
    """Return an eighth of the rows, including the middle of the active span, to keep the float64 computation short."""
    middle, count = case.rows // 2, max(1, case.rows // 8)
    return slice(max(0, middle - count // 2), middle + count // 2 + 1)


@dataclass
class Bench:
    """Runner of the cases, which collects the measurements."""

    device: str
    dtype: torch.dtype
    timer: Callable[[Callable[[], object]], float] | None
    deadline: float
    measurements: list[Measurement] = field(default_factory=list)
    fp8_measurements: list[Measurement] = field(default_factory=list)
    # torch.compile recompiles it for every new shape.
    compiled_peft: Callable[[dict[str, Tensor]], Tensor] = field(default_factory=lambda: torch.compile(plain, dynamic=False))
    # Once for all shapes.
    compiled_rounded: Callable[[Tensor, Tensor], Tensor] = field(default_factory=lambda: torch.compile(rounded, dynamic=True))

    def run(self, case: Case) -> None:
        """Run every candidate on one case, and time those with a correct result."""
        p, rows = inputs(case, self.dtype, self.device), compared(case)
        expected = exact(p | {"x": p["x"][:1, rows], "row_scale": p["row_scale"][:1, rows]})[0]
        allowed = 2 * float((plain(p)[0, rows].double() - expected).abs().max())
        candidates = {"base": base, **OURS, "folded": by_folding(p), **OTHERS}
        if self.timer is not None and case.batch == 1 and time.monotonic() < self.deadline:
            candidates["PEFT compiled"] = self.compiled_peft
        calls = {name: partial(candidate, p) for name, candidate in candidates.items()}
        self.measurements += self.measure(case, calls, expected, allowed)

    def run_fp8(self, case: Case) -> None:
        """Run the FP8 forms and the 16-bit base on one case."""
        (wide, p), rows = fp8_inputs(case, self.dtype, self.device), compared(case)
        some = p | {"x": p["x"][:1, rows], "row_scale": p["row_scale"][:1, rows]}
        expected = fp8_expected(some)
        frozen = kernels.quantized_linear_reference(
            some["x"], some["weight"], some["weight_scale"], None, some["input_scale"], some["bias"], "fp8"
        )
        updated = kernels.masked_lora_update_reference(frozen, some["x"], some["lora_a"], some["lora_b"], some["row_scale"])
        allowed = 2 * float((updated[0].double() - expected).abs().max())
        candidates = FP8Candidates(
            rounded if self.timer is None else self.compiled_rounded,
            p["input_scale"].expand(case.batch * case.rows, 1).contiguous(),
        )
        calls = {"base": partial(base, wide)} | {name: partial(f, p) for name, f in candidates.by_name().items()}
        self.fp8_measurements += self.measure(case, calls, expected, allowed)

    def measure(
        self, case: Case, calls: Mapping[str, Callable[[], Tensor]], expected: Tensor, allowed: float
    ) -> Iterator[Measurement]:
        """Yield a measurement of each call; bases, which have no update, are not compared with the expected rows."""
        base_time: float | None = None
        for name, call in calls.items():
            measurement = Measurement(case, name, 0.0, allowed)
            if not name.endswith("base"):
                measurement.error = float((call()[0, compared(case)].double() - expected).abs().max())
            if not measurement.error <= allowed:
                measurement.note = "wrong result, not timed"
            elif self.timer is not None:
                elapsed = self.timer(call)
                base_time = elapsed if name == "base" else base_time
                assert base_time is not None
                measurement.microseconds = round(elapsed, 2)
                measurement.ratio_to_base = round(elapsed / base_time, 4)
                measurement.tflops = round(case.flops / elapsed / 1e6, 1)
                measurement.gbytes_per_s = round(case.bytes / elapsed / 1e3, 1)
            yield measurement


def table(measurements: list[Measurement]) -> str:
    """Return a Markdown table of ratios to the base GEMM, with one line per case and one column per candidate."""
    names = list(dict.fromkeys(m.candidate for m in measurements))
    lines = [
        "| kind | stream | projection | B | rows | active | base µs | base TFLOP/s | " + " | ".join(names[1:]) + " |",
        "|" + "---|" * (8 + len(names) - 1),
    ]
    for case in dict.fromkeys(m.case for m in measurements):
        of = {m.candidate: m for m in measurements if m.case == case}

        def cell(name: str, of: dict[str, Measurement] = of) -> str:
            if name not in of:
                return "–"
            m = of[name]
            return f"{m.ratio_to_base:.3f}" if m.ratio_to_base is not None else m.note or "right"

        head = (case.kind, case.stream, case.projection, case.batch, case.rows, case.active)
        limit = (of["base"].microseconds, of["base"].tflops)
        lines.append("| " + " | ".join(map(str, (*head, *limit, *(cell(n) for n in names[1:])))) + " |")
    return "\n".join(lines) + "\n"


def fp8_section(measurements: list[Measurement]) -> str:
    """Return the heading, the meaning of the columns, the table and the summary of the FP8 forms, for those that were run."""
    if not measurements:
        return "## FP8\n\nNot run: this GPU does not compute in FP8.\n"
    lines = ["## FP8", "", "Ratios to the 16-bit GEMM alone. Scales per channel, one for all activations.", ""]
    lines += [f"- `{name}`: {meaning}" for name, meaning in FP8_FORMS.items()]
    return "\n".join(lines) + f"\n\n{table(measurements)}"


def marks(measurements: list[Measurement]) -> dict[str, object]:
    """Return the three figures with marks, each the worst over its cases."""
    timed = [m for m in measurements if m.ratio_to_base is not None]

    def best(case: Case, names: Iterable[str]) -> float:
        ratios = (m.ratio_to_base or 0.0 for m in timed if m.case == case and m.candidate in names)
        return min(ratios, default=float("nan"))

    st = [c for c in dict.fromkeys(m.case for m in timed) if c.kind == "ST" and c.active == 32 and c.batch == 1]
    gst = [c for c in dict.fromkeys(m.case for m in timed) if c.kind == "GST" and c.stream != "text"]
    every = list(dict.fromkeys(m.case for m in timed))
    return {
        "ST, 32 of 512 rows, worst ratio to the base GEMM (mark 1.03)": max(best(c, PATHS) for c in st),
        "GST, image and joint rows, worst ratio to the base GEMM (mark 1.05)": max(best(c, PATHS) for c in gst),
        "ours over the best alternative, worst case (mark 1.00 + noise)": max(
            best(c, PATHS) / best(c, {*OTHERS, "PEFT compiled"}) for c in every
        ),
    }


def heading(about: dict[str, str], command: str) -> str:
    """Return the text above the table: title, origin and the meaning of our columns."""
    lines = [f"# Masked low-rank projections on {about['gpu']}", "", "Ratios to the base GEMM alone, cold L2, graph-replayed."]
    lines += [f"{', '.join(f'{k} {v}' for k, v in about.items() if k != 'gpu')}. Reproduce: `{command}`.", ""]
    return "\n".join(lines + [f"- `{name}`: {meaning}" for name, meaning in PATHS.items()]) + "\n"


def commit() -> str:
    """Return `$COMMIT` if it is set, else the commit of the working tree."""
    line = ["git", "rev-parse", "--short", "HEAD"]
    done = subprocess.run(line, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    return os.environ.get("COMMIT") or done.stdout.strip() or "unknown"


def main() -> int:
    """Run the benchmark and return the exit status: 1 if a path of ours computed a wrong result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="results folder (default: %(default)s)")
    parser.add_argument("--rehearse", action="store_true", help="run every path once on small shapes, without timing")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--compile-seconds", type=float, default=240, help="time after which torch.compile is left out")
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    if not cuda and not args.rehearse:
        sys.stderr.write("gpu_kernels: no CUDA device found; pass --rehearse to check every path without timing\n")
        return 2
    bench = Bench(
        device="cuda" if cuda else "cpu",
        dtype=torch.bfloat16,
        timer=None if args.rehearse else GraphTimer(),
        deadline=time.monotonic() + args.compile_seconds,
    )
    # The rehearsal's CPU emulates FP8 products.
    takes_fp8 = not cuda or FP8().runs_on("sm{}{}".format(*torch.cuda.get_device_capability()))
    torch._dynamo.config.recompile_limit = 64
    with torch.inference_mode():
        for case in rehearsal_cases() if args.rehearse else cases(tuple(args.batches)):
            bench.run(case)
            if case.batch == 1 and takes_fp8:
                bench.run_fp8(case)
            sys.stderr.write(f"{case.kind} {case.stream} {case.projection} B={case.batch} active={case.active}: done\n")
    now = datetime.now(UTC).date().isoformat()
    batches = " ".join(map(str, args.batches))
    command = f"make gpu-bench BENCH_OPTIONS='--batches {batches} --compile-seconds {args.compile_seconds:g}'"
    about = {
        "gpu": torch.cuda.get_device_name() if cuda else "none",
        "date": now,
        "commit": commit(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    wrong = [m for m in bench.measurements if m.candidate in PATHS and m.note]
    wrong_fp8 = [m for m in bench.fp8_measurements if m.note]
    text = f"{table(bench.measurements)}\n{fp8_section(bench.fp8_measurements)}"
    sys.stdout.write(text)
    if not args.rehearse:
        folder = args.out / about["gpu"].lower().replace(" ", "-")
        content = {
            **about,
            "command": command,
            "marks": marks(bench.measurements),
            "measurements": [asdict(m) for m in bench.measurements],
            "fp8_measurements": [asdict(m) for m in bench.fp8_measurements],
        }
        with atomic_file(folder / f"{now}-kernels.json") as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n")
        with atomic_file(folder / f"{now}-kernels.md") as temporary:
            temporary.write_text(f"{heading(about, command)}\n{text}")
        sys.stdout.write(json.dumps(content["marks"], indent=2) + "\n")
    for m in wrong + wrong_fp8:
        sys.stderr.write(f"WRONG: {m.candidate} on {m.case}: error {m.error:.2e}, allowed {m.allowed_error:.2e}\n")
    return 1 if wrong or wrong_fp8 else 0


if __name__ == "__main__":
    sys.exit(main())
