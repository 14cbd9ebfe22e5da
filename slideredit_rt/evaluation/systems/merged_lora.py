"""Merged LoRA: the adapter is fused into the weights for one strength and unfused again, as deployments do today."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slideredit_rt.adapters import Adapter, save_adapter
from slideredit_rt.editor import SliderEditor
from slideredit_rt.evaluation.dataset import Case
from slideredit_rt.evaluation.setup import Setup
from slideredit_rt.evaluation.systems.base import System, register
from slideredit_rt.families import Family
from slideredit_rt.preparing import Prepared
from slideredit_rt.sliders import Controls


@register
class MergedLoRA(System):
    """diffusers' `fuse_lora` and `unfuse_lora` for each strength. It affects every row, and a batch has one strength."""

    name, knob = "merged-lora", "strength"
    ranges = ((0.0, 1.0), (0.0, 1.5), (0.0, 2.0), (0.0, 3.0), (-0.5, 2.0))
    needs = "a GST adapter (--adapter)"
    how = "diffusers fuse_lora and unfuse_lora per strength, unmasked, eager torch"

    def __init__(self, family: Family, pipeline: Any, adapter: Adapter) -> None:
        """Load the adapter into `pipeline`, which must not be shared, because its weights are rewritten."""
        with tempfile.TemporaryDirectory() as folder:
            save_adapter(adapter, Path(folder) / "diffusers", "diffusers")
            pipeline.load_lora_weights(str(Path(folder) / "diffusers"), adapter_name="slider")
        family.prepare_transformer(pipeline.transformer)

        @torch.no_grad()
        def engine(inputs: Mapping[str, Tensor]) -> Tensor:
            own = {k: v for k, v in inputs.items() if k not in ("alpha", "token_mask")}
            return family.run(pipeline.transformer, own)

        config, controls = dict(pipeline.transformer.config), Controls("gst", adapter.curve)
        self.editor = SliderEditor(family, pipeline, engine, config, controls, max_batch=16, max_sliders=1)

    @classmethod
    def variants(cls, setup: Setup) -> list[str]:
        return [cls.name] if setup.adapters_of("gst") else []

    @classmethod
    def make(cls, setup: Setup, variant: str) -> System:
        device, dtype = setup.eager
        pipeline = setup.family.load_pipeline(setup.folder, dtype=dtype)
        setup.family.place(pipeline, device)
        return cls(setup.family, pipeline, setup.adapters_of("gst")[0])

    def prepare(self, case: Case) -> Prepared:
        return self.editor.prepare(case.image, case.instructions[:1], prompt=case.prompt, seed=case.seed)

    def render(self, prepared: Prepared, settings: Sequence[Sequence[float]], steps: int) -> Tensor:
        images, pipeline = [], self.editor.pipeline
        for (strength,) in settings:
            # `fuse_lora(lora_scale=…)` would multiply the scale left by earlier strengths.
            pipeline.set_adapters("slider", self.editor.curve(strength))
            pipeline.fuse_lora()
            try:
                images.append(self.editor.render_tensor(prepared, [[strength]], steps=steps))
            finally:
                pipeline.unfuse_lora()
        return torch.cat(images)
