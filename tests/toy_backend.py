"""A backend in one file: eager torch on the CPU, float32. With a line in `slideredit_rt.engines` it would be one of ours."""

from __future__ import annotations

from pathlib import Path

import torch

from slideredit_rt.adapters import load_adapter
from slideredit_rt.checkpoint import meta_transformer
from slideredit_rt.engines.backend import Backend, BuildJob, Compiled, Engine
from slideredit_rt.engines.eager import EagerEngine
from slideredit_rt.engines.inductor import load_weights
from slideredit_rt.engines.manifest import ADAPTER_FILE, Manifest
from slideredit_rt.families import get_family
from slideredit_rt.modules import SliderBackbone
from slideredit_rt.settings import RunSettings


class Toy(Backend):
    """The diffusers transformer, uncompiled."""

    name = "toy"
    title = "Toy"
    package = "torch"
    lowerings = ("operator",)

    def compile(self, job: BuildJob, folder: Path) -> Compiled:
        from slideredit_rt.export.linked_weights import WeightOptions, export_weights

        exported = export_weights(job.family, job.base, job.adapter, folder, WeightOptions(job.dtype))
        return Compiled(exported, exported.files, exported.links)

    def open(self, folder: Path, manifest: Manifest, run: RunSettings) -> Engine:
        family, transformer = get_family(manifest.family), meta_transformer(folder)
        load_weights(transformer, [folder / name for name in manifest.links], torch.device("cpu"))
        backbone = SliderBackbone(family, transformer, load_adapter(folder / ADAPTER_FILE, family)).eval()
        return EagerEngine(backbone, torch.device("cpu"))
