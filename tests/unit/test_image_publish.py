"""What is asked of a registry before a tag moves, against one in memory that can be made to lie."""

from __future__ import annotations

import json
from typing import cast

import pytest

from nixops.build.model import PushedSystem, Shape
from nixops.build.publish import already_there, confirm, move_tag, named_digest, prepare, staging_reference
from nixops.build.push import Sent
from nixops.errors import PushFailed, RegistryError, UsageError
from nixops.registry.client import RegistryClient
from nixops.registry.manifest import OCI_INDEX, OCI_MANIFEST, Manifest, digest_of
from nixops.values import ImageReference, StorePath, System

X86, ARM = System("x86_64-linux"), System("aarch64-linux")
DESTINATION = ImageReference("registry.example.org/team/app:1")
OUT = StorePath("/nix/store/11111111111111111111111111111111-copy-to")


class Memory:
    """Manifests by tag and digest, blobs by digest; counts what is written."""

    def __init__(self) -> None:
        self.manifests: dict[str, Manifest] = {}
        self.blobs: dict[str, bytes] = {}
        self.lost: set[str] = set()
        self.written: list[str] = []
        self.rival: Manifest | None = None

    def manifest(self, _repository: str, reference: str) -> Manifest | None:
        return self.manifests.get(reference)

    def put_manifest(self, _repository: str, reference: str, body: bytes, media_type: str) -> str:
        made = Manifest.of(body, media_type)
        self.written.append(reference)
        self.manifests[made.digest] = made
        self.manifests[reference] = self.rival if self.rival and not reference.startswith("sha256:") else made
        return made.digest

    def complete(self, _repository: str, manifest: Manifest) -> tuple[str, ...]:
        if manifest.is_index:
            return tuple(m.digest for m in manifest.manifests if m.digest not in self.manifests)
        named = [manifest.config, *manifest.layers]
        return tuple(one.digest for one in named if one is not None and one.digest in self.lost)

    def blob(self, _repository: str, digest: str, limit: int) -> bytes:
        assert len(self.blobs[digest]) <= limit
        return self.blobs[digest]

    def image(self, tag: str, architecture: str = "amd64", *, salt: str = "") -> Manifest:
        """Put an image there, as a builder's push does."""
        config = json.dumps({"architecture": architecture, "os": "linux", "salt": salt}).encode()
        self.blobs[digest_of(config)] = config
        body = {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": {"mediaType": "application/x", "digest": digest_of(config), "size": len(config)},
            "layers": [{"mediaType": "application/y", "digest": digest_of(b"layer"), "size": 5}],
        }
        made = Manifest.of(json.dumps(body).encode(), OCI_MANIFEST)
        self.manifests[tag] = self.manifests[made.digest] = made
        return made

    @property
    def client(self) -> RegistryClient:
        return cast("RegistryClient", self)


def sent(digest: str | None) -> Sent:
    return Sent(digest, Shape.COPY_TO, 1.0)


def pushed(registry: Memory, system: System, architecture: str) -> PushedSystem:
    staging = staging_reference(DESTINATION, system, OUT)
    return confirm(registry.client, staging, system, sent(registry.image(staging.tag, architecture).digest))


def test_a_staging_tag_is_told_by_system_and_output_alone_and_always_fits() -> None:
    staging = staging_reference(DESTINATION, X86, OUT)
    assert staging == f"registry.example.org/team/app:nixops-x86_64-linux-{OUT.hash_part}"
    assert staging == staging_reference(DESTINATION.tagged("x" * 128), X86, OUT)
    assert len(staging_reference(DESTINATION, System("a" * 32 + "-" + "b" * 32), OUT).tag) <= 128


def test_what_is_there_whole_is_not_pushed_again() -> None:
    registry = Memory()
    staging = staging_reference(DESTINATION, X86, OUT)
    assert already_there(registry.client, staging, X86) is None
    there = registry.image(staging.tag)
    found = already_there(registry.client, staging, X86)
    assert found is not None and (found.digest, found.uploaded) == (there.digest, False)


@pytest.mark.parametrize("lost", ["config", "layer"])
def test_what_is_there_in_part_or_is_another_systems_is_pushed_again(lost: str) -> None:
    registry = Memory()
    staging = staging_reference(DESTINATION, X86, OUT)
    there = registry.image(staging.tag)
    part = there.config if lost == "config" else there.layers[0]
    assert part is not None
    registry.lost.add(part.digest)
    assert already_there(registry.client, staging, X86) is None
    assert already_there(registry.client, staging, ARM) is None


def test_another_digest_than_the_builder_pushed_is_refused() -> None:
    registry = Memory()
    staging = staging_reference(DESTINATION, X86, OUT)
    registry.image(staging.tag)
    with pytest.raises(PushFailed, match="another image under") as caught:
        confirm(registry.client, staging, X86, sent("sha256:" + "0" * 64))
    assert "pushed: sha256:000" in (caught.value.detail or "")


