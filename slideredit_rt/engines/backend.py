"""`Backend`, the interface through which engines are built and executed, and the values that it exchanges."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from slideredit_rt.adapters import Adapter, AdapterInputs, Fused, Updates
from slideredit_rt.engines.manifest import MAX_BATCH, MAX_FUSED, MAX_RANK, MAX_SLIDERS, Manifest
from slideredit_rt.errors import SliderEditError
from slideredit_rt.families import Family, Kind, TensorSpec
from slideredit_rt.settings import EditDefaults, RunSettings

if TYPE_CHECKING:
    from slideredit_rt.export.linked_weights import Link, LinkedExport

Range = tuple[int, int, int]
DType = Literal["float32", "bfloat16", "float16"]
Lowering = Literal["native", "folded", "plugin", "operator"]
LOWERINGS: tuple[Lowering, ...] = ("native", "folded", "plugin", "operator")


class Engine(Protocol):
    """A backbone that runs one denoising step. Any number of threads may call it at the same time.

    Attributes:
        device: Device of the engine and of its inputs.
    """

    @property
    def device(self) -> torch.device: ...

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Predict the velocity of one denoising step.

        Args:
            inputs: The tensors listed in the manifest, including `alpha` and `token_mask`.

        Returns:
            Float32 `[B, image_rows, C]`, valid until the same thread's next call with the same shapes.
        """
        ...


@dataclass(frozen=True)
class BuildSettings:
    """Settings of a build.

    Attributes:
        backend: Name of the backend.
        lowering: Form of the masked update, `auto` or one of the backend's lowerings (see `slideredit_rt.export.lowering`).
        dtype: Dtype of weights and arithmetic. None keeps the checkpoint's; for ONNX Runtime it means float32.
        batch: Smallest, usual and largest B. Backends that do not compile for a range only use the largest.
        max_sliders: Largest K.
        allow_partial: Drop modules of the adapter that the base lacks instead of refusing the adapter.
        copy_weights: Copy the base's weights instead of linking them, so that the base may be changed or deleted. Compiled
            plans always contain the weights.
        options: Options specific to the backend, an instance of its `build_options`; None uses its defaults.
        fuse: LoRAs that are added to the base's weights.
        defaults: Values of settings that an edit with the engine does not set.
        adapter_inputs: Make A and B inputs of the engine, so that it runs any adapter of one kind. An adapter given to the
            build is then the engine's default, and determines the kind and the linears.
        max_rank: Largest rank of such adapters; None takes the default adapter's, or 16 without one.
        kind: Kind of such adapters if the build has none; None takes `st`.

    Raises:
        SliderEditError: The batch sizes are not in ascending order, a limit is out of range, there are too many LoRAs, or
            options of adapter inputs are given for an engine without them.
    """

    backend: str = "onnxruntime"
    lowering: str = "auto"
    dtype: DType | None = None
    batch: Range = (1, 1, 16)
    max_sliders: int = 8
    allow_partial: bool = False
    copy_weights: bool = False
    options: Any = None
    fuse: tuple[Fused, ...] = ()
    defaults: EditDefaults = field(default_factory=EditDefaults)
    adapter_inputs: bool = False
    max_rank: int | None = None
    kind: Kind | None = None

    def __post_init__(self) -> None:
        if not self.adapter_inputs and (self.max_rank, self.kind) != (None, None):
            raise SliderEditError("--max-rank and --kind describe adapter inputs; pass --adapter-inputs as well")
        if self.max_rank is not None and not 1 <= self.max_rank <= MAX_RANK:
            raise SliderEditError(f"adapter inputs can have a rank of 1 to {MAX_RANK}, got {self.max_rank}")
        if len(self.fuse) > MAX_FUSED:
            raise SliderEditError(f"got {len(self.fuse)} LoRAs to fuse; pass at most {MAX_FUSED}")
        if not 1 <= self.batch[0] <= self.batch[1] <= self.batch[2]:
            sizes = ",".join(map(str, self.batch))
            raise SliderEditError(f"the batch sizes {sizes} are not ascending from at least 1; pass MIN,OPT,MAX")
        if not 1 <= self.max_sliders <= MAX_SLIDERS:
            raise SliderEditError(f"an engine can have 1 to {MAX_SLIDERS} sliders, got {self.max_sliders}")
        if self.batch[2] > MAX_BATCH:
            raise SliderEditError(f"an engine can have a batch size of at most {MAX_BATCH}, got {self.batch[2]}")


