"""Bearer tokens: where the login goes for them, how long they are kept, and what a token server can do wrong."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from nixops.errors import RegistryError
from nixops.inventory.building import Registry
from nixops.registry.auth import Authenticator
from nixops.registry.http import Answer, RegistryHttp
from nixops.registry.login import Login
from nixops.secret import Redactor, Secret
from nixops.values import RegistryName
from tests.unit.registry_server import Fault, fake_registry, plain_client

LOGIN = Login("ci", Secret("correct-horse-battery"))
DIGEST = "sha256:" + "0" * 64
PULL = "repository:team/app:pull"


@dataclass
class Tokens:
    """A token server in the place of the HTTP client: what it is asked, and what it says."""

    tls: bool = True
    answers: list[tuple[int, Any]] = field(default_factory=list)
    asked: list[dict[str, Any]] = field(default_factory=list)
    now: float = 1000.0
    lifetime: Any = 300
    delay: float = 0.0

    def __post_init__(self) -> None:
        self.redactor = Redactor()
        real = RegistryHttp(
            RegistryName("r.example.org"),
            "r.example.org",
            tls=self.tls,
            ca_file=None,
            timeout=5,
            redactor=self.redactor,
        )
        real.send = self._send  # type: ignore[method-assign]  # the one way to the network
        self.login: Login | None = LOGIN
        self.auth = Authenticator(real, lambda: self.login, clock=lambda: self.now)

    def _send(self, method: str, url: str, **options: Any) -> Answer:
        time.sleep(self.delay)
        authorization = options.get("authorization")
        self.asked.append(
            {
                "method": method,
                "url": url.partition("?")[0],
                "fields": {k: v[0] for k, v in parse_qs(urlsplit(url).query).items()},
                "form": {k: v[0] for k, v in parse_qs((options.get("body") or b"").decode()).items()},
                "authorization": authorization.reveal() if authorization else None,
            }
        )
        default = (200, {"token": f"token-{len(self.asked)}", "expires_in": self.lifetime})
        status, document = self.answers.pop(0) if self.answers else default
        body = document if isinstance(document, bytes) else json.dumps(document).encode()
        return Answer(status, body, {}, f"{method} {url.partition('?')[0]}", url)

    def challenge(self, header: str, sent: Secret | None = None, scope: str = PULL) -> bool:
        answer = Answer(401, b"", {"www-authenticate": header}, "GET x", "https://r.example.org/x")
        return self.auth.challenged(answer, scope, sent)

    def bearer(self, scope: str = PULL) -> str:
        header = self.auth.header(scope)
        assert header is not None
        return header.reveal()


BEARER = 'Bearer realm="https://auth.example.org/token",service="registry"'


def test_nothing_is_sent_before_it_is_asked_for() -> None:
    tokens = Tokens()
    assert tokens.auth.header(PULL) is None
    assert tokens.asked == []


def test_a_token_is_asked_for_with_the_login_the_service_and_the_scope() -> None:
    tokens = Tokens()
    assert tokens.challenge(BEARER)
    assert tokens.bearer() == "Bearer token-1"
    (asked,) = tokens.asked
    assert asked["method"] == "GET"
    assert asked["url"] == "https://auth.example.org/token"
    assert asked["fields"] == {"service": "registry", "scope": PULL, "account": "ci"}
    assert asked["authorization"] == "Basic " + base64.b64encode(b"ci:correct-horse-battery").decode()


def test_a_realm_with_a_query_of_its_own_keeps_it() -> None:
    tokens = Tokens()
    tokens.challenge('Bearer realm="https://auth.example.org/token?tenant=7"')
    tokens.bearer()
    assert tokens.asked[0]["fields"] == {"tenant": "7", "scope": PULL, "account": "ci"}


def test_without_a_login_the_token_is_an_anonymous_one() -> None:
    tokens = Tokens()
    tokens.login = None
    tokens.challenge(BEARER)
    tokens.bearer()
    assert tokens.asked[0]["authorization"] is None
    assert "account" not in tokens.asked[0]["fields"]


def test_an_identity_token_goes_in_a_form_and_stands_in_no_address() -> None:
    tokens = Tokens(answers=[(200, {"access_token": "access", "expires_in": 60})])
    tokens.login = Login("ci", Secret("identity-token"), identity=True)
    tokens.challenge(BEARER)
    assert tokens.bearer() == "Bearer access"
    (asked,) = tokens.asked
    assert (asked["method"], asked["fields"], asked["authorization"]) == ("POST", {}, None)
    assert asked["form"] == {
        "grant_type": "refresh_token",
        "refresh_token": "identity-token",
        "client_id": "nixops",
        "service": "registry",
        "scope": PULL,
    }


def test_the_scope_that_the_registry_names_is_the_one_asked_for() -> None:
    tokens = Tokens()
    tokens.challenge(BEARER + ',scope="repository:mirror/team/app:pull"')
    tokens.bearer()
    assert tokens.asked[0]["fields"]["scope"] == "repository:mirror/team/app:pull"


def test_a_token_is_kept_for_its_scope_alone() -> None:
    tokens = Tokens()
    tokens.challenge(BEARER)
    push = "repository:team/app:pull,push"
    assert [tokens.bearer(), tokens.bearer(), tokens.bearer(push), tokens.bearer()] == [
        "Bearer token-1",
        "Bearer token-1",
        "Bearer token-2",
        "Bearer token-1",
    ]
    assert [one["fields"]["scope"] for one in tokens.asked] == [PULL, push]


@pytest.mark.parametrize(
    ("lifetime", "good", "old"),
    [
        (300, 289, 291),
        (20, 14, 16),
        (None, 49, 51),
        ("soon", 49, 51),
        (-5, 49, 51),
        (True, 49, 51),
        (1e12, 86000, 86400),
    ],
)
def test_a_token_is_replaced_shortly_before_its_end(lifetime: Any, good: float, old: float) -> None:
    tokens = Tokens(lifetime=lifetime)
    tokens.challenge(BEARER)
    tokens.bearer()
    tokens.now = 1000.0 + good
    assert tokens.bearer() == "Bearer token-1"
    tokens.now = 1000.0 + old
    assert tokens.bearer() == "Bearer token-2"


def test_a_token_that_the_registry_no_longer_takes_is_replaced_once_for_all_threads() -> None:
    tokens = Tokens(delay=0.05)
    tokens.challenge(BEARER)
    sent = Secret(tokens.bearer())
    got: list[str] = []

    def again() -> None:
        assert tokens.challenge(BEARER, sent)
        got.append(tokens.bearer())

    threads = [threading.Thread(target=again) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == ["Bearer token-2"] * 4
    assert len(tokens.asked) == 2


@pytest.mark.parametrize(
    "realm",
    [
        "http://auth.example.org/token",
        "ftp://auth.example.org/token",
        "/token",
        "auth.example.org",
        "https://",
        "https://[",
        "https://user@auth.example.org/token",
        "https://auth.example.org:port/token",
        "https://auth.example.org/token#x",
        "file:///etc/passwd",
    ],
)
def test_the_login_goes_to_no_token_server_without_tls_or_of_an_odd_address(realm: str) -> None:
    tokens = Tokens()
    tokens.challenge(f'Bearer realm="{realm}"')
    with pytest.raises(RegistryError, match="the login is not sent to"):
        tokens.bearer()
    assert tokens.asked == []


def test_a_registry_that_is_used_without_tls_may_have_a_token_server_without() -> None:
    tokens = Tokens(tls=False)
    tokens.challenge('Bearer realm="http://auth.example.org/token"')
    assert tokens.bearer() == "Bearer token-1"


@pytest.mark.parametrize(
    "body",
    [b"<html>", b"[]", b"{}", b"[" * 100_000, {"token": ""}, {"token": 5}, {"token": "a b"}, {"token": "a\r\nX: y"}],
)
def test_an_answer_without_a_token_is_an_error_that_does_not_quote_it(body: Any) -> None:
    tokens = Tokens(answers=[(200, body)])
    tokens.challenge(BEARER)
    with pytest.raises(RegistryError, match="holds no token") as caught:
        tokens.bearer()
    assert "X: y" not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "login", "hint"),
    [
        (401, LOGIN, "the login of ci is wrong"),
        (401, None, "docker login r.example.org"),
        (403, LOGIN, "ci may not have a token for that"),
        (503, LOGIN, "fault is on the registry's side"),
    ],
)
def test_a_refusal_of_the_token_server_names_the_scope_and_what_to_do(
    status: int, login: Login | None, hint: str
) -> None:
    tokens = Tokens(answers=[(status, {"details": "not correct-horse-battery"})])
    tokens.login = login
    if login is None:
        tokens.redactor.add(LOGIN.password)
    tokens.challenge(BEARER)
    with pytest.raises(RegistryError) as caught:
        tokens.bearer()
    assert PULL in caught.value.message
    assert "not ***" in caught.value.message
    assert hint in str(caught.value.hint)


def test_the_token_is_known_to_the_redactor_and_so_is_the_password() -> None:
    tokens = Tokens(answers=[(200, {"token": "a-bearer-token"})])
    tokens.challenge(BEARER)
    tokens.bearer()
    assert tokens.redactor.clean("a-bearer-token correct-horse-battery") == "*** ***"


def test_bearer_is_preferred_where_both_are_offered() -> None:
    tokens = Tokens()
    tokens.challenge(f'Basic realm="x", {BEARER}')
    assert tokens.bearer() == "Bearer token-1"


def test_a_token_that_is_never_taken_ends_after_a_bounded_number_of_requests() -> None:
    challenge = {"WWW-Authenticate": 'Bearer realm="%s/token",service="x"'}
    with fake_registry() as registry, plain_client(registry.name, LOGIN) as client:
        headers = {"WWW-Authenticate": challenge["WWW-Authenticate"] % registry.url}
        registry.faults.append(Fault("GET", "manifests", status=401, headers=headers, times=100))
        registry.faults.append(Fault("GET", "token", status=200, body=b'{"token":"useless-token"}', times=100))
        with pytest.raises(RegistryError, match="401"):
            client.manifest("team/app", "1")
        assert registry.asked("GET", "manifests") == 3
        assert registry.asked("GET", "token") == 2


@pytest.fixture
def elsewhere() -> Iterator[Any]:
    with fake_registry() as running:
        yield running


def test_a_token_server_that_redirects_gets_no_login_sent_elsewhere(elsewhere: Any) -> None:
    with fake_registry() as registry, plain_client(registry.name, LOGIN) as client:
        bearer = {"WWW-Authenticate": f'Bearer realm="{registry.url}/token"'}
        registry.faults.append(Fault("GET", "manifests", status=401, headers=bearer, times=100))
        away = {"Location": f"{elsewhere.url}/token"}
        registry.faults.append(Fault("GET", "token", status=302, headers=away, times=100))
        with pytest.raises(RegistryError, match="302"):
            client.manifest("team/app", "1")
    assert elsewhere.seen == []


def test_a_login_over_plain_http_is_only_sent_where_the_inventory_says_so(elsewhere: Any) -> None:
    from nixops.registry.client import RegistryClient

    elsewhere.basic = LOGIN.basic().reveal()
    with (
        RegistryClient(
            elsewhere.name, settings=Registry(), login=lambda: LOGIN, redactor=Redactor(), base=Path("/")
        ) as client,
        pytest.raises(RegistryError, match="TLS") as caught,
    ):
        client.manifest("team/app", "1")
    assert "tls: false" in str(caught.value.hint)
    assert elsewhere.seen == []
