"""What follows from an inventory without being written in it: connections, KV entries, unit names, file paths."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

from nixops.errors import UsageError
from nixops.inventory.model import Config, Inventory, ManagedRunner, RunnerModule, unit_name, unit_user
from nixops.values import HostName, RelPath, RepoName, RunnerName


@dataclass(frozen=True)
class Connection:
    """One registration of a ``forgejo-runner`` with one repository.

    :ivar name: its name in the module's settings: letters, digits, ``_`` and ``-``.
    :ivar kv_path: the KV entry of its token, below the mount.
    :ivar file: the file on the host that holds the token.
    """

    name: str
    repo: RepoName
    kv_path: str
    file: str


@dataclass(frozen=True)
class HostSecret:
    """A KV entry that a host fetches, and the file it becomes there.

    :ivar name: the file's name, and the name of the ``vault.secrets`` entry.
    :ivar key: the key of the entry whose value is the secret.
    """

    name: str
    kv_path: str
    key: str
    file: str


@dataclass(frozen=True)
class RunnerState:
    """Where an instance keeps its state and who owns it.

    :ivar user: the unit's dynamic user.
    :ivar directory: systemd's ``StateDirectory``.
    :ivar seen: the instance's directory as the unit sees it.
    :ivar private: the same directory as the host sees it.
    """

    user: str
    directory: str
    seen: str
    private: str


def connections(runner: ManagedRunner) -> tuple[Connection, ...]:
    """The connections of a runner, one for each trusted repository; none for the older module.

    The KV path is ``<token.path>-<owner>-<repo>``. Where two repositories would come to the same name (``a-b/c`` and
    ``a/b-c``), both end in a digest of their own.
    """
    if runner.module is not RunnerModule.FORGEJO:
        return ()
    plain = {repo: re.sub(r"[^A-Za-z0-9_-]", "-", repo.replace("/", "-")) for repo in runner.trusted}
    # Compared without case, as Forgejo does.
    taken = Counter(name.lower() for name in plain.values())
    found = []
    for repo, name in plain.items():
        unique = f"-{hashlib.sha256(repo.encode()).hexdigest()[:8]}" if taken[name.lower()] > 1 else ""
        suffix = f"{repo.owner}-{repo.repo}{unique}"
        if runner.token_file is None:
            file = f"/run/secrets/{runner.secret_name}-{suffix}"
        else:
            file = f"{runner.token_file}-{suffix}" if len(runner.trusted) > 1 else str(runner.token_file)
        found.append(Connection(name + unique, repo, f"{runner.token.path}-{suffix}", file))
    return tuple(found)


def host_secrets(runner: ManagedRunner) -> tuple[HostSecret, ...]:
    """Every KV entry that the runner's host fetches: one, or one per connection."""
    if runner.module is RunnerModule.GITEA:
        return (HostSecret(runner.secret_name, runner.token.path, runner.token.key, runner.token_path),)
    return tuple(
        HostSecret(c.kv_path.rsplit("/", 1)[-1], c.kv_path, runner.token.key, c.file) for c in connections(runner)
    )


def kv_paths(inventory: Inventory) -> frozenset[str]:
    """The KV entries of all managed runners of all hosts."""
    return frozenset(
        secret.kv_path
        for host in inventory.hosts.values()
        for runner in host.runners.values()
        if isinstance(runner, ManagedRunner)
        for secret in host_secrets(runner)
    )


def runner_unit(name: RunnerName, runner: ManagedRunner) -> str:
    """The runner's unit as NixOS's ``systemd.services`` names it: without ``.service``."""
    return unit_name(name, runner.module).removesuffix(".service")


def secret_unit(name: RunnerName) -> str:
    """The unit that puts the runner's secrets in place, without ``.service``. Every runner name is a unit name too."""
    return f"nixops-secret-{name}"


def runner_state(name: RunnerName, runner: ManagedRunner) -> RunnerState:
    """Where an instance's state is. With ``isolate`` the older module's instances stop sharing one directory."""
    user = unit_user(name, runner.module, isolate=runner.isolate)
    shared = runner.module.user
    directory = user if user != shared else shared
    return RunnerState(user, directory, f"/var/lib/{shared}/{name}", f"/var/lib/private/{directory}/{name}")


PathField = Literal["runner_module", "tofu_file", "workflow_file"]


def filled_path(config: Config, field: PathField, host: HostName, runner: RunnerName, repo: str = "") -> PurePosixPath:
    """A path of the inventory's ``config`` with its placeholders filled in.

    :param repo: ``owner/name``, or ``*/*`` for a pattern that finds the files of all repositories.
    :raises UsageError: it has another placeholder, or what came out would leave the checkout.
    """
    text = str(getattr(config, field))
    for name, value in {"host": host, "runner": runner, "repo": repo}.items():
        text = text.replace(f"{{{name}}}", value)
    if "{" in text or "}" in text:
        raise UsageError(f"config.{field}: {text} has an unknown placeholder", hint="use {host}, {runner} and {repo}")
    try:
        RelPath(text.replace("*", "_"))
    except ValueError as error:
        raise UsageError(f"config.{field}: {error}") from error
    if ".git" in (part.lower() for part in PurePosixPath(text).parts):
        raise UsageError(f"config.{field}: {text} lies in git's own directory")
    return PurePosixPath(text)