@dataclass(frozen=True)
class Limits:
    """Sizes and GPUs that an engine is compiled for; empty for a backend that accepts any.

    Attributes:
        ranges: Smallest, usual and largest size of each axis in a step, by the axis names of `TensorSpec`.
        reading: The same for a call that reads source images; empty for a family that has no such call.
        targets: CUDA compute capabilities such as `sm89`.
        compatibility: Section of the manifest on later versions and other hardware.
    """

    ranges: Mapping[str, Range] = field(default_factory=dict)
    targets: tuple[str, ...] = ()
    compatibility: Mapping[str, Any] = field(default_factory=dict)
    reading: Mapping[str, Range] = field(default_factory=dict)

    def profiles(self, specs: Sequence[TensorSpec]) -> list[dict[str, list[tuple[int, ...]]]]:
        """Return the smallest, usual and largest shape of inputs by name: in a step, and if there is one, in a reading."""
        return [
            {spec.name: [spec.resolve({axis: sizes[i] for axis, sizes in ranges.items()}) for i in range(3)] for spec in specs}
            for ranges in (self.ranges, self.reading)
            if ranges
        ]


@dataclass(frozen=True)
class BuildJob:
    """Inputs of `Backend.compile`.

    Attributes:
        family: Base-model family.
        base: Folder of the checkpoint.
        adapter: Adapter, already fitted to the base, or the layout of adapter inputs; None for the frozen backbone.
        lowering: Chosen lowering.
        settings: Build settings, with the dtype that the backend chose.
        limits: Result of the backend's `precheck`.
        stage: Function that is called with the name of each further stage, for the progress bar.
        progress: Allow progress bars and notes on standard error.
        updates: LoRAs to add to the base's weights.
    """

    family: Family
    base: Path
    adapter: Adapter | AdapterInputs | None
    lowering: Lowering
    settings: BuildSettings
    limits: Limits = field(default_factory=Limits)
    stage: Callable[[str], None] = lambda name: None
    progress: bool = False
    updates: Updates = field(default_factory=Updates)

    @property
    def dtype(self) -> torch.dtype | None:
        """The settings' dtype, as torch's."""
        dtype: torch.dtype | None = None if self.settings.dtype is None else getattr(torch, self.settings.dtype)
        return dtype


