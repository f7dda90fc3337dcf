"""Where a secret is kept, as one interface: for whoever calls the library with no inventory, and for the builders' key.

Every store is asked by a name that is its own: AWS's name or ARN, ``path#key`` of OpenBao, a file's path, a variable,
a program's argument. What cannot be read is a :class:`SecretUnavailable` that never quotes a value.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

from pydantic import ValidationError

from nixops.errors import CommandTimeout, HostFault, SecretUnavailable, UsageError
from nixops.inventory.fields import OpenBaoRef, SecretRef
from nixops.secret import Redactor, Secret
from nixops.transport.command import Command, Runner
from nixops.vault.refs import resolve_ref

if TYPE_CHECKING:  # hvac is only loaded by those who use OpenBao
    from nixops.vault.openbao import OpenBao

_AGENT_SECONDS = 10.0


class SecretStore(Protocol):
    """Something that keeps secrets by name."""

    def get(self, name: str) -> Secret:
        """The secret of that name; the redactor knows it from here on.

        :raises SecretUnavailable: it is not there, or cannot be read.
        """
        ...


def _ref(**given: object) -> SecretRef:
    """A reference by the inventory's own grammar.

    :raises UsageError: the name is not of the store's kind.
    """
    try:
        return SecretRef.model_validate(given)
    except (ValidationError, ValueError):
        (kind,) = given
        raise UsageError(f"{given[kind]!r} is no name of a secret that `{kind}` keeps") from None


@dataclass(frozen=True)
class AwsSecretStore:
    """AWS Secrets Manager; credentials and region by boto3's own chain. ``get("nix-runner-ssh-key")``."""

    redactor: Redactor

    def get(self, name: str) -> Secret:
        from nixops.vault.aws import read_aws_secret

        return self.redactor.add(read_aws_secret(str(_ref(aws=name).aws)))


@dataclass(frozen=True)
class OpenBaoSecretStore:
    """KV v2 of OpenBao. ``get("hosts/builders/ssh#key")``: the entry's path, and the key in it.

    :ivar openbao: opens it; called when a secret is asked for.
    """

    openbao: Callable[[], OpenBao]
    redactor: Redactor
    local: Runner

    def get(self, name: str) -> Secret:
        path, mark, key = name.rpartition("#")
        if not mark:
            raise UsageError(f"{name!r} names no key of an OpenBao entry", hint="write path#key")
        try:
            ref = OpenBaoRef.model_validate({"path": path, "key": key})
        except (ValidationError, ValueError):
            raise UsageError(f"{name!r} is no path and key of an OpenBao entry", hint="write path#key") from None
        return _resolved(SecretRef(openbao=ref), self.redactor, self.local, openbao=self.openbao)


@dataclass(frozen=True)
class FileSecretStore:
    """Files that only the operator can read (0600 or stricter). ``get("~/.ssh/nix-runner")``.

    :ivar base: what a relative name starts from.
    """

    base: Path
    redactor: Redactor
    local: Runner

    def get(self, name: str) -> Secret:
        return _resolved(_ref(file=name), self.redactor, self.local, base=self.base)


@dataclass(frozen=True)
class EnvSecretStore:
    """Variables of the environment. ``get("NIX_RUNNER_SSH_KEY")``."""

    environ: Mapping[str, str]
    redactor: Redactor
    local: Runner

    def get(self, name: str) -> Secret:
        return _resolved(_ref(env=name), self.redactor, self.local, environ=self.environ)


@dataclass(frozen=True)
class CommandSecretStore:
    """A program that prints a secret, such as a password manager: ``get("infra/nix-runner")`` runs it with the name as
    its last argument, without a shell.

    :ivar argv: the program and what stands before the name: ``("pass", "show")``.
    """

    argv: Sequence[str]
    base: Path
    redactor: Redactor
    local: Runner

    def get(self, name: str) -> Secret:
        if not name or name.startswith("-"):
            raise UsageError(f"{name!r} would be taken for an option of {self.argv[0]}")
        return _resolved(_ref(command=(*self.argv, name)), self.redactor, self.local, base=self.base)


