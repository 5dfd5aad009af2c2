"""ONNX written from a checkpoint's configuration and weights, one file per network; no tracing."""
