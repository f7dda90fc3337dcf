"""An ssh-agent of our own, so that a private key from a store of secrets is in no file and in no environment."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

from nixops.errors import HostFault, SecretUnavailable, printable
from nixops.secret import Redactor, Secret
from nixops.transport.scratch import Scratch, nobody_elses

# How long the agent, and ssh-add, may take, seconds.
_PATIENCE = 10.0
# Longer than this, and a socket below it has no room in the 107 bytes that a socket's path may have.
_LONGEST = 60

# The agent ends at the end of this program's stdin, which is our own end, however that comes, also when nobody is left
# to hear its number. Should this program be killed, the agent notices within ten seconds by itself.
_WATCH = 'trap "" PIPE; echo "$SSH_AGENT_PID"; while read -r line; do :; done; kill "$SSH_AGENT_PID"'


def private_parent(*, executable: bool = False) -> Path | None:
    """Where sockets of ours go: a directory in memory with a short name, the operator's own where there is one;
    ``None`` where there is none, for :class:`Scratch` to choose.

    :param executable: programs can be run from there; where that is nowhere so, it is as without.
    """
    found: list[Path] = []
    for candidate in (os.environ.get("XDG_RUNTIME_DIR", ""), f"/run/user/{os.geteuid()}", "/dev/shm", "/tmp"):
        path = Path(candidate)
        plain = candidate.startswith("/") and len(candidate) <= _LONGEST and not set(candidate) & set(" \t\n\"'\\%$~#")
        if plain and nobody_elses(path) and os.access(path, os.W_OK | os.X_OK):
            found.append(path.resolve())
    runs = [path for path in found if not os.statvfs(path).f_flag & os.ST_NOEXEC]
    return next(iter([*(runs if executable else ()), *found]), None)


def bare_environment() -> dict[str, str]:
    """What a program of OpenSSH needs of our environment; nothing of the operator's tokens is in it."""
    kept = ("PATH", "HOME", "USER", "LOGNAME", "TMPDIR", "SSH_AUTH_SOCK")
    return {name: os.environ[name] for name in kept if name in os.environ} | {"LC_ALL": "C"}


class KeyAgent:
    """An ssh-agent that holds one private key while the ``with`` block runs, and no longer than this process.

    :param key: the private key's text, in any format that ``ssh-add`` reads; without a passphrase.
    :param redactor: learns the key, line by line.
    :raises SecretUnavailable: it is no private key, or it has a passphrase.
    :raises HostFault: there is no ssh-agent on this machine, or it does not start.
    """

    def __init__(self, key: Secret, *, redactor: Redactor | None = None) -> None:
        self._key = (redactor or Redactor()).add(key)
        self._scratch: Scratch | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def socket(self) -> Path:
        """For ``IdentityAgent`` and ``SSH_AUTH_SOCK``; below a directory of mode 0700."""
        if self._scratch is None:
            raise RuntimeError("KeyAgent runs only inside its with block")
        return self._scratch.path / "agent"

    def __enter__(self) -> Self:
        self._scratch = Scratch("nixops-key-", runtime=True, parent=private_parent())
        try:
            self._start()
            self._add()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the agent, and with it the key. May be called twice."""
        process, self._process = self._process, None
        if process is not None:
            # Closes the program's stdin and waits for it: it has ended the agent by then.
            try:
                process.communicate(timeout=_PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
        if self._scratch is not None:
            self._scratch.remove()
            self._scratch = None

    def _start(self) -> None:
        try:
            self._process = subprocess.Popen(
                ["ssh-agent", "-a", str(self.socket), "sh", "-c", _WATCH],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=bare_environment(),
                start_new_session=True,
            )
        except OSError as error:
            raise HostFault(
                f"ssh-agent cannot be run on this machine: {error.strerror}", hint="install the OpenSSH client"
            ) from None
        assert self._process.stdout is not None  # opened as a pipe above
        said = self._process.stdout.readline().decode(errors="replace").strip()
        if not said.isdigit():
            raise HostFault(f"ssh-agent does not start on this machine: {printable(said)}", hint="set XDG_RUNTIME_DIR")

    def _add(self) -> None:
        # A key that was pasted or passed on often lacks its last newline, or has the line ends of another system.
        text = self._key.reveal().replace("\r\n", "\n").strip() + "\n"
        environment = {**bare_environment(), "SSH_AUTH_SOCK": str(self.socket), "SSH_ASKPASS_REQUIRE": "never"}
        try:
            # In a session of its own it has no terminal to ask for a passphrase at.
            done = subprocess.run(
                ["ssh-add", "-q", "-"],
                input=text.encode(),
                capture_output=True,
                env=environment,
                timeout=_PATIENCE,
                start_new_session=True,
                check=False,
                cwd=tempfile.gettempdir(),
            )
        except subprocess.TimeoutExpired:
            raise HostFault(f"ssh-add did not end within {_PATIENCE:g} s") from None
        except OSError as error:
            raise HostFault(
                f"ssh-add cannot be run on this machine: {error.strerror}", hint="install the OpenSSH client"
            ) from None
        if done.returncode != 0:
            said = printable(Redactor([self._key]).clean(done.stderr.decode(errors="replace").strip()))
            raise SecretUnavailable(
                "the private key for the builders is not one that ssh-add takes",
                hint="it must be an OpenSSH or PEM private key without a passphrase",
                detail=said or None,
            )
