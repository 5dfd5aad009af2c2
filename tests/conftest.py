"""For all tests."""

import signal

# A run started in the background of a script inherits an ignored SIGINT and would hand it on to every program that the
# tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
