"""What can go wrong between the client and a Forgejo: each is one clear error, and no secret gets out."""

from __future__ import annotations

import gzip
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from nixops.errors import ForgeError, UsageError
from nixops.forge.forgejo import Forgejo
from nixops.forge.http import ATTEMPTS
from nixops.inventory.model import Scope
from nixops.lab.certificates import server_certificate
from nixops.lab.forgejo_server import ForgejoServer
from nixops.secret import Redactor, Secret
from nixops.values import RepoName
from tests.unit.raw_server import raw_server

SCOPE = Scope(repository=RepoName("torjus/nixos"))


@pytest.fixture
def forge() -> Iterator[ForgejoServer]:
    with ForgejoServer(15) as server:
        server.add_user("torjus")
        server.add_repo("torjus/nixos")
        yield server


def client(server: ForgejoServer, *scopes: str, timeout: float = 5.0) -> Forgejo:
    token = server.add_token("torjus", scopes) if scopes else server.add_token("torjus")
    return Forgejo(server.url, token, redactor=Redactor(), timeout=timeout, sleep=lambda _: None)


def error_of(act: Any, *args: Any) -> ForgeError:
    with pytest.raises(ForgeError) as caught:
        act(*args)
    assert caught.value.hint, "an error says what to do next"
    return caught.value


@pytest.mark.parametrize("version", [9, 15])
def test_a_bad_token_is_named_and_not_repeated(version: int) -> None:
    with ForgejoServer(version) as server:
        server.add_user("torjus")
        server.add_repo("torjus/nixos")
        token = server.add_token("torjus")
        server.revoke_token(token)
        asking = Forgejo(server.url, token, redactor=Redactor())
        error = error_of(asking.registration_token, SCOPE)
        assert "refused with 401" in error.message
        assert "unknown or revoked" in str(error.hint)
        assert token.reveal() not in str(error), "Forgejo 15 echoes the token in its body"
        assert ("***" in str(error)) == (version >= 15)


def test_a_secret_at_the_cut_of_a_long_body_does_not_show_in_part(forge: ForgejoServer) -> None:
    asking = client(forge)
    token = forge.issued[-1].encode()
    forge.fault("/user", status=403, body=b"x" * 290 + token + b"y" * 500)
    error = error_of(asking.check_access, Scope(user="torjus"))
    assert "***" in error.message
    assert token[:6].decode() not in error.message
    assert len(error.message) < 500


@pytest.mark.parametrize(
    ("scopes", "act", "needed"),
    [
        (("read:user",), "registration_token", "read:repository"),
        (("read:repository",), "create_runner", "write:repository"),
        (("read:user",), "list_runners", "read:repository"),
    ],
)
def test_a_missing_token_scope_is_named(forge: ForgejoServer, scopes: tuple[str, ...], act: str, needed: str) -> None:
    asking = client(forge, *scopes)
    keys = {"name": "n"} if act == "create_runner" else {}
    with pytest.raises(ForgeError, match="refused with 403") as caught:
        getattr(asking, act)(SCOPE, **keys)
    assert f"a token with the scope {needed}" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (404, b'{"message": "The target couldn\'t be found.", "errors": ["no such user"]}', "no such user"),
        (422, b'{"message": "[Name]: Required"}', "[Name]: Required"),
        (500, b'{"message": "", "url": "x"}', "refused with 500"),
        (403, b"<html><h1>Blocked</h1></html>", "Blocked"),
        (418, b"\x1b[2Jteapot \xff", "teapot"),
    ],
)
def test_a_refusal_quotes_the_server(forge: ForgejoServer, status: int, body: bytes, said: str) -> None:
    forge.fault("/repos/", status=status, body=body)
    error = error_of(client(forge).check_access, SCOPE)
    assert said in str(error)
    assert f"refused with {status}" in error.message
    assert "\x1b" not in str(error)


def test_a_page_instead_of_json_points_at_the_address(forge: ForgejoServer) -> None:
    forge.fault("/version", status=200, body=b"<html>log in</html>", headers={"Content-Type": "text/html"})
    error = error_of(client(forge).version)
    assert "not JSON (text/html" in error.message
    assert "forge.url" in str(error.hint)


@pytest.mark.parametrize("status", [200, 403])
def test_json_that_is_nested_without_end_is_an_error_like_any_other(forge: ForgejoServer, status: int) -> None:
    forge.fault("/user$", status=status, body=b"[" * 200_000)
    assert len(str(error_of(client(forge).check_access, Scope(user="torjus")))) < 1000


