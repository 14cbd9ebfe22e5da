"""Device memory of an edit, from checkpoint headers and traced shapes: no weight is read and no GPU is needed."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import diffusers
import onnx
import torch
import torch.nn.functional as F
from google.protobuf.message import DecodeError
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from slideredit_rt import __version__
from slideredit_rt.checkpoint import (
    CONFIG_FILE,
    components,
    meta_model,
    meta_transformer,
    quiet_libraries,
    read_index,
    read_weights,
    weight_files,
)
from slideredit_rt.engines.manifest import MODEL_FILE, Manifest
from slideredit_rt.engines.tensorrt import PLAN_FILE
from slideredit_rt.errors import SliderEditError
from slideredit_rt.families import get_family
from slideredit_rt.families.base import decode_in_tiles
from slideredit_rt.files import atomic_file, cache_directory, read_json
from slideredit_rt.preview_decoder import PreviewDecoder
from slideredit_rt.tensor_files import Stored, read_header

MemoryMode = Literal["none", "encoders", "all"]
MODES: tuple[MemoryMode, ...] = get_args(MemoryMode)
RESERVED = 3 * 2**29
"""Bytes that are not planned with: the CUDA context, libraries' workspaces and fragmentation (1.5 GiB)."""
DEPLOYED = torch.bfloat16
"""Dtype of encoders and autoencoder on a GPU."""
STREAMED_SHARE = 0.1
"""Least share of a plan's weights that must stay on the card for weight streaming to be offered."""


@dataclass(frozen=True)
class ServerParts:
    """Parts that a server keeps on the device beside an edit.

    Attributes:
        adapters: Limit of the adapters of an engine with adapter inputs, in bytes (see `LoadedAdapters`); None counts the one
            in use only.
        preview_decoder: Folder of the tiny autoencoder that decodes previews; None without one.
        cache: Limit of the cache of encodings and latents, in bytes.
        caches_keys_values: The cache has room for the keys and values of one source image in addition.
    """

    adapters: int | None = None
    preview_decoder: Path | None = None
    cache: int = 0
    caches_keys_values: bool = False


@dataclass(frozen=True)
class Footprint:
    """Bytes that the parts of an edit take on a device.

    Attributes:
        weights: Weights of the backbone, including the adapter.
        encoders: Weights of the text encoders.
        largest_encoder_weight: Largest tensor of the text encoders, which an offloaded encoder needs at one time.
        decoder: Weights of the autoencoder.
        step: Activations of one denoising step, for each image of a batch: the largest sum of live tensors in an eager step.
            A compiled step needs less.
        decode: Activations of decoding one image. Batches are decoded one image at a time.
        tiled_decode: Activations of decoding one image in tiles.
        max_batch: Largest batch of the engine.
        streams: True if weights can be streamed from the host.
        keys_values: Keys and values of the source image of an edit, for a family that reads source images once. Edits of the
            same image share them; the plan counts them for each image of a batch.
        adapters: Adapter inputs of an engine that has them: those of all adapters that are kept and the engine's buffers for
            one (see `adapters_size`).
        preview_decoder: Weights of the preview decoder.
        cache: Encodings and latents that a server keeps.
    """

    weights: int
    encoders: int
    largest_encoder_weight: int
    decoder: int
    step: int
    decode: int
    tiled_decode: int
    max_batch: int
    streams: bool
    keys_values: int = 0
    adapters: int = 0
    preview_decoder: int = 0
    cache: int = 0

    @property
    def beside(self) -> int:
        """Bytes that stay on the card whatever is offloaded, besides the autoencoder."""
        return self.adapters + self.preview_decoder + self.cache

    @property
    def per_image(self) -> int:
        """Bytes of a denoising step for each image of a batch, with its keys and values."""
        return self.step + self.keys_values


@dataclass(frozen=True)
class MemoryPlan:
    """Memory that an edit takes on a card of a given size, in GiB.

    Attributes:
        vram_gib: Memory of the card.
        weights_gib: Backbone weights that stay on the card.
        encoders_gib: Text encoders; on the card only during an encoding unless `offload` is `none`.
        decoder_gib: Autoencoder.
        activations_gib: Activations of a batch of 1.
        keys_values_gib: Keys and values of the source image of an edit; 0 for a family that reads source images in every step.
        adapters_gib: Adapter inputs, see `Footprint.adapters`; 0 for an engine that contains its adapter.
        preview_decoder_gib: Weights of a server's preview decoder; 0 without one.
        cache_gib: Limit of a server's cache of encodings and latents; 0 without a server.
        offload: First of `none`, `encoders` and, for engines with weight streaming, `all` that fits, or the last of them.
        max_batch: The largest batch that fits, up to the engine's; 0 where not even one image does.
        fits: True if one image fits.
        needed_gib: Memory for one image with everything on the card, including what is reserved.
        missing_gib: Further memory for one image with `offload`; 0 if it fits.
    """

    vram_gib: float
    weights_gib: float
    encoders_gib: float
    decoder_gib: float
    activations_gib: float
    keys_values_gib: float
    adapters_gib: float
    preview_decoder_gib: float
    cache_gib: float
    offload: MemoryMode
    max_batch: int
    fits: bool
    needed_gib: float
    missing_gib: float


