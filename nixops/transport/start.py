"""How a command starts on a host so that it can be stopped there: it says first under which process group it runs."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import replace

from nixops.transport.command import Command, Result

# Says under which process group the payload runs, so that another channel can stop it (sshd itself may signal only the
# login's own processes, and nothing that left their group), and becomes the payload; does not where nobody hears it
# any more. Only builtins: there may be no PATH.
_ENTER = (
    "entered=$1 group=$$; shift; [ ! -r /proc/$$/stat ] || read -r a b c d group rest </proc/$$/stat; "
    'echo "$entered $group" >&2 && exec "$@"'
)


class Start:
    """The beginning of one command, on its stderr.

    :param command: what to run.
    :param before: what leads to it, as ``sudo --``.
    """

    def __init__(self, command: Command, before: tuple[str, ...] = ()) -> None:
        entered = f"nixops-entered-{secrets.token_hex(8)}"
        inner = ("env", *(f"{k}={v}" for k, v in command.env.items()), *command.argv) if command.env else command.argv
        argv = (*before, "sh", "-c", _ENTER, "sh", entered, *inner)
        self._command = command
        self._marker = re.compile(rb"%s (\d+)\n" % entered.encode())
        self._held = b""
        self.shell_line = replace(command, argv=argv, env={}).shell_line()
        self.group: int | None = None

    @property
    def entered(self) -> bool:
        """The payload runs."""
        return self.group is not None

    @property
    def settled(self) -> bool:
        """It will not become more certain by waiting whether the payload runs."""
        return self.entered

    def stdin(self, payload: Iterable[bytes]) -> Iterator[bytes]:
        """What to write."""
        yield from payload

    def stderr(self, chunk: bytes) -> bytes:
        """Take a piece of stderr; returns what of it is the payload's (or was said before it, by a login's shell)."""
        if self.entered:
            return chunk
        self._held += chunk
        found = self._marker.search(self._held)
        if not found:
            return b""
        self.group = int(found[1])
        rest = self._held[: found.start()] + self._held[found.end() :]
        self._held = b""
        return rest

    def abandon(self) -> None:
        """Nobody waits for it any more."""

    def ended(self, result: Result) -> Result:
        """What came of it, of the ``result`` of the whole."""
        return result if self.entered else replace(result, stderr=self._held)
