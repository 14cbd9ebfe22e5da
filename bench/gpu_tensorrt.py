"""Correctness and step time of TensorRT engines with sliders on a GPU (`make gpu-trt`).

For every installed TensorRT flavour, the embedded editor (and with `--full-width` a FLUX of 2 + 2 blocks at 1024²) is built in
bfloat16 with every lowering, and quantised to every precision that the card computes in. Each engine runs with 20 slider
settings through one captured graph, is compared with eager torch and timed. `--rehearse` works on any machine: plans are built
but not run, the same graphs are compared in ONNX Runtime, and nothing is timed or written.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    from diffusers import AutoencoderKL, AutoModel, FluxTransformer2DModel

    from slideredit_rt.adapters import Adapter, load_adapter
    from slideredit_rt.assets import resolve_base
    from slideredit_rt.bench.full_size import RANDOM_AMAX
    from slideredit_rt.bench.gpu_kernels import commit
    from slideredit_rt.checkpoint import meta_transformer
    from slideredit_rt.engines import BACKENDS, BuildSettings, RuntimeOptions, get_backend, open_engine
    from slideredit_rt.engines.backend import DType
    from slideredit_rt.engines.cuda import CudaDevice
    from slideredit_rt.engines.manifest import read_manifest
    from slideredit_rt.engines.tensorrt import PLAN_FILE, TensorRT, TensorRTOptions, TensorRTRTX
    from slideredit_rt.errors import SliderEditError
    from slideredit_rt.export.build import build_engine
    from slideredit_rt.export.onnx_graph import example_inputs
    from slideredit_rt.families import KINDS, Kind, family_of
    from slideredit_rt.files import atomic_file
    from slideredit_rt.modules import SliderBackbone
    from slideredit_rt.quantization.calibrate import ActivationRun
    from slideredit_rt.quantization.precisions import PRECISIONS
    from slideredit_rt.quantization.selection import select_layers
    from slideredit_rt.quantization.write import QuantizeSettings, quantize_base
    from slideredit_rt.settings import RunSettings
except ModuleNotFoundError as missing:
    sys.exit(f"gpu_tensorrt: the package {missing.name} is missing; install slideredit-rt's dependencies into GPU_PYTHON")

FLAVOURS = {name: backend for name, backend in BACKENDS.items() if isinstance(backend, TensorRT)}
RTX = TensorRTRTX.name
SETTINGS = 20
STEPS = 50
# A plan may round at other places than eager torch, so it may have twice eager's error. FLOOR is for float32.
FACTOR, FLOOR = 2.0, 1e-5
FULL_WIDTH = {"num_layers": 2, "num_single_layers": 2, "guidance_embeds": True}


@dataclass(frozen=True)
class Case:
    """A base at one size with an adapter (None for the frozen backbone), and the lowerings to build.

    A quantised base has a `precision`. `base` is then the original, which the engine is compared with, and `quantised` the copy
    that is built.
    """

    name: str
    base: str
    adapter: str | Adapter | None
    resolution: int
    text_rows: int
    image_rows: int
    lowerings: tuple[str, ...]
    precision: str | None = None
    quantised: str | None = None

    def in_precision(self, precision: str, quantised: Path) -> Case:
        """Return the same case with a quantised copy of the base, in the only lowering that it has."""
        name = f"{self.name}, {precision}"
        return replace(self, name=name, lowerings=("native",), precision=precision, quantised=str(quantised))

    @property
    def kind(self) -> str:
        if self.adapter is None:
            return "frozen"
        return self.adapter.kind if isinstance(self.adapter, Adapter) else self.adapter.removeprefix("shapes-")


@dataclass
class Measurement:
    """Result of one engine.

    Errors are RMS differences from a reference of higher precision, relative to its RMS. `milliseconds` is the median of a
    step and `eager_milliseconds` that of eager torch in the same dtype. Both are None if the engine was not timed; `note` has
    the reason.
    """

    case: str
    kind: str
    backend: str
    version: str
    lowering: str
    updates: dict[str, int] = field(default_factory=dict)
    build_seconds: float | None = None
    plan_mib: float | None = None
    error: float | None = None
    allowed_error: float | None = None
    graph_equals_enqueue: bool | None = None
    milliseconds: float | None = None
    eager_milliseconds: float | None = None
    note: str = ""

    @property
    def wrong(self) -> bool:
        """True if the engine ran and its result is wrong."""
        too_far = self.error is not None and self.allowed_error is not None and not self.error <= self.allowed_error
        return too_far or self.graph_equals_enqueue is False


def random_checkpoint(folder: Path, config: Mapping[str, Any]) -> Path:
    """Write a FLUX checkpoint with random bfloat16 weights, the embedded editor's text encoders and a small autoencoder."""
    shutil.copytree(resolve_base("shapes-kontext"), folder, ignore=shutil.ignore_patterns("transformer", "vae"))
    torch.manual_seed(0)
    FluxTransformer2DModel(**config).to(torch.bfloat16).save_pretrained(folder / "transformer")
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32,) * 4,
        latent_channels=16,
    ).save_pretrained(folder / "vae")
    return folder


