"""Export without loading weights: the model is traced on `meta`, and initializers refer to the checkpoint's own files.

ONNX external data is (file, offset, length), and so is a tensor in a safetensors file. The checkpoint's shards are linked
beside `model.onnx`, and only their headers are read. The adapter has a small file of its own, which `replace_adapter` swaps.

ONNX Runtime (1.32) and TensorRT-RTX's parser (1.7) follow hard links. Hard links cannot cross file systems. There, symbolic
links are used for TensorRT-RTX and copies for ONNX Runtime, which requires the data inside the model's folder. `onnx.load` and
`onnx.checker` (1.23) refuse both kinds of links: read such a graph with `load_external_data=False`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import warnings
from collections.abc import Container, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import onnx_ir
import onnxscript.optimizer
import torch
from onnx_ir.passes import common as passes
from torch import Tensor, nn

from slideredit_rt.adapters import Adapter, AdapterInputs, Updates, fill_ranks
from slideredit_rt.checkpoint import CONFIG_FILE, check_complete, check_parts, meta_transformer, read_weights
from slideredit_rt.engines.backend import Lowering
from slideredit_rt.engines.manifest import ADAPTER_FILE, CONVERTED_FILE, MODEL_FILE
from slideredit_rt.errors import SliderEditError
from slideredit_rt.export.lowering import lower
from slideredit_rt.export.onnx_graph import trace
from slideredit_rt.export.quantised import FORMS, Conversion, Form, lower_quantised
from slideredit_rt.export.tensorrt_plugin import graph_rank
from slideredit_rt.families import Family, TensorSpec
from slideredit_rt.files import atomic_file
from slideredit_rt.modules import SliderBackbone
from slideredit_rt.quantization.linear import QuantizedLinear, quantized_linears, quantized_parts
from slideredit_rt.quantization.loading import check_scale
from slideredit_rt.quantization.precisions import Part
from slideredit_rt.tensor_files import Stored, make_header, read_header, read_tensor, write_tensors

_OWN_FILES = (MODEL_FILE, ADAPTER_FILE, CONVERTED_FILE, CONFIG_FILE)
_CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
# Number of elements: enough for shapes, slices and tables of position frequencies, far below any weight matrix.
_FOLD_LIMIT = 1024

Link = Literal["hard", "symbolic"]


@dataclass(frozen=True)
class WeightOptions:
    """Options for linking a checkpoint's weights into a folder.

    Attributes:
        dtype: Dtype of the weights. Weights in another dtype are converted into a file of their own. None keeps the
            checkpoint's dtype.
        symbolic_links: Use a symbolic link if a hard link is not possible, instead of copying.
        copy: Copy instead of linking.
        quantised: Form of quantised projections in the graph, by the name of their precision (see
            `slideredit_rt.export.quantised`).
        updates: LoRAs to add to the weights. The weights that they change are written into a file of their own.
    """

    dtype: torch.dtype | None = None
    symbolic_links: bool = True
    copy: bool = False
    quantised: Mapping[str, str] = dataclasses.field(default_factory=dict)
    updates: Updates = dataclasses.field(default_factory=Updates)


@dataclass(frozen=True)
class LinkedExport:
    """Result of `export_linked` or `export_weights`.

    Attributes:
        config: Configuration of the transformer.
        dtype: Dtype of weights and computation, as torch names it.
        inputs: Names, dtypes and shapes of the inputs. Floating-point inputs are float32 for any `dtype`, except keys and
            values of source images.
        outputs: Names, dtypes and shapes of the outputs, likewise.
        files: Names of the written files, `model.onnx` or the configuration first.
        links: Kind of link for each linked checkpoint file, by name; empty if every weight was converted or copied.
        bytes_written: Total size of `files`, in bytes.
        updates: Number of adapted linears by their final lowering.
        notes: One sentence for each linear that could not get the requested lowering.
        precisions: Name of the precision of each quantised linear, by name.
    """

    config: dict[str, Any]
    dtype: str
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    files: list[str]
    links: dict[str, Link]
    bytes_written: int
    updates: dict[str, int]
    notes: list[str]
    precisions: dict[str, str]


@dataclass(frozen=True)
class _LinkedWeights:
    """A backbone on `meta`, and `places` of its parameters' values in files, under the transformer's own names."""

    backbone: SliderBackbone
    config: dict[str, Any]
    dtype: torch.dtype
    files: list[str]
    links: dict[str, Link]
    places: dict[str, Stored]

    def export(self, folder: Path, model_file: str, updates: dict[str, int], notes: list[str]) -> LinkedExport:
        """Describe a finished folder, which has `model_file` in addition to the weights."""
        files, family, dtype = [model_file, *self.files], self.backbone.family, str(self.dtype).removeprefix("torch.")
        return LinkedExport(
            config=self.config,
            dtype=dtype,
            inputs=[*family.input_specs(self.config, dtype), *self.backbone.slider_specs()],
            outputs=family.output_specs(self.config, dtype),
            files=files,
            links=self.links,
            bytes_written=sum((folder / name).stat().st_size for name in files),
            updates=updates,
            notes=notes,
            precisions={name: module.precision for name, module in quantized_linears(self.backbone.transformer).items()},
        )


def export_linked(
    family: Family,
    checkpoint: Path,
    adapter: Adapter | AdapterInputs | None,
    folder: Path,
    options: WeightOptions = WeightOptions(),
    *,
    lowering: Lowering = "native",
    target: str | None = None,
) -> LinkedExport:
    """Write `model.onnx` and the adapter's file into `folder` and link the checkpoint's weights beside them.

    Inputs and outputs of the graph are float32 (`token_mask` bool) for any dtype of the weights, because the graph casts at
    its boundary; only keys and values of source images have the dtype of the weights. Batch, text rows, image rows and sliders
    are dynamic axes.

    Args:
        family: Family of the checkpoint.
        checkpoint: Folder of a diffusers pipeline whose `transformer` is stored as safetensors, in one file or in shards.
        adapter: Adapter fitted to the checkpoint, or the layout of adapter inputs; None exports the frozen backbone without
            slider inputs.
        folder: Existing, empty folder; links are hard if it is on the checkpoint's file system.
        options: Dtype, links or copies.
        lowering: Form of the masked updates (see `lowering.lower`). For plugins, ranks are padded with zeros to a multiple
            of 16.
        target: Compute capability that plugins are compiled for.

    Raises:
        SliderEditError: The checkpoint is incomplete, damaged, not safetensors or of mixed dtypes; the family cannot compute in
            the dtype; the adapter does not fit; the weights can be neither linked nor copied into the folder.
    """
    if isinstance(adapter, Adapter) and lowering == "plugin":
        adapter = fill_ranks(adapter, {name: graph_rank(len(a)) for name, (a, _) in adapter.pairs.items()})
    forms = {name: FORMS[form]() for name, form in options.quantised.items()}
    weights = _link_weights(family, checkpoint, adapter, folder, options, forms)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = trace(weights.backbone, weights.config).model
    _finish(model, {f"transformer.{name}": place for name, place in weights.places.items()})
    lower_quantised(model, forms)
    updates, notes = lower(model, lowering, target)
    with atomic_file(folder / MODEL_FILE) as temporary:
        onnx_ir.save(model, temporary)
    return weights.export(folder, MODEL_FILE, updates, notes)


def export_weights(
    family: Family,
    checkpoint: Path,
    adapter: Adapter | AdapterInputs | None,
    folder: Path,
    options: WeightOptions = WeightOptions(),
    *,
    lowering: Lowering = "operator",
) -> LinkedExport:
    """Export like `export_linked`, but with the transformer's `config.json` instead of a graph: for engines that run modules.

    Args:
        family: Family of the checkpoint.
        checkpoint: Folder of a diffusers pipeline whose `transformer` is stored as safetensors.
        adapter: Adapter fitted to the checkpoint, or the layout of adapter inputs; None exports the frozen backbone.
        folder: Existing, empty folder.
        options: Dtype, links or copies.
        lowering: Form that the engine gives the adapted projections, for `LinkedExport.updates`.

    Raises:
        SliderEditError: See `export_linked`.
    """
    weights = _link_weights(family, checkpoint, adapter, folder, options, {}, by_name=True)
    with atomic_file(folder / CONFIG_FILE) as temporary:
        shutil.copyfile(checkpoint / "transformer" / CONFIG_FILE, temporary)
    return weights.export(folder, CONFIG_FILE, {lowering: len(weights.backbone.adapted)} if adapter else {}, [])


def _link_weights(
    family: Family,
    checkpoint: Path,
    adapter: Adapter | AdapterInputs | None,
    folder: Path,
    options: WeightOptions,
    forms: Mapping[str, Form],
    *,
    by_name: bool = False,
) -> _LinkedWeights:
    """Link the checkpoint's weights into `folder` and write the adapter's beside them (see `export_linked`).

    Quantised weights are converted as their form in the graph needs; without a form, they stay as they are stored. An engine
    that finds tensors `by_name` gets copies of those that are rows of other tensors.
    """
    source = checkpoint / "transformer"
    stored, transformer = read_weights(source), meta_transformer(source)
    state = transformer.state_dict()
    check_complete(state, stored, source)
    check_parts(transformer, stored, source)
    places, parts = {name: stored[name] for name in state}, quantized_parts(transformer)
    _check_places(places, parts, source)
    for name, (_, part) in parts.items():
        if part != "weight":
            check_scale(name, read_tensor(places[name]), source)
    dtype = _choose_dtype(family, {name: place for name, place in places.items() if name not in parts}, options.dtype, source)
    if parts and dtype == torch.float16:
        raise SliderEditError(
            "a quantised base runs in bfloat16 or float32, whose range holds its scales; use --dtype bfloat16"
        )
    # Not the model's own `to`, which warns about modules to keep in float32 even if the model has none.
    nn.Module.to(transformer, dtype)
    on_meta: Adapter | AdapterInputs | None = adapter
    if isinstance(adapter, Adapter):
        adapter = _cast(adapter, dtype)
        pairs = {name: (a.to("meta"), b.to("meta")) for name, (a, b) in adapter.pairs.items()}
        on_meta = dataclasses.replace(adapter, pairs=pairs)
    backbone = SliderBackbone(family, transformer, on_meta)
    config = json.loads(json.dumps({k: v for k, v in transformer.config.items() if not k.startswith("_")}))

    foreign = _conversions(places, parts, dtype, forms)
    if by_name:
        foreign = _slices(places) | foreign
    foreign |= _fusions(places, options.updates, dtype)
    links: dict[str, Link] = {}
    files = []
    for file in sorted({place.file for name, place in places.items() if name not in foreign}):
        if link := link_or_copy(file, folder / file.name, options.symbolic_links, copy=options.copy):
            links[file.name] = link
        else:
            files.append(file.name)
    if foreign:
        files.append(CONVERTED_FILE)
        header = make_header({name: (one.part.dtype, one.part.shape) for name, one in foreign.items()})
        write_tensors(
            folder / CONVERTED_FILE, header, (one.convert(read_tensor(places[name])) for name, one in foreign.items())
        )
        places |= read_header(folder / CONVERTED_FILE)[0]
    if isinstance(adapter, Adapter):
        files.append(ADAPTER_FILE)
        places |= _write_adapter(folder / ADAPTER_FILE, adapter, dtype)
    return _LinkedWeights(backbone, config, dtype, files, links, places)


def _write_adapter(path: Path, adapter: Adapter, dtype: torch.dtype) -> dict[str, Stored]:
    """Write the adapter's file; return the places of its tensors under the names that they have in a backbone."""
    tensors = _adapter_tensors(adapter)
    # Store the number of a bank's members, not their names: the header must stay the same when the adapter is replaced,
    # because the graph refers to offsets after it.
    metadata = {"kind": adapter.kind, "member_count": str(len(adapter.members))}
    write_tensors(path, _header(tensors, dtype, metadata), tensors.values())
    places = {}
    for key, place in read_header(path)[0].items():
        module, _, part = key.removeprefix("transformer.").rpartition(".lora_")
        places[f"{module}.lora_{part.removesuffix('.weight')}"] = place
    return places


