"""`invoke build-image --push` against a real registry: staged, compared, indexed, and the tag last of all."""

from __future__ import annotations

import base64
import json
import subprocess
from pathlib import Path

import pytest

from nixops.errors import BuildFailed, PushFailed, RegistryError, UsageError
from nixops.lab.lab import Lab
from nixops.lab.registry import RegistryServer
from tests.lab.conftest import LabFactory
from tests.lab.imaging import (
    ARM,
    X86,
    Imaging,
    builders_of_both_systems,
    eventually,
    push_places,
    pushing,
    raw,
    roots,
    skopeo,
)

WRITING = ("POST", "PUT", "PATCH", "DELETE")

pytestmark = pytest.mark.usefixtures("nix_of_the_lab")


@pytest.fixture(scope="module")
def builders(lab_factory: LabFactory) -> Lab:
    return builders_of_both_systems(lab_factory)


@pytest.fixture
def imaging(builders: Lab, registry: RegistryServer, tmp_path: Path) -> Imaging:
    return Imaging(tmp_path, builders, registry, hosts=("first", "second"))


def writes(registry: RegistryServer, since: int) -> list[str]:
    """The requests after the first ``since`` that change something in the registry."""
    return [f"{r.method} {r.path}" for r in registry.requests()[since:] if r.method in WRITING]


def pulled(registry: RegistryServer, reference: str, architecture: str, directory: Path) -> str:
    """The text in an image, as skopeo pulls it for an architecture."""
    chosen = ("--override-arch", architecture, "--override-os", "linux")
    auth = registry.storage.parent / "skopeo-auth.json"
    certificates = registry.storage.parent / "skopeo-certificates"
    subprocess.run(
        ["skopeo", "--insecure-policy", *chosen, "copy", "--authfile", auth, "--src-cert-dir", certificates,
         f"docker://{reference}", f"dir:{directory}"],
        check=True,
        capture_output=True,
    )  # fmt: skip
    manifest = json.loads((directory / "manifest.json").read_text())
    layer = directory / manifest["layers"][0]["digest"].removeprefix("sha256:")
    tar = subprocess.run(["tar", "-xOf", layer, "etc/motd"], check=True, capture_output=True, text=True)
    return tar.stdout


def test_an_image_for_two_systems_is_pushed_indexed_and_pulled_back(
    imaging: Imaging, registry: RegistryServer, builders: Lab, tmp_path: Path
) -> None:
    """Proves: through the command line, each system's image is built natively and pushed from its builder; the tag
    names an index over both by platform; another client gets for each architecture what was built for it; nothing of
    the push stays on the builders, and what is in the registry needs no root there any more."""
    reference = imaging.reference("team/app:1.0")
    done = imaging.invoke(
        *imaging.image("docker", "--systems", f"{X86},{ARM}", "--push", f"docker://{reference}", "--format", "json")
    )
    assert done.code == 0, done
    document = done.document
    assert document["reference"] == reference and document["moved"] and document["uploaded"]
    by_system = {image["system"]: image for image in document["images"]}
    index = raw(registry, reference)
    assert index["mediaType"] == "application/vnd.oci.image.index.v1+json"
    named = {entry["platform"]["architecture"]: entry["digest"] for entry in index["manifests"]}
    assert named == {"amd64": by_system[X86]["digest"], "arm64": by_system[ARM]["digest"]}
    assert registry.tags("team/app") == tuple(
        sorted(["1.0", *(f"nixops-{s}-{i['store_path'][11:43]}" for s, i in by_system.items())])
    )
    for architecture, system in (("amd64", X86), ("arm64", ARM)):
        assert f"for {system}," in pulled(registry, reference, architecture, tmp_path / architecture)
    for host in builders.hosts.values():
        assert push_places(host) == []
        assert not set(roots(host)) & {image["store_path"] for image in by_system.values()}


def test_the_same_again_uploads_nothing_and_says_so_though_no_builder_is_left(
    imaging: Imaging, registry: RegistryServer
) -> None:
    """Proves: a second run with the same content changes nothing in the registry and says so; it needs no builder,
    since the registry itself remembers what it was given. Another tag for the same content moves only the tag."""
    reference = imaging.reference("team/again:1")
    flags = imaging.image("docker", "--systems", f"{X86},{ARM}", "--push", f"docker://{reference}")
    assert imaging.invoke(*flags).code == 0
    before = len(registry.requests())
    imaging.change(lambda document: [host.update(port=1) for host in document["hosts"].values()])
    again = imaging.invoke(*flags)
    assert again.code == 0 and "nothing was uploaded" in again.out, again
    assert writes(registry, before) == []
    document = imaging.invoke(*flags, "--format", "json").document
    assert (document["moved"], document["uploaded"]) == (False, False)
    assert [image["uploaded"] for image in document["images"]] == [False, False]

    other = imaging.build("docker", X86, ARM, push=reference.tagged("2"))
    assert other.moved and not any(image.pushed and image.pushed.uploaded for image in other.images)
    assert writes(registry, before) == ["PUT /v2/team/again/manifests/2"]


