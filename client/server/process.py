"""One tritonserver process and its stages' processes: start, watch, stop, and leave nothing behind."""

from __future__ import annotations

import contextlib
import http.client
import os
import secrets
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import psutil

from client.server import installation as installations
from client.server import launcher, ports
from client.server.hidden_argument import hide
from client.server.options import Addresses, ServerOptions, command, environment
from client.server.server_log import Progress, ServerLog
from python_backends.errors import ServerStartError, ServerUnavailableError
from python_backends.logs import triton_as_json

SHARED_MEMORY = Path("/dev/shm")
POLL_S = 0.05
START_ATTEMPTS = 3
KEPT_LOGS = 20
KILL_GRACE_S = 5.0
"""How much longer than its drain time a server gets to end by itself."""


class Server:
    """A running `tritonserver`; also a context manager.

    ``on_progress`` hears how loading goes, ``on_log`` every line of the server's log; both are called from a thread.
    The server ends with this process, even if this process is killed.
    """

    def __init__(
        self,
        options: ServerOptions,
        on_progress: Callable[[Progress], None] | None = None,
        on_log: Callable[[str], None] | None = None,
    ) -> None:
        self.options = options
        self.addresses = Addresses(options.host, options.http_port, options.grpc_port, options.metrics_port)
        self.log = ServerLog()
        self.log_path = options.log_path or installations.cache_folder() / "logs" / f"server-{secrets.token_hex(4)}.log"
        self._on_progress = on_progress
        self._on_log = on_log
        self._shm_prefix = f"wicore-{os.getpid()}-{secrets.token_hex(4)}-"
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: threading.Thread | None = None
        self._stages: dict[int, str] = {}
        self._writes_json = options.config is not None and options.config.log_format == "json"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int | None:
        """tritonserver's process ID; None where none runs."""
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Start, and return when every model is ready.

        Raises:
            ServerStartError: with the reason: no tritonserver, a port, an empty repository, the stage that failed.
        """
        check_repository(self.options.repository)
        installation = installations.find()
        installations.check_environment(installation)
        for attempt in range(1, START_ATTEMPTS + 1):
            self.addresses = ports.choose(self.options)
            self.log = ServerLog()
            try:
                self._launch(installation)
                self._wait_until_ready()
            except BaseException:
                self._end(graceful=False)
                # Between choosing a free port and binding it another program may have come first.
                chosen = 0 in (self.options.http_port, self.options.grpc_port, self.options.metrics_port)
                again = (chosen and self.log.port_taken) or self.log.starved
                if not again or attempt == START_ATTEMPTS:
                    raise
            else:
                return

    def wait(self, wake: threading.Event | None = None) -> None:
        """Block until ``wake`` is set; without it, until the server ends.

        Raises:
            ServerUnavailableError: tritonserver or a stage's process has died. A stage that is gone leaves its streams
                silent while Triton goes on calling itself ready, so this is the one sign of it.
        """
        while wake is None or not wake.is_set():
            self.check()
            if wake is None:
                time.sleep(POLL_S)
            else:
                wake.wait(POLL_S)

    def check(self) -> None:
        """Raise what `wait` would if something has died; else return at once."""
        process = self._process
        if process is None:
            raise ServerUnavailableError("the server is not running")
        if process.poll() is not None:
            raise ServerUnavailableError(
                f"tritonserver ended{_how(process.returncode)}: {self.log.explain()} (log: {self.log_path})"
            )
        for pid, stage in self._stages.items():
            if not _alive(pid):
                raise ServerUnavailableError(
                    f"the process of stage {stage} has died{_exit_of_zombie(pid)}, so the server cannot answer any "
                    f"more (log: {self.log_path})"
                )

    def stop(self) -> None:
        """End the server, gracefully where it can still answer; a second Ctrl-C kills it. Safe to call again."""
        graceful = self._process is not None and all(_alive(pid) for pid in self._stages)
        try:
            ended = self._end(graceful=graceful)
        except BaseException:
            self._end(graceful=False)
            raise
        if ended and self.options.log_path is None:
            self.log_path.unlink(missing_ok=True)

    def _launch(self, installation: installations.Installation) -> None:
        arguments = command(self.options, installation, self.addresses, self._shm_prefix)
        program = [sys.executable, "-I", "-S", launcher.__file__, str(os.getpid()), *arguments]
        try:
            self.log_path.parent.mkdir(parents=True, exist_ok=True)
            if self.options.log_path is None:
                _forget_old_logs(self.log_path.parent)
            log_file = self.log_path.open("ab", buffering=0)
        except OSError as error:
            raise ServerStartError(f"cannot write the log {self.log_path}: {error.strerror}") from error
        started = threading.Event()
        # The kernel ties the child to the thread that starts it (PR_SET_PDEATHSIG), so that is the one that stays.
        self._reader = threading.Thread(
            target=self._run, args=(program, environment(self.options, installation), log_file, started), daemon=True
        )
        self._reader.start()
        started.wait()
        if self._process is None:
            raise ServerStartError(f"cannot start {installation.binary}: {self.log.fatal}")

    def _run(
        self, program: list[str], variables: dict[str, str], log_file: IO[bytes], started: threading.Event
    ) -> None:
        with log_file:
            try:
                process = subprocess.Popen(
                    program,
                    env=variables,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # a terminal's Ctrl-C is ours to forward
                )
                self._process = process
            except OSError as error:
                self.log.fatal = str(error)
                return
            finally:
                started.set()
            assert process.stdout is not None
            with process.stdout:
                for number, line in enumerate(process.stdout):
                    if number == 0:
                        self._hide_key(process.pid)
                    text = line.decode(errors="replace").rstrip("\n")
                    log_file.write(f"{triton_as_json(text)}\n".encode() if self._writes_json else line)
                    self._take(text)
            process.wait()  # its output may end first; this thread must not, see `_launch`

    def _hide_key(self, pid: int) -> None:
        """With the first line of its log tritonserver has read its arguments."""
        if self.options.admin_key and not hide(pid, self.options.admin_key):
            self._take("the admin key cannot be taken out of the process list here: other users of this machine see it")

    def _take(self, line: str) -> None:
        if self.log.add(line) and self._on_progress:
            self._on_progress(self.log.progress)
        if self._on_log:
            self._on_log(line)

    def _wait_until_ready(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + self.options.start_timeout_s
        while not self._is_ready():
            if self._process.poll() is not None or self.log.failures:
                # Triton takes seconds to unload the rest; the reason is known.
                self._drain_log()
                raise ServerStartError(f"{self.log.explain()}\nThe server's log: {self.log_path}")
            if time.monotonic() > deadline:
                raise ServerStartError(
                    f"not ready after {self.options.start_timeout_s:g} s ({self.log.progress}); "
                    f"the server's log: {self.log_path}"
                )
            time.sleep(POLL_S)
        self._stages = dict(_stage_processes(self._process.pid))

    def _drain_log(self) -> None:
        """Let lines that are on their way arrive: another model may have failed too, and reasons come last."""
        if self._reader:
            self._reader.join(0.3)

    def _is_ready(self) -> bool:
        connection = http.client.HTTPConnection(_host_of(self.addresses), self.addresses.http_port, timeout=5)
        try:
            connection.request("GET", "/v2/health/ready")
            return connection.getresponse().status == http.client.OK
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def _end(self, *, graceful: bool) -> bool:
        """End every process of the server; True where it ended by itself."""
        process = self._process
        if process is None:
            return False
        ended = False
        if graceful:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(self.options.drain_s + KILL_GRACE_S)
                ended = process.returncode == 0
        # Its stages are in its session's group: also those that a killed tritonserver leaves.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if self._reader:
            self._reader.join(KILL_GRACE_S)
        for region in SHARED_MEMORY.glob(f"{self._shm_prefix}*"):
            region.unlink(missing_ok=True)
        self._process, self._stages = None, {}
        return ended


def check_repository(repository: Path) -> None:
    """See that there is something to load.

    Raises:
        ServerStartError: no such folder, no model in it, or nothing built for WiCore's own stages.
    """
    if not repository.is_dir():
        raise ServerStartError(f"there is no folder {repository}; {_BUILD.format(repository)}")
    models = sorted(path.parent.name for path in repository.glob("*/config.pbtxt"))
    if not models:
        raise ServerStartError(f"{repository} holds no models; {_BUILD.format(repository)}")
    if "decoder" in models and not (repository / "manifest.json").exists():
        raise ServerStartError(f"{repository} has not been built yet; {_BUILD.format(repository)}")


_BUILD = "run `wicore build CHECKPOINT --repository {}` first"


def _forget_old_logs(folder: Path) -> None:
    """Logs of servers that failed stay for their user to read, but not for ever."""
    logs = sorted(folder.glob("*.log"), key=lambda path: path.stat().st_mtime)
    for path in logs[:-KEPT_LOGS]:
        path.unlink(missing_ok=True)


def _host_of(addresses: Addresses) -> str:
    return addresses.grpc.rpartition(":")[0].strip("[]")


def _stage_processes(server: int) -> Iterator[tuple[int, str]]:
    """Processes of Python-backend models: ``(pid, model name)``, also of those that died since."""
    for child in psutil.Process(server).children():
        with contextlib.suppress(psutil.Error):
            if child.status() == psutil.STATUS_ZOMBIE:
                yield child.pid, child.name()
                continue
            arguments = child.cmdline()
            if arguments and Path(arguments[0]).name == installations.STUB:
                yield child.pid, Path(arguments[1]).parents[1].name


def _alive(pid: int) -> bool:
    """Whether a process runs. A zombie does not, which a signal 0 would not tell; its handle is readable."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    try:
        ended = select.poll()
        ended.register(handle, select.POLLIN)
        return not ended.poll(0)
    finally:
        os.close(handle)


def _exit_of_zombie(pid: int) -> str:
    """How a process that its parent has not collected ended, from the last field of /proc/PID/stat (proc(5))."""
    try:
        status = int(Path(f"/proc/{pid}/stat").read_text().rpartition(" ")[2])
    except (OSError, ValueError):
        return ""
    return _how(os.waitstatus_to_exitcode(status))


def _how(code: int) -> str:
    if code >= 0:
        return f" with exit code {code}"
    hint = "; the machine may have run out of memory" if -code == signal.SIGKILL else ""
    return f", killed by {signal.Signals(-code).name}{hint}"
