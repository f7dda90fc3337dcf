"""Where and how to connect: a value made from the inventory and nothing else. Loads nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nixops.errors import InventoryError
from nixops.inventory import model
from nixops.transport.hostkey import HostKey
from nixops.values import Address, HostName


@dataclass(frozen=True)
class SshTarget:
    """One host, as the inventory describes it.

    :ivar host_keys: the pinned keys, each ``type base64`` as in a known_hosts file.
    :ivar identity_file: the private key to log in with; ``None`` means the agent's and the operator's default keys.
    :ivar connect_timeout: seconds until the TCP connection stands, name resolution included.
    :ivar login_timeout: seconds from there until we are logged in.
    :ivar command_timeout: seconds for a command that brings no bound of its own.
    :ivar keepalive: seconds of silence after which the host is asked for a sign of life; three of them unanswered
        end the connection.
    """

    name: HostName
    address: Address
    port: int = 22
    user: str = "root"
    host_keys: tuple[str, ...] = ()
    identity_file: Path | None = None
    connect_timeout: float = 10.0
    login_timeout: float = 20.0
    command_timeout: float = 120.0
    keepalive: float = 15.0

    @classmethod
    def from_inventory(cls, name: HostName, host: model.Host, base: Path) -> SshTarget:
        """The target of an inventory's host.

        :param base: directory of the inventory file; a relative ``ssh.identity_file`` starts there, ``~`` is the
            operator's home.
        :raises InventoryError: a pinned key is not one.
        """
        target = cls(
            name=name,
            address=host.address,
            port=host.port,
            user=host.user,
            host_keys=tuple(" ".join(key.split()[:2]) for key in host.host_key),
            identity_file=base / Path(host.ssh.identity_file).expanduser() if host.ssh.identity_file else None,
            connect_timeout=host.ssh.connect_timeout,
            login_timeout=host.ssh.login_timeout,
            command_timeout=host.ssh.command_timeout,
            keepalive=host.ssh.keepalive,
        )
        target.pinned()
        return target

    def pinned(self) -> tuple[HostKey, ...]:
        """The pinned keys, parsed.

        :raises InventoryError: one is not a key.
        """
        try:
            return tuple(HostKey.parse(key) for key in self.host_keys)
        except ValueError as error:
            raise InventoryError(
                f"hosts.{self.name}.host_key: {error}",
                hint="take it from /etc/ssh/ssh_host_ed25519_key.pub on the host",
            ) from None

    def __str__(self) -> str:
        """``nix-cache02 (root@192.0.2.2)``, with the port where it is not 22: how errors name it."""
        port = "" if self.port == 22 else f" port {self.port}"
        return f"{self.name} ({self.user}@{self.address}{port})"