def plan_memory(footprint: Footprint, vram: int, modes: Sequence[MemoryMode] = MODES) -> MemoryPlan:
    """Choose what leaves the card so that the rest fits on it.

    Text encoders leave first, because they work only when a prompt is new; images are then encoded and decoded in tiles as
    well. The backbone's weights are streamed last, where the backend can: as many of them as fit stay on the card.

    Args:
        footprint: Footprint of the engine.
        vram: Memory of the card, in bytes.
        modes: Choices that are allowed, in order.
    """
    room = vram - RESERVED - footprint.decoder - footprint.beside
    # A text encoder visits the card a layer at a time, and not while an image is decoded.
    offloaded = max(footprint.tiled_decode, footprint.largest_encoder_weight)
    streamed = min(footprint.weights, max(int(STREAMED_SHARE * footprint.weights), room - offloaded - footprint.per_image))
    choices = {
        "none": _Choice(footprint.weights, footprint.encoders, footprint.decode),
        "encoders": _Choice(footprint.weights, 0, offloaded),
        "all": _Choice(streamed, 0, offloaded),
    }
    allowed = [mode for mode in modes if mode != "all" or footprint.streams]
    fitting = (mode for mode in allowed if choices[mode].room(footprint.per_image) <= room)
    mode = next(fitting, allowed[-1])
    return _plan(footprint, vram, mode, choices[mode], room)


@dataclass(frozen=True)
class _Choice:
    """Bytes on the card with one choice of what leaves it: weights, text encoders and the activations beside a step.

    Engines keep the memory of their steps, and a server encodes and decodes while it steps, so the two are added.
    """

    weights: int
    encoders: int
    other: int

    def room(self, step: int) -> int:
        """Return the bytes for one image, whose step takes `step`."""
        return self.weights + self.encoders + self.other + step


