"""What stays of an image: its record and its provenance, whole and without secrets."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nixops.build import record as module
from nixops.build.evaluate import FlakeFacts
from nixops.build.model import BuiltSystem, Evaluated, ImageSpec, PushedSystem, Shape, Tried
from nixops.build.provenance import statement
from nixops.build.publish import staging_reference
from nixops.build.record import SystemImage, record_document, records, reserved, stamp, who_built, write_record
from nixops.errors import HostFault, PushFailed
from nixops.registry.manifest import OCI_INDEX, OCI_MANIFEST, Manifest
from nixops.values import AttrPath, FlakeRef, HostName, ImageReference, StorePath, System

DESTINATION = ImageReference("registry.example.org/team/app:1")
FACTS = FlakeFacts(FlakeRef("github:owner/app/abc"), "github:owner/app/abc", "abc", False)
SPEC = ImageSpec(
    # Its grammar refuses a login; should one get by, no record has it.
    str.__new__(FlakeRef, "git+https://hunter22@example.org/app"),
    AttrPath("docker"),
    (System("x86_64-linux"), System("aarch64-linux")),
    DESTINATION,
)
INDEX = Manifest.of(json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": []}).encode(), OCI_INDEX)


def image(system: str, number: int, *, built: bool = True) -> SystemImage:
    out = StorePath(f"/nix/store/{number:032d}-copy-to")
    evaluated = Evaluated(
        System(system), f"/srv/app#packages.{system}.docker", StorePath(f"{out}.drv"), out, Shape.COPY_TO
    )
    pushed = PushedSystem(
        System(system), staging_reference(DESTINATION, System(system), out), f"sha256:{number:064d}", 500,
        OCI_MANIFEST, built, 0.5,
    )  # fmt: skip
    made = BuiltSystem(evaluated, HostName(f"builder0{number}"), out, (2, 26), 3.0, 1e9, 1e9 + 3) if built else None
    return SystemImage(evaluated, out, 4.0, made, pushed)


def document(images: Sequence[SystemImage]) -> dict[str, Any]:
    tried = (Tried("builder09", System("x86_64-linux"), "connection refused"),)
    return record_document(SPEC, FACTS, images, digest=INDEX.digest, moved=True, tried=tried)


def test_a_record_is_the_operators_alone_whole_and_without_the_flakes_credentials(tmp_path: Path) -> None:
    path = write_record(tmp_path / "state", document([image("x86_64-linux", 1)]))
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    found = json.loads(path.read_text())
    assert found["schema"] == "nixops/image-record/1" and found["revision"] == "abc"
    assert found["images"][0]["builder"] == "builder01" and found["images"][0]["nix"] == "2.26"
    assert found["tried"] == [{"builder": "builder09", "system": "x86_64-linux", "reason": "connection refused"}]
    assert "hunter22" not in path.read_text()
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_full_disk_leaves_no_half_record_and_is_told_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(HostFault, match="No space left on device"):
        write_record(tmp_path, document([image("x86_64-linux", 1)]))
    assert list((tmp_path / "images").iterdir()) == []


def test_there_is_room_for_a_record_before_anything_is_done_that_it_is_to_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Proves: a disk without room is told before the block begins, and nothing of it stays."""

    def full(_descriptor: int, _data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_fill", full)
    with pytest.raises(HostFault, match="No space left on device") as caught, reserved(tmp_path):
        pytest.fail("the tag would have moved")
    assert "the tag is where it was" in str(caught.value)
    assert list((tmp_path / "images").iterdir()) == []


def test_a_block_that_fails_leaves_no_record_and_a_killed_ones_room_is_given_back(tmp_path: Path) -> None:
    with pytest.raises(PushFailed), reserved(tmp_path):
        raise PushFailed("the registry said no")
    assert list((tmp_path / "images").iterdir()) == []
    killed = tmp_path / "images" / ".20200101T000000Z-0a1b2c3d"
    young = tmp_path / "images" / ".20200101T000000Z-00000000"
    for file in (killed, young):
        file.write_text("\n")
    os.utime(killed, (1, 1))
    path = write_record(tmp_path, document([image("x86_64-linux", 1)]))
    assert {p.name for p in path.parent.iterdir()} == {path.name, young.name}


def test_only_so_many_records_are_kept_the_newest_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEEP", 3)
    names = []
    for number in range(5):
        monkeypatch.setattr(time, "strftime", lambda *_, n=number: f"2026010{n}T000000Z")
        names.append(write_record(tmp_path, document([image("x86_64-linux", number)])).name)
    assert sorted(p.name for p in (tmp_path / "images").iterdir()) == names[2:]
    assert [r["images"][0]["builder"] for r in records(tmp_path)] == ["builder04", "builder03", "builder02"]


def test_who_built_an_output_is_known_from_an_earlier_record(tmp_path: Path) -> None:
    built = image("x86_64-linux", 1)
    write_record(tmp_path, document([built]))
    (tmp_path / "images" / "20990101T000000Z-broken.json").write_text("{")
    (tmp_path / "images" / "20990101T000000Z-odd.json").write_text('{"schema": "nixops/image-record/1", "images": 3}')
    found = who_built(tmp_path, built.out)
    assert found is not None and found["builder"] == "builder01"
    assert who_built(tmp_path, image("x86_64-linux", 2).out) is None
    assert who_built(tmp_path / "nowhere", built.out) is None


def test_times_are_utc_as_rfc_3339_has_them() -> None:
    assert stamp(1e9) == "2001-09-09T01:46:40Z"


def test_the_statement_names_subjects_source_and_who_built_what(tmp_path: Path) -> None:
    images = [image("x86_64-linux", 1), image("aarch64-linux", 2)]
    made = statement(DESTINATION, INDEX, SPEC, FACTS, images, tmp_path)
    assert [subject["digest"]["sha256"] for subject in made["subject"]] == [
        INDEX.digest.removeprefix("sha256:"), f"{1:064d}", f"{2:064d}",
    ]  # fmt: skip
    definition = made["predicate"]["buildDefinition"]
    assert definition["resolvedDependencies"] == [{"uri": "github:owner/app/abc", "digest": {"gitCommit": "abc"}}]
    assert [run["builder"] for run in definition["internalParameters"]["images"]] == ["builder01", "builder02"]
    assert made["predicate"]["runDetails"]["metadata"] == {
        "startedOn": "2001-09-09T01:46:40Z", "finishedOn": "2001-09-09T01:46:43Z",
    }  # fmt: skip
    assert "hunter22" not in json.dumps(made)


def test_what_was_in_the_registry_already_is_told_from_the_record_or_not_at_all(tmp_path: Path) -> None:
    there = image("x86_64-linux", 1, built=False)
    unknown = statement(DESTINATION, INDEX, SPEC, FACTS, [there], tmp_path)
    (run,) = unknown["predicate"]["buildDefinition"]["internalParameters"]["images"]
    assert "builder" not in run and run["output"] == there.out
    assert "startedOn" not in unknown["predicate"]["runDetails"]["metadata"]
    write_record(tmp_path, document([image("x86_64-linux", 1)]))
    known = statement(DESTINATION, INDEX, SPEC, FACTS, [there], tmp_path)
    (run,) = known["predicate"]["buildDefinition"]["internalParameters"]["images"]
    assert (run["builder"], run["nix"], run["startedOn"]) == ("builder01", "2.26", "2001-09-09T01:46:40Z")


def test_a_dirty_tree_has_no_revision_in_the_statement(tmp_path: Path) -> None:
    facts = replace(FACTS, revision=None, dirty=True)
    definition = statement(DESTINATION, INDEX, SPEC, facts, [image("x86_64-linux", 1)], tmp_path)["predicate"][
        "buildDefinition"
    ]
    assert definition["internalParameters"]["dirty"] is True and "digest" not in definition["resolvedDependencies"][0]
