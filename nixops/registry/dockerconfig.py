"""Logins as docker and podman keep them: ``config.json``, ``auth.json``, and the credential helpers they name."""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nixops.errors import CommandFailed, CommandTimeout, HostFault, SecretUnavailable, UsageError
from nixops.registry.login import Login
from nixops.secret import Secret
from nixops.transport.command import Command, Runner
from nixops.values import RegistryName

# Long enough for a person to type a passphrase into a pinentry.
HELPER_SECONDS = 60.0
_LIMIT = 1 << 20
_HELPER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DOCKER_IO = ("docker.io", "index.docker.io", "registry-1.docker.io")
# What docker itself writes for docker.io.
_DOCKER_IO_KEY = "https://index.docker.io/v1/"
# The user's name that says: the secret is an identity token.
_IDENTITY_USER = "<token>"
# What helpers print when they have nothing; the words are the protocol (docker-credential-helpers).
_NOT_FOUND = "credentials not found"


@dataclass(frozen=True)
class DockerConfig:
    """One such file.

    :ivar file: for errors; what stands in it is never quoted.
    """

    file: Path
    auths: Mapping[str, Any]
    helpers: Mapping[str, str]
    store: str | None

    def login(self, registry: RegistryName, local: Runner) -> Login | None:
        """The login for ``registry`` that this file, or the helper that it names, has; None: it has none.

        The order is docker's: the registry's own helper, the store for all, the file.

        :param local: runs the helpers, ``docker-credential-…``, as the operator.
        :raises SecretUnavailable: a helper is not there, fails or says nothing that can be read.
        :raises UsageError: the file's entry cannot be read.
        """
        for key in _keys(registry):
            if key in self.helpers:
                login = self._helped(self.helpers[key], key, local)
                if login is not None:
                    return login
        if self.store is not None:
            for key in _server_names(registry):
                login = self._helped(self.store, key, local)
                if login is not None:
                    return login
        for key in _keys(registry):
            if key in self.auths:
                login = self._written(key)
                if login is not None:
                    return login
        return None

    def _written(self, key: str) -> Login | None:
        entry = self.auths[key]
        if not isinstance(entry, dict):
            raise self._unreadable(key)
        user, password = str(entry.get("username") or ""), str(entry.get("password") or "")
        if entry.get("auth"):
            try:
                text = base64.b64decode(str(entry["auth"]), validate=True).decode()
            except (binascii.Error, UnicodeDecodeError, ValueError):
                raise self._unreadable(key) from None
            user, colon, password = text.partition(":")
            if not colon:
                raise self._unreadable(key)
            # Some versions of docker fill it up to a fixed length.
            password = password.rstrip("\0")
        token = entry.get("identitytoken")
        if isinstance(token, str) and token:
            return Login(user or _IDENTITY_USER, Secret(token), identity=True)
        # An entry without anything is what docker leaves where a helper has the login.
        return Login(user, Secret(password)) if user and password else None

    def _helped(self, helper: str, key: str, local: Runner) -> Login | None:
        if not _HELPER.fullmatch(helper):
            raise UsageError(f"{self.file} names a credential helper with a name that no helper has")
        program = f"docker-credential-{helper}"
        hint = f"run it yourself to see why: echo {key} | {program} get"
        # Neither output is shown: whichever a helper prints to may hold the password.
        try:
            result = local.run(Command((program, "get"), stdin=key, timeout=HELPER_SECONDS, title=program))
        except CommandTimeout:
            raise SecretUnavailable(f"{program} did not end within {HELPER_SECONDS:g} s", hint=hint) from None
        except (HostFault, CommandFailed):
            raise SecretUnavailable(
                f"{self.file} has {program} keep the login for {key}, and that cannot be started",
                hint="install it and put it on PATH, or name another login in the inventory",
            ) from None
        if not result.ok:
            if _NOT_FOUND in result.out or _NOT_FOUND in result.err:
                return None
            raise SecretUnavailable(f"{program} failed with exit code {result.code}", hint=hint)
        try:
            answer = json.loads(result.stdout)
        except (ValueError, RecursionError):
            answer = None
        user, secret = (answer.get("Username"), answer.get("Secret")) if isinstance(answer, dict) else (None, None)
        if not isinstance(user, str) or not isinstance(secret, str):
            raise SecretUnavailable(f"{program} says nothing that can be read", hint=hint)
        if not secret:
            return None
        return Login(user, Secret(secret), identity=user == _IDENTITY_USER)

    def _unreadable(self, key: str) -> UsageError:
        return UsageError(
            f"{self.file}: the login for {key} cannot be read", hint=f"write it again with: docker login {key}"
        )


def read_docker_config(file: Path) -> DockerConfig | None:
    """The file as a value; None where there is none.

    :raises UsageError: it cannot be read, or is not such a file. Its text is not quoted.
    """
    try:
        with file.open("rb") as opened:
            data = opened.read(_LIMIT + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UsageError(
            f"docker's configuration {file} cannot be read: {error.strerror}", hint="make it readable for you"
        ) from None
    try:
        value = json.loads(data) if len(data) <= _LIMIT else None
    except (ValueError, RecursionError):
        value = None
    parts = (value.get("auths") or {}, value.get("credHelpers") or {}) if isinstance(value, dict) else (None, None)
    store = value.get("credsStore") if isinstance(value, dict) else None
    auths, helpers = parts
    if not isinstance(auths, dict) or not isinstance(helpers, dict) or not isinstance(store, str | None):
        raise UsageError(f"{file} is not a docker configuration (JSON with auths, credHelpers, credsStore)")
    return DockerConfig(file, auths, {str(k): str(v) for k, v in helpers.items()}, store or None)


def default_places(environ: Mapping[str, str]) -> Iterator[Path]:
    """Where podman, skopeo and docker look for a login, the first first.

    ``REGISTRY_AUTH_FILE``; podman's and skopeo's runtime directory; ``DOCKER_CONFIG``, else ``~/.docker``.
    """
    if environ.get("REGISTRY_AUTH_FILE"):
        yield Path(environ["REGISTRY_AUTH_FILE"])
    runtime = environ.get("XDG_RUNTIME_DIR")
    yield (Path(runtime) if runtime else Path(f"/run/containers/{os.getuid()}")) / (
        "containers/auth.json" if runtime else "auth.json"
    )
    home = environ.get("HOME")
    if home:
        yield Path(environ.get("XDG_CONFIG_HOME") or Path(home, ".config")) / "containers/auth.json"
    if environ.get("DOCKER_CONFIG"):
        yield Path(environ["DOCKER_CONFIG"]) / "config.json"
    elif home:
        yield Path(home, ".docker/config.json")


def _keys(registry: RegistryName) -> Iterator[str]:
    """The names under which a file may have the registry, the usual one first."""
    if registry in _DOCKER_IO:
        yield _DOCKER_IO_KEY
    for name in _DOCKER_IO if registry in _DOCKER_IO else (registry,):
        yield name
        for scheme in ("https", "http"):
            yield f"{scheme}://{name}"
            for path in ("/", "/v1/", "/v2/", "/v1", "/v2"):
                yield f"{scheme}://{name}{path}"


def _server_names(registry: RegistryName) -> Iterator[str]:
    """The names under which a store may have it: what docker gives it, then what other tools do."""
    if registry in _DOCKER_IO:
        yield _DOCKER_IO_KEY
        return
    yield registry
    yield f"https://{registry}"
