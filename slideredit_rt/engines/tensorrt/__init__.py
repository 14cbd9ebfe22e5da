"""TensorRT and TensorRT-RTX: building plans, running them, and what they hold."""
