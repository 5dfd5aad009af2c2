"""Triton-lang kernels, each module one part of a step; every function beside them says how to launch one."""