@dataclass(frozen=True)
class Compiled:
    """Result of `Backend.compile`.

    Attributes:
        export: Inputs, outputs, dtype and updates of the export that was compiled.
        files: Names of the engine's files in the folder.
        links: Checkpoint files linked into the folder, and how each was linked.
        layers: Number of layers by type in the compiled network, before the backend fused them.
        weight_streaming: True if weights can be copied from the host in every step.
        plan: Types that a compiled plan computes in, see `Manifest.plan`.
    """

    export: LinkedExport
    files: list[str]
    links: Mapping[str, Link] = field(default_factory=dict)
    layers: Mapping[str, int] = field(default_factory=dict)
    weight_streaming: bool = False
    plan: Mapping[str, dict[str, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class ServedModel:
    """Form in which Triton Inference Server runs a backend's model.

    Attributes:
        platform: `platform` in `config.pbtxt`.
        source: Name of the model's file in an engine folder.
        file: File name that the server expects.
        is_graph: True for an ONNX graph, which can be given a batch axis and reads other files of the folder.
    """

    platform: str
    source: str
    file: str
    is_graph: bool


class Backend(ABC):
    """One way to build and execute engines. To add one, register an instance of a subclass in `slideredit_rt.engines.BACKENDS`.

    Attributes:
        name: Name in commands and manifests.
        title: Name as its makers write it.
        package: Distribution whose version is recorded in manifests.
        lowerings: Supported lowerings, the default first.
        build_options: Dataclass of its own build options; None if it has none.
        run_options: Dataclass of its own run options; None if it has none.
        served: Form in which Triton Inference Server runs its engines; None if it cannot.
        quantised: Precisions of quantised bases that it runs, and the form of their projections in its graph (see
            `slideredit_rt.export.quantised`); `module` for a backend without a graph.
        streams: True if it can build engines whose weights are copied from the host in every step.
        reads_images: True if its engines have `read` (see `slideredit_rt.families.Reader`), for families that read source
            images once.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    package: ClassVar[str]
    lowerings: ClassVar[tuple[Lowering, ...]]
    build_options: ClassVar[type[Any] | None] = None
    run_options: ClassVar[type[Any] | None] = None
    served: ClassVar[ServedModel | None] = None
    quantised: ClassVar[Mapping[str, str]] = {}
    streams: ClassVar[bool] = False
    reads_images: ClassVar[bool] = False

    def version(self) -> str:
        """Return the version of the installed package, for the manifest."""
        return metadata.version(self.package)

    def check_run_options(self, options: Any) -> None:
        """Check that run options are an instance of `run_options`.

        Raises:
            SliderEditError: The backend takes other run options, or none.
        """
        if self.run_options is None:
            raise SliderEditError(f"{self.title} engines take no run options, got {options}; remove them")
        if not isinstance(options, self.run_options):
            names = ", ".join(one.name for one in fields(self.run_options))
            raise SliderEditError(
                f"{self.title} engines do not take {type(options).__name__}; pass {self.run_options.__name__} ({names})"
            )

    def check_streaming(self, manifest: Manifest) -> None:
        """Check that an engine can keep weights in host memory.

        Args:
            manifest: Manifest of the engine.

        Raises:
            SliderEditError: The backend cannot stream weights, or the engine was built without it.
        """
        if not self.streams:
            raise SliderEditError(
                f"{self.title} engines cannot stream weights from host memory, as --offload all asks; use --offload encoders, "
                "or build with --backend tensorrt --weight-streaming"
            )
        if not manifest.weight_streaming:
            raise SliderEditError(
                "the engine was built without weight streaming, so all of its weights stay on the GPU; build it again with "
                "--weight-streaming, or leave out --offload all and --weight-budget-mib"
            )

    def weight_budget(self, options: Any) -> int | Literal["auto"] | None:
        """Return the bytes of weights that run options keep on the GPU; None if they do not say.

        Args:
            options: Options that pass `check_run_options`, or None.
        """
        return None

    def with_weight_budget(self, options: Any, size: int) -> Any:
        """Return run options that keep at most `size` bytes of weights on the GPU. For backends that stream weights.

        Args:
            options: Options that pass `check_run_options`, or None.
            size: Number of bytes.
        """
        raise NotImplementedError

    def choose_device(self, manifest: Manifest, run: RunSettings) -> torch.device:
        """Return the device that an engine will run on. Loads nothing.

        Args:
            manifest: Manifest of the engine.
            run: Requested device.

        Raises:
            SliderEditError: The device does not exist, or the engine cannot run on it.
        """
        return run.choose_device()

    def default_lowering(self, kind: Kind | None, *, separate: bool = False) -> Lowering:
        """Return the lowering that `auto` selects.

        This is `folded` for GST if the backend supports it, else the backend's first lowering. A GST update touches every row,
        so its cost is the memory traffic of a second pass over y, which the folded form avoids. (This is a calculation; on
        ONNX Runtime the two are equal within 2%, see bench/NOTES.md.) An ST update touches few rows, so its cost is kernel
        launches, which compilers fuse when the update consists of standard operators. `auto` never selects `plugin`, because a
        plugin can prevent fusions around it.

        Args:
            kind: Kind of the adapter; None for a frozen backbone.
            separate: True if updates stay separate from the weights, as in the first lowering: for a quantised base, and for
                adapter inputs.
        """
        return "folded" if kind == "gst" and "folded" in self.lowerings and not separate else self.lowerings[0]

    def choose_dtype(self, asked: DType | None) -> DType | None:
        """Return the dtype of weights and arithmetic; None keeps the checkpoint's.

        Args:
            asked: Requested dtype; None leaves the choice to the backend.

        Raises:
            SliderEditError: The backend cannot compute in the requested dtype.
        """
        return asked

    def precheck(self, family: Family, base: Path, settings: BuildSettings) -> Limits:
        """Validate a build before minutes of tracing, and determine the sizes and GPUs that it is compiled for.

        Args:
            family: Family of the base.
            base: Folder of the checkpoint.
            settings: Build settings, whose `options` belong to this backend or are None.

        Raises:
            SliderEditError: A package is missing, or an option or a size is not supported.
        """
        return Limits()

    @abstractmethod
    def compile(self, job: BuildJob, folder: Path) -> Compiled:
        """Write everything except the manifest into an empty engine folder.

        Args:
            job: Model, adapter and settings.
            folder: Folder to write to.

        Raises:
            SliderEditError: The base or the adapter cannot be exported, or the build failed.
        """

    @abstractmethod
    def open(self, folder: Path, manifest: Manifest, run: RunSettings) -> Engine:
        """Load an engine folder whose files have been checked.

        Args:
            folder: Folder written by `slideredit-rt build`.
            manifest: Manifest of the folder.
            run: Device, threads and options, which are an instance of `run_options` or None.

        Raises:
            SliderEditError: The engine cannot run here.
        """

    def report(self, folder: Path, manifest: Manifest) -> dict[str, Any] | None:
        """Describe an engine's memory and layers on its device; None if there is nothing to add to the manifest.

        Args:
            folder: Folder written by `slideredit-rt build`.
            manifest: Manifest of the folder.

        Raises:
            SliderEditError: The engine cannot run here.
        """
        return None
