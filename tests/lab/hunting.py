"""A leak hunt: where credentials are while `deploy-runner` works, succeeds and fails, and where they are afterwards.

What is known: everything that Forgejo and OpenBao gave out, and the sudo password. Where it may be is named here, one
by one; anything else is a leak. The two places that are upstream's and not ours are in :func:`shown_by_upstream`.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

from nixops.inventory.model import RunnerModule
from nixops.lab import recipe
from nixops.lab.lab import HostSpec, LabHost
from nixops.lab.setting import Invoked, Setting
from nixops.lab.state import Shape
from tests.lab.deploying import HOST, NAME, setting_for
from tests.lab.leaks import (
    Needles,
    Recorders,
    Seen,
    Watch,
    credentials_in,
    files_below,
    journal_entries,
    leaks_in,
    memory_files,
)

FAILING = "lab.failingUnit = true;"
# On the host's disk. The last is the lab's own stand-in for the secrets that the host had before.
ON_DISK = ("var/lib/vault/approle/secret-id", "var/lib/lab-secrets")
JOURNAL = "var/log/journal"
PROGRAMS = ("git", "nix", "nix-store", "nix-instantiate", "ssh")
MEMORY = ("run", "tmp", "dev/shm")


def shown_by_upstream(seen: Seen) -> Seen:
    """The older NixOS module has the token in its unit's environment and gives it to `register --token`."""
    if "/gitea-runner-" not in seen.group:
        return seen
    arguments = seen.arguments.split(b"\0")
    kept = [a for i, a in enumerate(arguments) if i == 0 or arguments[i - 1] != b"--token"]
    variables = [v for v in seen.variables if not v.startswith(b"TOKEN=")]
    return replace(seen, arguments=b"\0".join(kept), environment=b"\0".join(variables))


def logged_for_upstream(entry: dict[str, bytes]) -> dict[str, bytes]:
    """journald adds the command line of who logs to each entry, `register --token` too."""
    if not entry.get("_SYSTEMD_UNIT", b"").startswith(b"gitea-runner-"):
        return entry
    return {name: value for name, value in entry.items() if name != "_CMDLINE"}


