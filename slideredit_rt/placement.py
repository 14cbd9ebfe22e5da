"""Decision of `--offload auto` and `all`: what stays in host memory so that an edit fits into the GPU's free memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from slideredit_rt.engines import Manifest, get_backend
from slideredit_rt.errors import SliderEditError
from slideredit_rt.memory import (
    STREAMED_SHARE,
    Footprint,
    MemoryMode,
    MemoryPlan,
    ServerParts,
    engine_footprint,
    plan_memory,
)
from slideredit_rt.notes import note
from slideredit_rt.settings import RunSettings


@dataclass(frozen=True)
class Placement:
    """Decision on where the weights of an edit lie.

    Attributes:
        run: Settings whose `offload` is not `auto`, and whose `options` have the weight budget of `all`.
        plan: Memory plan behind the decision; None if the settings or the device left nothing to decide.
        reason: The decision in one line; empty without a plan.
    """

    run: RunSettings
    plan: MemoryPlan | None = None
    reason: str = ""


def choose_placement(
    folder: Path,
    manifest: Manifest,
    base: Path,
    run: RunSettings,
    device: torch.device,
    *,
    encoders: bool = True,
    server: ServerParts | None = None,
) -> Placement:
    """Decide what leaves a device, from its free memory and an engine's files. Loads no weights. The decision is a note.

    `none`, `encoders` and an explicit weight budget are not questioned. On a CPU, nothing is offloaded.

    Args:
        folder: Engine folder.
        manifest: Manifest of the folder.
        base: Folder of the checkpoint that encodes and decodes.
        run: Settings that `slideredit_rt.engines.check_run` accepts.
        device: Device that the engine will run on.
        encoders: Encoders and autoencoder will be on the device as well.
        server: Parts that a server keeps on the device in addition; None without a server.

    Raises:
        SliderEditError: An edit of one image does not fit, or files cannot be read (see `engine_footprint`).
    """
    if device.type == "cpu":
        return Placement(replace(run, offload="none"))
    backend = get_backend(manifest.backend)
    budget = backend.weight_budget(run.options)
    if run.offload in ("none", "encoders") or (run.offload == "all" and budget is not None):
        return Placement(run)
    footprint = engine_footprint(folder, manifest, base, run.choose_dtype(device), server)
    if not encoders:
        footprint = replace(footprint, encoders=0, largest_encoder_weight=0, decoder=0, decode=0, tiled_decode=0)
    if isinstance(budget, int):
        footprint = replace(footprint, weights=min(budget, footprint.weights), streams=False)
    free, total = torch.cuda.mem_get_info(device)
    modes: tuple[MemoryMode, ...] = ("all",) if run.offload == "all" else ("none", "encoders", "all")
    plan = plan_memory(footprint, free, modes)
    if not plan.fits:
        raise SliderEditError(_refusal(plan, manifest, run, device, (total - free) / 2**30, server))
    options = run.options
    if plan.offload == "all" and budget is None:
        options = backend.with_weight_budget(options, int(plan.weights_gib * 2**30))
    reason = _reason(plan, footprint, run, device, server)
    note(reason)
    return Placement(replace(run, offload=plan.offload, options=options), plan, reason)


def _reason(plan: MemoryPlan, footprint: Footprint, run: RunSettings, device: torch.device, server: ServerParts | None) -> str:
    weights = footprint.weights / 2**30
    kept = {
        "none": "keeps everything on the GPU",
        "encoders": "keeps the text encoders in host memory",
        "all": f"keeps the text encoders and {weights - plan.weights_gib:.1f} of {weights:.1f} GiB of weights in host memory",
    }[plan.offload]
    return (
        f"--offload {run.offload} {kept}: with everything on it, an edit takes {plan.needed_gib:.1f} GiB{_kept(plan, server)}, "
        f"and {device} has {plan.vram_gib:.1f} GiB free; batches of up to {plan.max_batch} fit"
    )


def _kept(plan: MemoryPlan, server: ServerParts | None) -> str:
    """Return the part of a message that says what a server keeps."""
    if server is None:
        return ""
    kept = plan.adapters_gib + plan.preview_decoder_gib + plan.cache_gib
    return f" with {kept:.1f} GiB of adapters, preview decoder and cache"


def _refusal(
    plan: MemoryPlan, manifest: Manifest, run: RunSettings, device: torch.device, used: float, server: ServerParts | None
) -> str:
    """Describe what is missing, and the options that would help this engine.

    Args:
        plan: Plan that does not fit.
        manifest: Manifest of the engine.
        run: Requested settings.
        device: Device that is too small.
        used: Memory of the device that is not free, in GiB.
        server: Parts that a server keeps on the device in addition; None without a server.
    """
    backend = get_backend(manifest.backend)
    helps = []
    if manifest.dtype == "float32":
        helps.append("build with --dtype bfloat16" + ("" if backend.streams else " and --backend inductor or tensorrt"))
    if not manifest.weight_streaming:
        helps.append("build with " + ("" if backend.streams else "--backend tensorrt ") + "--weight-streaming")
    if isinstance(backend.weight_budget(run.options), int):
        helps.append("lower --weight-budget-mib")
    if run.dtype == "float32":
        helps.append("leave out --dtype float32")
    if server is not None and server.adapters is not None and manifest.layout is not None:
        helps.append("lower --adapters-mib")
    if plan.cache_gib:
        helps.append("lower --cache-mib")
    if used > plan.missing_gib:
        helps.append(f"free some of the {used:.1f} GiB in use")
    beside = {
        "none": "",
        "encoders": " with the text encoders in host memory",
        "all": f" with the text encoders and {1 - STREAMED_SHARE:.0%} of the weights in host memory",
    }[plan.offload]
    return (
        f"{plan.missing_gib:.1f} GiB are missing on {device}: an edit of one image takes "
        f"{plan.vram_gib + plan.missing_gib:.1f} GiB{_kept(plan, server)}{beside}, and {plan.vram_gib:.1f} GiB are free; "
        f"{', or '.join(helps) or 'use a GPU with more memory'}"
    )
