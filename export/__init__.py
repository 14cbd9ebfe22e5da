"""From a checkpoint and an adapter to an engine folder: ONNX graph, linked weights, TensorRT plugin and builders."""
