"""While an image is pushed: where the registry's login and the builders' key are, and that they are nowhere else.

For every place that they can come from: files, OpenBao, AWS, variables of the operator's, a credential helper.
"""

from __future__ import annotations

import base64
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

from nixops.lab.aws import AwsServer
from nixops.lab.lab import HostSpec, Lab, LabHost
from nixops.lab.openbao import BaoServer
from nixops.lab.registry import RegistryServer
from nixops.lab.setting import Invoked
from nixops.secret import Secret
from tests.lab.conftest import LabFactory
from tests.lab.imaging import X86, Imaging, ended, eventually, push_places, pushing
from tests.lab.leaks import (
    LOOKED,
    UNTIL_LOOKED,
    Needles,
    Recorders,
    Seen,
    Watch,
    files_below,
    journal_entries,
    leaks_in,
    memory_files,
    telltale,
)

MEMORY = ("run", "tmp", "dev/shm")
PROGRAMS = ("env", "nix", "nix-store", "ssh", "ssh-add", "ssh-agent", "git", "sh")


@pytest.fixture(scope="module")
def builders(lab_factory: LabFactory) -> Lab:
    return lab_factory(HostSpec("first"))


@pytest.fixture(scope="module")
def registry(builders: Lab) -> Iterator[RegistryServer]:
    with RegistryServer(bind=builders.gateway) as server:
        yield server


@pytest.fixture(scope="module")
def aws(builders: Lab) -> Iterator[AwsServer]:
    with AwsServer() as server:
        server.put_secret("nix-runner-ssh-key", Secret(builders.identity_file.read_text(encoding="ascii")))
        yield server


@pytest.fixture(scope="module")
def ecr(builders: Lab, aws: AwsServer) -> Iterator[RegistryServer]:
    """A registry that takes the token of the lab's ECR."""
    answer = aws.client("ecr").get_authorization_token()
    token = base64.b64decode(answer["authorizationData"][0]["authorizationToken"]).decode()
    user, _, password = token.partition(":")
    with RegistryServer(bind=builders.gateway, user=user, password=Secret(password)) as server:
        yield server


def kept_on(host: LabHost) -> Iterator[tuple[str, bytes]]:
    """Every byte that a builder has: its disk, its memory's file systems, its journal, its console."""
    yield from files_below(host.directory / "disk" / "upper")
    yield from memory_files(host, *MEMORY)
    for number, entry in enumerate(journal_entries(host)):
        for name, value in entry.items():
            yield f"{name} of journal entry {number}", value
    yield "the console", host.console().encode()


@dataclass
class Way:
    """Where an operator keeps the login and the key.

    :ivar environ: variables of the operator's.
    :ivar needles: what nobody else may see, beside the key and the registry's login.
    :ivar own: of these variables the value may stand in the environment of the task itself and of ``programs``.
    :ivar programs: the operator's own, which a reference or a configuration names.
    :ivar places: the files where the operator put them.
    """

    environ: Mapping[str, str] = field(default_factory=dict)
    needles: Mapping[str, str] = field(default_factory=dict)
    own: tuple[str, ...] = ()
    programs: tuple[str, ...] = ()
    places: tuple[Path, ...] = ()


