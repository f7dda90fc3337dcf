"""The client against the real docker-registry: basic and bearer login, TLS, manifests, blobs, an index, skopeo."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nixops.build.model import PushedSystem
from nixops.errors import HostFault, RegistryError
from nixops.inventory.building import Registry
from nixops.lab.registry import Auth, RegistryServer
from nixops.registry.client import RegistryClient
from nixops.registry.index import index_of, media_type_of
from nixops.registry.login import Login
from nixops.registry.manifest import OCI_INDEX, OCI_MANIFEST, Descriptor, Manifest, digest_of
from nixops.secret import Redactor, Secret
from nixops.values import ImageReference, System
from tests.unit.registry_server import CONFIG_TYPE, LAYER_TYPE, Sleeps, image_of

pytestmark = pytest.mark.registry

ABSENT = "sha256:" + "0" * 64


@pytest.fixture(scope="module", params=["basic", "token"])
def server(request: pytest.FixtureRequest) -> Iterator[RegistryServer]:
    auth: Auth = request.param
    with RegistryServer(auth=auth) as running:
        yield running


def client_of(
    server: RegistryServer, login: Login | None, *, redactor: Redactor | None = None, trusted: bool = True
) -> RegistryClient:
    return RegistryClient(
        server.name,
        settings=Registry(ca_file=str(server.ca_file) if trusted else None, timeout=10),
        login=lambda: login,
        redactor=redactor or Redactor(),
        base=Path("/"),
        sleep=Sleeps(),
    )


def right(server: RegistryServer) -> Login:
    return Login(server.user, server.password)


@pytest.fixture
def client(server: RegistryServer) -> Iterator[RegistryClient]:
    with client_of(server, right(server)) as opened:
        yield opened


@pytest.fixture
def repository(request: pytest.FixtureRequest) -> str:
    return "team/" + "".join(c if c.isalnum() else "-" for c in request.node.name.lower()).strip("-")[:60].strip("-")


def push_image(client: RegistryClient, repository: str, tag: str, architecture: str = "amd64") -> Manifest:
    """A small image, whose layer is a valid (empty) tar file."""
    layer = b"\0" * 10240
    config = json.dumps(
        {
            "architecture": architecture,
            "os": "linux",
            "config": {},
            "rootfs": {"type": "layers", "diff_ids": [digest_of(layer)]},
        }
    ).encode()
    body = image_of(
        Descriptor(CONFIG_TYPE, client.put_blob(repository, config), len(config)),
        Descriptor(LAYER_TYPE, client.put_blob(repository, layer), len(layer)),
    )
    client.put_manifest(repository, tag, body, OCI_MANIFEST)
    return Manifest.of(body, OCI_MANIFEST)


def test_what_is_pushed_is_there_by_tag_and_by_digest(client: RegistryClient, repository: str) -> None:
    """Proves put_blob, put_manifest, manifest, blob and complete on a registry that checks what it is given."""
    assert client.manifest(repository, "1") is None
    made = push_image(client, repository, "1")
    assert client.manifest(repository, "1") == made
    assert client.manifest(repository, made.digest) == made
    assert client.complete(repository, made) == ()
    assert made.config is not None
    config = json.loads(client.blob(repository, made.config.digest, 1000))
    assert config["architecture"] == "amd64"


def test_what_is_not_there_is_none_and_not_an_error(client: RegistryClient, repository: str) -> None:
    """Proves that an unknown tag, digest, blob and repository are told apart from a failure."""
    push_image(client, repository, "1")
    assert client.manifest(repository, "2") is None
    assert client.manifest(repository, ABSENT) is None
    assert not client.has_blob(repository, ABSENT)
    with pytest.raises(RegistryError, match="BLOB_UNKNOWN"):
        client.blob(repository, ABSENT, 10)


def test_a_manifest_whose_parts_are_absent_is_refused_and_the_tag_stays(
    client: RegistryClient, repository: str
) -> None:
    """Proves that the registry's refusal comes through in its own words, and that a failed put moves nothing."""
    made = push_image(client, repository, "1")
    broken = image_of(Descriptor(CONFIG_TYPE, ABSENT, 2))
    with pytest.raises(RegistryError, match="MANIFEST_BLOB_UNKNOWN") as caught:
        client.put_manifest(repository, "1", broken, OCI_MANIFEST)
    assert caught.value.hint
    assert client.manifest(repository, "1") == made


