"""Root through sudo: what is run, and the conversation that comes before the payload. No connection in here.

The payload's stdin is held back until a marker on stderr shows that sudo let us in. So the password can only
ever reach sudo, never the payload (``sudo -S`` reads none when none is needed), the payload can only ever reach
the payload, never sudo as a second guess, and a refusal by sudo is told apart from a failure of the payload.
"""

from __future__ import annotations

import queue
import re
import secrets
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from nixops.errors import HostFault, LoginRefused, NixopsError
from nixops.secret import Secret
from nixops.transport.command import Command, Result

# Runs as root: says under which process group the payload runs, so that another channel can stop it (sshd itself
# may signal only the login's own processes), and becomes the payload. Only builtins: there may be no PATH.
_ENTER = 'read -r a b c d group rest </proc/$$/stat; echo "$0 $group" >&2; exec "$@"'


class SudoStart:
    """The conversation with one sudo process.

    :param command: what to run as root.
    :param password: asked for when sudo asks; ``None`` makes sudo fail instead of asking.
    """

    def __init__(self, command: Command, password: Callable[[], Secret] | None) -> None:
        token = secrets.token_hex(8)
        self._prompt = f"nixops-password-{token}:".encode()
        self._marker = re.compile(rb"nixops-entered-" + token.encode() + rb" (\d+)\n")
        self._command = command
        self._password = password
        self._asked = 0
        self._held = b""
        self._answers: queue.SimpleQueue[Secret | None] = queue.SimpleQueue()
        # -k: never rely on an earlier command's credentials, which may run out in between.
        options = ("-n",) if password is None else ("-k", "-S", "-p", self._prompt.decode())
        entered = f"nixops-entered-{token}"
        inner = ("env", *(f"{k}={v}" for k, v in command.env.items()), *command.argv) if command.env else command.argv
        outer = replace(command, argv=("sudo", *options, "--", "sh", "-c", _ENTER, entered, *inner), env={})
        self.shell_line = outer.shell_line()
        self.group: int | None = None

    @property
    def entered(self) -> bool:
        """The payload runs, as root."""
        return self.group is not None

    def stdin(self, payload: Iterable[bytes]) -> Iterator[bytes]:
        """What to write: the password when it is asked for, and the payload's stdin once we are in."""
        while True:
            answer = self._answers.get()
            if answer is None:
                break
            yield answer.reveal().encode() + b"\n"
        if self.entered:
            yield from payload

    def stderr(self, chunk: bytes) -> bytes:
        """Take a piece of stderr; returns what of it is the payload's (or sudo's own warnings).

        :raises LoginRefused: sudo asks a second time, so the password is wrong.
        """
        if self.entered:
            return chunk
        self._held += chunk
        while self._prompt in self._held:
            self._held = self._held.replace(self._prompt, b"", 1)
            self._asked += 1
            if self._asked > 1 or self._password is None:
                raise LoginRefused(
                    "sudo did not take the password",
                    hint="one try was made; check sudo_password of this host in the inventory",
                )
            self._answers.put(self._password())
        found = self._marker.search(self._held)
        if not found:
            return b""
        self.group = int(found[1])
        self._answers.put(None)
        rest = self._held[: found.start()] + self._held[found.end() :]
        self._held = b""
        return rest

    def abandon(self) -> None:
        """Nothing more will come: let :meth:`stdin` end."""
        self._answers.put(None)

    def refusal(self, result: Result, host: str, user: str) -> NixopsError:
        """The error of a sudo that ended without ever running the payload."""
        said = replace(result, stderr=self._held).tail(5)
        if result.code == 127:
            return HostFault(
                f"{self._command.name} needs root on {host}, and the login {user} finds no sudo there",
                hint="on NixOS it is /run/wrappers/bin/sudo: is that on the login's PATH?",
                detail=said,
            )
        if self._password is None:
            hint = f"set sudo_password of {host} in the inventory, or let {user} use sudo without one (NOPASSWD)"
        elif self._asked:
            hint = f"check sudo_password of {host} in the inventory, and what sudoers says of {user}"
        else:
            hint = f"may {user} use sudo on {host} (group wheel)?"
        return LoginRefused(f"sudo on {host} did not let {user} in", hint=hint, detail=said)


def kill_group(group: int, name: str) -> Command:
    """The command that signals a process group that sudo started; it too needs root."""
    return Command(
        ("sh", "-c", 'kill -s "$1" -- "-$2"', "sh", name, str(group)), root=True, timeout=10.0, title=f"kill -{name}"
    )
