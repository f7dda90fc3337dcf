"""The pool: who is in it, under which name, and when each is asked."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from nixops.build.model import PoolBuilder, Probe
from nixops.build.pool import Pool, pool_of
from nixops.build.probe import NOT_WAITED_FOR, probe_all
from nixops.build.quarantine import Quarantine
from nixops.errors import InventoryError, NixopsError, SecretUnavailable, Unreachable, UsageError
from nixops.inventory.building import Ec2Pool
from nixops.inventory.load import Loaded, load
from nixops.transport.command import Command, LineSink, Result
from nixops.transport.exec import StreamRunner
from nixops.transport.target import SshTarget
from nixops.values import Address, HostName, System

X86, ARM = System("x86_64-linux"), System("aarch64-linux")
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAqt16V6G0qKcT6D39YUHzI+3tuqFe2e4XYfp4KVZysp"
OTHER = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIE" + "A" * 42
OTHER64 = base64.b64encode(OTHER.encode()).decode()

TEXT = f"""\
build: {{BUILD}}
hosts:
  nix-cache02:
    address: nix-cache02.example.org
    host_key: {KEY}
    builder:
      {{max_jobs: 8, speed_factor: 2, features: [kvm], mandatory_features: [bench],
       systems: [x86_64-linux, i686-linux]}}
    ssh: {{identity_file: keys/id}}
  arm: {{address: 192.0.2.4, port: 2222, system: aarch64-linux, builder: {{}}}}
  desk: {{address: desk.example.org, host_key: {KEY}, user: op}}
"""


def inventory(directory: Path, build: str = "{}", machines: str | None = None) -> Loaded:
    (directory / "hosts.yml").write_text(TEXT.replace("{BUILD}", build))
    if machines is not None:
        (directory / "machines").write_text(machines)
    return load(directory / "hosts.yml")


# -- who is in it ---------------------------------------------------------------------------------------------


def test_the_pool_is_the_hosts_that_have_builder(tmp_path: Path) -> None:
    first, second = pool_of(inventory(tmp_path))
    assert (first.name, first.systems, first.max_jobs, first.speed_factor) == (
        "nix-cache02",
        (X86, System("i686-linux")),
        8,
        2,
    )
    assert (set(first.features), set(first.mandatory_features), first.source) == ({"kvm"}, {"bench"}, "inventory")
    assert first.target.identity_file == tmp_path / "keys/id"
    # The host's own system where its builder names none; without a pinned key it is shown, and not used.
    assert (second.name, second.systems, second.target.port) == ("arm", (ARM,), 2222)
    assert (first.excluded, second.excluded) == (None, "no host key is pinned (invoke trust arm)")


def test_a_machines_file_adds_builders_and_changes_none_of_the_inventory(tmp_path: Path) -> None:
    lines = f"""\
