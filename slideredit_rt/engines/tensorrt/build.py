"""ONNX to a serialized engine: with TensorRT-RTX on any machine, with TensorRT for the card at hand.

The two packages share their Python interface.
"""

from __future__ import annotations

import collections
import json
import math
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
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
# The plan and the builder's working copy: 4.3 GB at the peak for 2.05 GB of weights, measured on a FLUX of full width.
MEMORY_FACTOR = 2.2
MEMORY_BASE = 2**30


def profile_ranges(batch: Range, text_rows: Range, image_rows: Range, sliders: Range) -> dict[str, Range]:
    """Smallest, usual and largest size of each dynamic axis; the sliders' `rows` are text rows plus image rows."""
    low, usual, high = (a + b for a, b in zip(text_rows, image_rows, strict=True))
    sizes = {"batch": batch, "text_rows": text_rows, "image_rows": image_rows, "sliders": sliders}
    return sizes | {"rows": (low, usual, high)}


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


def build_plan(backend: TensorRT, job: BuildJob, model: Path, specs: Sequence[TensorSpec], folder: Path) -> dict[str, int]:
    """Build `model.engine` from an ONNX model whose slider nodes have been lowered, and log the build to `build.log`.

    Strongly typed: tensors keep the dtypes of the graph. TensorRT-RTX needs no GPU.

    Args:
        backend: TensorRT or TensorRT-RTX.
        job: its settings give the lowering and the builder's options, its limits the profile and the targets.
        model: with its external data beside it.
        specs: the engine's inputs.
        folder: an existing folder for the two files.

    Returns:
        Number of layers by type in the parsed network, before TensorRT fused them.

    Raises:
        SliderEditError: package missing, target unknown, too little memory, a node that the parser refuses (with its name),
            or a failed build.
        KeyboardInterrupt: SIGINT or SIGTERM came during the build.
    """
    trt = backend.module()
    weight_bytes = sum(file.stat().st_size for file in model.parent.iterdir() if file.is_file())
    sentence = check_memory(weight_bytes, psutil.virtual_memory().available)
    if job.progress:
        tqdm.write(f"{backend.title} takes {sentence}", file=sys.stderr)
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
        optimization = builder.create_optimization_profile()
        for spec in specs:
            optimization.set_shape(spec.name, *job.limits.shapes(spec))
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
    """Give a builder configuration the options that TensorRT and TensorRT-RTX share."""
    # So that `inspect` can tell what fused layers are.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib * 2**20)
    if options.weight_streaming:
        config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)


def configure_targets(trt: Any, config: Any, targets: Sequence[str]) -> None:
    """Tell a builder of TensorRT-RTX what it builds for."""
    capabilities = compute_capabilities(trt, targets)
    config.num_compute_capabilities = len(capabilities)
    for index, capability in enumerate(capabilities):
        config.set_compute_capability(capability, index)


def configure_card(trt: Any, config: Any, options: TensorRTOptions) -> None:
    """Give a builder configuration what TensorRT alone has."""
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
