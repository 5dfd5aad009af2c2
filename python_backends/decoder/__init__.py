"""The last stage: Triton's side (`backend`), the step loop (`engine`), the scheduler and the detokenizer."""
