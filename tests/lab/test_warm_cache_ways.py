"""`invoke warm-cache` where things differ: a cache that is down, a host that is away, a login that is not root, TLS."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from nixops.build.warm import warm_targets
from nixops.errors import CacheIncomplete, Unreachable, UsageError
from nixops.lab.binarycache import BinaryCacheServer, StaticCache
from nixops.lab.lab import HostSpec, Lab
from nixops.nix.narinfo import PublicKey, parse_narinfo
from nixops.values import HostName
from tests.lab.warming import CACHE, HOST, valid, warm_setting

pytestmark = pytest.mark.usefixtures("nix_of_the_lab")


@pytest.fixture(scope="module")
def hosts(lab_factory: Callable[..., Lab]) -> Lab:
    return lab_factory(HostSpec(str(CACHE)), HostSpec(str(HOST)), HostSpec("gunter", "awkward"))


def test_a_cache_that_is_down_proves_nothing(hosts: Lab, tmp_path: Path) -> None:
    """Proves: the systems are built and kept, and the end is exit 1 with the reason, not a success."""
    with warm_setting(hosts, tmp_path, url="http://127.0.0.1:1") as made:
        proof = made.warm(HOST)
        with pytest.raises(CacheIncomplete, match="does not answer: connection refused"):
            proof.check()
        assert proof.hosts[0].outcome == "not asked" and proof.outcome == "incomplete"
        assert valid(made.cache, proof.hosts[0].toplevel)


def test_a_login_that_is_not_root_keeps_what_it_built(hosts: Lab, tmp_path: Path) -> None:
    """Proves: on a cache host with an unprivileged login, whom Nix does not trust, building, keeping and serving work;
    the root is one that garbage collection honours.
    """
    with warm_setting(hosts, tmp_path, HostName("gunter")) as made:
        top = made.warm(HOST).check().hosts[0].toplevel
        gunter = made.lab.hosts["gunter"]
        gunter.exec("nix-store", "--gc")
        assert valid(gunter, top)
        gunter.exec("rm", f"/home/admin/.local/state/nixops/warm/{HOST}")
        gunter.exec("nix-store", "--gc")
        assert not valid(gunter, top)


def test_a_cache_host_that_is_away_is_told_before_anything_is_evaluated(hosts: Lab, tmp_path: Path) -> None:
    """Proves: exit 3 at once, and no evaluation of minutes before it."""
    with warm_setting(hosts, tmp_path) as made:
        made.cache.partition(True)
        try:
            host = made.session.loaded.inventory.hosts[CACHE]
            object.__setattr__(host.ssh, "connect_timeout", 1.0)
            object.__setattr__(host.ssh, "login_timeout", 1.0)
            with pytest.raises(Unreachable) as caught:
                made.warm(HOST)
        finally:
            made.cache.partition(False)
        assert caught.value.exit_code == 3 and str(CACHE) in str(caught.value)
        assert not any("evaluating" in line for line in made.said)


def test_a_cache_made_by_nix_copy_is_asked_over_tls(hosts: Lab, tmp_path: Path) -> None:
    """Proves, against Nix's own signatures: a static cache of signed paths, served with a certificate of our authority,
    is found whole without building anything; with one file removed, that path is named.
    """
    with warm_setting(hosts, tmp_path) as made:
        top = made.warm(HOST).check().hosts[0].toplevel
        assert top is not None
        static = StaticCache(tmp_path / "cache", made.key)
        # From the host's store, through the cache that serves it: nothing of it is in this machine's store.
        static.add([top], store=f"{made.server.url}?trusted=true")
        (tmp_path / "tls").mkdir()
        with BinaryCacheServer(static, bind=made.lab.gateway, tls=tmp_path / "tls") as server:
            inventory = made.session.loaded.inventory
            assert inventory.cache is not None
            object.__setattr__(inventory.cache, "url", server.url)
            object.__setattr__(inventory.cache, "ca_file", str(server.ca_file))
            proof = made.verify(HOST).check()
            info = parse_narinfo((static.directory / f"{top.hash_part}.narinfo").read_text())
            assert info.judge([PublicKey.parse(made.key.public)])[0] == "served"
            gone = next(asked.path for asked in proof.asked if asked.path != top)
            (static.directory / f"{gone.hash_part}.narinfo").unlink()
            with pytest.raises(CacheIncomplete, match=f"missing: {gone}"):
                made.verify(HOST).check()


def test_hosts_are_named_one_way(hosts: Lab, tmp_path: Path) -> None:
    """Proves: neither, both, and what is not there are mistakes of usage; so is an inventory without a cache."""
    with warm_setting(hosts, tmp_path) as made:
        loaded = made.session.loaded
        assert warm_targets(loaded, str(HOST), None) == (HOST,)
        for host, group in ((None, None), (str(HOST), "x"), ("nobody", None), (None, "nobody")):
            with pytest.raises(UsageError):
                warm_targets(loaded, host, group)
        object.__setattr__(loaded.inventory, "cache", None)
        with pytest.raises(UsageError, match="has no `cache`"):
            made.warm(HOST)
