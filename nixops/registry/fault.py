"""What can go wrong with a registry, in words: no answer, a refusal, too much of an answer, a time to wait."""

from __future__ import annotations

import json
from collections.abc import Callable
from email.utils import parsedate_to_datetime

from nixops.errors import RegistryError


class NoAnswer(RegistryError):
    """No complete answer came.

    :ivar again: asking once more may well help.
    :ivar sent: the request may have been carried out.
    """

    def __init__(self, message: str, *, hint: str, again: bool = False, sent: bool = False) -> None:
        super().__init__(message, hint=hint)
        self.again = again
        self.sent = sent


class RegistryRefused(RegistryError):
    """The registry answered with an error.

    :ivar status: the HTTP status.
    :ivar codes: the distribution specification's codes in the answer, such as ``MANIFEST_UNKNOWN``.
    """

    def __init__(self, status: int, message: str, *, hint: str, codes: frozenset[str] = frozenset()) -> None:
        super().__init__(message, hint=hint)
        self.status = status
        self.codes = codes


def error_codes(body: bytes) -> frozenset[str]:
    """The codes of an error body, if it is one of the specification's."""
    return frozenset(code for code, _ in _errors(body))


def said(body: bytes, content_type: str, excerpt: Callable[[str], str]) -> str:
    """The registry's own words, cleaned and cut by ``excerpt``."""
    if errors := _errors(body):
        return excerpt("; ".join(dict.fromkeys(": ".join(filter(None, pair)) for pair in errors)))
    if "html" in content_type:
        return f"a web page of {len(body)} bytes"
    return excerpt(body.decode(errors="replace"))


def _errors(body: bytes) -> list[tuple[str, str]]:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return []
    if not isinstance(value, dict):
        return []
    errors = value.get("errors")
    if isinstance(errors, list):
        return [(str(one.get("code") or ""), str(one.get("message") or "")) for one in errors if isinstance(one, dict)]
    # Token servers have forms of their own.
    texts = (value.get(key) for key in ("error_description", "details", "message", "error"))
    return [("", text) for text in texts if isinstance(text, str) and text][:1]


def refusal_hint(status: int, what: str, *, registry: str, user: str | None, logged_in: bool) -> str:
    """What to do about a refusal.

    :param what: what was to be done, as in ``push to team/app``.
    :param user: who was logged in, where somebody was.
    """
    if status == 401 and not logged_in:
        return (
            f"no login for {registry} was found: name one under registries.{registry} in the inventory, "
            f"or log in with: docker login {registry}"
        )
    if status == 401:
        return f"the login of {user} is wrong or has ended: put a new one where it was read from"
    if status == 403:
        return f"{user or 'an anonymous user'} may not {what}: give the login that right in the registry"
    if status == 404:
        return f"is there such a repository? Some registries want it made before one can {what}"
    if status == 413:
        return "the registry, or a proxy before it, takes no body of this size: raise its limit"
    if status == 429:
        return "too many requests: wait, then run the command again; logging in often raises the limit"
    if status >= 500:
        return "the fault is on the registry's side: look at its log, then run the command again"
    return f"look at the registry's settings: it does not let us {what}"


def oversized(what: str, limit: int) -> RegistryError:
    """The error of an answer that is larger than anything it could rightly be."""
    return RegistryError(
        f"{what} was answered with more than {limit} bytes", hint="is this the registry, and what was asked for?"
    )


def wait_of(header: str | None, now: float) -> float:
    """The seconds that a ``Retry-After`` asks for: a number, or a date (then from ``now``, Unix time); 0 if none."""
    if header is None:
        return 0.0
    text = header.strip()
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - now)
    except (TypeError, ValueError, OverflowError):
        return 0.0