def test_a_registry_that_lost_a_blob_is_found_out(
    server: RegistryServer, client: RegistryClient, repository: str
) -> None:
    """Proves that complete() asks the registry for each blob, instead of believing that a manifest has its parts."""
    made = push_image(client, repository, "1")
    lost = made.layers[0].digest.removeprefix("sha256:")
    link = server.storage / f"docker/registry/v2/repositories/{repository}/_layers/sha256/{lost}/link"
    link.unlink()
    assert client.complete(repository, made) == (made.layers[0].digest,)


def test_an_index_names_each_system_and_is_taken_by_the_registry(client: RegistryClient, repository: str) -> None:
    """Proves that the registry takes the index, gives the same bytes back, and that what it names is there."""
    pushed = []
    for system, architecture in (("x86_64-linux", "amd64"), ("aarch64-linux", "arm64")):
        made = push_image(client, repository, architecture, architecture)
        reference = ImageReference(f"r.example.org/{repository}:{architecture}")
        pushed.append(PushedSystem(System(system), reference, made.digest, made.size, made.media_type, True, 0.1))
    body = index_of(pushed)
    digest = client.put_manifest(repository, "latest", body, media_type_of(body))
    found = client.manifest(repository, "latest")
    assert found is not None
    assert (found.digest, found.body, found.media_type, found.is_index) == (digest, body, OCI_INDEX, True)
    assert client.complete(repository, found) == ()
    assert [dict(one.platform or {}) for one in found.manifests] == [
        {"architecture": "arm64", "os": "linux"},
        {"architecture": "amd64", "os": "linux"},
    ]


def test_skopeo_logs_in_with_the_file_that_a_login_makes_and_sees_the_same_image(
    server: RegistryServer, client: RegistryClient, repository: str, tmp_path: Path
) -> None:
    """Proves Login.auth_file, the index and our digests with the tool that pushes on the builder."""
    made = push_image(client, repository, "amd64")
    pushed = PushedSystem(
        System("x86_64-linux"),
        server.reference(f"{repository}:amd64"),
        made.digest,
        made.size,
        made.media_type,
        True,
        0.1,
    )
    body = index_of([pushed])
    client.put_manifest(repository, "latest", body, media_type_of(body))
    auth, certificates = tmp_path / "auth.json", tmp_path / "certs"
    auth.write_text(right(server).auth_file(server.name).reveal())
    auth.chmod(0o600)
    certificates.mkdir()
    assert server.ca_file is not None
    (certificates / "ca.crt").write_bytes(server.ca_file.read_bytes())
    environ = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "REGISTRY_AUTH_FILE": str(auth)}
    skopeo = ["skopeo", "--insecure-policy", "--override-os", "linux", "--override-arch", "amd64"]
    source = f"docker://{server.reference(f'{repository}:latest')}"
    inspected = subprocess.run(
        [*skopeo, "inspect", "--raw", "--cert-dir", str(certificates), source],
        env=environ,
        capture_output=True,
        check=True,
    )
    assert inspected.stdout == body
    subprocess.run(
        [
            *skopeo,
            "copy",
            "--preserve-digests",
            "--src-cert-dir",
            str(certificates),
            source,
            f"oci:{tmp_path}/layout:x",
        ],
        env=environ,
        capture_output=True,
        check=True,
    )
    layout = json.loads((tmp_path / "layout/index.json").read_text())
    assert layout["manifests"][0]["digest"] == made.digest


# -- logins ---------------------------------------------------------------------------------------------------


def test_no_login_at_all_says_how_to_give_one(server: RegistryServer) -> None:
    """Proves the anonymous case: both kinds of registry end with the same hint."""
    with client_of(server, None) as client, pytest.raises(RegistryError, match="401") as caught:
        client.manifest("team/app", "1")
    assert f"docker login {server.name}" in str(caught.value.hint)


def test_a_wrong_password_names_the_user_and_is_not_repeated(server: RegistryServer) -> None:
    """Proves that a refused login is told as such, without the password, and is not tried again and again."""
    wrong = Secret("wrong-password-here")
    before = len(server.requests()) + len(server.token_requests())
    with (
        client_of(server, Login("somebody", wrong)) as client,
        pytest.raises(RegistryError, match="401") as caught,
    ):
        client.manifest("team/app", "1")
    assert "the login of somebody is wrong" in str(caught.value.hint)
    assert wrong.reveal() not in str(caught.value)
    assert len(server.requests()) + len(server.token_requests()) - before == 2


def test_the_login_stands_in_no_log_of_the_registry(server: RegistryServer, client: RegistryClient) -> None:
    """Proves that nothing of the login is in an address, which registries and proxies log."""
    push_image(client, "team/logged", "1")
    client.attach("team/logged", Descriptor(OCI_MANIFEST, ABSENT, 2), "text/plain", b"x")
    assert server.requests()
    log = server.log.read_text()
    assert server.password.reveal() not in log
    assert right(server).basic().reveal()[6:] not in log


