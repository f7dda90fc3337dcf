"""What the lab tests of `invoke build-image` share: builders, a registry, images to build, and ways to call it."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from nixops.build.image import Event, ImageResult, build_image
from nixops.build.model import ImageSpec
from nixops.build.session import BuildSession
from nixops.inventory.load import load
from nixops.lab.imagerepo import ImageRepo, make_image_repo, second_system
from nixops.lab.lab import HostSpec, Lab, LabHost
from nixops.lab.registry import RegistryServer
from nixops.lab.setting import NIX_CONFIG, Invoked, end_of_task, interruptible, start_task
from nixops.secret import Redactor
from nixops.transport.local import LocalRunner
from nixops.values import AttrPath, ImageReference, System
from tests.lab.conftest import LabFactory
from tests.lab.reaching import processes, wait_for

X86, ARM = "x86_64-linux", "aarch64-linux"
# Whatever could tell the tools of this machine who we are to AWS or to a registry.
_FOREIGN = ("AWS_", "BAO_", "VAULT_", "DOCKER_", "REGISTRY_", "SSH_", "NIX_", "XDG_")


def works(host: LabHost, words: str) -> bool:
    """Whether a process whose command line begins with ``words`` runs on the host."""
    return any(line.startswith(words) for line in processes(host, words))


def pushing(host: LabHost) -> bool:
    """Whether an image's own program runs on the host."""
    return processes(host, "/bin/copy-to docker://") != []


def push_places(host: LabHost) -> list[str]:
    """The directories of pushes on a host: with the registry's login in them."""
    script = "find /run /dev/shm -name 'nixops-push.*' 2>/dev/null; true"
    return host.exec("sh", "-c", script).stdout.decode().split()


def roots(host: LabHost) -> list[str]:
    """What the garbage collector's roots of ours on a host point to."""
    script = "find /nix/var/nix/gcroots/nixops-images -type l -exec readlink {} + 2>/dev/null; true"
    return host.exec("sh", "-c", script).stdout.decode().split()


