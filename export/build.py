"""Build an engine folder from a checkpoint and an adapter."""

from __future__ import annotations

import datetime
import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from slideredit_rt.adapters import (
    Adapter,
    AdapterMatch,
    AdapterSource,
    describe_members,
    fit_adapter,
    load_adapters,
    match_adapter,
)
from slideredit_rt.assets import from_anywhere, resolve_base
from slideredit_rt.checkpoint import fingerprint_base, meta_transformer
from slideredit_rt.engines import BACKENDS
from slideredit_rt.engines.manifest import DIGESTS, Manifest, describe_files, write_manifest
from slideredit_rt.engines.manifest import MAX_BATCH as LARGEST_BATCH
from slideredit_rt.engines.manifest import MAX_SLIDERS as LARGEST_SLIDERS
from slideredit_rt.engines.tensorrt.build import (
    LOG_FILE,
    Profile,
    Range,
    TensorRTOptions,
    build_plan,
    image_rows_of,
    load_tensorrt,
    plugin_target,
    targets_of,
)
from slideredit_rt.engines.tensorrt.engine import PACKAGES, PLAN_FILE
from slideredit_rt.errors import SliderEditError
from slideredit_rt.export.linked_weights import export_linked, export_weights
from slideredit_rt.export.lowering import choose
from slideredit_rt.export.onnx_graph import MODEL_FILE
from slideredit_rt.families import family_of
from slideredit_rt.files import Digests, atomic_folder

BATCH: Range = (1, 1, 16)
MAX_SLIDERS = 8
# What brings a backend that is not TensorRT.
_DISTRIBUTIONS = {"onnxruntime": "onnxruntime", "inductor": "torch"}
DType = Literal["float32", "bfloat16", "float16"]
_VERSIONS = ("slideredit-rt", "torch", "triton", "diffusers", "onnx", "onnxscript", "onnxruntime", "tensorrt", "tensorrt_rtx")


