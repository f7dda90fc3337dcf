"""Answers that a healthy OpenBao does not give: each becomes one clean error, and none of them leaks a secret."""

from __future__ import annotations

import json
import logging
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from nixops.errors import ExitCode, NixopsError, VaultError, VaultSealed
from nixops.secret import Redactor, Secret
from nixops.values import HostName, VaultPath
from nixops.vault.approle import HostRoles
from nixops.vault.client import VaultUnanswered
from nixops.vault.openbao import OpenBao
from nixops.vault.settings import AppRoleLogin, BaoSettings, TokenLogin

PATH = VaultPath("hosts/nix-cache02/token")
TOKEN = Secret("s.the-operators-own-token")
ROLE_ID = Secret("the-operators-role-id")
SECRET_ID = Secret("the-operators-secret-id")
VALUE = Secret("the-value-that-is-written")
SECRETS = (TOKEN, ROLE_ID, SECRET_ID, VALUE)

Answer = tuple[int, dict[str, str], bytes]


class Fake(ThreadingHTTPServer):
    """Answers every request with what ``answer`` makes of it."""

    answer: Callable[[str, str, dict[str, str], bytes], Answer | None]
    asked: list[tuple[str, str, dict[str, str]]]


class Handler(BaseHTTPRequestHandler):
    server: Fake

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        headers = dict(self.headers.items())
        self.server.asked.append((self.command, self.path, headers))
        answer = self.server.answer(self.command, self.path, headers, body)
        if answer is None:
            self.close_connection = True
            self.connection.close()
            return
        status, more, content = answer
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **more}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_DELETE = do_LIST = _serve

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def fake() -> Iterator[Fake]:
    server = Fake(("127.0.0.1", 0), Handler)
    server.asked = []
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def address(fake: Fake) -> str:
    return f"http://127.0.0.1:{fake.server_address[1]}"


def opened(fake: Fake, redactor: Redactor | None = None, timeout: float = 5) -> OpenBao:
    return OpenBao(BaoSettings(address(fake), TokenLogin(TOKEN), timeout=timeout), redactor or Redactor())


def always(status: int, content: object, **headers: str) -> Callable[..., Answer]:
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    return lambda *_: (status, {"Content-Type": "application/json", **headers}, data)


MOUNT = {"data": {"type": "kv", "options": {"version": "2"}}}


def everything_of(error: BaseException) -> str:
    """All that could be printed of an error: each link of its chain, its attributes, every frame with its locals."""
    parts: list[str] = []
    seen: BaseException | None = error
    while seen is not None:
        parts += [str(seen), repr(seen), repr(seen.args), repr(vars(seen))]
        seen = seen.__cause__ or seen.__context__
    parts += traceback.TracebackException.from_exception(error, capture_locals=True).format()
    return "\n".join(parts)


@pytest.mark.parametrize("status", [500, 502, 504])
def test_a_failing_server_is_told_with_its_reason(fake: Fake, status: int) -> None:
    fake.answer = always(status, {"errors": ["disk\nbroken"]})
    with pytest.raises(VaultError, match=f"HTTP {status} on .*: disk broken") as caught:
        opened(fake).read(PATH)
    assert caught.value.exit_code is ExitCode.FAILED


def test_a_sealed_server_is_told_apart_from_one_that_is_overloaded(fake: Fake) -> None:
    fake.answer = always(503, {"errors": ["Vault is sealed"]})
    with pytest.raises(VaultSealed):
        opened(fake).check()
    fake.answer = always(503, {"errors": ["too busy"]})
    with pytest.raises(VaultError, match="HTTP 503") as caught:
        opened(fake).check()
    assert not isinstance(caught.value, VaultSealed)


def test_a_login_at_a_sealed_server_says_sealed(fake: Fake) -> None:
    fake.answer = always(503, {"errors": ["Vault is sealed"]})
    with pytest.raises(VaultSealed):
        OpenBao(BaoSettings(address(fake), AppRoleLogin(ROLE_ID, SECRET_ID)), Redactor()).check()


