"""ONNX to a serialized TensorRT-RTX engine, on a machine with or without a GPU."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from tqdm import tqdm

from slideredit_rt.engines.tensorrt import PLAN_FILE
from slideredit_rt.errors import SliderEditError
from slideredit_rt.families import TensorSpec

LOG_FILE = "build.log"
# The plan and the builder's working copy: 4.3 GB at the peak for 2.05 GB of weights, measured on a FLUX of full width.
MEMORY_FACTOR = 2.2
MEMORY_BASE = 2**30
Range = tuple[int, int, int]


@dataclass(frozen=True)
class TensorRTOptions:
    """What a build can be told.

    Attributes:
        targets: compute capabilities such as `sm89` that the engine will run on.
        resolution: usual width and height of the picture, in pixels, for a square one.
        max_text_rows: most text rows of a prompt.
        optimization_level: the builder's, 0 to 5; None leaves its default.
        workspace_mib: limit of the builder's scratch memory on the device; None leaves its default.
        weight_streaming: allow the runtime to keep part of the weights in host memory.
    """

    targets: tuple[str, ...] = ("sm86", "sm89", "sm120")
    resolution: int = 1024
    max_text_rows: int = 512
    optimization_level: int | None = None
    workspace_mib: int | None = None
    weight_streaming: bool = False


@dataclass(frozen=True)
class Profile:
    """Smallest, usual and largest size of each dynamic axis. The sliders' `rows` are text rows plus image rows."""

    batch: Range
    text_rows: Range
    image_rows: Range
    sliders: Range

    def ranges(self) -> dict[str, Range]:
        """By the axis names of `TensorSpec`."""
        low, usual, high = (a + b for a, b in zip(self.text_rows, self.image_rows, strict=True))
        sizes = {"batch": self.batch, "text_rows": self.text_rows, "image_rows": self.image_rows, "sliders": self.sliders}
        return sizes | {"rows": (low, usual, high)}

    def shapes(self, spec: TensorSpec) -> list[tuple[int, ...]]:
        """Smallest, usual and largest shape of an input."""
        ranges = self.ranges()
        return [spec.resolve({axis: sizes[i] for axis, sizes in ranges.items()}) for i in range(3)]