@pytest.mark.parametrize("attr", ["archive", "layout", "named", "old", "containers.app.{system}"])
def test_every_shape_of_image_is_pushed(imaging: Imaging, registry: RegistryServer, attr: str) -> None:
    """Proves: a docker archive, an OCI layout, and programs of copyTo under any name reach the registry; for one system
    the tag is the image itself; its digest is what the record and the document say."""
    reference = imaging.reference("team/shapes:" + attr.split(".")[0])
    result = imaging.build(attr, push=reference)
    (image,) = result.images
    assert image.pushed is not None and image.pushed.uploaded
    inspected = json.loads(skopeo(registry, "inspect", f"docker://{reference}"))
    assert inspected["Digest"] == result.digest == image.pushed.digest
    assert inspected["Architecture"] == "amd64"
    assert json.loads(result.record.read_text())["digest"] == result.digest


@pytest.mark.parametrize("attr", ["docker", "archive"])
def test_a_login_that_is_not_root_pushes_as_well(
    builders: Lab, registry: RegistryServer, tmp_path: Path, attr: str
) -> None:
    """Proves: on a builder whose login is neither root nor trusted by Nix, and whose PATH is NixOS's, an image is
    built, kept until it is pushed, pushed, and nothing of it stays: neither the login to the registry nor the root."""
    settings = {"third": {"builder": {"max_jobs": 2, "systems": [X86]}}}
    imaging = Imaging(tmp_path, builders, registry, hosts=("third",), settings=settings)
    reference = imaging.reference(f"team/plain-login:{attr}")
    result = imaging.build(attr, push=reference)
    assert json.loads(skopeo(registry, "inspect", f"docker://{reference}"))["Digest"] == result.digest
    host = builders.hosts["third"]
    assert push_places(host) == []
    assert host.exec("find", "/home/admin/.local/state/nixops/roots", "-type", "l").stdout == b""


def test_a_garbage_collection_in_the_middle_of_a_push_takes_nothing_away(imaging: Imaging, builders: Lab) -> None:
    """Proves: what is being pushed is rooted on its builder until it has been: collecting there meanwhile deletes
    nothing that the push needs."""
    reference = imaging.reference("team/collected:1")
    imaging.change(lambda document: document["hosts"].pop("second"))
    call = imaging.begin(lambda: imaging.build("slow-push", push=reference))
    host = builders.hosts["first"]
    eventually(lambda: pushing(host), 90, "the push")
    kept = roots(host)
    host.exec("nix-store", "--gc")
    (image,) = call.wait().images
    assert image.out in kept and image.pushed is not None and image.pushed.uploaded
    assert image.out not in roots(host)


def test_what_is_no_image_is_not_pushed(imaging: Imaging, registry: RegistryServer) -> None:
    """Proves: an output that is neither layout, archive nor copyTo is bad usage that says so; the tag is not there."""
    reference = imaging.reference("team/odd:1")
    with pytest.raises(UsageError, match="neither an OCI layout"):
        imaging.build("odd", push=reference)
    assert registry.tags("team/odd") == ()


def test_a_program_that_fails_is_shown_and_the_tag_stays(imaging: Imaging, registry: RegistryServer) -> None:
    """Proves: what the image's own program said is shown, no other builder is tried for it, and the tag is where it
    was."""
    reference = imaging.reference("team/refused:1")
    first = imaging.build("docker", push=reference)
    imaging.events.clear()
    with pytest.raises(PushFailed) as caught:
        imaging.build("refused", push=reference)
    assert "unauthorized: authentication required" in str(caught.value)
    assert sum(": on " in str(event) for event in imaging.events) == 1
    assert json.loads(skopeo(registry, "inspect", f"docker://{reference}"))["Digest"] == first.digest


def test_the_tag_moves_only_if_every_system_is_there_and_the_next_run_goes_on_from_there(
    imaging: Imaging, registry: RegistryServer
) -> None:
    """Proves: where one system's build fails, the other's image is staged and the tag is not moved; once the flake is
    mended, the next run sends only what was missing."""
    reference = imaging.reference("team/half:1")
    with pytest.raises(BuildFailed, match="half-layout"):
        imaging.build("half", X86, ARM, push=reference)
    (staged,) = registry.tags("team/half")
    assert staged.startswith(f"nixops-{X86}-")
    mended = imaging.repo.directory / "images.nix"
    mended.write_text(
        mended.read_text().replace('if args.system == "aarch64-linux" then { fail = 1; }', "if false then { }")
    )
    result = imaging.build("half", X86, ARM, push=reference)
    assert [image.pushed is not None and image.pushed.uploaded for image in result.images] == [False, True]
    assert raw(registry, reference)["manifests"]


def test_an_image_of_another_architecture_is_not_taken_for_this_ones(
    imaging: Imaging, registry: RegistryServer
) -> None:
    """Proves: the registry is asked for the image's configuration, and one that says it is for another architecture
    than the system it was built for never gets the tag."""
    reference = imaging.reference("team/foreign:1")
    for _ in range(2):  # nor is it taken for there already
        with pytest.raises(PushFailed, match="says of itself that it is for linux/riscv64"):
            imaging.build("foreign", push=reference)
    assert "1" not in registry.tags("team/foreign")