ssh-ng://other@nix-cache02.example.org aarch64-linux - 99
ssh-ng://nix-cache02 aarch64-linux - 99
ssh-ng://desk x86_64-linux /run/id 4
ssh://new.example.org aarch64-linux - 2 1 - - {OTHER64}
ssh://arm x86_64-linux
"""
    pool = pool_of(inventory(tmp_path, "{machines: machines}", lines))
    assert [b.name for b in pool] == ["nix-cache02", "arm", "desk", "new-example-org"]
    cache, arm, desk, new = pool
    assert (cache.max_jobs, cache.target.user, arm.systems) == (8, "root", (ARM,))
    # A host that the inventory knows is reached as the inventory says; what the line says of it as a builder counts.
    assert (desk.target.address, desk.target.user, desk.target.host_keys) == ("desk.example.org", "op", (KEY,))
    assert (desk.max_jobs, desk.excluded, desk.source) == (4, None, f"machines {tmp_path}/machines")
    assert str(desk.target.identity_file) == "/run/id"
    assert (new.target.host_keys, new.systems) == ((OTHER,), (ARM,))


def test_a_line_for_the_address_and_another_port_is_another_machine_with_a_name_of_its_own(tmp_path: Path) -> None:
    lines = "ssh-ng://192.0.2.4:22 x86_64-linux\nssh-ng://192.0.2.4:2222\nssh-ng://192.0.2.4:2200"
    pool = pool_of(inventory(tmp_path, "{machines: machines}", lines))
    assert [b.name for b in pool] == ["nix-cache02", "arm", "192-0-2-4", "192-0-2-4-3"]


def test_another_machines_file_takes_the_place_of_the_inventorys(tmp_path: Path) -> None:
    loaded = inventory(tmp_path, "{machines: none}")
    (tmp_path / "mine").write_text("ssh-ng://mine")
    assert [b.name for b in pool_of(loaded, machines=tmp_path / "mine")][-1] == "mine"
    with pytest.raises(UsageError, match="none cannot be read"):
        pool_of(loaded)


def test_a_wrong_line_is_told_with_its_place(tmp_path: Path) -> None:
    with pytest.raises(InventoryError, match=r"machines:2:3: 'X' is not a Nix system"):
        pool_of(inventory(tmp_path, "{machines: machines}", "b1\nb X"))


def builder(name: str, systems: tuple[System, ...] = (X86,), **given: object) -> PoolBuilder:
    made = PoolBuilder(SshTarget(HostName(name), Address("198.51.100.1"), host_keys=(OTHER,)), systems, source="ec2 x")
    return replace(made, **given)  # type: ignore[arg-type]  # a field of PoolBuilder


def test_ec2_adds_instances_under_names_of_their_own(tmp_path: Path) -> None:
    asked: list[Ec2Pool] = []

    def find(settings: Ec2Pool) -> tuple[PoolBuilder, ...]:
        asked.append(settings)
        return builder("desk"), builder("runner")

    loaded = inventory(tmp_path, "{ec2: {tags: {role: nix}}}")
    assert [b.name for b in pool_of(loaded, ec2=find)] == ["nix-cache02", "arm", "desk-2", "runner"]
    assert asked[0].tags == {"role": "nix"}
    assert pool_of(inventory(tmp_path), ec2=find) and len(asked) == 1


def test_ec2_that_does_not_answer_leaves_the_others_when_somebody_is_told(tmp_path: Path) -> None:
    def find(_settings: Ec2Pool) -> tuple[PoolBuilder, ...]:
        raise SecretUnavailable("there are no AWS credentials")

    loaded = inventory(tmp_path, "{ec2: {tags: {role: nix}}}")
    told: list[NixopsError] = []
    assert [b.name for b in pool_of(loaded, ec2=find, on_fault=told.append)] == ["nix-cache02", "arm"]
    assert [error.message for error in told] == ["there are no AWS credentials"]
    with pytest.raises(SecretUnavailable):
        pool_of(loaded, ec2=find)


# -- when each is asked ---------------------------------------------------------------------------------------

GOOD = b'begin=1\ndisk=4096 10000000 5000000 0 0\ncode=0\nstore={"version":"2.26.3"}\nend=1\n'


class FakeRunner:
    host = "b"

    def run(self, command: Command, on_line: LineSink | None = None) -> Result:
        raise AssertionError(f"a probe streams: {command.name} {on_line}")

    def stream(
        self, command: Command, *, stdin: object = None, stdout: object = None, on_line: object = None
    ) -> Result:
        assert callable(stdout) and stdin is not None and on_line is None
        stdout(GOOD)
        return Result(command, 0, b"", b"")


class Site:
    """Counts how often each builder is asked; those in ``dead`` do not answer."""

    def __init__(self, *dead: str) -> None:
        self.dead = set(dead)
        self.asked: list[str] = []

    def connect(self, name: HostName, *, timeout: float) -> StreamRunner:
        self.asked.append(str(name))
        if name in self.dead:
            time.sleep(timeout)
            raise Unreachable("no answer")
        return FakeRunner()


def pool(directory: Path, site: Site, *builders: PoolBuilder) -> Pool:
    return Pool(builders, site, Quarantine(directory / "q.json", 300), deadline=0.5)


def told(probes: tuple[Probe, ...]) -> dict[str, str | None]:
    return {str(p.builder.name): p.reason for p in probes}


def test_an_answer_that_came_while_another_was_told_is_in_time(tmp_path: Path) -> None:
    asked, told_of = (builder("a"), builder("b")), list[str]()

    def slow(probe: Probe) -> None:
        told_of.append(str(probe.builder.name))
        time.sleep(0.6)

    found = probe_all(asked, Site(), deadline=0.5, enough=lambda probes: len(probes) == 2, on_probe=slow)
    assert told(found) == {"a": None, "b": None} and sorted(told_of) == ["a", "b"]


def test_the_first_choice_is_by_the_first_answers_and_a_later_one_asks_again(tmp_path: Path) -> None:
    site = Site()
    made = pool(tmp_path, site, builder("a"), builder("b"), builder("c", (ARM,)))
    made.probe([X86, ARM])
    candidates = made.candidates(X86)
    assert told(candidates(frozenset())) == {"a": None, "b": None}
    assert sorted(site.asked) == ["a", "b", "c"]
    site.dead.add("b")
    again = told(candidates(frozenset({HostName("a")})))
    # Its own words, or those for one that came too late with them.
    assert list(again) == ["b"] and str(again["b"]).startswith("no answer")
    assert sorted(site.asked) == ["a", "b", "b", "c"]


def test_candidates_ask_for_themselves_when_nobody_has(tmp_path: Path) -> None:
    site = Site()
    made = pool(tmp_path, site, builder("a"), builder("c", (ARM,)))
    assert told(made.candidates(X86)(frozenset())) == {"a": None}
    assert site.asked == ["a"]


def test_a_builder_that_answers_nobody_is_waited_for_once_and_left_out_from_then_on(tmp_path: Path) -> None:
    site = Site("dead")
    made = pool(tmp_path, site, builder("dead"), builder("good"))
    assert told(made.probe())["good"] is None
    assert made.quarantine.names() == {HostName("dead")}
    again = pool(tmp_path, site, builder("dead"), builder("good"))
    reason = told(again.probe())["dead"]
    assert reason is not None and reason.startswith("taken last until")


def test_one_that_is_left_out_is_used_when_its_system_has_no_other(tmp_path: Path) -> None:
    made = pool(tmp_path, Site(), builder("a"), builder("c", (ARM,)))
    made.quarantine.add(HostName("c"), "lost")
    # x86_64 has one that can be used; that does not keep aarch64's only one from being waited for.
    assert told(made.probe([X86, ARM])) == {"a": None, "c": None}


def test_one_that_is_left_out_is_asked_when_the_others_lack_a_feature(tmp_path: Path) -> None:
    site = Site()
    made = pool(tmp_path, site, builder("plain"), builder("kvm", features=frozenset({"kvm"})))
    made.quarantine.add(HostName("kvm"), "lost")
    needed = frozenset({"kvm"})
    made.probe([X86])
    probes = made.candidates(X86, needed)(frozenset())
    assert told(probes)["kvm"] is None
    assert [str(p.builder.name) for p in made.order(X86, needed)(probes)] == ["kvm"]


def test_the_order_puts_those_that_failed_last(tmp_path: Path) -> None:
    made = pool(tmp_path, Site(), builder("a"), builder("b"))
    probes = made.probe()
    assert [str(p.builder.name) for p in made.order(X86)(probes)] == ["a", "b"]
    made.quarantine.add(HostName("a"), "lost")
    assert [str(p.builder.name) for p in made.order(X86)(probes)] == ["b", "a"]


def test_one_builder_is_asked_again_as_it_was_declared(tmp_path: Path) -> None:
    made = pool(tmp_path, Site(), builder("a", (X86, ARM)))
    (probe,) = made.probe()
    assert made.again(replace(probe, builder=replace(probe.builder, systems=(X86,)))).builder.systems == (X86, ARM)


def test_a_builder_that_nobody_waited_for_says_that_much(tmp_path: Path) -> None:
    made = pool(tmp_path, Site(), builder("a"))
    unasked: Callable[[PoolBuilder], Probe] = made._left_out
    assert unasked(builder("a")).reason == NOT_WAITED_FOR


def test_a_table_of_all_waits_for_those_that_are_left_out_too(tmp_path: Path) -> None:
    class Late(Site):
        def connect(self, name: HostName, *, timeout: float) -> StreamRunner:
            if name == "late":
                time.sleep(0.2)
            return super().connect(name, timeout=timeout)

    made = pool(tmp_path, Late(), builder("late"), builder("good"))
    made.deadline = 5.0
    made.quarantine.add(HostName("late"), "lost")
    reason = told(made.probe())["late"]
    assert reason is not None and reason.startswith("taken last until")
    assert told(made.probe(everybody=True)) == {"late": None, "good": None}
    assert list(made.left_out()) == ["late"]
    assert made.left_out()[HostName("late")].endswith("since it failed: lost")
