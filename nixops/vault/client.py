"""HTTP to one OpenBao through hvac: one place where an answer becomes a value or a clean error.

hvac knows the API's paths and parameters; this module replaces its transport. An exception of hvac or requests
holds the request, and with it the token and the data, in its text, its arguments or the frames of its traceback.
None of them leaves :meth:`BaoClient.call`: it raises errors of our own, made after the original is gone.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import hvac
import requests
from hvac.adapters import RawAdapter

from nixops.errors import VaultError, VaultSealed
from nixops.secret import Redactor, Secret
from nixops.vault.settings import AppRoleLogin, BaoSettings

# A quarter of a login token's life is left for what is under way when it is looked at.
_FRESH_SHARE = 0.75


class VaultUnanswered(VaultError):
    """The request was sent, or may have been, and no answer came back: what it asked for may have happened."""


class VaultRefused(VaultError):
    """OpenBao answered with an error.

    :ivar status: the HTTP status.
    :ivar errors: what it said, cleaned of secrets.
    """

    def __init__(self, status: int, errors: tuple[str, ...], message: str, *, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.status = status
        self.errors = errors


@dataclass(frozen=True)
class Access:
    """What a request does, in the words of an OpenBao policy, so that a refusal can name what is missing.

    :ivar path: the API's path without ``/v1/``, as it stands in a policy.
    :ivar capabilities: those the request needs.
    """

    verb: str
    path: str
    capabilities: tuple[str, ...]

    def stanza(self) -> str:
        listed = ", ".join(f'"{c}"' for c in self.capabilities)
        return f'path "{self.path}" {{ capabilities = [{listed}] }}'


@dataclass(frozen=True)
class Reply:
    """An answer with an expected status. ``body`` is the JSON document, empty for 204. Not shown: it holds secrets."""

    status: int
    body: dict[str, Any] = field(repr=False)

    @property
    def data(self) -> dict[str, Any]:
        """The document's ``data``, empty when there is none."""
        value = self.body.get("data")
        return value if isinstance(value, dict) else {}

    @property
    def auth(self) -> dict[str, Any]:
        """The document's ``auth``, what a login gives; empty when there is none."""
        value = self.body.get("auth")
        return value if isinstance(value, dict) else {}

    @property
    def errors(self) -> tuple[str, ...]:
        """The document's ``errors`` as texts; not cleaned."""
        value = self.body.get("errors")
        return tuple(str(v) for v in value) if isinstance(value, list) else ()


@dataclass(frozen=True)
class _NoJson:
    """An answer that is not one of OpenBao's."""

    status: int
    content_type: str = field(repr=False)
    location: str = field(repr=False)


class _Adapter(RawAdapter):
    """hvac's transport, without its exceptions: every complete answer comes back as a value."""

    def request(
        self,
        method: str,
        url: str,
        headers: dict[str, str] | None = None,
        raise_exception: bool = True,
        **kwargs: Any,
    ) -> Reply | _NoJson:
        """Send one request. With ``ignore_exceptions``, which the client sets, errors are values too."""
        send: Any = super().request  # hvac has no types
        response = send(method, url, headers, raise_exception, **kwargs)
        try:
            body = response.json() if response.content else {}
        except (ValueError, RecursionError):  # the latter: nested without end
            body = None
        if isinstance(body, dict) and not 300 <= response.status_code < 400:
            return Reply(response.status_code, body)
        kind = response.headers.get("Content-Type", "none")
        return _NoJson(response.status_code, kind, response.headers.get("Location", ""))


def _no_netrc(request: requests.PreparedRequest) -> requests.PreparedRequest:
    """An authentication that adds nothing: without one, requests sends what ``~/.netrc`` holds for the server."""
    return request


