"""Tokens of AWS for its registries: real boto3 over HTTP, against moto and a server whose answers a test chooses."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from nixops.errors import SecretUnavailable
from nixops.inventory.building import Registry
from nixops.lab.aws import AwsServer
from nixops.lab.registry import RegistryServer
from nixops.registry.client import RegistryClient
from nixops.registry.ecr import EcrName, ecr_login, ecr_name
from nixops.registry.logins import login_for
from nixops.secret import Redactor, Secret
from nixops.transport.local import LocalRunner
from nixops.values import RegistryName

ACCOUNT = "210987654321"
NAME = RegistryName(f"{ACCOUNT}.dkr.ecr.us-west-2.amazonaws.com")
TOKEN = "the-token-of-aws"


@pytest.fixture(scope="module")
def moto() -> Iterator[AwsServer]:
    with AwsServer() as running:
        yield running


@dataclass
class FakeAws:
    """Answers every request with one document; ``ago`` seconds is how late the machine thinks it is."""

    url: str = ""
    status: int = 200
    document: Any = None
    now: float = 0.0
    asked: list[dict[str, Any]] = field(default_factory=list)


@pytest.fixture
def fake() -> Iterator[FakeAws]:
    state = FakeAws(now=time.time())

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}")
            target, authorization = self.headers.get("X-Amz-Target", ""), self.headers.get("Authorization", "")
            state.asked.append({"body": body, "target": target, "authorization": authorization})
            answer = json.dumps(state.document).encode()
            self.send_response_only(state.status)
            self.send_header("Date", formatdate(state.now, usegmt=True))
            self.send_header("Content-Type", "application/x-amz-json-1.1")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: object) -> None:
            """Nothing on stderr."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield state
    server.shutdown()
    server.server_close()


