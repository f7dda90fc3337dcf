"""Root through sudo: the conversation that comes before the payload. No connection in here.

The payload's stdin is held back until a marker on stderr shows that sudo let us in. So the password can only
ever reach sudo, never the payload (``sudo -S`` reads none when none is needed), the payload can only ever reach
the payload, never sudo as a second guess, and a refusal by sudo is told apart from a failure of the payload.
"""

from __future__ import annotations

import queue
import secrets
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from nixops.errors import HostFault, Interrupted, LoginRefused, NixopsError
from nixops.secret import Secret
from nixops.transport.command import Command, Result
from nixops.transport.start import Start


class SudoStart(Start):
    """The conversation with one sudo process.

    :param command: what to run as root.
    :param password: asked for when sudo asks; ``None`` makes sudo fail instead of asking.
    """

    def __init__(self, command: Command, password: Callable[[], Secret] | None) -> None:
        prompt = f"nixops-password-{secrets.token_hex(8)}:"
        # -k: never rely on an earlier command's credentials, which may run out in between.
        options = ("-n",) if password is None else ("-k", "-S", "-p", prompt)
        super().__init__(command, ("sudo", *options, "--"))
        self._prompt = prompt.encode()
        self._password = password
        self._asked = 0
        self._abandoned = False
        self._answers: queue.SimpleQueue[Secret | None] = queue.SimpleQueue()

    @property
    def settled(self) -> bool:
        """The payload runs, or sudo waits for a password that it will not get."""
        return self.entered or (self._abandoned and self._prompt in self._held)

    def stdin(self, payload: Iterable[bytes]) -> Iterator[bytes]:
        """What to write: the password when it is asked for, and the payload's stdin once we are in.

        :raises Interrupted: we are not in and nobody waits for it any more. A payload that is let in after all must
            not take an end of its stdin for an empty one.
        """
        while True:
            answer = self._answers.get()
            if answer is None:
                break
            yield answer.reveal().encode() + b"\n"
        if not self.entered:
            raise Interrupted("given up before sudo let us in")
        yield from payload

    def stderr(self, chunk: bytes) -> bytes:
        """Take a piece of stderr; returns what of it is the payload's (or sudo's own warnings).

        :raises LoginRefused: sudo asks a second time, so the password is wrong.
        """
        if self.entered:
            return chunk
        self._held += chunk
        while self._prompt in self._held and not self._abandoned:
            self._asked += 1
            if self._asked > 1 or self._password is None:
                raise LoginRefused(
                    "sudo did not take the password",
                    hint="one try was made; check sudo_password of this host in the inventory",
                )
            self._answers.put(self._password())
            self._held = self._held.replace(self._prompt, b"", 1)
        rest = super().stderr(b"")
        if self.entered:
            self._answers.put(None)
        return rest

    def abandon(self) -> None:
        """Nobody waits for it any more: sudo gets no password, and :meth:`stdin` ends."""
        self._abandoned = True
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
