"""What credentials a runner needs, which are there, and how the missing ones are made and kept.

Deciding asks and changes nothing: before Forgejo 15 even asking for a registration token would create one
(FIELD-NOTES), so a plan looks only at what OpenBao holds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final

from nixops.deploy.journal import Journal
from nixops.errors import UsageError, VaultError
from nixops.forge.forgejo import Forgejo
from nixops.forge.shapes import RunnerInfo
from nixops.forge.version import ForgejoVersion
from nixops.inventory.derived import connections
from nixops.inventory.model import KvOwner, ManagedRunner, RunnerModule, Scope
from nixops.secret import Secret
from nixops.values import HostName, RepoName, RunnerName, VaultPath
from nixops.vault.openbao import KvEntry, OpenBao

# Stands for a uuid that is only known once the runner is created; a plan shows it.
UNKNOWN_UUID: Final = "00000000-0000-0000-0000-000000000000"
UUID_KEY: Final = "uuid"
_TOKEN: Final = re.compile(r"[A-Za-z0-9._-]{8,512}")
# What an entry is a registration for: a registration keeps its scope for life.
SCOPE_KEY: Final = "scope"
PUBLIC_KEYS: Final = frozenset({UUID_KEY, SCOPE_KEY})


@dataclass(frozen=True)
class Credential:
    """One registration and the KV entry that keeps it.

    :ivar repo: the repository of a connection; ``None`` for the one registration of the older module.
    :ivar version: the entry's current version, 0 when there is none: what check-and-set compares with.
    :ivar uuid: the runner's uuid for a connection, :data:`UNKNOWN_UUID` until it is made.
    :ivar mint: it is to be made; ``why`` says for what reason.
    """

    repo: RepoName | None
    scope: Scope
    path: VaultPath
    key: str
    version: int
    uuid: str | None
    mint: bool
    why: str

    @property
    def planned_version(self) -> int:
        """The entry's version once the deploy is done."""
        return self.version + 1 if self.mint else self.version


def wanted(runner: ManagedRunner) -> tuple[tuple[RepoName | None, Scope, VaultPath], ...]:
    """The registrations that a runner's module holds: one in all, or one per trusted repository."""
    if runner.module is RunnerModule.GITEA:
        if runner.scope is None:  # the model refuses this; said again for the type checker and for library use
            raise UsageError("module gitea-actions-runner needs a scope")
        return ((None, runner.scope, runner.token.path),)
    return tuple((c.repo, Scope(repository=c.repo), VaultPath(c.kv_path)) for c in connections(runner))


def decide(
    runner: ManagedRunner,
    bao: OpenBao,
    version: ForgejoVersion,
    listed: Callable[[Scope], tuple[RunnerInfo, ...]],
) -> tuple[Credential, ...]:
    """Which credentials are kept and which are to be made. Changes nothing.

    :param listed: the runners of a scope, asked only where the version can tell.
    :raises UsageError: OpenTofu owns the entry, and it is not there yet; or it holds a registration for another
        scope; or its keys would meet.
    """
    if runner.token.key in PUBLIC_KEYS:
        raise UsageError(f"token.key: {runner.token.key} is a key that nixops writes beside the token")
    found: list[Credential] = []
    for repo, scope, path in wanted(runner):
        entry = bao.read(path, public=PUBLIC_KEYS)
        current = entry.version if entry else bao.version(path)
        _same_scope(entry, scope)
        why = _missing(runner, entry, repo, scope, version, listed)
        if why and runner.token.owner is KvOwner.TOFU:
            raise UsageError(
                f"OpenTofu owns the KV entry {path}, and {why}",
                hint="create the token in Forgejo, set the variable of the rendered .tf file and run `tofu apply`, "
                "or set token.owner: api",
            )
        data = entry.data if entry else {}
        uuid = None if repo is None else (data[UUID_KEY].reveal() if not why else UNKNOWN_UUID)
        found.append(Credential(repo, scope, path, runner.token.key, current, uuid, bool(why), why))
    return tuple(found)


def kept(runner: ManagedRunner, bao: OpenBao) -> tuple[Credential, ...]:
    """The credentials as OpenBao has them, without asking Forgejo. Changes nothing.

    Where an entry is not there yet, its first version is what is expected; a uuid cannot be.
    """
    found: list[Credential] = []
    for repo, scope, path in wanted(runner):
        entry = bao.read(path, public=PUBLIC_KEYS)
        uuid = entry.data[UUID_KEY].reveal() if entry and UUID_KEY in entry.data else UNKNOWN_UUID
        version = entry.version if entry else bao.version(path)
        why = "" if entry else "there is no such entry"
        found.append(
            Credential(repo, scope, path, runner.token.key, version, uuid if repo else None, entry is None, why)
        )
    return tuple(found)


