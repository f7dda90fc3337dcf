"""Secrets on the host: the files are closed, and the runner's own user really cannot open them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from nixops.errors import Undecided
from nixops.inventory import model
from nixops.inventory.derived import host_secrets
from nixops.verify.listing import Entry, list_files
from nixops.verify.model import Check, Subject, Trying, Verdict, failed, passed
from nixops.verify.probe import Target, told, try_to_open

SECRETS_DIRECTORY: Final = "/run/secrets"
# Where the seed's cache keeps the key that harmonia signs with.
CACHE_KEY: Final = "/run/secrets/cache-secret"

# Both formats are judged on the host, by exit code: no byte of the file leaves it.
_ENV_FORMAT: Final = (
    r"""test "$(grep -c '' %s)" = 1 && grep -Eqs -- '^TOKEN=[^[:space:]<>"'\'']{6,}$' %s""",
    "one line TOKEN=<registration token>, as an EnvironmentFile",
)
_RAW_FORMAT: Final = (
    r"""test "$(wc -l < %s)" = 0 && grep -Eqs -- '^[^[:space:]<>=]{6,}$' %s""",
    "the raw token alone, without a newline",
)


def token_files(runner: model.ManagedRunner) -> tuple[str, ...]:
    """The files on the host that the runner's module reads its credentials from."""
    return tuple(secret.file for secret in host_secrets(runner))


def token_files_closed(subject: Subject) -> Verdict:
    """Each token file is a regular file of root's, 0400, in the format that the runner's module reads."""
    line, wanted = _ENV_FORMAT if subject.runner.module is model.RunnerModule.GITEA else _RAW_FORMAT
    files = token_files(subject.runner)
    for path in files:
        file = subject.remote.file(path)
        todo = f"run the host's secret unit again, or rotate the token (`invoke rotate-token`), and look at {path}"
        if not file.is_file:
            return failed(expected=f"the secret file {path}", found="no regular file there", todo=todo)
        seen = f"{file.mode:04o} {file.user}:{file.group}"
        if seen != "0400 root:root":
            return failed(expected=f"{path} with 0400 root:root", found=seen, todo=todo)
        if subject.remote.run(line, path, path).rc != 0:
            return failed(expected=f"{path} to hold {wanted}", found="another format", todo=todo)
    return passed(f"{', '.join(files)}: 0400 root:root, {wanted}")


def _targets(entries: Iterable[Entry]) -> list[Target]:
    """Of ``entries`` (as listed by root) what can be opened."""
    return [Target(e.path, e.identity) for e in entries if e.kind in "fd"]


def approle_closed(subject: Subject) -> Trying:
    """The AppRole directory is root's alone, its files 0400, and the runner's user gets nothing out of it."""
    directory = subject.host.approle_dir
    top = subject.remote.file(directory)
    todo = f"`chown -R root:root {directory}`, `chmod 0700` the directory and `chmod 0400` its files"
    if not top.is_directory:
        return failed(
            expected=f"the AppRole directory {directory}", found="no directory there", todo="deliver the AppRole"
        )
    entries = list_files(subject.transport, (directory,))
    files = [e for e in entries if e.kind == "f"]
    if not files:
        return failed(
            expected=f"role and secret id in {directory}", found="no file in it", todo="deliver the AppRole again"
        )
    loose = [e for e in entries if e.uid != 0 or e.mode & 0o077 or (e.kind == "f" and e.mode & 0o377)]
    if loose:
        return failed(
            expected=f"{directory} with 0700 or less and its files with 0400, all of them root's",
            found=", ".join(f"{e.path} {e.mode:04o} of uid {e.uid}" for e in loose[:5]),
            todo=todo,
        )
    opened = yield from try_to_open(_targets(entries))
    if opened:
        return failed(
            expected="nothing of it open to the runner's user",
            found=told(opened),
            todo="remove capabilities and root-equivalent groups from the runner's unit",
        )
    return passed(f"{directory}: {len(files)} files, root's alone, and closed to the runner's user")


_CACHE_KEYS: Final = r"""
systemctl cat harmonia.service harmonia-cache.service nix-serve.service 2> /dev/null |
    sed -n 's/^LoadCredential=[^:]*://p'
true
"""


def cache_key_unreadable(subject: Subject) -> Trying:
    """The cache's signing key cannot be opened by the runner's user.

    Looked at: the seed's ``/run/secrets/cache-secret``, the inventory's ``protected_files``, and the keys that
    Nix's ``secret-key-files`` and the units of harmonia and nix-serve name on the host.
    """
    found = [*subject.nix_settings.words("secret-key-files"), *subject.remote.run(_CACHE_KEYS).stdout.split()]
    configured = [str(p) for p in subject.host.protected_files]
    paths = list(dict.fromkeys([CACHE_KEY, *configured, *(p for p in found if p.startswith("/"))]))
    entries = list_files(subject.transport, paths)
    present = {e.path for e in entries}
    absent = [p for p in configured if p not in present]
    if absent:
        return failed(
            expected="every protected_files of the inventory on the host",
            found=f"no {', '.join(absent)}",
            todo="correct protected_files, or start the unit that makes the file",
        )
    if not present:
        return passed(f"no signing key on this host ({CACHE_KEY} is absent, and nothing names another)")
    opened = yield from try_to_open(_targets(entries))
    if opened:
        return failed(
            expected="signing keys closed to the runner's user",
            found=told(opened),
            todo="chmod 0400 and chown root:root the key, and make a new one: this one may be known",
        )
    return passed(f"{', '.join(p for p in paths if p in present)}: closed to the runner's user")


def secrets_unreadable(subject: Subject) -> Trying:
    """Every file below /run/secrets, and every runner's token file wherever it is, is closed to the runner's user."""
    others = [r.token_file for n, r in subject.host.runners.items() if n != subject.runner_name and r.token_file]
    named = [*token_files(subject.runner), *others, *(f for u in subject.others.values() for f in u.credential_files)]
    entries = list_files(subject.transport, list(dict.fromkeys([SECRETS_DIRECTORY, *named])))
    files = [e for e in entries if e.kind == "f"]
    if not files:
        raise Undecided(
            f"there is no secret on {subject.host_name} to try", hint=f"the runner's own should be in {named[0]}"
        )
    opened = yield from try_to_open(_targets(files))
    if opened:
        return failed(
            expected="no secret open to the runner's user",
            found=told(opened),
            todo="make each 0400 of the user that needs it, and rotate it: a job may have read it",
        )
    return passed(f"{len(files)} secret files, all closed to the runner's user")


CHECKS = (
    Check("secret-files", token_files_closed),
    Check("approle-closed", approle_closed),
    Check("cache-key-unreadable", cache_key_unreadable),
    Check("secrets-unreadable", secrets_unreadable),
)
