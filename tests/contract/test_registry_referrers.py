"""Attaching statements to images: the fallback tag on a real registry, the API on one held to the specification."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from nixops.errors import RegistryError
from nixops.inventory.building import Registry
from nixops.lab.registry import RegistryServer
from nixops.registry.client import RegistryClient
from nixops.registry.login import Login
from nixops.registry.manifest import OCI_EMPTY, OCI_INDEX, OCI_MANIFEST, Descriptor, Manifest, canonical
from nixops.registry.referrers import fallback_tag
from nixops.secret import Redactor
from tests.unit.registry_server import FakeRegistry, Fault, fake_registry, image_of, plain_client

pytestmark = pytest.mark.registry

KIND = "application/vnd.in-toto+json"
TEAM = "team/app"


@pytest.fixture(scope="module")
def real() -> Iterator[RegistryServer]:
    with RegistryServer() as running:
        yield running


@pytest.fixture
def client(real: RegistryServer) -> Iterator[RegistryClient]:
    with RegistryClient(
        real.name,
        settings=Registry(ca_file=str(real.ca_file)),
        login=lambda: Login(real.user, real.password),
        redactor=Redactor(),
        base=Path("/"),
    ) as opened:
        yield opened


@pytest.fixture
def repository(request: pytest.FixtureRequest) -> str:
    return "team/" + str(request.node.name).replace("_", "-")[:80].strip("-")


def image(client: RegistryClient, repository: str, layer: bytes = b"layer") -> Manifest:
    body = image_of(
        Descriptor("x/y", client.put_blob(repository, b"{}"), 2),
        Descriptor("x/y", client.put_blob(repository, layer), len(layer)),
    )
    client.put_manifest(repository, "1", body, OCI_MANIFEST)
    return Manifest.of(body, OCI_MANIFEST)


# -- the real registry, which has no referrers API ------------------------------------------------------------


def test_a_statement_is_attached_by_the_fallback_tag(
    real: RegistryServer, client: RegistryClient, repository: str
) -> None:
    """Proves the whole way on docker-registry 2.8: subject and artifactType stay as they are, the tag lists it."""
    subject = image(client, repository)
    body = b'{"_type":"https://in-toto.io/Statement/v1"}'
    digest = client.attach(repository, subject, KIND, body, {"b": "2", "a": "1"})
    (found,) = client.referrers(repository, subject.digest)
    assert (found.digest, found.artifact_type, found.media_type) == (digest, KIND, OCI_MANIFEST)
    assert dict(found.annotations) == {"a": "1", "b": "2"}
    assert real.tags(repository) == ("1", subject.digest.replace(":", "-"))
    artifact = client.manifest(repository, digest)
    assert artifact is not None
    assert artifact.size == found.size
    assert artifact.subject == subject.descriptor
    assert artifact.artifact_type == KIND
    assert artifact.config is not None
    assert artifact.config.media_type == OCI_EMPTY
    assert client.blob(repository, artifact.layers[0].digest, 1000) == body
    index = client.manifest(repository, fallback_tag(subject.digest))
    assert index is not None
    assert index.media_type == OCI_INDEX


def test_the_same_statement_again_changes_nothing(
    real: RegistryServer, client: RegistryClient, repository: str
) -> None:
    """Proves that attaching is idempotent: the same digest, listed once, and the tag is not written again."""
    subject = image(client, repository)
    first = client.attach(repository, subject, KIND, b"{}", {"a": "1"})
    index = client.manifest(repository, fallback_tag(subject.digest))
    before = len(real.requests())
    assert client.attach(repository, subject.descriptor, KIND, b"{}", {"a": "1"}) == first
    assert client.manifest(repository, fallback_tag(subject.digest)) == index
    tag = f"/manifests/{fallback_tag(subject.digest)}"
    assert not [one for one in real.requests()[before:] if one.method == "PUT" and one.path.endswith(tag)]


def test_several_statements_stand_side_by_side_and_foreign_entries_stay(
    client: RegistryClient, repository: str
) -> None:
    """Proves read-modify-write: what another tool listed there is still there, with fields that we do not know."""
    subject = image(client, repository)
    other = image(client, repository + "", b"another layer")
    foreign: Mapping[str, Any] = {**other.descriptor.document(), "artifactType": "x/sbom", "data": "e30="}
    document = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [foreign], "annotations": {"kept": "yes"}}
    client.put_manifest(repository, fallback_tag(subject.digest), canonical(document), OCI_INDEX)
    first = client.attach(repository, subject, KIND, b"1")
    second = client.attach(repository, subject, "x/other", b"2", layer_type="text/plain")
    found = client.referrers(repository, subject.digest)
    assert [one.digest for one in found] == [other.digest, first, second]
    assert [one.artifact_type for one in found] == ["x/sbom", KIND, "x/other"]
    index = client.manifest(repository, fallback_tag(subject.digest))
    assert index is not None
    assert json.loads(index.body)["manifests"][0] == foreign
    assert index.parsed["annotations"] == {"kept": "yes"}
    artifact = client.manifest(repository, second)
    assert artifact is not None
    assert artifact.layers[0].media_type == "text/plain"


def test_a_write_of_the_tag_that_came_in_between_is_noticed_and_both_are_listed(
    real: RegistryServer, client: RegistryClient, repository: str
) -> None:
    """Proves read-modify-write: another client puts its own index over ours just after we wrote it."""
    subject = image(client, repository)
    other = image(client, repository, b"another layer")
    theirs = canonical({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [other.descriptor.document()]})
    waits: list[float] = []

    def overwrite(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 1:
            client.put_manifest(repository, fallback_tag(subject.digest), theirs, OCI_INDEX)

    with RegistryClient(
        real.name,
        settings=Registry(ca_file=str(real.ca_file)),
        login=lambda: Login(real.user, real.password),
        redactor=Redactor(),
        base=Path("/"),
        sleep=overwrite,
    ) as ours:
        made = ours.attach(repository, subject, KIND, b"{}")
    assert [one.digest for one in client.referrers(repository, subject.digest)] == [other.digest, made]
    assert len(waits) == 2


def test_threads_that_attach_at_once_are_all_listed(
    real: RegistryServer, client: RegistryClient, repository: str
) -> None:
    """Proves that one client's threads take turns: nobody's entry is overwritten, and none is written twice."""
    subject = image(client, repository)
    made: list[str] = []
    gate = threading.Barrier(4)

    def attach(number: int) -> None:
        gate.wait()
        made.append(client.attach(repository, subject, KIND, str(number).encode()))

    threads = [threading.Thread(target=attach, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(made)) == 4
    tag = f"/v2/{repository}/manifests/{fallback_tag(subject.digest)}"
    assert sum(one.method == "PUT" and one.path == tag for one in real.requests()) == 4
    assert {one.digest for one in client.referrers(repository, subject.digest)} == set(made)


def test_a_fallback_tag_that_is_an_image_is_left_alone(client: RegistryClient, repository: str) -> None:
    """Proves that a tag of that form which somebody gave to an image is not overwritten."""
    subject = image(client, repository)
    client.put_manifest(repository, fallback_tag(subject.digest), subject.body, OCI_MANIFEST)
    with pytest.raises(RegistryError, match="is not an index of referrers"):
        client.attach(repository, subject, KIND, b"{}")
    assert client.manifest(repository, fallback_tag(subject.digest)) == subject


def test_an_image_without_statements_has_none(client: RegistryClient, repository: str) -> None:
    """Proves the empty answer, of an image that is there and of one that is not."""
    subject = image(client, repository)
    assert client.referrers(repository, subject.digest) == ()
    assert client.referrers("team/never-made", subject.digest) == ()


# -- the referrers API ----------------------------------------------------------------------------------------


@pytest.fixture
def api() -> Iterator[FakeRegistry]:
    with fake_registry(page=2) as running:
        yield running


def held(registry: FakeRegistry) -> Manifest:
    return Manifest.of(registry.add_image("1")[1], OCI_MANIFEST)


def test_a_registry_with_the_api_lists_by_itself_and_no_tag_is_written(api: FakeRegistry) -> None:
    """Proves that OCI-Subject in the answer is believed, and the API asked, page after page."""
    subject = held(api)
    with plain_client(api.name) as client:
        made = [client.attach(TEAM, subject, KIND, str(n).encode()) for n in range(5)]
        found = client.referrers(TEAM, subject.digest)
    assert [one.digest for one in found] == made
    assert {one.artifact_type for one in found} == {KIND}
    assert list(api.tags) == ["1"]
    assert api.asked("GET", "/referrers/") == 3
    assert api.asked("GET", "/manifests/") == 0


def test_a_registry_that_lists_it_under_another_image_is_an_error(api: FakeRegistry) -> None:
    """Proves that OCI-Subject is compared with what was attached to."""
    subject = held(api)
    api.faults.append(Fault("PUT", "manifests", headers={"OCI-Subject": "sha256:" + "0" * 64}))
    with plain_client(api.name) as client, pytest.raises(RegistryError, match="another manifest"):
        client.attach(TEAM, subject, KIND, b"{}")


NO_API = [
    Fault("GET", "referrers", status=404, body=b"404 page not found"),
    Fault("GET", "referrers", status=405),
    Fault("GET", "referrers", status=303, headers={"Location": "https://example.org/"}),
    Fault("GET", "referrers", status=400, body=b'{"errors":[{"code":"UNSUPPORTED"}]}'),
    Fault("GET", "referrers", status=200, body=b"<html>", headers={"Content-Type": "text/html"}),
    Fault("GET", "referrers", status=200, body=b'{"mediaType":"x/y"}', headers={"Content-Type": "application/json"}),
]


@pytest.mark.parametrize("fault", NO_API, ids=lambda fault: f"{fault.status}-{fault.body[:8].decode()}")
def test_each_way_of_having_no_api_leads_to_the_fallback_tag(fault: Fault) -> None:
    """Proves that registries which say it differently are all read by the tag."""
    with fake_registry(referrers_api=False) as registry, plain_client(registry.name) as client:
        subject = held(registry)
        made = client.attach(TEAM, subject, KIND, b"{}")
        registry.faults.append(Fault(fault.method, fault.path, fault.status, fault.headers, fault.body))
        assert [one.digest for one in client.referrers(TEAM, subject.digest)] == [made]


@pytest.mark.parametrize("status", [403, 503])
def test_a_refusal_of_the_api_is_not_taken_for_its_absence(api: FakeRegistry, status: int) -> None:
    """Proves that a failing registry is an error, and not an empty list."""
    api.faults.append(Fault("GET", "referrers", status=status, times=100))
    with plain_client(api.name) as client, pytest.raises(RegistryError, match=str(status)):
        client.referrers(TEAM, held(api).digest)


def test_a_list_that_breaks_off_is_an_error(api: FakeRegistry) -> None:
    """Proves that half of the pages is never taken for all."""
    subject = held(api)
    with plain_client(api.name) as client:
        for n in range(3):
            client.attach(TEAM, subject, KIND, str(n).encode())
        api.faults.append(Fault("GET", "from=2", status=404))
        with pytest.raises(RegistryError, match="breaks off after 1 pages"):
            client.referrers(TEAM, subject.digest)


def test_a_list_without_end_is_an_error(api: FakeRegistry) -> None:
    """Proves the bound of the pages: a registry whose next page is always the same ends."""
    subject = held(api)
    endless = {"Link": '<?from=0>; rel="next"'}
    api.faults.append(Fault("GET", "referrers", headers=endless, times=1000))
    with plain_client(api.name) as client, pytest.raises(RegistryError, match="more than 100 pages"):
        client.referrers(TEAM, subject.digest)


def test_a_next_page_elsewhere_is_asked_of_the_registry_itself(api: FakeRegistry) -> None:
    """Proves that a Link to another host sends no request, and thus no login, there."""
    subject = held(api)
    with fake_registry() as other, plain_client(api.name) as client:
        away = {"Link": f'<{other.url}/v2/x/referrers/y?from=7>; rel="next"'}
        api.faults.append(Fault("GET", "referrers", headers=away))
        assert client.referrers(TEAM, subject.digest) == ()
        assert other.seen == []
        assert api.asked("GET", "from=7") == 1


def test_somebody_who_overwrites_the_tag_each_time_is_told_of() -> None:
    """Proves the bound of read-modify-write: when ours never stays, that is an error and not a success."""
    with fake_registry(referrers_api=False) as registry, plain_client(registry.name) as client:
        subject = held(registry)
        tag = fallback_tag(subject.digest)
        registry.faults.append(Fault("PUT", tag, status=201, times=100))
        with pytest.raises(RegistryError, match="somebody else wrote that tag"):
            client.attach(TEAM, subject, KIND, b"{}")
        assert registry.asked("PUT", tag) == 5