def random_adapter(base: Path, kind: Kind) -> Adapter:
    """Return a random adapter of rank 16 on the usual linears, whose update is about a tenth of the projection."""
    family = family_of(base)
    transformer = AutoModel.from_pretrained(str(base / "transformer"), dtype=torch.bfloat16, local_files_only=True)
    linears = {n: m for n, m in transformer.named_modules() if isinstance(m, torch.nn.Linear)}
    g = torch.Generator().manual_seed(0)
    pairs = {
        name: (
            torch.randn(16, m.in_features, generator=g) / m.in_features**0.5,
            0.02 * torch.randn(m.out_features, 16, generator=g),
        )
        for name, m in linears.items()
        if family.targets(kind).fullmatch(name)
    }
    return Adapter(family.name, kind, 16, pairs, f"random {kind}")


def quantised_copy(base: str, precision: str, folder: Path) -> Path:
    """Quantise a base. The activations of random weights are taken to reach `RANDOM_AMAX`; the embedded base is calibrated."""
    calibration = ActivationRun(("shapes-st", "shapes-gst"), cases=4, steps=6)
    path, maxima = resolve_base(base), None
    if path != resolve_base("shapes-kontext"):
        layers = select_layers(family_of(path), meta_transformer(path / "transformer"), precision)
        maxima = dict.fromkeys(layers, RANDOM_AMAX)
    quantize_base(base, folder, QuantizeSettings(precision, calibration=calibration), maxima=maxima, progress=False)
    return folder


def in_every_precision(of: Sequence[Case], card: str, folder: Path) -> Iterator[Case]:
    """Yield cases of one base with a quantised copy in each precision that a card computes in."""
    for precision in (form.name for form in PRECISIONS.values() if form.runs_on(card)):
        copy = quantised_copy(of[0].base, precision, folder / precision)
        yield from (case.in_precision(precision, copy) for case in of)


def cases(folder: Path, card: str, *, full_width: bool) -> Iterator[Case]:
    """Yield the cases for a compute capability. Random and quantised checkpoints are written to `folder`."""
    embedded = [
        Case("embedded editor", "shapes-kontext", adapter, 64, 24, 128, TensorRT.lowerings if adapter else ("native",))
        for adapter in (None, "shapes-st", "shapes-gst")
    ]
    yield from embedded
    yield from in_every_precision(embedded[1:], card, folder / "embedded")
    if full_width:
        base = random_checkpoint(folder / "base", FULL_WIDTH)
        wide = [
            Case("FLUX 2+2, full width", str(base), adapter, 1024, 512, 8192, TensorRT.lowerings if adapter else ("native",))
            for adapter in (None, *(random_adapter(base, kind) for kind in KINDS))
        ]
        yield from wide
        yield from in_every_precision(wide, card, folder / "wide")


def rehearsal_cases(folder: Path) -> Iterator[Case]:
    """Yield the cases of a rehearsal: the embedded editor, also in INT8, and random narrow blocks instead of wide ones."""
    embedded = Case("embedded editor", "shapes-kontext", "shapes-st", 64, 24, 128, ("native",))
    yield embedded
    yield embedded.in_precision("int8", quantised_copy(embedded.base, "int8", folder / "int8"))
    narrow = FluxTransformer2DModel.load_config(resolve_base("shapes-kontext") / "transformer")
    base = random_checkpoint(folder / "base", narrow | {"num_layers": 1, "num_single_layers": 1})
    yield Case("FLUX 1+1, narrow", str(base), random_adapter(base, "gst"), 128, 24, 128, ("folded",))


