"""Rows (edits of one image each, at their own step) and the batches in which they are denoised."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from slideredit_rt.editor import SliderEditor
from slideredit_rt.families import Schedule
from slideredit_rt.preparing import Prepared
from slideredit_rt.strength import Strength

_ALPHA = "alpha"  # written in every step
_SLIDERS = (_ALPHA, "token_mask")  # padded to the engine's max_sliders
_REFERENCE = "reference"  # index of each row's source images, for families that read them once
_OF_THE_STEP = ("hidden_states", "timestep")  # written in every step and shared with the negative pass


@dataclass(eq=False)
class Row:
    """One image while it is denoised.

    Attributes:
        editor: The editor that runs the row, with its adapter.
        owner: The job that the image belongs to.
        index: Position of the image among the owner's.
        key: Equal for rows that can share an engine call.
        inputs, negative: Backbone inputs of the pass and of the negative pass, each with batch size 1. The rows of an owner
            share them.
        alphas: Alpha of every step, `[steps, 1, K]`, for a bank `[steps, 1, K, G]`.
        seed: Seed of the noise.
        frozen: First steps in which the sliders do not act, which the rows of an owner with the same seed share.
        first_key, final_key: Keys for the content of the latents after the frozen steps and after all steps; None without a
            cache.
        latents: `[1, latent_rows, C]`, after `step` steps.
        schedule: Noise levels of the run, on the device of the latents.
        true_cfg_scale: Scale of the guidance against `negative`, `[1, 1, 1]`.
        height, width: Size of the image, in pixels.
        interactive: True for a preview.
        step: Denoising steps done.
        begin: Value of `step` before the first step that this row makes itself.
        followers: Rows that continue from this row's latents after the frozen steps.
        made: Mark of the work that wrote the tensors, for a `Lane` that has not taken them; None if there is no such lane.
    """

    editor: SliderEditor
    owner: Any
    index: int
    key: tuple[Hashable, ...]
    inputs: dict[str, Tensor]
    negative: dict[str, Tensor] | None
    alphas: Tensor
    seed: int
    frozen: int
    first_key: tuple[Hashable, ...] | None
    final_key: tuple[Hashable, ...] | None
    latents: Tensor
    schedule: Schedule
    true_cfg_scale: Tensor
    height: int
    width: int
    interactive: bool = False
    step: int = 0
    begin: int = 0
    made: Any = None
    followers: list[Row] = field(default_factory=list)

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors of the row."""
        schedule = (self.schedule.timesteps, self.schedule.deltas)
        own = (self.alphas, self.latents, *schedule, self.true_cfg_scale)
        adapter = self.editor.adapter.tensors if self.editor.adapter else ()
        return [*adapter, *self.inputs.values(), *(self.negative or {}).values(), *own]

    @property
    def steps(self) -> int:
        return len(self.schedule)

    @property
    def done(self) -> bool:
        return self.step == self.steps

    def continue_from(self, latents: Tensor, step: int) -> None:
        """Continue a run whose first steps were made elsewhere.

        Args:
            latents: `[1, latent_rows, C]` after these steps; they are not changed.
            step: Number of these steps.
        """
        self.latents, self.step, self.begin = latents, step, step


def make_rows(
    editor: SliderEditor,
    prepared: Prepared,
    strengths: Sequence[Sequence[Strength]],
    seeds: Sequence[int],
    steps: int,
    *,
    owner: Any = None,
    interactive: bool = False,
) -> list[Row]:
    """Make one row per image.

    Args:
        editor: The editor that runs the rows.
        prepared: The encoded request.
        strengths: Slider strengths of each image.
        seeds: Noise seed of each image.
        steps: Denoising steps.
        owner: The job that the images belong to.
        interactive: True for a preview.

    Raises:
        SliderEditError: `SliderEditor.alphas` rejects the strengths, or the base's scheduler the number of steps.
    """
    family, conditioning = editor.family, prepared.conditioning
    settings = replace(prepared.settings, steps=steps)
    alphas, frozen = editor.alphas_of_run(prepared, strengths, settings), editor.frozen_steps(settings)
    inputs = editor.backbone_inputs(prepared, alphas[0, :1])
    negative = family.negative_inputs(editor.config, conditioning, inputs)
    adapter = editor.adapter and editor.adapter.key
    key = (
        adapter,
        conditioning.height,
        conditioning.width,
        conditioning.sizes,
        _shapes(inputs),
        _shapes(negative or {}),
    )
    latent_rows, device = conditioning.latents.shape[1], conditioning.latents.device
    schedule = family.schedule(editor.pipeline, latent_rows, steps).to(device)
    true_cfg_scale = torch.full((1, 1, 1), conditioning.true_cfg_scale, device=device)
    rows = []
    for index, (alpha, seed) in enumerate(zip(alphas.split(1, dim=1), seeds, strict=True)):
        run = (*prepared.content, seed, steps)
        noise = family.draw_noise(editor.pipeline, conditioning.height, conditioning.width, seed)
        rows.append(
            Row(
                editor=editor,
                owner=owner,
                index=index,
                key=key,
                inputs=inputs,
                negative=negative,
                alphas=alpha.to(device),
                seed=seed,
                frozen=frozen,
                # No adapter acts in the first steps.
                first_key=("first_steps", *run, frozen) if prepared.content else None,
                final_key=("latents", *run, adapter, prepared.spans, alpha.numpy().tobytes()) if prepared.content else None,
                latents=noise.to(device),
                schedule=schedule,
                true_cfg_scale=true_cfg_scale,
                height=conditioning.height,
                width=conditioning.width,
                interactive=interactive,
            )
        )
    return rows


