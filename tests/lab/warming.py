"""A user's checkout and a cache host whose store is served as harmonia serves it, for the tests of `warm-cache`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from nixops.build.proof import Proof
from nixops.build.session import BuildSession
from nixops.build.warm import verify_cache, warm_cache
from nixops.inventory.load import load
from nixops.lab.binarycache import BinaryCacheServer, CacheKeyPair, LiveStore
from nixops.lab.lab import Lab, LabHost
from nixops.lab.setting import NIX_CONFIG
from nixops.lab.userrepo import LabHostFacts, UserRepo, make_user_repo
from nixops.transport.local import LocalRunner
from nixops.values import HostName, StorePath
from tests.lab.caching import session_of
from tests.lab.reaching import has

CACHE: Final = HostName("nix-cache02")
HOST: Final = HostName("builder01")
BOTH: Final = (CACHE, HOST)
_ROOTS: Final = "/nix/var/nix/gcroots/nixops-warm"


@dataclass
class Warm:
    """A user's checkout, a cache host, and its store served as harmonia serves it."""

    lab: Lab
    repo: UserRepo
    server: BinaryCacheServer
    key: CacheKeyPair
    session: BuildSession
    said: list[str]

    @property
    def cache(self) -> LabHost:
        return self.lab.hosts[CACHE]

    def warm(self, *hosts: HostName) -> Proof:
        return warm_cache(self.session.loaded, hosts, self.session, self.said.append)

    def verify(self, *hosts: HostName) -> Proof:
        return verify_cache(self.session.loaded, hosts, self.session, self.said.append)


@contextmanager
def warm_setting(lab: Lab, directory: Path, cache: HostName = CACHE, **section: Any) -> Iterator[Warm]:
    """Everything, with that host's store as the cache; ``section`` is merged over the inventory's ``cache``."""
    key = CacheKeyPair.generate("cache.lab-1")
    with BinaryCacheServer(LiveStore(lab.hosts[cache], key), bind=lab.gateway) as server:
        settings = {"url": server.url, "host": str(cache), "public_keys": [key.public]} | section
        repo = make_user_repo(
            directory / "user",
            hosts=[LabHostFacts.of(host, runners=False) for host in lab.hosts.values()],
            forge_url="http://forge.example.org",
            bao_address="http://bao.example.org",
            local=LocalRunner(env={"NIX_CONFIG": NIX_CONFIG}),
            overrides={"cache": settings},
        )
        # New paths in each test, so that what another test built is not found.
        for name in BOTH:
            repo.configure(name, f'environment.etc."marker".text = "{key.public}";')
        said: list[str] = []
        with session_of(load(repo.inventory_file), directory, said) as session:
            yield Warm(lab, repo, server, key, session, said)


def valid(host: LabHost, path: StorePath | None) -> bool:
    return path is not None and has(host, path)


def links(host: LabHost) -> dict[str, str]:
    listed = host.exec("sh", "-c", f'cd {_ROOTS} && for l in *; do echo "$l $(readlink "$l")"; done').stdout.decode()
    return dict(line.split() for line in listed.splitlines())
