"""A small Forgejo with state, for the lab and the tests: the REST API of versions 7 to 17 and the runner's protocol.

    with ForgejoServer(version=15) as forge:
        forge.add_user("torjus")
        forge.add_repo("torjus/nixos")
        token = forge.add_token("torjus", ["write:user", "write:repository"])
        …  # forge.url, token

It stores nothing on disk but published git repositories, and forgets everything at its end.
"""

from __future__ import annotations

import shutil
import ssl
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

from nixops.inventory.model import Scope
from nixops.lab.forgejo_api import MAX_PAGE, Api, level
from nixops.lab.forgejo_http import Fault, ForgejoHttp, ForgejoSocketServer, LoggedRequest, publish
from nixops.lab.forgejo_routes import routes
from nixops.lab.forgejo_state import FINISHED, AccessToken, Account, Owner, Repository, RunnerRow, RunRow, State
from nixops.secret import Secret

T = TypeVar("T")
ALL_SCOPES = tuple(f"write:{c}" for c in ("admin", "organization", "repository", "user"))
_VERSIONS = {7: "7.0.16+gitea-1.21.11", 11: "11.0.15+gitea-1.22.0"}


@dataclass(frozen=True)
class RunnerView:
    """A registered runner, as a test may look at it."""

    id: int
    uuid: str
    name: str
    description: str
    status: str
    labels: tuple[str, ...] | None
    version: str
    scope: str


@dataclass(frozen=True)
class RunView:
    """A run: its status, its jobs' log lines one after the other, and the runners that took the jobs."""

    id: int
    number: int
    repository: str
    workflow: str
    status: str
    log: tuple[str, ...]
    runners: tuple[str, ...]

    @property
    def finished(self) -> bool:
        return self.status in FINISHED


