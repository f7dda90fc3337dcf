"""What a cache's answers mean for hosts: outcomes, the error that names paths, the document, the table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nixops.build import warm
from nixops.build.proof import HEADER, LISTED, HostProof, Proof, prove
from nixops.build.warm import cache_of
from nixops.errors import BuildFailed, CacheIncomplete, UsageError
from nixops.inventory.load import load
from nixops.lab.binarycache import BinaryCacheServer, CacheKeyPair, text_of
from nixops.nix.narinfo import Narinfo, PublicKey
from nixops.values import HostName, StorePath

A, B, CACHE = HostName("a"), HostName("b"), HostName("cache")


def path(number: int) -> StorePath:
    return StorePath(f"/nix/store/{number:032d}-p{number}")


class Memory:
    """``{1: (2, 3)}``: path 1 refers to 2 and 3; each signed."""

    def __init__(self, key: CacheKeyPair, graph: dict[int, tuple[int, ...]]) -> None:
        infos = [
            Narinfo(path(n), f"nar/{n}", "sha256:" + "0" * 52, 10, tuple(map(path, refs))) for n, refs in graph.items()
        ]
        self.texts = {info.path.hash_part: text_of(info, (key.sign(info),)) for info in infos}

    def narinfo(self, hash_part: str) -> str | None:
        return self.texts.get(hash_part)

    def nar(self, name: str) -> bytes | None:
        raise AssertionError(f"nobody downloads {name}")


@pytest.fixture(scope="module")
def pair() -> CacheKeyPair:
    return CacheKeyPair.generate("cache-1")


def host(name: HostName, *numbers: int, error: BuildFailed | None = None) -> HostProof:
    return HostProof(name, path(numbers[0]) if numbers else None, tuple(map(path, numbers)), 1.25, error)


def proven(pair: CacheKeyPair, graph: dict[int, tuple[int, ...]], *hosts: HostProof) -> Proof:
    with BinaryCacheServer(Memory(pair, graph)) as server:
        proof = prove(server.url, CACHE, [PublicKey.parse(pair.public)], hosts)
        # A path that two hosts need is asked for once.
        asked = [request for request in server.requests if request.endswith(".narinfo")]
        assert len(asked) == len(set(asked)) == len(proof.asked)
    return proof


def test_everything_there_is_a_success_for_each_host(pair: CacheKeyPair) -> None:
    proof = proven(pair, {1: (2,), 2: (), 3: (2,)}, host(A, 1, 2), host(B, 3, 2))
    assert proof.check() is proof and proof.error() is None
    document = proof.document()
    assert json.loads(json.dumps(document)) == document
    assert (document["outcome"], document["asked"], document["served"], document["exit_code"]) == ("served", 3, 3, 0)
    assert [(h["host"], h["outcome"], h["paths"], h["served"]) for h in document["hosts"]] == [
        ("a", "served", 2, 2),
        ("b", "served", 2, 2),
    ]
    assert proof.rows()[0] == ("a", "served", "2", "2", "1.2", path(1))
    assert all(len(row) == len(HEADER) for row in proof.rows())


def test_what_is_missing_is_named_with_the_hosts_that_need_it(pair: CacheKeyPair) -> None:
    """Also a path that only the cache's own answer speaks of, and only for the hosts that would fetch it."""
    proof = proven(pair, {1: (2, 9), 2: (), 3: (2,)}, host(A, 1, 2), host(B, 3, 2, 4))
    with pytest.raises(CacheIncomplete) as caught:
        proof.check()
    assert "does not serve 2 of 5 paths: 2 missing" in caught.value.message
    assert f"missing: {path(4)} (HTTP 404, of b)\nmissing: {path(9)} (HTTP 404, of a)" in str(caught.value.detail)
    assert [h.outcome for h in proof.hosts] == ["incomplete", "incomplete"]
    lacking = {entry["path"]: entry["hosts"] for entry in proof.document()["lacking"]}
    assert lacking == {path(4): ["b"], path(9): ["a"]}