class Hunt:
    """An operator who pushes images, and everything that is seen and left meanwhile."""

    def __init__(self, directory: Path, imaging: Imaging, way: Way) -> None:
        assert imaging.registry is not None
        self.directory, self.imaging, self.way, self.registry = directory, imaging, way, imaging.registry
        self.host = imaging.lab.hosts["first"]
        lines = imaging.lab.identity_file.read_text().splitlines()[1:-1]
        password = self.registry.password.reveal()
        self.needles = Needles(
            {
                "the registry's password": password,
                "the registry's login": f"{self.registry.user}:{password}",
                # The last lines hold the private half; the first begins as every key's does.
                **{f"line {number} of the builders' key": line for number, line in enumerate(lines) if number > 1},
                **way.needles,
            }
        )
        self.recorders = Recorders(directory / "recorders", PROGRAMS)
        # Where the task keeps its temporary files; Nix's builders, which are other users, get there.
        self.temporary = Path(tempfile.mkdtemp(prefix="nixops-hunt-"))
        self.temporary.chmod(0o755)
        self.began = time.time()
        self.runs: list[Invoked] = []
        self.during: list[str] = []
        self.commands: set[bytes] = set()
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._stack.callback(shutil.rmtree, self.temporary)
        self.watch = Watch(self.temporary)
        self.shared = Watch(Path("/dev/shm"), processes=False)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.close()

    def push(self, image: str, tag: str, *more: str, caught: bool = True, ended_by: str | None = None) -> Invoked:
        """Push an image to its end.

        :param caught: look at the builder in the middle of it.
        :param ended_by: ``terminate`` it there.
        """
        reference = self.imaging.reference(f"team/hunted:{tag}")
        flags = self.imaging.image(image, "--systems", X86, "--push", f"docker://{reference}", *more)
        path = {"PATH": self.recorders.path(self.imaging.environ["PATH"])}
        # Programs that wait to be looked at go on when this is there.
        self.host.exec(*(("rm", "-f") if caught else ("touch",)), LOOKED)
        process = self.imaging.start(*flags, environ={"TMPDIR": str(self.temporary), **path, **self.way.environ})
        self.commands.add("\0".join([*self.imaging.command(*flags), ""]).encode())
        if caught:
            eventually(lambda: pushing(self.host), 90, "the push")
            (place,) = push_places(self.host)
            found = leaks_in(kept_on(self.host), self.needles)
            # It is there to be found while it is needed, in that one place, which this hunt does see.
            assert found and all(f" in {place}/auth.json" in leak for leak in found), found
            modes = self.host.exec("stat", "-c", "%a %u %F", place, f"{place}/auth.json").stdout.decode().splitlines()
            assert modes == ["700 0 directory", "600 0 regular file"]
        if ended_by is not None:
            process.terminate()
        elif caught:
            self.host.exec("touch", LOOKED)
        self.runs.append(ended(process))
        eventually(lambda: push_places(self.host) == [], 10, "the push has ended on the builder")
        return self.runs[-1]

    def allowed(self, seen: Seen) -> Seen:
        """The operator's own variables, in the task and in the programs that the operator names."""
        own = tuple(f"{name}=".encode() for name in self.way.own)
        arguments = seen.arguments.split(b"\0")
        theirs = any(program.encode() in argument for program in self.way.programs for argument in arguments[:2])
        task = any(seen.arguments.endswith(command) for command in self.commands)
        if not own or not (theirs or task):
            return seen
        return replace(seen, environment=b"\0".join(v for v in seen.variables if not v.startswith(own)))

    def said(self) -> Iterator[tuple[str, bytes]]:
        for number, done in enumerate(self.runs):
            yield f"stdout of run {number}", done.out.encode()
            yield f"stderr of run {number}", done.err.encode()

    def leaks(self) -> list[str]:
        """What was seen while it ran, and what is there now."""
        needles = self.needles
        found = self.watch.leaks(needles, self.allowed)
        found += leaks_in(self.shared.files.items(), needles)
        found += leaks_in(self.recorders.seen(), needles)
        found += leaks_in(self.said(), needles)
        found += leaks_in(kept_on(self.host), needles)
        left_out = [*self.way.places, self.recorders.records]
        found += leaks_in(files_below(self.directory, leave_out=left_out), needles)
        others = [*Path("/tmp").glob("pytest-of-*"), *Path("/tmp").glob("nixops-demo-*"), self.registry.storage.parent]
        found += leaks_in(files_below(Path(tempfile.gettempdir()), leave_out=others, since=self.began), needles)
        found += leaks_in(files_below(Path("/dev/shm"), since=self.began), needles)
        return found

    def saw_enough(self) -> None:
        """The hunt was fast enough, and saw what there was to see."""
        assert self.watch.sweeps > 100 and self.watch.longest < 2.0, (self.watch.sweeps, self.watch.longest)
        arguments = b"\n".join(seen.arguments for seen in self.watch.seen)
        assert b"nixops-push" in arguments
        recorded = {name.split(".")[0] for name, _ in self.recorders.seen()}
        assert {"nix", "ssh", "ssh-add"} <= recorded, recorded
        assert any(b"REGISTRY_AUTH_FILE=/run/" in seen.environment for seen in self.watch.seen)


def key_file(imaging: Imaging) -> Path:
    """The builders' key as an operator has it beside the inventory."""
    path = imaging.inventory.parent / "builders-key"
    path.touch(mode=0o600)
    path.write_bytes(imaging.lab.identity_file.read_bytes())
    return path


def by_reference(imaging: Imaging, ssh_key: object, login: Mapping[str, object]) -> None:
    """Let the inventory name the key and the login, and no host a key of its own."""
    assert imaging.registry is not None
    entry = {"ca_file": str(imaging.registry.ca_file), **login}

    name = str(imaging.registry.name)

    def change(document: Any) -> None:
        document["build"]["ssh_key"] = ssh_key
        document["hosts"]["first"]["ssh"].pop("identity_file")
        document["registries"][name] = entry

    imaging.change(change)


def test_neither_login_nor_key_is_seen_anywhere_while_images_are_pushed_nor_left_afterwards(
    builders: Lab, registry: RegistryServer, tmp_path: Path
) -> None:
    """Proves: over a push that works, one that fails and one that is interrupted, with the builders' key from a secret
    store: no process of this machine or the builder ever shows the registry's password, its base64, or the key in its
    arguments or environment; while it pushes, the builder has the login in one 0600 file on tmpfs and nowhere else;
    afterwards no disk, memory file system, journal, console, output, state, record or temporary file has any of it.
    """
    imaging = Imaging(tmp_path, builders, registry)
    password = imaging.inventory.parent / "registry-password"
    by_reference(imaging, {"file": "builders-key"}, {"user": registry.user, "password": {"file": "registry-password"}})
    way = Way(places=(key_file(imaging), password))
    copy_to = imaging.repo.directory / "copy-to.sh"
    pause = 'echo "sleep $pause"'
    assert pause in copy_to.read_text()
    copy_to.write_text(copy_to.read_text().replace(pause, f"{pause}; echo '{UNTIL_LOOKED}'"))
    with Hunt(tmp_path, imaging, way) as hunt:
        with hunt.watch, hunt.shared:
            hunt.push("slow-push", "1", "--provenance")
            hunt.push("refused", "1", "--format", "json", caught=False)
            hunt.push("endless-push", "1", ended_by="terminate")
        assert [done.code for done in hunt.runs] == [0, 1, 130], hunt.runs
        found = hunt.leaks()
        assert not found, "\n".join(found)
        hunt.saw_enough()
        assert any(b"skopeo\0" in seen.arguments for seen in hunt.watch.seen)