def test_a_certificate_that_nobody_vouches_for_is_refused(server: RegistryServer) -> None:
    """Proves that TLS is checked, and that the error says how to trust an authority of one's own."""
    with client_of(server, right(server), trusted=False) as client, pytest.raises(RegistryError, match="TLS") as caught:
        client.manifest("team/app", "1")
    assert f"registries.{server.name}.ca_file" in str(caught.value.hint)


# -- bearer tokens --------------------------------------------------------------------------------------------


def test_one_token_serves_many_requests_and_a_push_needs_another() -> None:
    """Proves that tokens are cached by scope: two scopes, two tokens, however many requests."""
    with RegistryServer(auth="token") as server, client_of(server, right(server)) as client:
        for tag in ("1", "2"):
            push_image(client, "team/app", tag)
            assert client.manifest("team/app", tag) is not None
        assert [one.scopes for one in server.token_requests()] == [
            ("repository:team/app:pull",),
            ("repository:team/app:pull,push",),
        ]
        assert client.manifest("team/other", "1") is None
        assert server.token_requests()[-1].scopes == ("repository:team/other:pull",)


def test_a_token_that_ends_is_replaced_before_the_registry_refuses_it() -> None:
    """Proves the refresh with real tokens of two seconds: no request of the second round is refused."""
    with RegistryServer(auth="token", token_lifetime=2) as server, client_of(server, right(server)) as client:
        push_image(client, "team/app", "1")
        first = len(server.token_requests())
        time.sleep(2.1)
        refused = sum(one.status == 401 for one in server.requests())
        assert client.manifest("team/app", "1") is not None
        assert len(server.token_requests()) == first + 1
        assert sum(one.status == 401 for one in server.requests()) == refused


def test_an_identity_token_is_changed_for_tokens_that_push() -> None:
    """Proves the refresh_token grant against a server that takes nothing else for it."""
    with RegistryServer(auth="token") as server:
        login = Login("ci", server.identity_token, identity=True)
        with client_of(server, login) as client:
            made = push_image(client, "team/app", "1")
            assert client.manifest("team/app", "1") == made
        assert {one.grant for one in server.token_requests()} == {"refresh_token"}


def test_who_may_only_pull_is_told_so_when_pushing() -> None:
    """Proves an anonymous pull from a registry that allows it, and the error of an anonymous push to it."""
    with RegistryServer(auth="token", anonymous_pull=True) as server:
        with client_of(server, right(server)) as client:
            made = push_image(client, "team/app", "1")
        with client_of(server, None) as client:
            assert client.manifest("team/app", "1") == made
            with pytest.raises(RegistryError, match="401") as caught:
                client.put_manifest("team/app", "2", made.body, OCI_MANIFEST)
        assert "docker login" in str(caught.value.hint)
        assert server.tags("team/app") == ("1",)


# -- the server of the lab ------------------------------------------------------------------------------------


def test_a_registry_without_login_and_without_tls_is_used_as_the_inventory_says() -> None:
    """Proves ``tls: false``: plain HTTP, where the operator says so."""
    with (
        RegistryServer(auth="none", tls=False) as server,
        RegistryClient(
            server.name, settings=Registry(tls=False), login=lambda: None, redactor=Redactor(), base=Path("/")
        ) as client,
    ):
        assert push_image(client, "team/app", "1") == client.manifest("team/app", "1")


def test_a_registry_that_restarts_has_kept_everything_and_the_client_reconnects() -> None:
    """Proves that a connection that the registry closed is opened again without an error."""
    with RegistryServer() as server, client_of(server, right(server)) as client:
        made = push_image(client, "team/app", "1")
        server.restart()
        assert client.manifest("team/app", "1") == made


def test_a_registry_that_is_down_is_named_as_such() -> None:
    """Proves the error of a registry that went away in the middle."""
    with RegistryServer() as server, client_of(server, right(server)) as client:
        push_image(client, "team/app", "1")

        def ask() -> None:
            with pytest.raises(RegistryError, match="no connection to"):
                client.manifest("team/app", "1")

        server.restart(ask)
        assert client.manifest("team/app", "1") is not None


def test_a_registry_whose_port_is_taken_does_not_start_and_says_so() -> None:
    """Proves that the lab's server tells a failed start, with its log, instead of using another's port."""
    with (
        RegistryServer(auth="none") as first,
        pytest.raises(HostFault, match="does not start") as caught,
        RegistryServer(auth="none", port=first.port),
    ):
        pass
    assert "address already in use" in str(caught.value)