def use(monkeypatch: pytest.MonkeyPatch, url: str, **more: str) -> None:
    """Make ``url`` all of AWS for boto3, with credentials that are made up."""
    for variable in ("AWS_PROFILE", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(variable, raising=False)
    settings = {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "AKIALABLABLABLABLAB0",
        "AWS_SECRET_ACCESS_KEY": "made-up",
        "AWS_CONFIG_FILE": "/dev/null",
        "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    for key, value in {**settings, **more}.items():
        monkeypatch.setenv(key, value)


def entry(
    life: float = 43200.0, *, account: str = ACCOUNT, now: float | None = None, token: str = TOKEN
) -> dict[str, Any]:
    return {
        "authorizationToken": base64.b64encode(f"AWS:{token}".encode()).decode(),
        "expiresAt": (time.time() if now is None else now) + life,
        "proxyEndpoint": f"https://{account}.dkr.ecr.us-west-2.amazonaws.com",
    }


def login_of(
    registry: RegistryName, settings: Registry | None, redactor: Redactor, **options: Any
) -> Callable[[], Any]:
    def never(ref: object) -> Secret:
        raise AssertionError("no reference is read")

    return login_for(
        registry,
        settings,
        environ={},
        base=Path("/"),
        resolve=never,
        local=LocalRunner(),
        redactor=redactor,
        **options,
    )


# -- names ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "found"),
    [
        (f"{ACCOUNT}.dkr.ecr.eu-central-1.amazonaws.com", EcrName(ACCOUNT, "eu-central-1")),
        (f"{ACCOUNT}.dkr.ecr.eu-central-1.amazonaws.com:443", EcrName(ACCOUNT, "eu-central-1")),
        (f"{ACCOUNT}.dkr.ecr.cn-north-1.amazonaws.com.cn", EcrName(ACCOUNT, "cn-north-1")),
        (f"{ACCOUNT}.dkr.ecr-fips.us-gov-west-1.amazonaws.com", EcrName(ACCOUNT, "us-gov-west-1", fips=True)),
        (f"{ACCOUNT}.dkr-ecr.us-east-1.on.aws", EcrName(ACCOUNT, "us-east-1")),
        (f"{ACCOUNT}.dkr-ecr-fips.us-east-1.on.aws", EcrName(ACCOUNT, "us-east-1", fips=True)),
        (f"{ACCOUNT}.dkr.ecr.us-iso-east-1.c2s.ic.gov", EcrName(ACCOUNT, "us-iso-east-1")),
        ("public.ecr.aws", EcrName(region="us-east-1", public=True)),
    ],
)
def test_the_name_of_a_registry_of_amazon_says_its_account_and_region(name: str, found: EcrName) -> None:
    """Proves the names of each partition, of the validated endpoints and of dual-stack ones."""
    assert ecr_name(RegistryName(name)) == found


@pytest.mark.parametrize(
    "name",
    [
        "registry.example.org",
        f"{ACCOUNT}.dkr.ecr.eu-central-1.amazonaws.com.example.org",
        f"evil.{ACCOUNT}.dkr.ecr.eu-central-1.amazonaws.com",
        f"{ACCOUNT}.dkr.ecr.eu-central-1.amazonaws.com:5000",
        f"{ACCOUNT}.dkr.ecr.eu-central-1.evilamazonaws.com",
        "12345.dkr.ecr.eu-central-1.amazonaws.com",
        "x.public.ecr.aws",
    ],
)
def test_a_name_that_only_looks_like_it_gets_no_token(name: str) -> None:
    """Proves that no token is made for a host that is not Amazon's."""
    assert ecr_name(RegistryName(name)) is None


# -- moto -----------------------------------------------------------------------------------------------------


def test_a_registry_of_amazon_gets_a_token_of_its_own_account(moto: AwsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves the call through real boto3: the account of the name, and no region of the environment needed."""
    use(monkeypatch, moto.url)
    login = ecr_login(NAME)
    assert login.user == "AWS"
    assert login.password == Secret(f"{ACCOUNT}-auth-token"), "moto's token names the account it is for"


@pytest.mark.registry
def test_a_token_of_aws_opens_a_real_registry(moto: AwsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves ``ecr: true`` from the inventory to a push: token from moto, basic login at docker-registry."""
    use(monkeypatch, moto.url, AWS_DEFAULT_REGION=moto.region)
    token = Secret("123456789012-auth-token")
    with RegistryServer(user="AWS", password=token) as server:
        redactor = Redactor()
        settings = Registry(ecr=True, ca_file=str(server.ca_file))
        login = login_of(server.name, settings, redactor)
        with RegistryClient(server.name, settings=settings, login=login, redactor=redactor, base=Path("/")) as client:
            client.put_blob("team/app", b"content")
            assert client.blob("team/app", client.put_blob("team/app", b"content"), 100) == b"content"
        assert redactor.clean(f"<{token.reveal()}>") == "<***>"
        assert [one.path for one in server.requests() if one.method == "POST"] == ["/v2/team/app/blobs/uploads/"]


def test_an_identity_that_may_not_have_a_token_is_told_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves a refusal by IAM itself, which moto decides."""
    with AwsServer() as aws:
        key, secret = aws.ask_permission()
        use(monkeypatch, aws.url, AWS_ACCESS_KEY_ID=key, AWS_SECRET_ACCESS_KEY=secret.reveal())
        with pytest.raises(SecretUnavailable, match="permission denied") as caught:
            ecr_login(NAME)
    assert "ecr:GetAuthorizationToken" in str(caught.value.hint)
    assert str(NAME) in str(caught.value)


# -- what moto does not do ------------------------------------------------------------------------------------


def test_the_request_is_signed_for_the_region_of_the_name(fake: FakeAws, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that the name's region wins over that of the environment, and that the account is asked for."""
    use(monkeypatch, fake.url, AWS_DEFAULT_REGION="eu-north-1")
    fake.document = {"authorizationData": [entry()]}
    assert ecr_login(NAME).password == Secret(TOKEN)
    (asked,) = fake.asked
    assert asked["body"] == {"registryIds": [ACCOUNT]}
    assert asked["target"].endswith(".GetAuthorizationToken")
    assert "/us-west-2/ecr/" in asked["authorization"]


@pytest.mark.parametrize(
    ("name", "endpoint"),
    [
        (f"{ACCOUNT}.dkr.ecr.us-east-1.amazonaws.com", ".ecr.us-east-1.amazonaws.com"),
        (f"{ACCOUNT}.dkr.ecr-fips.us-east-1.amazonaws.com", ".ecr-fips.us-east-1.amazonaws.com"),
        (f"{ACCOUNT}.dkr.ecr.cn-north-1.amazonaws.com.cn", ".ecr.cn-north-1.amazonaws.com.cn"),
        ("public.ecr.aws", ".ecr-public.us-east-1.amazonaws.com"),
    ],
)
def test_the_token_is_asked_for_where_the_registry_is(
    monkeypatch: pytest.MonkeyPatch, name: str, endpoint: str
) -> None:
    """Proves the endpoint that boto3 itself takes for each partition; the request is stopped before the network."""
    import botocore.awsrequest
    import botocore.httpsession

    asked: list[str] = []

    def stop(self: object, request: botocore.awsrequest.AWSPreparedRequest) -> None:
        asked.append(str(request.url))
        raise OSError("no network in this test")

    use(monkeypatch, "")
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    monkeypatch.setattr(botocore.httpsession.URLLib3Session, "send", stop)
    with pytest.raises(SecretUnavailable):
        ecr_login(RegistryName(name))
    assert asked
    assert all(url.endswith(f"{endpoint}/") for url in asked)


def test_the_public_registry_has_an_api_of_its_own(fake: FakeAws, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves ecr-public: another service, in its one region, with an answer of another shape."""
    use(monkeypatch, fake.url, AWS_DEFAULT_REGION="eu-north-1")
    one = entry()
    fake.document = {"authorizationData": {k: one[k] for k in ("authorizationToken", "expiresAt")}}
    login = ecr_login(RegistryName("public.ecr.aws"))
    assert (login.user, login.password) == ("AWS", Secret(TOKEN))
    assert "/us-east-1/ecr-public/" in fake.asked[0]["authorization"]
    assert fake.asked[0]["body"] == {}


def test_a_token_is_kept_for_the_run_and_replaced_before_it_ends(
    fake: FakeAws, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Proves the cache, and its bound by ``expiresAt``: an hour before the end of twelve."""
    use(monkeypatch, fake.url)
    fake.document = {"authorizationData": [entry()]}
    now = [time.time()]
    redactor = Redactor()
    login = login_of(NAME, None, redactor, clock=lambda: now[0])
    assert login() is login()
    now[0] += 10.9 * 3600
    assert login().password == Secret(TOKEN)
    assert len(fake.asked) == 1
    fake.document = {"authorizationData": [entry(token="the-next-token")]}
    now[0] += 0.2 * 3600
    assert login().password == Secret("the-next-token")
    assert len(fake.asked) == 2
    assert redactor.clean(f"{TOKEN} the-next-token") == "*** ***"


@pytest.mark.parametrize("off", [-86400.0, 86400.0])
def test_a_clock_that_is_wrong_here_does_not_shorten_or_lengthen_a_token(
    fake: FakeAws, monkeypatch: pytest.MonkeyPatch, off: float
) -> None:
    """Proves that a token's life counts from AWS's own date, by this machine's clock."""
    use(monkeypatch, fake.url)
    fake.document = {"authorizationData": [entry(3600, now=fake.now)]}
    here = fake.now + off
    expires = ecr_login(NAME, clock=lambda: here).expires
    assert expires is not None
    assert abs(expires - (here + 3600)) < 5


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"authorizationData": []},
        {"authorizationData": [{"authorizationToken": "hidden-secret!"}]},
        {"authorizationData": [{"authorizationToken": base64.b64encode(b"hidden-secret").decode()}]},
        {"authorizationData": [{"authorizationToken": base64.b64encode(b"AWS:").decode()}]},
        {"authorizationData": [{"authorizationToken": base64.b64encode(b"\xff\xfe:x").decode()}]},
        {"authorizationData": [{**entry(account="999999999999")}]},
        {"authorizationData": [{"proxyEndpoint": f"https://{NAME}"}]},
    ],
)
def test_an_answer_without_a_token_for_the_account_is_an_error_that_does_not_quote_it(
    fake: FakeAws, monkeypatch: pytest.MonkeyPatch, document: Any
) -> None:
    """Proves that a token of another account is not sent to this registry, and that no error holds one."""
    use(monkeypatch, fake.url)
    fake.document = document
    with pytest.raises(SecretUnavailable, match="holds none for its account") as caught:
        ecr_login(NAME)
    assert "hidden" not in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("code", "words", "hint"),
    [
        ("AccessDeniedException", "permission denied", "ecr:GetAuthorizationToken"),
        ("ExpiredTokenException", "have ended", "aws sso login"),
        ("UnrecognizedClientException", "are wrong", "aws sso login"),
        ("ServerException", "AWS gave ServerException", "documentation"),
    ],
)
def test_a_refusal_is_told_by_its_kind_and_never_in_awss_words(
    fake: FakeAws, monkeypatch: pytest.MonkeyPatch, code: str, words: str, hint: str
) -> None:
    """Proves that the text of an answer, which may repeat a request, stays out of the error."""
    use(monkeypatch, fake.url)
    fake.status, fake.document = 400, {"__type": code, "message": "hidden-secret"}
    with pytest.raises(SecretUnavailable, match=words) as caught:
        ecr_login(NAME)
    assert hint in str(caught.value.hint)
    assert "hidden" not in str(caught.value)


