"""A binary cache for the lab, over HTTP or TLS: one made by ``nix copy``, or a host's own store signed as it is asked
for, which is what harmonia does on a cache host.

Paths can be withheld, served without our signature or with another's, so that what notices it can be shown to.
"""

from __future__ import annotations

import os
import sqlite3
import ssl
import subprocess
import tempfile
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Final, Protocol, Self

from nixops.errors import BuildFailed
from nixops.lab.certificates import server_certificate
from nixops.lab.host import LabHost
from nixops.nix.narinfo import STORE, Narinfo, nar_hash
from nixops.secret import Secret
from nixops.values import StorePath

INFO: Final = f"StoreDir: {STORE}\nWantMassQuery: 1\nPriority: 30\n"
_FEATURES: Final = ("--extra-experimental-features", "nix-command")


@dataclass(frozen=True)
class CacheKeyPair:
    """A key that a cache signs with, made by Nix: both halves in Nix's form ``name:base64``."""

    secret: Secret
    public: str

    @classmethod
    def generate(cls, name: str) -> Self:
        with tempfile.TemporaryDirectory(prefix="nixops-lab-key-") as directory:
            secret, public = Path(directory, "secret"), Path(directory, "public")
            subprocess.run(
                ["nix-store", "--generate-binary-cache-key", name, secret, public], check=True, capture_output=True
            )
            return cls(Secret(secret.read_text(encoding="ascii").strip()), public.read_text(encoding="ascii").strip())

    def sign(self, info: Narinfo) -> str:
        """What this key says of a path: ``name:base64``."""
        import base64

        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        name, _, encoded = self.secret.reveal().partition(":")
        # 32 bytes of seed and the 32 of the public half: libsodium's form.
        key = Ed25519PrivateKey.from_private_bytes(base64.b64decode(encoded)[:32])
        return f"{name}:{base64.b64encode(key.sign(info.fingerprint())).decode()}"


class Source(Protocol):
    """Where a cache's answers come from."""

    def narinfo(self, hash_part: str) -> str | None:
        """The narinfo of the path with that hash; None when there is no such path."""
        ...

    def nar(self, name: str) -> bytes | None:
        """The archive of that name; None when there is none."""
        ...


class StaticCache:
    """A cache in a directory of this machine, as ``nix copy --to file://`` makes it."""

    def __init__(self, directory: Path, key: CacheKeyPair) -> None:
        self.directory = directory
        self._key = key

    def add(self, paths: Iterable[StorePath], *, store: str = "auto") -> None:
        """Copy the closures of ``paths`` into it, each path signed.

        :param store: whose paths they are, as ``nix copy --from`` takes it.
        :raises BuildFailed: nix did not copy them.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="nixops-lab-key-") as directory:
            secret = Path(directory, "secret")
            secret.touch(mode=0o600)
            secret.write_text(self._key.secret.reveal(), encoding="ascii")
            to = f"file://{self.directory}?secret-key={secret}&compression=none"
            done = subprocess.run(
                ["nix", *_FEATURES, "copy", "--from", store, "--to", to, "--no-check-sigs", *paths],
                env={**os.environ, "NIX_CONFIG": "substituters ="},
                capture_output=True,
                text=True,
                check=False,
            )
        if done.returncode != 0:
            raise BuildFailed("nix copy to the lab's cache failed", detail=done.stderr)

    def narinfo(self, hash_part: str) -> str | None:
        return _text(self.directory / f"{hash_part}.narinfo")

    def nar(self, name: str) -> bytes | None:
        try:
            return (self.directory / "nar" / name).read_bytes()
        except OSError:
            return None


class LiveStore:
    """A lab host's own store, signed on the fly. Its database is read as it is at that moment, from outside."""

    def __init__(self, host: LabHost, key: CacheKeyPair) -> None:
        self._host = host
        self._key = key

    def narinfo(self, hash_part: str) -> str | None:
        info = self._info(hash_part)
        return None if info is None else text_of(info, (self._key.sign(info),))

    def nar(self, name: str) -> bytes | None:
        info = self._info(name.removesuffix(".nar"))
        return None if info is None else self._host.exec("nix-store", "--dump", info.path).stdout

    def _info(self, hash_part: str) -> Narinfo | None:
        database = self._host.root / "nix/var/nix/db/db.sqlite"
        # Above every name with this hash and below the next: an index is used, and nothing needs escaping.
        low, high = f"{STORE}/{hash_part}-", f"{STORE}/{hash_part}."
        connection = sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=10.0)
        try:
            found = connection.execute(
                "select id, path, hash, narSize from ValidPaths where path >= ? and path < ?", (low, high)
            ).fetchone()
            if found is None:
                return None
            number, path, digest, size = found
            references = connection.execute(
                "select path from Refs join ValidPaths on reference = id where referrer = ?", (number,)
            ).fetchall()
        finally:
            connection.close()
        return Narinfo(
            path=StorePath(path),
            url=f"nar/{hash_part}.nar",
            nar_hash=nar_hash(digest),
            nar_size=size,
            references=tuple(sorted(StorePath(reference) for (reference,) in references)),
        )


