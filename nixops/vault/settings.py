"""How OpenBao is reached and logged in to: from the inventory, ``BAO_*``, ``VAULT_*`` and ``~/.vault-token``."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from nixops.errors import SecretUnavailable, UsageError
from nixops.inventory import model
from nixops.secret import Secret
from nixops.vault.files import expanded, read_private_file

_ADDRESS = re.compile(r"https?://[A-Za-z0-9.\[\]:_-]+(/[A-Za-z0-9._~/-]*)?")
_NAMESPACE = re.compile(r"[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)*/?")
# What can stand in an HTTP header and in a curl configuration without quoting.
_CREDENTIAL = re.compile(r"[A-Za-z0-9._~+/=-]+")
_FAMILIES = ("BAO_", "VAULT_")
# Variables that let in whoever reads them; no program that we start needs them.
LOGIN_VARIABLES = tuple(f"{family}{name}" for family in _FAMILIES for name in ("TOKEN", "ROLE_ID", "SECRET_ID"))


def _credential(secret: Secret, what: str) -> Secret:
    """``secret`` without white space around it, checked to be usable in a header."""
    value = secret.reveal().strip()
    if not _CREDENTIAL.fullmatch(value):
        state = "empty" if not value else "not a credential of OpenBao (it holds white space or special characters)"
        raise UsageError(f"the OpenBao {what} is {state}", hint="set it again, without quotes or line breaks")
    return Secret(value)


@dataclass(frozen=True)
class TokenLogin:
    """A token that is already there. White space around it is dropped; anything else odd is a UsageError."""

    token: Secret

    def __post_init__(self) -> None:
        object.__setattr__(self, "token", _credential(self.token, "token"))


@dataclass(frozen=True)
class AppRoleLogin:
    """An AppRole of the operator's (or of a CI job), and the path its auth method is mounted at."""

    role_id: Secret
    secret_id: Secret
    mount: str = "approle"

    def __post_init__(self) -> None:
        object.__setattr__(self, "role_id", _credential(self.role_id, "role id"))
        object.__setattr__(self, "secret_id", _credential(self.secret_id, "secret id"))


@dataclass(frozen=True)
class BaoSettings:
    """Everything a connection needs.

    :ivar address: base URL, without a trailing slash.
    :ivar mount: where the KV v2 secrets engine is mounted.
    :ivar ca_file: a PEM file to trust in place of the system's authorities.
    :ivar timeout: seconds, for connecting and for each wait on an answer.
    """

    address: str
    login: TokenLogin | AppRoleLogin
    namespace: str | None = None
    mount: str = "secret"
    ca_file: Path | None = None
    timeout: float = 30.0


def settings_from(
    vault: model.Vault,
    environ: Mapping[str, str],
    resolve: Callable[[model.SecretRef], Secret],
    base: Path,
) -> BaoSettings:
    """The settings; for each, the inventory wins over ``BAO_*``, which wins over ``VAULT_*``.

    Variables: ``ADDR``, ``NAMESPACE``, ``CACERT``, ``TOKEN``, ``ROLE_ID`` with ``SECRET_ID``. An empty one
    counts as not set. The last resort for the login is ``~/.vault-token``, where ``bao login`` leaves it.

    :param resolve: gives the value of a secret reference (without OpenBao: it is what is being opened).
    :param base: directory of the inventory file; a relative ``ca_file`` starts there.
    :raises UsageError: something is missing or malformed; the text names it and the ways to give it.
    :raises SecretUnavailable: a reference, or ``~/.vault-token``, cannot be read.
    """
    address = vault.address or _variable(environ, "ADDR")
    if not address:
        raise UsageError(
            "no OpenBao address",
            hint="set vault.address in the inventory, or BAO_ADDR, or VAULT_ADDR",
        )
    if not _ADDRESS.fullmatch(address):
        raise UsageError(
            f"the OpenBao address {address!r} is not a http(s) URL",
            hint="write it as https://vault.example.org:8200 in vault.address, BAO_ADDR or VAULT_ADDR",
        )
    namespace = vault.namespace or _variable(environ, "NAMESPACE")
    if namespace and not _NAMESPACE.fullmatch(namespace.lstrip("/")):
        raise UsageError(
            f"the OpenBao namespace {namespace!r} is not a path of letters, digits, '_' and '-'",
            hint="set vault.namespace in the inventory, or BAO_NAMESPACE, or VAULT_NAMESPACE",
        )
    return BaoSettings(
        address=address.rstrip("/"),
        login=_login(vault, environ, resolve),
        namespace=namespace.strip("/") or None if namespace else None,
        mount=vault.mount,
        ca_file=_ca_file(vault, environ, base),
        timeout=vault.timeout,
    )