def image_rows_of(base: Path, resolution: int) -> Range:
    """Image rows of an edit at about `resolution`² pixels: noise and reference, each pixel area within 2% of the square's.

    Kontext's preferred sizes are all within 1.5% of 1024² (diffusers, `PREFERRED_KONTEXT_RESOLUTIONS`).

    Raises:
        SliderEditError: the checkpoint has no autoencoder configuration, or the resolution is no multiple of its patch.
    """
    path = base / "vae" / "config.json"
    try:
        blocks = json.loads(path.read_text())["block_out_channels"]
    except (OSError, ValueError, KeyError) as error:
        raise SliderEditError(f"cannot read {str(path)!r} ({error}); give a whole checkpoint folder") from None
    patch = 2 ** (len(blocks) - 1) * 2
    if resolution < patch or resolution % patch:
        raise SliderEditError(f"resolution {resolution} is not a multiple of {patch}, this base's patch; choose another")
    rows = 2 * (resolution // patch) ** 2
    return max(2, rows // 4), rows, math.ceil(rows * 1.02)


def memory_needed(weight_bytes: int) -> int:
    """Host memory in bytes that a build takes at its peak."""
    return int(MEMORY_BASE + MEMORY_FACTOR * weight_bytes)


def check_memory(weight_bytes: int, available: int) -> str:
    """One sentence about the memory that a build will take.

    Raises:
        SliderEditError: the machine does not have it.
    """
    needed = memory_needed(weight_bytes)
    sentence = f"about {needed / 2**30:.1f} GiB of host memory for {weight_bytes / 2**20:,.0f} MiB of weights"
    if needed > available:
        raise SliderEditError(
            f"the build needs {sentence}, and {available / 2**30:.1f} GiB are free; build on a larger machine or free memory"
        )
    return sentence


def load_tensorrt_rtx() -> Any:
    """The `tensorrt_rtx` module.

    Raises:
        SliderEditError: it is not installed.
    """
    try:
        import tensorrt_rtx
    except ImportError as error:
        raise SliderEditError(
            f"the backend 'tensorrt-rtx' needs a package that is missing ({error}); pip install 'slideredit-rt[tensorrt-rtx]'"
        ) from None
    return tensorrt_rtx


def compute_capabilities(trt: Any, targets: Sequence[str]) -> list[Any]:
    """TensorRT-RTX's names of `sm86` and the like.

    Raises:
        SliderEditError: a target that it does not build for; the sentence lists those that it does.
    """
    known = {name.lower(): value for name, value in trt.ComputeCapability.__members__.items() if name.startswith("SM")}
    for target in targets:
        if target not in known:
            raise SliderEditError(
                f"TensorRT-RTX {trt.__version__} does not build for {target!r}; choose from {', '.join(sorted(known))}"
            )
    return [known[target] for target in targets]


def _logger(trt: Any, file: Any) -> Any:
    class FileLogger(trt.ILogger):
        """Everything the builder says goes to the file, errors are kept for the sentence that a person sees."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            file.write(f"{severity.name}: {message}\n")
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)

    return FileLogger()


def _monitor(trt: Any, progress: bool) -> Any:
    class Bar(trt.IProgressMonitor):
        """The outermost phase of the builder as a progress bar, with the name of what it is doing inside."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.outermost: str | None = None
            self.bar: tqdm[Any] | None = None

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if self.bar is None:
                self.outermost = phase_name
                self.bar = tqdm(total=num_steps, desc=phase_name, leave=False, disable=not progress)
            else:
                self.bar.set_postfix_str(phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if self.bar is not None and phase_name == self.outermost:
                self.bar.update()
            return True

        def phase_finish(self, phase_name: str) -> None:
            if self.bar is not None and phase_name == self.outermost:
                self.bar.close()
                self.bar = None

    return Bar()


def build_plan(
    onnx_path: Path,
    folder: Path,
    specs: Sequence[TensorSpec],
    profile: Profile,
    options: TensorRTOptions,
    *,
    progress: bool = True,
) -> None:
    """Build `model.engine` from an ONNX model whose slider nodes are local functions, and log the build to `build.log`.

    Strongly typed: tensors keep the dtypes of the graph. Needs no GPU; the result runs on the `targets` only.

    Args:
        onnx_path: with its external data beside it.
        folder: an existing folder for the two files.
        specs: the engine's inputs.
        profile: sizes of the dynamic axes.
        options: targets and builder settings.
        progress: a bar on standard error.

    Raises:
        SliderEditError: package missing, target unknown, too little memory, a node that the parser refuses (with its name),
            or a failed build.
    """
    trt = load_tensorrt_rtx()
    capabilities = compute_capabilities(trt, options.targets)
    weight_bytes = sum(f.stat().st_size for f in onnx_path.parent.glob(f"{onnx_path.name}*"))
    sentence = check_memory(weight_bytes, psutil.virtual_memory().available)
    if progress:
        tqdm.write(f"TensorRT-RTX takes {sentence}", file=sys.stderr)
    with (folder / LOG_FILE).open("w") as file:
        logger = _logger(trt, file)
        builder = trt.Builder(logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, logger)
        if not parser.parse_from_file(str(onnx_path)):
            raise SliderEditError(_refused(parser))
        config = builder.create_builder_config()
        config.progress_monitor = _monitor(trt, progress)
        config.num_compute_capabilities = len(capabilities)
        for index, capability in enumerate(capabilities):
            config.set_compute_capability(capability, index)
        if options.optimization_level is not None:
            config.builder_optimization_level = options.optimization_level
        if options.workspace_mib is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib * 2**20)
        if options.weight_streaming:
            config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
        optimization = builder.create_optimization_profile()
        for spec in specs:
            optimization.set_shape(spec.name, *profile.shapes(spec))
        config.add_optimization_profile(optimization)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            reason = logger.errors[-1] if logger.errors else "no reason given"
            raise SliderEditError(f"TensorRT-RTX could not build the engine: {reason}")
        (folder / PLAN_FILE).write_bytes(plan)


def _refused(parser: Any) -> str:
    """The parser's first complaint, with the node that it is about and where that came from."""
    error = parser.get_error(0)
    where = f"node {error.node_name()!r} ({error.node_operator()})" if error.node_name() else "the model"
    return f"TensorRT-RTX refuses {where}: {error.desc()}; report it with the model's family and the versions in use"
