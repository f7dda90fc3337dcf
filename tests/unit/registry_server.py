"""A small registry in memory, held to the distribution specification 1.1, for what the real one cannot be made to do.

It has the referrers API (in pages), and takes faults: an answer of one's own, a wrong digest, half a body, a delay.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from nixops.inventory.building import Registry
from nixops.registry.client import RegistryClient
from nixops.registry.login import Login
from nixops.registry.manifest import OCI_INDEX, OCI_MANIFEST, Descriptor, canonical
from nixops.secret import Redactor
from nixops.values import RegistryName

CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar"


@dataclass
class Fault:
    """What to do instead with the next ``times`` requests of this method whose path holds ``path``.

    :ivar status: 0: no answer at all, the connection ends. -1: answer rightly, but with these ``headers``.
    :ivar cut: end the connection after this many bytes of the body.
    :ivar carry_out: do what is asked first, and answer with the fault then.
    :ivar together: wait until as many requests as it is for are in progress.
    """

    method: str
    path: str
    status: int = -1
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    times: int = 1
    cut: int | None = None
    delay: float = 0.0
    carry_out: bool = False
    together: threading.Barrier | None = None


@dataclass(frozen=True)
class Seen:
    """A request as it came."""

    method: str
    path: str
    authorization: str | None
    encodings: str | None


@dataclass
class FakeRegistry:
    """Its state. ``page`` is how many referrers stand on one page; ``referrers_api`` False has none."""

    port: int = 0
    page: int = 100
    referrers_api: bool = True
    basic: str | None = None
    blobs: dict[str, bytes] = field(default_factory=dict)
    manifests: dict[str, tuple[bytes, str]] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)

    @property
    def name(self) -> RegistryName:
        return RegistryName(f"127.0.0.1:{self.port}")

    @property
    def url(self) -> str:
        return f"http://{self.name}"

    def asked(self, method: str, part: str = "") -> int:
        return sum(1 for one in self.seen if one.method == method and part in one.path)

    def add_image(self, tag: str, layer: bytes = b"layer") -> tuple[str, bytes]:
        """Put an image straight in; its digest and manifest."""
        body = image_of(self.add_blob(b'{"architecture":"amd64","os":"linux"}'), self.add_blob(layer))
        digest = self.add_manifest(body, OCI_MANIFEST)
        self.tags[tag] = digest
        return digest, body

    def add_blob(self, body: bytes) -> Descriptor:
        digest = "sha256:" + sha256(body).hexdigest()
        self.blobs[digest] = body
        return Descriptor(LAYER_TYPE, digest, len(body))

    def add_manifest(self, body: bytes, media_type: str) -> str:
        digest = "sha256:" + sha256(body).hexdigest()
        self.manifests[digest] = (body, media_type)
        return digest


def image_of(config: Descriptor, *layers: Descriptor) -> bytes:
    """The manifest of an image."""
    return canonical(
        {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": {**config.document(), "mediaType": CONFIG_TYPE},
            "layers": [layer.document() for layer in layers],
        }
    )


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up early is what some tests are about."""


@contextmanager
def fake_registry(**options: Any) -> Iterator[FakeRegistry]:
    """One that serves plain HTTP at ``127.0.0.1`` as long as the block lasts."""
    state = FakeRegistry(**options)
    server = _Server(("127.0.0.1", 0), _handler(state))
    state.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()


@dataclass
class Sleeps:
    """Waits that are only written down."""

    slept: list[float] = field(default_factory=list)

    def __call__(self, seconds: float) -> None:
        self.slept.append(seconds)


def plain_client(
    name: RegistryName,
    login: Login | None = None,
    *,
    redactor: Redactor | None = None,
    sleep: Sleeps | None = None,
    timeout: float = 5.0,
) -> RegistryClient:
    """A client of a registry without TLS, that does not really wait."""
    return RegistryClient(
        name,
        settings=Registry(tls=False, timeout=timeout),
        login=lambda: login,
        redactor=redactor or Redactor(),
        base=Path("/"),
        sleep=sleep or Sleeps(),
    )


