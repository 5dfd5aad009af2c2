"""Taking a secret out of what the process list shows.

tritonserver takes the key of its admin APIs on the command line alone, where every user of the machine can read it. It
copies its arguments when it starts, so that they can be overwritten in its memory once it has.
"""

from __future__ import annotations

from pathlib import Path

MASK = b"*"
_ARGUMENTS = slice(45, 47)
"""arg_start and arg_end, fields 48 and 49 of /proc/PID/stat (proc_pid_stat(5)), among those that follow the name."""


def hide(pid: int, secret: str) -> bool:
    """Overwrite ``secret`` among a child's arguments; False where the system does not let us."""
    wanted = secret.encode()
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        start, end = (int(value) for value in fields[_ARGUMENTS])
        with Path(f"/proc/{pid}/mem").open("r+b", buffering=0) as memory:
            memory.seek(start)
            found = memory.read(end - start)
            at = found.find(wanted)
            while at >= 0:
                memory.seek(start + at)
                memory.write(MASK * len(wanted))
                at = found.find(wanted, at + len(wanted))
        return wanted not in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