def test_a_long_list_is_cut_in_the_error_and_whole_in_the_document(pair: CacheKeyPair) -> None:
    proof = proven(pair, {}, host(A, *range(1, LISTED + 11)))
    error = proof.error()
    assert error is not None and error.detail is not None
    assert error.detail.splitlines()[-1] == "and 10 more" and len(error.detail.splitlines()) == LISTED + 1
    assert len(proof.document()["lacking"]) == LISTED + 10


def test_a_failed_build_comes_first_and_the_rest_is_not_forgotten(pair: CacheKeyPair) -> None:
    first = BuildFailed("the system of a is not built: x", hint="look", detail="its log")
    second = BuildFailed("the system of c is not built: y")
    proof = proven(pair, {}, host(A, error=first), host(B, 1), host(HostName("c"), error=second))
    with pytest.raises(BuildFailed) as caught:
        proof.check()
    assert caught.value.message == first.message and caught.value.hint == "look"
    assert "its log" in str(caught.value) and "also: the system of c is not built: y" in str(caught.value)
    assert "also: the cache" in str(caught.value)
    assert [h.outcome for h in proof.hosts] == ["failed", "incomplete", "failed"]
    assert proof.document()["hosts"][0]["error"].startswith("the system of a is not built")
    # Alone, it is told as it is.
    assert proven(pair, {}, host(A, error=first)).error() is first


def test_a_cache_that_cannot_be_asked_is_a_failure(pair: CacheKeyPair) -> None:
    said: list[str] = []
    keys = [PublicKey.parse(pair.public)]
    proof = prove("http://127.0.0.1:1", CACHE, keys, [host(A, 1)], say=said.append)
    with pytest.raises(CacheIncomplete, match="does not answer: connection refused"):
        proof.check()
    assert (proof.outcome, proof.hosts[0].outcome) == ("incomplete", "not asked")
    assert proof.document()["exit_code"] == 1 and said == ["asking http://127.0.0.1:1 for 1 paths"]


def test_the_hint_fits_the_fault(pair: CacheKeyPair) -> None:
    keys = [PublicKey.parse(pair.public)]
    part = path(1).hash_part
    with BinaryCacheServer(Memory(pair, {1: ()})) as server:

        def hint() -> str:
            error = prove(server.url, CACHE, keys, [host(A, 1)]).error()
            assert error is not None
            return str(error.hint)

        server.unsigned.add(part)
        assert hint() == "does cache sign with the key whose public half is in cache.public_keys?"
        server.hidden.add(part)
        assert hint() == f"is {server.url} served from the store of cache, and has that all of it?"
        server.broken[part] = 500
        assert "invoke verify-cache" in hint()


HOSTS = "hosts:\n  cache: {address: cache.example.org}\n"
CACHE_SECTION = "cache: {{url: https://cache.example.org, host: cache, public_keys: ['{key}']}}\n"


def test_an_inventory_without_a_cache_or_a_flake_says_what_to_write(tmp_path: Path, pair: CacheKeyPair) -> None:
    file = tmp_path / "hosts.yml"
    file.write_text(HOSTS)
    with pytest.raises(UsageError, match="has no `cache`") as caught:
        cache_of(load(file))
    assert "public_keys" in str(caught.value.hint)
    file.write_text(HOSTS + CACHE_SECTION.format(key=pair.public))
    loaded = load(file)
    assert [key.name for key in cache_of(loaded)[1]] == ["cache-1"]
    with pytest.raises(UsageError, match="has no `config`"):
        warm.warm_cache(loaded, [HostName("cache")], None)  # type: ignore[arg-type]  # it is not used before that
    file.write_text(HOSTS + CACHE_SECTION.format(key=pair.public) + "config: {flake: ./absent}\n")
    with pytest.raises(UsageError, match=r"no flake\.nix"):
        warm.verify_cache(load(file), [HostName("cache")], None)  # type: ignore[arg-type]  # as above