def from_openbao(stack: ExitStack, imaging: Imaging) -> Way:
    assert imaging.registry is not None
    bao = stack.enter_context(BaoServer())
    entry = {"password": imaging.registry.password.reveal(), "key": imaging.lab.identity_file.read_text()}
    bao.api("POST", "secret/data/ci/builders", {"data": entry})
    imaging.change(lambda document: document.update(vault={"address": bao.address}))

    def ref(key: str) -> dict[str, object]:
        return {"openbao": {"path": "ci/builders", "key": key}}

    by_reference(imaging, ref("key"), {"user": imaging.registry.user, "password": ref("password")})
    token = bao.root_token.reveal()
    return Way(environ={"BAO_TOKEN": token}, needles={"OpenBao's token": token}, own=("BAO_TOKEN",))


def from_variable_and_helper(stack: ExitStack, imaging: Imaging) -> Way:
    """The key in a variable; the login with a program of docker's protocol."""
    assert imaging.registry is not None
    programs = imaging.directory / "programs"
    programs.mkdir()
    stored = programs / "stored.json"
    stored.touch(mode=0o600)
    stored.write_text(json.dumps({"Username": imaging.registry.user, "Secret": imaging.registry.password.reveal()}))
    helper = programs / "docker-credential-hunted"
    helper.write_text(f"#!/bin/sh\nread -r asked; exec cat {stored}\n")
    helper.chmod(0o755)
    docker = imaging.home / ".docker"
    docker.mkdir()
    (docker / "config.json").write_text(json.dumps({"credHelpers": {str(imaging.registry.name): "hunted"}}))
    by_reference(imaging, {"env": "NIX_RUNNER_KEY"}, {})
    # The helper is found beside the recorders, which come first.
    stack.enter_context(pytest.MonkeyPatch.context()).setenv("PATH", f"{programs}:{imaging.environ['PATH']}")
    return Way(
        environ={"NIX_RUNNER_KEY": imaging.lab.identity_file.read_text()},
        own=("NIX_RUNNER_KEY",),
        programs=("docker-credential-hunted", str(stored)),
        places=(stored,),
    )


@pytest.mark.parametrize("keep", [from_openbao, from_variable_and_helper])
def test_a_program_that_tells_its_login_tells_it_to_nobody_wherever_it_comes_from(
    builders: Lab, registry: RegistryServer, tmp_path: Path, keep: Callable[[ExitStack, Imaging], Way]
) -> None:
    """Proves: with the key and the login from OpenBao, and from a variable and a credential helper: the image's own
    program prints the login, whole and decoded, and fails; what it said is shown without it and without what a terminal
    would obey, in both formats; nobody sees the operator's token or key, and nothing is left of any of it."""
    with ExitStack() as stack:
        hunted(stack, tmp_path, Imaging(tmp_path, builders, registry), keep)


def test_a_token_of_aws_is_as_well_kept(builders: Lab, ecr: RegistryServer, aws: AwsServer, tmp_path: Path) -> None:
    """Proves: the same of the key from Secrets Manager and the token of ECR."""

    def keep(_stack: ExitStack, imaging: Imaging) -> Way:
        by_reference(imaging, {"aws": "nix-runner-ssh-key"}, {"ecr": True})
        return Way(environ=aws.environ())

    with ExitStack() as stack:
        hunted(stack, tmp_path, Imaging(tmp_path, builders, ecr), keep)


def hunted(stack: ExitStack, directory: Path, imaging: Imaging, keep: Callable[[ExitStack, Imaging], Way]) -> None:
    """A push that works, and two that tell what they know."""
    way = keep(stack, imaging)
    places: Sequence[Path] = (*way.places, imaging.inventory.parent / "registry-password")
    with Hunt(directory, imaging, replace(way, places=tuple(places))) as hunt:
        with hunt.watch, hunt.shared:
            assert hunt.push("docker", "2", caught=False).code == 0, hunt.runs
            (imaging.repo.directory / "refused.sh").write_text(telltale(f"sleep 2; {UNTIL_LOOKED}"))
            text = hunt.push("refused", "2")
            document = hunt.push("refused", "2", "--format", "json", caught=False)
        assert (text.code, document.code) == (1, 1), hunt.runs
        for said in (text.err, document.err, document.document["error"]):
            assert '***"}}}' in said and "unauthorized" in said, said
            assert "\033" not in said and "\007" not in said, said
        found = hunt.leaks()
        assert not found, "\n".join(found)
        hunt.saw_enough()
