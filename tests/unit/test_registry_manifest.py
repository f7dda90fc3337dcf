"""Manifests, descriptors, digests and the index over them."""

from __future__ import annotations

import json
from itertools import permutations
from typing import Any

import pytest

from nixops.build.model import PushedSystem
from nixops.errors import RegistryError, UsageError
from nixops.registry.index import index_of, media_type_of, platform_of
from nixops.registry.manifest import (
    DOCKER_LIST,
    DOCKER_MANIFEST,
    OCI_INDEX,
    OCI_MANIFEST,
    Descriptor,
    Manifest,
    canonical,
    digest_of,
    matches,
)
from nixops.values import ImageReference, System

DIGEST = "sha256:" + "ab" * 32


def pushed(system: str, digit: str, media_type: str = OCI_MANIFEST) -> PushedSystem:
    return PushedSystem(
        System(system), ImageReference("r.example.org/a:1"), "sha256:" + digit * 64, 100, media_type, True, 1.0
    )


def manifest(**changes: Any) -> bytes:
    return json.dumps({"schemaVersion": 2, "mediaType": OCI_MANIFEST, **changes}).encode()


@pytest.mark.parametrize(
    ("system", "platform"),
    [
        ("x86_64-linux", {"architecture": "amd64", "os": "linux"}),
        ("aarch64-linux", {"architecture": "arm64", "os": "linux"}),
        ("armv7l-linux", {"architecture": "arm", "os": "linux", "variant": "v7"}),
        ("armv6l-linux", {"architecture": "arm", "os": "linux", "variant": "v6"}),
        ("i686-linux", {"architecture": "386", "os": "linux"}),
        ("powerpc64le-linux", {"architecture": "ppc64le", "os": "linux"}),
        ("mips64el-linux", {"architecture": "mips64le", "os": "linux"}),
        ("riscv64-linux", {"architecture": "riscv64", "os": "linux"}),
        ("loongarch64-linux", {"architecture": "loong64", "os": "linux"}),
        ("aarch64-darwin", {"architecture": "arm64", "os": "darwin"}),
    ],
)
def test_a_nix_system_has_the_name_that_container_tools_use(system: str, platform: dict[str, str]) -> None:
    assert platform_of(System(system)) == platform


@pytest.mark.parametrize("system", ["avr-none", "x86_64-solaris", "vax-netbsd"])
def test_a_system_without_such_a_name_is_an_error_that_lists_the_known(system: str) -> None:
    with pytest.raises(UsageError, match="x86_64"):
        platform_of(System(system))


def test_an_index_is_the_same_bytes_whatever_the_order() -> None:
    entries = [pushed("x86_64-linux", "1"), pushed("aarch64-linux", "2"), pushed("armv7l-linux", "3")]
    assert len({index_of(order) for order in permutations(entries)}) == 1
    found = json.loads(index_of(entries))
    assert [one["platform"]["architecture"] for one in found["manifests"]] == ["arm64", "arm", "amd64"]
    assert found["manifests"][2]["digest"] == "sha256:" + "1" * 64
    assert media_type_of(index_of(entries)) == OCI_INDEX


def test_docker_manifests_alone_make_a_docker_list_and_mixed_ones_an_oci_index() -> None:
    docker = pushed("x86_64-linux", "1", DOCKER_MANIFEST)
    assert media_type_of(index_of([docker])) == DOCKER_LIST
    assert media_type_of(index_of([docker, pushed("aarch64-linux", "2")])) == OCI_INDEX


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([], "at least one"),
        ([pushed("x86_64-linux", "1"), pushed("x86_64-linux", "2")], "two images are for x86_64-linux"),
        ([pushed("x86_64-linux", "1", OCI_INDEX)], "no single image"),
        ([pushed("x86_64-linux", "g")], "not the digest"),
    ],
)
def test_what_makes_no_index_is_refused(entries: list[PushedSystem], words: str) -> None:
    with pytest.raises(RegistryError, match=words):
        index_of(entries)


@pytest.mark.parametrize(
    ("body", "kind", "words"),
    [
        (b"<html>", OCI_MANIFEST, "not JSON"),
        (b"[" * 100_000, OCI_MANIFEST, "not JSON"),
        (b"[]", OCI_MANIFEST, "not a JSON object"),
        (manifest(mediaType=OCI_INDEX), OCI_MANIFEST, "calls itself"),
        (manifest(mediaType=5), OCI_MANIFEST, "not a text"),
        (b'{"schemaVersion":2}', "", "no media type"),
        (b'{"schemaVersion":2}', "no type at all", "no media type"),
        (b'{"schemaVersion":1}', "application/vnd.docker.distribution.manifest.v1+json", "first schema"),
    ],
)
def test_what_is_no_manifest_is_an_error_that_says_why(body: bytes, kind: str, words: str) -> None:
    with pytest.raises(RegistryError, match=words):
        Manifest.of(body, kind)


def test_a_manifest_knows_its_digest_its_parts_and_its_subject() -> None:
    one = {"mediaType": "text/plain", "digest": DIGEST, "size": 3}
    body = manifest(config=one, layers=[one, {**one, "urls": ["https://elsewhere/"]}], subject=one)
    found = Manifest.of(body, OCI_MANIFEST + "; charset=utf-8")
    assert (found.digest, found.size, found.media_type) == (digest_of(body), len(body), OCI_MANIFEST)
    assert found.config == Descriptor("text/plain", DIGEST, 3)
    assert [layer.urls for layer in found.layers] == [(), ("https://elsewhere/",)]
    assert found.subject == Descriptor("text/plain", DIGEST, 3)
    assert found.artifact_type == "text/plain"
    assert not found.is_index


@pytest.mark.parametrize(
    "wrong",
    [
        {"digest": "sha256:short"},
        {"digest": "sha256:" + "AB" * 32},
        {"digest": "md5:" + "a" * 32},
        {"digest": "sha256:../../../../etc/passwd"},
        {"size": -1},
        {"size": "3"},
        {"size": True},
        {"mediaType": ""},
        {"mediaType": None},
        {"mediaType": "a/b\r\nX: y"},
    ],
)
def test_a_descriptor_that_names_nothing_definite_is_refused(wrong: dict[str, Any]) -> None:
    body = manifest(layers=[{"mediaType": "text/plain", "digest": DIGEST, "size": 3, **wrong}])
    with pytest.raises(RegistryError, match="descriptor"):
        _ = Manifest.of(body, OCI_MANIFEST).layers


def test_layers_that_are_no_list_are_refused() -> None:
    with pytest.raises(RegistryError, match="not a list"):
        _ = Manifest.of(manifest(layers={}), OCI_MANIFEST).layers


def test_both_registered_algorithms_are_compared_and_no_other() -> None:
    assert matches(b"x", digest_of(b"x"))
    assert matches(b"x", digest_of(b"x", "sha512"))
    assert not matches(b"y", digest_of(b"x", "sha512"))
    assert not matches(b"x", "md5:" + "0" * 32)


def test_canonical_json_is_the_same_bytes_each_time_and_keeps_what_is_in_it() -> None:
    value = {"b": [1, "ü"], "a": {"x": None}}
    assert canonical(value) == canonical(value) == '{"b":[1,"ü"],"a":{"x":null}}'.encode()
