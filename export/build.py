"""Build of an engine folder from a checkpoint and an adapter."""

from __future__ import annotations

import datetime
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from slideredit_rt import __version__
from slideredit_rt.adapters import (
    Adapter,
    AdapterInputs,
    AdapterMatch,
    AdapterSource,
    Updates,
    describe_members,
    fit_adapter,
    load_adapters,
    match_adapter,
    read_updates,
    save_adapter,
)
from slideredit_rt.assets import from_anywhere, resolve_base
from slideredit_rt.checkpoint import fingerprint_base, meta_transformer
from slideredit_rt.engines import BACKENDS, Backend, BuildSettings, get_backend
from slideredit_rt.engines.backend import BuildJob, Compiled
from slideredit_rt.engines.manifest import ADAPTER_FILE, DIGESTS, Manifest, describe_files, write_manifest
from slideredit_rt.errors import SliderEditError
from slideredit_rt.export.lowering import choose
from slideredit_rt.families import KINDS, Family, family_of
from slideredit_rt.files import Digests, atomic_folder
from slideredit_rt.quantization.config import read_layers, read_precision
from slideredit_rt.quantization.precisions import PRECISIONS

USUAL_RANK = 16
"""Largest rank of adapter inputs, unless a build sets it or has a default adapter: that of the released adapters."""
_LIBRARIES = ("torch", "triton", "diffusers", "onnx", "onnxscript", "onnxruntime", "tensorrt", "tensorrt_rtx")


def build_engine(
    base: str | Path,
    adapter: AdapterSource | None,
    out: Path,
    settings: BuildSettings = BuildSettings(),
    *,
    overwrite: bool = False,
    progress: bool = True,
) -> Manifest:
    """Build one engine for all slider settings from a checkpoint and an adapter.

    Args:
        base: Embedded name, folder or hub repository of a diffusers pipeline.
        adapter: Embedded name, file, folder or loaded adapter. Several names, files or folders make a bank of adapters with
            separate strengths. None builds an engine of the frozen backbone without slider inputs, or an engine with adapter
            inputs that has no default adapter.
        out: Folder to create. It is written atomically.
        settings: Backend, lowering, dtype, limits, LoRAs to fuse and defaults of edits.
        overwrite: Replace an existing folder.
        progress: Show a progress bar on standard error.

    Returns:
        The manifest of the engine.

    Raises:
        SliderEditError: The base, the adapter, a LoRA, the output folder or an option cannot be used.
    """
    backend = get_backend(settings.backend)
    settings = replace(settings, dtype=backend.choose_dtype(settings.dtype))
    path = resolve_base(base)
    family = family_of(path)
    _check_backend(backend, family, settings)
    fitted, match = _fit(adapter, family, path, allow_partial=settings.allow_partial)
    inputs = _adapter_inputs(settings, family, path, fitted)
    source = inputs or fitted
    kind, bank = source.kind if source else None, fitted is not None and bool(fitted.members)
    quantised = sorted({layer.precision for layer in read_layers(path / "transformer").values()})
    check_precisions(backend, quantised)
    separate = "adapter inputs" if inputs else "a quantised base" if quantised else None
    lowering = choose(settings.lowering, kind, backend, bank=bank, separate=separate)
    # The transformer is checked later, when its weights are linked.
    family.check_base(path, transformer=False)
    updates = _read_fused(family, path, settings, quantised)
    limits = backend.precheck(family, path, settings)
    check_targets(limits.targets, quantised)
    with tqdm(total=4, desc="build", disable=not progress, bar_format="{desc}: {bar} {n_fmt}/{total_fmt} [{elapsed}]") as bar:

        def stage(name: str, finished: int = 1) -> None:
            bar.n = finished
            bar.set_description(f"build: {name}")

        job = BuildJob(family, path, source, lowering, settings, limits, stage, progress, updates)
        with atomic_folder(out, overwrite=overwrite) as folder:
            stage("trace the backbone and write the graph", 0)
            compiled = backend.compile(job, folder)
            if inputs and fitted:
                save_adapter(fitted, folder / ADAPTER_FILE, dtype=torch.float32)
                compiled = replace(compiled, files=[*compiled.files, ADAPTER_FILE])
            if progress:
                for note in compiled.export.notes + _partial_notes(match, fitted, updates):
                    tqdm.write(note, file=sys.stderr)
            stage("fingerprint the base", 2)
            # Linked files belong to the base. Hash them once, and cache the digests for later opening of the engine.
            digests = Digests(folder / DIGESTS)
            origin = {"source": from_anywhere(base), "fingerprint": fingerprint_base(path, digest=digests)}
            stage("write the manifest", 3)
            about = describe_adapter(fitted, match.unexpected) if fitted and match else None
            manifest = replace(_describe(job, backend, compiled, folder, digests), base=origin, adapter=about)
            digests.save()
            write_manifest(manifest, folder)
            stage("done", 4)
    return manifest


