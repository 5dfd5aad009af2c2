"""Runs a program that ends when its parent does, however the parent ends.

Started as a script in a bare interpreter (`python -I -S launcher.py PARENT_PID PROGRAM ARGUMENT…`), because Python
cannot safely do this between fork and exec once threads run. Linux only, as tritonserver is.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # prctl(2)


def main(parent: int, program: list[str]) -> None:
    """Replace this process by ``program``; SIGTERM reaches it when ``parent`` is gone."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
    if os.getppid() != parent:  # it went before the line above
        sys.exit(1)
    os.execv(program[0], program)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