@pytest.mark.parametrize("status", [200, 404, 502])
@pytest.mark.parametrize("content", [b"<html>of a gateway</html>", b"[1]", b'"text"', b'{"cut":', b"[" * 200_000])
def test_what_is_no_json_object_is_told_as_another_service(fake: Fake, status: int, content: bytes) -> None:
    fake.answer = always(status, content)
    with pytest.raises(VaultUnanswered, match="not its JSON") as caught:
        opened(fake).read(PATH)
    assert "vault.address" in (caught.value.hint or "")
    assert "of a gateway" not in str(caught.value)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"data": None},
        {"data": {"data": {"a": "b"}}},
        {"data": {"data": {"a": "b"}, "metadata": {"version": "2"}}},
        {"data": {"data": {"a": "b"}, "metadata": []}},
        {"data": [], "errors": "x"},
    ],
)
def test_an_answer_of_another_shape_is_an_error_and_not_a_crash(fake: Fake, body: dict[str, object]) -> None:
    def answer(method: str, path: str, headers: dict[str, str], content: bytes) -> Answer:
        return 200, {"Content-Type": "application/json"}, json.dumps(MOUNT if "mounts" in path else body).encode()

    fake.answer = answer
    asks: tuple[Callable[[], object], ...] = (
        lambda: opened(fake).read(PATH),
        lambda: opened(fake).write(PATH, {"token": VALUE}, cas=0),
        lambda: HostRoles(opened(fake)).wrap_secret_id(HostName("h")),
    )
    for ask in asks:
        with pytest.raises(VaultError):
            ask()


def test_a_redirect_is_not_followed_and_the_token_does_not_go_along(fake: Fake) -> None:
    elsewhere = Fake(("127.0.0.1", 0), Handler)
    elsewhere.asked, elsewhere.answer = [], always(200, MOUNT)
    thread = threading.Thread(target=elsewhere.serve_forever, args=(0.02,))
    thread.start()
    try:
        fake.answer = always(307, {}, Location=f"{address(elsewhere)}/v1/x")
        with pytest.raises(VaultUnanswered, match="which is not followed"):
            opened(fake).check()
    finally:
        elsewhere.shutdown()
        thread.join()
        elsewhere.server_close()
    assert elsewhere.asked == []


def test_a_server_that_does_not_answer_is_given_up_after_the_time_of_the_settings(fake: Fake) -> None:
    release = threading.Event()

    def answer(*_: object) -> None:
        release.wait(10)

    fake.answer = answer
    started = time.monotonic()
    try:
        with pytest.raises(VaultUnanswered, match=r"did not answer within 0\.3 s"):
            opened(fake, timeout=0.3).check()
    finally:
        release.set()
    assert time.monotonic() - started < 3


class Store:
    """A KV entry whose write is carried out, or not, and whose answer to it is lost."""

    def __init__(self, carried_out: bool, then: str = "ours") -> None:
        self.version, self.data = 0, dict[str, str]()
        self._carried_out, self._then = carried_out, then

    def __call__(self, method: str, path: str, _: dict[str, str], body: bytes) -> Answer | None:
        kind = {"Content-Type": "application/json"}
        if "mounts" in path:
            return 200, kind, json.dumps(MOUNT).encode()
        if method == "GET":
            if self._then == "lost":
                return None
            if not self.version:
                return 404, kind, b'{"errors":[]}'
            found = {"data": {"data": self.data, "metadata": {"version": self.version}}}
            return 200, kind, json.dumps(found).encode()
        if self._carried_out:
            self.version, self.data = 1, json.loads(body)["data"] if self._then != "theirs" else {"token": "theirs"}
        return None


