"""The decoder on a GPU: kernels between TensorRT plans, paged KV, a step recorded once and replayed."""