class ForgejoServer:
    """The server. Starts on entering the context, stops on leaving it; ``stop`` and ``start`` in between keep all.

    :param version: the major version it is, 7 or later; only that version's paths exist.
    :param bind: the address to listen on.
    :param port: 0 for a free one, which is kept over a stop and a start.
    :param host: how clients name it in URLs, where that is not ``bind``.
    :param clock: seconds since the epoch; injectable, so that nothing need wait 60 s for ``offline``.
    :param tls: certificate chain and key (PEM files) to serve https with.
    :param run_by_id: for 12 to 14, whether a run can be asked for by id (what is known of them differs).
    :param page_limit: the server's own bound of a page.
    """

    def __init__(
        self,
        version: int = 15,
        *,
        bind: str = "127.0.0.1",
        port: int = 0,
        host: str | None = None,
        clock: Callable[[], float] = time.time,
        tls: tuple[Path, Path] | None = None,
        run_by_id: bool = False,
        page_limit: int = MAX_PAGE,
    ) -> None:
        if version < 7:
            raise ValueError("this server knows Forgejo 7 and later")
        self.version = version
        self.version_text = _VERSIONS.get(version, f"{version}.0.3+gitea-1.22.0")
        self._bind = bind
        self._port = port
        self._host = host or bind
        self._tls: ssl.SSLContext | None = None
        if tls is not None:
            self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._tls.load_cert_chain(tls[0], tls[1])
        self._state = State(clock)
        self._git = Path(tempfile.mkdtemp(prefix="nixops-forgejo-"))
        self.api = Api(self._state, version, self.version_text, routes(), run_by_id=run_by_id, page_limit=page_limit)
        self._http = ForgejoHttp(self._state, self.api, self._git)
        self._server: ForgejoSocketServer | None = None
        self._thread: threading.Thread | None = None

    # -- life -------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Listen. Registered runners, tokens and runs are those of before."""
        if self._server is not None:
            return
        server = ForgejoSocketServer((self._bind, self._port), self._http, self._tls)
        self._port = server.server_address[1]
        host = f"[{self._host}]" if ":" in self._host else self._host
        self._http.base = f"{'https' if self._tls else 'http'}://{host}:{self._port}"
        self._http.stopping.clear()
        self._server = server
        self._thread = threading.Thread(
            target=server.serve_forever, kwargs={"poll_interval": 0.05}, name="forgejo", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Stop listening and end all connections."""
        server, self._server = self._server, None
        if server is None:
            return
        self._http.stopping.set()
        server.shutdown()
        server.server_close()
        if self._thread is not None:
            self._thread.join(10)

    def close(self) -> None:
        """Stop for good."""
        self.stop()
        shutil.rmtree(self._git, ignore_errors=True)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def url(self) -> str:
        """Its address, as for ``forge.url``; known once it has been started."""
        return self._http.base

    @property
    def contract(self) -> int:
        """The contract this version is held to."""
        return level(self.version)

    # -- what there is ----------------------------------------------------------------------------------------

    def add_user(self, login: str, *, admin: bool = False) -> None:
        """Make an account."""
        self._add(Account(self._state.next_id("account"), login, is_admin=admin))

    def add_org(self, name: str, *, owners: Iterable[str] = (), members: Iterable[str] = ()) -> None:
        """Make an organization."""
        account = Account(self._state.next_id("account"), name, organization=True)
        account.owners.update(owners)
        account.members.update(members)
        self._add(account)

    def _add(self, account: Account) -> None:
        with self._state.changed:
            self._state.accounts[account.login.lower()] = account

    def add_repo(
        self,
        full_name: str,
        *,
        private: bool = False,
        administrators: Iterable[str] = (),
        has_actions: bool = True,
        source: Path | None = None,
    ) -> None:
        """Make ``owner/name``; with ``source``, a git repository here, ``git clone {url}/{full_name}`` works."""
        owner, name = full_name.split("/")
        account = self._account(owner)
        repo = Repository(self._state.next_id("repository"), account, name, private, has_actions)
        repo.administrators.update(administrators)
        if source is not None:
            publish(source, self._git / owner.lower() / f"{name.lower()}.git")
            repo.git = True
        with self._state.changed:
            self._state.repositories[full_name.lower()] = repo

    def add_token(self, owner: str, scopes: Iterable[str] = ALL_SCOPES) -> Secret:
        """Make an access token of ``owner`` with scopes such as ``write:repository``."""
        value = self._state.secret()
        with self._state.changed:
            self._state.tokens[value] = AccessToken(value, self._account(owner), frozenset(scopes))
        return Secret(value)

    def revoke_token(self, token: Secret) -> None:
        """The token is unknown from now on."""
        with self._state.changed:
            self._state.tokens.pop(token.reveal(), None)

    def put_workflow(self, repository: str, file: str, definition: Mapping[str, Any] | str) -> None:
        """Put ``.forgejo/workflows/{file}`` on the default branch; a mapping, or YAML text."""
        if isinstance(definition, str):
            import yaml

            # YAML 1.1 reads the key "on" as true.
            parsed = {("on" if k is True else k): v for k, v in yaml.safe_load(definition).items()}
        else:
            parsed = dict(definition)
        with self._state.changed:
            self._repo(repository).workflows[file] = parsed

    # -- runners ----------------------------------------------------------------------------------------------

    def registration_token_made(self, scope: Scope) -> bool:
        """Somebody has asked for this scope's registration token, which makes it."""
        return self._owner(scope) in self._state.registration_tokens

    def reset_registration_token(self, scope: Scope) -> Secret:
        """Make the scope's token anew; the one handed out before is stale."""
        return Secret(self._state.registration_token(self._owner(scope), reset=True))

    @property
    def runners(self) -> tuple[RunnerView, ...]:
        """All registered runners, by id."""
        with self._state.changed:
            return tuple(self._runner_view(r) for r in self._state.runners.values())

    def delete_runner(self, runner_id: int) -> None:
        """Delete a runner, as somebody would in the web interface."""
        with self._state.changed:
            self._state.runners.pop(runner_id, None)

    def add_runner(self, scope: Scope, name: str, description: str = "") -> RunnerView:
        """Make a runner, as somebody would in the web interface."""
        return self._runner_view(self._state.add_runner(self._owner(scope), name, description=description))

    def wait_runner(self, name: str, *, timeout: float = 30.0) -> RunnerView:
        """Wait until a runner of this name has declared its labels.

        :raises TimeoutError: it has not within ``timeout`` seconds.
        """
        return self._wait(
            lambda: next((r for r in self.runners if r.name == name and r.labels is not None), None),
            timeout,
            lambda: f"no runner {name} has declared itself; there are {self.runners}",
        )

    # -- runs -------------------------------------------------------------------------------------------------

    def dispatch(
        self,
        repository: str,
        steps: Sequence[Mapping[str, Any]],
        *,
        runs_on: str | Sequence[str] = "native",
        workflow: str = "test.yml",
        inputs: Mapping[str, str] | None = None,
        **job: Any,
    ) -> int:
        """Make a run of one job with these steps, and give its id; further keys of the job by name."""
        repo = self._repo(repository)
        wanted = runs_on if isinstance(runs_on, str) else list(runs_on)
        definition = {
            "on": {"workflow_dispatch": {}},
            "jobs": {"build": {"runs-on": wanted, "steps": list(steps), **job}},
        }
        run = self._state.add_run(repo, workflow, definition, user=repo.owner, inputs=dict(inputs or {}))
        return run.id

    def run(self, run_id: int) -> RunView:
        """A run as it stands."""
        with self._state.changed:
            return self._run_view(self._state.runs[run_id])

    @property
    def runs(self) -> tuple[RunView, ...]:
        """All runs, by id."""
        with self._state.changed:
            return tuple(self._run_view(r) for r in self._state.runs.values())

    def wait_run(self, run_id: int, *, timeout: float = 60.0) -> RunView:
        """Wait until a run has ended.

        :raises TimeoutError: it has not within ``timeout`` seconds.
        """
        return self._wait(
            lambda: view if (view := self.run(run_id)).finished else None,
            timeout,
            lambda: f"run {run_id} is still {self.run(run_id).status}; its log so far: {self.run(run_id).log}",
        )

    def cancel_run(self, run_id: int) -> None:
        """Cancel a run, as somebody would in the web interface."""
        with self._state.changed:
            for job in self._state.runs[run_id].jobs:
                self._state.finish(job, "cancelled")

    # -- faults and the record --------------------------------------------------------------------------------

    def fault(
        self,
        path: str,
        *,
        method: str | None = None,
        status: int | None = None,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
        delay: float = 0.0,
        drop: str | None = None,
        times: int = 1,
    ) -> None:
        """Let the next ``times`` requests whose path matches the regular expression ``path`` go wrong.

        See :class:`nixops.lab.forgejo_http.Fault` for the kinds.
        """
        with self._state.changed:
            self._http.faults.append(Fault(path, method, status, body, headers or {}, delay, drop, times))

    def clear_faults(self) -> None:
        """No more faults."""
        with self._state.changed:
            self._http.faults.clear()

    @property
    def requests(self) -> tuple[LoggedRequest, ...]:
        """Every request so far, without headers and bodies."""
        with self._state.changed:
            return tuple(self._http.log)

    def forget_requests(self) -> None:
        """Begin a new record of requests."""
        with self._state.changed:
            self._http.log.clear()

    @property
    def issued(self) -> tuple[str, ...]:
        """Every credential this server has ever given out, for leak tests."""
        with self._state.changed:
            return tuple(self._state.issued)

    # -- parts ------------------------------------------------------------------------------------------------

    def _account(self, login: str) -> Account:
        account = self._state.account(login)
        if account is None:
            raise KeyError(f"no account {login}: add it first")
        return account

    def _repo(self, full_name: str) -> Repository:
        repo = self._state.repository(full_name)
        if repo is None:
            raise KeyError(f"no repository {full_name}: add it first")
        return repo

    def _owner(self, scope: Scope) -> Owner:
        if scope.repository is not None:
            return Owner(repo_id=self._repo(scope.repository).id)
        name = scope.organization or scope.user
        return Owner(owner_id=self._account(name).id) if name is not None else Owner()

    def _runner_view(self, row: RunnerRow) -> RunnerView:
        labels = tuple(row.labels) if row.labels is not None else None
        if row.owner.repo_id:
            scope = next(r.full_name for r in self._state.repositories.values() if r.id == row.owner.repo_id)
        elif row.owner.owner_id:
            scope = next(a.login for a in self._state.accounts.values() if a.id == row.owner.owner_id)
        else:
            scope = "admin"
        status = row.status(self._state.clock())
        return RunnerView(row.id, row.uuid, row.name, row.description, status, labels, row.version, scope)

    def _run_view(self, row: RunRow) -> RunView:
        log = tuple(line for j in row.jobs for line in j.log)
        taken = [self._state.runners.get(j.runner_id) for j in row.jobs if j.runner_id]
        names = tuple(r.name for r in taken if r is not None)
        return RunView(row.id, row.number, row.repository.full_name, row.workflow, row.status, log, names)

    def _wait(self, look: Callable[[], T | None], timeout: float, story: Callable[[], str]) -> T:
        deadline = time.monotonic() + timeout
        with self._state.changed:
            while True:
                found = look()
                if found is not None:
                    return found
                left = deadline - time.monotonic()
                if left <= 0:
                    raise TimeoutError(story())
                self._state.changed.wait(min(left, 0.2))
