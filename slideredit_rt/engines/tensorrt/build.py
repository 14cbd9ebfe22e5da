"""ONNX to a serialized engine: with TensorRT-RTX on any machine, with TensorRT for the card at hand.

The two packages share their Python interface; `backend` is `tensorrt-rtx` or `tensorrt`.
"""

from __future__ import annotations

import collections
import importlib
import json
import math
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onnx_ir
import psutil
from tqdm import tqdm

from slideredit_rt.engines.tensorrt.engine import NAMES, PACKAGES, PLAN_FILE
from slideredit_rt.errors import SliderEditError
from slideredit_rt.export import tensorrt_plugin
from slideredit_rt.export.lowering import Lowering
from slideredit_rt.families import TensorSpec
from slideredit_rt.files import atomic_file

LOG_FILE = "build.log"
# The plan and the builder's working copy: 4.3 GB at the peak for 2.05 GB of weights, measured on a FLUX of full width.
MEMORY_FACTOR = 2.2
MEMORY_BASE = 2**30
Range = tuple[int, int, int]
HardwareCompatibility = Literal["none", "ampere_plus", "same_compute_capability"]
RTX_TARGETS = ("sm86", "sm89", "sm120")


@dataclass(frozen=True)
class TensorRTOptions:
    """What a build can be told.

    Attributes:
        targets: compute capabilities such as `sm89` that the engine will run on. TensorRT-RTX only, (`sm86`, `sm89`, `sm120`)
            if None; TensorRT builds for the card at hand.
        resolution: usual width and height of the picture, in pixels, for a square one.
        max_text_rows: most text rows of a prompt; None takes the family's usual ones.
        optimization_level: the builder's, 0 to 5; None leaves its default.
        workspace_mib: limit of the builder's scratch memory on the device; None leaves its default.
        weight_streaming: allow the runtime to keep part of the weights in host memory.
        version_compatible: later TensorRT versions of the same major run the engine. TensorRT only.
        hardware_compatibility: other cards run the engine, too: `ampere_plus` or `same_compute_capability`. TensorRT only.
        timing_cache: file of earlier builds' measurements, read if it exists and written after the build. TensorRT only.
    """

    targets: tuple[str, ...] | None = None
    resolution: int = 1024
    max_text_rows: int | None = None
    optimization_level: int | None = None
    workspace_mib: int | None = None
    weight_streaming: bool = False
    version_compatible: bool = False
    hardware_compatibility: HardwareCompatibility = "none"
    timing_cache: Path | None = None


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
    """Image rows of an edit at about `resolution`² pixels: noise and one reference, with room for other aspect ratios.

    Pixel areas may exceed the square's by 2%, for Qwen's autoencoder by 5%: Kontext's preferred sizes are all within 1.5% of
    1024² (diffusers, `PREFERRED_KONTEXT_RESOLUTIONS`), Qwen's multiples of 32 pixels within 4.3% up to an aspect ratio of 8.

    Raises:
        SliderEditError: the checkpoint has no autoencoder configuration, or the resolution is no multiple of its patch.
    """
    path = base / "vae" / "config.json"
    try:
        config = json.loads(path.read_text())
        blocks, margin = (config["dim_mult"], 1.05) if "dim_mult" in config else (config["block_out_channels"], 1.02)
    except (OSError, ValueError, KeyError) as error:
        raise SliderEditError(f"cannot read {str(path)!r} ({error}); give a whole checkpoint folder") from None
    patch = 2 ** (len(blocks) - 1) * 2
    if resolution < patch or resolution % patch:
        raise SliderEditError(f"resolution {resolution} is not a multiple of {patch}, this base's patch; choose another")
    rows = 2 * (resolution // patch) ** 2
    return max(2, rows // 4), rows, math.ceil(rows * margin)


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


def load_tensorrt(backend: str) -> Any:
    """The module `tensorrt` or `tensorrt_rtx`.

    Raises:
        SliderEditError: it is not installed.
    """
    try:
        return importlib.import_module(PACKAGES[backend])
    except ImportError as error:
        raise SliderEditError(
            f"the backend {backend!r} needs a package that is missing ({error}); pip install 'slideredit-rt[{backend}]'"
        ) from None


def targets_of(backend: str, options: TensorRTOptions) -> tuple[str, ...]:
    """Compute capabilities that the engine will be built for, checked before anything slow starts.

    Raises:
        SliderEditError: the package is missing, it does not build for a target, an option belongs to the other package, or
            TensorRT finds no card.
    """
    trt = load_tensorrt(backend)
    if backend == "tensorrt-rtx":
        foreign = [
            name
            for name in ("version_compatible", "hardware_compatibility", "timing_cache")
            if getattr(options, name) != getattr(TensorRTOptions, name)
        ]
        if foreign:
            raise SliderEditError(f"--{foreign[0].replace('_', '-')} is for --backend tensorrt; TensorRT-RTX takes --targets")
        targets = RTX_TARGETS if options.targets is None else options.targets
        compute_capabilities(trt, targets)
        return targets
    if options.targets is not None:
        raise SliderEditError(
            "--targets is for --backend tensorrt-rtx; TensorRT builds for the card at hand, and for others of its kind with "
            "--hardware-compatibility"
        )
    return (tensorrt_plugin.this_card(),)


def compute_capabilities(trt: Any, targets: Sequence[str]) -> list[Any]:
    """TensorRT-RTX's names of `sm86` and the like.

    Raises:
        SliderEditError: no target, or one that it does not build for; the sentence lists those that it does.
    """
    known = {name.lower(): value for name, value in trt.ComputeCapability.__members__.items() if name.startswith("SM")}
    if not targets:
        raise SliderEditError(f"an engine is built for one target or more; choose from {', '.join(sorted(known))}")
    for target in targets:
        if target not in known:
            raise SliderEditError(
                f"TensorRT-RTX {trt.__version__} does not build for {target!r}; choose from {', '.join(sorted(known))}"
            )
    return [known[target] for target in targets]


def plugin_target(targets: Sequence[str], options: TensorRTOptions) -> str:
    """Compute capability that plugins of an engine are compiled for: PTX runs on later ones, not on earlier ones."""
    return "sm80" if options.hardware_compatibility == "ampere_plus" else targets[0]


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


class _Interruption:
    """Whether the user asked the build to stop. A signal's exception cannot pass through the builder, which is no Python."""

    def __init__(self) -> None:
        self.asked = False

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Note SIGINT and SIGTERM instead of raising; raise `KeyboardInterrupt` at the end if one came.

        Other threads than the main one cannot set handlers and are not interrupted by signals anyway.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(signum: int, frame: Any) -> None:
            self.asked = True

        signals = (signal.SIGINT, signal.SIGTERM)
        before = [signal.signal(number, note) for number in signals]
        try:
            yield
        finally:
            for number, handler in zip(signals, before, strict=True):
                signal.signal(number, handler)
            if self.asked:
                raise KeyboardInterrupt


def _monitor(trt: Any, progress: bool, interruption: _Interruption) -> Any:
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
            return not interruption.asked

        def phase_finish(self, phase_name: str) -> None:
            if self.bar is not None and phase_name == self.outermost:
                self.bar.close()
                self.bar = None

    return Bar()


def build_plan(
    backend: str,
    onnx_path: Path,
    folder: Path,
    specs: Sequence[TensorSpec],
    profile: Profile,
    options: TensorRTOptions,
    targets: Sequence[str],
    lowering: Lowering = "native",
    *,
    progress: bool = True,
) -> dict[str, int]:
    """Build `model.engine` from an ONNX model whose slider nodes have been lowered, and log the build to `build.log`.

    Strongly typed: tensors keep the dtypes of the graph. TensorRT-RTX needs no GPU.

    Args:
        backend: `tensorrt` or `tensorrt-rtx`.
        onnx_path: with its external data beside it.
        folder: an existing folder for the two files.
        specs: the engine's inputs.
        profile: sizes of the dynamic axes.
        options: builder settings.
        targets: compute capabilities that the engine will run on (`targets_of`).
        lowering: of the graph; `plugin` registers ours first.
        progress: a bar on standard error.

    Returns:
        Number of layers by type in the parsed network, before TensorRT fused them.

    Raises:
        SliderEditError: package missing, target unknown, too little memory, a node that the parser refuses (with its name),
            or a failed build.
        KeyboardInterrupt: SIGINT or SIGTERM came during the build.
    """
    trt = load_tensorrt(backend)
    weight_bytes = sum(file.stat().st_size for file in onnx_path.parent.iterdir() if file.is_file())
    sentence = check_memory(weight_bytes, psutil.virtual_memory().available)
    if progress:
        tqdm.write(f"{NAMES[backend]} takes {sentence}", file=sys.stderr)
    interruption = _Interruption()
    with (folder / LOG_FILE).open("w") as file, interruption.watched():
        logger = _logger(trt, file)
        builder = trt.Builder(logger)
        flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        if lowering == "plugin":
            tensorrt_plugin.register(trt, plugin_target(targets, options))
            flags |= 1 << int(trt.NetworkDefinitionCreationFlag.PREFER_AOT_PYTHON_PLUGINS)
        network = builder.create_network(flags)
        parser = trt.OnnxParser(network, logger)
        if not parser.parse_from_file(str(onnx_path)):
            raise SliderEditError(_refused(parser, onnx_path, NAMES[backend]))
        config = builder.create_builder_config()
        config.progress_monitor = _monitor(trt, progress, interruption)
        optimization = builder.create_optimization_profile()
        for spec in specs:
            optimization.set_shape(spec.name, *profile.shapes(spec))
        config.add_optimization_profile(optimization)
        _configure(trt, config, backend, options, targets)
        plan = builder.build_serialized_network(network, config)
        if interruption.asked:
            return {}
        if plan is None:
            reason = logger.errors[-1] if logger.errors else "no reason given"
            raise SliderEditError(f"{NAMES[backend]} could not build the engine: {reason}")
        (folder / PLAN_FILE).write_bytes(plan)
        if options.timing_cache is not None:
            with atomic_file(options.timing_cache) as temporary:
                temporary.write_bytes(config.get_timing_cache().serialize())
    return dict(collections.Counter(network.get_layer(i).type.name for i in range(network.num_layers)))


def _configure(trt: Any, config: Any, backend: str, options: TensorRTOptions, targets: Sequence[str]) -> None:
    """Give the options to a builder configuration."""
    # So that `inspect` can tell what fused layers are.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if backend == "tensorrt-rtx":
        capabilities = compute_capabilities(trt, targets)
        config.num_compute_capabilities = len(capabilities)
        for index, capability in enumerate(capabilities):
            config.set_compute_capability(capability, index)
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib * 2**20)
    if options.weight_streaming:
        config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    if backend == "tensorrt":
        # Scratch memory then follows the sizes of a request instead of the profile's largest.
        config.set_preview_feature(trt.PreviewFeature.RUNTIME_ACTIVATION_RESIZE_10_10, True)
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.hardware_compatibility != "none":
        level = trt.HardwareCompatibilityLevel.__members__[options.hardware_compatibility.upper()]
        config.hardware_compatibility_level = level
    if options.timing_cache is not None:
        file = options.timing_cache
        cache = config.create_timing_cache(file.read_bytes() if file.exists() else b"")
        if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
            raise SliderEditError(
                f"the timing cache {str(file)!r} is damaged or was written for another card or version; name another file"
            )


def _refused(parser: Any, onnx_path: Path, name: str) -> str:
    """The parser's first complaint, with the node that it is about and where that came from."""
    error = parser.get_error(0)
    where = f"node {error.node_name()!r} ({error.node_operator()})" if error.node_name() else "the model"
    graph = onnx_ir.load(onnx_path).graph
    scopes = next((n.metadata_props.get("pkg.torch.onnx.name_scopes") for n in graph if n.name == error.node_name()), None)
    origin = f" in {scopes.split(', ')[-2][1:-1]}" if scopes and scopes.count(", ") else ""
    return f"{name} refuses {where}{origin}: {error.desc()}; report it with the model's family and the versions in use"
