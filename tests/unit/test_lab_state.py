"""Names, addresses, files and settings of labs: all that can be known without booting a host."""

from __future__ import annotations

import dataclasses
import ipaddress
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nixops.errors import HostFault, UsageError
from nixops.lab import state
from nixops.lab.awkward import rewrite_unit
from nixops.lab.machine import (
    ProcessId,
    hierarchies,
    identify,
    locked,
    mounts_below,
    read_json,
    this_process,
    write_json,
)
from nixops.lab.network import PREFIX, RANGE, Network, choose_subnet, mark
from nixops.lab.recipe import openbao_binary
from nixops.lab.state import HostSpec, LabState

SUBNET = ipaddress.IPv4Network("198.18.4.0/22")


def some_state(name: str = "try", **changes: object) -> LabState:
    base = LabState(name, SUBNET, Path("/cache/tree"), (HostSpec("a"), HostSpec("b", "awkward", 64)), None, "boot-1")
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]  # fields by name


# -- names and addresses ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "-oProxyCommand=x", "a b", "a/b", "ä", "a" * 41, "a-"])
def test_a_host_name_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="no name for a lab host"):
        HostSpec(name)


def test_an_unknown_shape_is_refused() -> None:
    with pytest.raises(UsageError, match="no shape"):
        HostSpec("a", "round")  # type: ignore[arg-type]  # what a caller without a type checker may pass


@pytest.mark.parametrize("name", ["", "-x", "../../etc", "A", "a.b", "a" * 21])
def test_a_lab_name_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="no name for a lab"):
        state.check_name(name)


def test_names_of_links_fit_the_kernel_for_the_last_host_of_the_longest_lab() -> None:
    network = Network("a" * 20, SUBNET)
    assert len(network.link(network.capacity - 1)) <= 15
    assert len(network.bridge) <= 15
    assert network.link(3).startswith(mark("a" * 20))


def test_addresses_lie_in_the_subnet_and_none_is_the_operators_or_the_broadcast() -> None:
    network = Network("try", SUBNET)
    addresses = [network.address(index) for index in range(network.capacity)]
    assert len(set(addresses)) == 1021
    assert all(ipaddress.IPv4Address(address) in SUBNET for address in addresses)
    assert not {network.gateway, str(SUBNET.broadcast_address), str(SUBNET.network_address)} & set(addresses)


def test_a_lab_keeps_its_subnet_until_somebody_else_has_it() -> None:
    first = choose_subnet("try", [])
    assert choose_subnet("try", [ipaddress.IPv4Network("10.0.0.0/8")]) == first
    assert first.prefixlen == PREFIX and first.subnet_of(RANGE)
    taken = [first]
    for _ in range(5):
        taken.append(choose_subnet("try", taken))
    assert len(set(taken)) == 6
    assert not choose_subnet("try", [ipaddress.IPv4Network(f"{first.network_address + 256}/24")]).overlaps(first)


def test_when_every_subnet_is_taken_the_error_says_so() -> None:
    with pytest.raises(HostFault, match="no subnet"):
        choose_subnet("try", [RANGE])


# -- state ------------------------------------------------------------------------------------------------------


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    saved = some_state(owner=ProcessId(12, 345))
    saved.save(tmp_path)
    assert state.load_state(tmp_path, "try") == saved
    assert state.labs(tmp_path) == ["try"]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"name": "try"}', '{"name":"try","subnet":"x","tree":"","hosts":[],"owner":null}']
)
def test_a_file_that_a_crash_left_half_is_no_lab_and_no_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "try").mkdir()
    (tmp_path / "try/lab.json").write_text(text)
    assert state.load_state(tmp_path, "try") is None
    assert not state.in_use(None) and not state.orphaned(None)


def test_a_lab_is_in_use_while_its_process_lives_and_orphaned_after() -> None:
    boot = state.this_boot()
    mine = some_state(owner=this_process(), boot=boot)
    assert state.in_use(mine) and not state.orphaned(mine)

    kept = some_state(owner=None, boot=boot)
    assert not state.in_use(kept) and not state.orphaned(kept)

    reused_number = some_state(owner=ProcessId(os.getpid(), this_process().started + 1), boot=boot)
    assert not state.in_use(reused_number) and state.orphaned(reused_number)

    before_reboot = some_state(owner=this_process(), boot="another")
    assert not state.in_use(before_reboot) and state.orphaned(before_reboot)


