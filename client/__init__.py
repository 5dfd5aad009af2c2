"""Talking to WiCore: the client library and the `wicore` command."""
