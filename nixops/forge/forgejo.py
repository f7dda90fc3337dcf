"""Forgejo's API as far as runners need it, for every version from 7 on.

Before 15 there is one reusable registration token per scope, made by the first GET for it, and runners can be
neither listed nor deleted. From 15 on a POST makes a runner and gives its credentials; it is not idempotent.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

from nixops.errors import ForgeError
from nixops.forge.http import PASSING, Answer, AnswerLost, BadAnswer, ForgeHttp, ForgeRefused
from nixops.forge.place import Place, place_of
from nixops.forge.shapes import (
    CreatedRunnerShape,
    OrganizationShape,
    RegisteredRunnerShape,
    RepositoryShape,
    RunnerCredentials,
    RunnerInfo,
    RunnerShape,
    SearchShape,
    TokenShape,
    UserShape,
    VersionShape,
    read,
)
from nixops.forge.version import ForgejoVersion
from nixops.inventory.model import Scope
from nixops.secret import Redactor, Secret
from nixops.values import RepoName

PAGE = 50
# 50 × 400 entries. A server that never ends a list must not keep us for ever.
MOST_PAGES = 400
MOST_PASSES = 5
# A POST that timed out here may still be at work there: look for its runner this often, at these intervals (s).
LOOKS = (0.0, 0.5, 1.5, 3.0)
REGISTER = "runner.v1.RunnerService/Register"


class Forgejo:
    """One Forgejo, by its API.

    :param url: its address, such as ``https://code.example.org`` or with a path below it.
    :param token: the operator's access token.
    :param redactor: learns this token and every credential that the server gives.
    :param ca_file: PEM file of the authority that signed the server's certificate.
    :param timeout: seconds for each request.
    :param sleep: how to wait between tries.
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
        self._redactor = redactor
        self._sleep = sleep
        self.http = ForgeHttp(url, token, redactor=redactor, ca_file=ca_file, timeout=timeout, sleep=sleep)
        self._version: ForgejoVersion | None = None

    def close(self) -> None:
        """Close the connections."""
        self.http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- what is there ----------------------------------------------------------------------------------------

    def version(self) -> ForgejoVersion:
        """The server's version, asked once.

        :raises ForgeError: not reached, not a Forgejo, or one before 7.
        """
        if self._version is None:
            needs = "a valid token"
            try:
                answer = self.http.get("/version", needs=needs, anonymous=True)
            except ForgeRefused as error:
                # A Forgejo that requires sign-in for everything wants the token here too.
                if error.status not in (401, 403):
                    raise
                answer = self.http.get("/version", needs=needs)
            self._version = ForgejoVersion.parse(read(VersionShape, answer.json(), answer.what).version)
        return self._version

    def check_access(self, scope: Scope) -> None:
        """See that the scope exists and that this token is meant for it. Changes nothing on the server.

        :raises ForgeError: it is not there, the token belongs to another account, or its owner may not do this.
        """
        place = place_of(scope)
        version = self.version()
        if scope.repository is not None:
            self._check_repository(scope.repository, place)
        elif scope.organization is not None:
            self._check_organization(scope.organization, place)
        elif scope.user is not None:
            owner = self._owner()
            if owner.login.lower() != scope.user.lower():
                raise ForgeError(
                    f"the token belongs to {owner.login}, but the runner is meant for the account {scope.user}: "
                    f"on Forgejo /user is always the token's owner",
                    hint=f"use a token of {scope.user}, or name another scope",
                )
        else:
            with self._optional():
                if not self._owner().is_admin:
                    raise ForgeError(
                        f"the token's owner is no site administrator of {self.url}",
                        hint="use a token of a site administrator, or a narrower scope",
                    )
        # Asking for a registration token would make one, so rights are tried on a list that changes nothing.
        if version.lists_runners:
            self.http.get(place.runners, needs=place.needs("read"), params={"page": 1, "limit": 1})
        elif version.lists_waiting_jobs:
            path = "/admin/runners/jobs" if scope.admin else f"{place.path}/actions/runners/jobs"
            try:
                self.http.get(path, needs=place.needs("read"))
            except ForgeRefused as error:
                if error.status != 404:
                    raise

    def admitted(self, scope: Scope) -> tuple[RepoName, ...]:
        """Every repository whose jobs a registration of this scope would admit, as the token sees them, sorted.

        Site-wide, that is a search over all repositories (``/repos/search``, the same in every version).
        """
        if scope.repository is not None:
            return (scope.repository,)
        needs = "a token with the scope read:repository"
        if scope.organization is not None:
            path, needs = f"/orgs/{quote(scope.organization, safe='')}/repos", f"{needs} and read:organization"
        elif scope.user is not None:
            path, needs = f"/users/{quote(scope.user, safe='')}/repos", f"{needs} and read:user"
        else:
            path = "/repos/search"
        found: list[RepositoryShape] = self._list(path, RepositoryShape, needs)
        return tuple(sorted({r.repo_name() for r in found}, key=str.lower))

    def repository(self, name: RepoName) -> RepositoryShape:
        """One repository. :raises ForgeError: it is not there, or the token does not see it."""
        place = place_of(Scope(repository=name))
        answer = self.http.get(place.path, needs=place.needs("read"))
        repository: RepositoryShape = read(RepositoryShape, answer.json(), answer.what)
        return repository

    # -- credentials ------------------------------------------------------------------------------------------

    def registration_token(self, scope: Scope) -> Secret:
        """The scope's one reusable registration token. The first call **makes** it on the server.

        :raises ForgeError: refused, or no usable answer.
        """
        place = place_of(scope)
        path = f"{place.path}/actions/runners/registration-token"
        if scope.admin and not self.version().lists_runners:
            path = "/admin/runners/registration-token"
        answer = self.http.get(path, needs=place.needs("read"))
        return self._redactor.add(Secret(read(TokenShape, answer.json(), answer.what).token))

    def create_runner(self, scope: Scope, *, name: str, description: str = "") -> RunnerCredentials:
        """Make a runner and give the credentials it logs in with.

        Before Forgejo 15 by registering it with the scope's registration token (``description`` is not kept
        then). The server does not mind a second runner of the same name: list first where that matters.

        :raises ForgeError: refused; or the answer was lost, and then the message says what is left behind.
        """
        if self.version().lists_runners:
            return self._post_runner(scope, name, description)
        token = self.registration_token(scope)
        body = {"name": name, "token": token.reveal(), "version": "nixops", "labels": []}
        try:
            value = self.http.connect(REGISTER, body)
            made: CreatedRunnerShape = read(RegisteredRunnerShape, value, f"registering {name} at {self.url}").runner
        except (AnswerLost, BadAnswer, ForgeRefused) as error:
            if isinstance(error, ForgeRefused) and error.status not in PASSING:
                raise ForgeError(
                    f"registering {name} with the token of {scope} failed: {error.message}",
                    hint="was the registration token reset in the meantime? Run the command again",
                ) from error
            raise ForgeError(
                f"{error.message}; a runner {name} may have been made",
                hint=f"look at {self.url}{place_of(scope).page} and delete it there: its API cannot before 15",
            ) from error
        return self._credentials(made)

    def _post_runner(self, scope: Scope, name: str, description: str) -> RunnerCredentials:
        place = place_of(scope)
        # Names are not unique, so this is how the runner of a lost answer is told from all others.
        mark = f"[nixops {secrets.token_hex(6)}]"
        body = {"name": name, "description": f"{description} {mark}".lstrip()}
        try:
            answer = self.http.send("POST", place.runners, needs=place.needs("write"), body=body, ok=(201,))
            return self._credentials(read(CreatedRunnerShape, answer.json(), answer.what))
        except ForgeRefused as error:
            if error.status < 500:
                raise
            raise self._cleared(scope, name, mark, error) from error
        except (AnswerLost, BadAnswer) as error:
            raise self._cleared(scope, name, mark, error) from error
        except KeyboardInterrupt:
            self._cleared(scope, name, mark, ForgeError("interrupted"))
            raise

    def _cleared(self, scope: Scope, name: str, mark: str, cause: ForgeError) -> ForgeError:
        """Delete what a POST without a good answer has made. Its token is lost, so it cannot be adopted."""
        page = f"{self.url}{place_of(scope).page}"
        by_hand = f"look at {page} for a runner {name} with {mark} in its description, and delete it"
        try:
            for pause in LOOKS:
                self._sleep(pause)
                mine = [r for r in self.list_runners(scope) if mark in r.description]
                if mine:
                    for runner in mine:
                        self.delete_runner(scope, runner.id)
                    return ForgeError(
                        f"{cause.message}; the runner {name} it made all the same was deleted again",
                        hint="run the command again",
                    )
        except ForgeError as error:
            return ForgeError(f"{cause.message}; whether it made a runner is not known: {error.message}", hint=by_hand)
        return ForgeError(
            f"{cause.message}; it has made no runner so far",
            hint=f"run the command again; if it fails again, {by_hand}",
        )

    def _credentials(self, made: CreatedRunnerShape) -> RunnerCredentials:
        return RunnerCredentials(made.id, made.uuid, self._redactor.add(Secret(made.token)))

    # -- runners (15+) ----------------------------------------------------------------------------------------

    def list_runners(self, scope: Scope) -> tuple[RunnerInfo, ...]:
        """The runners that belong to exactly this scope, by id.

        :raises ForgeError: before 15 the API cannot say.
        """
        self._require_runners("cannot list runners through its API", scope)
        place = place_of(scope)
        found: list[RunnerShape] = self._list(place.runners, RunnerShape, place.needs("read"), {"visible": "false"})
        return tuple(sorted((r.info() for r in found), key=lambda r: r.id))

    def delete_runner(self, scope: Scope, runner_id: int) -> None:
        """Delete a runner; one that is gone already is no error.

        :raises ForgeError: refused, or before 15, where the API cannot.
        """
        self._require_runners("cannot delete a runner through its API", scope)
        place = place_of(scope)
        try:
            self.http.send("DELETE", f"{place.runners}/{int(runner_id)}", needs=place.needs("write"), ok=(200, 204))
        except (AnswerLost, ForgeRefused) as error:
            if isinstance(error, ForgeRefused) and error.status != 404 and error.status < 500:
                raise
            # Gone already, or the answer was lost: the list tells whether there is anything left to complain of.
            if any(r.id == runner_id for r in self.list_runners(scope)):
                raise

    def _require_runners(self, cannot: str, scope: Scope) -> None:
        if not self.version().lists_runners:
            raise ForgeError(
                f"{self.version()} {cannot}",
                hint=f"use the page {self.url}{place_of(scope).page}, or upgrade to Forgejo 15 or later",
            )

    # -- parts ------------------------------------------------------------------------------------------------

    def _owner(self) -> UserShape:
        answer = self.http.get("/user", needs="a token with the scope read:user")
        owner: UserShape = read(UserShape, answer.json(), answer.what)
        return owner

    def _check_repository(self, name: RepoName, place: Place) -> None:
        repository = self.repository(name)
        if repository.full_name.lower() != name.lower():
            raise ForgeError(f"{name} is now {repository.full_name}", hint="write its present name in the inventory")
        if repository.has_actions is False:
            raise ForgeError(
                f"Actions is switched off in {name}, so it could have no runner",
                hint=f"switch it on in {self.url}/{name}/settings/units",
            )
        if repository.permissions is not None and not repository.permissions.admin:
            raise ForgeError(f"the token's owner may not administer {name}", hint=f"this takes {place.needs('write')}")

    def _check_organization(self, name: str, place: Place) -> None:
        self.http.get(place.path, needs=place.needs("read"))
        with self._optional():
            if self._owner().is_admin:
                return
            mine: list[OrganizationShape] = self._list("/user/orgs", OrganizationShape, place.needs("read"))
            if not any(name.lower() in o.names for o in mine):
                raise ForgeError(
                    f"the token's owner is not in the organization {name}", hint=f"this takes {place.needs('write')}"
                )

    @contextmanager
    def _optional(self) -> Iterator[None]:
        """A look that takes a token scope the work itself does without (``read:user``): a 403 is no finding."""
        try:
            yield
        except ForgeRefused as error:
            if error.status != 403:
                raise

    def _list(
        self, path: str, shape: type[Any], needs: str, params: Mapping[str, str | int] | None = None
    ) -> list[Any]:
        """All entries of a list, each once by its ``id``.

        Pages shift while they are read (the order is by last contact), so an entry can come twice and another
        not at all: when fewer came than ``X-Total-Count`` says, the list is read again until a pass adds nothing.
        Some lists count entries that the token may not see; there that costs one more pass.
        """
        found: dict[int, Any] = {}
        for _ in range(MOST_PASSES):
            before = len(found)
            total = self._pass(path, shape, needs, dict(params or {}), found)
            if total is None or len(found) >= total or len(found) == before:
                break
        return list(found.values())

    def _pass(
        self, path: str, shape: type[Any], needs: str, params: dict[str, str | int], found: dict[int, Any]
    ) -> int | None:
        total: int | None = None
        seen = 0
        for page in range(1, MOST_PAGES + 1):
            answer = self.http.get(path, needs=needs, params={**params, "page": page, "limit": PAGE})
            value = answer.json()
            if path == "/repos/search":
                entries = read(SearchShape, value, answer.what).data
            else:
                entries = read(list[shape], [] if value is None else value, answer.what)  # type: ignore[valid-type]  # built at run time
            before = len(found)
            found.update((e.id, e) for e in entries)
            seen += len(entries)
            total = _total(answer)
            # The server may cap pages below PAGE, and may leave out what we may not see: only an empty page, or
            # as many as were announced, is the end. A list without a count may know no pages at all.
            if not entries or (seen >= total if total is not None else len(found) == before):
                return total
        raise ForgeError(f"{path} has more than {MOST_PAGES} pages", hint="name a narrower scope")


def _total(answer: Answer) -> int | None:
    text = answer.headers.get("x-total-count", "")
    return int(text) if text.isascii() and text.isdigit() else None
