"""The TensorRT and TensorRT-RTX backends and their differences. `build` compiles their engines, `engine` runs them."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from slideredit_rt.engines.backend import Backend, BuildJob, BuildSettings, Compiled, Limits, Lowering, ServedModel
from slideredit_rt.engines.cuda import CudaDevice, on_device
from slideredit_rt.engines.manifest import MODEL_FILE, Manifest
from slideredit_rt.engines.tensorrt.engine import PLAN_FILE, TensorRTEngine, TensorRTRTXEngine
from slideredit_rt.engines.tensorrt.options import RuntimeOptions, TensorRTOptions
from slideredit_rt.engines.tensorrt.report import describe_plan
from slideredit_rt.errors import SliderEditError
from slideredit_rt.families import Family
from slideredit_rt.quantization.config import read_layers
from slideredit_rt.quantization.precisions import PRECISIONS
from slideredit_rt.settings import RunSettings

if TYPE_CHECKING:
    from slideredit_rt.export.linked_weights import LinkedExport

__all__ = ["PLAN_FILE", "Environment", "RuntimeOptions", "TensorRT", "TensorRTOptions", "TensorRTRTX"]


@dataclass(frozen=True)
class Environment:
    """Properties of this machine that decide whether an engine can run.

    Attributes:
        package_version: Version of the backend's Python package; None if it cannot be imported.
        capability: Compute capability of the GPU, such as `sm89`; None without a GPU.
    """

    package_version: str | None
    capability: str | None


class TensorRT(Backend):
    """TensorRT, which builds for the GPU of the build machine.

    Attributes:
        import_name: Name of its Python package.
        engine: Class that runs a plan.
        foreign_options: Fields of `TensorRTOptions` that only the other package has.
        foreign: Error message for such an `{option}`.
        another_card: Advice for building an engine for another GPU, `{card}`.
    """

    name = "tensorrt"
    package = "tensorrt"
    import_name: ClassVar[str] = "tensorrt"
    engine: ClassVar[type[TensorRTEngine]] = TensorRTEngine
    title = TensorRTEngine.title
    lowerings: ClassVar[tuple[Lowering, ...]] = ("native", "folded", "plugin")
    quantised: ClassVar = {"fp8": "qdq", "int8": "qdq", "int4": "qdq", "nvfp4": "qdq"}
    build_options = TensorRTOptions
    run_options = RuntimeOptions
    served: ClassVar[ServedModel | None] = ServedModel("tensorrt_plan", PLAN_FILE, "model.plan", is_graph=False)
    streams = True
    reads_images = True
    foreign_options: ClassVar[tuple[str, ...]] = ("targets",)
    foreign: ClassVar[str] = (
        "--{option} is for --backend tensorrt-rtx; TensorRT builds for this machine's GPU, and for similar ones with "
        "--hardware-compatibility"
    )
    another_card: ClassVar[str] = "on this GPU, or with --hardware-compatibility ampere_plus"

    def module(self) -> Any:
        """Import the Python package.

        Raises:
            SliderEditError: The package is not installed.
        """
        try:
            return import_module(self.import_name)
        except ImportError as error:
            raise SliderEditError(
                f"the backend {self.name!r} needs a package that is missing ({error}); pip install 'slideredit-rt[{self.name}]'"
            ) from None

    def version(self) -> str:
        """Return the version from the module itself, because the distribution may have another name."""
        return str(self.module().__version__)

    @staticmethod
    def options_of(settings: BuildSettings) -> TensorRTOptions:
        """Return the builder's options, or its defaults."""
        return settings.options or TensorRTOptions()

    def targets(self, options: TensorRTOptions, precisions: Sequence[str] = ()) -> tuple[str, ...]:
        """Return the compute capabilities that an engine will be built for. Fast, so that errors are reported early.

        Args:
            options: Build options.
            precisions: Names of the precisions of the base's quantised linears, which default targets compute in.

        Raises:
            SliderEditError: The package is missing, it does not support a target, an option belongs to the other package, or
                TensorRT finds no GPU.
        """
        trt = self.module()
        for name in self.foreign_options:
            if getattr(options, name) != getattr(TensorRTOptions, name):
                raise SliderEditError(self.foreign.format(option=name.replace("_", "-")))
        return self._checked_targets(trt, options, precisions)

    def _checked_targets(self, trt: Any, options: TensorRTOptions, precisions: Sequence[str]) -> tuple[str, ...]:
        from slideredit_rt.export.tensorrt_plugin import this_card

        return (this_card(),)

    def compatibility(self, options: TensorRTOptions) -> dict[str, Any]:
        """Return the manifest's section on later versions and other hardware."""
        return {"versions": options.version_compatible, "hardware": options.hardware_compatibility}

    def configure(self, trt: Any, config: Any, options: TensorRTOptions, targets: tuple[str, ...]) -> None:
        """Set the builder options that only this package has."""
        from slideredit_rt.engines.tensorrt.build import configure_card

        configure_card(trt, config, options)

    def precheck(self, family: Family, base: Path, settings: BuildSettings) -> Limits:
        """Determine the targets and the optimization profiles (see `Backend.precheck`)."""
        from slideredit_rt.engines.tensorrt.build import image_rows_of, profile_ranges, reading_ranges

        if family.reads_images_once and settings.batch[0] > 1:
            sizes = ",".join(map(str, settings.batch))
            raise SliderEditError(
                f"a {family.name} engine reads source images in a batch of 1, which the batch sizes {sizes} leave out; pass "
                f"--batch 1,{settings.batch[1]},{settings.batch[2]}"
            )
        options = self.options_of(settings)
        targets = self.targets(options, sorted({layer.precision for layer in read_layers(base / "transformer").values()}))
        text_rows = options.max_text_rows or family.usual_text_rows
        rows = partial(image_rows_of, base, options.resolution, small_images=family.keeps_small_images)
        ranges = profile_ranges(
            batch=settings.batch,
            text_rows=(1, text_rows, text_rows),
            image_rows=rows(images=family.step_rows(1)),
            sliders=(1, min(2, settings.max_sliders), settings.max_sliders),
        )
        if not family.reads_images_once:
            return Limits(ranges, targets, self.compatibility(options))
        source = rows(images=1)
        ranges |= {"references": (1, 1, settings.batch[2]), "reference_rows": source, "kept_rows": (0, 0, 0)}
        return Limits(ranges, targets, self.compatibility(options), reading_ranges(ranges, source))

    def compile(self, job: BuildJob, folder: Path) -> Compiled:
        """Compile a temporary ONNX graph into a plan, which contains the weights (see `Backend.compile`)."""
        from slideredit_rt.engines.tensorrt.build import LOG_FILE, build_plan, plugin_target
        from slideredit_rt.export.linked_weights import WeightOptions, export_linked

        lowering, targets = job.lowering, job.limits.targets
        with tempfile.TemporaryDirectory(dir=folder) as name:
            graph = Path(name)
            exported = export_linked(
                job.family,
                job.base,
                job.adapter,
                graph,
                WeightOptions(job.dtype, quantised=self.quantised, updates=job.updates),
                lowering=lowering,
                target=plugin_target(targets, self.options_of(job.settings)) if lowering == "plugin" else None,
            )
            job.stage(f"compile for {', '.join(targets)}")
            layers = build_plan(self, job, graph / MODEL_FILE, exported.inputs, folder)
        streaming = self.options_of(job.settings).weight_streaming
        plan = self._check_plan(folder / LOG_FILE, exported)
        return Compiled(exported, [PLAN_FILE, LOG_FILE], layers=layers, weight_streaming=streaming, plan=plan)

    def _check_plan(self, log: Path, exported: LinkedExport) -> dict[str, dict[str, int]]:
        """Return the types that the plan computes in, and refuse one that expands quantised weights."""
        from slideredit_rt.engines.tensorrt.build_log import check_precisions, plan_types, read_layers

        with log.open(errors="replace") as lines:
            fused = read_layers(lines)
        check_precisions(fused, exported.precisions, self.title)
        return asdict(plan_types(fused))

    def environment(self, device: torch.device | None = None) -> Environment:
        """Inspect the properties of this process and a CUDA device that decide whether an engine can run.

        Args:
            device: GPU to look at; None takes the current one.
        """
        try:
            package: str | None = import_module(self.import_name).__version__
        except (ImportError, OSError):  # OSError: the package is installed, but a library that it loads is missing
            package = None
        if not torch.cuda.is_available():
            return Environment(package, None)
        major, minor = torch.cuda.get_device_capability(device)
        return Environment(package, f"sm{major}{minor}")

    def check_environment(self, manifest: Manifest, environment: Environment) -> None:
        """Check that an engine can run here, before anything is allocated.

        Args:
            manifest: Manifest of the engine.
            environment: Result of `environment`.

        Raises:
            SliderEditError: The package is missing or its version cannot read the plan, there is no GPU, or the engine was not
                built for this one.
        """
        installed, card, targets = environment.package_version, environment.capability, ", ".join(manifest.targets)
        if installed is None:
            raise SliderEditError(
                f"the backend {self.name!r} needs the package {self.package}, which cannot be imported here; "
                f"pip install 'slideredit-rt[{self.name}]'"
            )
        if not _reads(manifest, installed):
            later = " or a later one of the same major" if manifest.compatibility.get("versions") else ""
            raise SliderEditError(
                f"the engine was built by {self.title} {manifest.backend_version}, but {installed} is installed; "
                f"build it again or install that version{later}"
            )
        if card is None:
            raise SliderEditError(
                f"the engine needs an NVIDIA GPU ({targets}), but none is visible; "
                "build one with --backend onnxruntime for the CPU"
            )
        if manifest.compatibility.get("hardware", "none") == "ampere_plus":
            if int(card.removeprefix("sm")) < 80:
                raise SliderEditError(
                    f"the engine needs a GPU of sm80 or later, but this one is {card}; build it again on this GPU"
                )
        elif card not in manifest.targets:
            how = self.another_card.format(card=card)
            raise SliderEditError(f"the engine was built for {targets}, but this GPU is {card}; build it again {how}")

    def open(self, folder: Path, manifest: Manifest, run: RunSettings) -> TensorRTEngine:
        """Check that an engine can run here, and load it onto a CUDA device (see `Backend.open`)."""
        card = CudaDevice(self.choose_device(manifest, run))
        plan, options = folder / PLAN_FILE, run.options or RuntimeOptions()
        with on_device(card.device):
            return self.engine(plan, manifest, self.module(), card, options, run.threads)

    def weight_budget(self, options: RuntimeOptions | None) -> int | Literal["auto"] | None:
        """Return the weight budget of run options (see `Backend.weight_budget`)."""
        return None if options is None else options.weight_budget

    def with_weight_budget(self, options: RuntimeOptions | None, size: int) -> RuntimeOptions:
        """Set the weight budget of run options (see `Backend.with_weight_budget`)."""
        return replace(options or RuntimeOptions(), weight_budget=size)

    def choose_device(self, manifest: Manifest, run: RunSettings) -> torch.device:
        """Return the GPU, by default the current one, and check that the engine can run on it (see `Backend.choose_device`)."""
        device = self._device_of(run)
        self.check_environment(manifest, self.environment(device))
        return device or torch.device("cuda", torch.cuda.current_device())

    def _device_of(self, run: RunSettings) -> torch.device | None:
        """Return the requested GPU; None stands for the current one, if there is one."""
        if run.device == "cpu":
            raise SliderEditError(
                f"{self.title} engines run on NVIDIA GPUs; leave out --device cpu, or build one with --backend onnxruntime"
            )
        return None if run.device == "auto" else run.choose_device()

    def report(self, folder: Path, manifest: Manifest) -> dict[str, Any]:
        """Load a plan onto the current CUDA device and describe it (see `describe_plan`)."""
        with self.open(folder, manifest, RunSettings()) as engine:
            return describe_plan(self.module(), engine.plan)