def _same_scope(entry: KvEntry | None, scope: Scope) -> None:
    """:raises UsageError: the entry holds a registration for another scope, which the runner would go on serving."""
    said = entry.data.get(SCOPE_KEY) if entry else None
    if entry is not None and said and said.reveal().lower() != str(scope).lower():
        raise UsageError(
            f"{entry.path} holds a registration for {said.reveal()}, and the inventory says {scope}",
            hint="a registration keeps its scope for life: describe a runner of another name, with a token.path of "
            "its own, for the new scope",
        )


def _missing(
    runner: ManagedRunner,
    entry: KvEntry | None,
    repo: RepoName | None,
    scope: Scope,
    version: ForgejoVersion,
    listed: Callable[[Scope], tuple[RunnerInfo, ...]],
) -> str:
    """Why the credential has to be made; empty when it is there and its registration too."""
    if entry is None:
        return "there is no such entry"
    token = entry.data.get(runner.token.key)
    if not token:
        return f"it has no key {runner.token.key}"
    if not _TOKEN.fullmatch(token.reveal()):
        # Told now: on the host it would only show once the runner has failed.
        raise VaultError(
            f"what the KV entry {entry.path} holds under {runner.token.key} is no token (letters, digits, . _ -)",
            hint="write it again, or delete the entry to have a new one made",
        )
    if repo is None:
        return ""
    uuid = entry.data.get(UUID_KEY)
    if not uuid:
        return f"it has no key {UUID_KEY}"
    if version.lists_runners and uuid.reveal() not in {info.uuid for info in listed(scope)}:
        return f"its registration {uuid.reveal()} is gone from {scope}"
    return ""


def description(host: HostName, name: RunnerName) -> str:
    """What the forge shows beside a runner that we made; also how a left-over of ours is told from others."""
    return f"nixops: {host}/{name}"


def is_ours(info: RunnerInfo, host: HostName, name: RunnerName) -> bool:
    """The registration was made by nixops for this runner: its description is :func:`description`, and a mark."""
    mark = description(host, name)
    return info.description == mark or info.description.startswith(f"{mark} ")


def mint(
    credential: Credential,
    *,
    host: HostName,
    name: RunnerName,
    runner: ManagedRunner,
    forge: Forgejo,
    version: ForgejoVersion,
    bao: OpenBao,
    journal: Journal,
) -> Credential:
    """Make one credential and keep it in OpenBao, each step written to the journal before it is done.

    :return: the credential as it now stands.
    :raises ForgeError: Forgejo did not give it. :raises CheckAndSetLost: somebody else wrote the entry.
    """
    values: Mapping[str, Secret]
    uuid: str | None = None
    if credential.repo is None:
        # One reusable token per scope, made by the first who asks; there is nothing to delete again.
        values = {credential.key: forge.registration_token(credential.scope)}
    else:
        scope = credential.scope.model_dump(mode="json", exclude_none=True)
        mark = description(host, name)
        if version.lists_runners:
            # An earlier run of ours that lost its token left it behind: its token is shown once, so it is of no use.
            kept = bao.read(credential.path, public=PUBLIC_KEYS)
            known = kept.data[UUID_KEY].reveal() if kept and UUID_KEY in kept.data else None
            for stale in forge.list_runners(credential.scope):
                if stale.name == runner.name and is_ours(stale, host, name) and stale.uuid != known:
                    forge.delete_runner(credential.scope, stale.id)
        journal.effect("registering", scope=scope, name=runner.name, description=mark)
        made = forge.create_runner(credential.scope, name=runner.name, description=mark)
        journal.effect("registered", scope=scope, id=made.id, uuid=made.uuid)
        uuid = made.uuid
        values = {credential.key: made.token, UUID_KEY: Secret(made.uuid)}
    values = {**values, SCOPE_KEY: Secret(str(credential.scope))}
    before = bao.read(credential.path, public=PUBLIC_KEYS)
    if before is not None and before.version != credential.version:
        raise VaultError(
            f"the KV entry {credential.path} went from version {credential.version} to {before.version} "
            "since the plan was made",
            hint="run it again to see what the plan is now",
        )
    journal.effect("kv", path=credential.path, from_version=credential.version)
    written = bao.update(credential.path, values, cas=credential.version, public=PUBLIC_KEYS)
    journal.effect("kv-written", path=credential.path, from_version=credential.version, to_version=written)
    return replace(credential, version=written, mint=False, uuid=uuid, why="")


def wider_than_trusted(runner: ManagedRunner, forge: Forgejo) -> tuple[RepoName, ...]:
    """The repositories that the registration's scope admits beyond the trusted ones, by name.

    :raises UsageError: a trusted repository is not admitted at all, so its jobs would never reach the runner.
    """
    if runner.scope is None:
        return ()
    admitted = forge.admitted(runner.scope)
    # Forgejo compares owners and repositories without regard to case.
    trusted = {repo.lower() for repo in runner.trusted}
    absent = trusted - {repo.lower() for repo in admitted}
    if absent:
        raise UsageError(
            f"the scope {runner.scope} does not admit the trusted {', '.join(sorted(absent))}",
            hint="choose a scope that holds them, or module: forgejo-runner with one connection each",
        )
    return tuple(sorted(repo for repo in admitted if repo.lower() not in trusted))
