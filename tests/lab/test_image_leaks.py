"""While an image is pushed: where the registry's login and the builders' key are, and that they are nowhere else."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nixops.lab.lab import HostSpec, Lab, LabHost
from nixops.lab.registry import RegistryServer
from nixops.lab.setting import Invoked
from tests.lab.conftest import LabFactory
from tests.lab.imaging import X86, Imaging, ended, eventually, push_places, pushing
from tests.lab.leaks import (
    Needles,
    Recorders,
    Watch,
    files_below,
    journal_entries,
    leaks_in,
    memory_files,
)

MEMORY = ("run", "tmp", "dev/shm")
PROGRAMS = ("nix", "nix-store", "ssh", "ssh-add", "ssh-agent", "git")


@pytest.fixture(scope="module")
def builders(lab_factory: LabFactory) -> Lab:
    return lab_factory(HostSpec("first"))


@pytest.fixture(scope="module")
def registry(builders: Lab) -> Iterator[RegistryServer]:
    with RegistryServer(bind=builders.gateway) as server:
        yield server


@pytest.fixture
def temporary() -> Iterator[Path]:
    """Where the task keeps its temporary files; Nix's builders, which are other users, get there."""
    path = Path(tempfile.mkdtemp(prefix="nixops-hunt-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


def kept_on(host: LabHost) -> Iterator[tuple[str, bytes]]:
    """Every byte that a builder has: its disk, its memory's file systems, its journal, its console."""
    yield from files_below(host.directory / "disk" / "upper")
    yield from memory_files(host, *MEMORY)
    for number, entry in enumerate(journal_entries(host)):
        for name, value in entry.items():
            yield f"{name} of journal entry {number}", value
    yield "the console", host.console().encode()


def said(runs: list[Invoked]) -> Iterator[tuple[str, bytes]]:
    for number, done in enumerate(runs):
        yield f"stdout of run {number}", done.out.encode()
        yield f"stderr of run {number}", done.err.encode()


def test_neither_login_nor_key_is_seen_anywhere_while_images_are_pushed_nor_left_afterwards(
    builders: Lab, registry: RegistryServer, tmp_path: Path, temporary: Path
) -> None:
    """Proves: over a push that works, one that fails and one that is interrupted, with the builders' key from a secret
    store: no process of this machine or the builder ever shows the registry's password, its base64, or the key in its
    arguments or environment; while it pushes, the builder has the login in one 0600 file on tmpfs and nowhere else;
    afterwards no disk, memory file system, journal, console, output, state, record or temporary file has any of it.
    """
    imaging = Imaging(tmp_path, builders, registry)
    host = builders.hosts["first"]
    key = tmp_path / "inventory" / "builders-key"
    key.touch(mode=0o600)
    key.write_bytes(host.identity_file.read_bytes())
    imaging.change(lambda document: document["build"].update(ssh_key={"file": "builders-key"}))
    imaging.change(lambda document: document["hosts"]["first"]["ssh"].pop("identity_file"))
    lines = key.read_text().splitlines()[1:-1]
    needles = Needles(
        {
            "the registry's password": registry.password.reveal(),
            "the registry's login": f"{registry.user}:{registry.password.reveal()}",
            # The last lines hold the private half; the first begins as every key's does.
            **{f"line {number} of the builders' key": line for number, line in enumerate(lines) if number > 1},
        }
    )
    began = time.time()
    recorders = Recorders(tmp_path / "recorders", PROGRAMS)
    environ = {"TMPDIR": str(temporary), "PATH": recorders.path(imaging.environ["PATH"])}
    reference = imaging.reference("team/hunted:1")
    push = ("--systems", X86, "--push", f"docker://{reference}")
    runs: list[Invoked] = []
    with Watch(temporary) as watch, Watch(Path("/dev/shm")) as shared:
        process = imaging.start(*imaging.image("slow-push", *push, "--provenance"), environ=environ)
        eventually(lambda: pushing(host), 20, "the push")
        (place,) = push_places(host)
        during = leaks_in(kept_on(host), needles)
        runs.append(ended(process))
        runs.append(imaging.invoke(*imaging.image("refused", *push, "--format", "json"), environ=environ))
        process = imaging.start(*imaging.image("endless-push", *push), environ=environ)
        eventually(lambda: pushing(host), 20, "the push that is to be interrupted")
        process.terminate()
        runs.append(ended(process))
        eventually(lambda: push_places(host) == [], 10, "the last push has ended")
    assert [done.code for done in runs] == [0, 1, 130], runs

    # It was there to be found while it was needed, in that one place, which this hunt does see.
    assert during and all(f" in {place}/auth.json" in leak for leak in during), during

    def everything_is_judged(seen: object) -> object:
        return seen

    found = watch.leaks(needles, everything_is_judged)  # type: ignore[arg-type]  # gives back what it is given
    found += leaks_in(shared.files.items(), needles)
    found += leaks_in(recorders.seen(), needles)
    found += leaks_in(said(runs), needles)
    found += leaks_in(kept_on(host), needles)
    mine = (key, imaging.inventory.parent / "registry-password")  # where the operator put them
    found += leaks_in(files_below(tmp_path, leave_out=[*mine, recorders.records]), needles)
    others = [*Path("/tmp").glob("pytest-of-*"), registry.storage.parent]
    found += leaks_in(files_below(Path(tempfile.gettempdir()), leave_out=others, since=began), needles)
    found += leaks_in(files_below(Path("/dev/shm"), since=began), needles)
    assert not found, "\n".join(found)

    # The hunt was fast enough, and saw what there was to see.
    assert watch.sweeps > 200 and watch.longest < 2.0, (watch.sweeps, watch.longest)
    arguments = b"\n".join(seen.arguments for seen in watch.seen)
    assert b"skopeo\0" in arguments and b"nixops-push" in arguments
    recorded = {name.split(".")[0] for name, _ in recorders.seen()}
    assert {"nix", "ssh", "ssh-add"} <= recorded, recorded
    assert any(b"REGISTRY_AUTH_FILE=/run/" in seen.environment for seen in watch.seen)
