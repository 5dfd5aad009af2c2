"""The `wicore` command."""

from __future__ import annotations

import os
import signal


def main() -> None:
    """Entry point. Exit codes: 0 done, 1 failed, 2 wrong usage, 130 Ctrl-C, 128 + n ended by signal n."""
    # Builders use its configuration classes alone; that PyTorch is not there is no news.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    # Until everything is imported there is nothing to clean up, and an import that is interrupted may say anything.
    interrupt = signal.getsignal(signal.SIGINT)
    if interrupt is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from client.commands.app import app

    signal.signal(signal.SIGINT, interrupt)
    try:
        app()
    except KeyboardInterrupt:  # commands have their own
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