def _check_backend(backend: Backend, family: Family, settings: BuildSettings) -> None:
    """Check that a backend takes the options of a build, and builds engines of a family."""
    if settings.options is not None and not isinstance(settings.options, backend.build_options or ()):
        raise SliderEditError(f"the backend {backend.name} does not take {type(settings.options).__name__}; remove the options")
    if family.reads_images_once and not backend.reads_images:
        able = [name for name, other in BACKENDS.items() if other.reads_images]
        raise SliderEditError(
            f"the backend {backend.name} cannot build engines that read the source images once, as a {family.name} base does; "
            f"use --backend {' or '.join(able)}"
        )


def check_precisions(backend: Backend, precisions: Sequence[str]) -> None:
    """Check that a backend runs quantised linears.

    Args:
        backend: Backend of the engine.
        precisions: Names of the precisions of the base's linears.

    Raises:
        SliderEditError: It does not run one of them.
    """
    if lacking := [name for name in precisions if name not in backend.quantised]:
        others = [name for name, other in BACKENDS.items() if set(precisions) <= other.quantised.keys()]
        raise SliderEditError(
            f"the backend {backend.name} does not run {lacking[0]} linears; use --backend {' or '.join(others)}, or quantise "
            f"the base to {' or '.join(backend.quantised)}"
        )


def check_targets(targets: Sequence[str], precisions: Sequence[str]) -> None:
    """Check that GPUs compute in the precisions of a base.

    Args:
        targets: Compute capabilities that an engine is built for.
        precisions: Names of the precisions of the base's linears.

    Raises:
        SliderEditError: A GPU does not.
    """
    for form in (PRECISIONS[name] for name in precisions):
        if unable := [target for target in targets if not form.runs_on(target)]:
            anywhere = [name for name, other in PRECISIONS.items() if other.capabilities is None]
            raise SliderEditError(
                f"GPUs of {unable[0]} do not compute in {form.name}, which needs {(form.capabilities or unable)[0]} or later; "
                f"leave {unable[0]} out of --targets, or quantise the base to {' or '.join(anywhere)}"
            )


def _fit(
    source: AdapterSource | None, family: Family, base: Path, *, allow_partial: bool
) -> tuple[Adapter | None, AdapterMatch | None]:
    """Return the adapter fitted to the base, and its comparison with the base."""
    if source is None:
        return None, None
    adapter, transformer = load_adapters(source, family), meta_transformer(base / "transformer")
    match = match_adapter(adapter, family, transformer)
    return fit_adapter(adapter, family, transformer, allow_partial=allow_partial), match


def _adapter_inputs(settings: BuildSettings, family: Family, base: Path, adapter: Adapter | None) -> AdapterInputs | None:
    """Return the layout of the engine's adapter inputs; None for an engine without them."""
    if not settings.adapter_inputs:
        return None
    if adapter is None:
        rank, kind = settings.max_rank or USUAL_RANK, settings.kind or KINDS[0]
        return AdapterInputs.of_targets(kind, family, meta_transformer(base / "transformer"), rank)
    if settings.kind not in (None, adapter.kind):
        raise SliderEditError(
            f"adapter {adapter.source!r} is {adapter.kind}, but --kind is {settings.kind}; leave out --kind, which is for "
            "engines without a default adapter"
        )
    return AdapterInputs.of_adapter(adapter, settings.max_rank)


