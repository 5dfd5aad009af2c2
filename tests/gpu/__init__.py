"""What needs a GPU: correctness, step times beside their floors, memory and transfers. `python -m tests.gpu.run --help`."""
