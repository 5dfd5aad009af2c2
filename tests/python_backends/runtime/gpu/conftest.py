"""Kernels are interpreted here: Triton-lang reads the variable when a kernel's module is first imported."""

import os

os.environ["TRITON_INTERPRET"] = "1"
