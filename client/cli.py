"""The `wicore` command."""

from __future__ import annotations

import os


def main() -> None:
    """Entry point. Exit codes: 0 done, 1 failed, 2 wrong usage, 130 Ctrl-C, 128 + n ended by signal n."""
    # Builders use its configuration classes alone; that PyTorch is not there is no news.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        from client.commands.app import app  # inside, so that Ctrl-C is quiet from here on

        app()
    except KeyboardInterrupt:  # commands have their own
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
