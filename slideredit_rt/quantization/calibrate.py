"""Calibration: the largest absolute value that the inputs of each linear take during edits."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from slideredit_rt.adapters import Adapter, AdapterSource, Updates, load_adapters
from slideredit_rt.assets import world_of
from slideredit_rt.editor import SliderEditor
from slideredit_rt.engines.eager import EagerEngine
from slideredit_rt.errors import SliderEditError
from slideredit_rt.evaluation.dataset import CALIBRATION_SEEDS, Case
from slideredit_rt.evaluation.own_images import open_cases, pair_images
from slideredit_rt.evaluation.worlds import EVALUATION
from slideredit_rt.families import Family
from slideredit_rt.modules import SliderBackbone
from slideredit_rt.settings import RunSettings
from slideredit_rt.sliders import Controls
from slideredit_rt.strength import StrengthCurve

STRENGTHS = (0.0, 0.5, 1.0, 1.5)
"""Strengths of every edit: suppressed, half, plain and exaggerated."""


@dataclass(frozen=True)
class ActivationRun:
    """Edits whose activations are measured.

    Attributes:
        adapters: Adapters whose sliders move during the edits, one after the other; empty runs the frozen model.
        images: Folder of images to edit; None takes scenes of the embedded editor.
        prompts: JSON-lines file of edits, see `slideredit_rt.evaluation.own_images.read_edits`.
        cases: Largest number of edits with each adapter.
        steps: Denoising steps.
        run: Device that runs the unquantised model, and dtype of its weights.

    Raises:
        SliderEditError: Only one of `images` and `prompts` is given, or a number is below 1.
    """

    adapters: Sequence[AdapterSource] = ()
    images: Path | None = None
    prompts: Path | None = None
    cases: int = 4
    steps: int = 12
    run: RunSettings = field(default_factory=RunSettings)

    def __post_init__(self) -> None:
        if (self.images is None) != (self.prompts is None):
            raise SliderEditError("calibration needs both --calibrate IMAGES and --prompts FILE; give both")
        if self.cases < 1 or self.steps < 1:
            raise SliderEditError(f"calibration runs {self.cases} edits of {self.steps} steps; give numbers of at least 1")


def calibration_cases(run: ActivationRun, family: Family, base: Path) -> list[Case]:
    """Return the edits of a calibration.

    Args:
        run: Settings of the calibration.
        family: Family of the base.
        base: Folder of the base.

    Raises:
        SliderEditError: Images or prompts cannot be read or this base needs some and none are given.
    """
    if run.images is None or run.prompts is None:
        world = world_of(base)
        if world is None:
            raise SliderEditError(
                f"the activations of base {str(base)!r} must be calibrated on edits of your own; pass --calibrate IMAGES "
                "--prompts FILE, or a precision that only quantises weights (int8 or int4)"
            )
        return list(EVALUATION[world].dataset(seeds=CALIBRATION_SEEDS).cases("bench", run.cases, 1))
    entries = pair_images(run.images, run.prompts)
    return open_cases(entries, list(entries)[: run.cases])


def measure_activations(
    family: Family,
    base: Path,
    linears: Collection[str],
    run: ActivationRun,
    updates: Updates | None = None,
    *,
    progress: bool = True,
) -> dict[str, float]:
    """Run edits with the unquantised model in eager torch, and return the largest absolute input of each linear.

    The maximum is over all denoising steps, the passes of guidance and `STRENGTHS`.

    Args:
        family: Family of the base.
        base: Folder of the base.
        linears: Names of the linears.
        run: Edits to run.
        updates: Permanent LoRAs, which are fused into the model first.
        progress: Show a progress bar on standard error.

    Raises:
        SliderEditError: The base, an adapter, an image or a prompt cannot be used, a linear got no input, or an input was NaN
            or infinite.
    """
    cases = calibration_cases(run, family, base)
    device = run.run.choose_device()
    adapters: list[Adapter | None] = [_single(load_adapters(source, family)) for source in run.adapters]
    pipeline = family.load_pipeline(base, dtype=run.run.choose_dtype(device))
    if updates is not None:
        updates.fuse_into(pipeline.transformer)
    family.place(pipeline, device)
    maxima: dict[str, Tensor] = {}
    with tqdm(total=len(cases) * len(adapters or [None]), desc="calibrate", unit="edit", disable=not progress) as bar:
        for adapter in adapters or [None]:
            backbone = SliderBackbone(family, pipeline.transformer.eval(), adapter).to(device, pipeline.vae.dtype)
            editor = _editor(family, pipeline, backbone, device, adapter)
            with _watched(pipeline.transformer, linears, maxima):
                for case in cases:
                    # A GST slider scales the whole prompt, so there can be one only.
                    sliders = case.instructions if editor.kind == "st" else case.instructions[:1]
                    prepared = editor.prepare(case.image, sliders, prompt=case.prompt, seed=case.seed)
                    editor.render_tensor(prepared, [[s] * len(sliders) for s in STRENGTHS], steps=run.steps)
                    bar.update()
            backbone.remove()
    return _checked({name: value.item() for name, value in maxima.items()}, linears)


def _checked(maxima: dict[str, float], linears: Collection[str]) -> dict[str, float]:
    for name in linears:
        if not math.isfinite(maxima.get(name, math.nan)):
            found = f"reached {maxima[name]}" if name in maxima else "were not seen"
            raise SliderEditError(
                f"the inputs of {name} {found} in calibration; check the base with the dtype that was used, or keep the linear "
                f"with --keep {name}"
            )
    return maxima


def _single(adapter: Adapter) -> Adapter:
    if adapter.members:
        raise SliderEditError(f"adapter {adapter.source!r} is a bank; pass each member's file with its own --adapter")
    return adapter


def _editor(
    family: Family, pipeline: Any, backbone: SliderBackbone, device: torch.device, adapter: Adapter | None
) -> SliderEditor:
    """Make an editor of a backbone, which may be frozen: its sliders then have no effect."""
    controls = Controls(adapter.kind, adapter.curve, {}) if adapter else Controls("gst", StrengthCurve(), {})
    config = dict(pipeline.transformer.config)
    engine = EagerEngine(backbone, device)
    return SliderEditor(family, pipeline, engine, config, controls, max_batch=len(STRENGTHS), max_sliders=8)


@contextmanager
def _watched(transformer: nn.Module, linears: Collection[str], maxima: dict[str, Tensor]) -> Iterator[None]:
    """Update `maxima` by the inputs of linears while the block runs."""

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if not inputs[0].numel():  # a reading of source images has no text rows
                return
            largest = inputs[0].detach().abs().amax().float()
            maxima[name] = torch.maximum(maxima[name], largest) if name in maxima else largest

        return hook

    handles = [transformer.get_submodule(name).register_forward_pre_hook(watch(name)) for name in linears]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
