"""Build an engine folder from a checkpoint and an adapter."""

from __future__ import annotations

import datetime
import json
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tqdm import tqdm

from slideredit_rt.adapters import Adapter, load_adapter
from slideredit_rt.assets import resolve_base
from slideredit_rt.engines import BACKENDS
from slideredit_rt.engines.manifest import Manifest, describe_files, fingerprint_base, write_manifest
from slideredit_rt.engines.tensorrt import PLAN_FILE
from slideredit_rt.errors import SliderEditError
from slideredit_rt.export.onnx_graph import export_onnx
from slideredit_rt.export.tensorrt_engine import (
    LOG_FILE,
    Profile,
    TensorRTOptions,
    build_plan,
    compute_capabilities,
    image_rows_of,
    load_tensorrt_rtx,
)
from slideredit_rt.families import family_of
from slideredit_rt.files import atomic_folder
from slideredit_rt.modules import SliderBackbone

MAX_BATCH = 16
MAX_SLIDERS = 8
_VERSIONS = ("slideredit-rt", "torch", "diffusers", "onnx", "onnxscript", "onnxruntime")


def build_engine(
    base: str | Path,
    adapter: str | Path | Adapter | None,
    out: Path,
    *,
    backend: str = "onnxruntime",
    max_batch: int = MAX_BATCH,
    max_sliders: int = MAX_SLIDERS,
    tensorrt: TensorRTOptions | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Manifest:
    """Turn a checkpoint and an adapter into one engine for every slider setting.

    Args:
        base: embedded name, folder or hub repository of a diffusers pipeline.
        adapter: embedded name, file, folder or a loaded adapter; None exports the frozen backbone without slider inputs.
        out: folder to create. It appears whole when everything in it is written, or not at all.
        backend: what will execute it.
        max_batch, max_sliders: the largest B and K that the engine accepts.
        tensorrt: targets, sizes and builder settings, for the backend `tensorrt-rtx` only.
        overwrite: replace an existing folder.
        progress: show a progress bar on standard error.

    Raises:
        SliderEditError: the base, the adapter or the target folder cannot be used.
    """
    if backend not in BACKENDS:
        raise SliderEditError(f"unknown backend {backend!r}; known: {', '.join(BACKENDS)}")
    options = tensorrt or TensorRTOptions() if backend == "tensorrt-rtx" else None
    if max_batch < 1 or max_sliders < 1:
        raise SliderEditError(f"an engine needs room for one batch row and one slider, got {max_batch} and {max_sliders}")
    path = resolve_base(base)
    profile = None
    if options is not None:
        # Refuse before minutes of tracing.
        compute_capabilities(load_tensorrt_rtx(), options.targets)
        profile = Profile(
            batch=(1, 1, max_batch),
            text_rows=(1, options.max_text_rows, options.max_text_rows),
            image_rows=image_rows_of(path, options.resolution),
            sliders=(1, min(2, max_sliders), max_sliders),
        )
    with tqdm(total=5, desc="build", disable=not progress, bar_format="{desc}: {bar} {n_fmt}/{total_fmt} [{elapsed}]") as bar:

        def stage(name: str) -> None:
            bar.set_description(f"build: {name}")

        with atomic_folder(out, overwrite=overwrite) as folder:
            stage("load the base and the adapter")
            family = family_of(path)
            if isinstance(adapter, str | Path):
                adapter = load_adapter(adapter, family)
            transformer = load_transformer(path)
            backbone = SliderBackbone(family, transformer, adapter)
            config = json.loads(json.dumps({k: v for k, v in transformer.config.items() if not k.startswith("_")}))
            bar.update()
            stage("trace the backbone and write the graph")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                names = export_onnx(backbone, config, folder)
            bar.update()
            inputs = [*family.input_specs(config), *backbone.slider_specs()]
            if options is not None and profile is not None:
                stage(f"compile for {', '.join(options.targets)}")
                build_plan(folder / names[0], folder, inputs, profile, options, progress=progress)
                for name in names:
                    (folder / name).unlink()
                names = [PLAN_FILE, LOG_FILE]
            bar.update()
            stage("fingerprint the base")
            fingerprint = fingerprint_base(path)
            bar.update()
            stage("write the manifest")
            manifest = Manifest(
                family=family.name,
                base={"source": str(base) if str(base) != str(path) else str(path.resolve()), "fingerprint": fingerprint},
                adapter=None
                if adapter is None
                else {
                    "source": adapter.source,
                    "fingerprint": adapter.fingerprint,
                    "kind": adapter.kind,
                    "rank": adapter.rank,
                    "modules": len(adapter.pairs),
                    "training": adapter.training,
                },
                backend=backend,
                backend_version=version("onnxruntime" if options is None else "tensorrt_rtx"),
                lowering="native",
                targets=[] if options is None else list(options.targets),
                ranges={} if profile is None else {axis: list(sizes) for axis, sizes in profile.ranges().items()},
                max_batch=max_batch,
                max_sliders=max_sliders,
                config=config,
                inputs=inputs,
                outputs=[family.output_spec(config)],
                files=describe_files(folder, names),
                created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                versions={name: version(name) for name in _VERSIONS},
            )
            write_manifest(manifest, folder)
            bar.update()
            stage("done")
    return manifest


def load_transformer(base: Path) -> Any:
    """The float32 transformer of a diffusers checkpoint folder.

    Raises:
        SliderEditError: the folder lacks it, or its weights are damaged.
    """
    from diffusers import AutoModel

    try:
        transformer = AutoModel.from_pretrained(str(base / "transformer"), dtype=torch.float32, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise SliderEditError(
            f"cannot load the transformer of {str(base)!r} ({reason}); download the checkpoint again"
        ) from error
    return transformer.eval()
