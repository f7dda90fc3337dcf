"""Files for the ``ssh`` that nix runs: one trust policy for both, Fabric's and OpenSSH's, from one inventory.

A host is named to ssh by its name in the inventory, whatever its address and port; all else stands in a config
that only ours is read of (``ssh -F``). Values reach that config as checked types, so none can become an option.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from nixops.errors import HostKeyUnknown, LoginRefused
from nixops.transport.scratch import Scratch
from nixops.transport.target import SshTarget

_COMMON = """\
    GlobalKnownHostsFile /dev/null
    StrictHostKeyChecking yes
    UpdateHostKeys no
    VerifyHostKeyDNS no
    CheckHostIP no
    BatchMode yes
    PreferredAuthentications publickey
    ConnectionAttempts 1
    ControlMaster no
    ControlPath none
    ForwardAgent no
    ForwardX11 no
    PermitLocalCommand no
    LogLevel ERROR
"""


class OpenSshFiles:
    """A private directory with an ssh config and a known_hosts for some targets; gone when the block ends.

    It also goes when the interpreter ends by an interrupt. Nothing in it is secret: identities are symbolic links.

    :param targets: the hosts that ``ssh`` shall be able to reach; every other is refused.
    :raises HostKeyUnknown: a target has no pinned key (here, before anything connects).
    """

    def __init__(self, targets: Sequence[SshTarget]) -> None:
        for target in targets:
            if not target.pinned():
                raise HostKeyUnknown(
                    f"no host key is pinned for {target.name}",
                    hint=f"look at what it offers and pin it: invoke trust {target.name}",
                )
        self._targets = {target.name: target for target in targets}
        self._scratch: Scratch | None = None

    def __enter__(self) -> Self:
        self._scratch = Scratch("nixops-ssh-", runtime=True)
        directory = self._scratch.path
        known = "".join(f"{t.name} {key}\n" for t in self._targets.values() for key in t.pinned())
        self.known_hosts.write_text(known)
        blocks = [_block(target, directory) for target in self._targets.values()]
        # The first value wins in ssh_config, so what follows is for hosts that are not ours: they have no key.
        blocks.append(f"Host *\n    UserKnownHostsFile {self.known_hosts}\n{_COMMON}")
        self.config.write_text("\n".join(blocks))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._scratch is not None:
            self._scratch.remove()
        self._scratch = None

    @property
    def directory(self) -> Path:
        """The private directory, mode 0700, with no white space in its path."""
        if self._scratch is None:
            raise RuntimeError("OpenSshFiles has its files only inside its with block")
        return self._scratch.path

    @property
    def config(self) -> Path:
        """For ``ssh -F``."""
        return self.directory / "config"

    @property
    def known_hosts(self) -> Path:
        """The pinned keys under the hosts' names in the inventory."""
        return self.directory / "known_hosts"

    def nix_env(self) -> dict[str, str]:
        """Environment for a ``nix`` that shall use these files. Nix splits the value at white space."""
        return {"NIX_SSHOPTS": f"-F {self.config}"}


def _block(target: SshTarget, directory: Path) -> str:
    lines = [
        f"Host {target.name}",
        # A per cent sign (of an IPv6 scope) would be taken for a token.
        f"    HostName {target.address.replace('%', '%%')}",
        f"    Port {target.port}",
        f"    User {target.user}",
        f"    HostKeyAlias {target.name}",
        f"    UserKnownHostsFile {directory / 'known_hosts'}",
        f"    ConnectTimeout {math.ceil(target.connect_timeout)}",
        f"    ServerAliveInterval {max(1, round(target.keepalive))}",
        "    ServerAliveCountMax 3",
    ]
    if target.identity_file is not None:
        # A link of our own needs no quoting, whatever the path is.
        link = _link(target.identity_file, directory / f"identity-{target.name}")
        lines += [f"    IdentityFile {link}", "    IdentitiesOnly yes"]
    return "\n".join(lines) + "\n" + _COMMON


def _link(identity: Path, link: Path) -> Path:
    if not identity.is_file():
        raise LoginRefused(f"the identity file {identity} is not there", hint="see ssh.identity_file in the inventory")
    # With an encrypted key, ssh finds the agent's by the public half beside it; with a certificate, that too.
    for suffix in ("", ".pub", "-cert.pub"):
        beside = identity.with_name(identity.name + suffix)
        if beside.is_file():
            link.with_name(link.name + suffix).symlink_to(beside.absolute())
    return link
