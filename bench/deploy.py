"""How long a deploy takes against the plain shell of the same steps, on one lab host, in one run.

    .venv/bin/python bench/deploy.py [RUNS]

Needs root (it boots a lab host). Prints medians in seconds and ratios; single figures are noisy, ratios of one run
are not.

* nothing to do: `deploy-runner` (plan, the checks) against `nix eval` of the toplevel and asking the host what it runs;
* a changed generation: `deploy-runner` (plan, build, copy, guarded activation, checks, commit) against `nix build`,
  `nix copy`, setting the profile and `switch-to-configuration switch` over ssh: no checks, no way back.
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

from nixops.inventory.load import load
from nixops.lab.setting import TOP, Setting
from nixops.transport.openssh import OpenSshFiles
from nixops.transport.target import SshTarget


def timed(work: Callable[[], None]) -> float:
    begin = time.monotonic()
    work()
    return time.monotonic() - begin


class Shell:
    """The plain commands a person would type, with the same keys and the same trust."""

    def __init__(self, setting: Setting, ssh: OpenSshFiles) -> None:
        self.host = setting.host.name
        self.flake = f"{setting.repo.path}#nixosConfigurations.{self.host}.config.system.build.toplevel"
        self.ssh = ["ssh", "-F", str(ssh.config), f"root@{self.host}"]
        self.env = {**setting.environ, **ssh.nix_env()}

    def run(self, *argv: str) -> str:
        done = subprocess.run(argv, env=self.env, cwd=TOP, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(argv)} ended with {done.returncode}: {done.stderr}")
        return done.stdout

    def look(self) -> None:
        self.run("nix", "eval", "--raw", f"{self.flake}.outPath")
        self.run(*self.ssh, "readlink", "-f", "/run/current-system")

    def switch(self) -> None:
        built = json.loads(self.run("nix", "build", "--no-link", "--json", self.flake))[0]["outputs"]["out"]
        self.run("nix", "copy", "--no-check-sigs", "--to", f"ssh-ng://root@{self.host}", built)
        profile = f"nix-env -p /nix/var/nix/profiles/system --set {built}"
        self.run(*self.ssh, f"{profile} && {built}/bin/switch-to-configuration switch")


def main(runs: int) -> None:
    with tempfile.TemporaryDirectory() as directory, Setting(Path(directory), name=f"bench-{os.getpid()}") as setting:

        def deploy() -> None:
            done = setting.invoke("deploy-runner", "--yes")
            if done.code:
                raise SystemExit(repr(done))

        deploy()
        loaded = load(setting.repo.inventory_file)
        name, host = loaded.host(setting.host.name)
        with OpenSshFiles([SshTarget.from_inventory(name, host, loaded.base)]) as ssh:
            shell = Shell(setting, ssh)
            deploy()
            pairs = [(timed(deploy), timed(shell.look)) for _ in range(runs)]
            report("nothing to do", pairs)
            pairs = []
            for number in range(runs):
                change(setting, f"ours {number}")
                ours = timed(deploy)
                change(setting, f"theirs {number}")
                pairs.append((ours, timed(shell.switch)))
            report("a changed generation", pairs)


def change(setting: Setting, word: str) -> None:
    setting.repo.configure(setting.host.name, f'environment.etc."bench".text = "{word}";', commit=False)


def report(title: str, pairs: list[tuple[float, float]]) -> None:
    ours, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    print(f"{title}: deploy-runner {ours:.2f} s, plain shell {theirs:.2f} s, ratio {ratio:.1f} ({len(pairs)} pairs)")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
