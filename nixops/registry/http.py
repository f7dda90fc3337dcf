"""HTTP to one registry: time-outs always, bounded bodies, bounded retries, and errors that say what to do next.

A login goes to the registry it is for: a redirect to another host is followed without it. What a server says in an
error body is cleaned of secrets first and cut afterwards, so that no part of a secret is left at the cut.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.cookiejar import DefaultCookiePolicy
from pathlib import Path
from urllib.parse import urlsplit

# Itself before any part of it: a thread that begins with a part would meet one that begins with the whole, and each
# find the other's half loaded.
import requests

from nixops.registry.fault import NoAnswer, RegistryRefused, oversized, wait_of
from nixops.secret import Redactor, Secret
from nixops.transport import web
from nixops.transport.exec import raise_if_cancelled
from nixops.transport.web import Fault, joined, shown
from nixops.values import RegistryName

ATTEMPTS = 4
FIRST_DELAY = 0.25
LONGEST_DELAY = 5.0
# A registry that wants us to wait longer than this, seconds, gets an error and not a wait.
LONGEST_WAIT = 20.0
PASSING = frozenset({500, 502, 503, 504})
REDIRECTS = frozenset({301, 302, 303, 307, 308})
MOST_REDIRECTS = 5
ERROR_LIMIT = 64 * 1024
# One connection for each of the questions that are asked at once.
CONNECTIONS = 8


@dataclass(frozen=True)
class Answer:
    """A complete answer, whatever its status. Header names are in small letters.

    :ivar what: the request, for errors; without its query, which can hold a signature.
    :ivar url: where the answer came from in the end.
    """

    status: int
    body: bytes
    headers: Mapping[str, str]
    what: str
    url: str


class RegistryHttp:
    """One registry's HTTP, and that of the servers it sends us to.

    :param tls: False is plain HTTP, by the operator's own word.
    :param ca_file: PEM file of the authority to trust instead of the system's.
    :param timeout: seconds for one whole request; connecting has at most 10 of them.
    :raises UsageError: ``ca_file`` cannot be used.
    """

    def __init__(
        self,
        registry: RegistryName,
        host: str,
        *,
        tls: bool,
        ca_file: Path | None,
        timeout: float,
        redactor: Redactor,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.registry = registry
        self.scheme = "https" if tls else "http"
        self.base = f"{self.scheme}://{host}"
        self.redactor = redactor
        self._verify = web.checked_ca(f"registries.{registry}.ca_file", ca_file)
        self._timeout = timeout
        self._sleep = sleep
        self._session = web.Session()
        # The bytes have to be those whose digest is compared.
        self._session.headers.update({"Accept-Encoding": "identity", "User-Agent": "nixops"})
        self._session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
        adapter = requests.adapters.HTTPAdapter(pool_connections=4, pool_maxsize=CONNECTIONS)
        self._session.mount("https://", adapter)
        self._session.mount("http://", adapter)

    def close(self) -> None:
        """Close the connections."""
        self._session.close()

    def ours(self, url: str) -> bool:
        """Whether ``url`` is at the registry itself, so that its login may go there."""
        return _origin(url) == _origin(self.base)

    def allowed(self, url: str) -> bool:
        """Whether ``url`` may be asked at all: TLS, unless the registry itself is used without."""
        schemes = ("https",) if self.scheme == "https" else ("https", "http")
        try:
            parts = urlsplit(url)
            return parts.scheme in schemes and bool(parts.hostname) and parts.username is None and parts.port != 0
        except ValueError:  # brackets without an address, a port that is no number
            return False

    def send(
        self,
        method: str,
        url: str,
        *,
        authorization: Secret | None = None,
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
        limit: int,
        again: bool,
        follow: bool = False,
    ) -> Answer:
        """One request; the answer is given back whatever its status, once it is not a passing fault.

        :param authorization: the whole header; it goes to ``url``, and to no other host.
        :param limit: the most bytes of a good answer's body that are taken.
        :param again: the request may be carried out twice: ask again after a lost answer or a fault of the server.
        :param follow: go where a redirect says; without the login where that is another host.
        :raises NoAnswer: none came; :raises RegistryError: more than ``limit`` came.
        """
        what = f"registry {self.registry}: {method} {shown(url)}"
        delay = FIRST_DELAY
        for attempt in range(ATTEMPTS):
            raise_if_cancelled()
            last = attempt == ATTEMPTS - 1
            wait = delay * random.uniform(0.5, 1.0)
            try:
                answer = self._follow(method, url, authorization, headers or {}, body, limit, what, follow)
            except NoAnswer as error:
                if last or not (error.again and (again or not error.sent)):
                    raise
            else:
                if answer.status == 429:
                    # Refused and thus not carried out: asking again is safe, whatever was asked.
                    wait = max(wait, wait_of(answer.headers.get("retry-after"), time.time()))
                elif not (again and answer.status in PASSING):
                    return answer
                if last or wait > LONGEST_WAIT:
                    return answer
            self._sleep(wait)
            delay = min(delay * 2, LONGEST_DELAY)
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _follow(
        self,
        method: str,
        url: str,
        authorization: Secret | None,
        headers: Mapping[str, str],
        body: bytes | None,
        limit: int,
        what: str,
        follow: bool,
    ) -> Answer:
        for _ in range(MOST_REDIRECTS + 1):
            answer = self._once(method, url, authorization, headers, body, limit, what)
            if answer.status not in REDIRECTS or not follow:
                return answer
            target = joined(url, answer.headers.get("location", ""))
            if not self.allowed(target):
                raise RegistryRefused(
                    answer.status,
                    f"{what} was redirected to {self.excerpt(shown(target))}, which is not followed",
                    hint="a registry with TLS may only send us to where TLS is used, and with no login in the address",
                )
            if _origin(target) != _origin(url):
                authorization = None
            url = target
        raise RegistryRefused(
            answer.status,
            f"{what} was redirected more than {MOST_REDIRECTS} times",
            hint="look at the registry's set-up",
        )

    def _once(
        self,
        method: str,
        url: str,
        authorization: Secret | None,
        headers: Mapping[str, str],
        body: bytes | None,
        limit: int,
        what: str,
    ) -> Answer:
        deadline = time.monotonic() + self._timeout
        try:
            with self._session.request(
                method,
                url,
                data=body,
                headers=dict(headers),
                auth=web.Authorization(authorization),
                timeout=(min(10.0, self._timeout), self._timeout),
                allow_redirects=False,
                verify=self._verify,
                stream=True,
            ) as response:
                good = response.status_code < 300
                most = limit if good else ERROR_LIMIT
                taken = web.body_of(response, most, deadline)
                if good and len(taken) > most:
                    raise oversized(what, limit)
                return Answer(
                    response.status_code,
                    taken[:most],  # the words of an error are read as far as they are of use; its status counts
                    {k.lower(): v for k, v in response.headers.items()},
                    what,
                    url,
                )
        except web.FAILURES as error:
            raise self._failure(error, what, url) from None

    def _failure(self, error: Exception, what: str, url: str) -> NoAnswer:
        host = urlsplit(url).netloc
        words = self.excerpt(web.last_words(error))
        match web.fault_of(error):
            case Fault.TLS:
                return NoAnswer(
                    f"{what}: TLS to {host} failed: {words}",
                    hint="if its certificate is from an authority of your own, name that in "
                    f"registries.{self.registry}.ca_file; if the registry has no TLS at all, say tls: false there",
                )
            case Fault.AUTHORITIES:
                return NoAnswer(
                    f"{what} could not be sent: {words}",
                    hint=f"put back the file that registries.{self.registry}.ca_file names, or name another",
                )
            case Fault.NO_CONNECTION_IN_TIME:
                return NoAnswer(
                    f"{what}: no connection to {host} within {min(10.0, self._timeout):g} s",
                    hint="is the registry's name right, and does a firewall let this machine through?",
                )
            case Fault.PROXY:
                return NoAnswer(
                    f"{what}: the proxy of this environment failed", hint="look at HTTPS_PROXY and NO_PROXY"
                )
            case Fault.UNKNOWN_NAME:
                return NoAnswer(
                    f"{what}: the name {host} is unknown", hint="look at the image's destination and at the DNS"
                )
            case Fault.NO_CONNECTION:
                return NoAnswer(
                    f"{what}: no connection to {host}: {words}",
                    hint="is the registry running, and is its name right?",
                    again=True,
                )
            case Fault.LATE:
                return NoAnswer(
                    f"{what} had no complete answer within {self._timeout:g} s",
                    hint=f"look at the registry's load, or raise registries.{self.registry}.timeout, then try again",
                    sent=True,
                )
            case Fault.CUT_OFF:
                return NoAnswer(
                    f"{what} lost its connection before the answer was complete",
                    hint="look at the registry's log, then run the command again",
                    again=True,
                    sent=True,
                )
            case Fault.NOT_SENT:
                # Its text may quote the whole address, and a pre-signed one is as good as a password.
                return NoAnswer(
                    f"{what} could not be sent ({type(error).__name__})", hint="look at the registry's name"
                )

    def excerpt(self, text: str) -> str:
        """A server's words on one line, cleaned of secrets and cut."""
        return web.excerpt(self.redactor, text)


def _origin(url: str) -> tuple[str, str, int]:
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError:
        port = -1  # no number: equal to no origin of ours
    return parts.scheme, (parts.hostname or "").lower(), port or (443 if parts.scheme == "https" else 80)