def _read_fused(family: Family, base: Path, settings: BuildSettings, quantised: Sequence[str]) -> Updates:
    """Read the LoRAs to fuse, and check them and the defaults of edits against the base."""
    if settings.defaults.guidance_scale is not None and family.guidance_scale is None:
        raise SliderEditError(
            f"{family.name} has no embedded guidance, so it cannot have a default; set the true-CFG scale "
            "(--default-true-cfg-scale)"
        )
    if not settings.fuse:
        return Updates()
    if quantised:
        raise SliderEditError(
            f"base {str(base)!r} is quantised ({quantised[0]}), and LoRAs are fused before weights are quantised; pass --fuse "
            "to slideredit-rt quantize instead"
        )
    return read_updates(settings.fuse, family, meta_transformer(base / "transformer"))


def _describe(job: BuildJob, backend: Backend, compiled: Compiled, folder: Path, digests: Digests) -> Manifest:
    """Make the manifest without its sections on the base and the adapter."""
    settings, limits, export = job.settings, job.limits, compiled.export
    linked = describe_files(folder, list(compiled.links), digests)
    return Manifest(
        family=job.family.name,
        base={},
        adapter=None,
        backend=backend.name,
        backend_version=backend.version(),
        lowering=job.lowering,
        targets=list(limits.targets),
        ranges={axis: list(sizes) for axis, sizes in limits.ranges.items()},
        reading_ranges={axis: list(sizes) for axis, sizes in limits.reading.items()},
        max_batch=settings.batch[2],
        max_sliders=settings.max_sliders,
        config=export.config,
        inputs=export.inputs,
        outputs=export.outputs,
        files=describe_files(folder, compiled.files, digests),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        versions=_versions(),
        dtype=export.dtype,
        updates=export.updates,
        layers=dict(compiled.layers),
        precision=read_precision(job.base / "transformer"),
        quantised=dict(Counter(export.precisions.values())),
        plan=dict(compiled.plan),
        compatibility=dict(limits.compatibility),
        weight_streaming=compiled.weight_streaming,
        fused=list(job.updates.loras),
        defaults=settings.defaults.to_json(),
        adapter_inputs=job.adapter.to_json() if isinstance(job.adapter, AdapterInputs) else {},
        links={name: described | {"kind": compiled.links[name]} for name, described in linked.items()},
    )


def _partial_notes(match: AdapterMatch | None, adapter: Adapter | None, updates: Updates) -> list[str]:
    """Describe the modules that only the adapter or only the base has, and those for text encoders."""
    notes = []
    ignored = {"the adapter also updates": adapter.ignored if adapter else (), "fused LoRAs also update": updates.ignored}
    for what, linears in ignored.items():
        if linears:
            names = f"{', '.join(linears[:4])}{', …' if len(linears) > 4 else ''}"
            notes.append(f"ignored {len(linears)} text-encoder linears that {what}: {names}")
    if match and match.unexpected:
        notes.append(
            f"dropped {len(match.unexpected)} modules of the adapter that the base lacks: {', '.join(match.unexpected)}"
        )
    if match and match.missing:
        names = f"{', '.join(match.missing[:4])}{', …' if len(match.missing) > 4 else ''}"
        notes.append(f"the adapter does not update {len(match.missing)} linears of the standard targets: {names}")
    return notes


def describe_adapter(adapter: Adapter, dropped: Sequence[str] = ()) -> dict[str, Any]:
    """Return the manifest's section on an adapter.

    Args:
        adapter: Adapter of the engine.
        dropped: Modules of its file that the engine leaves out.
    """
    members = {name: m | {"source": from_anywhere(m["source"])} for name, m in describe_members(adapter).items()}
    sources = dict.fromkeys(m["source"] for m in members.values()) or [from_anywhere(adapter.source)]
    return {
        "source": ", ".join(sources),
        "fingerprint": adapter.fingerprint,
        "kind": adapter.kind,
        "rank": adapter.rank,
        "modules": len(adapter.pairs),
        "training": adapter.training,
        "strength_curve": adapter.curve.to_json(),
        **({"members": members} if members else {}),
        **({"dropped": list(dropped)} if dropped else {}),
    }


def _versions() -> dict[str, str]:
    """Return the versions of the installed packages that affect an engine."""
    found = {"slideredit-rt": __version__}
    for name in _LIBRARIES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
