"""Files for the ``ssh`` that nix runs: one trust policy for both, Fabric's and OpenSSH's, from one inventory.

A host is named to ssh by its name in the inventory, whatever its address and port; all else stands in a config
that only ours is read of (``ssh -F``). Values reach that config as checked types, so none can become an option.
"""

from __future__ import annotations

import math
import os
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from nixops.errors import HostFault, HostKeyUnknown, LoginRefused
from nixops.transport.guard import Guard
from nixops.transport.scratch import Scratch
from nixops.transport.target import SshTarget
from nixops.values import HostName

# Of the private directory's name; what a run left with it, whose guard was killed too, is removed by the next.
PREFIX = "nixops-ssh-"

# A socket's path has at most 103 bytes on some systems; the master's own name for it has 5 more at its end, and ssh
# first makes it with another 17.
_LONGEST_SOCKET = 81

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
    ControlPersist no
    ForwardAgent no
    ForwardX11 no
    PermitLocalCommand no
    LogLevel ERROR
"""


# What nix finds as ``ssh``. From 2.15 on it has ssh say "started" by a LocalCommand, which no ssh runs over a shared
# connection; its versions differ in how they find out that there is one, and hang or misread where they are wrong. So
# it is told that there is none, and gets its word. A connection that it shares by itself is left alone.
_NIX_SSH = """\
#!/bin/sh
asks= waits=
for argument; do
  case $argument in
    -M | -S | -oControlPath=*) exec {ssh} "$@" ;;
    -O) asks=yes ;;
    -oLocalCommand=*started*) waits=yes ;;
  esac
