"""What needs a GPU: correctness, step times beside their floors, memory and transfers. See `run.py`."""
