"""Slider quality on held-out shapes scenes, whose correct edits are known."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import spearmanr
from torch import Tensor
from tqdm import tqdm

from slideredit_rt.editor import SliderEditor
from slideredit_rt.shapes.measurer import measure, response
from slideredit_rt.shapes.world import Example, held_out_examples, render, scene_image
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
        leak: Largest change of the other instruction's attribute over strengths up to 1, as a share of its own full range;
            None if the prompt has one instruction.
        beyond: True if the largest strength above 1 moves the attribute further than strength 1; None without such a strength.
    """

    instruction: str
    strengths: tuple[float, ...]
    response: tuple[float, ...]
    spearman: float
    linearity: float
    erased: float
    leak: float | None
    beyond: bool | None


def summarise(example: Example, index: int, strengths: Sequence[float], images: Tensor) -> SliderSweep:
    """Measure the images of a sweep.

    Args:
        example: Example that was edited.
        index: Index of the swept instruction.
        strengths: Strengths of the sweep, with 0 and 1 among them.
        images: Images, `[len(strengths), 3, SIZE, SIZE]` in [0, 1].
    """
    measured = measure(images, [example.scene] * len(images))
    curve = [response(m, example.instructions[index], example.scene) for m in measured]
    zero, one = strengths.index(0.0), strengths.index(1.0)
    inner = [i for i, s in enumerate(strengths) if s <= 1]
    span = curve[one] - curve[zero]
    scaled = [(curve[i] - curve[zero]) / span if span else float("inf") for i in inner]
    source = render([example.scene])[0]
    distance = (images - source).square().flatten(1).mean(1).sqrt()
    leak = None
    if len(example.instructions) == 2:
        other = [response(measured[i], example.instructions[1 - index], example.scene) for i in inner]
        # The other instruction stays at strength 1, so its full range is its response where the swept one is at 1, too.
        full = other[inner.index(one)]
        leak = max(abs(value - full) for value in other) / max(abs(full), 1e-6)
    above = [i for i, s in enumerate(strengths) if s > 1]
    return SliderSweep(
        instruction=example.instructions[index].text,
        strengths=tuple(strengths),
        response=tuple(curve),
        spearman=float(spearmanr([strengths[i] for i in inner], [curve[i] for i in inner]).statistic),
        linearity=statistics.fmean(abs(r - strengths[i]) for r, i in zip(scaled, inner, strict=True)),
        erased=(distance[zero] / distance[one]).item(),
        leak=leak,
        beyond=curve[max(above, key=lambda i: strengths[i])] > curve[one] if above else None,
    )


def sweep_example(
    editor: SliderEditor,
    example: Example,
    index: int,
    strengths: Sequence[float],
    steps: int,
    seed: int = 0,
    slider_start: float = 0.0,
) -> tuple[SliderSweep, Tensor]:
    """Sweep instruction `index` of an example with the others at strength 1, and return the measures and the images."""
    texts = [i.text for i in example.instructions]
    wanted = texts if editor.kind == "st" else [texts[index]]
    prepared = editor.prepare(scene_image(example), [Slider(t) for t in wanted], prompt=example.prompt, seed=seed)
    settings = [[s if t == texts[index] else 1.0 for t in wanted] for s in strengths]
    images = editor.render_tensor(prepared, settings, steps=steps, slider_start=slider_start)
    return summarise(example, index, strengths, images), images


def evaluate_sliders(
    editor: SliderEditor,
    count: int,
    scenes: int = 64,
    steps: int = 12,
    progress: bool = True,
    slider_start: float = 0.0,
) -> list[SliderSweep]:
    """Sweep one slider on each of `scenes` held-out scenes whose prompts have `count` instructions."""
    examples = held_out_examples(scenes, count)
    bar = tqdm(examples, f"evaluate {editor.kind}, {count} instruction(s)", disable=not progress)
    return [sweep_example(editor, e, n % count, STRENGTHS, steps, n, slider_start)[0] for n, e in enumerate(bar)]


def table(sweeps: Sequence[SliderSweep]) -> dict[str, float | None]:
    """Summarise sweeps as the shares and means that the quality marks use."""

    def share(values: Sequence[bool]) -> float:
        return sum(values) / len(values)

    leaks = [s.leak for s in sweeps if s.leak is not None]
    return {
        "scenes": len(sweeps),
        "erased_below_quarter": share([s.erased < 0.25 for s in sweeps]),
        "spearman_at_least_0.95": share([s.spearman >= 0.95 for s in sweeps]),
        "linearity": statistics.fmean(s.linearity for s in sweeps),
        "beyond_at_1.5": share([bool(s.beyond) for s in sweeps]),
        "median_leak": statistics.median(leaks) if leaks else None,
    }
