"""What a registry asks for in ``WWW-Authenticate``, read strictly (RFC 9110, section 11.6.1)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

_NAME = r"[A-Za-z0-9!#$%&'*+.^_`|~-]+"
_SCHEME = re.compile(rf"[\s,]*(?P<scheme>{_NAME})(?=[\s,]|$)")
_PARAMETER = re.compile(rf'[\s,]*(?P<key>{_NAME})\s*=\s*(?:"(?P<quoted>(?:[^"\\]|\\.)*)"|(?P<bare>{_NAME}))', re.DOTALL)
# What some schemes have instead of parameters; it says nothing to us.
_TOKEN68 = re.compile(r"\s+[A-Za-z0-9._~+/-]+=*(?=\s*(,|$))")
# A header is no place for more than this.
_LIMIT = 8192


@dataclass(frozen=True)
class Challenge:
    """One way to authenticate. ``scheme`` and the parameters' names are in small letters."""

    scheme: str
    parameters: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))


def parse_challenges(header: str) -> tuple[Challenge, ...]:
    """Each challenge of the header, in order; what cannot be read ends the list.

    A header may hold several challenges, and several such headers arrive as one, joined by commas.
    """
    if len(header) > _LIMIT:
        return ()
    found: list[Challenge] = []
    at = 0
    while scheme := _SCHEME.match(header, at):
        at = scheme.end()
        parameters: dict[str, str] = {}
        while one := _PARAMETER.match(header, at):
            value = one["bare"] if one["quoted"] is None else re.sub(r"\\(.)", r"\1", one["quoted"], flags=re.DOTALL)
            # The first counts: nobody can change a parameter by adding to the header's end.
            parameters.setdefault(one["key"].lower(), value)
            at = one.end()
        if not parameters and (opaque := _TOKEN68.match(header, at)):
            at = opaque.end()
        found.append(Challenge(scheme["scheme"].lower(), MappingProxyType(parameters)))
    return tuple(found)