class TensorRTRTX(TensorRT):
    """TensorRT-RTX, which builds for any list of GPUs on any machine, and does not support plugins."""

    name = "tensorrt-rtx"
    package = "tensorrt-rtx"
    import_name = "tensorrt_rtx"
    engine = TensorRTRTXEngine
    title = TensorRTRTXEngine.title
    lowerings = ("native", "folded")
    served = None
    foreign_options = ("version_compatible", "hardware_compatibility", "timing_cache")
    foreign = "--{option} is for --backend tensorrt; TensorRT-RTX takes --targets"
    another_card = "with --targets {card}"
    default_targets: ClassVar[tuple[str, ...]] = ("sm86", "sm89", "sm120")

    def _checked_targets(self, trt: Any, options: TensorRTOptions, precisions: Sequence[str]) -> tuple[str, ...]:
        from slideredit_rt.engines.tensorrt.build import compute_capabilities

        able = (target for target in self.default_targets if all(PRECISIONS[name].runs_on(target) for name in precisions))
        targets = tuple(able) if options.targets is None else options.targets
        compute_capabilities(trt, targets)
        return targets

    def compatibility(self, options: TensorRTOptions) -> dict[str, Any]:
        """Return an empty section: engines only run on their targets, in the version that built them."""
        return {}

    def configure(self, trt: Any, config: Any, options: TensorRTOptions, targets: tuple[str, ...]) -> None:
        """Set the targets of a builder configuration."""
        from slideredit_rt.engines.tensorrt.build import configure_targets

        configure_targets(trt, config, targets)


def _reads(manifest: Manifest, installed: str) -> bool:
    """Return whether the installed version can read the plan."""
    if not manifest.compatibility.get("versions"):
        return installed == manifest.backend_version
    here, there = ([int(n) for n in re.findall(r"\d+", v)] for v in (installed, manifest.backend_version))
    return here[0] == there[0] and here >= there
