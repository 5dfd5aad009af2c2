"""Measuring: the engine alone, the engine through Triton, other engines beside it, and NVIDIA's perf_analyzer."""
