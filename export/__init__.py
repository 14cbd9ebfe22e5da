"""From a checkpoint and an adapter to an engine folder: ONNX graph, linked weights, TensorRT plugin and builders."""

from slideredit_rt.export.build import build_engine

__all__ = ["build_engine"]
