"""The server programs of the lab: each at a port of its own, seen to serve, and ended when we end or are killed."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self

from nixops.errors import HostFault, UsageError

_ATTEMPTS = 5


class ServerProgram(ABC):
    """One server program with a directory and a log of its own; a context manager.

    A subclass says what is started, and how the program logs that it listens. Its log is asked and not its port: there
    another server might answer, that was quicker.

    :param bind: the IPv4 address it listens on.
    :param port: 0 takes a free one.
    """

    # What errors call it.
    called: ClassVar[str]
    # What it logs once it listens.
    listens: ClassVar[bytes]
    # How long it may take until then, seconds.
    patience: ClassVar[float] = 30.0

    def __init__(self, bind: str, port: int) -> None:
        self._bind = bind
        self._wanted_port = port
        self._stack = ExitStack()
        self._directory: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self.port = port

    @property
    def pid(self) -> int:
        """The program's process id."""
        if self._process is None:
            raise self._not_running()
        return self._process.pid

    @property
    def directory(self) -> Path:
        """Where it keeps what it needs, between its start and its end."""
        if self._directory is None:
            raise self._not_running()
        return self._directory

    @property
    def log(self) -> Path:
        """What the program said so far."""
        return self.directory / "log"

    def __enter__(self) -> Self:
        try:
            self._directory = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="nixops-server-")))
            self._prepare()
            self._start()
            self._started()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End it; what it kept is gone. Can be called again."""
        self._halt()
        self._stack.close()
        self._directory = None

    # -- what a subclass says ---------------------------------------------------------------------------------

    def _prepare(self) -> None:
        """Put into the directory what does not depend on the port; nothing, unless a server says so."""
        return

    @abstractmethod
    def _command(self) -> Sequence[str]:
        """What is started, to listen on :attr:`port`."""

    def _environment(self) -> Mapping[str, str]:
        """What its environment has besides ``HOME`` and ``PATH``."""
        return {}

    def _started(self) -> None:
        """Called once, when it listens for the first time; nothing happens, unless a server says so."""
        return

    # -- starting ---------------------------------------------------------------------------------------------

    def _start(self) -> None:
        for attempt in range(_ATTEMPTS):
            # Between finding a free port and taking it another process can be quicker; then try another.
            if self._start_once(self._wanted_port or free_port(self._bind)):
                return
            if self._wanted_port:
                break
            time.sleep(0.1 * attempt)
        raise self._does_not_start()

    def _start_once(self, port: int) -> bool:
        self._halt()
        self.port = port
        with self.log.open("ab") as log:
            before = log.tell()
            self._process = subprocess.Popen(
                [*die_with_parent(), *self._command()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.directory,
                env={"HOME": str(self.directory), "PATH": "/usr/bin:/bin", **self._environment()},
                start_new_session=True,
            )
        deadline = time.monotonic() + self.patience
        while self._process.poll() is None and time.monotonic() < deadline:
            if self.listens in self.log.read_bytes()[before:]:
                return True
            time.sleep(0.02)
        return False

    def _halt(self) -> None:
        if self._process is not None:
            end(self._process)
            self._process = None

    def _not_running(self) -> UsageError:
        return UsageError(f"{self.called} is not running")

    def _does_not_start(self) -> HostFault:
        text = self.log.read_text(errors="replace")
        return HostFault(
            f"{self.called} does not start on {self._bind}",
            hint="is the address this machine's, and the port free?",
            detail="\n".join(text.splitlines()[-10:]),
        )


def free_port(bind: str) -> int:
    """A TCP port that nobody listens on at ``bind`` at this moment."""
    with socket.socket() as probe:
        probe.bind((bind, 0))
        port: int = probe.getsockname()[1]
        return port


def die_with_parent() -> list[str]:
    """A prefix that ends the server when this process is killed and cannot end it itself, where there is one.

    The kernel means the thread that starts the server: from another thread than the main one, which lives as long
    as the process, the server would end with that thread.
    """
    if threading.current_thread() is not threading.main_thread():
        return []
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", signal.SIGKILL.name.removeprefix("SIG"), "--"] if setpriv else []


def end(process: subprocess.Popen[bytes], grace: float = 5.0) -> None:
    """Stop ``process``: TERM, and KILL after ``grace`` seconds. It is reaped."""
    process.terminate()
    try:
        process.wait(grace)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