@pytest.mark.parametrize("body", [b"{}", b"[]", b"null", b'{"version": 15}', b'"15.0.0"'])
def test_json_of_another_shape_is_an_error_without_the_value(forge: ForgejoServer, body: bytes) -> None:
    forge.fault("/version", status=200, body=body)
    assert "JSON of another shape" in error_of(client(forge).version).message


def test_a_credential_in_a_malformed_answer_is_not_shown(forge: ForgejoServer) -> None:
    forge.fault("/actions/runners$", method="POST", status=201, body=b'{"token": "s3cr3t-0f-the-runner", "id": "x"}')
    with pytest.raises(ForgeError) as caught:
        client(forge).create_runner(SCOPE, name="n")
    assert "s3cr3t" not in str(caught.value)
    assert "id" in caught.value.message


@pytest.mark.parametrize("fault", [{"status": 503}, {"status": 502}, {"status": 504}, {"drop": "before"}])
def test_a_passing_fault_of_a_read_is_tried_again(forge: ForgejoServer, fault: dict[str, Any]) -> None:
    forge.fault("/version", times=ATTEMPTS - 1, **fault)
    assert client(forge).version().major == 15
    assert len(forge.requests) == ATTEMPTS


def test_a_lasting_fault_ends_after_a_bounded_number_of_tries(forge: ForgejoServer) -> None:
    forge.fault("/version", status=503, times=99)
    waits: list[float] = []
    asking = Forgejo(forge.url, forge.add_token("torjus"), redactor=Redactor(), sleep=waits.append)
    assert "refused with 503" in error_of(asking.version).message
    assert len(forge.requests) == ATTEMPTS
    assert len(waits) == ATTEMPTS - 1
    assert 0 < sum(waits) < 10


@pytest.mark.parametrize("status", [400, 401, 404, 409, 422, 429, 500])
def test_what_will_not_pass_is_not_tried_again(forge: ForgejoServer, status: int) -> None:
    forge.fault("/repos/", status=status, times=99)
    error_of(client(forge).check_access, SCOPE)
    assert [r.status for r in forge.requests if "/repos/" in r.path] == [status]


def test_a_server_that_does_not_answer_is_given_up_in_time(forge: ForgejoServer) -> None:
    forge.fault("/version", delay=30)
    begun = time.monotonic()
    error = error_of(client(forge, timeout=0.4).version)
    assert "no complete answer within 0.4 s" in error.message
    assert time.monotonic() - begun < 5


@contextmanager
def raw_forge(*pieces: bytes, pause: float = 0.0, timeout: float = 5.0) -> Iterator[Forgejo]:
    """A client of a server that sends these pieces to each request, and then closes."""
    with raw_server(*pieces, pause=pause) as url:
        yield Forgejo(url, Secret("t" * 40), redactor=Redactor(), timeout=timeout, sleep=lambda _: None)


def test_a_server_that_drips_is_given_up_in_time() -> None:
    """Each byte comes in time, so only a deadline for the whole request ends this."""
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n"
    with raw_forge(head, *[b" "] * 100, pause=0.05, timeout=0.5) as asking:
        begun = time.monotonic()
        assert "no complete answer within 0.5 s" in error_of(asking.version).message
        assert time.monotonic() - begun < 3


VERSION = b'{"version": "15.0.3+gitea-1.22.0"}'


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nfff\r\n",
        b"",
        b"nothing of the kind\r\n\r\n",
    ],
)
def test_an_answer_that_is_cut_off_is_never_taken_for_whole(head: bytes) -> None:
    with raw_forge(head + (VERSION if head.endswith(b"\n") else b"")) as asking:
        assert "lost its connection before the answer was complete" in error_of(asking.version).message


def test_chunks_and_compression_are_understood() -> None:
    packed = gzip.compress(VERSION)
    chunks = [b"%x\r\n%s\r\n" % (len(part), part) for part in (packed[:9], packed[9:])]
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Encoding: gzip\r\n\r\n"
    with raw_forge(head, *chunks, b"0\r\n\r\n", pause=0.02) as asking:
        assert asking.version().major == 15


def test_a_server_that_is_down_is_named(forge: ForgejoServer) -> None:
    asking = client(forge)
    forge.stop()
    error = error_of(asking.version)
    assert f"no connection to {forge.url.removeprefix('http://')}" in error.message
    assert "Connection refused" in error.message


def test_an_unknown_name_is_named() -> None:
    asking = Forgejo("http://forge.invalid", Secret("t" * 40), redactor=Redactor(), sleep=lambda _: None)
    assert "the name forge.invalid is unknown" in error_of(asking.version).message


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_an_error_that_says_where_to_and_the_token_stays(forge: ForgejoServer, status: int) -> None:
    with ForgejoServer(15) as elsewhere:
        forge.fault("/repos/", status=status, headers={"Location": f"{elsewhere.url}/api/v1/repositories/7?x=y"})
        error = error_of(client(forge).check_access, SCOPE)
        assert f"redirected to {elsewhere.url}/api/v1/repositories/7;" in error.message
        assert elsewhere.requests == ()


