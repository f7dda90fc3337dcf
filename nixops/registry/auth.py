"""Logging in as a registry asks for it: basic, or a bearer token for each scope (the distribution project's scheme).

Nothing is sent before it is asked for. A token is kept until shortly before its end, for its scope alone.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode, urlsplit

from nixops.errors import RegistryError
from nixops.registry.challenge import Challenge, parse_challenges
from nixops.registry.fault import RegistryRefused, refusal_hint, said
from nixops.registry.http import Answer, RegistryHttp
from nixops.registry.login import Login
from nixops.secret import Secret

# The specification: a token without `expires_in` is good for a minute.
DEFAULT_LIFETIME = 60.0
LONGEST_LIFETIME = 24 * 3600.0
# A token is not used for its last seconds: it must still be good when the registry looks at it.
MARGIN = 10.0
_TOKEN_LIMIT = 256 * 1024


@dataclass(frozen=True)
class _Kept:
    header: Secret
    until: float


class Authenticator:
    """What to send to one registry as ``Authorization``. Used by several threads at once.

    :param login: asked each time the login is needed, so that it can refresh one that ends; None: anonymous.
    :param clock: seconds, monotonic.
    """

    def __init__(
        self,
        http: RegistryHttp,
        login: Callable[[], Login | None],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._http = http
        self._login = login
        self._clock = clock
        self._lock = threading.Lock()
        self._asked: Challenge | None = None
        self._scopes: dict[str, str] = {}
        self._kept: dict[str, _Kept] = {}
        self.user: str | None = None

    def header(self, scope: str) -> Secret | None:
        """The header for a request of this scope (``repository:team/app:pull``); None as long as none is asked for.

        :raises RegistryError: the token server refuses or fails.
        """
        with self._lock:
            if self._asked is None:
                return None
            if self._asked.scheme == "basic":
                return self._basic()
            return self._bearer(self._asked, self._scopes.get(scope, scope))

    def challenged(self, answer: Answer, scope: str, sent: Secret | None) -> bool:
        """Learn from a 401.

        :param sent: the header that it is the answer to.
        :returns: whether the request is worth sending again, with what :meth:`header` now gives.
        :raises RegistryError: the registry asks for something that cannot be given.
        """
        asked = self._chosen(answer)
        with self._lock:
            self._asked = asked
            if asked.scheme == "basic":
                # There is a login, and it was not sent, or has been refreshed since.
                return self._basic() not in (None, sent)
            wanted = asked.parameters.get("scope") or scope
            self._scopes[scope] = wanted
            kept = self._kept.get(wanted)
            if kept is not None and kept.header == sent:
                del self._kept[wanted]
        return True

    def _chosen(self, answer: Answer) -> Challenge:
        challenges = parse_challenges(answer.headers.get("www-authenticate", ""))
        for challenge in challenges:
            if challenge.scheme == "bearer" and challenge.parameters.get("realm"):
                return challenge
        for challenge in challenges:
            if challenge.scheme == "basic":
                return challenge
        offered = ", ".join(c.scheme for c in challenges) or "nothing that can be read"
        raise RegistryRefused(
            401,
            f"{answer.what} was refused with 401, and the registry offers no login that is known here "
            f"({self._http.excerpt(offered)})",
            hint="basic and bearer are known; is this the address of a registry?",
        )

    def _current(self) -> Login | None:
        login = self._login()
        self.user = login.user if login else None
        if login is not None:
            self._http.redactor.add(login.password)
        return login

    def _basic(self) -> Secret | None:
        login = self._current()
        if login is None:
            return None
        if login.identity:
            raise RegistryError(
                f"the login for {self._http.registry} is an identity token, and the registry asks for a password",
                hint="log in with a user and a password or an access token",
            )
        return login.basic()

    def _bearer(self, asked: Challenge, scope: str) -> Secret:
        kept = self._kept.get(scope)
        if kept is not None and self._clock() < kept.until:
            return kept.header
        began = self._clock()
        token, lifetime = self._ask_token(asked, scope)
        made = _Kept(Secret(f"Bearer {token.reveal()}"), began + lifetime - min(MARGIN, lifetime / 4))
        self._kept[scope] = made
        return made.header

    def _ask_token(self, asked: Challenge, scope: str) -> tuple[Secret, float]:
        realm, service = asked.parameters["realm"], asked.parameters.get("service")
        if not self._http.allowed(realm) or "#" in realm:
            raise RegistryError(
                f"the registry {self._http.registry} names a token server that the login is not sent to: "
                f"{self._http.excerpt(realm)}",
                hint="a registry with TLS must name one with TLS: look at the realm in its configuration",
            )
        login = self._current()
        fields = {"service": service} if service else {}
        fields["scope"] = scope
        if login is not None and login.identity:
            fields |= {"grant_type": "refresh_token", "client_id": "nixops", "refresh_token": login.password.reveal()}
            answer = self._http.send(
                "POST",
                realm,
                headers={"Accept": "application/json", "Content-Type": "application/x-www-form-urlencoded"},
                body=urlencode(fields).encode(),
                limit=_TOKEN_LIMIT,
                again=True,  # it gives one more token, and takes none away
            )
        else:
            if login is not None:
                fields["account"] = login.user
            answer = self._http.send(
                "GET",
                realm + ("&" if urlsplit(realm).query else "?") + urlencode(fields),
                authorization=login.basic() if login else None,
                headers={"Accept": "application/json"},
                limit=_TOKEN_LIMIT,
                again=True,
            )
        if answer.status != 200:
            raise self._refused(answer, scope, login)
        return self._token_of(answer)

    def _refused(self, answer: Answer, scope: str, login: Login | None) -> RegistryRefused:
        words = said(answer.body, answer.headers.get("content-type", ""), self._http.excerpt)
        return RegistryRefused(
            answer.status,
            f"{answer.what}: the token server gave no token for {scope}: {answer.status}"
            + (f" {words}" if words else ""),
            hint=refusal_hint(
                answer.status,
                "have a token for that",
                registry=self._http.registry,
                user=login.user if login else None,
                logged_in=login is not None,
            ),
        )

    def _token_of(self, answer: Answer) -> tuple[Secret, float]:
        """The token and the seconds it is good for. The body is never quoted."""
        try:
            value: Any = json.loads(answer.body)
        except (ValueError, RecursionError):
            value = None
        token = (value.get("token") or value.get("access_token")) if isinstance(value, dict) else None
        if not isinstance(token, str) or not token.isascii() or not token.isprintable() or " " in token:
            raise RegistryError(
                f"{answer.what}: the token server's answer holds no token",
                hint="look at the realm in the registry's set-up",
            )
        lifetime = value.get("expires_in")
        if isinstance(lifetime, bool) or not isinstance(lifetime, int | float) or not lifetime > 0:
            lifetime = DEFAULT_LIFETIME
        return self._http.redactor.add(Secret(token)), min(float(lifetime), LONGEST_LIFETIME)
