"""What the tests of the lab's stand-in for NixOS share: two hosts on their first generation, and their servers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from nixops.inventory.model import Scope
from nixops.lab.forgejo_server import ForgejoServer
from nixops.lab.host import LabHost
from nixops.lab.lab import Lab
from nixops.lab.openbao import BaoServer
from nixops.lab.userrepo import LabHostFacts, UserRepo, build, install_base, make_user_repo, send_closure, toplevel
from nixops.transport.local import LocalRunner
from nixops.values import StorePath
from tests.lab.reaching import wait_for

SLEEPER: Final = 'systemd.services.sleeper = {{ wantedBy = [ "multi-user.target" ]; script = "exec sleep {0}"; }};'
USER: Final = Scope(user="torjus")


@dataclass(frozen=True)
class Site:
    """Two hosts with their first generation, and the servers that they use."""

    lab: Lab
    forge: ForgejoServer
    bao: BaoServer
    repo: UserRepo
    bases: dict[str, StorePath]


@dataclass(frozen=True)
class Machine:
    """One host of the site, as the tests use it."""

    site: Site
    host: LabHost
    base: StorePath

    def generation(self, nix: str) -> StorePath:
        """A generation with these settings, built and in the host's store, but not active."""
        self.site.repo.configure(self.host.name, nix, commit=False)
        path = build(self.site.repo, f"{self.site.repo.path}#{toplevel(self.host.name)}")
        send_closure(self.host, self.site.repo, path)
        return path

    def switch(self, system: StorePath, action: str = "test") -> int:
        """The exit code of the generation's switch-to-configuration, run as a unit of the host."""
        unit = ("systemd-run", "--quiet", "--wait", "--collect", "--pipe", "--service-type=exec")
        program = f"{system}/bin/switch-to-configuration"
        return self.host.exec(*unit, program, action, check=False, timeout=120).returncode

    def ask(self, *argv: str) -> str:
        """What a program inside the host prints, whatever its exit code."""
        return self.host.exec(*argv, check=False).stdout.decode().strip()

    def unit(self, name: str, what: str = "ActiveState") -> str:
        return self.ask("systemctl", "show", "-P", what, name)

    def running(self) -> str:
        return self.ask("readlink", "-f", "/run/current-system")

    def boot_default(self) -> str:
        """The init that the host would boot now."""
        entry = self.ask("sed", "-n", "s/^default //p", "/boot/loader/loader.conf")
        return self.ask("sed", "-n", "s/^options init=//p", f"/boot/loader/entries/{entry}")

    def power_cycle(self) -> None:
        self.host.power_off()
        self.host.power_on()
        self.host.wait_ready()

    def file(self, path: str, text: str) -> None:
        """Write a file inside the host, 0400."""
        self.host.exec("sh", "-c", 'umask 377; rm -f "$1"; cat >"$1"', "sh", path, stdin=text.encode())


@contextmanager
def make_site(lab: Lab, directory: Path) -> Iterator[Site]:
    """A forge, an OpenBao and a user's checkout for the hosts of ``lab``, which get their first generation from it."""
    with ForgejoServer(version=15, bind=lab.gateway) as forge, BaoServer(bind=lab.gateway) as bao:
        forge.add_user("torjus")
        repo = make_user_repo(
            directory,
            hosts=[LabHostFacts.of(host) for host in lab.hosts.values()],
            forge_url=forge.url,
            bao_address=bao.address,
            local=LocalRunner(),
        )
        token = forge.reset_registration_token(USER)
        bases = {name: install_base(host, repo, actions1_token=token) for name, host in lab.hosts.items()}
        yield Site(lab, forge, bao, repo, bases)


@contextmanager
def on_base(site: Site, name: str) -> Iterator[Machine]:
    """One host, which is brought back to its first generation afterwards, whatever became of it."""
    machine = Machine(site, site.lab.hosts[name], site.bases[name])
    try:
        yield machine
    finally:
        if not machine.host.running:
            machine.host.power_on()
            machine.host.wait_ready()
        machine.host.exec("rm", "-f", "/run/nixos/lab-activation-exit")
        machine.host.exec("nix-env", "-p", "/nix/var/nix/profiles/system", "--set", machine.base)
        site.repo.configure(name, "", commit=False)
        assert machine.switch(machine.base, "switch") == 0
        assert machine.running() == machine.base


def eventually(look: Callable[[], bool], what: str, seconds: float = 20.0) -> None:
    """Fail unless ``look`` becomes true within ``seconds``."""
    wait_for(look, seconds, what)
