"""Asking a binary cache: over real HTTP and TLS, with every fault that a server can have."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from nixops.errors import CacheIncomplete, Interrupted, UsageError
from nixops.lab.binarycache import BinaryCacheServer, CacheKeyPair, text_of
from nixops.nix.cache import BinaryCacheClient, ask_cache
from nixops.nix.narinfo import Narinfo, PublicKey, Verdict
from nixops.transport.exec import Cancellation, cancellable
from nixops.values import StorePath


def path(number: int, name: str = "x") -> StorePath:
    return StorePath(f"/nix/store/{number:032d}-{name}")


def info(number: int, *references: int) -> Narinfo:
    refs = tuple(path(n) for n in references)
    return Narinfo(path(number), f"nar/{number}.nar", "sha256:" + "0" * 52, 100, refs)


class Memory:
    """A source that is a dictionary: each path signed."""

    def __init__(self, key: CacheKeyPair, *infos: Narinfo) -> None:
        self.texts = {i.path.hash_part: text_of(i, (key.sign(i),)) for i in infos}

    def narinfo(self, hash_part: str) -> str | None:
        return self.texts.get(hash_part)

    def nar(self, name: str) -> bytes | None:
        raise AssertionError(f"nobody downloads {name}")


@pytest.fixture(scope="module")
def pair() -> CacheKeyPair:
    return CacheKeyPair.generate("cache-1")


@pytest.fixture(scope="module")
def keys(pair: CacheKeyPair) -> list[PublicKey]:
    return [PublicKey.parse(pair.public)]


def test_what_is_served_is_followed_to_everything_that_it_refers_to(pair: CacheKeyPair, keys: list[PublicKey]) -> None:
    """Also a reference that the caller did not know of; a reference to itself ends."""
    told: list[tuple[int, int]] = []
    with BinaryCacheServer(Memory(pair, info(1, 1, 2, 3), info(2, 4), info(4, 2))) as server:
        asked = ask_cache(server.url + "/", [path(1), path(2)], keys, on_answers=lambda n, bad: told.append((n, bad)))
    assert {a.path: a.verdict for a in asked} == {
        path(1): Verdict.SERVED,
        path(2): Verdict.SERVED,
        path(3): Verdict.MISSING,
        path(4): Verdict.SERVED,
    }
    assert next(a.detail for a in asked if a.path == path(3)) == "HTTP 404"
    assert told == [(2, 0), (4, 1)]
    assert len(server.requests) == 5


def test_what_another_signed_is_not_followed(pair: CacheKeyPair, keys: list[PublicKey]) -> None:
    """Or anybody on the way could send us on a walk without end."""
    other = CacheKeyPair.generate("other-1")
    with BinaryCacheServer(Memory(other, info(1, 2), info(2))) as server:
        (only,) = ask_cache(server.url, [path(1)], keys)
    assert (only.verdict, only.detail) == (Verdict.WRONG_KEY, "signed by other-1 only")


def test_every_fault_of_a_path_is_its_verdict(pair: CacheKeyPair, keys: list[PublicKey]) -> None:
    source = Memory(pair, *(info(n) for n in range(1, 8)))
    source.texts[path(3).hash_part] = "<html>welcome to the hotel</html>"
    source.texts[path(4).hash_part] = source.texts[path(1).hash_part]
    with BinaryCacheServer(source) as server, client(server.url, keys) as asking:
        server.hidden = {path(1).hash_part}
        server.unsigned = {path(2).hash_part}
        server.broken = {path(5).hash_part: 500, path(6).hash_part: 401, path(7).hash_part: 403}
        found = {a.path: (a.verdict, a.detail) for a in asking.closure([path(n) for n in range(1, 8)])}
        assert server.requests.count(f"/{path(5).hash_part}.narinfo") == 3
        assert server.requests.count(f"/{path(6).hash_part}.narinfo") == 1
    assert found == {
        path(1): (Verdict.MISSING, "HTTP 404"),
        path(2): (Verdict.UNSIGNED, "it has no signature"),
        path(3): (Verdict.MALFORMED, "it is cut off: its last line has no end"),
        path(4): (Verdict.MALFORMED, f"it is that of {path(1)}"),
        path(5): (Verdict.NO_ANSWER, "HTTP 500"),
        path(6): (Verdict.NO_ANSWER, "HTTP 401"),
        path(7): (Verdict.MISSING, "HTTP 403"),
    }


def test_a_server_that_stumbles_is_asked_again(pair: CacheKeyPair, keys: list[PublicKey]) -> None:
    """Twice 503 and then the path; the wait that it asks for is kept to, within bounds."""
    source = Memory(pair, info(1))
    answers = [
        b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\nRetry-After: 2\r\n\r\n",
        b"HTTP/1.1 429 Slower\r\nContent-Length: 0\r\nRetry-After: 99999\r\n\r\n",
        _ok(source.texts[path(1).hash_part].encode()),
    ]
    waits: list[float] = []
    with raw_server(answers) as url, BinaryCacheClient(url, keys, sleep=waits.append) as asking:
        assert asking.ask(path(1)).verdict is Verdict.SERVED
    assert waits == [2.0, 5.0]


def test_a_connection_that_breaks_in_the_middle_is_tried_again(pair: CacheKeyPair, keys: list[PublicKey]) -> None:
    whole = _ok(Memory(pair, info(1)).texts[path(1).hash_part].encode())
    with raw_server([whole[:-40], b"", whole]) as url, client(url, keys) as asking:
        assert asking.ask(path(1)).verdict is Verdict.SERVED


def test_a_cache_that_stops_answering_is_not_waited_for_path_by_path(keys: list[PublicKey]) -> None:
    """500 paths of a server that takes connections and says nothing end within seconds, each with a word."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        begin = time.monotonic()
        with BinaryCacheClient(url, keys, limit=8, timeout=0.3, sleep=lambda _: None) as asking:
            asked = asking.closure([path(n) for n in range(500)])
    assert time.monotonic() - begin < 10
    assert {a.verdict for a in asked} == {Verdict.NO_ANSWER} and len(asked) == 500
    assert {a.detail for a in asked} == {"no answer in time", "the cache had stopped answering, so it was not asked"}


