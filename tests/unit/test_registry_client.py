"""What can go wrong between the client and a registry: each is one clear error, and no secret gets out."""

from __future__ import annotations

import gzip
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
import requests

from nixops.errors import Interrupted, RegistryError, UsageError
from nixops.inventory.building import Registry
from nixops.registry.client import RegistryClient
from nixops.registry.http import ATTEMPTS
from nixops.registry.login import Login
from nixops.registry.manifest import MANIFEST_LIMIT, OCI_MANIFEST, Descriptor, Manifest, digest_of
from nixops.secret import Redactor, Secret
from nixops.transport.exec import Cancellation, cancellable
from nixops.values import RegistryName
from tests.unit.registry_server import FakeRegistry, Fault, Sleeps, fake_registry, image_of, plain_client

PASSWORD = "correct-horse-battery"
LOGIN = Login("ci", Secret(PASSWORD))
DIGEST = "sha256:" + "0" * 64


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    with fake_registry() as running:
        yield running


@pytest.fixture
def sleep() -> Sleeps:
    return Sleeps()


@pytest.fixture
def client(registry: FakeRegistry, sleep: Sleeps) -> Iterator[RegistryClient]:
    with plain_client(registry.name, sleep=sleep) as opened:
        yield opened


def error_of(act: Callable[..., object], *args: Any, **options: Any) -> RegistryError:
    with pytest.raises(RegistryError) as caught:
        act(*args, **options)
    assert caught.value.hint, "an error says what to do next"
    return caught.value


# -- digests --------------------------------------------------------------------------------------------------


def test_a_manifest_that_the_registry_calls_by_another_digest_is_not_taken(
    registry: FakeRegistry, client: RegistryClient
) -> None:
    registry.add_image("1")
    registry.faults.append(Fault("GET", "manifests/1", headers={"Docker-Content-Digest": DIGEST}))
    assert DIGEST in error_of(client.manifest, "team/app", "1").message
    assert client.manifest("team/app", "1") is not None


def test_a_manifest_asked_for_by_digest_that_is_another_one_is_not_taken(
    registry: FakeRegistry, client: RegistryClient
) -> None:
    registry.add_image("1")
    other, body = registry.add_image("2", b"other")
    registry.manifests[DIGEST] = (body, OCI_MANIFEST)
    error = error_of(client.manifest, "team/app", DIGEST)
    assert other in error.message


def test_a_registry_that_calls_what_was_put_by_another_digest_is_an_error(
    registry: FakeRegistry, client: RegistryClient
) -> None:
    _, body = registry.add_image("1")
    registry.faults.append(Fault("PUT", "manifests", headers={"Docker-Content-Digest": DIGEST}))
    assert DIGEST in error_of(client.put_manifest, "team/app", "2", body, OCI_MANIFEST).message


def test_a_blob_that_was_altered_is_not_taken(registry: FakeRegistry, client: RegistryClient) -> None:
    blob = registry.add_blob(b"content")
    registry.blobs[blob.digest] = b"c0ntent"
    assert digest_of(b"c0ntent") in error_of(client.blob, "team/app", blob.digest, 100).message


def test_an_upload_that_arrived_as_another_digest_is_an_error(registry: FakeRegistry, client: RegistryClient) -> None:
    registry.faults.append(Fault("PUT", "uploads", headers={"Docker-Content-Digest": DIGEST}))
    assert DIGEST in error_of(client.put_blob, "team/app", b"content").message


# -- bounds ---------------------------------------------------------------------------------------------------


def test_a_manifest_larger_than_four_mebibytes_is_not_read_to_its_end(
    registry: FakeRegistry, client: RegistryClient
) -> None:
    registry.faults.append(Fault("GET", "manifests", status=200, body=b" " * (MANIFEST_LIMIT + 1)))
    assert str(MANIFEST_LIMIT) in error_of(client.manifest, "team/app", "1").message
    error_of(client.put_manifest, "team/app", "1", b" " * (MANIFEST_LIMIT + 1), OCI_MANIFEST)
    assert registry.asked("PUT") == 0


def test_a_small_body_that_unpacks_to_a_large_one_is_bounded_too(
    registry: FakeRegistry, client: RegistryClient
) -> None:
    body = gzip.compress(b" " * (MANIFEST_LIMIT + 1))
    headers = {"Content-Encoding": "gzip"}
    registry.faults.append(Fault("GET", "manifests", status=200, body=body, headers=headers))
    assert str(MANIFEST_LIMIT) in error_of(client.manifest, "team/app", "1").message


