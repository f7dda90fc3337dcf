"""Taking back what a deploy changed before it failed, from its journal.

The same code serves a deploy that fails while we look and one that was killed: both have only the journal's
effects. Each kind of effect is undone by one function; what cannot be undone is said, never passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from nixops.deploy.host import HOST_PATH
from nixops.errors import CheckAndSetLost, NixopsError
from nixops.forge.forgejo import Forgejo
from nixops.inventory.model import Scope
from nixops.render.managed import FilesUndo, undo_files
from nixops.transport.command import Command, Runner
from nixops.values import AbsolutePath, HostName, VaultPath
from nixops.vault.approle import HostRoles, RoleUndo
from nixops.vault.deliver import Delivered, withdraw_approle
from nixops.vault.openbao import OpenBao

Json = Mapping[str, Any]

_FORGET_FILES: Final = f"""
PATH={HOST_PATH}; export PATH
for f in "$@"; do rm -f -- "$f" || exit 1; done
"""


@dataclass(frozen=True)
class Clients:
    """What an undo may need; each is made when it is used, since an undo may need none of them."""

    forge: Callable[[], Forgejo]
    bao: Callable[[], OpenBao]
    roles: Callable[[], HostRoles]
    host: Callable[[], Runner]
    local: Runner


@dataclass(frozen=True)
class Undone:
    """One effect that was taken back (``problem`` empty) or could not be."""

    what: str
    problem: str = ""


def undo(
    effects: Iterable[Json], clients: Clients, settled: Callable[[int], None] = lambda _number: None
) -> tuple[Undone, ...]:
    """Take back effects, the newest first. A failure of one does not keep the others from being undone.

    :param settled: is told the number of each effect that needs no further try, as soon as it is so. A second try
        must leave those out: by then they may be what a later deploy made.
    """
    listed = list(effects)
    done: list[Undone] = []
    open_: set[int] = set()
    unsettled = ""
    for index in range(len(listed) - 1, -1, -1):
        effect = listed[index]
        # An announcement whose result follows is undone by its result.
        result = _result(effect, listed, index)
        problem = ""
        try:
            what = "" if result is not None else _HANDLERS[effect["kind"]](effect, clients)
            if what:
                done.append(Undone(what))
        except CheckAndSetLost as error:
            done.append(Undone(f"left in place: {error}"))
        except NixopsError as error:
            problem = str(error)
        except (KeyError, TypeError, ValueError) as error:
            problem = f"its journal entry is not usable: {error!r}"
        if problem:
            done.append(Undone(_name(effect), problem))
        if problem or result in open_:
            open_.add(index)
            continue
        try:
            settled(int(effect.get("number", index)))
        except NixopsError as error:  # the journal's disk may be why the deploy failed; the others are undone too
            unsettled = str(error)
    if unsettled:
        done.append(Undone("noting what was taken back", unsettled))
    return tuple(done)


def _result(effect: Json, listed: list[Json], index: int) -> int | None:
    """Where the result of an announcement is, if it has one."""
    result = {"registering": "registered", "kv": "kv-written"}.get(effect.get("kind", ""))
    same = "scope" if result == "registered" else "path"
    for later in range(index + 1, len(listed)):
        if result and listed[later].get("kind") == result and listed[later].get(same) == effect.get(same):
            return later
    return None


def _name(effect: Json) -> str:
    return {
        "registering": "a registration in Forgejo",
        "registered": "a registration in Forgejo",
        "self-registered": "the runner's own registration in Forgejo",
        "kv": "a KV entry in OpenBao",
        "kv-written": "a KV entry in OpenBao",
        "secret-id": "a secret-id in OpenBao",
        "approle-files": "the AppRole files on the host",
        "role": "the host's AppRole in OpenBao",
        "files": "rendered files",
    }.get(str(effect.get("kind")), f"an effect of kind {effect.get('kind')}")


def _registered(effect: Json, clients: Clients) -> str:
    scope = Scope.model_validate(effect["scope"])
    forge = clients.forge()
    if not forge.version().lists_runners or effect.get("id") is None:
        return f"left in place: a registration in {scope} (this Forgejo cannot delete one through its API)"
    forge.delete_runner(scope, int(effect["id"]))
    return f"deleted the registration {effect['uuid']} in {scope}"


def _registering(effect: Json, clients: Clients) -> str:
    """Killed between asking and writing down the answer: find ours by name and description."""
    scope = Scope.model_validate(effect["scope"])
    forge = clients.forge()
    if not forge.version().lists_runners:
        return f"perhaps left in place: a registration in {scope} (this Forgejo cannot list them)"
    found = [
        r
        for r in forge.list_runners(scope)
        if r.name == effect["name"] and f"{r.description} ".startswith(f"{effect['description']} ")
    ]
    # Only one that never made contact can be the one whose answer was lost.
    lost = [r for r in found if r.status == "offline" and not r.labels]
    for runner in lost:
        forge.delete_runner(scope, runner.id)
    return f"deleted {len(lost)} registration(s) in {scope} whose answer was lost" if lost else ""


def _self_registered(effect: Json, clients: Clients) -> str:
    """The older module registers by itself when its unit first starts: delete what appeared since."""
    scope = Scope.model_validate(effect["scope"])
    before = set(effect["known"])
    forge = clients.forge()
    deleted = 0
    for runner in forge.list_runners(scope):
        if runner.name == effect["name"] and runner.id not in before:
            forge.delete_runner(scope, runner.id)
            deleted += 1
    if not deleted:
        return ""
    # Its registration is gone, so the state that refers to it would keep the next start from registering.
    files = [str(AbsolutePath(path)) for path in effect["state"]]
    clients.host().run(Command.of("sh", "-c", _FORGET_FILES, "sh", *files, root=True)).check()
    return f"deleted the runner's own registration in {scope}"


def _kv_written(effect: Json, clients: Clients) -> str:
    path = VaultPath(effect["path"])
    clients.bao().restore(path, to_version=int(effect["from_version"]), from_version=int(effect["to_version"]))
    return f"put the KV entry {path} back to what version {effect['from_version']} held"


def _kv(effect: Json, clients: Clients) -> str:
    """Killed between writing and noting the version: whoever wrote it cannot be told, so it is left and said."""
    path = VaultPath(effect["path"])
    version = clients.bao().version(path)
    if version == int(effect["from_version"]):
        return ""
    return f"left in place: the KV entry {path} is at version {version} and may be ours; the next deploy checks it"


def _secret_id(effect: Json, clients: Clients) -> str:
    host = HostName(effect["host"])
    clients.roles().destroy_secret_id(host, str(effect["accessor"]))
    return f"destroyed the new secret-id of {host}"


def _approle_files(effect: Json, clients: Clients) -> str:
    delivered = Delivered(AbsolutePath(effect["directory"]), str(effect["accessor"]), None)
    if not withdraw_approle(clients.host(), delivered):
        return ""
    return f"removed the AppRole files from {effect['directory']} on the host"


def _role(effect: Json, clients: Clients) -> str:
    host = HostName(effect["host"])
    before = RoleUndo(**effect["undo"])
    if not (before.policy_written or before.role_written):
        return ""
    clients.roles().undo(host, before)
    return f"put the AppRole and the policy of {host} back"


def _files(effect: Json, clients: Clients) -> str:
    undo_files(Path(effect["root"]), FilesUndo.from_json(effect["undo"]), clients.local)
    return f"put {len(effect['undo']['files'])} rendered file(s) back"


_HANDLERS: Final[Mapping[str, Callable[[Json, Clients], str]]] = {
    "registering": _registering,
    "registered": _registered,
    "self-registered": _self_registered,
    "kv": _kv,
    "kv-written": _kv_written,
    "secret-id": _secret_id,
    "approle-files": _approle_files,
    "role": _role,
    "files": _files,
}
