"""Logging in: which keys are tried, in which order, and an error that lists them."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import paramiko
from paramiko.ssh_exception import BadAuthenticationType

from nixops.errors import LoginRefused
from nixops.transport.hostkey import HostKey
from nixops.transport.target import SshTarget

# What ``ssh`` itself looks for, in its order.
DEFAULT_IDENTITIES = ("id_ed25519", "id_ecdsa", "id_rsa")


@dataclass(frozen=True)
class _Key:
    key: paramiko.PKey
    source: str


@dataclass
class Login:
    """Public-key login with the target's identity, or else the agent's keys and the operator's default ones.

    Given to paramiko as its authentication strategy: one object, one login.

    :param home: where the default keys are; the operator's home directory.
    """

    target: SshTarget
    home: Path = field(default_factory=Path.home)
    tried: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def authenticate(self, transport: paramiko.Transport) -> None:
        """Try each key in turn until one lets us in.

        :raises LoginRefused: none did; names every key that was tried.
        """
        agent = paramiko.Agent()
        try:
            for candidate in self._candidates(agent):
                self.tried.append(f"{candidate.source} {_fingerprint(candidate.key)}")
                try:
                    further = transport.auth_publickey(self.target.user, candidate.key)
                except BadAuthenticationType as error:
                    raise self.refused(f"it takes only {', '.join(error.allowed_types)}, no public keys") from None
                except paramiko.AuthenticationException:
                    if not transport.is_active():
                        raise self.refused("it closed the connection after so many keys (MaxAuthTries)") from None
                    continue
                if further:
                    raise self.refused(f"after the key it also wants {', '.join(further)}")
                return
        finally:
            agent.close()
        raise self.refused("it accepts none of the keys" if self.tried else "there is no key to try")

    def refused(self, reason: str) -> LoginRefused:
        """The error of a login that failed for ``reason``."""
        tried = f"; tried by public key: {', '.join(self.tried)}" if self.tried else ""
        notes = f"; {'; '.join(self.notes)}" if self.notes else ""
        if self.notes:
            hint = "unlock the key for the agent: ssh-add FILE"
        elif self.target.identity_file:
            hint = f"is its public half in the authorized keys of {self.target.user} on the host?"
        else:
            hint = f"name the key in the inventory: hosts.{self.target.name}.ssh.identity_file, or ssh-add it"
        return LoginRefused(f"{self.target} refused the login: {reason}{tried}{notes}", hint=hint)

    def _candidates(self, agent: paramiko.Agent) -> Iterator[_Key]:
        if self.target.identity_file is not None:
            yield from self._identity(self.target.identity_file, agent)
            return
        for key in agent.get_keys():
            yield _Key(key, "agent key")
        for name in DEFAULT_IDENTITIES:
            path = self.home / ".ssh" / name
            if path.is_file():
                yield from self._load(path)

    def _identity(self, path: Path, agent: paramiko.Agent) -> Iterator[_Key]:
        """The named identity; when it is encrypted, the same key out of the agent."""
        try:
            mode = path.stat().st_mode
        except OSError as error:
            raise LoginRefused(
                f"the identity file {path} of {self.target.name} cannot be read: {error.strerror}",
                hint=f"check hosts.{self.target.name}.ssh.identity_file in the inventory",
            ) from None
        if stat.S_IMODE(mode) & 0o077:
            # ssh, which carries nix, refuses such a key too: better here, with the reason.
            raise LoginRefused(f"others may read the identity file {path}", hint=f"chmod 600 {path}")
        loaded = list(self._load(path))
        if loaded:
            yield from loaded
            return
        public = _public_half(path)
        for key in agent.get_keys():
            if public is None or key.asbytes() == public.blob:
                self.notes.clear()
                yield _Key(key, "agent key")

    def _load(self, path: Path) -> Iterator[_Key]:
        try:
            yield _Key(paramiko.PKey.from_path(path), str(path))
        except (paramiko.PasswordRequiredException, TypeError):
            # cryptography says "Password was not given but private key is encrypted" with a TypeError.
            self.notes.append(f"{path} is encrypted and the agent does not have it unlocked")
        except (paramiko.SSHException, ValueError, OSError) as error:
            self.notes.append(f"{path} is no usable private key ({str(error).splitlines()[0]})")


def _public_half(path: Path) -> HostKey | None:
    try:
        return HostKey.parse(path.with_name(path.name + ".pub").read_text())
    except (OSError, ValueError):
        return None


def _fingerprint(key: paramiko.PKey) -> str:
    return HostKey(key.get_name(), key.asbytes()).fingerprint
