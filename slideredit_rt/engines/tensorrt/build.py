"""Compilation of ONNX graphs to plans, with TensorRT-RTX for any GPU or with TensorRT for this machine's GPU.

The two packages have the same Python interface.
"""

from __future__ import annotations

import collections
import json
import math
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir
import psutil
from tqdm import tqdm

from slideredit_rt.engines.backend import BuildJob, Range
from slideredit_rt.engines.tensorrt.engine import PLAN_FILE
from slideredit_rt.engines.tensorrt.logger import make_logger
from slideredit_rt.engines.tensorrt.options import TensorRTOptions
from slideredit_rt.errors import SliderEditError
from slideredit_rt.export import tensorrt_plugin
from slideredit_rt.families import TensorSpec
from slideredit_rt.files import atomic_file

if TYPE_CHECKING:
    from slideredit_rt.engines.tensorrt import TensorRT

LOG_FILE = "build.log"
# The plan and the builder's working copy: a peak of 4.3 GB was measured for 2.05 GB of weights, on a FLUX of full width.
MEMORY_FACTOR = 2.2
MEMORY_BASE = 2**30


def profile_ranges(batch: Range, text_rows: Range, image_rows: Range, sliders: Range) -> dict[str, Range]:
    """Return the smallest, usual and largest size of each dynamic axis; `rows` of masks are text rows plus image rows."""
    low, usual, high = (a + b for a, b in zip(text_rows, image_rows, strict=True))
    sizes = {"batch": batch, "text_rows": text_rows, "image_rows": image_rows, "sliders": sliders}
    return sizes | {"rows": (low, usual, high)}


def reading_ranges(step: Mapping[str, Range], source_rows: Range) -> dict[str, Range]:
    """Return the sizes of a call that reads source images: without text rows, and without keys and values from before.

    Args:
        step: Sizes of a step.
        source_rows: Range of the rows of source images.
    """
    # TensorRT-RTX 1.7 stores weights a second time if text rows are always 0, or if the batch has another range than in a step.
    sizes = profile_ranges(step["batch"], text_rows=(0, 0, 1), image_rows=source_rows, sliders=step["sliders"])
    return sizes | {"references": step["references"], "reference_rows": (0, 0, 0), "kept_rows": source_rows}


