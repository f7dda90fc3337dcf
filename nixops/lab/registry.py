"""A real container registry for the lab, the demo and the tests: Debian's ``docker-registry``.

    with RegistryServer(auth="token") as registry:
        …  # registry.name, registry.ca_file, registry.user, registry.password

Version 2.8 of the distribution project: it has no referrers API, takes OCI manifests with fields it does not know
as they are, and asks that everything a manifest names is there.
"""

from __future__ import annotations

import json
import re
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nixops.errors import UsageError
from nixops.lab.certificates import ServerCertificate, server_certificate
from nixops.lab.process import ServerProgram
from nixops.lab.registrytoken import ISSUER, SERVICE, TokenRequest, TokenServer
from nixops.secret import Secret
from nixops.values import ImageReference, RegistryName

# The least that bcrypt takes: the registry computes it for each request.
_BCRYPT_ROUNDS = 5
_ACCESS = re.compile(r'"(?P<method>[A-Z]+) (?P<path>/\S*) HTTP/[0-9.]+" (?P<status>[0-9]{3}) ')

Auth = Literal["basic", "token", "none"]


@dataclass(frozen=True)
class RegistryRequest:
    """One request as the registry logged it; ``path`` with its query."""

    method: str
    path: str
    status: int


class RegistryServer(ServerProgram):
    """A registry of its own, empty at first; a context manager.

    :param bind: the IPv4 address it listens on; for hosts to reach it, one of a network of theirs.
    :param port: 0 takes a free one.
    :param auth: ``basic`` (htpasswd), ``token`` (bearer tokens of a server of ours, which takes the login), ``none``.
    :param tls: serve HTTPS, with a certificate by an authority of its own in :attr:`ca_file`.
    :param password: left out, a random one.
    :param token_lifetime: seconds that a bearer token is good for.
    :param anonymous_pull: with ``token``: who does not log in may pull.
    """

    called = "the registry"
    listens = b"listening on"
    patience = 20.0

    def __init__(
        self,
        *,
        bind: str = "127.0.0.1",
        port: int = 0,
        auth: Auth = "basic",
        tls: bool = True,
        user: str = "pusher",
        password: Secret | None = None,
        token_lifetime: int = 300,
        anonymous_pull: bool = False,
    ) -> None:
        super().__init__(bind, port)
        self._auth = auth
        self._tls = tls
        self._token_lifetime = token_lifetime
        self._anonymous_pull = anonymous_pull
        self.user = user
        self.password = password or Secret(secrets.token_urlsafe(24))
        self.identity_token = Secret(secrets.token_urlsafe(24))
        self.ca_file: Path | None = None
        self.tokens: TokenServer | None = None

    @property
    def name(self) -> RegistryName:
        """As image references have it: ``127.0.0.1:41234``."""
        return RegistryName(f"{self._bind}:{self.port}")

    @property
    def url(self) -> str:
        """Its base URL, without ``/v2``."""
        return f"{'https' if self._tls else 'http'}://{self.name}"

    @property
    def storage(self) -> Path:
        """Where it keeps blobs, manifests and tags."""
        return self.directory / "storage"

    def reference(self, rest: str) -> ImageReference:
        """``team/app:1`` in this registry."""
        return ImageReference(f"{self.name}/{rest}")

    def requests(self) -> tuple[RegistryRequest, ...]:
        """Each request that was answered so far, in order."""
        text = self.log.read_text(errors="replace")
        return tuple(RegistryRequest(f["method"], f["path"], int(f["status"])) for f in _ACCESS.finditer(text))

    def token_requests(self) -> tuple[TokenRequest, ...]:
        """Each request that its token server answered so far; none without ``auth="token"``."""
        return tuple(self.tokens.requests) if self.tokens else ()

    def tags(self, repository: str) -> tuple[str, ...]:
        """The tags of a repository as they stand in the registry's storage."""
        directory = self.storage / "docker/registry/v2/repositories" / repository / "_manifests/tags"
        return tuple(sorted(path.name for path in directory.iterdir())) if directory.is_dir() else ()

    def stop(self) -> None:
        super().stop()
        self.tokens = None

    def restart(self, between: Callable[[], None] = lambda: None) -> None:
        """Stop the program and start it again at the same port, with the same storage.

        :param between: called while it is down.
        """
        if self._process is None:
            raise self._not_running()
        self._halt()
        between()
        if not self._start_once(self.port):
            raise self._does_not_start()

    # -- starting ---------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        directory = self.directory
        certificate = server_certificate(directory, self._bind) if self._tls else None
        self.ca_file = certificate.ca_file if certificate else None
        if self._auth == "token":
            self.tokens = self._stack.enter_context(
                TokenServer(
                    directory,
                    certificate,
                    bind=self._bind,
                    user=self.user,
                    password=self.password.reveal(),
                    identity_token=self.identity_token.reveal(),
                    lifetime=self._token_lifetime,
                    anonymous_pull=self._anonymous_pull,
                )
            )
        self._configure(directory, certificate)

    def _configure(self, directory: Path, certificate: ServerCertificate | None) -> None:
        http: dict[str, Any] = {"addr": "", "secret": secrets.token_hex(16)}
        if certificate is not None:
            http["tls"] = {"certificate": str(certificate.certificate_file), "key": str(certificate.key_file)}
        config: dict[str, Any] = {
            "version": 0.1,
            "log": {"level": "info", "accesslog": {"disabled": False}},
            "storage": {"filesystem": {"rootdirectory": str(directory / "storage")}, "delete": {"enabled": True}},
            "http": http,
        }
        if self._auth == "basic":
            import bcrypt

            entry = bcrypt.hashpw(self.password.reveal().encode(), bcrypt.gensalt(_BCRYPT_ROUNDS)).decode()
            file = directory / "htpasswd"
            file.touch(mode=0o600)
            file.write_text(f"{self.user}:{entry}\n")
            config["auth"] = {"htpasswd": {"realm": "nixops lab", "path": str(file)}}
        elif self.tokens is not None:
            config["auth"] = {
                "token": {
                    "realm": self.tokens.realm,
                    "service": SERVICE,
                    "issuer": ISSUER,
                    "rootcertbundle": str(self.tokens.bundle),
                }
            }
        self._config = config

    def _command(self) -> Sequence[str]:
        program = shutil.which("docker-registry")
        if program is None:
            raise UsageError("docker-registry is not installed here", hint="install Debian's package docker-registry")
        self._config["http"]["addr"] = f"{self._bind}:{self.port}"
        file = self.directory / "config.yml"
        file.touch(mode=0o600)
        file.write_text(json.dumps(self._config, indent=1))  # JSON is YAML
        return (program, "serve", str(file))

    def _environment(self) -> Mapping[str, str]:
        return {"OTEL_TRACES_EXPORTER": "none"}