def test_a_zombie_counts_as_dead() -> None:
    with subprocess.Popen([sys.executable, "-c", "pass"], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.read()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert Path(f"/proc/{child.pid}").exists()
        assert identify(child.pid) is None
    assert identify(os.getpid()) == this_process()


def test_json_is_replaced_whole_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "below/a.json"
    write_json(path, {"a": 1})
    write_json(path, {"a": 2})
    assert read_json(path) == {"a": 2}
    assert [entry.name for entry in path.parent.iterdir()] == ["a.json"]
    assert read_json(tmp_path / "absent") is None


# -- the machine's setting --------------------------------------------------------------------------------------


@pytest.fixture
def setting(tmp_path: Path) -> Path:
    path = tmp_path / "max_user_instances"
    path.write_text("128\n")
    return path


def labs_of(tmp_path: Path, *names: str) -> Path:
    directory = tmp_path / "labs"
    for name in names:
        (directory / name).mkdir(parents=True)
    return directory


def test_the_last_lab_to_go_puts_the_setting_back(tmp_path: Path, setting: Path) -> None:
    labs = labs_of(tmp_path, "a", "b")
    state.hold_inotify(labs, "a", setting, labs)
    state.hold_inotify(labs, "b", setting, labs)
    assert setting.read_text() == "8192"
    state.release_inotify(labs, "a", setting, labs)
    assert setting.read_text() == "8192"
    state.release_inotify(labs, "b", setting, labs)
    assert setting.read_text() == "128"
    assert not (labs / "machine.json").exists()
    state.release_inotify(labs, "b", setting, labs)
    assert setting.read_text() == "128"


def test_a_lab_of_another_directory_does_not_take_the_setting_from_those_that_need_it(
    tmp_path: Path, setting: Path
) -> None:
    labs, others = labs_of(tmp_path / "1", "a"), labs_of(tmp_path / "2", "b")
    state.hold_inotify(others, "b", setting, labs)
    state.hold_inotify(labs, "a", setting, labs)
    state.release_inotify(others, "b", setting, labs)
    assert setting.read_text() == "8192"
    state.release_inotify(labs, "a", setting, labs)
    assert setting.read_text() == "128"


def test_a_lab_whose_directory_is_gone_holds_nothing(tmp_path: Path, setting: Path) -> None:
    labs = labs_of(tmp_path, "a", "killed")
    state.hold_inotify(labs, "killed", setting, labs)
    state.hold_inotify(labs, "a", setting, labs)
    (labs / "killed").rmdir()
    state.release_inotify(labs, "a", setting, labs)
    assert setting.read_text() == "128"


def test_the_former_value_outlives_a_kill_of_every_user(tmp_path: Path, setting: Path) -> None:
    labs = labs_of(tmp_path, "killed", "next")
    state.hold_inotify(labs, "killed", setting, labs)
    (labs / "killed").rmdir()
    state.hold_inotify(labs, "next", setting, labs)
    state.release_inotify(labs, "next", setting, labs)
    assert setting.read_text() == "128"


def test_what_somebody_else_set_meanwhile_is_left_alone(tmp_path: Path, setting: Path) -> None:
    labs = labs_of(tmp_path, "a")
    state.hold_inotify(labs, "a", setting, labs)
    setting.write_text("500\n")
    state.release_inotify(labs, "a", setting, labs)
    assert setting.read_text() == "500\n"


def test_a_limit_that_is_higher_already_stays(tmp_path: Path, setting: Path) -> None:
    setting.write_text("65536\n")
    labs = labs_of(tmp_path, "a")
    state.hold_inotify(labs, "a", setting, labs)
    assert setting.read_text().strip() == "65536"
    state.release_inotify(labs, "a", setting, labs)
    assert setting.read_text().strip() == "65536"


def test_a_lock_keeps_another_process_out(tmp_path: Path) -> None:
    probe = "import fcntl,sys; fcntl.flock(open(sys.argv[1], 'a'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    argv = [sys.executable, "-c", probe, str(tmp_path / "lock")]
    with locked(tmp_path / "lock"):
        assert subprocess.run(argv, capture_output=True).returncode == 1
    assert subprocess.run(argv, capture_output=True).returncode == 0


# -- what the kernel says ---------------------------------------------------------------------------------------

MOUNTINFO = r"""22 1 254:0 / / rw - ext4 /dev/vda rw
30 22 0:30 / /run/nixops-lab/try/hosts/a/disk rw - tmpfs nixops-lab rw
31 22 0:31 / /run/nixops-lab/try/hosts/a/root rw - overlay overlay rw
32 22 0:32 / /run/nixops-lab/try2/disk rw - tmpfs nixops-lab rw
33 22 0:33 / /run/nixops-lab/try/with\040space rw - tmpfs x rw
"""


def test_mounts_of_one_lab_are_found_last_first_and_no_others() -> None:
    assert mounts_below(Path("/run/nixops-lab/try"), MOUNTINFO) == [
        Path("/run/nixops-lab/try/with space"),
        Path("/run/nixops-lab/try/hosts/a/root"),
        Path("/run/nixops-lab/try/hosts/a/disk"),
    ]


def test_the_hierarchies_are_the_unified_one_and_systemds_own() -> None:
    hybrid = (
        "40 1 0:40 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
        "41 1 0:41 / /sys/fs/cgroup/systemd rw shared:1 - cgroup cgroup rw,xattr,name=systemd\n"
        "42 1 0:42 / /sys/fs/cgroup/unified rw shared:2 - cgroup2 cgroup2 rw\n"
    )
    assert hierarchies(hybrid) == (Path("/sys/fs/cgroup/unified"), Path("/sys/fs/cgroup/systemd"))
    assert hierarchies("42 1 0:42 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n") == (Path("/sys/fs/cgroup"),)
    with pytest.raises(HostFault, match="no cgroup2"):
        hierarchies("22 1 254:0 / / rw - ext4 /dev/vda rw\n")


# -- the awkward shape ------------------------------------------------------------------------------------------


def test_units_of_the_awkward_shape_name_programs_where_they_are() -> None:
    text = (
        "ConditionPathExists=|/usr/bin/dbus-daemon\n"
        "ExecStart=@/usr/bin/nix-daemon nix-daemon --daemon\n"
        "ExecStartPre=-/usr/sbin/sshd -t\n"
        "ExecReload=/bin/kill -HUP $MAINPID\n"
        "ExecStart=systemd-tmpfiles --create\n"
        "ExecStart=/bin/sh -c 'kill /usr/bin/kill'\n"
        "ExecStart=/usr/lib/systemd/systemd-logind\n"
        "ExecStart=\n"
        "Description=/usr/bin/kill\n"
    )
    names = {"dbus-daemon", "nix-daemon", "sshd", "kill", "systemd-tmpfiles", "sh", "systemd-logind"}
    assert rewrite_unit(text, names) == (
        "ConditionPathExists=|/opt/lab/tools/dbus-daemon\n"
        "ExecStart=@/opt/lab/tools/nix-daemon nix-daemon --daemon\n"
        "ExecStartPre=-/opt/lab/tools/sshd -t\n"
        "ExecReload=/opt/lab/tools/kill -HUP $MAINPID\n"
        "ExecStart=/opt/lab/tools/systemd-tmpfiles --create\n"
        "ExecStart=/bin/sh -c 'kill /usr/bin/kill'\n"
        "ExecStart=/usr/lib/systemd/systemd-logind\n"
        "ExecStart=\n"
        "Description=/usr/bin/kill\n"
    )


def test_the_openbao_program_is_the_binary_and_not_its_wrapper() -> None:
    found = openbao_binary()
    assert found.path.read_bytes()[:4] == b"\x7fELF"
    version = subprocess.run([found.path, "version"], capture_output=True, text=True, check=True).stdout
    assert f"OpenBao v{found.version}" in version


# -- tasks ------------------------------------------------------------------------------------------------------


def test_listing_the_lab_tasks_loads_nothing_heavy() -> None:
    script = "import json, sys, nixops.tasks.lab; print(json.dumps(sorted(sys.modules)))"
    loaded = json.loads(subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout)
    assert "nixops.tasks.lab" in loaded
    heavy = {"fabric", "paramiko", "boto3", "hvac", "testinfra", "requests", "rich", "pydantic", "nixops.lab.lab"}
    assert heavy.isdisjoint(loaded)


@pytest.mark.parametrize(
    "words",
    [
        ("lab.up", "--hosts", "0"),
        ("lab.up", "--awkward", "9"),
        ("lab.up", "--format", "xml"),
        ("lab.status", "--name", "/"),
    ],
)
def test_bad_usage_of_the_lab_tasks_ends_with_2_in_one_line(words: tuple[str, ...]) -> None:
    script = (
        "from invoke import Collection, Program; from nixops.tasks.lab import ns;"
        "Program(namespace=Collection(ns)).run()"
    )
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