def build_engine(
    base: str | Path,
    adapter: AdapterSource | None,
    out: Path,
    *,
    backend: str = "onnxruntime",
    lowering: str = "auto",
    dtype: DType | None = None,
    batch: Range = BATCH,
    max_sliders: int = MAX_SLIDERS,
    allow_partial: bool = False,
    tensorrt: TensorRTOptions | None = None,
    copy_weights: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> Manifest:
    """Turn a checkpoint and an adapter into one engine for every slider setting.

    Args:
        base: embedded name, folder or hub repository of a diffusers pipeline.
        adapter: embedded name, file, folder or a loaded adapter; several names, files or folders make a bank, each with a
            strength of its own. None exports the frozen backbone without slider inputs.
        out: folder to create. It appears whole when everything in it is written, or not at all.
        backend: what will execute it.
        lowering: how the masked update is expressed: `auto`, `native`, `folded` or `plugin` (`slideredit_rt.export.lowering`).
        dtype: of the weights and the arithmetic. None keeps the checkpoint's, and is float32 for ONNX Runtime.
        batch: smallest, usual and largest B. Backends that compile for no range only take the largest.
        max_sliders: the largest K.
        allow_partial: leave out modules of the adapter that the base lacks instead of refusing it.
        tensorrt: sizes, targets and builder settings, for the backends `tensorrt` and `tensorrt-rtx` only.
        copy_weights: copy the base's weights instead of linking them, so that the base may change or go. A compiled plan holds
            them anyway.
        overwrite: replace an existing folder.
        progress: show a progress bar on standard error.

    Raises:
        SliderEditError: the base, the adapter, the target folder or an option cannot be used.
    """
    if backend not in BACKENDS:
        raise SliderEditError(f"unknown backend {backend!r}; known: {', '.join(BACKENDS)}")
    if not 1 <= batch[0] <= batch[1] <= batch[2]:
        raise SliderEditError(f"the batch sizes {','.join(map(str, batch))} do not rise from 1 or more; give MIN,OPT,MAX")
    if not 1 <= max_sliders <= LARGEST_SLIDERS:
        raise SliderEditError(f"an engine has room for 1 to {LARGEST_SLIDERS} sliders, got {max_sliders}")
    if batch[2] > LARGEST_BATCH:
        raise SliderEditError(f"an engine takes batches of at most {LARGEST_BATCH}, got {batch[2]}")
    if backend == "onnxruntime":
        dtype = dtype or "float32"
        if dtype == "bfloat16":
            raise SliderEditError("ONNX Runtime multiplies no bfloat16 matrices on the CPU; use --dtype float32")
    options = tensorrt or TensorRTOptions() if backend in PACKAGES else None
    path = resolve_base(base)
    family = family_of(path)
    match: AdapterMatch | None = None
    loaded = None if adapter is None else load_adapters(adapter, family)
    if loaded is not None:
        transformer = meta_transformer(path / "transformer")
        match = match_adapter(loaded, family, transformer)
        loaded = fit_adapter(loaded, family, transformer, allow_partial=allow_partial)
    kind, bank = (loaded.kind, bool(loaded.members)) if loaded else (None, False)
    form = _operator(lowering) if backend == "inductor" else choose(lowering, kind, backend, bank=bank)
    # The transformer is checked where its weights are linked.
    family.check_base(path, transformer=False)
    profile: Profile | None = None
    targets: tuple[str, ...] = ()
    if options is not None:
        # Refuse before minutes of tracing.
        targets = targets_of(backend, options)
        text_rows = options.max_text_rows or family.usual_text_rows
        profile = Profile(
            batch=batch,
            text_rows=(1, text_rows, text_rows),
            image_rows=image_rows_of(path, options.resolution),
            sliders=(1, min(2, max_sliders), max_sliders),
        )
    with tqdm(total=4, desc="build", disable=not progress, bar_format="{desc}: {bar} {n_fmt}/{total_fmt} [{elapsed}]") as bar:

        def stage(name: str) -> None:
            bar.set_description(f"build: {name}")

        with atomic_folder(out, overwrite=overwrite) as folder:
            stage("trace the backbone and write the graph")
            # A compiled plan holds the weights, so what it is compiled from goes away again.
            with tempfile.TemporaryDirectory(dir=folder) if options else nullcontext(folder) as graph_folder:
                weights_dtype = None if dtype is None else getattr(torch, dtype)
                if form == "operator":
                    exported = export_weights(
                        family, path, loaded, Path(graph_folder), dtype=weights_dtype, copy_weights=copy_weights
                    )
                else:
                    exported = export_linked(
                        family,
                        path,
                        loaded,
                        Path(graph_folder),
                        dtype=weights_dtype,
                        lowering=form,
                        target=plugin_target(targets, options) if options and form == "plugin" else None,
                        # ONNX Runtime reads nothing through a symbolic link.
                        symbolic_links=options is not None,
                        copy_weights=copy_weights and options is None,
                    )
                bar.update()
                files, layers = exported.files, {}
                if options is not None and profile is not None and form != "operator":
                    stage(f"compile for {', '.join(targets)}")
                    layers = build_plan(
                        backend,
                        Path(graph_folder) / MODEL_FILE,
                        folder,
                        exported.inputs,
                        profile,
                        options,
                        targets,
                        form,
                        progress=progress,
                    )
                    files = [PLAN_FILE, LOG_FILE]
            bar.update()
            if progress:
                for note in exported.notes + _partial_notes(match, loaded.ignored if loaded else ()):
                    tqdm.write(note, file=sys.stderr)
            stage("fingerprint the base")
            # Links are the base's own files: hashed once, and remembered for whoever opens the engine.
            digests = Digests(folder / DIGESTS)
            fingerprint = fingerprint_base(path, digest=digests)
            bar.update()
            stage("write the manifest")
            links = {} if options else exported.links
            linked = describe_files(folder, list(links), digests)
            manifest = Manifest(
                family=family.name,
                base={"source": from_anywhere(base), "fingerprint": fingerprint},
                adapter=describe_adapter(loaded, match.unexpected) if loaded and match else None,
                backend=backend,
                # TensorRT's metadata may belong to a package of another name.
                backend_version=load_tensorrt(backend).__version__ if options else version(_DISTRIBUTIONS[backend]),
                lowering=form,
                targets=list(targets),
                ranges={} if profile is None else {axis: list(sizes) for axis, sizes in profile.ranges().items()},
                max_batch=batch[2],
                max_sliders=max_sliders,
                config=exported.config,
                inputs=exported.inputs,
                outputs=exported.outputs,
                files=describe_files(folder, files, digests),
                created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                versions=_versions(),
                dtype=exported.dtype,
                updates=exported.updates,
                layers=layers,
                compatibility={}
                if backend != "tensorrt" or options is None
                else {"versions": options.version_compatible, "hardware": options.hardware_compatibility},
                links={name: described | {"kind": links[name]} for name, described in linked.items()},
            )
            digests.save()
            write_manifest(manifest, folder)
            bar.update()
            stage("done")
    return manifest


def _operator(lowering: str) -> Literal["operator"]:
    """The one form of the backend `inductor`, whose operator chooses a kernel for the card when it runs."""
    if lowering not in ("auto", "operator"):
        raise SliderEditError(f"the backend inductor has no lowering {lowering!r}, it runs our torch operators; leave it out")
    return "operator"


def _partial_notes(match: AdapterMatch | None, ignored: Sequence[str]) -> list[str]:
    """A sentence for modules that the adapter or the base lacks, and one for what the adapter has for the text encoders."""
    notes = []
    if ignored:
        names = f"{', '.join(ignored[:4])}{', …' if len(ignored) > 4 else ''}"
        notes.append(f"left out {len(ignored)} linears of the text encoders that the adapter also updates: {names}")
    if match and match.unexpected:
        notes.append(
            f"left out {len(match.unexpected)} modules of the adapter that the base lacks: {', '.join(match.unexpected)}"
        )
    if match and match.missing:
        names = f"{', '.join(match.missing[:4])}{', …' if len(match.missing) > 4 else ''}"
        notes.append(f"the adapter leaves {len(match.missing)} linears of the standard targets alone: {names}")
    return notes


def describe_adapter(adapter: Adapter, dropped: Sequence[str] = ()) -> dict[str, Any]:
    """The manifest's section about an adapter; `dropped` are modules of its file that the engine does without."""
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
    """Of the packages that are installed, of those that shape an engine."""
    found = {}
    for name in _VERSIONS:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
