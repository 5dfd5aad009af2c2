"""The HTTP gateway: OpenAI's API and WiCore's own in front of Triton, of which it is a gRPC client like any other."""
