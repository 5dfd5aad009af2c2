"""Checkpoint → ONNX (and TensorRT plans) → model repository."""