done
[ -z "$asks" ] || exit 255
[ -z "$waits" ] || echo started
exec {ssh} -oPermitLocalCommand=no "$@"
"""


class OpenSshFiles:
    """A private directory with an ssh config and a known_hosts for some targets; gone when the block ends.

    It also goes when the interpreter ends by an interrupt. Nothing in it is secret: identities are symbolic links.

    :param targets: the hosts that ``ssh`` shall be able to reach; every other is refused.
    :param shared: let ``ssh`` use a connection that is open already, where :meth:`control` names its socket.
    :param agent: the socket of the one ssh-agent that has the key; no other agent's and no file's key is tried then.
    :param parent: where the directory is made; by default the operator's runtime directory.
    :raises HostKeyUnknown: a target has no pinned key (here, before anything connects).
    """

    def __init__(
        self,
        targets: Sequence[SshTarget],
        *,
        shared: bool = False,
        agent: Path | None = None,
        parent: Path | None = None,
    ) -> None:
        for target in targets:
            require_pinned(target)
        self._targets = {target.name: target for target in targets}
        self._numbers = {name: number for number, name in enumerate(self._targets)}
        self._shared = shared
        self._agent = agent
        self._parent = parent
        self._scratch: Scratch | None = None

    def __enter__(self) -> Self:
        self._scratch = Scratch(PREFIX, runtime=True, parent=self._parent)
        longest = max((len(str(self.control(name))) for name in self._targets), default=0)
        if self._shared and longest > _LONGEST_SOCKET:
            raise HostFault(
                f"{self.directory} is too long a path for ssh's sockets", hint="set XDG_RUNTIME_DIR to a shorter one"
            )
        known = "".join(f"{self._alias(t.name)} {key}\n" for t in self._targets.values() for key in t.pinned())
        self.known_hosts.write_text(known)
        for target in self._targets.values():
            if self._agent is None:
                require_identity(target)
        blocks = [self._block(target) for target in self._targets.values()]
        # The first value wins in ssh_config, so what follows is for hosts that are not ours: they have no key.
        blocks.append(f"Host *\n    UserKnownHostsFile {self.known_hosts}\n{_COMMON}")
        self.config.write_text("\n".join(blocks))
        self._program()
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
    def guard(self) -> Guard:
        """Kills the process groups that are added to it when the directory goes."""
        if self._scratch is None:
            raise RuntimeError("OpenSshFiles has its guard only inside its with block")
        return self._scratch.guard

    @property
    def config(self) -> Path:
        """For ``ssh -F``."""
        return self.directory / "config"

    @property
    def known_hosts(self) -> Path:
        """The pinned keys under the hosts' names in the inventory, numbered where those differ in case alone."""
        return self.directory / "known_hosts"

    def control(self, name: HostName) -> Path:
        """Where the socket of a host's shared connection is found: a link to the present one."""
        return self.directory / f"m{self._numbers[name]}"

    def nix_env(self) -> dict[str, str]:
        """Environment for a ``nix`` that shall use these files. Nix splits the value at white space."""
        options = {"NIX_SSHOPTS": f"-F {self.config}"}
        if not self._shared:
            return options
        if not self._program_there:
            return {"NIX_SSHOPTS": f"{options['NIX_SSHOPTS']} -oControlPath=none"}
        return {**options, "PATH": f"{self.directory / 'bin'}:{os.environ.get('PATH', os.defpath)}"}

    @property
    def _program_there(self) -> bool:
        return os.access(self.directory / "bin/ssh", os.X_OK)

    def _program(self) -> None:
        ssh = shutil.which("ssh")
        # On a file system where nothing can be run, nix makes connections of its own.
        if not self._shared or ssh is None or os.statvfs(self.directory).f_flag & os.ST_NOEXEC:
            return
        program = self.directory / "bin/ssh"
        program.parent.mkdir(mode=0o700)
        program.write_text(_NIX_SSH.format(ssh=shlex.quote(ssh)))
        program.chmod(0o700)

    def _alias(self, name: HostName) -> str:
        """The name that a host's keys are known by. ssh takes no notice of case there: of two hosts whose names differ
        in nothing else, each would be let pass with the other's key.
        """
        twins = [other for other in self._targets if other.lower() == name.lower()]
        return str(name) if len(twins) == 1 else f"{name}.{self._numbers[name]}"

    def _block(self, target: SshTarget) -> str:
        lines = [
            f"Host {target.name}",
            # A per cent sign (of an IPv6 scope) would be taken for a token.
            f"    HostName {target.address.replace('%', '%%')}",
            f"    Port {target.port}",
            f"    User {target.user}",
            f"    HostKeyAlias {self._alias(target.name)}",
            f"    UserKnownHostsFile {self.known_hosts}",
            f"    ConnectTimeout {math.ceil(target.connect_timeout)}",
            f"    ServerAliveInterval {max(1, round(target.keepalive))}",
            "    ServerAliveCountMax 3",
        ]
        if self._shared:
            lines.append(f"    ControlPath {self.control(target.name)}")
        if self._agent is not None:
            lines += [f"    IdentityAgent {self._agent}", "    IdentityFile none"]
        elif target.identity_file is not None:
            # A link of our own needs no quoting, whatever the path is.
            link = _link(target.identity_file, self.directory / f"identity-{target.name}")
            lines += [f"    IdentityFile {link}", "    IdentitiesOnly yes"]
        return "\n".join(lines) + "\n" + _COMMON


def require_pinned(target: SshTarget) -> None:
    """Nothing connects to a host whose key nobody has pinned.

    :raises HostKeyUnknown: that is one.
    """
    if not target.pinned():
        raise HostKeyUnknown(
            f"no host key is pinned for {target.name}",
            hint=f"look at what it offers and pin it: invoke trust {target.name}",
        )


def require_identity(target: SshTarget) -> None:
    """
    :raises LoginRefused: the target names an identity file that is not there.
    """
    if target.identity_file is not None and not target.identity_file.is_file():
        raise LoginRefused(
            f"the identity file {target.identity_file} is not there", hint="see ssh.identity_file in the inventory"
        )


def _link(identity: Path, link: Path) -> Path:
    # With an encrypted key, ssh finds the agent's by the public half beside it; with a certificate, that too.
    for suffix in ("", ".pub", "-cert.pub"):
        beside = identity.with_name(identity.name + suffix)
        if beside.is_file():
            link.with_name(link.name + suffix).symlink_to(beside.absolute())
    return link
