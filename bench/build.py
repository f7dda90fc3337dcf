"""How long `build-image` takes against the plain shell of the same steps, on lab hosts, in one run.

    .venv/bin/python bench/build.py [RUNS]

Needs root (it boots lab hosts). Prints medians in seconds and ratios; single figures are noisy, ratios of one run
are not. The shell is what a person would type: `nix build --eval-store auto --builders "" --store ssh-ng://…` of the
image's `copyTo`, then `ssh BUILDER …/bin/copy-to docker://…`, with the registry's login left in a file on the builder.
It chooses no builder, compares nothing with the registry and cleans nothing up.

* nothing to do: all is built and pushed; the same tag again;
* cached: all is built, the registry has an empty repository; build and push;
* ten seconds: a derivation that takes 10 s, then the push;
* two systems: both at once on two builders against the slower one alone, `build-image` each;
* pool: asking 20 builders, by a library that has asked them before (warm), for the first time, and `build.pool` whole.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nixops.build.session import BuildSession
from nixops.inventory.load import load
from nixops.lab.imagerepo import make_image_repo
from nixops.lab.lab import HostSpec
from nixops.lab.setting import NIX_CONFIG, TOP, Setting
from nixops.registry.login import Login
from nixops.secret import Redactor
from nixops.transport.local import LocalRunner
from nixops.transport.openssh import OpenSshFiles
from nixops.transport.target import SshTarget

ONE, BOTH = "x86_64-linux", "x86_64-linux,aarch64-linux"
MANY = 20


def timed(work: Callable[[], object]) -> float:
    begin = time.monotonic()
    work()
    return time.monotonic() - begin


def run(argv: list[str], env: dict[str, str]) -> str:
    done = subprocess.run(argv, env=env, cwd=TOP, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(argv)} ended with {done.returncode}: {done.stderr}")
    return done.stdout


class Shell:
    """The plain commands, with the same keys and the same trust, on one builder."""

    def __init__(self, setting: Setting, ssh: OpenSshFiles, builder: str) -> None:
        self._builder = builder
        self._ssh = ["ssh", "-F", str(ssh.config), f"root@{builder}"]
        self._env = {**setting.environ, **ssh.nix_env()}
        registry = setting.registry
        host = setting.lab.hosts[builder]
        (host.root / "root/certs").mkdir()
        assert registry.ca_file is not None  # it serves TLS
        (host.root / "root/certs/ca.crt").write_bytes(registry.ca_file.read_bytes())
        auth = Login(registry.user, registry.password).auth_file(registry.name)
        (host.root / "root/auth.json").write_text(auth.reveal())

    def build_and_push(self, flake: str, attribute: str, reference: str) -> None:
        options = ["--json", "--no-link", "--eval-store", "auto", "--builders", "", "--no-write-lock-file"]
        store = f"ssh-ng://root@{self._builder}"
        installable = f"{flake}#packages.{ONE}.{attribute}.copyTo"
        document: Any = json.loads(run(["nix", "build", *options, "--store", store, installable], self._env))
        out = document[0]["outputs"]["out"]
        push = f"REGISTRY_AUTH_FILE=/root/auth.json {out}/bin/copy-to docker://{reference} --dest-cert-dir /root/certs"
        run([*self._ssh, push], self._env)


class Bench:
    def __init__(self, setting: Setting, shell: Shell, runs: int) -> None:
        self._setting = setting
        self._shell = shell
        self._runs = runs
        self._number = 0

    def new(self) -> str:
        """A repository of images whose derivations no store has."""
        self._number += 1
        directory = self._setting.directory / f"repository-{self._number}"
        return str(make_image_repo(directory, LocalRunner(env={"NIX_CONFIG": NIX_CONFIG})).flake)

    def ours(self, flake: str, attribute: str, reference: str | None, systems: str = ONE) -> None:
        push = ["--push", f"docker://{reference}"] if reference else []
        flags = ["--flake", flake, "--attr", attribute, "--systems", systems, *push]
        done = self._setting.invoke("build-image", *flags)
        if done.code:
            raise SystemExit(repr(done))

    def reference(self, name: str) -> str:
        return str(self._setting.registry.reference(f"bench/{name}:1"))

    def nothing(self) -> None:
        flake, ours, shells = self.new(), self.reference("nothing-ours"), self.reference("nothing-shell")
        self.ours(flake, "docker", ours)
        self._shell.build_and_push(flake, "docker", shells)
        pairs = [
            (
                timed(lambda: self.ours(flake, "docker", ours)),
                timed(lambda: self._shell.build_and_push(flake, "docker", shells)),
            )
            for _ in range(self._runs)
        ]
        report("nothing to do", pairs)

    def cached(self) -> None:
        flake = self.new()
        # Both builders hold it, so that neither way has anything to build.
        for _ in range(3):
            self.ours(flake, "docker", None)
        self._shell.build_and_push(flake, "docker", self.reference("warm"))
        pairs = []
        for number in range(self._runs):
            ours, shells = self.reference(f"cached-ours-{number}"), self.reference(f"cached-shell-{number}")
            pairs.append(
                (
                    timed(lambda to=ours: self.ours(flake, "docker", to)),  # type: ignore[misc]  # a default binds it
                    timed(lambda to=shells: self._shell.build_and_push(flake, "docker", to)),  # type: ignore[misc]  # as above
                )
            )
        report("cached", pairs)

    def slow(self) -> None:
        pairs = []
        for number in range(self._runs):
            first, second = self.new(), self.new()
            pairs.append(
                (
                    timed(lambda f=first, n=number: self.ours(f, "slow", self.reference(f"slow-ours-{n}"))),  # type: ignore[misc]  # defaults bind them
                    timed(
                        lambda f=second, n=number: self._shell.build_and_push(  # type: ignore[misc]  # as above
                            f, "slow", self.reference(f"slow-shell-{n}")
                        )
                    ),
                )
            )
        report("a derivation of 10 s", pairs)

    def two(self) -> None:
        pairs = []
        for _ in range(self._runs):
            both, one, other = self.new(), self.new(), self.new()
            alone = max(
                timed(lambda f=one: self.ours(f, "slow", None, ONE)),  # type: ignore[misc]  # a default binds it
                timed(lambda f=other: self.ours(f, "slow", None, "aarch64-linux")),  # type: ignore[misc]  # as above
            )
            pairs.append((timed(lambda f=both: self.ours(f, "slow", None, BOTH)), alone))  # type: ignore[misc]  # as above
        report("two systems / the slower alone", pairs)


def pool(runs: int) -> None:
    hosts = [HostSpec(f"builder{n:02}") for n in range(MANY)]
    settings: dict[str, dict[str, Any]] = {host.name: {"builder": {"max_jobs": 2}} for host in hosts}
    overrides = {"build": {"min_free": 64, "probe_timeout": 30.0}}
    with (
        tempfile.TemporaryDirectory() as directory,
        Setting(
            Path(directory),
            hosts=hosts,
            name=f"bench-{os.getpid()}",
            install=False,
            settings=settings,
            overrides=overrides,
        ) as setting,
    ):
        loaded = load(setting.repo.inventory_file)
        cold, warm, whole = [], [], []
        for _ in range(runs):
            with BuildSession(loaded, Redactor(), setting.environ) as session:
                probes = [0]

                def ask(session: BuildSession = session, probes: list[int] = probes) -> None:
                    probes[0] = sum(probe.usable for probe in session.pool.probe(everybody=True))

                cold.append(timed(ask))
                warm += [timed(ask) for _ in range(3)]
                if probes[0] != MANY:
                    raise SystemExit(f"only {probes[0]} of {MANY} builders can be used")
            whole.append(timed(lambda: setting.invoke("build.pool")))
        print(
            f"asking {MANY} builders   warm {statistics.median(warm):.2f} s   first {statistics.median(cold):.2f} s",
            end="",
        )
        print(f"   `build.pool`, whole {statistics.median(whole):.2f} s")


def report(title: str, pairs: list[tuple[float, float]]) -> None:
    ours, plain = statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs)
    ratio = statistics.median(a / b for a, b in pairs)
    more = statistics.median(a - b for a, b in pairs)
    print(f"{title:<32} {ours:6.2f} s against {plain:6.2f} s   {ratio:4.2f} x   {more:+.2f} s", flush=True)


def main(runs: int) -> None:
    hosts = [HostSpec(name) for name in ("nix-cache02", "builder01", "builder02")]
    with (
        tempfile.TemporaryDirectory() as directory,
        Setting(Path(directory), hosts=hosts, name=f"bench-{os.getpid()}", install=False, images=True) as setting,
    ):
        loaded = load(setting.repo.inventory_file)
        name, host = loaded.host("builder01")
        with OpenSshFiles([SshTarget.from_inventory(name, host, loaded.base)]) as ssh:
            bench = Bench(setting, Shell(setting, ssh, name), runs)
            bench.nothing()
            bench.cached()
            bench.slow()
            bench.two()
    pool(runs)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