def image_rows_of(base: Path, resolution: int, *, small_images: bool = False, images: int = 2) -> Range:
    """Return the range of image rows for edits at about `resolution`² pixels, usually noise and one source image.

    The range leaves room for other aspect ratios, whose area may exceed the square's by 2%, or by 5% for Qwen's autoencoder:
    Kontext's preferred sizes are all within 1.5% of 1024² (diffusers, `PREFERRED_KONTEXT_RESOLUTIONS`), Qwen's multiples of
    32 pixels within 4.3% up to an aspect ratio of 8.

    Args:
        base: Folder of the checkpoint.
        resolution: Width and height of a square image, in pixels.
        small_images: Let the range begin with the smallest images, for a family that does not enlarge them.
        images: Number of images.

    Raises:
        SliderEditError: The checkpoint has no autoencoder configuration, or the resolution is not a multiple of its patch.
    """
    path = base / "vae" / "config.json"
    try:
        config = json.loads(path.read_text())
        blocks, margin = (config["dim_mult"], 1.05) if "dim_mult" in config else (config["block_out_channels"], 1.02)
    except (OSError, ValueError, KeyError) as error:
        raise SliderEditError(f"cannot read {str(path)!r} ({error}); pass a complete checkpoint folder") from None
    patch = 2 ** (len(blocks) - 1) * 2
    if resolution < patch or resolution % patch:
        raise SliderEditError(f"resolution {resolution} is not a multiple of {patch}, this base's patch size; choose another")
    rows = images * (resolution // patch) ** 2
    low = images if small_images else max(images, rows // 4)
    return low, rows, math.ceil(rows * margin)


def memory_needed(weight_bytes: int) -> int:
    """Estimate the peak host memory of a build, in bytes."""
    return int(MEMORY_BASE + MEMORY_FACTOR * weight_bytes)


def check_memory(weight_bytes: int, available: int) -> str:
    """Check that there is enough memory for a build, and describe its need.

    Args:
        weight_bytes: Size of the weights, in bytes.
        available: Free host memory, in bytes.

    Raises:
        SliderEditError: There is not enough memory.
    """
    needed = memory_needed(weight_bytes)
    sentence = f"about {needed / 2**30:.1f} GiB of host memory for {weight_bytes / 2**20:,.0f} MiB of weights"
    if needed > available:
        raise SliderEditError(
            f"the build needs {sentence}, but {available / 2**30:.1f} GiB are free; build on a larger machine or free memory"
        )
    return sentence


def compute_capabilities(trt: Any, targets: Sequence[str]) -> list[Any]:
    """Convert targets such as `sm86` to TensorRT-RTX's `ComputeCapability` values.

    Raises:
        SliderEditError: There is no target, or one is not supported. The message lists the supported ones.
    """
    known = {name.lower(): value for name, value in trt.ComputeCapability.__members__.items() if name.startswith("SM")}
    if not targets:
        raise SliderEditError(f"an engine needs at least one target; choose from {', '.join(sorted(known))}")
    for target in targets:
        if target not in known:
            raise SliderEditError(
                f"TensorRT-RTX {trt.__version__} does not build for {target!r}; choose from {', '.join(sorted(known))}"
            )
    return [known[target] for target in targets]


def plugin_target(targets: Sequence[str], options: TensorRTOptions) -> str:
    """Return the compute capability to compile plugins for, the oldest target: PTX runs on later GPUs, not on earlier ones."""
    return "sm80" if options.hardware_compatibility == "ampere_plus" else targets[0]


class _Interruption:
    """Flag that is set when the user interrupts a build. An exception cannot propagate through the builder's native code."""

    def __init__(self) -> None:
        self.asked = False

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Record SIGINT and SIGTERM during the block, and raise `KeyboardInterrupt` at its end if one arrived.

        Only the main thread can set signal handlers, and only it is interrupted by signals.
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
        """Progress bar of the builder's outermost phase, labelled with the current inner phase."""

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


def build_plan(backend: TensorRT, job: BuildJob, model: Path, specs: Sequence[TensorSpec], folder: Path) -> dict[str, int]:
    """Build `model.engine` from an ONNX model whose slider nodes have been lowered, and log the build to `build.log`.

    The network is strongly typed, so tensors keep the dtypes of the graph. TensorRT-RTX does not need a GPU.

    Args:
        backend: TensorRT or TensorRT-RTX.
        job: Build job; its settings hold the lowering and the builder's options, its limits the profile and the targets.
        model: ONNX file, with its external data beside it.
        specs: Inputs of the engine.
        folder: Existing folder for the two files.

    Returns:
        Number of layers by type in the parsed network, before TensorRT fused them.

    Raises:
        SliderEditError: The package is missing, a target is unknown, there is not enough memory, the parser refuses a node
            (which the message names), or the build failed.
        KeyboardInterrupt: SIGINT or SIGTERM arrived during the build.
    """
    trt = backend.module()
    weight_bytes = sum(file.stat().st_size for file in model.parent.iterdir() if file.is_file())
    sentence = check_memory(weight_bytes, psutil.virtual_memory().available)
    if job.progress:
        tqdm.write(f"{backend.title} needs {sentence}", file=sys.stderr)
    options, interruption = backend.options_of(job.settings), _Interruption()
    with (folder / LOG_FILE).open("w") as file, interruption.watched():
        logger = make_logger(trt, file)
        builder = trt.Builder(logger)
        network = builder.create_network(_network_flags(trt, job, options))
        parser = trt.OnnxParser(network, logger)
        if not parser.parse_from_file(str(model)):
            raise SliderEditError(_refused(parser, model, backend.title))
        config = builder.create_builder_config()
        config.progress_monitor = _monitor(trt, job.progress, interruption)
        for shapes in job.limits.profiles(specs):
            optimization = builder.create_optimization_profile()
            for name, sizes in shapes.items():
                optimization.set_shape(name, *sizes)
            config.add_optimization_profile(optimization)
        configure(trt, config, options)
        backend.configure(trt, config, options, job.limits.targets)
        plan = builder.build_serialized_network(network, config)
        if interruption.asked:
            return {}
        if plan is None:
            reason = logger.errors[-1] if logger.errors else "no reason given"
            raise SliderEditError(f"{backend.title} could not build the engine: {reason}")
        (folder / PLAN_FILE).write_bytes(plan)
        if options.timing_cache is not None:
            with atomic_file(options.timing_cache) as temporary:
                temporary.write_bytes(config.get_timing_cache().serialize())
    return dict(collections.Counter(network.get_layer(i).type.name for i in range(network.num_layers)))


def _network_flags(trt: Any, job: BuildJob, options: TensorRTOptions) -> int:
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    if job.lowering == "plugin":
        tensorrt_plugin.register(trt, plugin_target(job.limits.targets, options))
        flags |= 1 << int(trt.NetworkDefinitionCreationFlag.PREFER_AOT_PYTHON_PLUGINS)
    return flags


def configure(trt: Any, config: Any, options: TensorRTOptions) -> None:
    """Set the builder options that TensorRT and TensorRT-RTX share."""
    # `inspect` needs this to report the types of fused layers.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib * 2**20)
    if options.weight_streaming:
        config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)


def configure_targets(trt: Any, config: Any, targets: Sequence[str]) -> None:
    """Set the targets of a TensorRT-RTX builder."""
    capabilities = compute_capabilities(trt, targets)
    config.num_compute_capabilities = len(capabilities)
    for index, capability in enumerate(capabilities):
        config.set_compute_capability(capability, index)


def configure_card(trt: Any, config: Any, options: TensorRTOptions) -> None:
    """Set the builder options that only TensorRT has."""
    # With this feature, scratch memory depends on the sizes of a call instead of the profile's largest sizes.
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
                f"the timing cache {str(file)!r} is damaged or was written for another GPU or version; use another file"
            )


def _refused(parser: Any, onnx_path: Path, name: str) -> str:
    """Describe the parser's first error, with the node that it refused and the module that the node came from."""
    error = parser.get_error(0)
    where = f"node {error.node_name()!r} ({error.node_operator()})" if error.node_name() else "the model"
    graph = onnx_ir.load(onnx_path).graph
    scopes = next((n.metadata_props.get("pkg.torch.onnx.name_scopes") for n in graph if n.name == error.node_name()), None)
    origin = f" in {scopes.split(', ')[-2][1:-1]}" if scopes and scopes.count(", ") else ""
    return f"{name} refuses {where}{origin}: {error.desc()}; report it with the model's family and the versions in use"
