"""From a backbone with sliders to the graphs that engines are built of."""

from slideredit_rt.export.onnx_graph import export_onnx

__all__ = ["export_onnx"]