def text_of(info: Narinfo, signatures: Iterable[str]) -> str:
    """A narinfo as harmonia writes it: uncompressed."""
    lines = [
        f"StorePath: {info.path}",
        f"URL: {info.url}",
        "Compression: none",
        f"FileHash: {info.nar_hash}",
        f"FileSize: {info.nar_size}",
        f"NarHash: {info.nar_hash}",
        f"NarSize: {info.nar_size}",
        "References: " + " ".join(reference.removeprefix(f"{STORE}/") for reference in info.references),
        *(f"Sig: {signature}" for signature in signatures),
    ]
    return "\n".join(lines) + "\n"


class BinaryCacheServer:
    """Serves a :class:`Source` inside a ``with`` block, on a free port.

    :param bind: the address to listen on; a lab's gateway for one that hosts use.
    :param tls: a directory for a certificate of an authority of its own: then it speaks TLS.
    :ivar hidden: hash parts that are answered with 404, whatever the source has.
    :ivar unsigned: hash parts that are served without signatures.
    :ivar resigned: hash part to the signatures it is served with instead.
    :ivar broken: hash part to the HTTP status that it is answered with.
    :ivar requests: the paths asked for, in order.
    """

    def __init__(self, source: Source, *, bind: str = "127.0.0.1", tls: Path | None = None) -> None:
        self.source = source
        self.hidden: set[str] = set()
        self.unsigned: set[str] = set()
        self.resigned: dict[str, tuple[str, ...]] = {}
        self.broken: dict[str, int] = {}
        self.requests: list[str] = []
        self.ca_file: Path | None = None
        self._server = _Server((bind, 0), self)
        if tls is not None:
            made = server_certificate(tls, bind)
            self.ca_file = made.ca_file
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(made.certificate_file, made.key_file)
            self._server.socket = context.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
        self.url = f"http{'s' if tls else ''}://{bind}:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def answer(self, path: str) -> tuple[int, bytes]:
        """Status and body for a request."""
        self.requests.append(path)
        name = path.lstrip("/")
        if name == "nix-cache-info":
            return 200, INFO.encode()
        if name.startswith("nar/"):
            body = self.source.nar(name.removeprefix("nar/"))
            return (404, b"no such archive\n") if body is None else (200, body)
        part = name.removesuffix(".narinfo")
        if part in self.broken:
            return self.broken[part], b"broken on purpose\n"
        text = self.source.narinfo(part) if name.endswith(".narinfo") and part not in self.hidden else None
        if text is None:
            return 404, b"no such path\n"
        if part in self.unsigned or part in self.resigned:
            kept = [line for line in text.splitlines() if not line.startswith("Sig: ")]
            text = "\n".join([*kept, *(f"Sig: {s}" for s in self.resigned.get(part, ()))]) + "\n"
        return 200, text.encode()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    # A client that asks for everything at once: the default of 5 waiting connections would refuse some.
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], cache: BinaryCacheServer) -> None:
        self.cache = cache
        super().__init__(address, _Handler)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away, or that does not trust the certificate: nothing of the server's."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server
    # Head and body are two writes; together with the client's delayed acknowledgement that costs 40 ms each.
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        status, body = self.server.cache.answer(self.path)
        self.send_response(status)
        self.send_header("Content-Type", "text/x-nix-narinfo" if status == 200 else "text/plain")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on stderr: a test looks at ``requests``."""


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return None