def test_nothing_there_parts_missing_an_index_and_another_architecture_are_refused() -> None:
    registry = Memory()
    staging = staging_reference(DESTINATION, X86, OUT)
    with pytest.raises(PushFailed, match="the registry has no"):
        confirm(registry.client, staging, X86, sent(None))
    there = registry.image(staging.tag)
    registry.lost.add(there.layers[0].digest)
    with pytest.raises(PushFailed, match="lacks parts") as caught:
        confirm(registry.client, staging, X86, sent(there.digest))
    assert there.layers[0].digest in (caught.value.detail or "")
    registry.lost.clear()
    with pytest.raises(PushFailed, match="for linux/amd64"):
        confirm(registry.client, staging, ARM, sent(there.digest))
    index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": []}
    registry.put_manifest("", staging.tag, json.dumps(index).encode(), OCI_INDEX)
    with pytest.raises(PushFailed, match="an index over several images"):
        confirm(registry.client, staging, X86, sent(None))


def test_one_system_is_named_as_it_is_and_two_by_an_index_that_is_there_before_the_tag() -> None:
    registry = Memory()
    one = pushed(registry, X86, "amd64")
    assert prepare(registry.client, DESTINATION, [one]).digest == one.digest == named_digest([one])
    assert registry.written == []
    two = [one, pushed(registry, ARM, "arm64")]
    index = prepare(registry.client, DESTINATION, two)
    assert registry.written == [index.digest] and index.digest == named_digest(two)
    move_tag(registry.client, DESTINATION, index)
    assert registry.written == [index.digest, "1"]
    # The same again finds the index, and writes nothing.
    assert prepare(registry.client, DESTINATION, two).digest == index.digest
    assert registry.written == [index.digest, "1"]


def test_an_image_that_is_gone_again_keeps_the_tag_from_moving() -> None:
    registry = Memory()
    two = [pushed(registry, X86, "amd64"), pushed(registry, ARM, "arm64")]
    del registry.manifests[two[0].digest]
    with pytest.raises(PushFailed, match="lacks images that the index"):
        prepare(registry.client, DESTINATION, two)
    with pytest.raises(PushFailed, match="lost"):
        prepare(registry.client, DESTINATION, two[:1])
    assert "1" not in registry.written


def test_a_tag_that_somebody_else_moves_at_the_same_time_is_told() -> None:
    registry = Memory()
    one = pushed(registry, X86, "amd64")
    named = prepare(registry.client, DESTINATION, [one])
    registry.rival = registry.image("other", salt="theirs")
    with pytest.raises(PushFailed, match="does not name what it was moved to") as caught:
        move_tag(registry.client, DESTINATION, named)
    assert registry.rival.digest in (caught.value.detail or "")


class Lossy(Memory):
    """Loses the answer to each PUT, after or before it has carried it out; and then perhaps goes away."""

    def __init__(self, *, carried_out: bool) -> None:
        super().__init__()
        self.carried_out = carried_out
        self.gone = False

    def put_manifest(self, repository: str, reference: str, body: bytes, media_type: str) -> str:
        if self.carried_out:
            super().put_manifest(repository, reference, body, media_type)
        raise RegistryError("the answer was lost")

    def manifest(self, repository: str, reference: str) -> Manifest | None:
        if self.gone:
            raise RegistryError("no connection")
        return super().manifest(repository, reference)


def test_a_tag_that_moved_though_the_answer_was_lost_has_moved() -> None:
    """Proves: the request that moves the tag is not believed to have failed: the tag itself is asked."""
    registry = Lossy(carried_out=True)
    named = registry.image("staged")
    move_tag(registry.client, DESTINATION, named)
    assert registry.manifests["1"] == named


def test_a_tag_that_did_not_move_is_told_with_what_it_names() -> None:
    registry = Lossy(carried_out=False)
    before = registry.image("1", salt="before")
    with pytest.raises(RegistryError, match="the answer was lost") as caught:
        move_tag(registry.client, DESTINATION, registry.image("staged"))
    assert f"{DESTINATION} names {before.digest}" in str(caught.value)


def test_a_registry_that_goes_away_as_the_tag_moves_leaves_it_open_and_says_so() -> None:
    registry = Lossy(carried_out=True)
    named = registry.image("staged")
    registry.gone = True
    with pytest.raises(RegistryError, match="the answer was lost") as caught:
        move_tag(registry.client, DESTINATION, named)
    assert "may have moved or not" in str(caught.value)


def test_a_system_without_a_name_among_platforms_is_bad_usage() -> None:
    registry = Memory()
    staging = staging_reference(DESTINATION, X86, OUT)
    there = registry.image(staging.tag)
    with pytest.raises(UsageError, match="no name among the platforms"):
        confirm(registry.client, staging, System("vax-ultrix"), sent(there.digest))