def _conversions(
    places: Mapping[str, Stored],
    parts: Mapping[str, tuple[QuantizedLinear, str]],
    dtype: torch.dtype,
    forms: Mapping[str, Form],
) -> dict[str, Conversion]:
    """Return the tensors that cannot be used as they are stored, and how each is converted."""
    found = {}
    for name, place in places.items():
        as_stored = Part(place.dtype, place.shape)
        if name not in parts:
            if place.dtype != dtype:
                found[name] = Conversion(Part(dtype, place.shape), lambda tensor: tensor.to(dtype))
            continue
        linear, part = parts[name]
        form = forms.get(linear.precision)
        if form and (one := form.conversion(linear.precision, part, as_stored, linear.in_features, dtype)):
            found[name] = one
    return found


def _fusions(places: Mapping[str, Stored], updates: Updates, dtype: torch.dtype) -> dict[str, Conversion]:
    """Return the weights that LoRAs are added to, and how."""
    return {
        f"{module}.weight": Conversion(
            Part(dtype, places[f"{module}.weight"].shape), partial(updates.apply, module, dtype=dtype)
        )
        for module in updates.pairs
    }


def _slices(places: Mapping[str, Stored]) -> dict[str, Conversion]:
    """Return the tensors that do not have their own name in their file, as copies."""
    headers = {file: read_header(file)[0] for file in {place.file for place in places.values()}}
    renamed = {name: place for name, place in places.items() if headers[place.file].get(name) != place}
    return {name: Conversion(Part(place.dtype, place.shape), lambda tensor: tensor) for name, place in renamed.items()}


