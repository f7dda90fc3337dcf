"""Secrets that do not print themselves, and the redactor that knows them.

A :class:`Secret` shows as ``***`` wherever a value is shown by accident: ``str``, ``repr``, an f-string, a
dataclass, a traceback with locals. The one way to the value is :meth:`Secret.reveal`, so that every use can be
found by reading for that word.
"""

from __future__ import annotations

import base64
import json
import logging
import urllib.parse
from collections.abc import Iterable
from typing import NoReturn

MASK = "***"
# Below this length a value would blank out half of every log, and is no secret worth the name.
MIN_REDACTED = 6


class Secret:
    """A value that must not be seen.

    :param value: the secret text; it is kept exactly, white space included.
    """

    __slots__ = ("_value",)
    _value: str

    def __init__(self, value: str) -> None:
        object.__setattr__(self, "_value", value)

    def reveal(self) -> str:
        """The value itself. For stdin, a request body or a 0400 file, and for nothing else."""
        value: str = self._value
        return value

    def __repr__(self) -> str:
        return MASK

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        return MASK

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._value == self._value

    def __hash__(self) -> int:
        return hash(("nixops.Secret", self._value))

    def __bool__(self) -> bool:
        return bool(self._value)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError("a Secret does not change")

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Secret is never written down: it cannot be pickled or copied")


class Redactor(logging.Filter):
    """Replaces every known secret in a text by ``***``, in each form a server or a tool may give it back.

    Forms: as it is, base64 (with and without padding, at each of the three alignments), URL-encoded,
    JSON-escaped. It is also a :class:`logging.Filter` for the root handler. One redactor lives as long as
    one task; it is passed along, there is no global one.
    """

    def __init__(self, secrets: Iterable[Secret] = ()) -> None:
        super().__init__()
        self._forms: set[str] = set()
        for secret in secrets:
            self.add(secret)

    def add(self, secret: Secret) -> Secret:
        """Learn ``secret`` and return it, so that it can be learned where it is read."""
        value = secret.reveal()
        for part in {value, value.strip(), *value.splitlines()}:
            if len(part) >= MIN_REDACTED:
                self._forms.update(_forms(part))
        return secret

    def clean(self, text: str) -> str:
        """``text`` with every form of every known secret replaced."""
        for form in sorted(self._forms, key=len, reverse=True):
            if form in text:
                text = text.replace(form, MASK)
        return text

    def filter(self, record: logging.LogRecord) -> bool:
        """Clean a log record in place, its arguments and exception text too. Always lets it through."""
        record.msg = self.clean(record.getMessage())
        record.args = ()
        if record.exc_info and not record.exc_text:
            record.exc_text = logging.Formatter().formatException(record.exc_info)
        if record.exc_text:
            record.exc_text = self.clean(record.exc_text)
        return True


def _forms(value: str) -> set[str]:
    raw = value.encode()
    forms = {
        value,
        urllib.parse.quote(value),
        urllib.parse.quote(value, safe=""),
        urllib.parse.quote_plus(value),
        json.dumps(value)[1:-1],
        json.dumps(value, ensure_ascii=False)[1:-1],
        repr(value)[1:-1],
    }
    # A secret inside a longer text that was encoded as a whole (``user:token``) stands at one of three
    # alignments; the first and last characters then depend on its neighbours and are cut off.
    for pad in range(3):
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            encoded = encode(b"\0" * pad + raw).decode().rstrip("=")
            start = (0, 2, 3)[pad]
            end = len(encoded) - (1 if (len(raw) + pad) % 3 else 0)
            if end - start >= MIN_REDACTED:
                forms.add(encoded[start:end])
    return forms
