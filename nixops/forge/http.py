"""HTTP to one Forgejo: time-outs always, retries for reads only, and errors that say what to do next.

The token goes to the configured server and nowhere else: redirects are not followed. What a server says in an
error body is cleaned of secrets first and cut afterwards, so that no part of a secret is left at the cut.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from nixops.errors import ForgeError, UsageError
from nixops.secret import Redactor, Secret
from nixops.transport import web
from nixops.transport.web import Fault

ATTEMPTS = 4
FIRST_DELAY = 0.25
LONGEST_DELAY = 5.0
PASSING = frozenset({502, 503, 504})
# No answer that is used here comes near this; without a bound a broken server could fill the memory.
LARGEST_ANSWER = 16 * 1024 * 1024


class _NoAnswer(ForgeError):
    """No complete answer came. ``again`` says that asking once more at once may well help."""

    def __init__(self, message: str, *, hint: str, again: bool = False) -> None:
        super().__init__(message, hint=hint)
        self.again = again


class AnswerLost(_NoAnswer):
    """The request may have been carried out, but its answer did not arrive."""


class NotSent(_NoAnswer):
    """The server was not reached at all; nothing was carried out."""


class BadAnswer(ForgeError):
    """The answer is not what the API gives: not JSON, or a key is missing."""


class ForgeRefused(ForgeError):
    """The server answered with an error. ``status`` is the HTTP status."""

    def __init__(self, status: int, message: str, *, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.status = status


@dataclass(frozen=True)
class Answer:
    """A complete answer of an expected status. Header names are lower case."""

    status: int
    body: bytes
    headers: Mapping[str, str]
    what: str

    def json(self) -> Any:
        """The body as JSON.

        :raises BadAnswer: it is none. The body is not quoted: it may hold a credential nobody has noted yet.
        """
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError):  # the latter: nested without end
            kind = self.headers.get("content-type", "no content type").split(";")[0]
            raise BadAnswer(
                f"{self.what} was answered with something that is not JSON ({kind}, {len(self.body)} bytes)",
                hint="is forge.url the address of the Forgejo itself, and not of a login page or a proxy?",
            ) from None


class ForgeHttp:
    """One Forgejo's HTTP.

    :param url: its address, a path below the host included.
    :param token: an access token; the redactor learns it.
    :param ca_file: PEM file of the authority to trust instead of the system's.
    :param timeout: seconds for one whole request; connecting has at most 10 of them.
    :raises UsageError: ``ca_file`` cannot be used, or the token cannot be sent in a header.
    """

    def __init__(
        self,
        url: str,
        token: Secret,
        *,
        redactor: Redactor,
        ca_file: Path | None = None,
        timeout: float = 30.0,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.url = url.rstrip("/")
        self.redactor = redactor
        redactor.add(token)
        value = token.reveal()
        if not value or not value.isascii() or not value.isprintable() or " " in value:
            raise UsageError(
                "the Forgejo token is empty or holds white space or characters that no token has",
                hint="look at what forge.token refers to: a newline at its end is a common cause",
            )
        self._authorization = Secret(f"token {value}")
        self._verify = web.checked_ca("forge.ca_file", ca_file)
        self._timeout = timeout
        self._sleep = sleep
        self._session = web.Session()

    def close(self) -> None:
        """Close the connections."""
        self._session.close()

    def get(
        self, path: str, *, needs: str, params: Mapping[str, str | int] | None = None, anonymous: bool = False
    ) -> Answer:
        """GET ``/api/v1`` + ``path``; tried again on a passing fault, a bounded number of times.

        :param needs: the token scope and rights this takes, for errors: ``read:repository``.
        """
        delay = FIRST_DELAY
        for attempt in range(ATTEMPTS):
            last = attempt == ATTEMPTS - 1
            try:
                return self._once("GET", "/api/v1" + path, needs=needs, params=params, anonymous=anonymous)
            except (NotSent, AnswerLost) as error:
                if last or not error.again:
                    raise
            except ForgeRefused as error:
                if last or error.status not in PASSING:
                    raise
            self._sleep(delay * random.uniform(0.5, 1.0))
            delay = min(delay * 2, LONGEST_DELAY)
        raise AssertionError("unreachable: the last attempt returns or raises")

    def send(self, method: str, path: str, *, needs: str, body: Any = None, ok: Collection[int]) -> Answer:
        """A request that changes something: sent once, never again by itself.

        :raises AnswerLost: it may have been carried out; :raises NotSent: it was not.
        """
        return self._once(method, "/api/v1" + path, needs=needs, body=body, ok=ok)

    def connect(self, procedure: str, body: Any) -> Any:
        """A Connect call (JSON) of the runner's protocol, without the operator's token. Sent once."""
        return self._once(
            "POST",
            f"/api/actions/{procedure}",
            needs="a registration token that is still valid",
            body=body,
            anonymous=True,
        ).json()

    def _once(
        self,
        method: str,
        path: str,
        *,
        needs: str,
        body: Any = None,
        params: Mapping[str, str | int] | None = None,
        ok: Collection[int] = (200,),
        anonymous: bool = False,
    ) -> Answer:
        url = self.url + path
        what = f"Forgejo: {method} {url}"
        deadline = time.monotonic() + self._timeout
        try:
            with self._session.request(
                method,
                url,
                json=body,
                params=params,
                headers={"Accept": "application/json", "User-Agent": "nixops"},
                auth=web.Authorization(None if anonymous else self._authorization),
                timeout=(min(10.0, self._timeout), self._timeout),
                allow_redirects=False,
                verify=self._verify,
                stream=True,
            ) as response:
                answer = Answer(
                    response.status_code,
                    web.body_of(response, LARGEST_ANSWER, deadline),
                    {k.lower(): v for k, v in response.headers.items()},
                    what,
                )
        except web.FAILURES as error:
            raise self._failure(error, what) from error
        if len(answer.body) > LARGEST_ANSWER:
            raise BadAnswer(f"{what} was answered with more than {LARGEST_ANSWER} bytes", hint="is forge.url right?")
        if answer.status not in ok:
            raise self._refusal(answer, url, needs)
        return answer

    def _failure(self, error: Exception, what: str) -> ForgeError:
        host = urlsplit(self.url).netloc
        words = self._excerpt(web.last_words(error))
        match web.fault_of(error):
            case Fault.TLS:
                return NotSent(
                    f"{what}: TLS to {host} failed: {words}",
                    hint="if the server's certificate is from an authority of your own, name its file in forge.ca_file",
                )
            case Fault.AUTHORITIES:
                return NotSent(
                    f"{what} could not be sent: {words}",
                    hint="put back the file that forge.ca_file names, or name another",
                )
            case Fault.NO_CONNECTION_IN_TIME:
                return NotSent(
                    f"{what}: no connection to {host} within {min(10.0, self._timeout):g} s",
                    hint="is forge.url right, and does a firewall let this machine through?",
                )
            case Fault.PROXY:
                return NotSent(f"{what}: the proxy of this environment failed", hint="look at HTTPS_PROXY and NO_PROXY")
            case Fault.UNKNOWN_NAME:
                return NotSent(f"{what}: the name {host} is unknown", hint="look at forge.url and at the DNS")
            case Fault.NO_CONNECTION:
                return NotSent(
                    f"{what}: no connection to {host}: {words}",
                    hint="is Forgejo running, and is forge.url right?",
                    again=True,
                )
            case Fault.LATE:
                return AnswerLost(
                    f"{what} had no complete answer within {self._timeout:g} s",
                    hint="look at the server's load and log, or raise forge.timeout, then run the command again",
                )
            case Fault.CUT_OFF:
                return AnswerLost(
                    f"{what} lost its connection before the answer was complete",
                    hint="look at the server's log, then run the command again",
                    again=True,
                )
            case Fault.NOT_SENT:
                return NotSent(f"{what} could not be sent: {words}", hint="look at forge.url")

    def _refusal(self, answer: Answer, url: str, needs: str) -> ForgeError:
        status = answer.status
        if 300 <= status < 400:
            place = self._excerpt(web.shown(web.joined(url, answer.headers.get("location", ""))))
            return ForgeRefused(
                status,
                f"{answer.what} was redirected to {place}; redirects are not followed, so that the token stays here",
                hint="write the final address in forge.url; a renamed repository needs its new name",
            )
        said = self._said(answer)
        message = f"{answer.what} was refused with {status}" + (f": {said}" if said else "")
        return ForgeRefused(status, message, hint=_hint(status, needs))

    def _said(self, answer: Answer) -> str:
        """The server's own words, cleaned and cut to one line."""
        text = answer.body.decode(errors="replace")
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            if "html" in answer.headers.get("content-type", ""):
                return f"a web page of {len(answer.body)} bytes"
            return self._excerpt(text)
        if isinstance(value, dict):
            parts = [str(value["message"])] if value.get("message") else []
            if isinstance(value.get("errors"), list):
                parts += [str(e) for e in value["errors"]]
            if parts:
                return self._excerpt("; ".join(dict.fromkeys(parts)))
        return self._excerpt(text)

    def _excerpt(self, text: str) -> str:
        return web.excerpt(self.redactor, text)


def _hint(status: int, needs: str) -> str:
    if status == 401:
        return f"the token is unknown or revoked: put a new one where forge.token refers to; this takes {needs}"
    if status == 403:
        return f"this takes {needs}"
    if status == 404:
        return f"the name is wrong, Actions is off there, or the token does not see it: this takes {needs}"
    if status in (400, 409, 422):
        return "the server does not accept these values: look at the name and the scope in the inventory"
    if status == 429:
        return "too many requests: wait, then run the command again"
    if status >= 500:
        return "the fault is on the server: look at its log, then run the command again"
    return f"this takes {needs}"