def _check_places(places: Mapping[str, Stored], parts: Container[str], source: Path) -> None:
    """Refuse weights that cannot be exported, and files that have the name of one of the engine's own files."""
    for name, place in places.items():
        if place.dtype not in _CODES and name not in parts:
            raise SliderEditError(
                f"checkpoint {str(source)!r} stores {name} as {place.dtype}, but only {', '.join(_CODES.values())} can be "
                "exported; pass the checkpoint that it was made from"
            )
        if place.file.name in _OWN_FILES:
            raise SliderEditError(
                f"checkpoint {str(source)!r} has weights named {place.file.name}, like one of the engine's own files; "
                "download it again"
            )


def replace_adapter(folder: Path, adapter: Adapter) -> None:
    """Replace the adapter of a linked export. Only its small file is written; the graph is unchanged.

    The new file has exactly the layout of the old one, so the graph's offsets stay valid. It is renamed into place; sessions
    that have the old file open keep the old adapter.

    Args:
        folder: Folder written by `export_linked` with an adapter.
        adapter: Adapter of the same modules and kind and, for a bank, the same number of members. It is converted to the
            export's dtype; lower ranks are padded with zeros.

    Raises:
        SliderEditError: The folder is not such an export, or the adapter has other modules, another kind, another number of
            members or a higher rank.
    """
    path = folder / ADAPTER_FILE
    if not path.is_file():
        raise SliderEditError(
            f"{str(folder)!r} has no {ADAPTER_FILE}, so there is no adapter to replace; pass an export with linked weights"
        )
    places, header = read_header(path)
    metadata = _metadata(header)
    kind, members = metadata.get("kind"), int(metadata.get("member_count", "0"))
    if adapter.kind != kind:
        raise SliderEditError(
            f"adapter {adapter.source!r} is {adapter.kind}, but the export in {str(folder)!r} is {kind}; export again for it"
        )
    if len(adapter.members) != members:
        raise SliderEditError(
            f"adapter {adapter.source!r} has {len(adapter.members) or 'no'} members, but the export in {str(folder)!r} is "
            f"for {f'a bank of {members}' if members else 'a single adapter'}; export again for it"
        )
    tensors = _adapter_tensors(adapter)
    if tensors.keys() != places.keys():
        different = sorted(tensors.keys() ^ places.keys())
        raise SliderEditError(
            f"adapter {adapter.source!r} updates {len(adapter.pairs)} modules, but the export in {str(folder)!r} has "
            f"{len(places) // 2}, which are not the same ({different[0]}); export again for it"
        )
    ranks = {name: places[f"transformer.{name}.lora_A.weight"].shape[0] for name in adapter.pairs}
    tensors = _adapter_tensors(fill_ranks(adapter, ranks))
    for key, place in places.items():
        if tuple(tensors[key].shape) != place.shape:
            raise SliderEditError(
                f"adapter {adapter.source!r} has {key} of shape {list(tensors[key].shape)}, but the export in "
                f"{str(folder)!r} has {list(place.shape)}: a higher rank or another base; export again for it"
            )
    write_tensors(path, header, (tensors[key].to(place.dtype) for key, place in places.items()))


