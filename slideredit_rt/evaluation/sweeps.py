"""Slider quality on held-out scenes of an embedded world, whose correct edits are known."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from scipy.stats import spearmanr
from torch import Tensor
from tqdm import tqdm

from slideredit_rt.assets import DEFAULT_WORLD
from slideredit_rt.editor import SliderEditor
from slideredit_rt.evaluation.dataset import MARKS_SEEDS, Case, Dataset
from slideredit_rt.evaluation.worlds import EVALUATION
from slideredit_rt.sliders import Slider

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5)


@dataclass(frozen=True)
class SliderSweep:
    """Measures of one slider moved through `strengths` on one scene.

    Attributes:
        instruction: Text of the swept instruction.
        strengths: Strengths of the sweep.
        response: Measured attribute at each strength, 0 for the source and 1 for the exact edit.
        spearman: Rank correlation of strength and response, over strengths up to 1.
        linearity: Mean |response − strength| with the response scaled to 0 at strength 0 and 1 at strength 1; lower is better.
        erased: Distance to the source at strength 0, as a share of the distance at strength 1.
        rebuilt: Distance of the source after the autoencoder alone to the source, as the same share. An edit at strength 0
            comes hardly closer than this.
        leak: Largest change of the other instruction's attribute over strengths up to 1, as a share of its own full range;
            None if the prompt has one instruction.
        identity: Distance to the exact image where no instruction changes anything, mean over strengths up to 1, as a multiple
            of the distance of the source after the autoencoder alone; None if the instructions change every pixel.
        beyond: True if the largest strength above 1 moves the attribute further than strength 1; None without such a strength.
    """

    instruction: str
    strengths: tuple[float, ...]
    response: tuple[float, ...]
    spearman: float
    linearity: float
    erased: float
    rebuilt: float
    leak: float | None
    identity: float | None
    beyond: bool | None


def _pixels(image: Image.Image) -> Tensor:
    """Return an image as float32 `[3, H, W]` in [0, 1]."""
    return torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32) / 255).permute(2, 0, 1)


def summarise(dataset: Dataset, case: Case, index: int, strengths: Sequence[float], images: Tensor) -> SliderSweep:
    """Measure the images of a sweep.

    Args:
        dataset: Dataset of the case. Its first attribute scorer reads 0 for the source and 1 for the exact edit, and its first
            distance scorer is the distance where nothing may change.
        case: Case that was edited.
        index: Index of the swept instruction.
        strengths: Strengths of the sweep, with 0 and 1 among them.
        images: The source after the autoencoder alone, then an image for each strength, `[1 + len(strengths), 3, H, W]` in
            [0, 1].
    """
    rebuilt, *scores = dataset.score(case, images)
    responses = [next(iter(score.attributes.values())) for score in scores]
    curve = [values[index] for values in responses]
    zero, one = strengths.index(0.0), strengths.index(1.0)
    inner = [i for i, s in enumerate(strengths) if s <= 1]
    span = curve[one] - curve[zero]
    scaled = [(curve[i] - curve[zero]) / span if span else float("inf") for i in inner]
    alone, *distance = (images - _pixels(case.image)).square().flatten(1).mean(1).sqrt().tolist()
    leak = None
    if len(case.instructions) == 2:
        other = [responses[i][1 - index] for i in inner]
        # The other instruction stays at strength 1, so its full range is its response where the swept one is at 1, too.
        full = other[inner.index(one)]
        leak = max(abs(value - full) for value in other) / max(abs(full), 1e-6)
    above = [i for i, s in enumerate(strengths) if s > 1]
    own = next(iter(rebuilt.distances.values()))
    apart = [d for i in inner if (d := next(iter(scores[i].distances.values()))) is not None]
    return SliderSweep(
        instruction=case.instructions[index],
        strengths=tuple(strengths),
        response=tuple(curve),
        spearman=float(spearmanr([strengths[i] for i in inner], [curve[i] for i in inner]).statistic),
        linearity=statistics.fmean(abs(r - strengths[i]) for r, i in zip(scaled, inner, strict=True)),
        erased=distance[zero] / distance[one],
        rebuilt=alone / distance[one],
        leak=leak,
        identity=statistics.fmean(apart) / max(own, 1e-6) if apart and own is not None else None,
        beyond=curve[max(above, key=lambda i: strengths[i])] > curve[one] if above else None,
    )


@torch.no_grad()
def reconstruct(editor: SliderEditor, image: Image.Image) -> Tensor:
    """Return an image after the editor's autoencoder, float32 `[1, 3, H, W]` in [0, 1] on the CPU."""
    family, pipeline = editor.family, editor.pipeline
    pixels = family.preprocess(pipeline, image).to(editor.device)
    latents, _ = family.encode_image(pipeline, pixels)
    return family.decode(pipeline, latents, *pixels.shape[-2:]).float().cpu()


