"""`invoke warm-cache` for real: hosts' systems built on the cache host, its cache asked for every path of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nixops.errors import BuildFailed, CacheIncomplete
from nixops.lab.binarycache import CacheKeyPair
from nixops.lab.lab import HostSpec, Lab
from tests.lab.warming import BOTH, CACHE, HOST, Warm, links, valid, warm_setting

pytestmark = pytest.mark.usefixtures("nix_of_the_lab")


@pytest.fixture(scope="module")
def hosts(lab_factory: Callable[..., Lab]) -> Lab:
    return lab_factory(HostSpec(str(CACHE)), HostSpec(str(HOST)))


@pytest.fixture
def made(hosts: Lab, tmp_path: Path) -> Iterator[Warm]:
    with warm_setting(hosts, tmp_path) as setting:
        yield setting


def test_what_is_warmed_is_there_for_a_host_that_upgrades_itself(made: Warm) -> None:
    """Proves, end to end: built on the cache host and not here, kept there from garbage collection, every path served
    and signed by our key; and another host, which takes only signed paths and may build nothing, gets its whole system
    from the URL with its own Nix.
    """
    proof = made.warm(*BOTH).check()
    assert proof.outcome == "served" and len(proof.asked) > 10
    top = {host.host: host.toplevel for host in proof.hosts}
    assert links(made.cache) == {str(name): str(path) for name, path in top.items()}
    for path in top.values():
        assert valid(made.cache, path)
        assert path is not None and not Path(path).exists()
    made.cache.exec("nix-store", "--gc")
    assert made.verify(*BOTH).check().outcome == "served"

    host = made.lab.hosts[HOST]
    assert not valid(host, top[HOST])
    options = ("--option", "substituters", made.server.url, "--option", "trusted-public-keys", made.key.public)
    alone = ("--option", "require-sigs", "true", "--max-jobs", "0")
    host.exec("nix-store", "--realise", top[HOST] or "", *options, *alone, timeout=240)
    assert valid(host, top[HOST])

    document = proof.document()
    assert (document["schema"], document["outcome"], document["error"]) == ("nixops/warm-cache/1", "served", None)
    assert document["asked"] == document["served"] == len(proof.asked)
    assert [row[:2] for row in proof.rows()] == [(str(CACHE), "served"), (str(HOST), "served")]
    json.dumps(document)
    # A second time nothing is built, and everything is asked for again.
    made.said.clear()
    made.server.requests.clear()
    assert made.warm(*BOTH).check().hosts[1].toplevel == top[HOST]
    assert not any(": building " in line and " on " not in line for line in made.said)
    assert len([r for r in made.server.requests if r.endswith(".narinfo")]) == len(proof.asked)


def test_one_path_that_is_missing_unsigned_or_anothers_is_named(made: Warm) -> None:
    """Proves: each of the ways in which a cache can lack a path ends with exit 1 and names that path, its fault and
    the host that needs it; nothing else is reported.
    """
    whole = made.warm(HOST).check()
    # Not the toplevel: it is the paths further down that nobody looks at.
    victim = next(a for a in whole.asked if a.path != whole.hosts[0].toplevel and a.info)
    part, other = victim.path.hash_part, CacheKeyPair.generate("cache.nixos.org-1")
    imposter = CacheKeyPair.generate("cache.lab-1")
    assert victim.info is not None
    served, signs, log = "served from the store of nix-cache02", "cache.public_keys", "invoke verify-cache"
    server, info = made.server, victim.info
    faults: list[tuple[Callable[[], None], str, str]] = [
        (lambda: server.hidden.add(part), "missing", served),
        (lambda: server.unsigned.add(part), "unsigned", signs),
        (lambda: server.resigned.update({part: (other.sign(info),)}), "wrong key", signs),
        (lambda: server.resigned.update({part: (imposter.sign(info),)}), "bad signature", signs),
        (lambda: server.broken.update({part: 500}), "no answer", log),
    ]
    for fault, words, hint in faults:
        fault()
        proof = made.verify(HOST) if words != "unsigned" else made.warm(HOST)
        with pytest.raises(CacheIncomplete) as caught:
            proof.check()
        assert caught.value.exit_code == 1
        assert f"{words}: {victim.path}" in str(caught.value) and f"of {HOST}" in str(caught.value)
        assert hint in str(caught.value.hint)
        (lacking,) = proof.document()["lacking"]
        assert (lacking["path"], lacking["verdict"], lacking["hosts"]) == (victim.path, words, [HOST])
        assert (proof.outcome, proof.hosts[0].outcome) == ("incomplete", "incomplete")
        server.hidden.clear()
        server.unsigned.clear()
        server.resigned.clear()
        server.broken.clear()
    assert made.verify(HOST).check().outcome == "served"


def test_the_next_system_takes_the_place_of_the_one_before(made: Warm) -> None:
    """Proves: one root for each host; what it no longer names may be collected, what it names stays."""
    first = made.warm(HOST).check().hosts[0].toplevel
    made.repo.configure(HOST, 'environment.etc."marker".text = "another";', commit=False)
    second = made.warm(HOST).check().hosts[0].toplevel
    assert first != second and links(made.cache)[HOST] == str(second)
    assert any("uncommitted changes" in line for line in made.said)
    made.cache.exec("nix-store", "--gc")
    assert not valid(made.cache, first) and valid(made.cache, second)


def test_a_host_that_does_not_build_keeps_no_other_from_being_warmed(made: Warm) -> None:
    """Proves: its failure is told with its name and exit 1, the other host is served, and nothing stays reserved; one
    that does not evaluate, and one whose system the cache host cannot build, are told as what they are.
    """
    broken = 'pkgs.runCommand "broken" { } "echo so broken >&2; exit 9"'
    foreign = 'derivation { name = "x"; system = "riscv64-linux"; builder = "/bin/sh"; }'
    for nix, words in (
        ('system.activationScripts.x = throw "not yet";', "not yet"),
        (f"environment.systemPackages = [ ({broken}) ];", "exit code 9"),
        (f"environment.systemPackages = [ ({foreign}) ];", "riscv64-linux"),
    ):
        made.repo.configure(HOST, nix)
        proof = made.warm(*BOTH)
        assert [host.outcome for host in proof.hosts] == ["served", "failed"]
        assert proof.outcome == "failed" and proof.document()["exit_code"] == 1
        with pytest.raises(BuildFailed) as caught:
            proof.check()
        assert f"the system of {HOST} is not built" in caught.value.message
        assert words in str(caught.value)
        assert not any("." in name for name in links(made.cache))