def eventually(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Wait until ``condition`` holds."""
    wait_for(condition, seconds, what)


@dataclass
class Call:
    """One call of the library in a thread of its own."""

    thread: threading.Thread
    result: list[ImageResult] = field(default_factory=list)
    errors: list[BaseException] = field(default_factory=list)

    def wait(self, seconds: float = 60.0) -> ImageResult:
        self.thread.join(seconds)
        assert not self.thread.is_alive(), f"not done within {seconds} s"
        if self.errors:
            raise self.errors[0]
        return self.result[0]


class Imaging:
    """An operator with a repository of images that no store has yet, an inventory of builders, and a state of its own.

    :param hosts: the builders, in the inventory's order. :attr:`hosts` has what an inventory says of each.
    :param build: keys for the inventory's ``build``; :param settings: for hosts, by name.
    """

    def __init__(
        self,
        directory: Path,
        lab: Lab,
        registry: RegistryServer | None = None,
        *,
        hosts: tuple[str, ...] | None = None,
        build: Mapping[str, Any] | None = None,
        settings: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self.directory = directory
        self.lab = lab
        self.registry = registry
        self.state = directory / "state"
        self.home = directory / "home"
        self.home.mkdir(parents=True)
        self.events: list[Event] = []
        self.repo: ImageRepo = make_image_repo(directory / "images", LocalRunner())
        self.inventory = directory / "inventory" / "hosts.yml"
        self.hosts = {name: self._host(lab.hosts[name]) for name in lab.hosts}
        names = hosts or tuple(lab.hosts)
        document: dict[str, Any] = {
            "build": {"min_free": 64, "probe_timeout": 30.0, **(build or {})},
            "images": {"app": {"flake": "../images", "attribute": "docker", "systems": [X86]}},
            "hosts": {name: {**self.hosts[name], **(settings or {}).get(name, {})} for name in names},
        }
        if registry is not None:
            document["registries"] = {str(registry.name): self._registry(registry)}
        self.write(document)

    def _host(self, host: LabHost) -> dict[str, Any]:
        return {
            "address": host.address,
            "port": host.port,
            "user": host.user,
            "host_key": host.host_key,
            "ssh": {"identity_file": str(host.identity_file), "connect_timeout": 5.0, "keepalive": 1.0},
            "builder": {"max_jobs": 2, "systems": [X86, ARM]},
        }

    def _registry(self, registry: RegistryServer) -> dict[str, Any]:
        entry: dict[str, Any] = {}
        if registry.ca_file is not None:
            entry["ca_file"] = str(registry.ca_file)
        else:
            entry["tls"] = False
        password = self.directory / "inventory" / "registry-password"
        password.parent.mkdir(exist_ok=True)
        password.touch(mode=0o600)
        password.write_text(registry.password.reveal() + "\n")
        return entry | {"user": registry.user, "password": {"file": "registry-password"}}

    def write(self, document: Mapping[str, Any]) -> None:
        self.inventory.parent.mkdir(exist_ok=True)
        self.inventory.write_text(yaml.safe_dump(dict(document), sort_keys=False))

    def change(self, edit: Callable[[Any], object]) -> None:
        """Change the inventory in place."""
        document = yaml.safe_load(self.inventory.read_text())
        edit(document)
        self.write(document)

    @property
    def environ(self) -> dict[str, str]:
        """The operator's environment: nothing of this machine's logins anywhere."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(_FOREIGN)}
        return {**kept, "HOME": str(self.home), "XDG_STATE_HOME": str(self.state), "NIX_CONFIG": NIX_CONFIG}

    def reference(self, rest: str = "team/app:1") -> ImageReference:
        assert self.registry is not None
        return self.registry.reference(rest)

    # -- the library ------------------------------------------------------------------------------------------

    def spec(self, attr: str, *systems: str, push: ImageReference | None = None, provenance: bool = False) -> ImageSpec:
        of = tuple(System(system) for system in systems or (X86,))
        return ImageSpec(self.repo.flake, AttrPath(attr), of, push, provenance)

    def build(
        self, attr: str, *systems: str, push: ImageReference | None = None, provenance: bool = False
    ) -> ImageResult:
        """Build through the library; what happened is in :attr:`events`."""
        spec = self.spec(attr, *systems, push=push, provenance=provenance)
        with BuildSession(load(self.inventory), Redactor(), self.environ) as session:
            return build_image(spec, session, on_event=self.events.append)

    def begin(self, work: Callable[[], ImageResult]) -> Call:
        """Call something in a thread."""

        def run() -> None:
            try:
                call.result.append(work())
            except BaseException as error:  # noqa: BLE001 - raised by whoever waits for it
                call.errors.append(error)

        call = Call(threading.Thread(target=run, daemon=True))
        call.thread.start()
        return call

    def said(self) -> str:
        """All events, a line each."""
        return "\n".join(f"{event.kind} {event}" for event in self.events)

    # -- the command line -------------------------------------------------------------------------------------

    def command(self, *args: str) -> list[str]:
        return [sys.executable, "-m", "invoke", "build-image", "--inventory", str(self.inventory), *args]

    def start(self, *args: str, environ: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        """Start `invoke build-image` and leave it running. It takes Ctrl-C as at a terminal."""
        return start_task(interruptible(self.command(*args)), {**self.environ, **(environ or {})})

    def invoke(self, *args: str, environ: Mapping[str, str] | None = None, timeout: float = 60.0) -> Invoked:
        """`invoke build-image` to its end; it must show no traceback whatever happens."""
        return ended(self.start(*args, environ=environ), timeout)

    def image(self, attr: str, *more: str) -> tuple[str, ...]:
        """The flags for one of the repository's images."""
        return ("--flake", str(self.repo.directory), "--attr", attr, *more)


def builders_of_both_systems(lab_factory: LabFactory) -> Lab:
    """``first`` and ``second``, which build for both systems, and ``third`` with a login that is not root's."""
    lab = lab_factory(HostSpec("first"), HostSpec("second"), HostSpec("third", "awkward"))
    for name in ("first", "second"):
        second_system(lab.hosts[name])
    return lab


def chosen(builders: Lab, works: Callable[[LabHost], bool], what: str) -> tuple[LabHost, LabHost]:
    """Wait until one of ``first`` and ``second`` is at work; that one, and the other. Nobody can say beforehand which:
    both have the load of this machine, and read it at different moments."""
    pair = (builders.hosts["first"], builders.hosts["second"])
    found: list[tuple[LabHost, LabHost]] = []

    def look() -> bool:
        found.extend((host, other) for host, other in (pair, pair[::-1]) if works(host))
        return found != []

    eventually(look, 90, what)
    return found[0]


def disregard_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no builder count as overloaded in what this process builds: of two lab hosts, which both have the load of
    this machine, one may seem to be and the other not, as they read it at different moments."""
    monkeypatch.setattr("nixops.build.rank.OVERLOADED", math.inf)


def ended(process: subprocess.Popen[str], timeout: float = 60.0) -> Invoked:
    """How a started task ended: with no traceback whatever happened."""
    done = end_of_task(process, timeout)
    assert "Traceback" not in done.out + done.err and "a defect in nixops" not in done.out + done.err, done
    return done


def skopeo(registry: RegistryServer, *args: str) -> str:
    """skopeo as anybody's client of the registry: another implementation than ours."""
    auth = registry.storage.parent / "skopeo-auth.json"
    auth.touch(mode=0o600)
    from nixops.registry.login import Login

    auth.write_text(Login(registry.user, registry.password).auth_file(registry.name).reveal())
    certificates = registry.storage.parent / "skopeo-certificates"
    certificates.mkdir(exist_ok=True)
    if registry.ca_file is not None:
        (certificates / "ca.crt").write_bytes(registry.ca_file.read_bytes())
    verb, *rest = args
    option = {"inspect": "--cert-dir", "copy": "--src-cert-dir"}[verb]
    done = subprocess.run(
        ["skopeo", "--insecure-policy", verb, "--authfile", str(auth), option, str(certificates), *rest],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def raw(registry: RegistryServer, reference: ImageReference) -> dict[str, Any]:
    """What a tag names, as skopeo gets it."""
    document: dict[str, Any] = json.loads(skopeo(registry, "inspect", "--raw", f"docker://{reference}"))
    return document
