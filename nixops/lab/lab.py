"""A lab: hosts on a bridge of this machine, up and down as one.

    with Lab.up([HostSpec("nix-cache02", "plain")], name="try") as lab:
        lab.hosts["nix-cache02"].exec("systemctl", "is-system-running")

What it changes on the machine while it is up: a bridge, and links and namespaces whose names begin with ``nl``;
mounts below /run/nixops-lab; control groups below ``nixops-lab``; the setting fs.inotify.max_user_instances. After
:meth:`Lab.down` all of it is as it was. The root tree stays in its cache.
"""

from __future__ import annotations

import atexit
import os
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from nixops.errors import HostFault, NixopsError, UsageError
from nixops.lab import state as files
from nixops.lab.host import LabHost
from nixops.lab.machine import locked, require_machine, run, this_process
from nixops.lab.network import choose_subnet, subnets_in_use
from nixops.lab.state import HostSpec, LabState
from nixops.lab.tree import CACHE, Say, Tree, ensure_tree
from nixops.transport.command import Runner
from nixops.transport.fleet import fan_out
from nixops.transport.local import LocalRunner
from nixops.vault.settings import LOGIN_VARIABLES

__all__ = ["HostSpec", "Lab", "LabHost", "describe", "sweep"]

BOOTING_AT_ONCE = 8


class Lab:
    """Hosts that are up. Made by :meth:`up`, or found by :meth:`attach`."""

    def __init__(self, state: LabState, directory: Path, runner: Runner) -> None:
        self.name = state.name
        self.directory = directory / state.name
        self.network = state.network
        self.hosts: dict[str, LabHost] = {
            spec.name: LabHost(
                spec, index, state.network, self.directory / "hosts" / spec.name, self.identity_file, runner
            )
            for index, spec in enumerate(state.hosts)
        }
        self._runner = runner
        self._parent = directory
        self._process = os.getpid()
        self._finalise: Callable[[], None] | None = None

    @property
    def gateway(self) -> str:
        """The operator's IPv4 address in the lab: servers that the hosts use listen there."""
        return self.network.gateway

    @property
    def identity_file(self) -> Path:
        """The operator's private key, 0600."""
        return self.directory / "operator"

    @classmethod
    def up(
        cls,
        hosts: Sequence[HostSpec],
        *,
        name: str = "lab",
        keep: bool = False,
        directory: Path = files.DIRECTORY,
        cache: Path = CACHE,
        runner: Runner | None = None,
        limit: int = BOOTING_AT_ONCE,
        say: Say = lambda _: None,
    ) -> Lab:
        """Boot ``hosts`` and wait until each can be logged in to.

        What a killed run left, of this name or of any process that is gone, is taken down first. Unless ``keep``,
        the lab comes down with this process: at its end, at an exception, at SIGTERM.

        :param keep: leave it up when this process ends.
        :param limit: how many hosts boot at once.
        :param say: is told in a line when there is something to wait for.
        :raises UsageError: a bad name, twice the same host, or a lab of this name that a living process uses.
        :raises HostFault: this machine cannot carry a lab.
        :raises Unreachable: a host did not come up.
        """
        files.check_name(name)
        if len({host.name for host in hosts}) != len(hosts):
            raise UsageError("two hosts of the lab have the same name")
        require_machine()
        runner = runner or _runner()
        tree = ensure_tree(runner, cache=cache, say=say)
        with locked(directory / "labs.lock"):
            found = files.load_state(directory, name)
            if found is not None and files.in_use(found):
                owner = found.owner.pid if found.owner else 0
                raise UsageError(f"the lab {name} is in use by process {owner}", hint="take another name")
            sweep(runner, directory, also=name)
            state = LabState(
                name=name,
                subnet=choose_subnet(
                    name, [*subnets_in_use(runner), *files.taken_subnets(directory, files.labs(directory))]
                ),
                tree=tree.directory,
                hosts=tuple(hosts),
                owner=this_process(),
                boot=files.this_boot(),
            )
            if len(hosts) > state.network.capacity:
                raise UsageError(f"a lab holds at most {state.network.capacity} hosts")
            state.save(directory)
        lab = cls(state, directory, runner)
        lab._come_down_with_this_process()
        try:
            lab._boot(tree, limit)
            if keep:
                lab._stay(state)
        except BaseException:
            lab.down()
            raise
        return lab

    @classmethod
    def attach(cls, name: str = "lab", *, directory: Path = files.DIRECTORY, runner: Runner | None = None) -> Lab:
        """A lab that another process has put up. :meth:`down` is then the caller's to call.

        :raises UsageError: there is none of that name.
        """
        state = files.load_state(directory, files.check_name(name))
        if state is None or state.boot != files.this_boot():
            raise UsageError(f'no lab named "{name}" is up', hint="invoke lab.up, or name another with --name")
        return cls(state, directory, runner or _runner())

    def down(self) -> None:
        """Take everything down. A second time is nothing."""
        if self._finalise is not None:
            atexit.unregister(self._finalise)
            self._finalise = None
        files.remove(self._runner, self._parent, self.name)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.down()

    def _boot(self, tree: Tree, limit: int) -> None:
        files.hold_inotify(self._parent, self.name)
        run(self._runner, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "operator", "-f", self.identity_file)
        self.network.create(self._runner)
        names = {"operator": self.gateway, **{host.name: host.address for host in self.hosts.values()}}

        def boot(host: LabHost) -> None:
            host.create(tree, names)
            host.power_on()
            host.wait_ready(timeout=120.0)

        for outcome in fan_out(list(self.hosts.values()), boot, limit=limit):
            outcome.unwrap()

    def _stay(self, state: LabState) -> None:
        """Now that it is whole, nobody owns it: it stays until it is taken down."""
        replace(state, owner=None).save(self._parent)
        if self._finalise is not None:
            atexit.unregister(self._finalise)
            self._finalise = None

    def _come_down_with_this_process(self) -> None:
        def finalise() -> None:
            if os.getpid() != self._process:
                return  # a fork of ours ends, not we
            try:
                self.down()
            except NixopsError as error:
                os.write(2, f"error: {error}\n".encode())

        self._finalise = finalise
        atexit.register(finalise)
        # Without a handler these end a process on the spot. Whoever has set one already is left to it.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) is signal.SIG_DFL:
                    signal.signal(number, _terminate)


