"""Pad interpolation: at every attention layer, the instruction's rows are blended with a padding row.

It is the paper's interpretability probe, `y_j ← (1 − β) y_j + β y_pad`. It changes activations inside the backbone, so it
runs in eager PyTorch; existing engines cannot run it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from slideredit_rt.editor import SliderEditor
from slideredit_rt.errors import SliderEditError
from slideredit_rt.evaluation.dataset import Case
from slideredit_rt.evaluation.setup import Setup
from slideredit_rt.evaluation.systems.base import System, register
from slideredit_rt.preparing import Prepared


@contextmanager
def interpolated_rows(transformer: nn.Module, weight: Tensor, pad_row: int) -> Iterator[None]:
    """Blend the text rows that enter each attention layer with a padding row, while the context is open.

    Args:
        transformer: Backbone.
        weight: β of each row, float `[B, text_rows]`.
        pad_row: Index of a padding token's text row.
    """
    rows = weight.shape[1]

    def blend(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        # Dual-stream blocks pass text rows separately, single-stream blocks pass them in front of the image rows.
        name = "encoder_hidden_states" if kwargs.get("encoder_hidden_states") is not None else "hidden_states"
        value: Tensor = kwargs[name]
        beta = weight[:, :, None].to(value)
        text = torch.lerp(value[:, :rows], value[:, pad_row : pad_row + 1].expand(-1, rows, -1), beta)
        return args, kwargs | {name: torch.cat([text, value[:, rows:]], dim=1)}

    layers = [module for name, module in transformer.named_modules() if re.search(r"blocks\.\d+\.attn$", name)]
    hooks = [layer.register_forward_pre_hook(blend, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@register
class PadInterpolation(System):
    """Pad interpolation with strength 1 − β."""

    name, knob, joint = "pad-interpolation", "1 − β", True
    ranges = ((0.0, 1.0), (0.0, 1.25), (0.0, 1.5), (0.0, 2.0))
    needs = "an ST adapter (--adapter)"
    how = "rows blended inside each attention layer, eager torch"

    def __init__(self, editor: SliderEditor) -> None:
        if editor.kind != "st" or getattr(editor.pipeline, "transformer", None) is None:
            raise SliderEditError(
                "pad interpolation needs an ST adapter and the base's transformer in PyTorch; pass --base and an ST --adapter"
            )
        self.editor = editor

    @classmethod
    def variants(cls, setup: Setup) -> list[str]:
        return [cls.name] if setup.adapters_of("st") else []

    @classmethod
    def make(cls, setup: Setup, variant: str) -> System:
        device, dtype = setup.eager
        return cls(SliderEditor.from_pretrained(setup.base, setup.adapters_of("st")[0], dtype=dtype, device=str(device)))

    def prepare(self, case: Case) -> Prepared:
        prepared = self.editor.prepare(case.image, case.instructions, prompt=case.prompt, seed=case.seed)
        tokens = self.editor.family.tokenize(self.editor.pipeline, prepared.prompt)
        if len(tokens) >= prepared.conditioning.text_rows:
            raise SliderEditError(f"prompt {case.prompt!r} fills all text rows and leaves none for padding; shorten it")
        return prepared

    def render(self, prepared: Prepared, settings: Sequence[Sequence[float]], steps: int) -> Tensor:
        editor, images, rows = self.editor, [], prepared.conditioning.text_rows
        for start in range(0, len(settings), editor.max_batch):
            beta = 1 - torch.tensor(settings[start : start + editor.max_batch], dtype=torch.float32)
            token_mask = prepared.token_mask.expand(len(beta), -1, -1)
            weight = (beta[:, :, None] * token_mask[:, :, :rows]).sum(1).to(editor.device)
            inputs = editor.frozen_inputs(prepared, len(beta))
            with interpolated_rows(editor.pipeline.transformer, weight, rows - 1):
                images.append(editor.denoise(prepared.conditioning, inputs, steps))
        return torch.cat(images)
