"""That nothing of a lab stays behind, however its process ends, and that the machine is as it was."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from nixops.lab import state
from nixops.lab.lab import HostSpec, Lab, sweep
from nixops.lab.machine import identify, mounts_below
from nixops.lab.network import mark
from nixops.transport.local import LocalRunner
from tests.lab.reaching import wait_for


def left_of(name: str, directory: Path = state.DIRECTORY) -> list[str]:
    """Everything of the lab ``name`` that can be found on this machine."""
    links = json.loads(subprocess.run(["ip", "-json", "link"], capture_output=True, check=True).stdout)
    namespaces = Path("/run/netns")
    return [
        *(link["ifname"] for link in links if link["ifname"].startswith(mark(name))),
        *(path.name for path in namespaces.glob(f"{mark(name)}-*")),
        *(str(path) for path in mounts_below(directory / name)),
        *(str(path) for path in state.host_group(name, "x").directories if path.parent.exists()),
        *(str(path) for path in [directory / name] if path.exists()),
        *(str(path) for path in Path("/run/systemd/nspawn/propagate").glob(f"{name}.*")),
    ]


SCRIPT = """
import os, sys, time
from pathlib import Path
from nixops.lab.lab import HostSpec, Lab
from nixops.lab import host
from nixops.transport.exec import raise_if_cancelled
name, how, directory = sys.argv[1:4]
if how == "half":
    # stop between the boot of the first host and its being ready
    def stuck(self, timeout=60.0):
        os.write(1, b"up\\n")  # at once: both hosts come here
        while True:
            raise_if_cancelled()
            time.sleep(0.1)
    host.LabHost.wait_ready = stuck
lab = Lab.up([HostSpec("one"), HostSpec("two", "awkward")], name=name, directory=Path(directory))
print("up", flush=True)
if how == "leave":
    sys.exit(0)
if how == "raise":
    raise RuntimeError("a test failed")
time.sleep(1000)
"""


@pytest.fixture
def child(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process of its own with a lab that is up (or half up), where no other run looks for what killed ones left."""
    name, how = request.param
    arguments = [sys.executable, "-c", SCRIPT, name, how, str(tmp_path / "labs")]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "up\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        sweep(LocalRunner(), tmp_path / "labs", also=name)


@pytest.mark.parametrize(
    ("child", "number", "code"),
    [
        (("t-term", "wait"), signal.SIGTERM, 143),
        (("t-int", "wait"), signal.SIGINT, -signal.SIGINT),
        (("t-half", "half"), signal.SIGINT, -signal.SIGINT),
        (("t-leave", "leave"), 0, 0),
        (("t-raise", "raise"), 0, 1),
    ],
    indirect=["child"],
    ids=["SIGTERM", "Ctrl-C", "Ctrl-C while booting", "plain exit", "exception"],
)
def test_a_lab_comes_down_with_its_process(
    child: subprocess.Popen[str], number: int, code: int, tmp_path: Path
) -> None:
    """Proves that no way of ending a process that can be caught leaves a host, a link, a mount or a file."""
    assert isinstance(child.args, list)
    name = str(child.args[3])
    if number:
        assert left_of(name, tmp_path / "labs")
        child.send_signal(number)
    assert child.wait(30) == code
    assert left_of(name, tmp_path / "labs") == []


@pytest.mark.parametrize("child", [("t-kill", "wait")], indirect=True)
def test_the_next_run_takes_down_what_a_killed_one_left(child: subprocess.Popen[str], tmp_path: Path) -> None:
    """Proves that SIGKILL of the operator's process, and of a host's systemd-nspawn, is made good by the next run."""
    directory = tmp_path / "labs"
    left = Lab.attach("t-kill", directory=directory).hosts["one"]
    with Lab.up([HostSpec("one")], name="t-alive", directory=directory) as alive:
        supervisor = next(pid for pid in state.host_group("t-kill", "one").pids() if _name(pid) == "systemd-nspawn")
        child.kill()
        child.wait()
        os.kill(supervisor, signal.SIGKILL)
        wait_for(lambda: identify(supervisor) is None, 60, "systemd-nspawn has ended")
        assert left.running, "the container's init outlives its systemd-nspawn: that is what makes this worth a test"
        assert state.orphaned(state.load_state(directory, "t-kill"))
        assert sweep(LocalRunner(), directory) == ["t-kill"]
        assert left_of("t-kill", directory) == []
        assert alive.hosts["one"].running, "and labs of living processes are left alone"


def _name(pid: int) -> str:
    """What a process is called; nothing for one that has ended."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def test_after_down_the_machine_is_as_it_was(tmp_path: Path) -> None:
    """Proves that links, namespaces, mounts, control groups and the kernel's setting are put back, and what a lab
    changes is only that."""
    setting = state.INOTIFY.read_text()
    sysctls = _sysctls()
    lab = Lab.up([HostSpec("one"), HostSpec("two", "awkward")], name="t-same", directory=tmp_path / "labs")
    try:
        assert len(left_of("t-same", tmp_path / "labs")) > 10
        assert int(state.INOTIFY.read_text()) >= state.INOTIFY_NEEDED
        lab.hosts["one"].power_off()
        threads = [threading.Thread(target=lab.down) for _ in range(2)]  # as a finaliser may meet a fixture
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        lab.down()
    assert left_of("t-same", tmp_path / "labs") == []
    assert state.INOTIFY.read_text() == setting
    assert _sysctls() == sysctls
    assert not (tmp_path / "labs/machine.json").exists()


def _sysctls() -> dict[str, str]:
    names = ("net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding", "net/ipv4/conf/all/rp_filter", "kernel/hostname")
    return {name: Path("/proc/sys", name).read_text() for name in names}


def test_the_tasks_put_up_show_and_take_down_a_lab() -> None:
    """Proves that the lab is there for a person too: lab.up leaves it up, lab.status sees it, lab.down removes it."""
    program = (
        "from invoke import Collection, Program; from nixops.tasks.lab import ns;"
        "Program(namespace=Collection(ns)).run()"
    )

    def invoke(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, timeout=120)

    try:
        up = invoke("lab.up", "--hosts", "2", "--awkward", "1", "--name", "t-task", "--format", "json")
        assert up.returncode == 0, up.stderr
        hosts = json.loads(up.stdout)["hosts"]
        assert [(host["name"], host["user"], host["running"]) for host in hosts] == [
            ("lab01", "root", True),
            ("lab02", "admin", True),
        ]
        assert "lab02                up   awkward  admin@198." in invoke("lab.status", "--name", "t-task").stdout
        again = invoke("lab.up", "--hosts", "1", "--name", "t-task")
        assert again.returncode == 0, "an earlier lab of the name is replaced"
    finally:
        down = invoke("lab.down", "--name", "t-task")
    assert down.returncode == 0, down.stderr
    assert left_of("t-task") == []
    assert invoke("lab.status", "--name", "t-task").returncode == 2
    assert invoke("lab.up", "--hosts", "0").returncode == 2
    assert invoke("lab.up", "--name", "-x").returncode == 2
