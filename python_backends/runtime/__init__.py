"""Runtimes behind one protocol: `base` says what a step is, the others execute it."""
