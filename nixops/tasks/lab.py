"""``invoke lab.up``, ``lab.down``, ``lab.status``: real hosts on this machine, for trying things out."""

from __future__ import annotations

import sys
from typing import Any

from invoke.collection import Collection
from invoke.context import Context
from invoke.tasks import task

from nixops.tasks.support import guarded


@task(
    auto_shortflags=False,
    help={
        "hosts": "how many hosts to boot",
        "awkward": "how many of them have the awkward shape: sudo, no tools in /usr/bin, no trusted user",
        "name": "the lab's name; several can be up at once",
        "format": "text or json",
    },
)
@guarded
def up(_: Context, hosts: str = "3", awkward: str = "0", name: str = "lab", format: str = "text") -> None:
    """Boot hosts on this machine, with systemd, sshd and a nix-daemon each (needs root)."""
    from nixops.errors import UsageError
    from nixops.lab.lab import HostSpec, Lab

    # Text, because Invoke shows a traceback for a number that is none.
    count, strange = (int(text) if text.isascii() and text.isdigit() else -1 for text in (hosts, awkward))
    if count < 1 or not 0 <= strange <= count:
        raise UsageError("--hosts takes a number from 1, and --awkward one from 0 to that")
    _check_format(format)
    specs = [HostSpec(f"lab{n:02}", "awkward" if n > count - strange else "plain") for n in range(1, count + 1)]
    _show(Lab.up(specs, name=name, keep=True, say=_say), format)


@task(auto_shortflags=False, help={"name": "the lab's name", "cache": "delete the cached root trees too"})
@guarded
def down(_: Context, name: str = "lab", cache: bool = False) -> None:
    """Take a lab down, whole or half, and put the machine's settings back."""
    from nixops.lab import state
    from nixops.lab.lab import sweep
    from nixops.lab.machine import require_machine
    from nixops.lab.tree import remove_trees
    from nixops.transport.local import LocalRunner

    state.check_name(name)
    require_machine()
    runner = LocalRunner()
    for gone in sweep(runner, also=name):
        _say(f"the lab {gone} is down")
    if cache:
        left = state.labs(state.DIRECTORY)
        if left:
            from nixops.errors import UsageError

            raise UsageError(f"labs that use the cached trees are up: {', '.join(left)}", hint="take them down first")
        remove_trees(runner)
        _say("the cached root trees are deleted")


@task(auto_shortflags=False, help={"name": "the lab's name", "format": "text or json"})
@guarded
def status(_: Context, name: str = "lab", format: str = "text") -> None:
    """Show a lab's hosts, and which of them run."""
    from nixops.lab.lab import Lab

    _check_format(format)
    _show(Lab.attach(name), format)


def _check_format(value: str) -> None:
    from nixops.errors import UsageError

    if value not in ("text", "json"):
        raise UsageError(f"unknown format {value!r}", hint="text or json")


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _show(lab: Any, format: str) -> None:
    import json

    from nixops.lab.lab import describe

    document = describe(lab)
    if format == "json":
        print(json.dumps(document, indent=2))
        return
    print(f"lab {document['lab']}, operator's side {document['gateway']}, key {document['identity_file']}")
    for host in document["hosts"]:
        state = "up" if host["running"] else "off"
        print(f"{host['name']:<20} {state:<4} {host['shape']:<8} {host['user']}@{host['address']}")


ns = Collection("lab", up, down, status)