def _metadata(header: bytes) -> dict[str, str]:
    metadata: dict[str, str] = json.loads(header[8:]).get("__metadata__", {})
    return metadata


def _choose_dtype(family: Family, places: Mapping[str, Stored], dtype: torch.dtype | None, source: Path) -> torch.dtype:
    if dtype is None:
        found = sorted({str(place.dtype).removeprefix("torch.") for place in places.values()})
        if len(found) > 1:
            raise SliderEditError(f"checkpoint {str(source)!r} mixes {' and '.join(found)}; choose one with --dtype")
        dtype = next(iter(places.values())).dtype
    if dtype not in _CODES:
        raise SliderEditError(f"cannot export weights as {dtype}; choose float32, bfloat16 or float16")
    if dtype == torch.float16 and family.no_float16 is not None:
        raise SliderEditError(f"{family.name} cannot run in float16: {family.no_float16}; use bfloat16 or float32 (--dtype)")
    return dtype


def _cast(adapter: Adapter, dtype: torch.dtype) -> Adapter:
    return dataclasses.replace(adapter, pairs={name: (a.to(dtype), b.to(dtype)) for name, (a, b) in adapter.pairs.items()})


def _adapter_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """Return the adapter's tensors under the key names of `save_adapter`."""
    return {
        f"transformer.{module}.lora_{part}.weight": tensor
        for module, pair in adapter.pairs.items()
        for part, tensor in zip("AB", pair, strict=True)
    }


