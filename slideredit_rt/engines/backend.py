"""`Backend`, the interface through which engines are built and executed, and the values that it exchanges."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from slideredit_rt.adapters import Adapter
from slideredit_rt.engines.manifest import MAX_BATCH, MAX_SLIDERS, Manifest
from slideredit_rt.errors import SliderEditError
from slideredit_rt.families import Family, Kind, TensorSpec
from slideredit_rt.placement import Placement

if TYPE_CHECKING:
    from slideredit_rt.export.linked_weights import Link, LinkedExport

Range = tuple[int, int, int]
DType = Literal["float32", "bfloat16", "float16"]
Lowering = Literal["native", "folded", "plugin", "operator"]
LOWERINGS: tuple[Lowering, ...] = ("native", "folded", "plugin", "operator")


class Engine(Protocol):
    """A backbone that runs one denoising step. Any number of threads may call it at the same time.

    Attributes:
        device: where it runs, and where its inputs should lie.
    """

    @property
    def device(self) -> torch.device: ...

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Predict the velocity of one denoising step.

        Args:
            inputs: the tensors listed in the manifest, including `alpha` and `token_mask`.

        Returns:
            Float32 `[B, image_rows, C]`, valid until the same thread's next call with the same shapes.
        """
        ...


@dataclass(frozen=True)
class BuildSettings:
    """Settings of a build.

    Attributes:
        backend: name of the backend.
        lowering: form of the masked update, `auto` or one of the backend's lowerings (see `slideredit_rt.export.lowering`).
        dtype: dtype of weights and arithmetic. None keeps the checkpoint's; for ONNX Runtime it means float32.
        batch: smallest, usual and largest B. Backends that do not compile for a range only use the largest.
        max_sliders: largest K.
        allow_partial: drop modules of the adapter that the base lacks instead of refusing the adapter.
        copy_weights: copy the base's weights instead of linking them, so that the base may be changed or deleted. Compiled
            plans always contain the weights.
        options: options specific to the backend, an instance of its `build_options`; None uses its defaults.

    Raises:
        SliderEditError: the batch sizes are not in ascending order, or a limit is out of range.
    """

    backend: str = "onnxruntime"
    lowering: str = "auto"
    dtype: DType | None = None
    batch: Range = (1, 1, 16)
    max_sliders: int = 8
    allow_partial: bool = False
    copy_weights: bool = False
    options: Any = None

    def __post_init__(self) -> None:
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
        ranges: smallest, usual and largest size of each axis, by the axis names of `TensorSpec`.
        targets: CUDA compute capabilities such as `sm89`.
        compatibility: section of the manifest on later versions and other hardware.
    """

    ranges: Mapping[str, Range] = field(default_factory=dict)
    targets: tuple[str, ...] = ()
    compatibility: Mapping[str, Any] = field(default_factory=dict)

    def shapes(self, spec: TensorSpec) -> list[tuple[int, ...]]:
        """Return the smallest, usual and largest shape of an input."""
        return [spec.resolve({axis: sizes[i] for axis, sizes in self.ranges.items()}) for i in range(3)]


@dataclass(frozen=True)
class BuildJob:
    """Inputs of `Backend.compile`.

    Attributes:
        family: base-model family.
        base: folder of the checkpoint.
        adapter: adapter, already fitted to the base; None for the frozen backbone.
        lowering: chosen lowering.
        settings: build settings, with the dtype that the backend chose.
        limits: result of the backend's `precheck`.
        stage: function that is called with the name of each further stage, for the progress bar.
        progress: allow progress bars and notes on standard error.
    """

    family: Family
    base: Path
    adapter: Adapter | None
    lowering: Lowering
    settings: BuildSettings
    limits: Limits = field(default_factory=Limits)
    stage: Callable[[str], None] = lambda name: None
    progress: bool = False

    @property
    def dtype(self) -> torch.dtype | None:
        """The settings' dtype, as torch's."""
        dtype: torch.dtype | None = None if self.settings.dtype is None else getattr(torch, self.settings.dtype)
        return dtype


@dataclass(frozen=True)
class Compiled:
    """Result of `Backend.compile`.

    Attributes:
        export: inputs, outputs, dtype and updates of the export that was compiled.
        files: names of the engine's files in the folder.
        links: checkpoint files linked into the folder, and how each was linked.
        layers: number of layers by type in the compiled network, before the backend fused them.
    """

    export: LinkedExport
    files: list[str]
    links: Mapping[str, Link] = field(default_factory=dict)
    layers: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class ServedModel:
    """Form in which Triton Inference Server runs a backend's model.

    Attributes:
        platform: `platform` in `config.pbtxt`.
        source: name of the model's file in an engine folder.
        file: file name that the server expects.
        is_graph: true for an ONNX graph, which can be given a batch axis and reads other files of the folder.
    """

    platform: str
    source: str
    file: str
    is_graph: bool


class Backend(ABC):
    """One way to build and execute engines. To add one, register an instance of a subclass in `slideredit_rt.engines.BACKENDS`.

    Attributes:
        name: name in commands and manifests.
        title: name as its makers write it.
        package: distribution whose version is recorded in manifests.
        lowerings: supported lowerings, the default first.
        build_options: dataclass of its own build options; None if it has none.
        run_options: dataclass of its own run options; None if it has none.
        served: form in which Triton Inference Server runs its engines; None if it cannot.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    package: ClassVar[str]
    lowerings: ClassVar[tuple[Lowering, ...]]
    build_options: ClassVar[type[Any] | None] = None
    run_options: ClassVar[type[Any] | None] = None
    served: ClassVar[ServedModel | None] = None

    def version(self) -> str:
        """Return the version of the installed package, for the manifest."""
        return metadata.version(self.package)

    def check_run_options(self, options: Any) -> None:
        """Check that run options are an instance of `run_options`.

        Raises:
            SliderEditError: the backend takes other run options, or none.
        """
        if self.run_options is None:
            raise SliderEditError(f"{self.title} engines take no run options, got {options}; remove them")
        if not isinstance(options, self.run_options):
            names = ", ".join(one.name for one in fields(self.run_options))
            raise SliderEditError(
                f"{self.title} engines do not take {type(options).__name__}; pass {self.run_options.__name__} ({names})"
            )

    def default_lowering(self, kind: Kind | None) -> Lowering:
        """Return the lowering that `auto` selects.

        This is `folded` for GST if the backend supports it, else the backend's first lowering. A GST update touches every row,
        so its cost is the memory traffic of a second pass over y, which the folded form avoids. (This is a calculation; on
        ONNX Runtime the two are equal within 2%, see bench/NOTES.md.) An ST update touches few rows, so its cost is kernel
        launches, which compilers fuse when the update consists of standard operators. `auto` never selects `plugin`, because a
        plugin can prevent fusions around it.

        Args:
            kind: kind of the adapter; None for a frozen backbone.
        """
        return "folded" if kind == "gst" and "folded" in self.lowerings else self.lowerings[0]

    def choose_dtype(self, asked: DType | None) -> DType | None:
        """Return the dtype of weights and arithmetic; None keeps the checkpoint's.

        Args:
            asked: requested dtype; None leaves the choice to the backend.

        Raises:
            SliderEditError: the backend cannot compute in the requested dtype.
        """
        return asked

    def precheck(self, family: Family, base: Path, settings: BuildSettings) -> Limits:
        """Validate a build before minutes of tracing, and determine the sizes and GPUs that it is compiled for.

        Args:
            family: family of the base.
            base: folder of the checkpoint.
            settings: build settings, whose `options` belong to this backend or are None.

        Raises:
            SliderEditError: a package is missing, or an option or a size is not supported.
        """
        return Limits()

    @abstractmethod
    def compile(self, job: BuildJob, folder: Path) -> Compiled:
        """Write everything except the manifest into an empty engine folder.

        Args:
            job: model, adapter and settings.
            folder: folder to write to.

        Raises:
            SliderEditError: the base or the adapter cannot be exported, or the build failed.
        """

    @abstractmethod
    def open(
        self,
        folder: Path,
        manifest: Manifest,
        *,
        threads: int | None = None,
        options: Any = None,
        placement: Placement | None = None,
    ) -> Engine:
        """Load an engine folder whose files have been checked.

        Args:
            folder: folder written by `slideredit-rt build`.
            manifest: manifest of the folder.
            threads: CPU threads; None lets the backend choose.
            options: an instance of `run_options`; None uses the defaults.
            placement: device to run on; None lets the backend choose.

        Raises:
            SliderEditError: the engine cannot run here.
        """

    def report(self, folder: Path, manifest: Manifest) -> dict[str, Any] | None:
        """Describe an engine's memory and layers on its device; None if there is nothing to add to the manifest.

        Args:
            folder: folder written by `slideredit-rt build`.
            manifest: manifest of the folder.

        Raises:
            SliderEditError: the engine cannot run here.
        """
        return None