def test_an_answer_without_end_is_bounded(keys: list[PublicKey]) -> None:
    endless = b"HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\n" + b"x" * (5 * 1024 * 1024)
    with raw_server([endless] * 3) as url, client(url, keys) as asking:
        asked = asking.ask(path(1))
    assert (asked.verdict, asked.detail) == (Verdict.NO_ANSWER, "the answer is longer than 4 MiB")


def test_an_answer_that_drips_is_given_up(keys: list[PublicKey]) -> None:
    """Each byte comes in time, the whole never does."""

    class Drip(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "99999999")
            self.end_headers()
            try:
                for _ in range(100):
                    self.wfile.write(b"x" * 65536)
                    time.sleep(0.1)
            except OSError:
                return

        def log_message(self, format: str, *args: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Drip)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_address[1]}"
        with BinaryCacheClient(url, keys, timeout=1.5, sleep=lambda _: None) as asking:
            begin = time.monotonic()
            assert "no complete answer" in asking.ask(path(1)).detail
            assert time.monotonic() - begin < 12
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("status", [b"200 OK", b"302 Go"])
def test_an_answer_that_comes_byte_by_byte_is_given_up_at_its_time(keys: list[PublicKey], status: bytes) -> None:
    """Each byte comes in time; no answer, nor the body of a redirect, holds us longer than its own time."""
    head = b"HTTP/1.1 %s\r\nLocation: /elsewhere\r\nContent-Length: 999\r\n\r\n" % status
    with socket.create_server(("127.0.0.1", 0)) as server:

        def drip(connection: socket.socket) -> None:
            with connection:
                try:
                    connection.recv(4096)
                    connection.sendall(head)
                    for _ in range(150):
                        connection.sendall(b"x")
                        time.sleep(0.1)
                except OSError:
                    return

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                threading.Thread(target=drip, args=(connection,), daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        with BinaryCacheClient(url, keys, timeout=1.5, sleep=lambda _: None) as asking:
            begin = time.monotonic()
            asked = asking.ask(path(1))
            assert time.monotonic() - begin < 12
    redirected = "it redirects in a circle"
    assert asked.detail == (redirected if b"302" in status else "no complete answer within 1.5 s")


def test_no_login_of_the_operators_goes_to_a_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: list[PublicKey]
) -> None:
    """Hosts have none of it: what it opens is not served to them. And over HTTP everybody on the way would read it."""
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login operator password correct-horse-battery\n")
    monkeypatch.setenv("NETRC", str(netrc))
    got: list[bytes] = []
    with raw_server([b"HTTP/1.1 401 No\r\nContent-Length: 0\r\n\r\n"], got) as url, client(url, keys) as asking:
        assert asking.ask(path(1)).detail == "HTTP 401"
    assert got and b"Authorization" not in got[0], got


