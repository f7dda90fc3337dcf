"""Asking a binary cache over HTTP, as a host that substitutes from it would: what does it serve, signed by whom?

Many paths are asked for at once over one pool of connections. What is not answered is asked for again a few times;
a cache that stopped answering is not waited for path by path. No login goes along, not even one of the operator's
``.netrc``: what only the operator may fetch is not served to the hosts.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self
from urllib.parse import urljoin

from nixops.errors import CacheIncomplete, UsageError
from nixops.nix.narinfo import (
    STORE,
    Narinfo,
    NarinfoError,
    PublicKey,
    Verdict,
    parse_cache_info,
    parse_narinfo,
)
from nixops.transport.exec import raise_if_cancelled
from nixops.transport.fleet import fan_out
from nixops.values import StorePath

if TYPE_CHECKING:
    from types import TracebackType

    import requests

# How many requests are on their way at once, and connections are kept.
LIMIT: Final = 32
# Seconds for one whole answer.
TIMEOUT: Final = 15.0
ATTEMPTS: Final = 3
FIRST_DELAY: Final = 0.25
LONGEST_DELAY: Final = 5.0
# A path with ten thousand references is about 600 KB; no narinfo that is used comes near this.
LARGEST: Final = 4 * 1024 * 1024
MOST_REDIRECTS: Final = 5
_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_PASSING: Final = frozenset({429, 500, 502, 503, 504})


@dataclass(frozen=True)
class Asked:
    """What came of one path.

    :ivar detail: what is to be said of it, such as ``signed by cache.example.org-1`` or ``HTTP 404``.
    :ivar info: what the cache serves, where that could be read.
    """

    path: StorePath
    verdict: Verdict
    detail: str
    info: Narinfo | None = None

    @property
    def ok(self) -> bool:
        return self.verdict is Verdict.SERVED


class BinaryCacheClient:
    """One binary cache. May be used by many threads at once.

    :param url: its address; a path below the host may be part of it.
    :param keys: a path counts as served when one of them signed it.
    :param ca_file: PEM file of the authority to trust instead of the system's.
    :param limit: how many requests at once.
    :param timeout: seconds for one whole answer.
    :raises UsageError: ``ca_file`` is not there or no PEM file, or there is no key.
    """

    def __init__(
        self,
        url: str,
        keys: Sequence[PublicKey],
        *,
        ca_file: Path | None = None,
        limit: int = LIMIT,
        timeout: float = TIMEOUT,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        import requests

        from nixops.transport.web import Session, checked_ca

        if not keys:
            raise UsageError("no key is given that the cache's paths must be signed by", hint="name cache.public_keys")
        self.url = url.rstrip("/")
        self._keys = tuple(keys)
        self._limit = limit
        self._timeout = timeout
        self._sleep = sleep
        self._verify = checked_ca("cache.ca_file", ca_file)
        self._patience = _Patience(max(8, limit))
        self._session = Session()
        self._session.headers.update({"Accept-Encoding": "identity", "User-Agent": "nixops"})
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, requests.adapters.HTTPAdapter(pool_connections=2, pool_maxsize=limit))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._session.close()

    def look(self) -> None:
        """See that there is a binary cache for /nix/store.

        :raises CacheIncomplete: nothing answers there, or something else does.
        """
        hint = "is cache.url the address that hosts have in nix.settings.substituters?"
        answer = self._get("nix-cache-info")
        if answer.fault is not None:
            raise CacheIncomplete(f"the cache {self.url} does not answer: {answer.fault}", hint=hint)
        if answer.status != 200:
            raise CacheIncomplete(f"{self.url} is no binary cache: HTTP {answer.status} for nix-cache-info", hint=hint)
        try:
            store = parse_cache_info(answer.text)["StoreDir"]
        except NarinfoError as error:
            raise CacheIncomplete(f"{self.url} is no binary cache: nix-cache-info: {error}", hint=hint) from None
        if store != STORE:
            raise CacheIncomplete(f"the cache {self.url} is one for the store {store[:80]}, not for {STORE}")

    def ask(self, path: StorePath) -> Asked:
        """Ask for one path. Whatever is answered, or is not, is a verdict."""
        answer = self._get(f"{path.hash_part}.narinfo")
        if answer.fault is not None:
            return Asked(path, Verdict.NO_ANSWER, answer.fault)
        # 403: a bucket that may not be listed says that of what it does not have; Nix takes it so too.
        if answer.status in (403, 404, 410):
            return Asked(path, Verdict.MISSING, f"HTTP {answer.status}")
        if answer.status != 200:
            return Asked(path, Verdict.NO_ANSWER, f"HTTP {answer.status}")
        try:
            info = parse_narinfo(answer.text)
        except NarinfoError as error:
            return Asked(path, Verdict.MALFORMED, str(error))
        if info.path != path:
            return Asked(path, Verdict.MALFORMED, f"it is that of {info.path}", info)
        verdict, detail = info.judge(self._keys)
        return Asked(path, verdict, detail, info)

    def closure(self, paths: Sequence[StorePath], on_answers: Callable[[int, int], None] | None = None) -> list[Asked]:
        """Ask for ``paths`` and, as a host would, for everything that what is served refers to.

        :param on_answers: is told after each round how many were asked for, and how many of them were not served.
        :returns: one for each path, in the order they were asked for.
        """
        done: dict[StorePath, Asked] = {}
        wanted = list(dict.fromkeys(paths))
        while wanted:
            for outcome in fan_out(wanted, self.ask, limit=self._limit):
                asked = outcome.unwrap()
                done[asked.path] = asked
            raise_if_cancelled()
            if on_answers is not None:
                on_answers(len(done), sum(not asked.ok for asked in done.values()))
            # Only what our key vouches for is followed: nobody else can make this walk long.
            references = [r for path in wanted if done[path].ok for r in _references(done[path])]
            wanted = [path for path in dict.fromkeys(references) if path not in done]
        return list(done.values())

    # -- HTTP -------------------------------------------------------------------------------------------------

    def _get(self, name: str) -> _Answer:
        answer = _Answer(0, "", "the cache had stopped answering, so it was not asked")
        if self._patience.gone:
            return answer
        delay = FIRST_DELAY
        for attempt in range(ATTEMPTS):
            raise_if_cancelled()
            answer = self._once(f"{self.url}/{name}")
            if not answer.again:
                break
            if attempt + 1 < ATTEMPTS:
                self._sleep(min(LONGEST_DELAY, answer.wait if answer.wait is not None else delay))
                delay *= 2
        self._patience.note(answered=answer.fault is None)
        return answer

    def _once(self, url: str) -> _Answer:
        from nixops.transport.web import FAILURES

        deadline = time.monotonic() + self._timeout
        try:
            for _ in range(MOST_REDIRECTS + 1):
                answer = self._one(url, deadline)
                if isinstance(answer, _Answer):
                    return answer
                url = answer
            return _Answer(0, "", "it redirects in a circle")
        except (*FAILURES, ValueError) as error:
            return _Answer(0, "", *_words(error))

    def _one(self, url: str, deadline: float) -> _Answer | str:
        """One request: an answer, or where it sends us, whose body nobody reads."""
        from nixops.transport.web import Authorization, Late, body_of

        left = max(0.001, deadline - time.monotonic())
        with self._session.get(
            url,
            stream=True,
            auth=Authorization(None),
            timeout=(min(5.0, left), left),
            verify=self._verify,
            allow_redirects=False,
        ) as response:
            if response.status_code in _REDIRECTS and response.headers.get("Location"):
                return urljoin(url, response.headers["Location"])
            try:
                body = body_of(response, LARGEST, deadline)
            except Late:
                return _Answer(0, "", f"no complete answer within {self._timeout:g} s", again=True)
            if len(body) > LARGEST:
                return _Answer(0, "", f"the answer is longer than {LARGEST // 2**20} MiB")
            return _read(response, body)


@dataclass(frozen=True)
class _Answer:
    """``fault`` says in words why there is no answer; ``again``, that asking once more may help; ``wait`` seconds."""

    status: int
    text: str
    fault: str | None = None
    again: bool = False
    wait: float | None = None


class _Patience:
    """Runs out when so many requests in a row, tries included, got no answer at all."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._in_a_row = 0
        self._lock = threading.Lock()

    def note(self, *, answered: bool) -> None:
        with self._lock:
            self._in_a_row = 0 if answered else self._in_a_row + 1

    @property
    def gone(self) -> bool:
        return self._in_a_row >= self._most