def _terminate(number: int, _frame: FrameType | None) -> None:
    """Make SIGTERM and SIGHUP unwind the stack, so that what was started is taken down; ends with 128 + number."""
    raise SystemExit(128 + number)


def sweep(runner: Runner, directory: Path = files.DIRECTORY, *, also: str | None = None) -> list[str]:
    """Take down the labs of processes that are gone, and ``also`` that one; returns the names."""
    gone = [name for name in files.labs(directory) if name == also or files.orphaned(files.load_state(directory, name))]
    if also is not None and also not in gone:
        gone.append(also)  # its file may never have been written whole
    for name in gone:
        try:
            files.remove(runner, directory, name)
        except HostFault:
            if name == also:
                raise
    return gone


def _runner() -> Runner:
    # What boots a host lives as long as the lab: no token of the operator's belongs into its environment.
    return LocalRunner(without=(*LOGIN_VARIABLES, "FORGEJO_TOKEN"))


def describe(lab: Lab) -> dict[str, Any]:
    """The lab as a JSON document, ``nixops/lab/1``."""
    return {
        "schema": "nixops/lab/1",
        "lab": lab.name,
        "gateway": lab.gateway,
        "identity_file": str(lab.identity_file),
        "hosts": [
            {
                "name": host.name,
                "shape": host.shape,
                "address": host.address,
                "port": host.port,
                "user": host.user,
                "host_key": host.host_key,
                "running": host.running,
            }
            for host in lab.hosts.values()
        ],
    }