def test_an_interrupt_ends_the_asking(pair: CacheKeyPair, keys: list[PublicKey]) -> None:
    switch = Cancellation()
    switch.cancel()
    with BinaryCacheServer(Memory(pair)) as server, client(server.url, keys) as asking:
        with cancellable(switch), pytest.raises(Interrupted):
            asking.closure([path(1)])
        assert server.requests == []


# -- is there a cache at all? ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n", "is no binary cache: HTTP 404 for nix-cache-info"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", "is no binary cache: nix-cache-info: it does not say"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 16\r\n\r\nStoreDir: /gnu/s", "for the store /gnu/s, not for /nix/store"),
        (b"HTTP/1.1 302 Go\r\nLocation: /nix-cache-info\r\nContent-Length: 0\r\n\r\n", "it redirects in a circle"),
        (b"SSH-2.0-OpenSSH_9.9\r\n", "does not answer: the connection broke"),
        (b"HTTP/1.1 502 No\r\nConnection: close\r\nContent-Length: 0\r\n\r\n", "does not answer: HTTP 502"),
    ],
)
def test_an_address_that_is_no_cache_is_told_as_such(keys: list[PublicKey], answer: bytes, words: str) -> None:
    with raw_server([answer] * 20) as url, client(url, keys) as asking, pytest.raises(CacheIncomplete) as caught:
        asking.look()
    assert words in str(caught.value)


def test_a_cache_that_is_not_there_is_told_with_the_reason(keys: list[PublicKey]) -> None:
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        for url, words in (
            (f"http://127.0.0.1:{unheard.getsockname()[1]}", "connection refused"),
            ("http://no-such-host.invalid", "its name does not resolve"),
        ):
            with pytest.raises(CacheIncomplete) as caught, client(url, keys) as asking:
                asking.look()
            assert f"the cache {url} does not answer: {words}" in str(caught.value)
            assert caught.value.exit_code == 1


def test_tls_is_verified_against_the_authority_of_the_inventory(
    tmp_path: Path, pair: CacheKeyPair, keys: list[PublicKey]
) -> None:
    with BinaryCacheServer(Memory(pair, info(1)), tls=tmp_path) as server:
        assert server.ca_file is not None and server.url.startswith("https://")
        assert [a.ok for a in ask_cache(server.url, [path(1)], keys, server.ca_file)] == [True]
        with pytest.raises(CacheIncomplete, match=r"its certificate is not trusted \(see cache.ca_file\)"):
            ask_cache(server.url, [path(1)], keys)


def test_a_ca_file_that_cannot_be_used_is_a_mistake_of_usage(tmp_path: Path, keys: list[PublicKey]) -> None:
    (tmp_path / "empty.pem").write_text("")
    for name in ("empty.pem", "absent.pem"):
        with pytest.raises(UsageError, match=r"cache.ca_file: .* cannot be used"):
            BinaryCacheClient("https://x.example.org", keys, ca_file=tmp_path / name)
    with pytest.raises(UsageError, match="no key"):
        BinaryCacheClient("https://x.example.org", [])


def test_many_paths_share_few_connections(pair: CacheKeyPair, keys: list[PublicKey]) -> None:
    """At most ``limit`` connections for 300 paths: they are kept open."""
    opened: set[object] = set()
    with BinaryCacheServer(Memory(pair, *(info(n) for n in range(300)))) as server:
        real: Callable[..., object] = server._server.process_request

        def note(request: socket.socket, address: object) -> None:
            opened.add(address)
            real(request, address)

        server._server.process_request = note  # type: ignore[assignment, method-assign]  # to count connections
        asked = ask_cache(server.url, [path(n) for n in range(300)], keys, limit=6)
    assert all(a.ok for a in asked)
    assert 1 <= len(opened) <= 6


# -- helpers --------------------------------------------------------------------------------------------------


def client(url: str, keys: list[PublicKey]) -> BinaryCacheClient:
    return BinaryCacheClient(url, keys, timeout=3.0, sleep=lambda _: None)


def _ok(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body


@contextmanager
def raw_server(answers: list[bytes], got: list[bytes] | None = None) -> Iterator[str]:
    """Answers one request on each connection with the next of ``answers``, and closes.

    It says so before: who is not told may still send the next request, and lose it.

    :param got: gets each request.
    """
    left = list(answers)
    listening = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while left:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            with connection:
                try:
                    request = connection.recv(65536)
                    if got is not None:
                        got.append(request)
                    connection.sendall(left.pop(0).replace(b"\r\n", b"\r\nConnection: close\r\n", 1))
                except OSError:
                    continue

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        thread.join(5)