class Reference:
    """Outputs of eager torch in the engine's dtype and in a wider one, for the tested slider settings.

    Args:
        case: Base, adapter and size.
        dtype: Dtype of the engine.
        device: Torch device, `cuda` or `cpu`.
    """

    @torch.no_grad()
    def __init__(self, case: Case, dtype: torch.dtype, device: str) -> None:
        path = resolve_base(case.base)
        family = family_of(path)
        adapter = load_adapter(case.adapter, family) if isinstance(case.adapter, str) else case.adapter
        transformer = AutoModel.from_pretrained(str(path / "transformer"), dtype=dtype, local_files_only=True)
        backbone = SliderBackbone(family, transformer, adapter).to(device, dtype).eval()
        sizes = (1, case.text_rows, case.image_rows, 2)
        made = [example_inputs(backbone, transformer.config, *sizes, seed=seed) for seed in range(SETTINGS)]
        self.inputs = [{name: tensor.to(device) for name, tensor in inputs.items()} for inputs in made]
        eager = [backbone(inputs) for inputs in self.inputs]
        self.milliseconds = milliseconds(lambda: backbone(self.inputs[0])) if device == "cuda" else None
        wide = torch.float32 if dtype == torch.bfloat16 else torch.float64
        exact = copy.deepcopy(backbone).to(wide)
        self.exact = [exact(inputs) for inputs in self.inputs]
        self.allowed_error = max(FACTOR * self.error(eager), FLOOR)

    def error(self, outputs: list[Tensor]) -> float:
        """Return the relative RMS error of the outputs over all settings."""
        actual, exact = torch.stack(outputs).double(), torch.stack(self.exact).double()
        return float(((actual - exact).square().mean() / exact.square().mean()).sqrt())


