"""Runs a program that ends when its parent does, however the parent ends.

Started as a script in a bare interpreter (`python -I -S launcher.py PARENT_PID PROGRAM ARGUMENT…`), because Python
cannot safely do this between fork and exec once threads run. Linux only, as tritonserver is.

A secret comes in an environment variable, which the program does not inherit, and takes its place among the arguments
here.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # prctl(2)
SECRET_VARIABLE = "WICORE_ADMIN_KEY"
SECRET_PLACE = "{WICORE_ADMIN_KEY}"


def main(parent: int, program: list[str]) -> None:
    """Replace this process by ``program``; SIGTERM reaches it when ``parent`` is gone."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
    if os.getppid() != parent:  # it went before the line above
        sys.exit(1)
    secret = os.environ.pop(SECRET_VARIABLE, "")
    os.execv(program[0], [part.replace(SECRET_PLACE, secret) for part in program])


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
