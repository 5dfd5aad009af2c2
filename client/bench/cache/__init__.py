"""Replaying requests through the KV cache's manager, with the compute simulated: what a replacement policy is worth."""