def test_bytes_are_asked_for_as_they_are_since_their_digest_counts(
    registry: FakeRegistry, client: RegistryClient
) -> None:
    client.has_blob("team/app", DIGEST)
    assert registry.seen[0].encodings == "identity"


def test_a_blob_above_its_limit_is_refused_and_one_at_it_is_not(registry: FakeRegistry, client: RegistryClient) -> None:
    blob = registry.add_blob(b"12345")
    assert client.blob("team/app", blob.digest, 5) == b"12345"
    assert "more than 4 bytes" in error_of(client.blob, "team/app", blob.digest, 4).message


@pytest.mark.parametrize("status", [302, 403])
def test_the_long_page_of_an_error_is_not_read_to_its_end_and_its_status_counts(
    registry: FakeRegistry, client: RegistryClient, status: int
) -> None:
    headers = {"Content-Length": str(1 << 40), "Location": "/v2/team/app/manifests/1"}
    registry.faults.append(
        Fault("GET", "manifests", status=status, headers=headers, body=b"x" * (1 << 20), cut=1 << 20)
    )
    registry.add_image("1")
    if status == 302:
        assert client.manifest("team/app", "1") is not None
    else:
        assert "403: xxx" in error_of(client.manifest, "team/app", "1").message


def test_a_refusal_that_is_longer_than_the_blob_asked_for_is_told_as_such(client: RegistryClient) -> None:
    assert "BLOB_UNKNOWN" in error_of(client.blob, "team/app", DIGEST, 1).message


# -- asking again ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [500, 502, 503, 504])
def test_a_passing_fault_of_the_registry_is_waited_out(
    registry: FakeRegistry, client: RegistryClient, sleep: Sleeps, status: int
) -> None:
    registry.add_image("1")
    registry.faults.append(Fault("GET", "manifests", status=status, times=2))
    assert client.manifest("team/app", "1") is not None
    assert len(sleep.slept) == 2
    assert registry.asked("GET") == 3


def test_a_fault_that_stays_is_told_after_a_bounded_number_of_times(
    registry: FakeRegistry, client: RegistryClient
) -> None:
    registry.faults.append(Fault("GET", "manifests", status=503, body=b"upstream is away", times=100))
    error = error_of(client.manifest, "team/app", "1")
    assert "503: upstream is away" in error.message
    assert registry.asked("GET") == ATTEMPTS


def test_a_connection_that_ends_is_tried_again(registry: FakeRegistry, client: RegistryClient) -> None:
    registry.add_image("1")
    registry.faults.append(Fault("GET", "manifests", status=0))
    assert client.manifest("team/app", "1") is not None


def test_half_a_body_is_never_taken_for_a_whole_one(registry: FakeRegistry, client: RegistryClient) -> None:
    registry.add_image("1")
    registry.faults.append(Fault("GET", "manifests", cut=20))
    assert client.manifest("team/app", "1") is not None
    registry.faults.append(Fault("GET", "manifests", cut=20, times=100))
    assert "lost its connection" in error_of(client.manifest, "team/app", "1").message


def test_an_upload_that_lost_its_answer_is_looked_for_and_not_sent_twice(
    registry: FakeRegistry, client: RegistryClient
) -> None:
    registry.faults.append(Fault("PUT", "uploads", status=0, carry_out=True))
    assert client.put_blob("team/app", b"content") == digest_of(b"content")
    assert registry.asked("PUT") == 1


def test_an_upload_that_failed_is_begun_again(registry: FakeRegistry, client: RegistryClient) -> None:
    registry.faults.append(Fault("POST", "uploads", status=0))
    registry.faults.append(Fault("PUT", "uploads", status=503))
    client.put_blob("team/app", b"content")
    assert registry.blobs[digest_of(b"content")] == b"content"
    assert registry.asked("POST") == 3


def test_an_upload_that_always_fails_ends(registry: FakeRegistry, client: RegistryClient) -> None:
    registry.faults.append(Fault("PUT", "uploads", status=503, times=100))
    assert "503" in error_of(client.put_blob, "team/app", b"content").message
    assert registry.asked("POST") == ATTEMPTS


