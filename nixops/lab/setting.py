"""Everything the main job needs, on one machine: hosts, OpenBao, Forgejo, a user's checkout and its inventory.

The demo and the lab tests use the same setting; the commands in it are run as a user runs them, as processes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Self

from nixops.errors import HostFault
from nixops.lab.forgejo_server import ForgejoServer
from nixops.lab.lab import HostSpec, Lab, LabHost
from nixops.lab.openbao import BaoServer
from nixops.lab.userrepo import LabHostFacts, UserRepo, install_base, make_user_repo
from nixops.secret import Secret
from nixops.transport.local import LocalRunner
from nixops.values import StorePath

# There is no nixpkgs and no substituter here; the lab's derivations are shell and need no sandbox.
NIX_CONFIG: Final = "experimental-features = nix-command flakes\nsandbox = false\nsubstituters =\n"
TRUSTED: Final = ("torjus/nixos-servers", "torjus/nixos-exporter", "torjus/nixos")
WIDER: Final = "torjus/dotfiles"
TOP: Final = Path(__file__).parents[2]

_HOST_FILES: Final = """
cd /
ls -A var/lib/vault/approle 2>/dev/null
ls -A run/nixops 2>/dev/null | grep -v '^lock$'
ls -A run/secrets
ls -A nix/var/nix/gcroots | grep nixops-
cat var/lib/private/gitea-runner-*/*/.runner 2>/dev/null | cksum
exit 0
"""


class Setting:
    """A lab with its services, up inside a ``with`` block.

    :param directory: for the checkout, the inventory and the operator's state; must be empty.
    :param version: Forgejo's major version.
    :param audit: a file for all that OpenBao is asked and answers, credentials too.
    :param images: also a registry, a repository of images beside the checkout, and all hosts but the first as
        builders of both systems; the image ``app`` is the inventory's default.
    :param repo: further arguments of :func:`nixops.lab.userrepo.make_user_repo`.
    """

    def __init__(
        self,
        directory: Path,
        *,
        hosts: Sequence[HostSpec] = (HostSpec("nix-cache02"),),
        name: str = "lab",
        version: int = 15,
        install: bool = True,
        audit: Path | None = None,
        settings: dict[str, dict[str, Any]] | None = None,
        images: bool = False,
        say: Callable[[str], None] = lambda _: None,
        **repo: Any,
    ) -> None:
        self.directory = directory
        self._specs = hosts
        self._name = name
        self._version = version
        self._install = install
        self._audit = audit
        self._settings = settings or {}
        self._images = images
        self._say = say
        self._repo_options = repo
        self._stack = ExitStack()
        self.base: dict[str, StorePath] = {}

    def __enter__(self) -> Self:
        with self._stack:
            self.lab = self._stack.enter_context(Lab.up(self._specs, name=self._name, say=self._say))
            self.bao = self._stack.enter_context(BaoServer(bind=self.lab.gateway, audit=self._audit))
            self.forge = self._stack.enter_context(ForgejoServer(self._version, bind=self.lab.gateway))
            if self._images:
                self._add_images()
            self.forge_token = self._populate()
            self.environ = self._environment()
            self.repo = self._repository()
            if self._install:
                self._install_all()
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.close()

    def _add_images(self) -> None:
        from nixops.lab.imagerepo import make_image_repo, second_system
        from nixops.lab.registry import RegistryServer

        self.registry = self._stack.enter_context(RegistryServer(bind=self.lab.gateway))
        self.images = make_image_repo(self.directory / "images", LocalRunner(env={"NIX_CONFIG": NIX_CONFIG}))
        both = ["x86_64-linux", "aarch64-linux"]
        for host in list(self.lab.hosts.values())[1:]:
            second_system(host)
            self._settings[host.name] = {
                "ssh": {"keepalive": 2.0},
                "builder": {"max_jobs": 2, "systems": both},
                **self._settings.get(host.name, {}),
            }
        self._repo_options["overrides"] = {
            **self._repo_options.get("overrides", {}),
            "default": {"image": "app"},
            "build": {"min_free": 64},
            "registries": {
                str(self.registry.name): {
                    "user": self.registry.user,
                    "password": {"env": "REGISTRY_PASSWORD"},
                    "ca_file": str(self.registry.ca_file),
                }
            },
            "images": {
                "app": {
                    "flake": str(self.images.flake),
                    "attribute": "docker",
                    "systems": both,
                    "destination": str(self.registry.reference("team/app:latest")),
                }
            },
        }

    def _populate(self) -> Secret:
        self.forge.add_user("torjus")
        for repository in (*TRUSTED, WIDER):
            self.forge.add_repo(repository)
        return self.forge.add_token("torjus")

    def _environment(self) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("BAO_", "VAULT_", "AWS_", "NIX_", "FORGEJO_"))}
        return {
            **kept,
            "HOME": str(self._made("home")),
            "XDG_STATE_HOME": str(self._made("state")),
            "NIX_CONFIG": NIX_CONFIG,
            "FORGEJO_TOKEN": self.forge_token.reveal(),
            "BAO_TOKEN": self.bao.root_token.reveal(),
            **({"REGISTRY_PASSWORD": self.registry.password.reveal()} if self._images else {}),
            "GIT_AUTHOR_NAME": "Operator",
            "GIT_AUTHOR_EMAIL": "operator@localhost",
            "GIT_COMMITTER_NAME": "Operator",
            "GIT_COMMITTER_EMAIL": "operator@localhost",
        }

    def _made(self, name: str) -> Path:
        path = self.directory / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def _repository(self) -> UserRepo:
        facts = [
            LabHostFacts.of(host, runners=index == 0, settings=self._settings.get(host.name))
            for index, host in enumerate(self.lab.hosts.values())
        ]
        return make_user_repo(
            self._made("user"),
            hosts=facts,
            forge_url=self.forge.url,
            bao_address=self.bao.address,
            local=LocalRunner(env={"NIX_CONFIG": NIX_CONFIG}),
            **self._repo_options,
        )

    def _install_all(self) -> None:
        from nixops.forge.forgejo import Forgejo
        from nixops.inventory.model import Scope
        from nixops.secret import Redactor

        # actions1 was registered by hand long ago: by the whole forge's administrator, as the seed has it.
        with Forgejo(self.forge.url, self.forge.add_token("torjus"), redactor=Redactor()) as forge:
            token = forge.registration_token(Scope(user="torjus"))
        for host in list(self.lab.hosts.values())[: 1 if self._images else None]:
            self.base[host.name] = install_base(host, self.repo, actions1_token=token)
        self.forge.forget_requests()

    # -- using it -----------------------------------------------------------------------------------------------

    @property
    def host(self) -> LabHost:
        """The first host: the seed's ``nix-cache02``."""
        return next(iter(self.lab.hosts.values()))

    def command(self, *args: str) -> list[str]:
        """The command line of a task, as a user would type it at the top of the project."""
        inventory = () if "--inventory" in args else ("--inventory", str(self.repo.inventory_file))
        return [sys.executable, "-m", "invoke", *args, *inventory]

    def invoke(
        self,
        *args: str,
        environ: dict[str, str] | None = None,
        timeout: float = 300.0,
        on_line: Callable[[str], None] | None = None,
    ) -> Invoked:
        """Run a task to its end.

        :param on_line: gets each line as it comes, in the order a terminal would show them. The two streams are one
            then: all of it is in the result's ``out``.
        """
        process = start_task(self.command(*args), {**self.environ, **(environ or {})}, together=on_line is not None)
        return end_of_task(process, timeout, on_line or (lambda _: None))

    def start(self, *args: str, environ: dict[str, str] | None = None) -> subprocess.Popen[str]:
        """Start a task and leave it running, to kill it or to cut its network. It takes Ctrl-C as at a terminal."""
        return start_task(interruptible(self.command(*args)), {**self.environ, **(environ or {})})

    def running(self, host: LabHost | None = None) -> str:
        """The toplevel that a host runs, seen from outside."""
        return self._link(host or self.host, "/run/current-system")

    def profile(self, host: LabHost | None = None) -> str:
        """What the host's system profile points to."""
        return self._link(host or self.host, "/nix/var/nix/profiles/system")

    def boot_default(self, host: LabHost | None = None) -> str:
        """What the host's boot loader starts next."""
        script = (
            "e=$(sed -n 's/^default //p' /boot/loader/loader.conf); "
            "sed -n 's|^options.*init=\\(/nix/store/[^/]*\\)/init.*|\\1|p' /boot/loader/entries/$e"
        )
        return (host or self.host).exec("sh", "-c", script).stdout.decode().strip()

    def snapshot(self) -> dict[str, str]:
        """All that a deploy changes, in the host, Forgejo, OpenBao and the checkout: equal when nothing was changed."""
        host = self.host
        host_files = host.exec("sh", "-c", _HOST_FILES).stdout.decode()
        return {
            "running": self.running(),
            "profile": self.profile(),
            "boot default": self.boot_default(),
            "host files": host_files,
            "forgejo": repr(sorted((r.scope, r.name, r.uuid) for r in self.forge.runners)),
            "kv": repr(self._kv()),
            "roles": repr(self._listed("auth/approle/role")),
            "policies": repr(self._listed("sys/policies/acl")),
            "checkout": self.repo.git("status", "--porcelain") + self.repo.git("diff"),
        }

    def _kv(self) -> dict[str, Any]:
        """The current content of every entry of the host; an entry that was made and taken back is not there."""
        entries = {}
        for key in self._listed(f"secret/metadata/hosts/{self.host.name}"):
            try:
                entries[key] = self.bao.api("GET", f"secret/data/hosts/{self.host.name}/{key}")["data"]["data"]
            except HostFault:  # 404: its current version was taken back
                continue
        return entries

    def _listed(self, path: str) -> list[str]:
        try:
            return sorted(self.bao.api("LIST", path)["data"]["keys"])
        except HostFault:  # 404: there is nothing below
            return []

    @staticmethod
    def _link(host: LabHost, path: str) -> str:
        return host.exec("readlink", "-f", path).stdout.decode().strip()


class Invoked:
    """A task that has ended: its exit code, what it said and its JSON document where it gave one."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code = code
        self.out = out
        self.err = err

    @property
    def document(self) -> dict[str, Any]:
        """The JSON document on stdout."""
        value: dict[str, Any] = json.loads(self.out)
        return value

    def __repr__(self) -> str:
        return f"exit {self.code}\n-- stdout\n{self.out}\n-- stderr\n{self.err}"


def start_task(argv: Sequence[str], environ: Mapping[str, str], *, together: bool = False) -> subprocess.Popen[str]:
    """Start a task's command line at the top of the project, and leave it running.

    :param together: what goes to stderr goes to stdout, too.
    """
    return subprocess.Popen(
        argv,
        cwd=TOP,
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if together else subprocess.PIPE,
        text=True,
    )


def interruptible(argv: Sequence[str]) -> list[str]:
    """The command line with SIGINT as at a terminal, though we were started with it ignored (a shell's ``&``)."""
    takes_interrupts = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
    return [sys.executable, "-c", takes_interrupts + "os.execv(sys.argv[1], sys.argv[1:])", *argv]


def end_of_task(
    process: subprocess.Popen[str], timeout: float, on_line: Callable[[str], None] = lambda _: None
) -> Invoked:
    """How a started task ends, once it and all that share its output have; it is killed after ``timeout`` seconds.

    :param on_line: gets each line as it comes, of two streams from two threads.
    """
    deadline = time.monotonic() + timeout
    texts: dict[str, list[str]] = {"out": [], "err": []}

    def follow(stream: IO[str], lines: list[str]) -> None:
        for line in stream:
            lines.append(line)
            on_line(line.rstrip("\n"))

    readers = [
        threading.Thread(target=follow, args=(stream, texts[name]), daemon=True)
        for name, stream in (("out", process.stdout), ("err", process.stderr))
        if stream is not None
    ]
    for reader in readers:
        reader.start()
    try:
        code = process.wait(timeout)
        for reader in readers:
            reader.join(max(0.0, deadline - time.monotonic()))
        if any(reader.is_alive() for reader in readers):
            raise subprocess.TimeoutExpired(process.args, timeout)
    except BaseException:
        process.kill()
        process.wait()
        raise
    return Invoked(code, "".join(texts["out"]), "".join(texts["err"]))
