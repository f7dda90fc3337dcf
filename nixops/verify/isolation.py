"""The runner is kept apart from the host's other instances, and from groups that mean root."""

from __future__ import annotations

from typing import Final

from nixops.verify.listing import Entry, list_files
from nixops.verify.model import Check, Subject, Trying, Verdict, failed, passed
from nixops.verify.probe import Target, told, try_to_open
from nixops.verify.unit import UnitFacts

# Members can become root by what these groups' sockets, devices or rules give them.
ROOT_GROUPS: Final = frozenset(
    {"docker", "podman", "incus", "incus-admin", "lxd", "libvirtd", "wheel", "sudo", "disk", "kmem", "shadow", "root"}
)
# Enough to find an instance's registration and caches; a runner's work tree below may be huge.
_DEPTH: Final = 2
# Work trees and caches can have thousands of entries; what lies deeper is behind a directory that is tried.
_MOST: Final = 200
# A state directory's parents are links and private directories: systemd.exec(5), "StateDirectory=".
_PARENTS: Final = ("/var/lib/private", "/var/lib")


def _places(facts: UnitFacts) -> list[str]:
    return [f"{parent}/{name}" for name in facts.state_directories for parent in _PARENTS]


def _state_of(subject: Subject, name: str, other: UnitFacts) -> list[str]:
    """Where the other instance's state is on the host. In a directory that both use, only its own part of it."""
    ours = set(_places(subject.facts))
    theirs = [p for p in _places(other) if p not in ours]
    shared = [f"{p}/{name}" for p in _places(other) if p in ours]
    return theirs + shared


def _belongs_to_us(entry: Entry, subject: Subject) -> bool:
    return any(entry.path == place or entry.path.startswith(place + "/") for place in _places(subject.facts))


def _targets(subject: Subject, name: str, other: UnitFacts) -> list[Target]:
    state = _state_of(subject, name, other)
    credentials = f"/run/credentials/{other.name}"
    entries = list_files(subject.transport, [*state, *other.credential_files, credentials], depth=_DEPTH)
    own_part = {f"{p}/{name}" for p in _places(subject.facts)}
    targets = [Target(f"/proc/{other.process.pid}/environ")] if other.process is not None else []
    theirs = [
        e
        for e in sorted(entries, key=lambda e: e.path.count("/"))
        if e.kind in "fd"
        and (not _belongs_to_us(e, subject) or any(e.path == p or e.path.startswith(p + "/") for p in own_part))
    ]
    return targets + [Target(e.path, e.identity) for e in theirs[:_MOST]]


def instances_separate(subject: Subject) -> Trying:
    """No state, credential or environment of another instance is open to the runner's user, nor of any other
    service below /var/lib/private.

    The older module gives all instances one user and one state directory; the rendered overrides separate them
    (``isolate: true``).
    """
    todo = "set `isolate: true` and deploy, or accept it under accepted_risks.shared-state with a reason"
    here = {n: u for n, u in subject.others.items() if u.exists}
    user = subject.facts.get("User")
    sharing = sorted(n for n, u in here.items() if u.get("User") == user)
    targets = [t for name, other in here.items() for t in _targets(subject, name, other)]
    private = list_files(subject.transport, ["/var/lib/private"], depth=1)
    ours = set(_places(subject.facts))
    targets += [
        Target(e.path, e.identity)
        for e in private
        if e.path != "/var/lib/private" and e.path not in ours and e.path not in {t.path for t in targets}
    ]
    opened = yield from try_to_open(targets)
    if opened:
        return failed(
            expected="nothing of other instances and services open to the runner's user",
            found=told(opened),
            todo=todo,
        )
    if sharing:
        return failed(
            expected="a user of its own", found=f"the user {user} shared with {', '.join(sharing)}", todo=todo
        )
    absent = sorted(n for n in subject.others if n not in here)
    seen = f"{len(targets)} places tried" + (f" of {', '.join(sorted(here))}" if here else "")
    return passed(seen + ", all closed" + (f"; {', '.join(absent)} is not on this host" if absent else ""))


def root_groups(subject: Subject) -> Verdict:
    """The runner's user is in no group that means root: docker's and podman's sockets do."""
    groups = subject.facts.groups
    dangerous = sorted(groups & ROOT_GROUPS)
    if subject.facts.process is None:
        return failed(expected="a running process whose groups can be read", found="no process", todo="start the unit")
    if subject.facts.process.uid == 0:
        return failed(expected="a process that is not root's", found="uid 0", todo="leave User as the module sets it")
    if dangerous:
        return failed(
            expected="no group that gives root",
            found=", ".join(dangerous),
            todo="remove SupplementaryGroups (container labels belong on another instance), or accept it under "
            "accepted_risks.container-socket with a reason",
        )
    return passed("in " + (", ".join(sorted(groups)) or "no group of /etc/group"))


CHECKS = (
    Check("instances-separate", instances_separate, risk="shared-state"),
    Check("root-groups", root_groups, risk="container-socket"),
)
