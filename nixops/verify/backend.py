"""testinfra over a connection that is already open: a backend on our :class:`~nixops.transport.command.Runner`.

testinfra's own ssh backends start a process for each command, give passwords to ``sshpass`` on a command line and
turn a remote exit code of 255 into an exception. Here a command is one more channel on the open connection, root
comes from the runner (``Command.root``), and every exit code is a result.
"""

from __future__ import annotations

from typing import Any, cast

from testinfra.backend.base import BaseBackend, CommandResult

from nixops.transport.command import Command, Runner
from nixops.verify.model import Remote
from nixops.verify.tools import PREAMBLE


class RunnerBackend(BaseBackend):
    """Runs testinfra's commands through a runner.

    :param transport: the open connection.
    :param root: run as root (through sudo where the login is not root).
    :param timeout: seconds for each command.
    """

    NAME = "nixops"

    def __init__(self, transport: Runner, *, root: bool = True, timeout: float = 30.0) -> None:
        super().__init__(transport.host)
        self._transport = transport
        self._root = root
        self._timeout = timeout

    def run(self, command: str, *args: str, **kwargs: object) -> CommandResult:
        """Run one shell line; ``args`` fill its ``%s``, each quoted once. Raises what the runner raises.

        :param kwargs: options of other backends (``encoding``), which mean nothing here.
        """
        del kwargs
        line = self.get_command(command, *args)
        result = self._transport.run(
            Command.of(
                "sh", "-c", PREAMBLE + line, root=self._root, timeout=self._timeout, title="a command of a check"
            )
        )
        return self.result(result.code, line.encode(errors="replace"), result.stdout, result.stderr)

    def get_sudo_command(self, command: str, sudo_user: str | None) -> str:
        """``host.sudo()`` of testinfra: root already is what commands run as, another user is switched to."""
        if sudo_user is None and self._root:
            return command
        return super().get_sudo_command(command, sudo_user)

    def get_encoding(self) -> str:
        """UTF-8. testinfra would ask a Python on the host, which a NixOS host need not have."""
        return "utf-8"

    def decode(self, data: bytes) -> str:
        """Text of what a host printed; bytes that are not UTF-8 become U+FFFD, never an exception."""
        return data.decode(errors="replace")


def connect(transport: Runner, *, root: bool = True, timeout: float = 30.0) -> Remote:
    """testinfra's ``host`` object; its File, Service, Process and other modules work over ``transport``."""
    from testinfra.host import Host

    backend = RunnerBackend(transport, root=root, timeout=timeout)
    host = Host(backend)
    backend.set_host(host)
    modules = cast(Any, host)  # they are found by name at run time, which no type can say
    # testinfra would ask with three commands before it looks at a first file. Our hosts are all NixOS.
    known = {"type": "linux", "distribution": "nixos"}
    modules.system_info.sysinfo = {**known, "codename": None, "release": None, "arch": None}
    return cast(Remote, modules)
