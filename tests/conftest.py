"""For all tests."""

import os
import signal

from hypothesis import settings

# GPU kernels are interpreted. Triton-lang reads the variable when it is first imported, which PyTorch may do.
os.environ["TRITON_INTERPRET"] = "1"

# A run started in the background of a script inherits an ignored SIGINT and would hand it on to every program that the
# tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# `make test` tries the same examples every time, so that it says something about the change at hand; `make soak` looks
# for new ones, and for more of them.
settings.register_profile("same", derandomize=True, deadline=None)  # busy machines are no failures
settings.register_profile("search", max_examples=500, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))