def test_a_blob_that_is_there_is_not_uploaded(registry: FakeRegistry, client: RegistryClient) -> None:
    registry.add_blob(b"content")
    client.put_blob("team/app", b"content")
    assert registry.asked("POST") == 0


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_too_many_requests_waits_as_long_as_the_registry_asks(
    registry: FakeRegistry, client: RegistryClient, sleep: Sleeps, form: str
) -> None:
    registry.add_image("1")
    after = "7" if form == "seconds" else format_datetime(datetime.now(UTC) + timedelta(seconds=9), usegmt=True)
    registry.faults.append(Fault("GET", "manifests", status=429, headers={"Retry-After": after}))
    assert client.manifest("team/app", "1") is not None
    assert len(sleep.slept) == 1
    assert 5 <= sleep.slept[0] <= 9


def test_a_wait_that_is_too_long_is_an_error_at_once(
    registry: FakeRegistry, client: RegistryClient, sleep: Sleeps
) -> None:
    registry.faults.append(Fault("GET", "manifests", status=429, headers={"Retry-After": "3600"}, times=100))
    error = error_of(client.manifest, "team/app", "1")
    assert "429" in error.message
    assert "too many requests" in str(error.hint)
    assert sleep.slept == []


def test_a_retry_after_that_says_nothing_is_an_ordinary_wait(
    registry: FakeRegistry, client: RegistryClient, sleep: Sleeps
) -> None:
    registry.add_image("1")
    registry.faults.append(Fault("GET", "manifests", status=429, headers={"Retry-After": "soon"}))
    assert client.manifest("team/app", "1") is not None
    assert 0 < sleep.slept[0] < 1


def test_an_interrupted_task_asks_nothing_more(registry: FakeRegistry, client: RegistryClient) -> None:
    switch = Cancellation()
    switch.cancel()
    with cancellable(switch), pytest.raises(Interrupted):
        client.manifest("team/app", "1")
    assert registry.seen == []


# -- where the login goes -------------------------------------------------------------------------------------


def test_a_redirect_to_another_host_is_followed_without_the_login(registry: FakeRegistry) -> None:
    registry.basic = LOGIN.basic().reveal()
    with fake_registry() as other, plain_client(registry.name, LOGIN) as client:
        blob = other.add_blob(b"content")
        place = f"{other.url}/v2/x/blobs/{blob.digest}?X-Signature=abc"
        registry.faults.append(Fault("GET", "blobs", status=401, headers={"WWW-Authenticate": "Basic"}))
        registry.faults.append(Fault("GET", "blobs", status=307, headers={"Location": place}))
        assert client.blob("team/app", blob.digest, 100) == b"content"
        assert [one.authorization for one in registry.seen] == [None, LOGIN.basic().reveal()]
        assert [one.authorization for one in other.seen] == [None]


def test_a_redirect_at_the_same_host_keeps_the_login(registry: FakeRegistry) -> None:
    registry.basic = LOGIN.basic().reveal()
    digest, _ = registry.add_image("1")
    place = f"/v2/team/app/manifests/{digest}"
    with plain_client(registry.name, LOGIN) as client:
        client.has_blob("team/app", DIGEST)
        registry.faults.append(Fault("GET", "manifests/1", status=302, headers={"Location": place}))
        assert client.manifest("team/app", "1") is not None


@pytest.mark.parametrize("place", ["ftp://127.0.0.1/x", "http://[", "http://a:b@127.0.0.1/", "http://h:port/", ""])
def test_a_redirect_to_nowhere_of_use_is_an_error(registry: FakeRegistry, client: RegistryClient, place: str) -> None:
    registry.faults.append(Fault("GET", "blobs", status=307, headers={"Location": place}, times=20))
    assert "redirected" in error_of(client.blob, "team/app", DIGEST, 10).message


def test_an_answer_that_redirects_a_push_is_an_error_that_names_the_place(
    registry: FakeRegistry, client: RegistryClient
) -> None:
    place = "https://registry.example.org/v2/x?signature=hidden-signature"
    registry.faults.append(Fault("PUT", "manifests", status=308, headers={"Location": place}))
    error = error_of(client.put_manifest, "team/app", "1", image_of(registry.add_blob(b"c")), OCI_MANIFEST)
    assert "https://registry.example.org/v2/x" in error.message
    assert "hidden-signature" not in str(error)


