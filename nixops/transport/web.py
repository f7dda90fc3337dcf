"""What our clients of HTTP servers share: a session that follows nothing by itself, and why an answer did not come.

Only they load it: requests takes a while to import.
"""

from __future__ import annotations

import ssl
import time
from enum import Enum, auto
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import requests
from requests.auth import AuthBase
from requests.exceptions import ConnectTimeout, ProxyError, ReadTimeout, RequestException, SSLError, Timeout
from urllib3.exceptions import HTTPError, NameResolutionError, NewConnectionError, ReadTimeoutError

from nixops.errors import UsageError
from nixops.secret import Redactor, Secret

EXCERPT = 300
# What a request, or reading its answer, may raise. A file of authorities that is gone is a bare OSError.
FAILURES = (RequestException, HTTPError, OSError)


class Session(requests.Session):
    """Leaves redirects to us. Told not to follow, requests still reads their whole body and takes their place apart."""

    def get_redirect_target(self, resp: requests.Response) -> None:  # noqa: ARG002 - the name is that of requests
        return None


class Authorization(AuthBase):
    """Sets the header, or none. As an auth object, since a bare header would yield to the user's ``.netrc``."""

    def __init__(self, value: Secret | None) -> None:
        self._value = value

    def __call__(self, r: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._value is not None:
            r.headers["Authorization"] = self._value.reveal()
        return r


def checked_ca(key: str, ca_file: Path | None) -> str | bool:
    """What requests takes as ``verify``: the file of authorities, or True for the system's.

    :param key: where the inventory names the file, for the error.
    :raises UsageError: the file cannot be used.
    """
    if ca_file is None:
        return True
    try:
        ssl.create_default_context(cafile=str(ca_file))
    except OSError as error:
        why = "it holds no PEM certificate" if isinstance(error, ssl.SSLError) else error.strerror or error
        raise UsageError(
            f"{key}: {ca_file} cannot be used: {why}",
            hint="name a file of PEM certificates; a relative path starts at the inventory",
        ) from None
    return str(ca_file)


# -- reading ----------------------------------------------------------------------------------------------------


class Late(ReadTimeout):
    """The deadline for the whole answer has passed."""


def body_of(response: requests.Response, limit: int, deadline: float) -> bytes:
    """The whole body, or more than ``limit`` bytes of one that is longer: it is not read any further then.

    :param deadline: of ``time.monotonic()``. The time-out of requests only bounds each single read.
    :raises Late: the deadline has passed; and any of :data:`FAILURES`.
    """
    chunks: list[bytes] = []
    size = 0
    # read1 gives what is there; iter_content would wait for a full chunk, past every deadline.
    while size <= limit and (chunk := response.raw.read1(65536, decode_content=True)):
        if time.monotonic() > deadline:
            raise Late
        size += len(chunk)
        chunks.append(chunk)
    return b"".join(chunks)


# -- what went wrong --------------------------------------------------------------------------------------------


class Fault(Enum):
    """Why there is no answer."""

    TLS = auto()
    AUTHORITIES = auto()  # the file of those to trust is not there any more
    NO_CONNECTION_IN_TIME = auto()
    PROXY = auto()
    UNKNOWN_NAME = auto()
    NO_CONNECTION = auto()
    LATE = auto()
    CUT_OFF = auto()
    NOT_SENT = auto()  # an address or a header that cannot be sent at all


def fault_of(error: Exception) -> Fault:
    """What kind of failure one of :data:`FAILURES` is, or the ValueError of an address."""
    reason = _reason(error)
    if isinstance(error, SSLError):
        return Fault.TLS
    if isinstance(error, ConnectTimeout):
        return Fault.NO_CONNECTION_IN_TIME
    if isinstance(error, ProxyError):
        return Fault.PROXY
    if isinstance(reason, NameResolutionError):
        return Fault.UNKNOWN_NAME
    if isinstance(reason, NewConnectionError):
        return Fault.NO_CONNECTION
    if isinstance(error, Timeout) or isinstance(reason, ReadTimeoutError):
        return Fault.LATE
    if isinstance(error, requests.exceptions.ConnectionError | HTTPError):
        return Fault.CUT_OFF
    if isinstance(error, RequestException) or not isinstance(error, OSError):
        return Fault.NOT_SENT
    return Fault.AUTHORITIES


def last_words(error: Exception) -> str:
    """What the innermost of a chain of wrapped exceptions says, without addresses of objects."""
    reason = _reason(error)
    cause = getattr(reason, "__cause__", None) or getattr(reason, "__context__", None) or reason
    return str(getattr(cause, "strerror", None) or getattr(cause, "verify_message", None) or cause)


def _reason(error: Exception) -> object:
    """What urllib3 gave as the cause of a failed connection; without one, the error itself."""
    inner = error.args[0] if error.args else None
    return getattr(inner, "reason", inner) if isinstance(inner, Exception) else error


# -- what may be shown ------------------------------------------------------------------------------------------


def excerpt(redactor: Redactor, text: str) -> str:
    """A server's words on one line, cleaned of secrets first and cut afterwards."""
    clean = " ".join(redactor.clean(text).split())
    return clean if len(clean) <= EXCERPT else clean[:EXCERPT] + "…"


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