@pytest.mark.parametrize(
    ("location", "said"),
    [
        ("http://[", "redirected to an address that cannot be read;"),
        ("//[::1", "redirected to an address that cannot be read;"),
        ("http://host:port/x", "redirected to http://host:port/x;"),
        ("https://somebody:pass-w0rd@elsewhere/x?signature=s1gned", "redirected to https://elsewhere/x;"),
        ("/moved", "redirected to {url}/moved;"),
        ("", "redirected to {url}/api/v1/version;"),
    ],
)
def test_where_a_redirect_points_is_told_and_not_evaluated(forge: ForgejoServer, location: str, said: str) -> None:
    forge.fault("/version", status=302, headers={"Location": location})
    error = error_of(client(forge).version)
    assert said.format(url=forge.url) in error.message
    assert "pass-w0rd" not in str(error) and "s1gned" not in str(error)


def test_the_body_of_a_redirect_is_bounded_as_any_other() -> None:
    head = b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 1000\r\n\r\n"
    with raw_forge(head, *[b" "] * 100, pause=0.05, timeout=0.5) as asking:
        begun = time.monotonic()
        assert "no complete answer within 0.5 s" in error_of(asking.version).message
        assert time.monotonic() - begun < 3


def test_the_users_netrc_does_not_replace_the_token(
    forge: ForgejoServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text("default login somebody password else\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    client(forge).check_access(SCOPE)


def test_a_server_below_a_path_is_asked_there(forge: ForgejoServer) -> None:
    asking = Forgejo(f"{forge.url}/git/", forge.add_token("torjus"), redactor=Redactor())
    error_of(asking.version)
    assert {r.path for r in forge.requests} == {"/git/api/v1/version"}


def test_an_authority_of_ones_own_is_trusted_by_its_file(tmp_path: Path) -> None:
    made = server_certificate(tmp_path, "127.0.0.1")
    with ForgejoServer(15, tls=(made.certificate_file, made.key_file)) as server:
        server.add_user("torjus")
        token = server.add_token("torjus")
        assert Forgejo(server.url, token, redactor=Redactor(), ca_file=made.ca_file).version().major == 15
        error = error_of(Forgejo(server.url, token, redactor=Redactor()).version)
        assert "TLS to" in error.message
        assert "forge.ca_file" in str(error.hint)
        assert len(server.requests) == 1


def test_an_authority_file_that_is_gone_during_a_run_is_an_error_like_any_other(tmp_path: Path) -> None:
    made = server_certificate(tmp_path, "127.0.0.1")
    with ForgejoServer(15, tls=(made.certificate_file, made.key_file)) as server:
        server.add_user("torjus")
        asking = Forgejo(server.url, server.add_token("torjus"), redactor=Redactor(), ca_file=made.ca_file)
        assert asking.version().major == 15
        made.ca_file.unlink()
        error = error_of(asking.check_access, Scope(user="torjus"))
    assert "could not be sent" in error.message and str(made.ca_file) in error.message
    assert "forge.ca_file" in str(error.hint)


@pytest.mark.parametrize(("content", "said"), [(None, "No such file"), ("no certificate\n", "PEM")])
def test_an_unusable_authority_file_is_a_usage_error(tmp_path: Path, content: str | None, said: str) -> None:
    file = tmp_path / "ca.pem"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UsageError, match=said):
        Forgejo("https://127.0.0.1:1", Secret("t" * 40), redactor=Redactor(), ca_file=file)


@pytest.mark.parametrize("value", ["", "abc\n", "a b", "t\u00f6ken", "a\r\nHost: x"])
def test_a_token_that_no_header_can_carry_is_a_usage_error(value: str) -> None:
    with pytest.raises(UsageError, match="Forgejo token") as caught:
        Forgejo("http://127.0.0.1:1", Secret(value), redactor=Redactor())
    assert not value or value not in str(caught.value)


def test_a_forgejo_that_requires_sign_in_for_everything_is_asked_with_the_token(forge: ForgejoServer) -> None:
    forge.fault("/version", status=403, body=b'{"message": "Only signed in user is allowed to call APIs."}')
    assert client(forge).version().major == 15
    assert len(forge.requests) == 2


def test_a_gitea_is_refused(forge: ForgejoServer) -> None:
    forge.fault("/version", status=200, body=b'{"version": "1.22.6"}')
    assert "Gitea" in error_of(client(forge).version).message