def _resolved(
    ref: SecretRef,
    redactor: Redactor,
    local: Runner,
    *,
    environ: Mapping[str, str] | None = None,
    base: Path | None = None,
    openbao: Callable[[], OpenBao] | None = None,
) -> Secret:
    return resolve_ref(ref, environ=environ or {}, base=base or Path(), local=local, redactor=redactor, openbao=openbao)


# -- the builders' key ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AgentKey:
    """The keys of the operator's own ssh-agent: there is no secret to hold at all.

    :ivar socket: the agent's.
    """

    socket: Path

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> AgentKey:
        """The agent that ``SSH_AUTH_SOCK`` names.

        :raises SecretUnavailable: there is none.
        """
        value = environ.get("SSH_AUTH_SOCK", "")
        if not value:
            raise SecretUnavailable(
                "no ssh-agent is running (SSH_AUTH_SOCK is not set)", hint='eval "$(ssh-agent)"; ssh-add'
            )
        if not Path(value).is_socket():
            raise SecretUnavailable(f"the ssh-agent's socket {value} is not there", hint="start it again, and ssh-add")
        return cls(Path(value))

    def fingerprints(self, local: Runner) -> tuple[str, ...]:
        """``SHA256:…`` of each key that the agent offers.

        :raises SecretUnavailable: it does not answer, or holds no key.
        """
        command = Command.of("ssh-add", "-l", env={"SSH_AUTH_SOCK": str(self.socket)}, timeout=_AGENT_SECONDS)
        try:
            result = local.run(command)
        except (CommandTimeout, HostFault) as error:
            raise SecretUnavailable(f"the ssh-agent cannot be asked: {error.message}") from None
        if result.code == 1:
            raise SecretUnavailable("the ssh-agent holds no key", hint="ssh-add, with the key of the builders")
        if not result.ok:
            raise SecretUnavailable("the ssh-agent does not answer", hint="start it again, and ssh-add")
        return tuple(re.findall(r"^\d+ (SHA256:\S+)", result.out, re.MULTILINE))


def builders_key(
    reference: SecretRef | None,
    resolve: Callable[[SecretRef], Secret],
    environ: Mapping[str, str] = MappingProxyType({}),
) -> Secret | None:
    """The private key that the builders' logins use: ``build.ssh_key`` of the inventory; None for the agent's keys and
    those that each host names.

    :param resolve: gives the value of a reference.
    :param environ: only for the hint, whether an agent is there.
    :raises SecretUnavailable: it cannot be read, or is no private key, or is one that asks for a passphrase.
    """
    if reference is None:
        return None
    key = resolve(reference)
    lines = key.reveal().strip().splitlines() or [""]
    if not re.fullmatch(r"-----BEGIN ([A-Z0-9]+ )*PRIVATE KEY-----", lines[0].strip()):
        raise SecretUnavailable(
            f"build.ssh_key: {reference.describe()} holds no private key",
            hint="it begins with -----BEGIN OPENSSH PRIVATE KEY-----",
        )
    if _encrypted(lines):
        agent = bool(environ.get("SSH_AUTH_SOCK"))
        raise SecretUnavailable(
            f"build.ssh_key: {reference.describe()} asks for a passphrase",
            hint="leave build.ssh_key out: your ssh-agent has it" if agent else "store it without, or use an ssh-agent",
        )
    # OpenSSH reads no key whose last line has no end.
    return Secret("\n".join(line.strip() for line in lines) + "\n")


def _encrypted(lines: Sequence[str]) -> bool:
    """Whether a private key is: by its PEM header, or in OpenSSH's own format by the name of its cipher."""
    if any("ENCRYPTED" in line for line in lines):
        return True
    try:
        blob = base64.b64decode("".join(line.strip() for line in lines[1:-1]), validate=True)
    except binascii.Error:
        return False
    magic = b"openssh-key-v1\0"
    return blob.startswith(magic) and not blob.startswith(b"\0\0\0\4none", len(magic))
