"""Image programs, disks and operators that misbehave during a push: what is held up, what is kept, what is left."""

from __future__ import annotations

import json
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from nixops.errors import NoBuilder
from nixops.lab.imagerepo import second_system
from nixops.lab.lab import HostSpec, Lab
from nixops.lab.registry import RegistryServer
from tests.lab.conftest import LabFactory
from tests.lab.imaging import ARM, X86, Imaging, ended, eventually, push_places, pushing, works
from tests.lab.reaching import processes

pytestmark = pytest.mark.usefixtures("nix_of_the_lab")

# What the programs below wait with, as it shows among the processes.
BEHIND, AWAY, DEAF = "sleep 77113", "sleep 77114", "sleep 77115"
PROGRAMS = {
    # Pushes, and leaves a process behind that has its output open.
    "behind": f'push "$@" && {{ {BEHIND} & }}',
    # The same, in a session of its own: nobody finds it by its parent or its group.
    "away": f'setsid {AWAY} & sleep 0.5; push "$@"',
    "deaf": f"trap '' TERM INT HUP; {DEAF}",
    # Says another digest than it pushed, and far too much of it.
    "liar": 'push "$@"; while [ "$1" != --digestfile ]; do shift; done; yes sha256:0 | head -c 300000 >"$2"',
}


@pytest.fixture(scope="module")
def builders(lab_factory: LabFactory) -> Lab:
    lab = lab_factory(HostSpec("first"))
    second_system(lab.hosts["first"])
    return lab


@pytest.fixture
def imaging(builders: Lab, registry: RegistryServer, tmp_path: Path) -> Imaging:
    """With an image for each of ``PROGRAMS``, whose ``copyTo`` is that program."""
    made = Imaging(tmp_path, builders, registry)
    images = made.repo.directory / "images.nix"
    (made.repo.directory / "misbehaving.sh").write_text(
        'mkdir -p "$out/bin"\n'
        "skopeo=$(command -v skopeo)\n"
        "{\n"
        '  echo "#!/bin/sh"\n'
        '  echo "push() { $skopeo --insecure-policy copy oci:$image \\"\\$@\\"; }"\n'
        '  printf "%s\\n" "$body"\n'
        '} >"$out/bin/copy-to"\n'
        'chmod 755 "$out/bin/copy-to"\n'
    )
    more = "".join(
        f"{name} = let image = lab.layout {json.dumps(name)} {{ }}; in image // {{\n"
        f'  copyTo = lab.run "{name}" ./misbehaving.sh {{ inherit image; body = {json.dumps(body)}; }};\n'
        "};\n"
        for name, body in PROGRAMS.items()
    )
    images.write_text(images.read_text().replace("      misplaced =", more + "      misplaced ="))
    subprocess.run(["git", "-C", made.repo.directory, "add", "--all"], check=True)
    return made


@pytest.mark.parametrize("name", ["behind", "away"])
def test_a_program_that_leaves_a_process_behind_does_not_hold_up_the_push(
    imaging: Imaging, builders: Lab, name: str
) -> None:
    """Proves: a push is over when its program is, whatever that has started and not waited for; what it left in its own
    process group is ended on the builder."""
    host = builders.hosts["first"]
    began = time.monotonic()
    try:
        result = imaging.build(name, push=imaging.reference(f"team/{name}:1"))
        assert time.monotonic() - began < 20
        assert result.moved and push_places(host) == []
        assert works(host, AWAY) == (name == "away")
        assert not works(host, BEHIND)
    finally:
        host.exec("pkill", "-x", "sleep", check=False)


def test_a_program_that_heeds_no_signal_is_killed_and_told_as_one_that_takes_too_long(
    imaging: Imaging, builders: Lab
) -> None:
    """Proves: the push's time is up for it too, in the same words, and nothing of it stays."""
    host = builders.hosts["first"]
    imaging.change(lambda document: document["build"].update(push_timeout=2))
    done = imaging.invoke(
        *imaging.image("deaf", "--systems", X86, "--push", f"docker://{imaging.reference('team/deaf:1')}")
    )
    assert done.code == 1 and "did not end within 2 s" in done.err, done
    assert push_places(host) == [] and not works(host, DEAF)


def test_what_a_program_says_of_its_digest_is_taken_for_no_more_than_that(imaging: Imaging) -> None:
    """Proves: a digest file full of something else neither breaks the answer nor is believed; the registry is asked."""
    result = imaging.build("liar", push=imaging.reference("team/liar:1"))
    assert result.moved and result.digest is not None and result.digest.startswith("sha256:")