def _header(tensors: Mapping[str, Tensor | Stored], dtype: torch.dtype, metadata: Mapping[str, str] | None = None) -> bytes:
    return make_header({name: (dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}, metadata)


def link_or_copy(source: Path, target: Path, symbolic: bool = False, *, copy: bool = False) -> Link | None:
    """Link `target` to `source`, or copy it on request or if linking is not possible.

    Args:
        source: Existing file.
        target: Path of the link or copy.
        symbolic: Use a symbolic link if a hard link is not possible.
        copy: Copy instead of linking.

    Returns:
        The kind of link; None for a copy.

    Raises:
        SliderEditError: The target exists, or can be neither linked nor copied.
    """
    # Files in the hub's cache are themselves symbolic links.
    source = source.resolve()
    if target.exists():
        raise SliderEditError(f"{str(target)!r} exists already; export into an empty folder")
    if not copy:
        with suppress(OSError):
            os.link(source, target)
            return "hard"
    try:
        if symbolic and not copy:
            target.symlink_to(source)
            return "symbolic"
        shutil.copyfile(source, target)
        return None
    except OSError as error:
        raise SliderEditError(
            f"cannot link or copy the weights {str(source)!r} to {str(target.parent)!r} ({error.strerror}); "
            "choose another folder"
        ) from error


def _finish(model: onnx_ir.Model, places: Mapping[str, Stored]) -> None:
    """Refer the weights to their files, fold constants, and cast the output to float32."""
    graph = model.graph
    weights = [value for name, value in graph.initializers.items() if name in places]
    for name, value in graph.initializers.items():
        raw = getattr(value.const_value, "raw", None)
        if name not in places and isinstance(raw, Tensor) and raw.is_meta:
            raise SliderEditError(f"the graph needs {name}, which is not in the checkpoint, so this base cannot be exported")
    result = graph.outputs[0]
    if result.dtype != onnx_ir.DataType.FLOAT:
        name = str(result.name)
        result.name = f"{name}_{result.dtype}"
        cast = onnx_ir.node("Cast", [result], {"to": onnx_ir.DataType.FLOAT})
        graph.append(cast)
        graph.outputs[0] = cast.outputs[0]
        graph.outputs[0].name, graph.outputs[0].type = name, onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
        graph.outputs[0].shape = result.shape
    # Make the weights graph inputs temporarily, so that no pass reads, folds or copies them.
    for value in weights:
        graph.initializers.pop(str(value.name))
        value.const_value = None
    inputs = list(graph.inputs)
    graph.inputs.extend(weights)
    onnxscript.optimizer.fold_constants(
        model, onnx_shape_inference=True, input_size_limit=_FOLD_LIMIT, output_size_limit=_FOLD_LIMIT
    )
    # Not all of `onnxscript.optimizer.optimize`: its rewriting takes minutes on a graph of this size and gains little.
    for one in (
        passes.RemoveUnusedNodesPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.DeduplicateInitializersPass(),
        passes.CommonSubexpressionEliminationPass(),
    ):
        one(model)
    graph.inputs[:] = inputs
    for value in (value for value in weights if value.uses()):
        place = places[str(value.name)]
        dtype = onnx_ir.tensor_adapters.from_torch_dtype(place.dtype)
        # A converted tensor may have another dtype or shape than the traced one.
        value.type, value.shape = onnx_ir.TensorType(dtype), onnx_ir.Shape(place.shape)
        value.const_value = _stored_tensor(str(value.name), place, dtype)
        graph.register_initializer(value)


def _stored_tensor(name: str, place: Stored, dtype: onnx_ir.DataType) -> onnx_ir.TensorProtocol:
    if not place.shape:
        # Lowerings and builders read the values of scalar scales.
        return onnx_ir.tensor_adapters.TorchTensor(read_tensor(place), name=name)
    return onnx_ir.ExternalTensor(
        place.file.name, place.offset, place.length, dtype, shape=onnx_ir.Shape(place.shape), name=name
    )
