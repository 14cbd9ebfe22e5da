"""The traces that the tests of a run share: the same graphs as fresh traces, and one for each structure."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from diffusers import FluxTransformer2DModel
from trace_cache import TraceCache, structure

from slideredit_rt.adapters import Adapter
from slideredit_rt.assets import resolve_base
from slideredit_rt.export import linked_weights, onnx_graph
from slideredit_rt.export.linked_weights import WeightOptions, export_linked
from slideredit_rt.families import Family, Kind
from slideredit_rt.modules import SliderBackbone

MODULE = "transformer_blocks.0.attn.add_q_proj"


def small_transformer(**changes: Any) -> FluxTransformer2DModel:
    config = FluxTransformer2DModel.load_config(resolve_base("shapes-kontext") / "transformer")
    found: FluxTransformer2DModel = FluxTransformer2DModel.from_config(config, num_layers=1, num_single_layers=0, **changes)
    return found


def adapter(family: Family, kind: Kind, rank: int = 4, value: float = 0.0) -> Adapter:
    width = small_transformer().get_submodule(MODULE).in_features
    pair = torch.full((rank, width), value), torch.full((width, rank), value)
    return Adapter(family.name, kind, rank, {MODULE: pair}, "constant")


def test_a_shared_trace_gives_the_graph_of_a_fresh_one(tmp_path: Path, family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    small_transformer().save_pretrained(tmp_path / "base" / "transformer")
    fresh: list[SliderBackbone] = []

    def trace(backbone: SliderBackbone, config: Any) -> Any:
        fresh.append(backbone)
        return onnx_graph.trace(backbone, config)

    def exported(name: str, tracer: Callable[[SliderBackbone, Any], Any]) -> onnx.ModelProto:
        folder = tmp_path / name
        folder.mkdir()
        monkeypatch.setattr(linked_weights, "trace", tracer)
        # In another dtype than the checkpoint's, so that the weights' dtypes show.
        export_linked(family, tmp_path / "base", adapter(family, "st", value=0.5), folder, WeightOptions(torch.bfloat16))
        model = onnx.load(folder / "model.onnx", load_external_data=False)
        for node in model.graph.node:
            node.name = re.sub(r"^(node_\w+?)_\d+$", r"\1", node.name)  # a counter in the process
        return model

    (tmp_path / "traces").mkdir()
    expected, cache = exported("fresh", trace), TraceCache(tmp_path / "traces", trace)
    assert exported("first", cache) == expected
    assert exported("second", cache) == expected
    assert len(fresh) == 2, "the second export through the cache traced nothing"


def test_values_do_not_matter_to_a_trace_and_everything_else_does(family: Family) -> None:
    def described(given: Adapter | None, dtype: torch.dtype = torch.float32, device: str = "cpu", **changes: Any) -> str:
        backbone = SliderBackbone(family, small_transformer(**changes).to(dtype).to(device), given)
        return structure(backbone, backbone.transformer.config)

    st = described(adapter(family, "st"))
    assert described(adapter(family, "st", value=1.0)) == st
    others = [
        described(None),
        described(adapter(family, "gst")),
        described(adapter(family, "st", rank=5)),
        described(adapter(family, "st"), torch.bfloat16),
        described(adapter(family, "st"), device="meta"),
        described(adapter(family, "st"), axes_dims_rope=(2, 2, 12)),
    ]
    assert len({st, *others}) == 1 + len(others)