class BaoClient:
    """A connection that logs in when it is first used, and again before its login token ends.

    It can be used from several threads. Every error is a :class:`nixops.errors.VaultError`.
    """

    def __init__(self, settings: BaoSettings, redactor: Redactor) -> None:
        self.settings = settings
        self._redactor = redactor
        self._lock = threading.Lock()
        self._login_ends: float | None = None
        login = settings.login
        session = requests.Session()
        session.auth = _no_netrc
        verify: bool | str = str(settings.ca_file) if settings.ca_file else True
        # hvac prefers the session's value over its own argument (hvac#991).
        session.verify = verify
        token = ""
        if isinstance(login, AppRoleLogin):
            redactor.add(login.role_id)
            redactor.add(login.secret_id)
        else:
            token = redactor.add(login.token).reveal()
        # A redirect could carry the token to another server, so none is followed. hvac itself would read
        # VAULT_TOKEN, VAULT_ADDR and ~/.vault-token for what is left out: nothing is.
        client: Any = hvac.Client  # hvac has no types
        self._hvac: Any = client(
            url=settings.address,
            token=token,
            verify=verify,
            timeout=settings.timeout,
            allow_redirects=False,
            session=session,
            adapter=_Adapter,
            ignore_exceptions=True,
            namespace=settings.namespace or "",
        )

    def __repr__(self) -> str:
        return f"BaoClient({self.settings.address!r})"

    def close(self) -> None:
        """Revoke the token of an AppRole login, where that can be done, and close the connections."""
        if self._login_ends is not None:
            self._login_ends = None
            try:
                self._ask("log out", lambda api: api.auth.token.revoke_self())
            except VaultError:
                pass  # it ends by itself, and closing must not hide the error that led here
        self._hvac.adapter.close()

    def call(self, access: Access, request: Callable[[Any], Any], *, expect: Collection[int] = ()) -> Reply:
        """Make one request.

        :param request: given hvac's client, makes the call. It must hold no secret in a default or a closure by
            name: reveal inside it.
        :param expect: statuses beside 2xx that are an answer and no error.
        :raises VaultSealed: 503 because it is sealed.
        :raises VaultRefused: any other error status; 403 names the policy that is needed.
        :raises VaultUnanswered: no answer, or not one of OpenBao's.
        """
        self._log_in()
        what = f"{access.verb} {access.path}"
        reply = self._ask(what, request)
        if 200 <= reply.status < 300 or reply.status in expect:
            return reply
        raise self.refusal(reply, access)

    def refusal(self, reply: Reply, access: Access) -> VaultError:
        """The error for an answer that was expected by its status and turned out to be none that fits."""
        return self._refusal(reply, f"{access.verb} {access.path}", access)

    def _ask(self, what: str, request: Callable[[Any], Any]) -> Reply:
        problem: tuple[str, str | None]
        try:
            answer = request(self._hvac)
        except requests.exceptions.SSLError as error:
            problem = self._tls_problem(error)
        except requests.exceptions.Timeout:
            problem = (f"did not answer within {self.settings.timeout:g} s", "raise vault.timeout if it is only slow")
        except requests.exceptions.ConnectionError as error:
            problem = (f"cannot be reached: {_reason(error)}", "check the address, and that OpenBao runs there")
        except (requests.exceptions.RequestException, OSError, ValueError) as error:
            problem = (f"could not be asked ({type(error).__name__})", "check the address and the CA file")
        else:
            if isinstance(answer, Reply):
                return answer
            problem = self._not_openbao(answer)
        message, hint = problem
        text = f"OpenBao at {self.settings.address} {message}, on: {what}"
        # Raised here and not above, so that the original is not its context.
        raise VaultUnanswered(self._redactor.clean(text), hint=hint)

    def _tls_problem(self, error: Exception) -> tuple[str, str]:
        trust = str(self.settings.ca_file) if self.settings.ca_file else "the system's authorities"
        return (
            f"is not trusted: {_reason(error)}; trusted is {trust}",
            "set vault.ca_file in the inventory, or BAO_CACERT, to the PEM file of its authority",
        )

    def _not_openbao(self, answer: _NoJson) -> tuple[str, str]:
        if 300 <= answer.status < 400:
            # The token must not follow; the operator can.
            to = self._redactor.clean(answer.location)[:300] or "nowhere"
            return (
                f"redirects to {to} (HTTP {answer.status}), which is not followed",
                "set vault.address to the server's own address",
            )
        kind = self._redactor.clean(answer.content_type)[:100]
        return (
            f"gave HTTP {answer.status} with content of type {kind}, and not its JSON",
            "check vault.address (or BAO_ADDR): is there a proxy or another service?",
        )

    def _refusal(self, reply: Reply, what: str, access: Access | None) -> VaultError:
        errors = tuple(" ".join(self._redactor.clean(e).split())[:500] for e in reply.errors)
        said = "; ".join(errors) or "it gave no reason"
        status, where = reply.status, f"OpenBao at {self.settings.address}"
        if self.settings.namespace:
            where += f", namespace {self.settings.namespace},"
        if status == 503 and any("sealed" in e for e in errors):
            return VaultSealed(f"{where} is sealed, on: {what}", hint="unseal it: bao operator unseal")
        hint: str | None = None
        message = f"{where} gave HTTP {status} on {what}: {said}"
        match status:
            case 403 if access:
                message = f"{where} denied permission to {what}"
                hint = f"the token is wrong or has ended, or its policy lacks: {access.stanza()}"
            case 404 if any("no handler for route" in e for e in errors):
                mount = access.path.split("/", 1)[0] if access else "?"
                message = f"{where} has nothing mounted for {what}"
                hint = f"check vault.mount and the namespace, or enable it: bao secrets enable -path={mount} kv-v2"
            case 404 if any("namespace not found" in e for e in errors):
                message = f"{where} does not have this namespace"
                hint = "check vault.namespace (or BAO_NAMESPACE)"
            case 429:
                message = f"{where} refuses for its rate limit (HTTP 429) on {what}: {said}"
                hint = "wait a moment and run it again, or raise the quota"
            case _ if status >= 500:
                hint = "the server failed; look at its log, and run it again"
        return VaultRefused(status, errors, message, hint=hint)

    # -- login ------------------------------------------------------------------------------------------------

    def _log_in(self) -> None:
        login = self.settings.login
        if not isinstance(login, AppRoleLogin):
            return
        with self._lock:
            if self._login_ends is not None and time.monotonic() < self._login_ends:
                return
            what = f"log in at auth/{login.mount}"
            # The token that is about to end must not go along: a login takes none.
            self._hvac.token = ""
            reply = self._ask(
                what,
                lambda api: api.auth.approle.login(
                    login.role_id.reveal(), login.secret_id.reveal(), use_token=False, mount_point=login.mount
                ),
            )
            if reply.status == 400:
                raise self._login_refused(reply, login.mount)
            if not 200 <= reply.status < 300 or not reply.auth.get("client_token"):
                raise self._login_error(reply, what, login.mount)
            self._hvac.token = self._redactor.add(Secret(str(reply.auth["client_token"]))).reveal()
            lasts = float(reply.auth.get("lease_duration") or 0) or float("inf")
            self._login_ends = time.monotonic() + lasts * _FRESH_SHARE

    def _login_refused(self, reply: Reply, mount: str) -> VaultError:
        said = self._redactor.clean("; ".join(reply.errors))[:500]
        return VaultRefused(
            400,
            (said,),
            f"OpenBao at {self.settings.address} refused the AppRole login at auth/{mount}: {said}",
            hint="the role id or the secret id is wrong, used up, expired or bound to another address: issue a new "
            "secret id",
        )

    def _login_error(self, reply: Reply, what: str, mount: str) -> VaultError:
        # Without a token, an auth method that is not there answers 403 like a path that is not allowed.
        if reply.status in (403, 404) and not any("namespace not found" in e for e in reply.errors):
            return VaultRefused(
                reply.status,
                (),
                f"OpenBao at {self.settings.address} has no AppRole auth method at {mount}/, on: {what}",
                hint="check vault.approle.mount and the namespace, or enable it: "
                f"bao auth enable -path={mount} approle",
            )
        return self._refusal(reply, what, None)


def _reason(error: BaseException) -> str:
    """The system's own words for a failed connection; requests' text would hold the whole URL and object names."""
    seen: BaseException | None = error
    found = type(error).__name__
    while seen is not None:
        inner = getattr(seen, "reason", None)
        if isinstance(inner, str):
            found = inner
        if isinstance(seen, OSError) and seen.strerror:
            found = getattr(seen, "verify_message", "") or seen.strerror
        elif type(seen).__name__ == "NameResolutionError":
            found = "its name is not known"
        following = inner if isinstance(inner, BaseException) else None
        following = following or next((a for a in seen.args if isinstance(a, BaseException)), None)
        following = following or seen.__cause__ or seen.__context__
        seen = following if following is not seen else None
    return found
