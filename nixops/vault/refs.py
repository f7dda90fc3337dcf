"""From a reference of the inventory to the secret it names."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from nixops.errors import CommandFailed, CommandTimeout, HostFault, SecretUnavailable
from nixops.inventory.model import Inventory, Model, OpenBaoRef, SecretRef
from nixops.secret import Redactor, Secret
from nixops.transport.command import Command, Runner
from nixops.values import VaultPath
from nixops.vault.files import expanded, read_private_file, text_of
from nixops.vault.settings import LOGIN_VARIABLES

if TYPE_CHECKING:  # hvac is only loaded by those who use OpenBao
    from nixops.vault.openbao import OpenBao

# Long enough for a person to touch a key or type a passphrase into a pinentry.
COMMAND_SECONDS = 60.0


def resolve_ref(
    ref: SecretRef,
    *,
    environ: Mapping[str, str],
    base: Path,
    local: Runner,
    redactor: Redactor,
    openbao: Callable[[], OpenBao] | None,
) -> Secret:
    """The secret that ``ref`` names; ``redactor`` knows it before it is returned.

    :param base: directory of the inventory file: relative files start there, and commands run in it.
    :param local: runs a ``command`` reference, without a shell.
    :param openbao: opens OpenBao when it is needed; None where it cannot be, as for OpenBao's own login.
    :raises SecretUnavailable: it cannot be read; the text never quotes it.
    """
    if ref.env:
        value = environ.get(ref.env)
        if not value:
            state = "is not set" if value is None else "is empty"
            raise SecretUnavailable(f"{ref.describe()} {state}", hint=f"export {ref.env}, or name another reference")
        secret = Secret(value)
    elif ref.file:
        secret = Secret(read_private_file(expanded(base, ref.file)))
    elif ref.openbao:
        secret = _from_openbao(ref.openbao, openbao)
    elif ref.aws:
        # boto3 is only loaded by those who use it.
        from nixops.vault.aws import read_aws_secret

        secret = read_aws_secret(ref.aws)
    else:
        secret = _from_command(ref.command or (), base, local)
    return redactor.add(secret)


def secret_variables(inventory: Inventory) -> frozenset[str]:
    """The environment variables that hold secrets: those that references name, and those that open OpenBao.

    A program that we start inherits the environment, and anybody with its uid can read it there for as long as it
    runs: so these are left out.
    """
    return frozenset({*LOGIN_VARIABLES, *_named(inventory)})


def _named(value: object) -> Iterator[str]:
    if isinstance(value, SecretRef):
        if value.env:
            yield value.env
    elif isinstance(value, Model):
        for _, part in value:
            yield from _named(part)
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _named(part)


def _from_openbao(ref: OpenBaoRef, openbao: Callable[[], OpenBao] | None) -> Secret:
    if openbao is None:
        raise SecretUnavailable(
            f"the OpenBao entry {ref.path} cannot be read to log in to OpenBao itself",
            hint="take the login from env, file, aws or command",
        )
    entry = openbao().read(VaultPath(ref.path))
    if entry is None:
        raise SecretUnavailable(
            f"there is no OpenBao entry {ref.path}, or it is deleted", hint="write it, or correct the reference"
        )
    if not entry.data.get(ref.key):
        found = ", ".join(sorted(entry.data)) or "none"
        raise SecretUnavailable(
            f"the OpenBao entry {ref.path} has no value under the key {ref.key}", hint=f"its keys are: {found}"
        )
    return entry.data[ref.key]


def _from_command(argv: tuple[str, ...], base: Path, local: Runner) -> Secret:
    what = f"the secret command {argv[0]}"
    line = shlex.join(argv)
    # Neither output is shown: what a password manager prints, to whichever, may be or hold the secret.
    problem: str
    try:
        result = local.run(Command(argv, cwd=base, timeout=COMMAND_SECONDS, title=what))
    except CommandTimeout:
        problem = f"{what} did not end within {COMMAND_SECONDS:g} s"
    except (HostFault, CommandFailed):
        problem = f"{what} could not be started"
    else:
        if result.ok:
            return Secret(text_of(result.stdout, what))
        problem = f"{what} failed with exit code {result.code}"
    raise SecretUnavailable(problem, hint=f"run it yourself to see why, in {base}: {line}")
