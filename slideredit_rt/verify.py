"""Compare an engine with the eager reference that it was built from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from slideredit_rt.adapters import load_adapter
from slideredit_rt.editor import SliderEditor
from slideredit_rt.engines.manifest import read_manifest
from slideredit_rt.errors import SliderEditError
from slideredit_rt.families import get_family
from slideredit_rt.sliders import Slider

ALPHAS = (-0.5, 0.0, 0.5, 1.0)
MAX_ABS_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Comparison:
    """One pair of predictions: largest absolute difference, and RMS difference over the reference's RMS."""

    case: str
    max_abs_error: float
    relative_rms: float


@dataclass(frozen=True)
class Verification:
    """`psnr` is in dB between the final images, per alpha; infinite where they are equal."""

    comparisons: list[Comparison]
    psnr: dict[str, float]

    @property
    def max_abs_error(self) -> float:
        return max(c.max_abs_error for c in self.comparisons)

    @property
    def passed(self) -> bool:
        return self.max_abs_error <= MAX_ABS_TOLERANCE

    def to_json(self) -> dict[str, Any]:
        psnr = {k: v if math.isfinite(v) else None for k, v in self.psnr.items()}
        return asdict(self) | {"psnr": psnr, "max_abs_error": self.max_abs_error, "passed": self.passed}


def compare(case: str, actual: Tensor, expected: Tensor) -> Comparison:
    """Measure `actual` against `expected` in float64."""
    difference = actual.double() - expected.double()
    relative = difference.square().mean().sqrt() / expected.double().square().mean().sqrt().clamp_min(1e-30)
    return Comparison(case, difference.abs().max().item(), relative.item())


def _random_inputs(editor: SliderEditor, like: Mapping[str, Tensor], batch: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    text_rows, image_rows = like["encoder_hidden_states"].shape[1], like["hidden_states"].shape[1]
    inputs = editor.family.random_inputs(editor.config, batch, text_rows, image_rows, generator)
    mask = torch.rand(batch, 1, like["token_mask"].shape[2], generator=generator) < 0.5
    return inputs | {"token_mask": mask}


def verify_engine(
    path: Path,
    image: Image.Image,
    sliders: list[Slider],
    *,
    base: str | None = None,
    adapter: str | None = None,
    steps: int = 4,
) -> Verification:
    """Run an engine and the eager backbone on the same inputs.

    Args:
        path: engine folder.
        image, sliders: a real edit; random inputs are tried as well.
        base, adapter: where they are now, if not where the manifest says.
        steps: denoising steps of the final images.

    Raises:
        SliderEditError: the adapter is not the one in the engine.
    """
    manifest = read_manifest(path)
    if manifest.adapter is None:
        raise SliderEditError(f"engine {str(path)!r} has no adapter to verify; rebuild it with --adapter")
    base = base or manifest.base["source"]
    adapter = adapter or manifest.adapter["source"]
    if load_adapter(adapter, get_family(manifest.family)).fingerprint != manifest.adapter["fingerprint"]:
        raise SliderEditError(f"adapter {adapter!r} is not the one in engine {str(path)!r}; pass the original with --adapter")
    engine = SliderEditor.from_engine(path, base)
    eager = SliderEditor.from_pretrained(base, adapter)
    prepared = engine.prepare(image, sliders)

    comparisons = []
    count = len(sliders)
    batches: dict[str, list[float]] = {f"alpha {a:+.2f}": [a] for a in ALPHAS}
    batches["mixed batch"] = list(ALPHAS[: manifest.max_batch])
    for name, alphas in batches.items():
        alpha = torch.tensor(alphas)[:, None].repeat(1, count)
        token_mask = prepared.token_mask.expand(len(alphas), -1, -1)
        real = engine.family.batch_inputs(engine.config, prepared.conditioning, alpha, token_mask)
        real["timestep"].fill_(0.7)
        random = _random_inputs(engine, real, len(alphas)) | {"alpha": alpha[:, :1].contiguous()}
        for kind, inputs in (("real", real), ("random", random)):
            comparisons.append(compare(f"{kind} inputs, {name}", engine.engine(inputs).clone(), eager.engine(inputs)))
    settings = [[1 - a] * count for a in ALPHAS]
    finals = [editor.render_tensor(prepared, settings, steps=steps) for editor in (engine, eager)]
    errors = (finals[0] - finals[1]).double().square().flatten(1).mean(1)
    psnr = {f"alpha {a:+.2f}": -10 * math.log10(e) if e > 0 else math.inf for a, e in zip(ALPHAS, errors.tolist(), strict=True)}
    return Verification(comparisons, psnr)
