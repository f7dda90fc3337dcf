"""The REST API of the lab's Forgejo, less its routes: rights, token scopes, pages, error bodies.

Versions without a contract of their own are held to the nearest older one's (7 to 9's).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn
from urllib.parse import unquote

from nixops.lab import forgejo_json as shape
from nixops.lab.forgejo_state import AccessToken, Account, Owner, Repository, State

LEVELS = (9, 11, 15, 17)
MAX_PAGE = 50
DEFAULT_PAGE = 30


class Refused(Exception):
    """An error answer. ``errors`` is only there for what was not found."""

    def __init__(self, status: int, message: str, *, not_found: bool = False) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.not_found = not_found


@dataclass(frozen=True)
class Request:
    """One request to ``/api/v1``; ``path`` is below that. ``token`` is the caller's, once it is known."""

    method: str
    path: str
    query: Mapping[str, str]
    body: Any
    authorization: str
    base: str
    token: AccessToken | None = None

    @property
    def user(self) -> Account:
        if self.token is None:
            raise Refused(401, "token is required")
        return self.token.owner


@dataclass(frozen=True)
class Reply:
    """Status and body: a JSON value, text, or nothing."""

    status: int
    value: Any = None
    text: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


def level(version: int) -> int:
    """The contract that a version is held to."""
    return max((known for known in LEVELS if known <= version), default=LEVELS[0])


Handler = Callable[["Call"], Reply]


@dataclass(frozen=True)
class Route:
    """A path of the API, with the versions that have it and the token scope category it takes ("" for none)."""

    method: str
    template: str
    handler: Handler
    categories: tuple[str, ...] = ()
    since: int = 0
    before: int = 99

    def match(self, method: str, path: str) -> dict[str, str] | None:
        if method != self.method:
            return None
        pattern = re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", self.template)
        found = re.fullmatch(pattern, path)
        return {k: unquote(v) for k, v in found.groupdict().items()} if found else None


class Api:
    """The API of one version over a :class:`State`.

    :param known: the routes of all versions.
    :param run_by_id: for 12 to 14, whether ``GET …/actions/runs/{id}`` is there (what is known of them differs).
    :param page_limit: the server's own bound of a page.
    """

    def __init__(
        self,
        state: State,
        version: int,
        text: str,
        known: Sequence[Route],
        *,
        run_by_id: bool = False,
        page_limit: int = MAX_PAGE,
    ) -> None:
        self.state = state
        self.version = version
        self.text = text
        self.level = level(version)
        self.page_limit = page_limit
        self.routes = [r for r in known if r.since <= version < r.before]
        if run_by_id and 12 <= version < 15:
            self.routes += [r for r in known if r.template.endswith("/runs/{run_id}") and r.method == "GET"]

    def answer(self, request: Request) -> Reply:
        """The reply to one request, errors included."""
        try:
            for route in self.routes:
                params = route.match(request.method, request.path)
                if params is not None:
                    return route.handler(Call(self, self._authorized(request, route), params))
            raise Refused(404, "The target couldn't be found.", not_found=True)
        except Refused as error:
            body: dict[str, Any] = {"message": error.message, "url": f"{request.base}/api/swagger"}
            if error.not_found:
                body["errors"] = []
            return Reply(error.status, body)

    def _authorized(self, request: Request, route: Route) -> Request:
        scheme, _, value = request.authorization.partition(" ")
        if not request.authorization:
            if route.categories:
                raise Refused(401, "token is required")
            return request
        token = self.state.tokens.get(value) if scheme.lower() in ("token", "bearer") else None
        if token is None:
            # From 15 on the body repeats what was sent, secret or not.
            echo = (
                f"access token does not exist [sha: {value}]"
                if self.version >= 15
                else "invalid username, password or token"
            )
            raise Refused(401, echo)
        access = "read" if request.method == "GET" else "write"
        for category in route.categories:
            wanted = {f"write:{category}", "all"} | ({f"read:{category}"} if access == "read" else set())
            if not token.scopes & wanted:
                raise Refused(
                    403, f"token does not have at least one of required scope(s), required=[{access}:{category}]"
                )
        return replace(request, token=token)


@dataclass(frozen=True)
class Call:
    """One request on its way through a handler: the server, the request, and what its path named."""

    api: Api
    request: Request
    params: Mapping[str, str]

    @property
    def state(self) -> State:
        return self.api.state

    @property
    def user(self) -> Account:
        """Whose token it is."""
        return self.request.user

    @property
    def base(self) -> str:
        return self.request.base

    def repository(self, *, admin: bool = False) -> Repository:
        repo = self.state.repository(f"{self.params['owner']}/{self.params['repo']}")
        if repo is None or not self.state.sees(self.user, repo):
            missing()
        if admin and not self.state.administers(self.user, repo):
            raise Refused(403, "user should be an owner or a collaborator with admin write of a repository")
        return repo

    def organization(self, *, owned_by: Account | None = None) -> Account:
        account = self.state.account(self.params["org"])
        if account is None or not account.organization:
            missing()
        if owned_by is not None and not owned_by.is_admin and owned_by.login not in account.owners:
            raise Refused(403, "Must be an organization owner")
        return account

    def owner(self) -> Owner:
        """Whose runners a path means, with the rights that takes."""
        if "repo" in self.params:
            repo = self.repository(admin=True)
            if not repo.has_actions:
                missing()
            return Owner(repo_id=repo.id)
        if "org" in self.params:
            return Owner(owner_id=self.organization(owned_by=self.user).id)
        if self.request.path.startswith("/admin/"):
            if not self.user.is_admin:
                raise Refused(403, "user should be the site admin")
            return Owner()
        return Owner(owner_id=self.user.id)

    def page(self, rows: Sequence[Any], show: Callable[[Any], Any]) -> Reply:
        """One page of ``rows``, with ``X-Total-Count`` and ``Link`` as the real server sends them."""
        number = max(1, integer(self.request.query.get("page"), 1))
        limit = integer(self.request.query.get("limit"), DEFAULT_PAGE)
        limit = min(limit if limit > 0 else DEFAULT_PAGE, self.api.page_limit)
        start = (number - 1) * limit
        headers = {"X-Total-Count": str(len(rows)), "Access-Control-Expose-Headers": "X-Total-Count, Link"}
        last = max(1, -(-len(rows) // limit))
        links = [(number + 1, "next"), (last, "last")] if number < last else []
        links += [(1, "first"), (number - 1, "prev")] if number > 1 else []
        if links:
            url = f"{self.base}/api/v1{self.request.path}"
            headers["Link"] = ",".join(f'<{url}?limit={limit}&page={n}>; rel="{rel}"' for n, rel in links)
        return Reply(200, [show(r) for r in rows[start : start + limit]], headers=headers)

    def repo_json(self, repo: Repository) -> dict[str, Any]:
        return shape.repository(repo, self.base, admin=self.state.administers(self.user, repo))


def missing() -> NoReturn:
    """404 as the API writes it."""
    raise Refused(404, "The target couldn't be found.", not_found=True)


def integer(text: str | None, default: int) -> int:
    return int(text) if text and text.isascii() and text.isdigit() else default