def _handler(state: FakeRegistry) -> type[BaseHTTPRequestHandler]:
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 10
        wbufsize = 65536  # one packet for head and body: two wait for each other

        def do_GET(self) -> None:
            self._handle()

        do_HEAD = do_PUT = do_POST = do_GET

        def _handle(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            authorization = self.headers.get("Authorization")
            state.seen.append(Seen(self.command, self.path, authorization, self.headers.get("Accept-Encoding")))
            with lock:
                fault = next((f for f in state.faults if f.times and self._is(f)), None)
                if fault is not None:
                    fault.times -= 1
            if fault is not None:
                if fault.together is not None:
                    fault.together.wait()
                time.sleep(fault.delay)
                if fault.status >= 0:
                    if fault.carry_out:
                        self._answer(body)
                    self._send(fault.status, fault.headers, fault.body, fault.cut)
                    return
            if state.basic is not None and authorization != state.basic:
                self._send(401, {"WWW-Authenticate": 'Basic realm="fake"'}, b'{"errors":[{"code":"UNAUTHORIZED"}]}')
                return
            status, headers, answer = self._answer(body)
            self._send(status, {**headers, **(fault.headers if fault else {})}, answer, fault.cut if fault else None)

        def _is(self, fault: Fault) -> bool:
            return fault.method == self.command and fault.path in self.path

        def _send(self, status: int, headers: Mapping[str, str], body: bytes, cut: int | None = None) -> None:
            if status == 0:
                self.close_connection = True
                self.connection.close()
                return
            self.send_response(status)
            for key, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body[:cut])
            if cut is not None:
                self.wfile.flush()
                self.close_connection = True

        def _answer(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
            parts = urlsplit(self.path)
            query = parse_qs(parts.query)
            rest = parts.path.removeprefix("/v2/")
            for kind in ("manifests", "blobs", "referrers"):
                repository, found, name = rest.partition(f"/{kind}/")
                if found:
                    answer = {"manifests": self._manifests, "blobs": self._blobs, "referrers": self._referrers}[kind]
                    return answer(repository, name, query, body)
            return 404, {}, b"404 page not found\n"

        def _manifests(self, repository: str, name: str, _: Any, body: bytes) -> tuple[int, dict[str, str], bytes]:
            if self.command == "PUT":
                digest = state.add_manifest(body, self.headers.get("Content-Type") or "")
                if not name.startswith("sha256:"):
                    state.tags[name] = digest
                headers = {"Docker-Content-Digest": digest, "Location": f"/v2/{repository}/manifests/{digest}"}
                subject = json.loads(body).get("subject")
                if subject and state.referrers_api:
                    headers["OCI-Subject"] = subject["digest"]
                return 201, headers, b""
            held = state.manifests.get(state.tags.get(name, name))
            if held is None:
                return 404, {"Content-Type": "application/json"}, b'{"errors":[{"code":"MANIFEST_UNKNOWN"}]}'
            digest = "sha256:" + sha256(held[0]).hexdigest()
            return 200, {"Content-Type": held[1], "Docker-Content-Digest": digest}, held[0]

        def _blobs(
            self, repository: str, name: str, query: dict[str, list[str]], body: bytes
        ) -> tuple[int, dict[str, str], bytes]:
            if self.command == "POST":
                return 202, {"Location": f"/v2/{repository}/blobs/uploads/one?_state=x"}, b""
            if self.command == "PUT":
                state.add_blob(body)
                return 201, {"Location": f"/v2/{repository}/blobs/{query['digest'][0]}"}, b""
            if name not in state.blobs:
                return 404, {}, b'{"errors":[{"code":"BLOB_UNKNOWN"}]}'
            return 200, {"Content-Type": "application/octet-stream"}, state.blobs[name]

        def _referrers(
            self, repository: str, name: str, query: dict[str, list[str]], _: bytes
        ) -> tuple[int, dict[str, str], bytes]:
            if not state.referrers_api:
                return 404, {}, b"404 page not found\n"
            found: list[dict[str, Any]] = []
            for digest, (data, kind) in state.manifests.items():
                value = json.loads(data)
                if (value.get("subject") or {}).get("digest") == name:
                    entry: dict[str, Any] = {"mediaType": kind, "digest": digest, "size": len(data)}
                    entry["artifactType"] = value.get("artifactType")
                    entry["annotations"] = value.get("annotations") or {}
                    found.append(entry)
            start = int(query.get("from", ["0"])[0])
            headers = {"Content-Type": OCI_INDEX}
            if start + state.page < len(found):
                headers["Link"] = f'</v2/{repository}/referrers/{name}?from={start + state.page}>; rel="next"'
            document = {
                "schemaVersion": 2,
                "mediaType": OCI_INDEX,
                "manifests": found[start : start + state.page],
            }
            return 200, headers, canonical(document)

        def log_message(self, format: str, *args: object) -> None:
            """Nothing on stderr."""

    return Handler
