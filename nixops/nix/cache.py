"""Asking a binary cache over HTTP, as a host that substitutes from it would: what does it serve, signed by whom?

Many paths are asked for at once over one pool of connections. What is not answered is asked for again a few times;
a cache that stopped answering is not waited for path by path.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

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
from nixops.transport.exec import Deadline, raise_if_cancelled
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
        from requests.adapters import HTTPAdapter

        if not keys:
            raise UsageError("no key is given that the cache's paths must be signed by", hint="name cache.public_keys")
        self.url = url.rstrip("/")
        self._keys = tuple(keys)
        self._limit = limit
        self._timeout = timeout
        self._sleep = sleep
        self._verify: str | bool = _checked_ca(ca_file) if ca_file else True
        self._patience = _Patience(max(8, limit))
        self._session = requests.Session()
        self._session.max_redirects = 5
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(pool_connections=2, pool_maxsize=limit))

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
        from requests.exceptions import RequestException
        from urllib3.exceptions import HTTPError

        deadline = Deadline(self._timeout)
        connect = min(5.0, self._timeout)
        try:
            with self._session.get(url, stream=True, timeout=(connect, self._timeout), verify=self._verify) as response:
                body = b""
                for chunk in response.iter_content(64 * 1024):
                    body += chunk
                    if len(body) > LARGEST:
                        return _Answer(0, "", f"the answer is longer than {LARGEST // 2**20} MiB")
                    if deadline.passed:
                        return _Answer(0, "", f"no complete answer within {self._timeout:g} s", again=True)
                return _read(response, body)
        except (RequestException, HTTPError, OSError, ValueError) as error:
            return _Answer(0, "", *_words(error))


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
    from requests.exceptions import SSLError, Timeout, TooManyRedirects
    from urllib3.exceptions import NameResolutionError, ReadTimeoutError

    text = str(error)
    if isinstance(error, SSLError):
        why = "its certificate is not trusted (see cache.ca_file)" if "CERTIFICATE_VERIFY_FAILED" in text else "TLS"
        return f"{why}: {text[-160:]}" if why == "TLS" else why, False
    if isinstance(error, Timeout | ReadTimeoutError):
        return "no answer in time", True
    if isinstance(error, TooManyRedirects):
        return "it redirects in a circle", False
    if _has(error, NameResolutionError):
        return "its name does not resolve", False
    if "Connection refused" in text:
        return "connection refused", True
    if "No route to host" in text or "Network is unreachable" in text:
        return "no route to it", True
    return f"the connection broke ({type(error).__name__})", True


def _has(error: BaseException, kind: type[BaseException]) -> bool:
    """Whether ``kind`` is what an exception of requests wraps."""
    inner = getattr(error.args[0], "reason", None) if error.args else None
    return isinstance(error, kind) or isinstance(inner, kind)


def _checked_ca(ca_file: Path) -> str:
    import ssl

    try:
        ssl.create_default_context(cafile=str(ca_file))
    except (OSError, ssl.SSLError) as error:
        raise UsageError(
            f"cache.ca_file: {ca_file} cannot be used: {error.strerror or error}",
            hint="name a PEM file with the authority's certificate; a relative path starts at the inventory",
        ) from None
    return str(ca_file)
