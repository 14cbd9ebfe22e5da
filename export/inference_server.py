"""Export of an engine folder to a model repository for NVIDIA Triton Inference Server.

The model is one denoising step; encoding, the schedule and decoding are done by the client. With `max_batch_size`, Triton
treats the first axis of every tensor as the batch, but position ids and rotary tables are shared by a call and do not have a
batch axis. In an ONNX graph, this export adds one: everything that only depends on these inputs is computed per request in a
`Scan`, so requests of different aspect ratios with equal numbers of rows can share a batch. Triton batches requests whose
tensors have the same shapes: strengths, masks and steps may differ, and so may numbers of sliders if clients pad them with
alpha 0 and empty masks.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import onnx_ir
from onnx_ir.passes import common as passes

from slideredit_rt.engines import BACKENDS
from slideredit_rt.engines.manifest import Manifest, read_manifest
from slideredit_rt.errors import SliderEditError
from slideredit_rt.export.linked_weights import link_or_copy
from slideredit_rt.families import TensorSpec
from slideredit_rt.files import atomic_folder

CONFIG_FILE = "config.pbtxt"
VERSION = "1"
NAME = "slider_backbone"
_TYPES = {"float32": "TYPE_FP32", "bool": "TYPE_BOOL", "int64": "TYPE_INT64"}
_BROADCASTING = {"Mul", "Add", "Sub", "Div", "Where", "Pow"}


def export_triton(
    engine: Path, out: Path, *, name: str = NAME, max_queue_delay_us: int = 0, overwrite: bool = False
) -> dict[str, Any]:
    """Write `<out>/<name>/config.pbtxt` and the model's files, atomically.

    Weights are hard links to the engine's files, or copies on another file system. A compiled TensorRT plan cannot be given a
    batch axis for its position ids, so its configuration has `max_batch_size` 0, and clients send whole batches.

    Args:
        engine: Folder written by `slideredit-rt build` for ONNX Runtime or TensorRT.
        out: Model repository; other models in it are kept.
        name: Name of the model.
        max_queue_delay_us: Longest time that Triton may delay a request to batch it with others, in microseconds.
        overwrite: Replace a model of the same name.

    Returns:
        `model` (its folder), `platform`, `max_batch_size` and `files`.

    Raises:
        SliderEditError: The folder is not an engine, Triton cannot run its backend, the name or the delay is invalid, or the
            graph's position inputs cannot be given a batch axis.
    """
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        raise SliderEditError(f"{name!r} is not a valid Triton model name; use letters, digits, '_', '-' and '.'")
    if max_queue_delay_us < 0:
        raise SliderEditError(f"the queue delay is {max_queue_delay_us} µs; pass 0 or more")
    manifest = read_manifest(engine)
    if len(manifest.outputs) > 1:
        raise SliderEditError(
            f"engine {str(engine)!r} reads its source images in a call of their own, which the model repository does not have; "
            "serve it with slideredit-rt serve"
        )
    if manifest.adapter_inputs:
        raise SliderEditError(
            f"engine {str(engine)!r} takes its adapter as inputs, which the model repository does not have; build one "
            "that contains the adapter, or serve it with slideredit-rt serve"
        )
    served = {name: backend.served for name, backend in BACKENDS.items() if backend.served is not None}
    if manifest.backend not in served:
        raise SliderEditError(
            f"engine {str(engine)!r} was built for {manifest.backend}, which Triton Inference Server cannot run; "
            f"build it with --backend {' or '.join(served)}"
        )
    model = served[manifest.backend]
    inputs = manifest.inputs
    with atomic_folder(out / name, overwrite=overwrite) as folder:
        version = folder / VERSION
        version.mkdir()
        if model.is_graph:
            for file in (*manifest.files, *manifest.links):
                if file != model.source:
                    link_or_copy(engine / file, version / file)
            graph = onnx_ir.load(engine / model.source)
            give_batch_axis(graph, [spec.name for spec in inputs if spec.shape[0] != "batch"])
            onnx_ir.save(graph, version / model.file)
            inputs = [
                spec if spec.shape[0] == "batch" else TensorSpec(spec.name, spec.dtype, ("batch", *spec.shape))
                for spec in inputs
            ]
        else:
            link_or_copy(engine / model.source, version / model.file)
        batched = all(spec.shape[0] == "batch" for spec in inputs)
        (folder / CONFIG_FILE).write_text(_config(manifest, name, model.platform, inputs, max_queue_delay_us, batched))
        files = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    return {
        "model": str(out / name),
        "platform": model.platform,
        "max_batch_size": manifest.max_batch if batched else 0,
        "files": files,
    }


def give_batch_axis(model: onnx_ir.Model, names: list[str]) -> None:
    """Add a batch axis to graph inputs that have none, in place.

    Args:
        model: Model in which values that only depend on these inputs are used by element-wise operators alone, as rotary
            tables are.
        names: Inputs that become `[batch, …]`.

    Raises:
        SliderEditError: A value that only depends on these inputs is used in another way.
    """
    if not names:
        return
    graph = model.graph
    shared = [value for value in graph.inputs if value.name in names]
    depends: dict[Any, set[Any]] = {value: {value} for value in graph.inputs}
    for node in graph:
        # All requests of a batch have the same shapes.
        read = [] if node.op_type == "Shape" else [value for value in node.inputs if value is not None]
        depends |= dict.fromkeys(node.outputs, set().union(*(depends.get(value, set()) for value in read)))
    inside = [node for node in graph if (found := depends[node.outputs[0]]) and found <= set(shared)]
    edges = {
        value: users
        for value in (*shared, *(output for node in inside for output in node.outputs))
        if (
            users := [
                node for node in dict.fromkeys(n for n, _ in value.uses()) if node not in inside and node.op_type != "Shape"
            ]
        )
    }
    entries = [onnx_ir.Input(value.name, onnx_ir.Shape(["batch", *(value.shape or ())]), value.type) for value in shared]
    scan = onnx_ir.node(
        "Scan",
        entries,
        {"body": _each_request(shared, inside, list(edges)), "num_scan_inputs": len(entries)},
        num_outputs=len(edges),
        name="each_request",
    )
    graph.append(scan)
    for (value, users), batched in zip(edges.items(), scan.outputs, strict=True):
        batched.name, batched.type = f"{value.name}_batched", value.type
        batched.shape = onnx_ir.Shape(["batch", *(value.shape or ())])
        _broadcast(graph, value, batched, users)
    # The remaining uses of the inputs only read their number of rows.
    index = _constant(graph, "first_request", 0)
    for value, entry in zip(shared, entries, strict=True):
        row = onnx_ir.node("Gather", [entry, index], {"axis": 0}, name=f"{value.name}_first")
        row.outputs[0].name, row.outputs[0].type, row.outputs[0].shape = f"{value.name}_first", value.type, value.shape
        graph.append(row)
        onnx_ir.convenience.replace_all_uses_with(value, row.outputs[0])
    graph.inputs[:] = [entries[shared.index(value)] if value in shared else value for value in graph.inputs]
    graph.sort()
    passes.RemoveUnusedNodesPass()(model)


def _each_request(shared: list[onnx_ir.Value], inside: list[onnx_ir.Node], results: list[onnx_ir.Value]) -> onnx_ir.Graph:
    """Make the `Scan` body: nodes that only depend on the position inputs of one request. It may use values of the graph."""

    def twin(value: onnx_ir.Value) -> onnx_ir.Value:
        return onnx_ir.Value(name=f"{value.name}_one", type=value.type, shape=value.shape)

    twins = {value: twin(value) for value in shared}
    inputs, nodes = list(twins.values()), []
    for node in inside:
        outputs = [twin(value) for value in node.outputs]
        given = [value if value is None else twins.get(value, value) for value in node.inputs]
        nodes.append(
            onnx_ir.Node(
                node.domain,
                node.op_type,
                given,
                list(node.attributes.values()),
                outputs=outputs,
                version=node.version,
                name=f"{node.name}_one",
            )
        )
        twins |= zip(node.outputs, outputs, strict=True)
    outputs = []
    for value in results:
        # ONNX does not allow an input of a graph to be its output.
        copy = onnx_ir.node("Identity", [twins[value]], name=f"{value.name}_result")
        copy.outputs[0].name, copy.outputs[0].type, copy.outputs[0].shape = f"{value.name}_result", value.type, value.shape
        nodes.append(copy)
        outputs.append(copy.outputs[0])
    return onnx_ir.Graph(inputs, outputs, nodes=nodes, name="one_request")


def _broadcast(graph: onnx_ir.Graph, value: onnx_ir.Value, batched: onnx_ir.Value, users: list[onnx_ir.Node]) -> None:
    """Replace `value`, which `users` broadcast over a batch, by `batched`, `[batch, …]`."""
    rank = len(value.shape or ())
    for user in users:
        result = user.outputs[0].shape
        leading = rank > 0 and result is not None and len(result) == rank and value.shape is not None and value.shape[0] == 1
        if user.op_type not in _BROADCASTING or result is None or not (leading or len(result) == rank + 1):
            raise SliderEditError(
                f"the graph uses {value.name} in {user.op_type}, which cannot take one value per request, so Triton cannot "
                "batch this model; report it with the model's family"
            )
        taken = batched
        if leading:
            squeezed = onnx_ir.node("Squeeze", [batched, _constant(graph, "request_axis", [1])], name=f"{user.name}_rows")
            squeezed.outputs[0].name, squeezed.outputs[0].type = f"{user.name}_rows", value.type
            graph.append(squeezed)
            taken = squeezed.outputs[0]
        for i, given in enumerate(user.inputs):
            if given is value:
                user.replace_input_with(i, taken)


def _constant(graph: onnx_ir.Graph, name: str, content: int | list[int]) -> onnx_ir.Value:
    if name not in graph.initializers:
        tensor = onnx_ir.tensor(content, onnx_ir.DataType.INT64, name=name)
        graph.register_initializer(
            onnx_ir.Value(
                name=name, const_value=tensor, type=onnx_ir.TensorType(tensor.dtype), shape=onnx_ir.Shape(tensor.shape.numpy())
            )
        )
    return graph.initializers[name]


def _config(
    manifest: Manifest, name: str, platform: str, inputs: list[TensorSpec], max_queue_delay_us: int, batched: bool
) -> str:
    """Return the model's configuration as protobuf text."""
    lines = [
        f'name: "{name}"',
        f'platform: "{platform}"',
        f"max_batch_size: {manifest.max_batch if batched else 0}",
        *(_tensor("input", spec, batched) for spec in inputs),
        *(_tensor("output", spec, batched) for spec in manifest.outputs),
    ]
    if batched:
        lines.append(f"dynamic_batching {{ max_queue_delay_microseconds: {max_queue_delay_us} }}")
    known = {"family": manifest.family, "adapter_kind": manifest.kind or "none", "max_sliders": manifest.max_sliders}
    lines += [f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}' for key, value in known.items()]
    return "\n".join(lines) + "\n"


def _tensor(what: str, spec: TensorSpec, batched: bool) -> str:
    axes = [-1 if isinstance(axis, str) else axis for axis in spec.shape]
    # With max_batch_size, the batch axis is implicit.
    rest = axes[1:] if batched else axes
    # Triton requires at least one axis, so one number per request is [1].
    dims, reshape = (", ".join(map(str, rest or [1])), "" if rest else " reshape { shape: [ ] }")
    return f'{what} {{ name: "{spec.name}" data_type: {_TYPES[spec.dtype]} dims: [ {dims} ]{reshape} }}'
