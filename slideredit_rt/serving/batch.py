"""Rows (edits of one image each, at their own step) and the batches in which they are denoised."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from slideredit_rt.editor import Prepared, SliderEditor

_SLIDERS = ("alpha", "token_mask")  # padded to the engine's max_sliders
_OF_THE_STEP = ("hidden_states", "timestep")  # written in every step and shared with the negative pass


@dataclass(eq=False)
class Row:
    """One image while it is denoised.

    Attributes:
        owner: the job that the image belongs to.
        index: position of the image among the owner's.
        key: equal for rows that can share an engine call.
        inputs, negative: backbone inputs of the pass and of the negative pass, each with batch size 1. The rows of an owner
            share them, except for `alpha`.
        latents: `[1, latent_rows, C]`, after `step` steps.
        scheduler, timesteps: the row's own scheduler and its timesteps.
        true_cfg_scale: scale of the guidance against `negative`.
        height, width: size of the image, in pixels.
        interactive: true for a preview.
        step: denoising steps done.
    """

    owner: Any
    index: int
    key: tuple[Hashable, ...]
    inputs: dict[str, Tensor]
    negative: dict[str, Tensor] | None
    latents: Tensor
    scheduler: Any
    timesteps: Tensor
    true_cfg_scale: float
    height: int
    width: int
    interactive: bool = False
    step: int = 0

    @property
    def steps(self) -> int:
        return len(self.timesteps)

    @property
    def done(self) -> bool:
        return self.step == self.steps


def make_rows(
    editor: SliderEditor,
    prepared: Prepared,
    strengths: Sequence[Sequence[float]],
    seeds: Sequence[int],
    steps: int,
    *,
    owner: Any = None,
    interactive: bool = False,
) -> list[Row]:
    """Make one row per image.

    Args:
        editor: the editor that runs the rows.
        prepared: the encoded request.
        strengths: slider strengths of each image.
        seeds: noise seed of each image.
        steps: denoising steps.
        owner: the job that the images belong to.
        interactive: true for a preview.

    Raises:
        SliderEditError: `SliderEditor.alphas` rejects the strengths, or the base's scheduler the number of steps.
    """
    family, conditioning = editor.family, prepared.conditioning
    alphas = editor.alphas(prepared, strengths)
    inputs = editor.backbone_inputs(prepared, alphas[:1])
    negative = family.negative_inputs(editor.config, conditioning, inputs)
    key = (conditioning.height, conditioning.width, *_shape_key(editor, inputs), *_shape_key(editor, negative or {}))
    rows = []
    for index, (alpha, seed) in enumerate(zip(alphas.split(1), seeds, strict=True)):
        noise = family.draw_noise(editor.pipeline, conditioning.height, conditioning.width, seed)
        scheduler = copy.deepcopy(editor.pipeline.scheduler)
        timesteps = family.set_timesteps(editor.pipeline, scheduler, replace(conditioning, latents=noise), steps)
        rows.append(
            Row(
                owner=owner,
                index=index,
                key=key,
                inputs=inputs | {"alpha": alpha.to(inputs["alpha"].device)},
                negative=negative,
                latents=noise,
                scheduler=scheduler,
                timesteps=timesteps,
                true_cfg_scale=conditioning.true_cfg_scale,
                height=conditioning.height,
                width=conditioning.width,
                interactive=interactive,
            )
        )
    return rows


def _batched(editor: SliderEditor) -> set[str]:
    """Return the names of the backbone inputs with a batch axis."""
    return {spec.name for spec in editor.family.input_specs(editor.config) if spec.shape[0] == "batch"}


def _shape_key(editor: SliderEditor, inputs: dict[str, Tensor]) -> list[Hashable]:
    """Return what must be equal for inputs to share a call: the shape of batched inputs, the content of the others."""
    batched = _batched(editor)
    key: list[Hashable] = []
    for name, value in inputs.items():
        if name in batched:
            key.append((name, value.shape))
        elif name not in _SLIDERS:
            key.append((name, value.shape, hashlib.sha256(value.cpu().contiguous().numpy().tobytes()).digest()))
    return key


class Batch:
    """Rows with the same key that are stepped together. Their inputs are concatenated once.

    Args:
        editor: the editor that runs the rows.
        rows: at least one, at most the engine's maximum batch.
    """

    def __init__(self, editor: SliderEditor, rows: Sequence[Row]) -> None:
        self.editor = editor
        self.rows = tuple(rows)
        self.inputs = self._gather([row.inputs for row in rows])
        negatives = [row.negative for row in rows if row.negative is not None]
        self.negative = None
        if negatives:
            own = [{name: value for name, value in n.items() if name not in _OF_THE_STEP} for n in negatives]
            self.negative = self._gather(own) | {name: self.inputs[name] for name in _OF_THE_STEP}
        scales = torch.tensor([row.true_cfg_scale for row in rows], dtype=torch.float32)
        self.true_cfg_scale = scales[:, None, None].to(rows[0].latents.device)

    def _gather(self, inputs: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        batched = _batched(self.editor)
        sliders = self.editor.max_sliders
        gathered = {}
        for name, first in inputs[0].items():
            if name in _SLIDERS:
                # Pad axis 1, the sliders, to a fixed size, because engines re-plan for every new shape. An unused slot has
                # alpha 0 and an empty mask.
                values = [pad(i[name], (0, 0) * (first.ndim - 2) + (0, sliders - i[name].shape[1])) for i in inputs]
                gathered[name] = torch.cat(values)
            else:
                gathered[name] = torch.cat([i[name] for i in inputs]) if name in batched else first
        return gathered

    @torch.no_grad()
    def advance(self, *, estimate: bool = False) -> Tensor | None:
        """Advance every row by one step.

        Args:
            estimate: also return an estimate of the clean latents.

        Returns:
            The estimate, `[B, latent_rows, C]`, or None.
        """
        latents = torch.cat([row.latents for row in self.rows])
        timesteps = torch.stack([row.timesteps[row.step] for row in self.rows])
        velocity = self.editor.family.predict(
            self.editor.engine, self.inputs, latents, timesteps, self.negative, self.true_cfg_scale
        )
        # Latents are (1 − t) · clean + t · noise, and the velocity is noise − clean.
        clean = latents - (timesteps / 1000)[:, None, None].to(latents) * velocity if estimate else None
        for row, own, timestep in zip(self.rows, velocity.split(1), timesteps, strict=True):
            row.latents = row.scheduler.step(own, timestep, row.latents, return_dict=False)[0]
            row.step += 1
        return clean
