"""Running commands on this machine."""

from __future__ import annotations

import os
import selectors
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from types import MappingProxyType
from typing import IO

from nixops.errors import HostFault
from nixops.transport.command import Command, LineSink, Result
from nixops.transport.exec import CHUNK, GRACE, TICK, ChunkSink, Deadline, Lines, chunks, raise_if_cancelled, timed_out
from nixops.transport.fleet import aside
from nixops.transport.group import signal_group

# Which package has the program, where their names differ (Debian's and nixpkgs' names mostly agree).
_PACKAGES = {
    "nix": "nix (on Debian: nix-bin)",
    "nix-store": "nix (on Debian: nix-bin)",
    "nix-instantiate": "nix (on Debian: nix-bin)",
    "ssh": "openssh (on Debian: openssh-client)",
    "ssh-keygen": "openssh (on Debian: openssh-client)",
    "bao": "openbao",
    "tofu": "opentofu",
}


class LocalRunner:
    """Runs commands as the operator, each in a process group of its own, with no terminal.

    :param env: variables added to this process's own for every command.
    :param without: names of variables of this process's own that no command gets: the operator's tokens.
    """

    host = "localhost"

    def __init__(self, *, env: Mapping[str, str] = MappingProxyType({}), without: Collection[str] = ()) -> None:
        self._env = dict(env)
        self._without = frozenset(without)

    def run(self, command: Command, on_line: LineSink | None = None) -> Result:
        """Run ``command`` to its end; see :class:`nixops.transport.command.Runner`.

        On an interrupt, a cancellation or a time-out the whole process group gets TERM and, after a grace, KILL.

        :raises HostFault: the program is not there or may not be run, or it needs root and we are not root.
        :raises CommandTimeout: ``command.timeout`` passed.
        """
        return self.stream(command, on_line=on_line)

    def stream(
        self,
        command: Command,
        *,
        stdin: Iterable[bytes] | None = None,
        stdout: ChunkSink | None = None,
        on_line: LineSink | None = None,
    ) -> Result:
        """As :meth:`run`, piece by piece; see :class:`nixops.transport.exec.StreamRunner`."""
        out: list[bytes] = []
        source, sink = chunks(command.stdin_bytes) if stdin is None else stdin, stdout or out.append
        # An interrupt that strikes as the process is made would leave it running, with nobody who knows its number.
        result = aside(lambda: self._run(command, source, sink, on_line))
        return Result(command, result.code, b"".join(out), result.stderr, result.seconds, self.host)

    def _run(self, command: Command, stdin: Iterable[bytes], stdout: ChunkSink, on_line: LineSink | None) -> Result:
        raise_if_cancelled()
        started = time.monotonic()
        deadline = Deadline(command.timeout)
        process = self._start(command)
        feeder = _Feeder(process, stdin)
        err: list[bytes] = []
        lines = Lines(on_line)
        try:
            feeder.start()
            with selectors.DefaultSelector() as selector:
                for stream in (process.stdout, process.stderr):
                    selector.register(_piped(stream), selectors.EVENT_READ)
                while selector.get_map():
                    for key, _ in selector.select(deadline.tick()):
                        chunk = os.read(key.fd, CHUNK)
                        if not chunk:
                            selector.unregister(key.fileobj)
                        elif key.fileobj is process.stdout:
                            stdout(chunk)
                        else:
                            err.append(chunk)
                            lines.feed(chunk)
                    self._look(command, deadline, feeder, err)
            lines.close()
            while process.poll() is None:
                self._look(command, deadline, feeder, err)
                try:
                    process.wait(deadline.tick())
                except subprocess.TimeoutExpired:
                    continue
        except BaseException:
            _stop(process)
            raise
        finally:
            feeder.finish()
            for stream in (process.stdout, process.stderr):
                _piped(stream).close()
        if feeder.error:
            raise feeder.error
        return Result(command, process.returncode, b"", b"".join(err), time.monotonic() - started, self.host)

    def _look(self, command: Command, deadline: Deadline, feeder: _Feeder, err: list[bytes]) -> None:
        raise_if_cancelled()
        if feeder.error:
            raise feeder.error
        if deadline.passed:
            raise timed_out(command, self.host, b"".join(err), command.timeout)

    def _inherited(self) -> dict[str, str]:
        return {name: value for name, value in os.environ.items() if name not in self._without}

    def _start(self, command: Command) -> subprocess.Popen[bytes]:
        if command.root and os.geteuid() != 0:
            raise HostFault(f"{command.name} needs root on this machine", hint="run this as root")
        try:
            return subprocess.Popen(
                command.argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={**self._inherited(), **self._env, **command.env},
                cwd=command.cwd,
                start_new_session=True,
                bufsize=0,
            )
        except (FileNotFoundError, PermissionError) as error:
            # A directory of PATH that this user may not enter makes a program that is nowhere one that is forbidden.
            found = "/" in command.argv[0] or shutil.which(command.argv[0], path=command.env.get("PATH"))
            if isinstance(error, PermissionError) and found:
                raise HostFault(f"{command.argv[0]} cannot be run on this machine: {error.strerror}") from None
            if command.cwd is not None and not command.cwd.is_dir():
                raise HostFault(f"there is no directory {command.cwd} to run {command.name} in") from None
            program = command.argv[0]
            raise HostFault(
                f"{program} is not installed on this machine",
                hint=f"install the package {_PACKAGES.get(program, program)}, or put it on PATH",
            ) from None
        except OSError as error:
            raise HostFault(f"{command.argv[0]} cannot be run on this machine: {error.strerror}") from None


def _piped(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream is not None  # every stream is opened as a pipe above
    return stream


class _Feeder(threading.Thread):
    """Writes stdin, so that a program that answers before it has read all cannot deadlock with us."""

    def __init__(self, process: subprocess.Popen[bytes], source: Iterable[bytes]) -> None:
        super().__init__(name="nixops-stdin", daemon=True)
        self._process = process
        self._source = source
        self.error: Exception | None = None

    def run(self) -> None:
        sink = _piped(self._process.stdin)
        try:
            for piece in self._source:
                view = memoryview(piece)
                while view:
                    view = view[sink.write(view) :]
        except BrokenPipeError:
            pass  # a program may end without reading everything; its exit code says whether that was right
        except Exception as error:  # noqa: BLE001 - carried to the thread that waits for the command
            # The pipe stays open until the program has been stopped, or it would take this for its proper end.
            self.error = error
            return
        try:
            sink.close()
        except BrokenPipeError:
            pass

    def finish(self) -> None:
        """The program is gone: nothing blocks a write any more."""
        if self.ident is not None:
            self.join(TICK)
        try:
            _piped(self._process.stdin).close()
        except BrokenPipeError:
            pass


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the whole process group. It is ours alone, as the leader was started in a session of its own."""
    try:
        _signal(process, signal.SIGTERM)
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        kill = signal_group(process.pid, "KILL")
        argv = ("/bin/sh", *kill.argv[1:])
        with suppress(OSError, subprocess.SubprocessError):  # then the group alone
            subprocess.run(
                argv, env={}, stdin=subprocess.DEVNULL, capture_output=True, timeout=kill.timeout, check=False
            )
    finally:
        # Whether the leader has gone or not: a child that ignored TERM must not outlive it.
        _signal(process, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):  # in the kernel's hands, as on a dead file server; nobody can end it
        process.wait(GRACE)


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)