def test_an_address_that_cannot_be_asked_is_not_quoted_whole(
    registry: FakeRegistry, client: RegistryClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some versions of urllib3 repeat it in their words, and a pre-signed address is as good as a password."""
    place = f"http://a b.example.org/upload?X-Signature={PASSWORD}"

    real = requests.models.PreparedRequest.prepare_url

    def prepare(self: requests.PreparedRequest, url: str, params: Any) -> None:
        if "X-Signature" in url:
            raise requests.exceptions.InvalidURL(f"Failed to parse: {url}")
        real(self, url, params)

    monkeypatch.setattr(requests.models.PreparedRequest, "prepare_url", prepare)
    registry.faults.append(Fault("POST", "uploads", status=202, headers={"Location": place}))
    error = error_of(client.put_blob, "team/app", b"content")
    assert "http://a b.example.org/upload could not be sent" in error.message
    assert PASSWORD not in str(error)


def test_an_upload_to_another_host_has_no_login(registry: FakeRegistry) -> None:
    registry.basic = LOGIN.basic().reveal()
    with fake_registry() as other, plain_client(registry.name, LOGIN) as client:
        client.has_blob("team/app", DIGEST)
        place = f"{other.url}/v2/team/app/blobs/uploads/7?sig=abc"
        registry.faults.append(Fault("POST", "uploads", status=202, headers={"Location": place}))
        client.put_blob("team/app", b"content")
        assert other.blobs[digest_of(b"content")] == b"content"
        assert [one.authorization for one in other.seen] == [None]


@pytest.mark.parametrize("place", [None, "ftp://127.0.0.1/x", "http://[::1"])
def test_an_upload_that_is_sent_nowhere_of_use_is_an_error(
    registry: FakeRegistry, client: RegistryClient, place: str | None
) -> None:
    headers = {} if place is None else {"Location": place}
    registry.faults.append(Fault("POST", "uploads", status=202, headers=headers))
    assert "no place for the upload" in error_of(client.put_blob, "team/app", b"content").message


def test_a_netrc_file_of_the_operator_is_not_used(
    registry: FakeRegistry, client: RegistryClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login someone password else\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    client.has_blob("team/app", DIGEST)
    assert registry.seen[0].authorization is None


# -- refusals -------------------------------------------------------------------------------------------------


def test_no_login_where_one_is_needed_says_how_to_give_one(registry: FakeRegistry, client: RegistryClient) -> None:
    registry.basic = LOGIN.basic().reveal()
    error = error_of(client.manifest, "team/app", "1")
    assert "401" in error.message
    assert f"docker login {registry.name}" in str(error.hint)
    assert f"registries.{registry.name}" in str(error.hint)
    assert registry.asked("GET") == 1, "without a login there is nothing to ask again with"


def test_a_wrong_login_is_named_by_its_user_and_sent_once(registry: FakeRegistry) -> None:
    registry.basic = "Basic other"
    with plain_client(registry.name, LOGIN) as client:
        error = error_of(client.manifest, "team/app", "1")
    assert "the login of ci is wrong" in str(error.hint)
    assert registry.asked("GET") == 2
    assert PASSWORD not in str(error)


def test_a_login_that_was_refreshed_in_between_is_sent_again(registry: FakeRegistry) -> None:
    registry.add_image("1")
    logins = [Login("ci", Secret(f"password-{n}")) for n in range(3)]
    registry.basic = logins[2].basic().reveal()
    giving = iter([*logins, logins[2]])
    with RegistryClient(
        registry.name,
        settings=Registry(tls=False),
        login=lambda: next(giving),
        redactor=Redactor(),
        base=Path("/"),
    ) as client:
        assert client.manifest("team/app", "1") is not None


@pytest.mark.parametrize(
    ("status", "body", "words", "hint"),
    [
        (
            403,
            b'{"errors":[{"code":"DENIED","message":"no"}]}',
            "DENIED: no",
            "an anonymous user may not push to team/app",
        ),
        (404, b'{"errors":[{"code":"NAME_UNKNOWN"}]}', "NAME_UNKNOWN", "is there such a repository"),
        (413, b"<html>", "413", "raise its limit"),
        (
            400,
            b'{"errors":[{"code":"MANIFEST_INVALID","message":"bad\x1b[2J"}]}',
            "MANIFEST_INVALID",
            "does not let us",
        ),
        (507, b"\xff\xfe", "507", "fault is on the registry's side"),
        (418, b'{"message":"teapot"}', "teapot", "does not let us"),
        (403, b"[]", "403", "may not push"),
    ],
)
def test_a_refusal_is_told_with_the_registrys_own_words_and_what_to_do(
    registry: FakeRegistry, client: RegistryClient, status: int, body: bytes, words: str, hint: str
) -> None:
    registry.faults.append(Fault("PUT", "manifests", status=status, body=body))
    error = error_of(client.put_manifest, "team/app", "1", image_of(registry.add_blob(b"c")), OCI_MANIFEST)
    assert words in error.message
    assert hint in str(error.hint)
    assert "\x1b" not in str(error)


def test_a_registry_that_repeats_the_password_is_not_quoted_with_it(registry: FakeRegistry) -> None:
    registry.basic = LOGIN.basic().reveal()
    header = LOGIN.basic().reveal().encode()
    with plain_client(registry.name, LOGIN) as client:
        client.has_blob("team/app", DIGEST)
        for said in (PASSWORD.encode(), header, b"x" * 290 + PASSWORD.encode() + b"y" * 300):
            registry.faults.append(Fault("GET", "manifests", status=403, body=said))
            error = error_of(client.manifest, "team/app", "1")
            assert "***" in error.message
            assert PASSWORD[:6] not in str(error)
            assert header.decode()[10:] not in str(error)
            assert len(error.message) < 500


@pytest.mark.parametrize("offered", ["", "Negotiate", 'Digest realm="x"', "Bearer", 'Bearer service="x"'])
def test_a_login_that_is_not_known_here_is_an_error(
    registry: FakeRegistry, client: RegistryClient, offered: str
) -> None:
    registry.faults.append(Fault("GET", "manifests", status=401, headers={"WWW-Authenticate": offered}))
    assert "no login that is known here" in error_of(client.manifest, "team/app", "1").message


def test_an_identity_token_is_no_password(registry: FakeRegistry) -> None:
    registry.basic = "Basic x"
    with plain_client(registry.name, Login("ci", Secret("identity-token"), identity=True)) as client:
        assert "identity token" in error_of(client.manifest, "team/app", "1").message
    assert [one.authorization for one in registry.seen] == [None]


# -- the network ----------------------------------------------------------------------------------------------


def test_a_registry_that_is_not_there_is_named(sleep: Sleeps) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        name = RegistryName(f"127.0.0.1:{unused.getsockname()[1]}")
        with plain_client(name, sleep=sleep) as client:
            error = error_of(client.manifest, "team/app", "1")
    assert f"no connection to {name}" in error.message
    assert len(sleep.slept) == ATTEMPTS - 1


def test_an_unknown_name_is_told_at_once(sleep: Sleeps) -> None:
    with plain_client(RegistryName("registry.invalid:5000"), sleep=sleep) as client:
        assert "unknown" in error_of(client.manifest, "team/app", "1").message
    assert sleep.slept == []


@pytest.mark.parametrize("name", ["a..b:1", "x.example.org:99999"])
def test_a_name_that_is_no_host_is_an_error_and_no_traceback(name: str) -> None:
    with plain_client(RegistryName(name)) as client:
        error_of(client.manifest, "team/app", "1")


def test_a_registry_that_does_not_answer_ends_with_the_timeout(registry: FakeRegistry) -> None:
    registry.faults.append(Fault("GET", "manifests", delay=3.0, times=5))
    began = time.monotonic()
    with plain_client(registry.name, timeout=0.3) as client:
        error = error_of(client.manifest, "team/app", "1")
    assert "within 0.3 s" in error.message
    assert f"registries.{registry.name}.timeout" in str(error.hint)
    assert time.monotonic() - began < 2


def test_a_body_that_drips_ends_with_the_timeout() -> None:
    ready = threading.Event()
    done = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def drip() -> None:
            ready.set()
            peer, _ = server.accept()
            with peer:
                peer.recv(65536)
                peer.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
                while not done.wait(0.05):
                    try:
                        peer.sendall(b"x")
                    except OSError:
                        return

        thread = threading.Thread(target=drip, daemon=True)
        thread.start()
        ready.wait()
        try:
            with plain_client(RegistryName(f"127.0.0.1:{server.getsockname()[1]}"), timeout=0.5) as client:
                assert "within 0.5 s" in error_of(client.blob, "team/app", DIGEST, 5000).message
        finally:
            done.set()
            thread.join()


def test_a_server_that_is_no_registry_is_an_error(registry: FakeRegistry, client: RegistryClient) -> None:
    page = {"Content-Type": "text/html"}
    registry.faults.append(Fault("GET", "manifests", status=200, body=b"<html>", headers=page))
    assert "not JSON" in error_of(client.manifest, "team/app", "1").message


@pytest.mark.parametrize("content", [None, "no certificate"])
def test_a_certificate_file_that_cannot_be_used_is_the_users_error(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "ca.pem").write_text(content)
    with pytest.raises(UsageError, match=r"registries\.r\.example\.org\.ca_file"):
        RegistryClient(
            RegistryName("r.example.org"),
            settings=Registry(ca_file="ca.pem"),
            login=lambda: None,
            redactor=Redactor(),
            base=tmp_path,
        )


# -- what is asked --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("repository", "reference"),
    [("../x", "1"), ("Team/app", "1"), ("a" * 256, "1"), ("", "1"), ("a/b", "../x"), ("a/b", "-x"), ("a/b", "1\n")],
)
def test_names_that_are_none_are_never_sent(
    registry: FakeRegistry, client: RegistryClient, repository: str, reference: str
) -> None:
    with pytest.raises(UsageError):
        client.manifest(repository, reference)
    with pytest.raises(UsageError):
        client.put_manifest(repository, reference, b"{}", OCI_MANIFEST)
    assert registry.seen == []


def test_a_manifest_put_under_a_digest_that_is_not_its_own_is_not_sent(
    registry: FakeRegistry, client: RegistryClient
) -> None:
    with pytest.raises(UsageError, match="another digest"):
        client.put_manifest("team/app", DIGEST, b"{}", OCI_MANIFEST)
    assert registry.seen == []


def test_a_complete_image_lacks_nothing_and_another_lacks_what_is_named(
    registry: FakeRegistry, client: RegistryClient
) -> None:
    registry.add_image("1")
    whole = client.manifest("team/app", "1")
    assert whole is not None
    assert client.complete("team/app", whole) == ()
    absent = [Descriptor("x/y", "sha256:" + f"{n:064x}", 1) for n in range(20)]
    elsewhere = Descriptor("x/y", "sha256:" + "f" * 64, 1, urls=("https://elsewhere/",))
    document = image_of(registry.add_blob(b"c"), *absent, *absent)
    broken = Manifest.of(document, OCI_MANIFEST)
    assert client.complete("team/app", broken) == tuple(one.digest for one in absent)
    with_urls = document.replace(
        b'"layers":[',
        b'"layers":[{"mediaType":"x/y","digest":"%s","size":1,"urls":["https://e/"]},' % elsewhere.digest.encode(),
    )
    assert elsewhere.digest not in client.complete("team/app", Manifest.of(with_urls, OCI_MANIFEST))


def test_blobs_are_asked_for_at_once(registry: FakeRegistry, client: RegistryClient) -> None:
    layers = [registry.add_blob(str(n).encode()) for n in range(9)]
    manifest = Manifest.of(image_of(*layers), OCI_MANIFEST)
    client.complete("team/app", manifest)
    # The first goes alone. The next are answered once five are in progress, for which they wait less than the client.
    together = threading.Barrier(5, timeout=4.0)
    registry.faults += [Fault("HEAD", "blobs"), Fault("HEAD", "blobs", together=together, times=5)]
    assert client.complete("team/app", manifest) == ()
    assert registry.faults[1].times == 0 and not together.broken


def test_a_name_at_docker_io_is_asked_for_where_docker_io_is(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def refuse(self: object, method: str, url: str, **options: object) -> None:
        asked.append(url)
        raise RegistryError("seen", hint="enough")

    monkeypatch.setattr("nixops.registry.http.RegistryHttp.send", refuse)
    with RegistryClient(
        RegistryName("docker.io"), settings=Registry(), login=lambda: None, redactor=Redactor(), base=Path("/")
    ) as client:
        for repository in ("alpine", "team/app"):
            error_of(client.manifest, repository, "1")
    assert asked == [
        "https://registry-1.docker.io/v2/library/alpine/manifests/1",
        "https://registry-1.docker.io/v2/team/app/manifests/1",
    ]
