"""Connections to repositories that are no longer trusted: found by the entries that keep them, taken away at the end.

OpenBao is asked and not Forgejo, which can only list the runners of a repository one knows. Each entry that nixops
writes says what it is a registration for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Final

from nixops.deploy.credentials import PUBLIC_KEYS, SCOPE_KEY, UUID_KEY, is_ours
from nixops.deploy.host import HOST_PATH
from nixops.errors import ForgeError, VaultError
from nixops.forge.forgejo import Forgejo
from nixops.forge.http import ForgeRefused
from nixops.forge.shapes import RunnerInfo
from nixops.forge.version import ForgejoVersion
from nixops.inventory.model import KvOwner, ManagedRunner, RunnerModule, Scope
from nixops.secret import Secret
from nixops.transport.command import Command, Runner
from nixops.values import AbsolutePath, HostName, RepoName, RunnerName, VaultPath
from nixops.vault.openbao import OpenBao

_REMOVE: Final = f"""
PATH={HOST_PATH}; export PATH
rm -f -- "$@"
"""


@dataclass(frozen=True)
class Retired:
    """A registration that nothing uses any more, and the KV entry that keeps it.

    :ivar version: the entry's; it is destroyed with all before it.
    :ivar files: what the host made of the entry.
    :ivar registrations: ids of what is to be deleted in the forge; none where nothing is left of it, or where the
        version cannot delete (``stays`` then says so).
    """

    scope: Scope
    path: VaultPath
    version: int
    files: tuple[AbsolutePath, ...]
    registrations: tuple[int, ...]
    stays: str = ""


def find_retired(
    host: HostName,
    name: RunnerName,
    runner: ManagedRunner,
    in_use: Collection[str],
    *,
    bao: OpenBao,
    version: ForgejoVersion,
    listed: Callable[[Scope], tuple[RunnerInfo, ...]],
    on_note: Callable[[str], None],
) -> tuple[Retired, ...]:
    """What ``runner`` was registered for and no longer is. Changes nothing.

    Entries that OpenTofu owns are not looked at: their registrations were made by hand.

    :param in_use: the KV entries of every managed runner.
    :param listed: the runners of a scope, asked only where the version can tell.
    :param on_note: is told what could not be looked at; that stays as it is.
    """
    if runner.token.owner is KvOwner.TOFU:
        return ()
    directory, _, stem = runner.token.path.rpartition("/")
    try:
        keys = bao.keys(directory)
    except VaultError as error:
        # With the older module there is nothing to expect, so nothing to say.
        if runner.module is RunnerModule.FORGEJO:
            on_note(f"whether {name} is registered for repositories that are no longer trusted is not known: {error}")
        return ()
    found: list[Retired] = []
    for key in keys:
        path = f"{directory}/{key}" if directory else key
        if not key.startswith(f"{stem}-") or path in in_use or not VaultPath.pattern.fullmatch(path):
            continue
        entry = bao.read(VaultPath(path), public=PUBLIC_KEYS)
        scope = _scope(entry.data, runner, path) if entry else None
        if entry is None or scope is None:
            continue
        uuid = entry.data[UUID_KEY].reveal()
        files = _files(runner, path)
        if not version.lists_runners:
            stays = f"its registration {uuid} stays: {version} cannot delete one through its API"
            found.append(Retired(scope, entry.path, entry.version, files, (), stays))
            continue
        try:
            known = listed(scope)
        except ForgeRefused as error:
            if error.status != 404:
                on_note(f"the registration of {name} for {scope}, which is no longer trusted, stays: {error}")
                continue
            known = ()  # the repository is gone, and with it its runners
        except ForgeError as error:
            on_note(f"the registration of {name} for {scope}, which is no longer trusted, stays: {error}")
            continue
        ours = tuple(r.id for r in known if r.uuid == uuid or is_ours(r, host, name))
        found.append(Retired(scope, entry.path, entry.version, files, ours))
    return tuple(found)


def _scope(data: Mapping[str, Secret], runner: ManagedRunner, path: str) -> Scope | None:
    """What the entry at ``path`` says that it is a registration for; ``None`` when it is no connection of ours."""
    said, uuid = data.get(SCOPE_KEY), data.get(UUID_KEY)
    match = re.fullmatch(r"repository (\S+)", said.reveal()) if said and uuid else None
    if match is None:
        return None
    try:
        repo = RepoName(match[1])
    except ValueError:
        return None
    # Another runner's path may begin as ours does.
    mine = path.startswith(f"{runner.token.path}-{repo.owner}-{repo.repo}")
    return Scope(repository=repo) if mine else None


def _files(runner: ManagedRunner, path: str) -> tuple[AbsolutePath, ...]:
    """The token's file on the host, which goes by the end of the entry's path, and the bare value beside it."""
    file = f"{runner.token_path}{path.removeprefix(runner.token.path)}"
    return (AbsolutePath(file), AbsolutePath(f"{file}.value"))


def retire(retired: Retired, forge: Forgejo, bao: OpenBao, host: Runner) -> str:
    """Delete the registration, the host's files and then the entry: killed in between, the next run finds it again.

    :param host: a connection to the runner's host.
    :return: what was done, in words.
    :raises NixopsError: it was refused; what is left is found again by the next run.
    """
    for number in retired.registrations:
        forge.delete_runner(retired.scope, number)
    host.run(Command.script(_REMOVE, *retired.files, root=True, title="removing old tokens")).check()
    bao.forget(retired.path, version=retired.version)
    done = f"the registration for {retired.scope} was deleted, with the entry {retired.path}"
    return f"the entry {retired.path} was deleted; {retired.stays}" if retired.stays else done
