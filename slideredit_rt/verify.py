"""Comparison of an engine with its eager reference."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from slideredit_rt.adapters import Adapter, Fused, load_adapters
from slideredit_rt.assets import resolve_base
from slideredit_rt.denoising import fill_batch
from slideredit_rt.editor import SliderEditor
from slideredit_rt.engines import Engine, Manifest, check_run, open_engine, read_manifest
from slideredit_rt.engines.manifest import ADAPTER_FILE, check_base
from slideredit_rt.errors import SliderEditError
from slideredit_rt.families import Backbone, Reader, get_family
from slideredit_rt.loaded_adapters import LoadedAdapters
from slideredit_rt.placement import choose_placement
from slideredit_rt.preparing import Prepared
from slideredit_rt.quantization.config import read_source
from slideredit_rt.quantization.precisions import PRECISIONS
from slideredit_rt.settings import RunSettings
from slideredit_rt.sliders import Controls, Slider

ALPHAS = (-0.5, 0.0, 0.5, 1.0)
MAX_ABS_TOLERANCE = 1e-4
# Largest accepted error of a half-precision engine, relative to the error of eager torch in the same dtype.
MAX_RMS_RATIO = 2.0


@dataclass(frozen=True)
class Origins:
    """Locations of what an engine was built from; None takes those that are recorded.

    Attributes:
        base: Base.
        adapter: Adapter, or several for a bank. For an engine with adapter inputs, any adapter; None takes its default.
        reference: Unquantised base, for a quantised engine.
        fuse: LoRAs that were fused into the weights, in the order of the build.
    """

    base: str | None = None
    adapter: str | Sequence[str] | None = None
    reference: str | None = None
    fuse: Sequence[str] | None = None


@dataclass(frozen=True)
class Comparison:
    """Error of a prediction against float32 eager torch, measured in float64.

    Attributes:
        case: Name of the inputs that were compared.
        max_abs_error: Largest absolute difference.
        relative_rms: RMS difference divided by the RMS of the reference.
        same_dtype_rms: Relative RMS of eager torch in the engine's dtype; None for a float32 engine and a quantised one.
        limit: Largest relative RMS of a quantised engine.
    """

    case: str
    max_abs_error: float
    relative_rms: float
    same_dtype_rms: float | None = None
    limit: float | None = None

    @property
    def passed(self) -> bool:
        if self.limit is not None:
            return self.relative_rms <= self.limit
        if self.same_dtype_rms is None:
            return self.max_abs_error <= MAX_ABS_TOLERANCE
        return self.relative_rms <= MAX_RMS_RATIO * self.same_dtype_rms


@dataclass(frozen=True)
class Verification:
    """Result of `verify_engine`.

    Attributes:
        dtype: Dtype of the engine.
        comparisons: Errors of the predictions.
        psnr: PSNR between the final images in dB, by alpha; infinite for equal images.
        precision: Name of the engine's precision; None for one that is not quantised.
        effect_rms: Error of the sliders' effect, the final image at alpha 1 minus that at 0, divided by the RMS of the effect;
            NaN if an image is not finite.
    """

    dtype: str
    comparisons: list[Comparison]
    psnr: dict[str, float]
    precision: str | None = None
    effect_rms: float = math.nan

    @property
    def max_abs_error(self) -> float:
        return _largest(c.max_abs_error for c in self.comparisons)

    @property
    def passed(self) -> bool:
        steps = all(c.passed for c in self.comparisons)
        return steps and (self.precision is None or self.worst_psnr >= PRECISIONS[self.precision].limits.psnr)

    @property
    def worst_psnr(self) -> float:
        """Smallest PSNR of a final image, in dB."""
        return -_largest(-value for value in self.psnr.values())

    @property
    def verdict(self) -> str:
        """One line with the worst case and its limit."""
        word = "passed" if self.passed else "FAILED"
        if self.precision is not None:
            limits, step = PRECISIONS[self.precision].limits, _largest(c.relative_rms for c in self.comparisons)
            return (
                f"{word}: {self.precision} against the unquantised base: step error {step:.4f}, limit {limits.step_rms:g}; "
                f"worst PSNR {self.worst_psnr:.1f} dB, limit {limits.psnr:g} dB; "
                f"error of the sliders' effect {self.effect_rms:.1%}"
            )
        if self.dtype == "float32":
            return f"{word}: max abs {self.max_abs_error:.2e}, tolerance {MAX_ABS_TOLERANCE:.0e}"
        ratio = _largest(c.relative_rms / c.same_dtype_rms if c.same_dtype_rms else math.inf for c in self.comparisons)
        return f"{word}: the error is {ratio:.2f} times that of eager {self.dtype}, limit {MAX_RMS_RATIO:g}"

    def to_json(self) -> dict[str, Any]:
        """Return the result for JSON. Numbers that are not finite become null, because JSON cannot represent them."""

        def numbers(values: Mapping[str, Any]) -> dict[str, Any]:
            return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}

        comparisons = [numbers(asdict(c) | {"passed": c.passed}) for c in self.comparisons]
        summary = numbers(
            {
                "dtype": self.dtype,
                "precision": self.precision,
                "max_abs_error": self.max_abs_error,
                "effect_rms": self.effect_rms,
                "passed": self.passed,
            }
        )
        return summary | {"comparisons": comparisons, "psnr": numbers(self.psnr)}


def _largest(errors: Iterable[float]) -> float:
    """Return the largest error, or NaN if one is NaN, which `max` could miss."""
    return max(errors, key=lambda error: (math.isnan(error), error))


def compare(case: str, actual: Tensor, expected: Tensor, same_dtype: Tensor | None = None) -> Comparison:
    """Measure the errors of predictions in float64.

    Args:
        case: Name of the inputs.
        actual: Prediction of the engine, on any device.
        expected: Prediction of eager torch in float32.
        same_dtype: Prediction of eager torch in the engine's dtype; None for a float32 engine.
    """
    exact = expected.double().cpu()

    def relative_rms(tensor: Tensor) -> float:
        difference = tensor.double().cpu() - exact
        return (difference.square().mean().sqrt() / exact.square().mean().sqrt().clamp_min(1e-30)).item()

    largest = (actual.double().cpu() - exact).abs().max().item()
    return Comparison(case, largest, relative_rms(actual), None if same_dtype is None else relative_rms(same_dtype))


def compare_backbones(
    editor: SliderEditor, eager: Backbone, same_dtype: Backbone | None, prepared: Prepared
) -> list[Comparison]:
    """Run an engine and eager backbones on a real edit and on random inputs, for each of `ALPHAS` and a mixed batch.

    Args:
        editor: Editor with the engine to verify.
        eager: Eager backbone in float32.
        same_dtype: Eager backbone in the engine's dtype; None for a float32 engine.
        prepared: Real edit.
    """
    comparisons = []
    for name, alphas in _cases(editor).items():
        one = torch.tensor(alphas)[:, None]
        if editor.members:
            # Use all members, each with a different share.
            one = one[:, :, None] * torch.linspace(1, 0.5, len(editor.members))
        real = editor.backbone_inputs(prepared, _alphas(editor, prepared, alphas))
        real["timestep"].fill_(0.7)
        random = _random_inputs(editor, real, len(alphas)) | {"alpha": one}
        for kind, inputs in (("real", real), ("random", random)):
            # Clone, because the engine's next call overwrites its output.
            actual = editor.engine(inputs).clone()
            half = None if same_dtype is None else same_dtype(inputs)
            comparisons.append(compare(f"{kind} inputs, {name}", actual, eager(inputs), half))
    return comparisons


def compare_quantised(editor: SliderEditor, eager: Backbone, prepared: Prepared, limit: float) -> list[Comparison]:
    """Run a quantised engine and the unquantised eager backbone on a real edit, for each of `ALPHAS` and a mixed batch.

    Activations are calibrated on edits, so random inputs would say nothing. Predictions for the rows of source images are not
    used by edits, and are not compared.

    Args:
        editor: Editor with the engine to verify.
        eager: Unquantised eager backbone in float32.
        prepared: Real edit.
        limit: Largest accepted relative RMS.
    """
    rows = prepared.conditioning.latents.shape[1]
    found = []
    for name, alphas in _cases(editor).items():
        inputs = editor.backbone_inputs(prepared, _alphas(editor, prepared, alphas))
        inputs["timestep"].fill_(0.7)
        comparison = compare(f"real inputs, {name}", editor.engine(inputs)[:, :rows].clone(), eager(inputs)[:, :rows])
        found.append(replace(comparison, limit=limit))
    return found


def compare_reading(
    editor: SliderEditor, eager: SliderEditor, same_dtype: SliderEditor | None, image: Image.Image, limit: float | None = None
) -> list[Comparison]:
    """Compare the keys and values of a source image; return nothing for a family that reads source images in every step.

    Args:
        editor: Editor with the engine to verify.
        eager: Editor with the eager backbone in float32.
        same_dtype: Editor with an eager backbone in the engine's dtype; None for a float32 engine.
        image: Source image.
        limit: Largest accepted relative RMS of a quantised engine; None for other engines.
    """
    if not editor.family.reads_images_once:
        return []
    sources = editor.family.encode_sources(editor.pipeline, [image])
    half = None if same_dtype is None else same_dtype.read(sources)
    return [replace(compare("source image", editor.read(sources), eager.read(sources), half), limit=limit)]


def _cases(editor: SliderEditor) -> dict[str, list[float]]:
    """Return the alphas of each case, every one of `ALPHAS` alone and several at once, in batches that the engine takes."""
    cases = {f"alpha {a:+.2f}": [a] for a in ALPHAS} | {"mixed batch": list(ALPHAS[: editor.max_batch])}
    return {name: fill_batch(torch.tensor(alphas), editor.min_batch).tolist() for name, alphas in cases.items()}


def _alphas(editor: SliderEditor, prepared: Prepared, alphas: Sequence[float]) -> Tensor:
    """Return the engine's alphas for settings in which all sliders have the same alpha: `[N, K]`, for a bank `[N, K, G]`."""
    alpha = torch.tensor(alphas)[:, None].repeat(1, len(prepared.token_mask))
    if not editor.members:
        return alpha
    own = [list(editor.members).index(name) for name in prepared.members]
    return alpha[:, :, None] * torch.eye(len(editor.members))[own]


