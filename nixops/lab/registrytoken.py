"""The token server of a registry with bearer authentication, as the distribution project specifies it.

The registry is given the certificate of this server's key, and believes each token that the key signed: the server
says what a user may do, the registry sees to it.
"""

from __future__ import annotations

import base64
import datetime
import hmac
import json
import re
import secrets
import ssl
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import parse_qs, urlsplit

from nixops.lab.certificates import ServerCertificate

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

SERVICE = "nixops lab registry"
ISSUER = "nixops lab token server"
_SCOPE = re.compile(r"(?P<type>[a-z]+):(?P<name>[a-z0-9._/-]+):(?P<actions>[a-z*,]+)")


@dataclass(frozen=True)
class TokenRequest:
    """One request for a token, as a test may look at it.

    :ivar user: who logged in; None for an anonymous request.
    :ivar grant: ``password`` (GET with basic authentication) or ``refresh_token`` (POST with an identity token).
    """

    user: str | None
    scopes: tuple[str, ...]
    grant: str
    status: int


class TokenServer:
    """A context manager; :attr:`realm` is its address while it runs.

    :param identity_token: what ``grant_type=refresh_token`` takes instead of the password.
    :param lifetime: seconds that a token is good for.
    :param anonymous_pull: give a token for ``pull`` to those who do not log in.
    """

    def __init__(
        self,
        directory: Path,
        certificate: ServerCertificate | None,
        *,
        bind: str,
        user: str,
        password: str,
        identity_token: str,
        lifetime: int = 300,
        anonymous_pull: bool = False,
    ) -> None:
        self.lifetime = lifetime
        self.requests: list[TokenRequest] = []
        self.bundle = directory / "tokens.pem"
        self._user = user
        self._password = password
        self._identity_token = identity_token
        self._anonymous_pull = anonymous_pull
        self._key, self._der = _signing_key(self.bundle)
        self._server = ThreadingHTTPServer((bind, 0), _handler(self))
        self._server.daemon_threads = True
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate.certificate_file, certificate.key_file)
            # The handshake is left to the thread that answers: here it would let one client hold up all.
            self._server.socket = context.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
        scheme = "http" if certificate is None else "https"
        self.realm = f"{scheme}://{bind}:{self._server.server_address[1]}/token"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, authorization: str | None, asked: Mapping[str, list[str]]) -> tuple[int, dict[str, Any]]:
        """The status and the JSON document for one request. ``asked`` are its query or form fields."""
        grant = asked.get("grant_type", ["password"])[0]
        # A form has its scopes in one field, a query one field for each (and some clients do it the other way).
        scopes = tuple(scope for field in asked.get("scope", []) for scope in field.split())
        user: str | None = None
        if grant == "refresh_token":
            good = hmac.compare_digest(asked.get("refresh_token", [""])[0], self._identity_token)
            user = self._user if good else None
        elif authorization is not None:
            good = hmac.compare_digest(authorization, "Basic " + _b64(f"{self._user}:{self._password}".encode()))
            user = self._user if good else None
        else:
            good = self._anonymous_pull
        good = good and asked.get("service", [SERVICE])[0] == SERVICE
        self.requests.append(TokenRequest(user, scopes, grant, 200 if good else 401))
        if not good:
            return 401, {"errors": [{"code": "UNAUTHORIZED", "message": "incorrect username or password"}]}
        name = "access_token" if grant == "refresh_token" else "token"
        token = self._token(user or "", scopes, ("pull",) if user is None else ("pull", "push", "delete"))
        return 200, {name: token, "expires_in": self.lifetime, "issued_at": _rfc3339()}

    def _token(self, user: str, scopes: tuple[str, ...], allowed: tuple[str, ...]) -> str:
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import ec, utils

        access = [
            {
                "type": found["type"],
                "name": found["name"],
                "actions": [action for action in found["actions"].split(",") if action in allowed],
            }
            for found in map(_SCOPE.fullmatch, scopes)
            if found is not None
        ]
        now = int(time.time())
        header = {"typ": "JWT", "alg": "ES256", "x5c": [_b64(self._der)]}
        claims = {
            "iss": ISSUER,
            "sub": user,
            "aud": SERVICE,
            "iat": now,
            "nbf": now - 60,
            "exp": now + self.lifetime,
            "jti": secrets.token_hex(8),
            "access": access,
        }
        signed = f"{_url64(json.dumps(header).encode())}.{_url64(json.dumps(claims).encode())}"
        r, s = utils.decode_dss_signature(self._key.sign(signed.encode(), ec.ECDSA(hashes.SHA256())))
        return f"{signed}.{_url64(r.to_bytes(32, 'big') + s.to_bytes(32, 'big'))}"


def _signing_key(bundle: Path) -> tuple[EllipticCurvePrivateKey, bytes]:
    """A new key, and its certificate in DER; the certificate is also written to ``bundle``, for the registry."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, ISSUER)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=2))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    bundle.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    return key, certificate.public_bytes(serialization.Encoding.DER)


def _handler(tokens: TokenServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 30
        wbufsize = 65536  # one packet for head and body: two wait for each other

        def do_GET(self) -> None:
            self._answer(parse_qs(urlsplit(self.path).query))

        def do_POST(self) -> None:
            size = min(int(self.headers.get("Content-Length") or 0), 65536)
            self._answer(parse_qs(self.rfile.read(size).decode(errors="replace")))

        def _answer(self, asked: dict[str, list[str]]) -> None:
            status, document = tokens.answer(self.headers.get("Authorization"), asked)
            body = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Nothing on stderr: a request's line holds who logged in."""

    return Handler


def _rfc3339() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _url64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")
