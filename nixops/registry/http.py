"""HTTP to one registry: time-outs always, bounded bodies, bounded retries, and errors that say what to do next.

A login goes to the registry it is for: a redirect to another host is followed without it. What a server says in an
error body is cleaned of secrets first and cut afterwards, so that no part of a secret is left at the cut.
"""

from __future__ import annotations

import random
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.cookiejar import DefaultCookiePolicy
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import requests
from requests.auth import AuthBase
from requests.exceptions import ConnectTimeout, ProxyError, SSLError
from urllib3.exceptions import HTTPError, NameResolutionError, NewConnectionError, ReadTimeoutError

from nixops.errors import UsageError
from nixops.registry.fault import NoAnswer, RegistryRefused, oversized, wait_of
from nixops.secret import Redactor, Secret
from nixops.transport.exec import raise_if_cancelled
from nixops.values import RegistryName

ATTEMPTS = 4
FIRST_DELAY = 0.25
LONGEST_DELAY = 5.0
# A registry that wants us to wait longer than this, seconds, gets an error and not a wait.
LONGEST_WAIT = 20.0
PASSING = frozenset({500, 502, 503, 504})
REDIRECTS = frozenset({301, 302, 303, 307, 308})
MOST_REDIRECTS = 5
EXCERPT = 300
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


class _Authorization(AuthBase):
    """Sets the header, or none. As an auth object, since a bare header would yield to the user's ``.netrc``."""

    def __init__(self, value: Secret | None) -> None:
        self._value = value

    def __call__(self, r: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._value is not None:
            r.headers["Authorization"] = self._value.reveal()
        return r


class _Session(requests.Session):
    """Leaves redirects to us. Told not to follow, requests still reads their whole body and takes their place apart."""

    def get_redirect_target(self, resp: requests.Response) -> None:  # noqa: ARG002 - the name is that of requests
        return None


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
        self._verify = _checked_ca(registry, ca_file)
        self._timeout = timeout
        self._sleep = sleep
        self._session = _Session()
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
                auth=_Authorization(authorization),
                timeout=(min(10.0, self._timeout), self._timeout),
                allow_redirects=False,
                verify=self._verify,
                stream=True,
            ) as response:
                return Answer(
                    response.status_code,
                    self._body(response, deadline, what, limit),
                    {k.lower(): v for k, v in response.headers.items()},
                    what,
                    url,
                )
        except requests.exceptions.RequestException as error:
            raise self._transport_error(error, what, url) from None
        except ReadTimeoutError:
            raise self._late(what) from None
        except HTTPError:
            raise _cut_off(what) from None

    def _body(self, response: requests.Response, deadline: float, what: str, limit: int) -> bytes:
        """The whole body, within the deadline: the time-out of ``requests`` only bounds each single read."""
        chunks: list[bytes] = []
        size = 0
        good = response.status_code < 300
        if not good:
            limit = ERROR_LIMIT
        # read1 gives what is there; iter_content would wait for a full chunk, past every deadline.
        while chunk := response.raw.read1(65536, decode_content=True):
            size += len(chunk)
            if size > limit and good:
                raise oversized(what, limit)
            if size > limit:
                break  # the words of an error are read as far as they are of use; its status counts
            if time.monotonic() > deadline:
                raise self._late(what)
            chunks.append(chunk)
        return b"".join(chunks)

    def _transport_error(self, error: requests.exceptions.RequestException, what: str, url: str) -> NoAnswer:
        host = urlsplit(url).netloc
        if isinstance(error, SSLError):
            return NoAnswer(
                f"{what}: TLS to {host} failed: {self.excerpt(_innermost(error))}",
                hint="if its certificate is from an authority of your own, name that in "
                f"registries.{self.registry}.ca_file; if the registry has no TLS at all, say tls: false there",
            )
        if isinstance(error, ConnectTimeout):
            return NoAnswer(
                f"{what}: no connection to {host} within {min(10.0, self._timeout):g} s",
                hint="is the registry's name right, and does a firewall let this machine through?",
            )
        if isinstance(error, ProxyError):
            return NoAnswer(f"{what}: the proxy of this environment failed", hint="look at HTTPS_PROXY and NO_PROXY")
        reason = _reason(error)
        if isinstance(reason, NameResolutionError):
            return NoAnswer(
                f"{what}: the name {host} is unknown", hint="look at the image's destination and at the DNS"
            )
        if isinstance(reason, NewConnectionError):
            return NoAnswer(
                f"{what}: no connection to {host}: {self.excerpt(_innermost(error))}",
                hint="is the registry running, and is its name right?",
                again=True,
            )
        if isinstance(error, requests.exceptions.Timeout) or isinstance(reason, ReadTimeoutError):
            return self._late(what)
        if isinstance(error, requests.exceptions.ConnectionError):
            return _cut_off(what)
        return NoAnswer(
            f"{what} could not be sent: {self.excerpt(_innermost(error))}", hint="look at the registry's name"
        )

    def _late(self, what: str) -> NoAnswer:
        return NoAnswer(
            f"{what} had no complete answer within {self._timeout:g} s",
            hint=f"look at the registry's load, or raise registries.{self.registry}.timeout, then try again",
            sent=True,
        )

    def excerpt(self, text: str) -> str:
        """A server's words on one line, cleaned of secrets and cut."""
        clean = " ".join(self.redactor.clean(text).split())
        return clean if len(clean) <= EXCERPT else clean[:EXCERPT] + "…"


def _checked_ca(registry: RegistryName, ca_file: Path | None) -> str | bool:
    if ca_file is None:
        return True
    try:
        ssl.create_default_context(cafile=str(ca_file))
    except (OSError, ssl.SSLError) as error:
        why = "it holds no PEM certificate" if isinstance(error, ssl.SSLError) else error.strerror
        raise UsageError(
            f"registries.{registry}.ca_file: {ca_file} cannot be used: {why}", hint="name a file of PEM certificates"
        ) from None
    return str(ca_file)


def joined(url: str, location: str) -> str:
    """Where ``location``, as an answer of ``url`` has it, points; as it is where it is no address at all."""
    try:
        return urljoin(url, location)
    except ValueError:
        return location


def shown(url: str) -> str:
    """``url`` without its query and login: a pre-signed address is as good as a password."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "an address that cannot be read"
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path}" if host else parts.path or "nowhere"


def _origin(url: str) -> tuple[str, str, int]:
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError:
        port = -1  # no number: equal to no origin of ours
    return parts.scheme, (parts.hostname or "").lower(), port or (443 if parts.scheme == "https" else 80)


def _cut_off(what: str) -> NoAnswer:
    return NoAnswer(
        f"{what} lost its connection before the answer was complete",
        hint="look at the registry's log, then run the command again",
        again=True,
        sent=True,
    )


def _reason(error: BaseException) -> object:
    """What urllib3 gave as the cause of a failed connection."""
    inner = error.args[0] if error.args else None
    return getattr(inner, "reason", inner)


def _innermost(error: BaseException) -> str:
    """The last words of a chain of wrapped exceptions, without addresses of objects."""
    reason = _reason(error)
    cause = getattr(reason, "__cause__", None) or getattr(reason, "__context__", None) or reason
    text = getattr(cause, "strerror", None) or getattr(cause, "verify_message", None) or str(cause)
    return str(text)