def test_a_state_directory_that_is_full_keeps_the_tag_where_it_was(
    imaging: Imaging, registry: RegistryServer, tmp_path: Path
) -> None:
    """Proves: exit code 1 says that the tag was not moved, and it was not: there is room for the record before."""
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "nixops-lab", small], check=True)
    try:
        push = f"docker://{imaging.reference('team/full:1')}"
        arguments = imaging.image("docker", "--systems", X86, "--push", push)
        done = imaging.invoke(*arguments, environ={"XDG_STATE_HOME": str(small)})
        assert done.code == 1 and "No space left on device" in done.err and "the tag is where it was" in done.err, done
        assert [tag for tag in registry.tags("team/full") if tag == "1"] == []
        assert list((small / "nixops" / "images").iterdir()) == []
    finally:
        subprocess.run(["umount", small], check=True)
    assert imaging.invoke(*arguments).code == 0
    assert "1" in registry.tags("team/full")


@pytest.mark.parametrize("moment", ["login", "build", "push"])
def test_an_operator_that_is_killed_leaves_nothing_in_memory_on_either_side(
    imaging: Imaging, builders: Lab, registry: RegistryServer, tmp_path: Path, moment: str
) -> None:
    """Proves: killed on the spot while it logs in, builds or pushes two systems with a key of its own, the task leaves
    no directory, socket or agent on this machine, and no push or login on the builder; the next run does its work."""
    host = builders.hosts["first"]
    key = tmp_path / "inventory" / "builders-key"
    key.touch(mode=0o600)
    key.write_bytes(host.identity_file.read_bytes())
    imaging.change(lambda document: document["build"].update(ssh_key={"file": "builders-key"}))
    imaging.change(lambda document: document["hosts"]["first"]["ssh"].pop("identity_file"))
    runtime = Path(tempfile.mkdtemp(prefix="nixops-test-", dir="/run"))  # a socket's path must be short
    environ = {"XDG_RUNTIME_DIR": str(runtime)}
    repository = f"team/killed-{moment}"
    push = ("--systems", f"{X86},{ARM}", "--push", f"docker://{imaging.reference(f'{repository}:1')}")
    try:
        process = imaging.start(
            *imaging.image({"login": "docker", "build": "slow", "push": "slow-push"}[moment], *push), environ=environ
        )
        eventually(lambda: list(runtime.glob("nixops-key-*")), 90, "the agent")
        if moment == "build":
            eventually(lambda: processes(host, "-layer.sh"), 90, "the build")
        if moment == "push":
            eventually(lambda: pushing(host), 90, "the push")
        process.send_signal(signal.SIGKILL)
        assert ended(process).code == -signal.SIGKILL
        eventually(lambda: list(runtime.iterdir()) == [], 10, "nothing in memory here")
        eventually(lambda: push_places(host) == [] and not pushing(host), 15, "nothing on the builder")
        eventually(lambda: not processes(host, "nixops-keeper"), 15, "no keeper")
        assert "1" not in registry.tags(repository)
        assert imaging.invoke(*imaging.image("docker", *push), environ=environ).code == 0
        assert "1" in registry.tags(repository)
        assert list(runtime.iterdir()) == []
    finally:
        subprocess.run(["rm", "-rf", runtime], check=True)


def test_a_tmpfs_without_room_is_not_where_the_login_goes(imaging: Imaging, builders: Lab) -> None:
    """Proves: the login's own runtime directory is full: the next tmpfs of the builder is taken, and is clean again;
    where there is none the builder is at fault and not the image, and half a login is never tried."""
    host = builders.hosts["first"]
    full = "mount -t tmpfs -o size=4k,mode=700 nixops-lab {0} && head -c 4096 /dev/zero >{0}/full"
    host.exec("sh", "-c", "mkdir -p /run/user/0 && " + full.format("/run/user/0"))
    try:
        assert imaging.build("docker", push=imaging.reference("team/room:1")).moved
        assert push_places(host) == []
        host.exec("sh", "-c", full.format("/dev/shm"))
        host.exec("mount", "-t", "ramfs", "-o", "ro", "nixops-lab", "/run/user/0")
        host.exec("sh", "-c", "mount --bind /run /run && mount -o remount,bind,ro /run")
        try:
            with pytest.raises(NoBuilder, match="no tmpfs with room"):
                imaging.build("layout", push=imaging.reference("team/room:2"))
        finally:
            host.exec("sh", "-c", "umount /run; umount /run/user/0; umount /dev/shm")
    finally:
        host.exec("umount", "/run/user/0")
    assert push_places(host) == []