def _variable(environ: Mapping[str, str], name: str) -> str | None:
    return next((environ[f + name] for f in _FAMILIES if environ.get(f + name)), None)


def _ca_file(vault: model.Vault, environ: Mapping[str, str], base: Path) -> Path | None:
    if vault.ca_file:
        path = expanded(base, vault.ca_file)
    elif given := _variable(environ, "CACERT"):
        path = expanded(Path(), given)
    else:
        return None
    try:
        with path.open("rb") as file:
            file.read(1)
    except OSError as error:
        raise UsageError(
            f"the OpenBao CA file {path} cannot be read: {error.strerror}",
            hint="set vault.ca_file in the inventory, or BAO_CACERT, or VAULT_CACERT to a PEM file",
        ) from None
    return path


def _login(
    vault: model.Vault, environ: Mapping[str, str], resolve: Callable[[model.SecretRef], Secret]
) -> TokenLogin | AppRoleLogin:
    for field, ref in _references(vault):
        if ref.openbao:
            raise UsageError(
                f"{field} is to be read from OpenBao, which it opens",
                hint=f"take {field} from env, file, aws or command",
            )
    if vault.token:
        return TokenLogin(resolve(vault.token))
    if vault.approle:
        return AppRoleLogin(resolve(vault.approle.role_id), resolve(vault.approle.secret_id), vault.approle.mount)
    for login in _from_environment(environ):
        return login
    # HOME is that of the given environment, so that a caller decides which file it is.
    token_file = Path(environ["HOME"], ".vault-token") if environ.get("HOME") else None
    if token_file is not None and token_file.exists():
        try:
            return TokenLogin(Secret(read_private_file(token_file)))
        except UsageError as error:
            raise SecretUnavailable(f"{token_file}: {error.message}", hint="log in again: bao login") from None
    raise UsageError(
        "no login for OpenBao: neither a token nor an AppRole",
        hint="set vault.token or vault.approle in the inventory, or BAO_TOKEN (VAULT_TOKEN) or BAO_ROLE_ID with "
        "BAO_SECRET_ID (VAULT_ROLE_ID, VAULT_SECRET_ID), or log in with 'bao login', which writes ~/.vault-token",
    )


def _references(vault: model.Vault) -> Iterator[tuple[str, model.SecretRef]]:
    if vault.token:
        yield "vault.token", vault.token
    if vault.approle:
        yield "vault.approle.role_id", vault.approle.role_id
        yield "vault.approle.secret_id", vault.approle.secret_id


def _from_environment(environ: Mapping[str, str]) -> Iterator[TokenLogin | AppRoleLogin]:
    for family in _FAMILIES:
        if token := environ.get(family + "TOKEN"):
            yield TokenLogin(Secret(token))
        role, secret = (environ.get(family + name) for name in ("ROLE_ID", "SECRET_ID"))
        if role and secret:
            yield AppRoleLogin(Secret(role), Secret(secret))
        elif role or secret:
            there, missing = ("ROLE_ID", "SECRET_ID") if role else ("SECRET_ID", "ROLE_ID")
            raise UsageError(
                f"{family}{there} is set, and {family}{missing} is not",
                hint=f"an AppRole login needs both: set {family}{missing}, or vault.approle in the inventory, "
                f"or log in with a token ({family}TOKEN)",
            )