def _final_images(editor: SliderEditor, prepared: Prepared, steps: int) -> Tensor:
    """Denoise an image for each of `ALPHAS`, without the adapter's strength curve; return `[N, 3, H, W]`."""
    conditioning, images = prepared.conditioning, []
    for chunk in _alphas(editor, prepared, ALPHAS).split(editor.max_batch):
        inputs = editor.backbone_inputs(prepared, fill_batch(chunk, editor.min_batch))
        images.append(editor.denoise(conditioning, inputs, steps, conditioning.true_cfg_scale)[: len(chunk)])
    return torch.cat(images)


def _random_inputs(editor: SliderEditor, like: Mapping[str, Tensor], batch: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    text_rows, image_rows = like["encoder_hidden_states"].shape[1], like["hidden_states"].shape[1]
    inputs = editor.family.random_inputs(editor.config, batch, text_rows, image_rows, generator)
    mask = torch.rand(batch, 1, like["token_mask"].shape[2], generator=generator) < 0.5
    if editor.family.reads_images_once:
        # A step takes the keys and values of real source images, at most one set for each row, and keeps no rows.
        specs = editor.family.input_specs(editor.config)
        inputs |= {spec.name: like[spec.name] for spec in specs if "references" in spec.shape or spec.dtype == "int64"}
    return inputs | {"token_mask": mask}


class _Carried:
    """An engine on any device that takes and returns tensors on the CPU."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        return self._engine(self._moved(inputs)).cpu()

    def read(self, inputs: Mapping[str, Tensor]) -> Tensor:
        assert isinstance(self._engine, Reader)
        return self._engine.read(self._moved(inputs)).cpu()

    def _moved(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to(self._engine.device) for name, tensor in inputs.items()}


def _on_cpu(eager: SliderEditor, manifest: Manifest, engine: Engine) -> SliderEditor:
    """Make an editor that encodes and decodes as the eager one does, on the CPU, and denoises with an engine on any device."""
    assert manifest.kind is not None
    controls = Controls(manifest.kind, manifest.curve, manifest.members, manifest.member_kinds)
    limits = {"max_batch": manifest.max_batch, "max_sliders": manifest.max_sliders}
    editor = SliderEditor(eager.family, eager.pipeline, _Carried(engine), manifest.config, controls, **limits)
    editor.defaults, editor.min_batch = manifest.edit_defaults, manifest.min_batch
    return editor


def _find_fused(path: Path, manifest: Manifest, given: Sequence[str] | None) -> list[Fused]:
    """Return the LoRAs that were fused into an engine, and check that they are unchanged."""
    sources = [lora["source"] for lora in manifest.fused] if given is None else given
    if len(sources) != len(manifest.fused):
        raise SliderEditError(
            f"got {len(sources)} LoRAs, but {len(manifest.fused)} were fused into engine {str(path)!r}; pass one --fuse for "
            "each, in the order of the build"
        )
    loras = [Fused(source, lora["scale"]) for source, lora in zip(sources, manifest.fused, strict=True)]
    for lora, recorded in zip(loras, manifest.fused, strict=True):
        if lora.load(get_family(manifest.family)).fingerprint != recorded["fingerprint"]:
            raise SliderEditError(
                f"LoRA {str(lora.source)!r} is not the one fused into engine {str(path)!r}; pass the original with --fuse"
            )
    return loras


def _find_adapter(path: Path, manifest: Manifest, given: str | Sequence[str] | None) -> Adapter:
    """Return the adapter that an engine contains, and check that it is unchanged.

    For an engine with adapter inputs, this is the given adapter or the default one.
    """
    family, about = get_family(manifest.family), manifest.adapter
    if layout := manifest.layout:
        if given is None and about is None:
            raise SliderEditError(f"engine {str(path)!r} has no default adapter; pass one to verify it with, as --adapter")
        adapter = load_adapters(path / ADAPTER_FILE if given is None else given, family)
        layout.check(adapter, family)
        return adapter
    if about is None:
        raise SliderEditError(f"engine {str(path)!r} has no adapter to verify; rebuild it with --adapter")
    members = about.get("members", {})
    source = given or list(dict.fromkeys(m["source"] for m in members.values())) or about["source"]
    adapter = load_adapters(source, family).without(about.get("dropped", ()))
    kinds = {name: member.kind for name, member in adapter.members.items()}
    found, recorded = (adapter.fingerprint, adapter.kind, kinds), (about["fingerprint"], manifest.kind, manifest.member_kinds)
    if found != recorded:
        raise SliderEditError(f"adapter {source!r} is not the one in engine {str(path)!r}; pass the original with --adapter")
    return adapter


def verify_engine(
    path: Path,
    image: Image.Image,
    sliders: list[Slider],
    origins: Origins = Origins(),
    *,
    run: RunSettings | None = None,
    steps: int = 4,
) -> Verification:
    """Compare an engine with eager torch on the same inputs: a real edit and random inputs.

    A float32 engine passes if its errors are within `MAX_ABS_TOLERANCE`. A half-precision engine is also compared with float32,
    and passes if its error is at most `MAX_RMS_RATIO` times that of eager torch in the same dtype. A quantised engine is
    compared with the unquantised base, and passes if the errors of a step and of the final images are within the limits of its
    precision (`slideredit_rt.quantization.precisions.Limits`).

    Args:
        path: Engine folder.
        image: Image of the real edit.
        sliders: Sliders of the real edit. For a bank, sliders that name no member are assigned to the members in turn.
        origins: Locations of the base, the adapter and fused LoRAs, where they are not the recorded ones.
        run: Device, threads and options of the engine; None uses the defaults. Everything else runs on the CPU in float32, for
            both.
        steps: Denoising steps of the final images.

    Raises:
        SliderEditError: The engine has no adapter, or it was built from another base, adapter or LoRA.
    """
    run, manifest = run or RunSettings(), read_manifest(path)
    device = check_run(path, manifest, run)
    base = origins.base or manifest.base["source"]
    loaded = _find_adapter(path, manifest, origins.adapter)
    loras = _find_fused(path, manifest, origins.fuse)
    # Check all components, because the eager reference uses them all.
    check_base(manifest, path, resolve_base(base))
    placement = choose_placement(path, manifest, resolve_base(base), run, device, encoders=False)
    compiled = open_engine(path, placement.run, manifest)[1]
    if manifest.layout is not None:
        compiled = LoadedAdapters(compiled, manifest).of(loaded).engine
    exact = base if manifest.precision is None else origins.reference or read_source(resolve_base(base) / "transformer")
    eager = SliderEditor.from_pretrained(exact, loaded, fuse=loras)
    engine = _on_cpu(eager, manifest, compiled)
    names = list(manifest.members)
    sliders = [replace(s, adapter=s.adapter or names[i % len(names)]) for i, s in enumerate(sliders)] if names else sliders
    prepared = engine.prepare(image, sliders, steps=steps)
    if manifest.precision is not None:
        limit = PRECISIONS[manifest.precision].limits.step_rms
        comparisons = compare_reading(engine, eager, None, image, limit)
        comparisons += compare_quantised(engine, eager.engine, prepared, limit)
    else:
        same_dtype = None
        if manifest.dtype != "float32":
            dtype = getattr(torch, manifest.dtype)
            same_dtype = SliderEditor.from_pretrained(base, loaded, dtype=dtype, fuse=loras)
        comparisons = compare_reading(engine, eager, same_dtype, image)
        half = None if same_dtype is None else same_dtype.engine
        comparisons += compare_backbones(engine, eager.engine, half, prepared)
    if not math.isfinite(_largest(c.max_abs_error for c in comparisons)):
        return Verification(manifest.dtype, comparisons, {f"alpha {a:+.2f}": math.nan for a in ALPHAS}, manifest.precision)
    # An engine that reads source images once has prepared the edit itself, so eager torch prepares its own.
    expected = eager.prepare(image, sliders, steps=steps) if eager.family.reads_images_once else prepared
    finals = [_final_images(engine, prepared, steps), _final_images(eager, expected, steps)]
    errors = (finals[0] - finals[1]).double().square().flatten(1).mean(1)
    psnr = {
        f"alpha {a:+.2f}": math.inf if e == 0 else -10 * math.log10(e) for a, e in zip(ALPHAS, errors.tolist(), strict=True)
    }
    return Verification(manifest.dtype, comparisons, psnr, manifest.precision, _effect_error(*finals))


def _effect_error(actual: Tensor, expected: Tensor) -> float:
    """Return the error of what sliders change between alpha 0 and alpha 1, divided by the RMS of that change."""
    first, last = ALPHAS.index(0.0), ALPHAS.index(1.0)
    effects = [(images[last] - images[first]).double() for images in (actual, expected)]
    return float((effects[0] - effects[1]).norm() / effects[1].norm().clamp_min(1e-30))
