"""The pool as a table and as a document."""

from __future__ import annotations

import json
from dataclasses import replace

from nixops.build.model import PoolBuilder, Probe
from nixops.build.show import HEADER, human, pool_document, pool_rows, reachable
from nixops.transport.target import SshTarget
from nixops.values import Address, HostName, System

TARGET = SshTarget(HostName("b1"), Address("192.0.2.1"), host_keys=("ssh-ed25519 AAAA",))
BUILDER = PoolBuilder(
    TARGET, (System("x86_64-linux"),), 8, 2, features=frozenset({"kvm", "a"}), mandatory_features=frozenset({"m"})
)
GOOD = Probe(BUILDER, nix=(2, 26), cores=16, load=1.5, free=53 * 2**30, building=3, claims=1, seconds=0.12345)
SILENT = Probe(replace(BUILDER, target=replace(TARGET, name=HostName("b2"))), "connection refused", seconds=0.01)
FULL = replace(GOOD, reason="its store is full: 12 MiB free", free=12 * 2**20)
UNPINNED = Probe(
    replace(BUILDER, target=replace(TARGET, host_keys=()), excluded="no host key is pinned"), "no host key is pinned"
)


def test_a_row_has_every_column_that_is_promised() -> None:
    header, rows = pool_rows([GOOD, SILENT])
    assert header == HEADER
    assert rows[0] == (
        "b1",
        "inventory",
        "x86_64-linux",
        "yes",
        "pinned",
        "2.26",
        "16",
        "1.50",
        "53.0 GiB",
        "a, kvm, m (mandatory)",
        "3 of 8 (1 ours)",
        "-",
    )
    assert rows[1][3:] == (
        *("no", "pinned", "-", "-", "-", "-"),
        *("a, kvm, m (mandatory)", "- of 8", "connection refused"),
    )
    assert all(len(row) == len(header) for row in rows)


def test_a_builder_that_answered_is_reachable_though_it_is_excluded() -> None:
    assert [reachable(p) for p in (GOOD, SILENT, FULL, UNPINNED)] == [True, False, True, None]


def test_sizes_are_written_for_people() -> None:
    assert [human(n) for n in (None, 0, 1023, 1024, 1536, 12 * 2**20, 5 * 2**40, 3 * 2**60)] == [
        *("-", "0 B", "1023 B", "1.0 KiB", "1.5 KiB", "12.0 MiB", "5.0 TiB", "3072.0 PiB")
    ]


def test_the_document_is_plain_json_with_the_same_facts() -> None:
    document = json.loads(json.dumps(pool_document([GOOD, SILENT])))
    assert document["schema"] == "nixops/pool/1"
    first, second = document["builders"]
    assert first == {
        "builder": "b1",
        "source": "inventory",
        "address": "192.0.2.1",
        "port": 22,
        "user": "root",
        "systems": ["x86_64-linux"],
        "max_jobs": 8,
        "speed_factor": 2,
        "features": ["a", "kvm"],
        "mandatory_features": ["m"],
        "key_pinned": True,
        "usable": True,
        "reachable": True,
        "reason": None,
        "left_out": None,
        "nix": "2.26",
        "cores": 16,
        "load": 1.5,
        "free": 53 * 2**30,
        "building": 3,
        "claims": 1,
        "seconds": 0.123,
    }
    assert (second["usable"], second["reason"], second["nix"], second["free"]) == (
        False,
        "connection refused",
        None,
        None,
    )


def test_a_builder_that_answers_and_is_chosen_last_says_why() -> None:
    left_out = {GOOD.builder.name: "left out until 12:00:00", SILENT.builder.name: "left out too"}
    _, (good, silent) = pool_rows([GOOD, SILENT], left_out)
    assert (good[-1], silent[-1]) == ("left out until 12:00:00", "connection refused")
    entries = pool_document([GOOD, SILENT], left_out)["builders"]
    assert [(e["usable"], e["left_out"]) for e in entries] == [
        (True, "left out until 12:00:00"),
        (False, "left out too"),
    ]
