"""HTTP for the lab's Forgejo: threads, faults on demand, a log of requests without secrets, a static git over HTTP."""

from __future__ import annotations

import json
import re
import socket
import ssl
import subprocess
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from nixops.lab.forgejo_api import Api, Reply, Request
from nixops.lab.forgejo_rpc import Rpc
from nixops.lab.forgejo_state import State

Answer = tuple[int, bytes, dict[str, str]]
"""Status, body, headers."""


@dataclass(frozen=True)
class LoggedRequest:
    """One request as a test may look at it: no headers, no body, so no secret. ``status`` 0: never answered."""

    method: str
    path: str
    query: str
    status: int


@dataclass
class Fault:
    """What goes wrong with the next ``times`` requests that match.

    :ivar path: a regular expression that must match somewhere in the path.
    :ivar status: answer this instead, with ``body`` and ``headers``.
    :ivar delay: seconds to wait first.
    :ivar drop: close the connection, ``before`` the request is carried out or ``after`` (its answer is lost).
    """

    path: str
    method: str | None = None
    status: int | None = None
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    delay: float = 0.0
    drop: str | None = None
    times: int = 1

    def takes(self, method: str, path: str) -> bool:
        """This fault is meant for that request, and has not been used up."""
        return self.times > 0 and self.method in (None, method) and re.search(self.path, path) is not None


class ForgejoHttp:
    """What the handler threads share."""

    def __init__(self, state: State, api: Api, git: Path) -> None:
        self.state = state
        self.api = api
        self.rpc = Rpc(state)
        self.git = git
        self.base = ""
        self.faults: list[Fault] = []
        self.log: list[LoggedRequest] = []
        self.stopping = threading.Event()

    def next_fault(self, method: str, path: str) -> Fault | None:
        with self.state.changed:
            for fault in self.faults:
                if fault.takes(method, path):
                    fault.times -= 1
                    return fault
            return None

    def note(self, entry: LoggedRequest) -> None:
        with self.state.changed:
            self.log.append(entry)


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server_version = "Forgejo"
    sys_version = ""
    # Head and body leave in one packet; in two, the client's delayed acknowledgement costs 40 ms a request.
    wbufsize = 65536
    server: ForgejoSocketServer

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on stderr; tests read the request log."""

    def _do(self) -> None:
        parts = urlsplit(self.path)
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            reply = self._faulty(parts.path, parts.query, raw)
            # Before it is sent, so that whoever has the answer finds the request in the log.
            self.server.shared.note(LoggedRequest(self.command, parts.path, parts.query, reply[0] if reply else 0))
            if reply is None:
                self.close_connection = True
            else:
                self._send(*reply)
        except (ConnectionError, ssl.SSLError):
            self.close_connection = True

    def _faulty(self, path: str, query: str, raw: bytes) -> Answer | None:
        """The answer, as the next fault that is meant for this request leaves it; ``None`` where it leaves none."""
        fault = self.server.shared.next_fault(self.command, path)
        if fault is None:
            return self._answer(path, query, raw)
        self.server.shared.stopping.wait(fault.delay)
        if fault.drop == "before":
            return None
        if fault.status is not None:
            return fault.status, fault.body, {"Content-Type": "application/json", **fault.headers}
        answer = self._answer(path, query, raw)
        return None if fault.drop == "after" else answer

    do_GET = do_POST = do_DELETE = do_PUT = do_PATCH = _do

    def _answer(self, path: str, query: str, raw: bytes) -> Answer:
        shared = self.server.shared
        try:
            body = json.loads(raw) if raw else None
        except ValueError:
            body = None
        if path.startswith("/api/actions/") and self.command == "POST":
            headers = {k.lower(): v for k, v in self.headers.items()}
            code, value = shared.rpc.answer(path.removeprefix("/api/actions/"), headers, body, shared.base)
            return code, json.dumps(value).encode(), {"Content-Type": "application/json"}
        if path.startswith("/api/v1/"):
            request = Request(
                self.command,
                path.removeprefix("/api/v1"),
                dict(parse_qsl(query)),
                body,
                self.headers.get("Authorization", ""),
                shared.base,
            )
            with shared.state.changed:
                return _encoded(shared.api.answer(request))
        return self._git(path)

    def _git(self, path: str) -> Answer:
        """Git's dumb HTTP: the files of a bare repository, for ``git clone {url}/{owner}/{repo}.git``."""
        root = self.server.shared.git.resolve()
        parts = path.lstrip("/").split("/", 2)
        file = (root / "/".join([*(p.lower() for p in parts[:2]), *parts[2:]])).resolve()
        if root in file.parents and file.is_file():
            return 200, file.read_bytes(), {"Content-Type": "application/octet-stream"}
        return 404, b"Not found.\n", {"Content-Type": "text/plain"}

    def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        if status != 204:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if status != 204:
            self.wfile.write(body)


def _encoded(reply: Reply) -> Answer:
    if reply.status == 204:
        return 204, b"", dict(reply.headers)
    if reply.text is not None:
        return reply.status, reply.text.encode(), {"Content-Type": "text/plain;charset=utf-8", **reply.headers}
    return reply.status, json.dumps(reply.value).encode(), {"Content-Type": "application/json", **reply.headers}


class ForgejoSocketServer(ThreadingHTTPServer):
    """Listens; ends its connections when it is closed, so that a stopped server really looks gone."""

    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True
    request_queue_size = 64

    def __init__(self, address: tuple[str, int], shared: ForgejoHttp, tls: ssl.SSLContext | None) -> None:
        self.shared = shared
        self._tls = tls
        self._open: set[socket.socket] = set()
        self._guard = threading.Lock()
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(address, Handler)

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Serve one connection, in its own thread; the TLS greeting too, so that a slow one delays nobody else."""
        if self._tls is not None:
            request = self._tls.wrap_socket(request, server_side=True)
        with self._guard:
            self._open.add(request)
        try:
            super().finish_request(request, client_address)
        finally:
            with self._guard:
                self._open.discard(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is nothing to report."""

    def server_close(self) -> None:
        """Stop listening and end every connection."""
        super().server_close()
        with self._guard:
            for connection in self._open:
                try:
                    connection.shutdown(socket.SHUT_RDWR)
                except OSError:
                    continue


def publish(source: Path, bare: Path) -> None:
    """Make ``bare`` a copy of the git repository ``source`` that can be cloned over static HTTP."""
    subprocess.run(["git", "clone", "--quiet", "--bare", str(source), str(bare)], check=True, capture_output=True)
    subprocess.run(["git", "-C", str(bare), "update-server-info"], check=True, capture_output=True)