def test_a_wrong_password_is_told_before_anything_is_built(imaging: Imaging, builders: Lab) -> None:
    """Proves: exit 1 with the registry's words and what to do; no builder has built anything for it."""
    (imaging.inventory.parent / "registry-password").write_text("wrong-password-0000\n")
    reference = imaging.reference("team/denied:1")
    done = imaging.invoke(*imaging.image("docker", "--systems", X86, "--push", f"docker://{reference}"))
    assert done.code == 1 and "the login of pusher is wrong" in done.err, done
    assert ": on " not in done.err and "wrong-password-0000" not in done.out + done.err


def test_provenance_is_attached_once_and_says_who_built_what(imaging: Imaging, registry: RegistryServer) -> None:
    """Proves: with --provenance, an in-toto statement with SLSA's predicate is attached to what the tag names, under
    the fallback tag of a registry without the referrers API; it names flake, revision, derivations, outputs, builders,
    Nix and times, and no secret; the same again attaches nothing."""
    reference = imaging.reference("team/proven:1")
    result = imaging.build("docker", X86, ARM, push=reference, provenance=True)
    assert result.digest is not None and result.provenance is not None
    fallback = raw(registry, reference.tagged(result.digest.replace(":", "-")))
    (entry,) = fallback["manifests"]
    assert entry["digest"] == result.provenance and entry["artifactType"] == "application/vnd.in-toto+json"
    repository = f"{registry.name}/team/proven"
    manifest = json.loads(skopeo(registry, "inspect", "--raw", f"docker://{repository}@{result.provenance}"))
    assert manifest["subject"]["digest"] == result.digest
    blobs = registry.storage / "docker/registry/v2/blobs/sha256"
    digest = manifest["layers"][0]["digest"].removeprefix("sha256:")
    body = (blobs / digest[:2] / digest / "data").read_text()
    assert registry.password.reveal() not in body
    statement = json.loads(body)
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert statement["predicateType"] == "https://slsa.dev/provenance/v1"
    subjects = {subject["digest"]["sha256"] for subject in statement["subject"]}
    pushed = {image.pushed.digest.removeprefix("sha256:") for image in result.images if image.pushed}
    assert subjects == {result.digest.removeprefix("sha256:")} | pushed
    definition = statement["predicate"]["buildDefinition"]
    assert definition["resolvedDependencies"][0]["digest"] == {"gitCommit": imaging.repo.revision}
    for run in definition["internalParameters"]["images"]:
        assert run["builder"] in ("first", "second") and run["derivation"].endswith(".drv")
        assert run["nix"].startswith("2.") and run["startedOn"] <= run["finishedOn"]

    before = len(registry.requests())
    again = imaging.build("docker", X86, ARM, push=reference, provenance=True)
    assert again.provenance is None and not again.uploaded
    assert writes(registry, before) == []


def test_the_record_holds_digests_and_no_secret(imaging: Imaging, registry: RegistryServer) -> None:
    """Proves: the record of a push names what was pushed where, and neither the password nor its base64 is in it."""
    result = imaging.build("docker", push=imaging.reference("team/recorded:1"))
    text = result.record.read_text()
    record = json.loads(text)
    (image,) = record["images"]
    assert (record["reference"], record["digest"]) == (imaging.reference("team/recorded:1"), result.digest)
    assert image["digest"] == result.digest and image["uploaded"] and image["size"] > 0
    login = f"{registry.user}:{registry.password.reveal()}".encode()
    assert registry.password.reveal() not in text and base64.b64encode(login).decode() not in text


@pytest.mark.parametrize("auth", ["token", "none"])
def test_registries_with_bearer_tokens_and_without_any_login(builders: Lab, tmp_path: Path, auth: str) -> None:
    """Proves: the same against a registry whose token server wants the login, and one of plain HTTP that wants none."""
    with RegistryServer(bind=builders.gateway, auth=auth, tls=auth == "token") as server:  # type: ignore[arg-type]
        imaging = Imaging(tmp_path, builders, server, hosts=("first", "second"))
        if auth == "none":
            imaging.change(lambda document: document.update(registries={str(server.name): {"tls": False}}))
        result = imaging.build("docker", X86, ARM, push=imaging.reference("team/app:1"))
        assert result.moved and len(server.tags("team/app")) == 3


def test_a_registry_that_nobody_reaches_is_the_registrys_fault(imaging: Imaging, registry: RegistryServer) -> None:
    """Proves: exit 1 that names the registry, and no builder is blamed for it."""
    gone = imaging.reference("team/app:1").replace(str(registry.name), f"{imaging.lab.gateway}:1")
    done = imaging.invoke(*imaging.image("docker", "--systems", X86, "--push", f"docker://{gone}"))
    assert done.code == 1 and f"{imaging.lab.gateway}:1" in done.err, done
    with pytest.raises(RegistryError):
        imaging.build("docker", push=type(imaging.reference())(gone))
    assert "left out" not in imaging.said()