def test_the_public_registry_names_the_rights_of_its_own_api(fake: FakeAws, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves the hint for public.ecr.aws, which takes another right than a private registry."""
    use(monkeypatch, fake.url)
    fake.status, fake.document = 400, {"__type": "AccessDeniedException"}
    with pytest.raises(SecretUnavailable) as caught:
        ecr_login(RegistryName("public.ecr.aws"))
    assert "sts:GetServiceBearerToken" in str(caught.value.hint)


def test_without_credentials_it_says_how_to_log_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Proves the error of an operator with no AWS configuration at all, without a request to anybody."""
    use(monkeypatch, "http://127.0.0.1:9", HOME=str(tmp_path))
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(variable)
    with pytest.raises(SecretUnavailable, match="no AWS credentials") as caught:
        ecr_login(NAME)
    assert "aws sso login" in str(caught.value.hint)


def test_a_registry_under_a_name_of_ones_own_needs_a_region(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves ``ecr: true`` for a name that does not say its region, where nothing else says it."""
    use(monkeypatch, "http://127.0.0.1:9")
    with pytest.raises(SecretUnavailable, match="no AWS region"):
        ecr_login(RegistryName("registry.example.org"))


def test_an_endpoint_that_is_not_there_is_told_by_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves a network fault: one line, with what to look at."""
    use(monkeypatch, "http://127.0.0.1:9")
    with pytest.raises(SecretUnavailable, match="could not be asked") as caught:
        ecr_login(NAME)
    assert "network" in str(caught.value.hint)


def test_a_profile_that_is_not_there_is_told_by_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that a mistake in AWS_PROFILE is no traceback."""
    use(monkeypatch, "http://127.0.0.1:9", AWS_PROFILE="nobody")
    with pytest.raises(SecretUnavailable, match="ProfileNotFound"):
        ecr_login(NAME)