def ask_cache(
    url: str,
    paths: Sequence[StorePath],
    keys: Sequence[PublicKey],
    ca_file: Path | None = None,
    limit: int = LIMIT,
    *,
    on_answers: Callable[[int, int], None] | None = None,
) -> list[Asked]:
    """Ask the cache at ``url`` for ``paths`` and for all that they refer to there; see :class:`BinaryCacheClient`.

    :raises CacheIncomplete: there is no binary cache at all. What single paths lack is in the verdicts.
    :raises UsageError: ``ca_file`` cannot be used.
    """
    with BinaryCacheClient(url, keys, ca_file=ca_file, limit=limit) as client:
        client.look()
        return client.closure(paths, on_answers)


def _references(asked: Asked) -> tuple[StorePath, ...]:
    return asked.info.references if asked.info is not None else ()


def _read(response: requests.Response, body: bytes) -> _Answer:
    if response.status_code in _PASSING:
        given = response.headers.get("Retry-After", "")
        wait = float(given) if given.isascii() and given.isdigit() else None
        return _Answer(response.status_code, "", f"HTTP {response.status_code}", again=True, wait=wait)
    try:
        return _Answer(response.status_code, body.decode())
    except UnicodeDecodeError:
        # An error page may be anything; of a narinfo it is a fault.
        return _Answer(response.status_code, body.decode(errors="replace"))


def _words(error: Exception) -> tuple[str, bool]:
    """What a request that failed is told as, and whether it is worth another try."""
    from nixops.transport.web import Fault, fault_of, last_words

    words = last_words(error)[-160:]
    match fault_of(error):
        case Fault.TLS if "CERTIFICATE_VERIFY_FAILED" in str(error):
            return "its certificate is not trusted (see cache.ca_file)", False
        case Fault.TLS:
            return f"TLS: {words}", False
        case Fault.AUTHORITIES:
            return f"the file of cache.ca_file is gone: {words}", False
        case Fault.LATE | Fault.NO_CONNECTION_IN_TIME:
            return "no answer in time", True
        case Fault.UNKNOWN_NAME:
            return "its name does not resolve", False
        case Fault.NO_CONNECTION | Fault.PROXY if words == "Connection refused":
            return "connection refused", True
        case Fault.NO_CONNECTION if words in ("No route to host", "Network is unreachable"):
            return "no route to it", True
        case Fault.NOT_SENT:
            return f"its address, or one that it redirects to, cannot be used ({type(error).__name__})", False
        case _:
            return f"the connection broke ({type(error).__name__})", True