def test_a_write_whose_answer_is_lost_is_looked_up_before_anything_is_said(fake: Fake) -> None:
    """Without an answer the write may have happened: then it counts; else nothing was written; else a race is lost."""
    fake.answer = Store(carried_out=True)
    assert opened(fake).write(PATH, {"token": VALUE}, cas=0) == 1
    fake.answer = Store(carried_out=False)
    with pytest.raises(VaultError, match="nothing was written to"):
        opened(fake).write(PATH, {"token": VALUE}, cas=0)
    fake.answer = Store(carried_out=True, then="theirs")
    with pytest.raises(VaultError, match="somebody else changed"):
        opened(fake).write(PATH, {"token": VALUE}, cas=0)
    fake.answer = Store(carried_out=True, then="lost")
    with pytest.raises(VaultUnanswered, match="could not be read"):
        opened(fake).write(PATH, {"token": VALUE}, cas=0)


# -- leaks ----------------------------------------------------------------------------------------------------


def echo(method: str, path: str, headers: dict[str, str], body: bytes) -> Answer:
    """A server that gives back all it was sent, as an error."""
    text = json.dumps(headers) + body.decode()
    return 400, {"Content-Type": "application/json"}, json.dumps({"errors": [text, json.dumps(text)]}).encode()


def garbage(method: str, path: str, headers: dict[str, str], body: bytes) -> Answer:
    return 200, {"Content-Type": "text/" + headers.get("X-Vault-Token", "x")}, body + json.dumps(headers).encode()


def away(method: str, path: str, headers: dict[str, str], body: bytes) -> Answer:
    return 307, {"Location": "http://x/" + headers.get("X-Vault-Token", "")}, b""


def closed(*_: object) -> None:
    return None


FAULTS: dict[str, Callable[[str, str, dict[str, str], bytes], Answer | None]] = {
    "echo": echo,
    "garbage": garbage,
    "redirect": away,
    "closed": closed,
    "denied": always(403, {"errors": ["permission denied"]}),
    "failing": always(500, {"errors": ["x"]}),
    "sealed": always(503, {"errors": ["Vault is sealed"]}),
    "lost race": always(400, {"errors": ["check-and-set parameter did not match the current version"]}),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("login", [TokenLogin(TOKEN), AppRoleLogin(ROLE_ID, SECRET_ID)], ids=["token", "approle"])
def test_no_error_leaks_a_secret_in_any_part_that_could_be_printed(
    fake: Fake, fault: str, login: TokenLogin | AppRoleLogin, caplog: pytest.LogCaptureFixture
) -> None:
    """Not its text, its attributes, its causes, nor the local variables of any frame it passed through."""
    caplog.set_level(logging.DEBUG)
    fake.answer = FAULTS[fault]
    bao = OpenBao(BaoSettings(address(fake), login, timeout=2), Redactor())
    roles = HostRoles(bao)
    asks: tuple[Callable[[], object], ...] = (
        bao.check,
        lambda: bao.read(PATH),
        lambda: bao.write(PATH, {"token": VALUE}, cas=0),
        lambda: bao.destroy(PATH, (1,)),
        lambda: roles.plan(HostName("nix-cache02")),
        lambda: roles.wrap_secret_id(HostName("nix-cache02")),
        lambda: roles.ours(HostName("nix-cache02")),
    )
    for ask in asks:
        with pytest.raises(NixopsError) as caught:
            ask()
        everything = everything_of(caught.value)
        assert not [s.reveal() for s in SECRETS if s.reveal() in everything]
    assert not [s.reveal() for s in SECRETS if s.reveal() in caplog.text]
    assert not [s.reveal() for s in SECRETS if s.reveal() in repr((bao, bao.client, bao.settings))]


def test_the_search_for_leaks_finds_one_where_there_is_one() -> None:
    """The test above can fail: a plain exception with the token in a local variable is found."""

    def leaking() -> None:
        token = TOKEN.reveal()
        raise VaultError("x" + token[:0])

    with pytest.raises(VaultError) as caught:
        leaking()
    assert TOKEN.reveal() in everything_of(caught.value)
