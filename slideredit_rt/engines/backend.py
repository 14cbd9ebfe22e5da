"""Backend: what executes an engine and how it is built for that, one object for each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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
        """One prediction.

        Args:
            inputs: the tensors that the manifest lists, `alpha` and `token_mask` among them.

        Returns:
            `[B, image_rows, C]`, valid until the same thread's next call with the same shapes.
        """
        ...


@dataclass(frozen=True)
class BuildSettings:
    """How an engine is built.

    Attributes:
        backend: name of what will execute it.
        lowering: how the masked update is expressed: `auto` or one of the backend's (`slideredit_rt.export.lowering`).
        dtype: of the weights and the arithmetic. None keeps the checkpoint's, and is float32 for ONNX Runtime.
        batch: smallest, usual and largest B. Backends that compile for no range only take the largest.
        max_sliders: the largest K.
        allow_partial: leave out modules of the adapter that the base lacks instead of refusing it.
        copy_weights: copy the base's weights instead of linking them, so that the base may change or go. A compiled plan holds
            them anyway.
        options: what the backend alone can be told, an instance of its `build_options`; None takes its defaults.

    Raises:
        SliderEditError: batch sizes that do not rise, or a limit that no engine may have.
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
            raise SliderEditError(f"the batch sizes {sizes} do not rise from 1 or more; give MIN,OPT,MAX")
        if not 1 <= self.max_sliders <= MAX_SLIDERS:
            raise SliderEditError(f"an engine has room for 1 to {MAX_SLIDERS} sliders, got {self.max_sliders}")
        if self.batch[2] > MAX_BATCH:
            raise SliderEditError(f"an engine takes batches of at most {MAX_BATCH}, got {self.batch[2]}")


@dataclass(frozen=True)
class Limits:
    """Sizes and machines that an engine is compiled for; empty for a backend that takes any.

    Attributes:
        ranges: smallest, usual and largest size of each axis, by the axis names of `TensorSpec`.
        targets: CUDA compute capabilities such as `sm89`.
        compatibility: the manifest's section about later versions and other hardware.
    """

    ranges: Mapping[str, Range] = field(default_factory=dict)
    targets: tuple[str, ...] = ()
    compatibility: Mapping[str, Any] = field(default_factory=dict)

    def shapes(self, spec: TensorSpec) -> list[tuple[int, ...]]:
        """Smallest, usual and largest shape of an input."""
        return [spec.resolve({axis: sizes[i] for axis, sizes in self.ranges.items()}) for i in range(3)]


@dataclass(frozen=True)
class BuildJob:
    """What a backend compiles.

    Attributes:
        family, base: base-model family, and the folder of the checkpoint.
        adapter: as it fits the base; None for the frozen backbone.
        lowering: as it was chosen.
        settings: with the dtype that the backend chose.
        limits: from the backend's `precheck`.
        stage: told the name of each further stage, for the progress bar.
        progress: whether bars and notes may be written to standard error.
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
    """What a backend put into an engine folder.

    Attributes:
        export: inputs, outputs, dtype and updates of what it was compiled from.
        files: names of the files that belong to the engine.
        links: checkpoint files that lie in the folder as links, and how each was linked.
        layers: number of layers by type in the network that was compiled, before the backend fused them.
    """

    export: LinkedExport
    files: list[str]
    links: Mapping[str, Link] = field(default_factory=dict)
    layers: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class ServedModel:
    """What Triton Inference Server calls a backend's model.

    Attributes:
        platform: in `config.pbtxt`.
        source: the model's file in an engine folder.
        file: the name that the server looks for.
        is_graph: whether the file is an ONNX graph, which can be given a batch axis and reads the folder's other files.
    """

    platform: str
    source: str
    file: str
    is_graph: bool


class Backend(ABC):
    """One way to execute engines. A subclass with one object in `slideredit_rt.engines.BACKENDS` is all that a new one takes.

    Attributes:
        name: in commands and manifests.
        title: the name as its makers write it.
        package: distribution whose version counts.
        lowerings: those that it offers, the usual one first.
        build_options, run_options: dataclass of what it alone can be told for a build and for a run; None takes nothing.
        served: how Triton Inference Server runs its engines; None if it cannot.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    package: ClassVar[str]
    lowerings: ClassVar[tuple[Lowering, ...]]
    build_options: ClassVar[type[Any] | None] = None
    run_options: ClassVar[type[Any] | None] = None
    served: ClassVar[ServedModel | None] = None

    def version(self) -> str:
        """Return the version of what is installed, for the manifest."""
        return metadata.version(self.package)

    def default_lowering(self, kind: Kind | None) -> Lowering:
        """Return the lowering that `auto` means for an adapter of this kind; None stands for a frozen backbone.

        The first that it offers, and where it can the folded form for GST: a GST update touches every row, its cost is the
        bytes of a second pass over y, and the folded form makes none. That is arithmetic; on ONNX Runtime the two are equal
        within 2% (bench/NOTES.md). An ST update touches so few rows that its cost is its launches, which a compiler of
        standard operators fuses. The plugin is never chosen unasked: it may break the fusions around it.
        """
        return "folded" if kind == "gst" and "folded" in self.lowerings else self.lowerings[0]

    def choose_dtype(self, asked: DType | None) -> DType | None:
        """Return the dtype of weights and arithmetic; None keeps the checkpoint's.

        Raises:
            SliderEditError: the backend cannot compute in it.
        """
        return asked

    def precheck(self, family: Family, base: Path, settings: BuildSettings) -> Limits:
        """Refuse what cannot be built before minutes of tracing, and settle what the engine is compiled for.

        Args:
            family: of the base.
            base: folder of the checkpoint.
            settings: with the options of this backend or None.

        Raises:
            SliderEditError: a package is missing, or an option or a size cannot be had.
        """
        return Limits()

    @abstractmethod
    def compile(self, job: BuildJob, folder: Path) -> Compiled:
        """Write everything but the manifest into an empty engine folder.

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
        """Load an engine folder, whose files have been checked.

        Args:
            folder: written by `slideredit-rt build`.
            manifest: of that folder.
            threads: CPU threads; None leaves the choice to the backend.
            options: an instance of `run_options`; None takes the defaults.
            placement: the device; None takes the one that the backend prefers.

        Raises:
            SliderEditError: it cannot run here.
        """

    def report(self, folder: Path, manifest: Manifest) -> dict[str, Any] | None:
        """Describe what an engine takes and holds on its device; None where the manifest says everything.

        Raises:
            SliderEditError: it cannot run here.
        """
        return None
