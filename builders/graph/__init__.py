"""ONNX written from a checkpoint's configuration and weights, one file per network; no tracing."""

from builders.graph.decoder import write_decoder
from builders.graph.vision import write_vision_encoder

__all__ = ["write_decoder", "write_vision_encoder"]