class Hunt:
    """A setting, what was run in it, and what was seen meanwhile."""

    def __init__(self, directory: Path, setting: Setting) -> None:
        self.directory = directory
        self.setting = setting
        # Where Nix's builders, which are other users, get to.
        self.temporary = Path(tempfile.mkdtemp(prefix="nixops-hunt-"))
        self.temporary.chmod(0o755)
        self.began = time.time()
        self.commands: list[bytes] = []
        self.runs: list[Invoked] = []
        self.watch = Watch(self.temporary)
        self.recorders = Recorders(directory / "recorders", PROGRAMS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        shutil.rmtree(self.temporary)

    def run(self, *args: str, code: int) -> Invoked:
        self.commands.append("\0".join([*self.setting.command(*args), ""]).encode())
        done = self.setting.invoke(*args, environ=self.environ)
        assert done.code == code, done
        self.runs.append(done)
        return done

    @property
    def environ(self) -> dict[str, str]:
        """What the tasks get beside the setting's environment."""
        return {"TMPDIR": str(self.temporary), "PATH": self.recorders.path(self.setting.environ["PATH"])}

    def needles(self) -> Needles:
        secrets = credentials_in(audit_of(self.directory))
        secrets |= {f"credential {i} of Forgejo": value for i, value in enumerate(self.setting.forge.issued)}
        secrets |= {"OpenBao's root token": self.setting.bao.root_token.reveal()}
        if self.setting.host.user != "root":
            secrets |= {"the sudo password": recipe.sudo_password()}
        return Needles(secrets)

    def allowed(self, seen: Seen) -> Seen:
        """The operator's own two variables in the task's own process, where the operator put them; and upstream's."""
        if seen.arguments in self.commands:
            own = (b"FORGEJO_TOKEN=", b"BAO_TOKEN=")
            return replace(seen, environment=b"\0".join(v for v in seen.variables if not v.startswith(own)))
        return shown_by_upstream(seen)

    # -- where it looks ---------------------------------------------------------------------------------------------

    def said(self) -> Iterator[tuple[str, bytes]]:
        for number, done in enumerate(self.runs):
            yield f"stdout of run {number}", done.out.encode()
            yield f"stderr of run {number}", done.err.encode()
        yield "the host's console", self.setting.host.console().encode()

    def operators_files(self) -> Iterator[tuple[str, bytes]]:
        """State, home, inventory, checkout with every object of its git; and what is left in temporary directories."""
        own = self.directory / "user" / "secrets"  # the inventory's 0600 files, where the operator put them
        yield from files_below(self.directory, leave_out=[audit_of(self.directory).parent, own, self.recorders.records])
        # What does not heed TMPDIR. Other tests of this machine have directories of their own there.
        shared = Path(tempfile.gettempdir())
        others = [*shared.glob("pytest-of-*"), *shared.glob("nixops-demo-*")]
        yield from files_below(shared, leave_out=others, since=self.began)
        objects = ("git", "-C", str(self.setting.repo.path), "cat-file", "--batch-all-objects", "--batch", "--buffer")
        yield "the checkout's git objects", subprocess.run(objects, check=True, capture_output=True).stdout

    def stores(self) -> Iterator[tuple[str, bytes]]:
        """The closures of what was built here, their derivations too. The host's whole store is on its disk."""
        tops = {d["to"] for done in self.runs if done.out.startswith("{") for d in done.document["hosts"] if d["to"]}
        assert tops
        for top in tops:
            deriver = _lines("nix-store", "--query", "--deriver", top)
            for path in _lines("nix-store", "--query", "--requisites", top, *deriver):
                place = Path(path)
                if place.is_file():
                    yield path, place.read_bytes()
                yield from files_below(place)

    def host_disk(self) -> Iterator[tuple[str, bytes]]:
        """Everything that was ever written on the host's disk and is still there; the journal is read apart."""
        upper = _disk(self.setting.host)
        allowed = [upper / path for path in (*ON_DISK, JOURNAL)]
        for path, data in files_below(upper, leave_out=allowed):
            if not _runners_own_state(path):
                yield path, data

    def host_memory(self) -> Iterator[tuple[str, bytes]]:
        for path, data in memory_files(self.setting.host, *MEMORY):
            if not path.startswith(("/run/secrets/", "/run/credentials/forgejo-runner-", "/run/log/journal/")):
                yield path, data

    def host_journal(self) -> Iterator[tuple[str, bytes]]:
        for number, entry in enumerate(journal_entries(self.setting.host)):
            for name, value in logged_for_upstream(entry).items():
                yield f"{name} of journal entry {number} of {entry.get('_SYSTEMD_UNIT', b'?')!r}", value

    def leaks(self) -> list[str]:
        needles = self.needles()
        places = (
            self.recorders.seen(),
            self.said(),
            self.operators_files(),
            self.stores(),
            self.host_disk(),
            self.host_memory(),
            self.host_journal(),
        )
        found = self.watch.leaks(needles, self.allowed)
        for place in places:
            found += leaks_in(place, needles)
        return found


def _disk(host: LabHost) -> Path:
    return host.directory / "disk" / "upper"


def _runners_own_state(path: str) -> bool:
    """The registration that upstream's runner keeps for itself, in a directory that only root and it can enter."""
    return "/var/lib/private/gitea-runner" in path and path.endswith("/.runner")


def _lines(*argv: str) -> list[str]:
    said = subprocess.run(argv, check=True, capture_output=True, text=True).stdout.split()
    return [line for line in said if line.startswith("/nix/store/")]


def audit_of(directory: Path) -> Path:
    """Where a hunt in ``directory`` has OpenBao write all that it is asked and answers."""
    audit = directory / "audit" / "openbao.log"
    audit.parent.mkdir(exist_ok=True)
    return audit


def hunt_through_deploys(directory: Path, module: RunnerModule, shape: Shape) -> None:
    """A first deploy that fails, one that holds, the checks, a run with nothing to do, and one more that fails.

    Asserts that no argument list, environment, temporary file, output, journal, state, commit or store path on either
    side ever held a credential, and that what is meant to hold one is closed.
    """
    hosts = [HostSpec(HOST, shape)]
    with (
        setting_for(directory, f"hunt-{shape}", hosts=hosts, module=module, audit=audit_of(directory)) as setting,
        Hunt(directory, setting) as hunt,
    ):
        with hunt.watch:
            setting.repo.configure(HOST, FAILING)
            hunt.run("deploy-runner", "--yes", code=4)
            setting.repo.configure(HOST, "")
            hunt.run("deploy-runner", "--yes", "--commit", "--format", "json", code=0)
            hunt.run("verify-runner", code=0)
            hunt.run("deploy-runner", "--yes", code=0)
            setting.repo.configure(HOST, FAILING)
            hunt.run("deploy-runner", "--yes", "--format", "json", code=4)
        found = hunt.leaks()
        assert not found, "\n".join(found)

        # The hunt was fast enough, and looked where there is something to find: at the host's processes too.
        assert hunt.watch.sweeps > 200 and hunt.watch.longest < 2.0, (hunt.watch.sweeps, hunt.watch.longest)
        needles = hunt.needles()
        recorded = {name.split(".")[0] for name, _ in hunt.recorders.seen()}
        assert recorded >= {"git", "nix", "nix-store", "nix-instantiate"}, recorded
        assert setting.host.user != "root" or "ssh" in recorded, recorded
        unjudged = hunt.watch.leaks(needles, lambda seen: seen)
        assert any("-m invoke deploy-runner" in leak for leak in unjudged)
        if module is RunnerModule.GITEA:
            assert any("environment of" in leak and "/gitea-runner-actions2" in leak for leak in unjudged), unjudged
        meant_for_it_are_closed(setting, needles, module)


def meant_for_it_are_closed(setting: Setting, needles: Needles, module: RunnerModule) -> None:
    """The files that have to hold a credential do, and are root's alone, or their owner's in a closed directory."""
    host = setting.host
    listed = host.exec("find", "/run/secrets", "/var/lib/vault/approle", "-type", "f", "-printf", "%p %m %U:%G\n")
    files = {line.split()[0]: line.split()[1:] for line in listed.stdout.decode().splitlines()}
    tokens = [path for path in files if path.startswith("/run/secrets/forgejo-runner-token-native")]
    assert len(tokens) == (1 if module is RunnerModule.GITEA else 3)
    for path in (*tokens, "/var/lib/vault/approle/secret-id"):
        assert files[path] == ["400", "0:0"], (path, files[path])
        assert needles.within(host.exec("cat", path).stdout), path
    assert host.exec("stat", "-c", "%a %U", "/var/lib/vault/approle").stdout == b"700 root\n"
    private = host.exec("stat", "-c", "%a %U", "/var/lib/private").stdout
    assert private == b"700 root\n"
    assert [r.name for r in setting.forge.runners].count(NAME) == len(tokens)