def sweep_case(
    editor: SliderEditor,
    dataset: Dataset,
    case: Case,
    index: int,
    strengths: Sequence[float],
    steps: int,
    slider_start: float = 0.0,
) -> tuple[SliderSweep, Tensor]:
    """Sweep instruction `index` of a case with the others at strength 1, and return the measures and the images."""
    text = case.instructions[index]
    wanted = case.instructions if editor.kind == "st" else (text,)
    prepared = editor.prepare(case.image, [Slider(t) for t in wanted], prompt=case.prompt, seed=case.seed)
    settings = [[s if t == text else 1.0 for t in wanted] for s in strengths]
    images = editor.render_tensor(prepared, settings, steps=steps, slider_start=slider_start)
    found = summarise(dataset, case, index, strengths, torch.cat([reconstruct(editor, case.image), images.float().cpu()]))
    return found, images


def evaluate_sliders(
    editor: SliderEditor,
    count: int,
    scenes: int = 64,
    steps: int = 12,
    progress: bool = True,
    slider_start: float = 0.0,
    world: str = DEFAULT_WORLD,
) -> list[SliderSweep]:
    """Sweep one slider on each of `scenes` held-out scenes of a world whose prompts have `count` instructions."""
    dataset = EVALUATION[world].dataset(seeds=MARKS_SEEDS)
    bar = tqdm(dataset.cases("bench", scenes, count), f"evaluate {editor.kind}, {count} instruction(s)", disable=not progress)
    return [sweep_case(editor, dataset, c, n % count, STRENGTHS, steps, slider_start)[0] for n, c in enumerate(bar)]


def linearity_by_instruction(sweeps: Sequence[SliderSweep]) -> dict[str, float]:
    """Return the mean linearity of the sweeps of each instruction, worst first."""
    found: dict[str, list[float]] = {}
    for sweep in sweeps:
        found.setdefault(sweep.instruction, []).append(sweep.linearity)
    means = {instruction: statistics.fmean(values) for instruction, values in found.items()}
    return dict(sorted(means.items(), key=lambda item: -item[1]))


def table(sweeps: Sequence[SliderSweep]) -> dict[str, float | None]:
    """Summarise sweeps as the shares and means that the quality marks use."""

    def share(values: Sequence[bool]) -> float:
        return sum(values) / len(values)

    leaks = [s.leak for s in sweeps if s.leak is not None]
    identities = [s.identity for s in sweeps if s.identity is not None]
    return {
        "scenes": len(sweeps),
        "erased_below_quarter": share([s.erased < 0.25 for s in sweeps]),
        "autoencoder_below_quarter": share([s.rebuilt < 0.25 for s in sweeps]),
        "spearman_at_least_0.95": share([s.spearman >= 0.95 for s in sweeps]),
        "linearity": statistics.fmean(s.linearity for s in sweeps),
        "beyond_at_1.5": share([bool(s.beyond) for s in sweeps]),
        "median_leak": statistics.median(leaks) if leaks else None,
        "median_identity": statistics.median(identities) if identities else None,
    }
