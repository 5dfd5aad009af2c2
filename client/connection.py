"""Where a server is expected unless told otherwise; apart, so that reading it imports nothing."""

DEFAULT_ADDRESS = "127.0.0.1:8001"
