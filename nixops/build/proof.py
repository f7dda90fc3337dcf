"""What a binary cache serves of some hosts' systems: asked for, and told as a table, a document or an error."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from nixops.errors import CacheIncomplete, ExitCode, NixopsError
from nixops.nix.cache import Asked, ask_cache
from nixops.nix.narinfo import PublicKey, Verdict
from nixops.values import HostName, StorePath

SCHEMA: Final = "nixops/warm-cache/1"
HEADER: Final = ("host", "outcome", "paths", "served", "seconds", "toplevel")
# How many paths an error lists; the document has them all.
LISTED: Final = 40


@dataclass(frozen=True)
class HostProof:
    """One host's part.

    :ivar closure: the paths that the cache is to serve, as far as they are known beforehand.
    :ivar seconds: what evaluating and building took.
    :ivar error: why its system was not built; then nothing was asked for.
    :ivar asked: what the cache answered, for each path that the host would fetch.
    """

    host: HostName
    toplevel: StorePath | None
    closure: tuple[StorePath, ...]
    seconds: float
    error: NixopsError | None = None
    asked: tuple[Asked, ...] = ()

    @property
    def lacking(self) -> tuple[Asked, ...]:
        return tuple(asked for asked in self.asked if not asked.ok)

    @property
    def outcome(self) -> str:
        """``served``, ``incomplete``, ``failed`` (its system was not built) or ``not asked`` (there is no cache)."""
        if self.error is not None:
            return "failed"
        if not self.asked:
            return "not asked"
        return "incomplete" if self.lacking else "served"


@dataclass(frozen=True)
class Proof:
    """All of it.

    :ivar asked: every path that was asked for, once.
    :ivar fault: why the cache could not be asked at all.
    :ivar seconds: what asking took.
    """

    url: str
    cache_host: HostName
    hosts: tuple[HostProof, ...]
    asked: tuple[Asked, ...] = ()
    fault: CacheIncomplete | None = None
    seconds: float = 0.0
    _owners: Mapping[StorePath, tuple[HostName, ...]] = field(default_factory=dict, repr=False)

    @property
    def lacking(self) -> tuple[Asked, ...]:
        """The paths that the cache does not serve as it should."""
        return tuple(asked for asked in self.asked if not asked.ok)

    @property
    def outcome(self) -> str:
        """``served`` when every host's whole system is; else ``failed`` or ``incomplete``."""
        if any(host.error is not None for host in self.hosts):
            return "failed"
        return "served" if self.fault is None and not self.lacking else "incomplete"

    def error(self) -> NixopsError | None:
        """What is wrong, as one error; None when everything is served. A host's failed build comes first, since
        what is missing of another is the lesser news.
        """
        failed = [host.error for host in self.hosts if host.error is not None]
        if failed:
            first = failed[0]
            others = [f"also: {error}" for error in failed[1:]]
            if self.lacking or self.fault:
                others.append(f"also: {self.fault or self._incomplete().message}")
            if not others:
                return first
            detail = "\n".join([*([first.detail] if first.detail else []), *others])
            return type(first)(first.message, hint=first.hint, detail=detail)
        if self.fault is not None:
            return self.fault
        return self._incomplete() if self.lacking else None

    def check(self) -> Proof:
        """This, when everything is served.

        :raises CacheIncomplete: the cache lacks paths, serves them unsigned, or cannot be asked.
        :raises NixopsError: what kept a host's system from being built.
        """
        error = self.error()
        if error is not None:
            raise error
        return self

    def _incomplete(self) -> CacheIncomplete:
        lacking = self.lacking
        lines = []
        for asked in lacking[:LISTED]:
            owners = self._owners.get(asked.path, ())
            whose = f", of {', '.join(owners[:4])}{' and others' if len(owners) > 4 else ''}" if owners else ""
            lines.append(f"{asked.verdict}: {asked.path} ({asked.detail}{whose})")
        if len(lacking) > LISTED:
            lines.append(f"and {len(lacking) - LISTED} more")
        return CacheIncomplete(
            f"the cache {self.url} does not serve {len(lacking)} of {len(self.asked)} paths: {_counts(lacking)}",
            hint=self._hint({asked.verdict for asked in lacking}),
            detail="\n".join(lines),
        )

    def _hint(self, verdicts: set[Verdict]) -> str:
        if Verdict.NO_ANSWER in verdicts:
            return "look at the cache's own log, then ask again: invoke verify-cache"
        if verdicts & {Verdict.UNSIGNED, Verdict.WRONG_KEY, Verdict.BAD_SIGNATURE}:
            return f"does {self.cache_host} sign with the key whose public half is in cache.public_keys?"
        return f"is {self.url} served from the store of {self.cache_host}, and has that all of it?"

    def rows(self) -> list[tuple[str, ...]]:
        """Rows for :data:`HEADER`."""
        return [
            (
                str(host.host),
                host.outcome,
                str(len(host.asked) or len(host.closure)),
                str(len(host.asked) - len(host.lacking)),
                f"{host.seconds:.1f}",
                str(host.toplevel or "-"),
            )
            for host in self.hosts
        ]

    def document(self) -> dict[str, Any]:
        """The JSON document, schema ``nixops/warm-cache/1``. Times are seconds."""
        error = self.error()
        return {
            "schema": SCHEMA,
            "outcome": self.outcome,
            "cache": self.url,
            "cache_host": str(self.cache_host),
            "asked": len(self.asked),
            "served": len(self.asked) - len(self.lacking),
            "seconds": round(self.seconds, 3),
            "hosts": [
                {
                    "host": str(host.host),
                    "outcome": host.outcome,
                    "toplevel": str(host.toplevel) if host.toplevel else None,
                    "paths": len(host.asked) or len(host.closure),
                    "served": len(host.asked) - len(host.lacking),
                    "seconds": round(host.seconds, 3),
                    "error": str(host.error) if host.error else None,
                }
                for host in self.hosts
            ],
            "lacking": [
                {
                    "path": str(asked.path),
                    "verdict": str(asked.verdict),
                    "detail": asked.detail,
                    "hosts": [str(host) for host in self._owners.get(asked.path, ())],
                }
                for asked in self.lacking
            ],
            "error": str(error) if error else None,
            "exit_code": int(error.exit_code if error else ExitCode.OK),
        }