def _plan(footprint: Footprint, vram: int, mode: MemoryMode, choice: _Choice, room: int) -> MemoryPlan:
    missing = max(0, choice.room(footprint.per_image) - room)
    everything = footprint.weights + footprint.encoders + footprint.decode + footprint.per_image
    batch = 0 if missing else min((room - choice.room(0)) // footprint.per_image, footprint.max_batch)
    return MemoryPlan(
        vram_gib=_gib(vram),
        weights_gib=_gib(choice.weights),
        encoders_gib=_gib(footprint.encoders),
        decoder_gib=_gib(footprint.decoder),
        activations_gib=_gib(footprint.step + choice.other),
        keys_values_gib=_gib(footprint.keys_values),
        adapters_gib=_gib(footprint.adapters),
        preview_decoder_gib=_gib(footprint.preview_decoder),
        cache_gib=_gib(footprint.cache),
        offload=mode,
        max_batch=batch,
        fits=not missing,
        needed_gib=_gib(everything + footprint.decoder + footprint.beside + RESERVED),
        missing_gib=_gib(missing),
    )


def _gib(size: int) -> float:
    return round(size / 2**30, 2)


@dataclass(frozen=True)
class _Activations:
    """The fields of `Footprint` that take a run on `meta` to know, in bytes."""

    step: int
    decode: int
    tiled_decode: int


def engine_footprint(
    folder: Path, manifest: Manifest, base: Path, dtype: torch.dtype = DEPLOYED, server: ServerParts | None = None
) -> Footprint:
    """Return what an engine and its base take on a device, for edits of one image at the base's usual size.

    Weights are the sizes of all tensors: the product of the shape, times the bytes of an element of the dtype on the device. An
    image is decoded by the autoencoder or by the preview decoder, so the larger of their activations counts. The cache counts
    as if it were full.

    Activations take seconds to count the first time. They are then kept in the user's cache, by the configurations of the
    transformer and the autoencoder.

    Args:
        folder: Engine folder.
        manifest: Manifest of the folder.
        base: Folder of the checkpoint that encodes and decodes.
        dtype: Dtype of encoders, autoencoder and preview decoder.
        server: Parts that a server keeps in addition; None counts an edit alone.

    Raises:
        SliderEditError: Files of the engine, the base or the preview decoder cannot be read, or the preview decoder does not
            fit the base.
    """
    server = server or ServerParts()
    stored = [one for name, library in _encoders(base) for one in read_weights(base / name, library).values()]
    encoders = [_size(one, dtype) for one in stored]
    keys_values = 0
    if get_family(manifest.family).reads_images_once:
        with quiet_libraries():
            keys_values = keys_values_size(manifest, _decoding_pipeline(manifest, base, dtype))
    activations, preview_decoder = _kept_activations(manifest, base, dtype), 0
    if server.preview_decoder is not None:
        preview_decoder = sum(_size(one, dtype) for one in read_weights(server.preview_decoder).values())
        preview = _preview_activations(server.preview_decoder, manifest, base, dtype)
        activations = _Activations(activations.step, max(activations.decode, preview), max(activations.tiled_decode, preview))
    return Footprint(
        weights=_engine_weights(folder, manifest),
        encoders=sum(encoders),
        largest_encoder_weight=max(encoders),
        decoder=sum(_size(one, dtype) for one in read_weights(base / "vae").values()),
        **vars(activations),
        max_batch=manifest.max_batch,
        streams=manifest.weight_streaming,
        keys_values=keys_values,
        adapters=adapters_size(manifest, server.adapters),
        preview_decoder=preview_decoder,
        cache=server.cache + (keys_values if server.caches_keys_values else 0),
    )


def adapters_size(manifest: Manifest, limit: int | None = None) -> int:
    """Return the bytes of the adapter inputs of an engine, `(kept + own + 1) · bytes`; 0 if it contains its adapter.

    `bytes` is the size of one adapter's float32 inputs, the same for every adapter. `kept = max(1, limit // bytes)` adapters
    stay within the limit, and the engine has buffers for one more. A server also keeps the engine's default adapter in use
    when others replace it within the limit; `own` is 1 then.

    Args:
        manifest: Manifest of the engine.
        limit: Limit of the adapters on the device, in bytes; None counts the one in use only.
    """
    if manifest.layout is None:
        return 0
    one, own = manifest.layout.bytes, manifest.adapter is not None
    return 2 * one if limit is None else (max(1, limit // one) + own + 1) * one


def keys_values_size(manifest: Manifest, pipeline: Any) -> int:
    """Return the bytes of the keys and values of one source image of the base's usual size; 0 if an engine takes none.

    Args:
        manifest: Manifest of the engine.
        pipeline: diffusers pipeline of the base, of which only the autoencoder is used.
    """
    specs = [spec for spec in manifest.inputs if "reference_rows" in spec.shape]
    if not specs:
        return 0
    sizes = {"references": 1, "reference_rows": _usual_rows(manifest, pipeline)}
    return sum(math.prod(spec.resolve(sizes)) * getattr(torch, spec.dtype).itemsize for spec in specs)


def _usual_rows(manifest: Manifest, pipeline: Any) -> int:
    """Return the rows of an image of the base's usual size."""
    return int((get_family(manifest.family).side(pipeline) // (2 * pipeline.vae_scale_factor)) ** 2)


def _kept_activations(manifest: Manifest, base: Path, dtype: torch.dtype) -> _Activations:
    """Return the activations of an engine and its base from the user's cache, or count and keep them."""
    parts = {
        "family": manifest.family,
        "classes": read_index(base),
        "transformer": [manifest.config, manifest.dtype, _text_rows(manifest)],
        "vae": [read_json(base / "vae" / CONFIG_FILE), str(dtype)],
        "versions": [__version__, torch.__version__, diffusers.__version__],
    }
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]
    file = cache_directory() / "activations" / f"{digest}.json"
    with suppress(OSError, ValueError, TypeError):
        kept = _Activations(**read_json(file))
        if all(type(size) is int and size > 0 for size in vars(kept).values()):
            return kept
    found = _activations(manifest, base, dtype)
    with suppress(OSError, SliderEditError), atomic_file(file) as temporary:
        temporary.write_text(json.dumps(vars(found)))
    return found


def _activations(manifest: Manifest, base: Path, dtype: torch.dtype) -> _Activations:
    """Count activations on the `meta` device."""
    family = get_family(manifest.family)
    with quiet_libraries():
        pipeline = _decoding_pipeline(manifest, base, dtype)
        # The base may have been downloaded without its transformer.
        transformer = meta_model(components(base)["transformer"][1], manifest.config).to(getattr(torch, manifest.dtype))
    side = family.side(pipeline)
    rows = _usual_rows(manifest, pipeline)
    family.prepare_transformer(transformer)
    inputs = family.random_inputs(manifest.config, 1, _text_rows(manifest), family.step_rows(rows), torch.Generator())
    on_meta = {name: value.to("meta") for name, value in inputs.items()}
    latents = torch.empty(1, rows, int(manifest.config["in_channels"]), device="meta")

    def decode() -> object:
        return family.decode_pixels(pipeline, latents, side, side)

    step = live_peak(lambda: family.run(transformer, on_meta), transformer)
    whole = live_peak(decode, pipeline.vae)
    decode_in_tiles(pipeline.vae)
    return _Activations(step, whole, live_peak(decode, pipeline.vae))


def _preview_activations(folder: Path, manifest: Manifest, base: Path, dtype: torch.dtype) -> int:
    """Count the activations of a preview decoder on the `meta` device, for one image of the base's usual size."""
    family = get_family(manifest.family)
    with quiet_libraries():
        pipeline = _decoding_pipeline(manifest, base, dtype)
        decoder = PreviewDecoder(family, pipeline, meta_transformer(folder).to(dtype), str(folder))
    side, channels = family.side(pipeline), int(manifest.config["in_channels"])
    latents = torch.empty(1, _usual_rows(manifest, pipeline), channels, device="meta")
    return live_peak(lambda: decoder.decode(latents, side, side), decoder.vae)


def _text_rows(manifest: Manifest) -> int:
    """Return the text rows of a prompt that the memory is planned for."""
    usual = get_family(manifest.family).usual_text_rows
    return int(manifest.ranges["text_rows"][2]) if "text_rows" in manifest.ranges else usual


def live_peak(call: Callable[[], object], module: nn.Module) -> int:
    """Return the largest sum of bytes of tensors that live at one time while `call` runs on the `meta` device.

    Attention counts as one operator that keeps no scores, as flash attention does.

    Args:
        call: Runs `module`.
        module: Its own parameters and buffers do not count.
    """
    own = {tensor.untyped_storage()._cdata for tensor in (*module.parameters(), *module.buffers())}
    with torch.no_grad(), _FusedAttention(), _LiveBytes(own) as live:
        call()
    peak: int = live.peak
    return peak


class _LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operators made and that are still referred to."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.peak: int = 0
        self._known = known
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self._known:
                self._live.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self._live = {key: held for key, held in self._live.items() if not held[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return result


class _FusedAttention(TorchFunctionMode):
    """Attention without its scores: on `meta`, torch would take the expression that keeps them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            given = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
            query, value = given["query"], given["value"]
            return query.new_empty(*query.shape[:-1], value.shape[-1])
        return func(*args, **(kwargs or {}))


def _decoding_pipeline(manifest: Manifest, base: Path, dtype: torch.dtype) -> Any:
    """Make a base's pipeline with nothing but its autoencoder, on `meta`: enough to decode."""
    pipeline_class: Any = get_family(manifest.family).encoding_pipeline or getattr(diffusers, read_index(base)["_class_name"])
    names = list(inspect.signature(pipeline_class.__init__).parameters)[1:]
    vae = meta_transformer(base / "vae").to(dtype)
    return pipeline_class(**{name: {"vae": vae}.get(name) for name in names})


def _encoders(base: Path) -> list[tuple[str, str]]:
    """Return the text encoders of a base: name and library of each component of transformers that has weights."""
    found = [(name, library) for name, (library, _) in components(base).items() if library == "transformers"]
    return [(name, library) for name, library in found if weight_files(base / name, library)]


def _size(stored: Stored, dtype: torch.dtype) -> int:
    return math.prod(stored.shape) * (dtype if stored.dtype.is_floating_point else stored.dtype).itemsize


def _engine_weights(folder: Path, manifest: Manifest) -> int:
    """Bytes of a plan, or of the weights that an engine reads: its own files hide tensors of the same name in linked ones."""
    if PLAN_FILE in manifest.files:
        return int(manifest.files[PLAN_FILE]["bytes"])
    if MODEL_FILE in manifest.files:
        return _graph_weights(folder / MODEL_FILE)
    names = [name for name in (*manifest.files, *manifest.links) if name.endswith(".safetensors")]
    tensors: dict[str, Stored] = {}
    for name in names:
        tensors = read_header(folder / name)[0] | tensors
    return sum(stored.length for stored in tensors.values())


def _graph_weights(file: Path) -> int:
    """Bytes of the tensors that a graph refers to: parts of its files, which may hold others as well."""
    try:
        graph = onnx.load(file, load_external_data=False).graph
    except (OSError, DecodeError) as error:
        raise SliderEditError(f"cannot read {str(file)!r} ({error}); build the engine again") from error
    places = [{entry.key: entry.value for entry in tensor.external_data} for tensor in graph.initializer]
    return sum(int(place["length"]) for place in places if place)