def _batched(editor: SliderEditor) -> set[str]:
    """Return the names of the backbone inputs with a batch axis."""
    return {spec.name for spec in editor.family.input_specs(editor.config) if spec.shape[0] == "batch"}


def _of_references(editor: SliderEditor) -> dict[str, int]:
    """Return the backbone inputs that rows with the same source images share, and their axis of different source images."""
    specs = editor.family.input_specs(editor.config)
    return {spec.name: spec.shape.index("references") for spec in specs if "references" in spec.shape}


def _share(values: Sequence[Tensor], axis: int) -> tuple[Tensor, list[int]]:
    """Join different tensors along an axis of size 1; return the result and the index of each tensor in it.

    A single tensor that all rows share is not copied.
    """
    different = {value.data_ptr(): value for value in values}
    places = {pointer: index for index, pointer in enumerate(different)}
    first, *others = different.values()
    return torch.cat([first, *others], axis) if others else first, [places[value.data_ptr()] for value in values]


def _shapes(inputs: dict[str, Tensor]) -> tuple[Hashable, ...]:
    """Return the shapes that must be equal for inputs to share a call.

    Inputs without a batch axis must be equal in content too; they follow from shapes and from the sizes of the source images.
    """
    return tuple((name, value.shape) for name, value in inputs.items() if name not in _SLIDERS)


class Batch:
    """Rows with the same key that are stepped together. Their inputs are concatenated once.

    Args:
        editor: The editor that runs the rows.
        rows: At least one, at most the engine's maximum batch.
    """

    def __init__(self, editor: SliderEditor, rows: Sequence[Row]) -> None:
        self.editor = editor
        self.rows = tuple(rows)
        self.inputs = self._gather([row.inputs for row in rows])
        negatives = [row.negative for row in rows if row.negative is not None]
        self.negative = None
        if negatives:
            shared = {*_OF_THE_STEP, *_of_references(editor), _REFERENCE} & self.inputs.keys()
            own = [{name: value for name, value in n.items() if name not in shared} for n in negatives]
            self.negative = self._gather(own) | {name: self.inputs[name] for name in shared}
        self.true_cfg_scale = torch.cat([row.true_cfg_scale for row in rows])
        # Column j is the step that each row makes j steps from now. No row of a batch outlives the first that is done.
        self._made, left = 0, min(row.steps - row.step for row in rows)
        self._timesteps, self._deltas = (
            torch.stack([getattr(row.schedule, name)[row.step : row.step + left] for row in rows])
            for name in ("timesteps", "deltas")
        )
        self._alphas = torch.cat([self._padded(row.alphas[row.step : row.step + left], 2) for row in rows], dim=1)

    def _padded(self, value: Tensor, axis: int) -> Tensor:
        """Pad the axis of the sliders to a fixed size, because engines re-plan for every new shape.

        An unused slot has alpha 0 and an empty mask.
        """
        return pad(value, (0, 0) * (value.ndim - 1 - axis) + (0, self.editor.max_sliders - value.shape[axis]))

    def _gather(self, inputs: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        batched, of_references = _batched(self.editor), _of_references(self.editor)
        gathered = {}
        for name, first in inputs[0].items():
            if name in _SLIDERS:
                gathered[name] = torch.cat([self._padded(i[name], 1) for i in inputs])
            elif name in of_references:
                gathered[name], places = _share([i[name] for i in inputs], of_references[name])
                gathered[_REFERENCE] = torch.cat([i[_REFERENCE] + place for i, place in zip(inputs, places, strict=True)])
            elif name == _REFERENCE:
                continue
            else:
                gathered[name] = torch.cat([i[name] for i in inputs]) if name in batched else first
        return gathered

    @torch.no_grad()
    def advance(self, *, estimate: bool = False) -> Tensor | None:
        """Advance every row by one step.

        Args:
            estimate: Also return an estimate of the clean latents.

        Returns:
            The estimate, `[B, latent_rows, C]`, or None.
        """
        latents = torch.cat([row.latents for row in self.rows])
        timesteps, deltas = self._timesteps[:, self._made], self._deltas[:, self._made, None, None]
        # In place, because an engine may have bound the tensor's memory.
        self.inputs[_ALPHA].copy_(self._alphas[self._made])
        velocity = self.editor.family.predict(
            self.editor.engine, self.inputs, latents, timesteps, self.negative, self.true_cfg_scale
        )
        # Latents are (1 − t) · clean + t · noise, and the velocity is noise − clean.
        clean = latents - timesteps[:, None, None] * velocity if estimate else None
        self._made += 1
        for row, moved in zip(self.rows, (latents + deltas * velocity).split(1), strict=True):
            row.latents = moved
            row.step += 1
        return clean
