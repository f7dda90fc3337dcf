"""Store URIs as values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from nixops.transport.target import SshTarget


@dataclass(frozen=True)
class StoreUri:
    """Which store nix works on.

    :ivar text: what ``--store``, ``--to`` and ``--from`` take.
    :ivar host: the host's name in the inventory for a store over SSH, else ``localhost``.
    """

    text: str
    host: str = "localhost"

    @classmethod
    def ssh_ng(cls, target: SshTarget) -> Self:
        """The store of a host. It is named as in the inventory: where that is, and which key it must have, stands
        in the ssh config of :class:`nixops.transport.openssh.OpenSshFiles`, without which nix must not run.
        """
        return cls(f"ssh-ng://{target.user}@{target.name}", str(target.name))

    @classmethod
    def daemon(cls) -> Self:
        """This machine's store through its daemon."""
        return cls("daemon")

    @property
    def needs_ssh(self) -> bool:
        return self.text.startswith("ssh")

    def __str__(self) -> str:
        return self.text
