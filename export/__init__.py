"""Export of a checkpoint and an adapter to an engine folder: ONNX graph, linked weights and TensorRT plugin."""
