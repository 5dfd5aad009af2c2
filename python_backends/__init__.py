"""What runs inside Triton: the stages of the ensemble, the decode engine and its runtimes."""