def prove(
    url: str,
    cache_host: HostName,
    keys: Sequence[PublicKey],
    hosts: Sequence[HostProof],
    *,
    ca_file: Path | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Proof:
    """Ask the cache for every path of each host's closure, each path once.

    :param hosts: with what they need as far as it is known; what the cache's own answers add is asked for too.
    :raises UsageError: ``ca_file`` cannot be used.
    """
    wanted = list(dict.fromkeys(path for host in hosts for path in host.closure))
    if not wanted:
        return Proof(url, cache_host, tuple(hosts))
    begin = time.monotonic()
    say(f"asking {url} for {len(wanted)} paths")
    try:
        asked = ask_cache(url, wanted, keys, ca_file, on_answers=lambda n, bad: say(_progress(n, bad)))
    except CacheIncomplete as fault:
        return Proof(url, cache_host, tuple(hosts), fault=fault, seconds=time.monotonic() - begin)
    known = {answer.path: answer for answer in asked}
    proven: list[HostProof] = []
    owners: dict[StorePath, tuple[HostName, ...]] = {}
    for host in hosts:
        answers = _reached(host.closure, known)
        proven.append(HostProof(host.host, host.toplevel, host.closure, host.seconds, host.error, answers))
        for answer in answers:
            owners[answer.path] = (*owners.get(answer.path, ()), host.host)
    return Proof(url, cache_host, tuple(proven), tuple(asked), None, time.monotonic() - begin, owners)


def _reached(paths: Sequence[StorePath], known: Mapping[StorePath, Asked]) -> tuple[Asked, ...]:
    """The answers for ``paths`` and for all that a host would fetch after them."""
    found: dict[StorePath, Asked] = {}
    wanted = list(paths)
    while wanted:
        answer = known[wanted.pop()]
        if answer.path in found:
            continue
        found[answer.path] = answer
        if answer.ok and answer.info is not None:
            wanted += answer.info.references
    return tuple(found.values())


def _progress(count: int, lacking: int) -> str:
    return f"asked for {count} paths, {f'{lacking} not served' if lacking else 'all served and signed'}"


def _counts(lacking: Sequence[Asked]) -> str:
    numbers: dict[str, int] = {}
    for asked in lacking:
        numbers[asked.verdict] = numbers.get(asked.verdict, 0) + 1
    return ", ".join(f"{number} {verdict}" for verdict, number in sorted(numbers.items()))