def milliseconds(call: Callable[[], object]) -> float:
    """Return the median time of a call, measured by CUDA events."""
    times: list[float] = []
    for step in range(STEPS + 5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        if step >= 5:
            times.append(begin.elapsed_time(end))
    return statistics.median(times)


def measure(
    case: Case, reference: Reference, backend: str, lowering: str, dtype: DType, folder: Path, *, run: bool
) -> Measurement:
    """Build one engine, run it, compare it and, on a GPU, time it. Errors are recorded in the measurement's note.

    Args:
        case: Base, adapter and size.
        reference: Reference outputs.
        backend: Name of the backend.
        lowering: Name of the lowering.
        dtype: Dtype of the engine.
        folder: Output folder of the engine.
        run: False only builds the engine.
    """
    trt = FLAVOURS.get(backend)
    version = str(trt.environment().package_version) if trt else ""
    allowed = reference.allowed_error
    if case.precision is not None:
        # Random inputs, and all rows: both give larger errors than the edits that the limit is for.
        allowed += FACTOR * PRECISIONS[case.precision].limits.step_rms
    m = Measurement(case.name, case.kind, backend, version, lowering, allowed_error=allowed)
    options = None
    if trt:
        targets = (str(trt.environment().capability),) if backend == RTX and run else None
        options = TensorRTOptions(targets=targets, resolution=case.resolution, max_text_rows=case.text_rows)
    started = time.perf_counter()
    try:
        manifest = build_engine(
            case.quantised or case.base,
            case.adapter,
            folder,
            BuildSettings(backend, lowering, dtype, (1, 1, 2), max_sliders=2, options=options),
            progress=False,
        )
        m.build_seconds, m.updates = round(time.perf_counter() - started, 1), manifest.updates
        m.plan_mib = round(sum(f["bytes"] for f in manifest.files.values()) / 2**20, 1)
        if not run:
            m.note = "built, not run"
            return m
        _, engine = open_engine(folder)
        outputs = [engine(inputs).clone() for inputs in reference.inputs]
        m.error = reference.error(outputs)
        if trt:
            _, plain = open_engine(folder, RunSettings(options=RuntimeOptions(cuda_graphs=False)))
            m.graph_equals_enqueue = all(
                torch.equal(plain(inputs), output) for inputs, output in zip(reference.inputs, outputs, strict=True)
            )
            m.milliseconds = milliseconds(lambda: engine(reference.inputs[0]))
            m.eager_milliseconds = reference.milliseconds
    except SliderEditError as error:
        m.note = str(error)
    return m


def refusal(folder: Path) -> str | None:
    """Return TensorRT-RTX's error for an engine on a card that it does not support; None on a card that it supports."""
    backend = FLAVOURS[RTX]
    card, trt = str(backend.environment().capability), backend.module()
    if card.upper() in trt.ComputeCapability.__members__:
        return None
    options = TensorRTOptions(resolution=64, max_text_rows=24)
    try:
        build_engine("shapes-kontext", "shapes-st", folder, BuildSettings(RTX, options=options), progress=False)
        backend.engine(folder / PLAN_FILE, read_manifest(folder), trt, CudaDevice(), RuntimeOptions()).close()
    except SliderEditError as error:
        return str(error)
    return f"it does not build for {card}, yet loads an engine for other cards"


def table(measurements: list[Measurement]) -> str:
    """Return a Markdown table with one line per engine."""
    lines = [
        "| engine | adapter | backend | lowering | updates | build s | MiB | error | allowed | step ms | eager ms | note |",
        "|" + "---|" * 12,
    ]
    for m in measurements:
        updates = ", ".join(f"{count} {name}" for name, count in m.updates.items())
        numbers = [
            "–" if n is None else form.format(n)
            for n, form in (
                (m.build_seconds, "{:.1f}"),
                (m.plan_mib, "{:.1f}"),
                (m.error, "{:.2e}"),
                (m.allowed_error, "{:.2e}"),
                (m.milliseconds, "{:.3f}"),
                (m.eager_milliseconds, "{:.3f}"),
            )
        ]
        wrong = "WRONG " if m.wrong else ""
        lines.append("| " + " | ".join([m.case, m.kind, m.backend, m.lowering, updates, *numbers, wrong + m.note]) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run the benchmark and return the exit status: 1 if an engine computed a wrong result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="results folder (default: %(default)s)")
    parser.add_argument("--full-width", action="store_true", help="also test a FLUX of 2+2 full-width blocks at 1024²")
    parser.add_argument("--rehearse", action="store_true", help="build plans and compare in ONNX Runtime, without timing")
    args = parser.parse_args()
    rehearse: bool = args.rehearse
    if not torch.cuda.is_available() and not rehearse:
        sys.stderr.write("gpu_tensorrt: no CUDA device found; pass --rehearse to build plans and compare them on the CPU\n")
        return 2
    flavours = [name for name, backend in FLAVOURS.items() if find_spec(backend.import_name)]
    if not flavours and not rehearse:
        sys.stderr.write("gpu_tensorrt: TensorRT is not installed; pip install tensorrt or tensorrt-rtx into GPU_PYTHON\n")
        return 2
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    dtype: DType = "float32" if rehearse else "bfloat16"
    measurements: list[Measurement] = []
    refused: dict[str, str] = {}
    card = str(FLAVOURS[RTX].environment().capability)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if rehearse:
            flavours = [*(f for f in flavours if f == RTX), "onnxruntime"]
        elif RTX in flavours and (words := refusal(folder / "refused")):
            refused[FLAVOURS[RTX].title] = words
            flavours.remove(RTX)
        for case in rehearsal_cases(folder) if rehearse else cases(folder, card, full_width=args.full_width):
            reference = Reference(case, getattr(torch, dtype), "cpu" if rehearse else "cuda")
            for backend in flavours:
                for lowering in case.lowerings:
                    if lowering not in get_backend(backend).lowerings:
                        continue
                    run = not (rehearse and backend in FLAVOURS)
                    target = folder / f"engine-{len(measurements)}"
                    measurements.append(measure(case, reference, backend, lowering, dtype, target, run=run))
                    sys.stderr.write(f"{case.name} {case.kind} {backend} {lowering}: done\n")
        about = {
            "gpu": "none" if rehearse else torch.cuda.get_device_name(),
            "date": datetime.now(UTC).date().isoformat(),
            "commit": commit(),
            "torch": torch.__version__,
            "triton": triton.__version__,
        }
    about |= {FLAVOURS[m.backend].title: m.version for m in measurements if m.backend in FLAVOURS}
    text = table(measurements) + "".join(f"\n{name} does not support this card: {words}\n" for name, words in refused.items())
    sys.stdout.write(text)
    if not rehearse:
        content = {**about, "command": "make gpu-trt", "refused": refused, "measurements": [asdict(m) for m in measurements]}
        heading = f"# TensorRT engines on {about['gpu']}\n\n" + ", ".join(f"{k} {v}" for k, v in about.items() if k != "gpu")
        results = args.out / about["gpu"].lower().replace(" ", "-")
        with atomic_file(results / "tensorrt.json") as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n")
        with atomic_file(results / "tensorrt.md") as temporary:
            temporary.write_text(f"{heading}. Batch 1, median of {STEPS} steps. Reproduce: `make gpu-trt`.\n\n{text}")
    failed = any(m.wrong or (m.error is None and m.note != "built, not run") for m in measurements)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
