"""One host of a lab: a container with its own systemd, sshd, nix-daemon, disk and network."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import time
import uuid
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from nixops.errors import CommandFailed, CommandTimeout, HostFault, NixopsError, Unreachable, printable
from nixops.lab import recipe
from nixops.lab.machine import ControlGroup, leader, run
from nixops.lab.network import NAMESPACES, Network
from nixops.lab.state import HostSpec, Shape, host_group, machine_name
from nixops.lab.tree import Tree
from nixops.transport.command import Runner
from nixops.transport.exec import raise_if_cancelled

# Where programs are on either shape, for what the lab itself does inside a host.
_PATH = f"/run/wrappers/bin:/run/current-system/sw/bin:{recipe.TOOLS}:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_NOPASSWD = f"{recipe.LOGIN} ALL=(ALL:ALL) NOPASSWD: ALL\n"


@dataclass(frozen=True)
class LabHost:
    """A host that can be reached by SSH, and inspected from outside.

    :param index: its number in the lab, from 0; its address follows from it.
    :param directory: where its disk and its console are, on this machine.
    :param identity_file: the operator's private key, which the login accepts.
    """

    spec: HostSpec
    index: int
    network: Network
    directory: Path
    identity_file: Path
    runner: Runner

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def shape(self) -> Shape:
        return self.spec.shape

    @property
    def address(self) -> str:
        return self.network.address(self.index)

    @property
    def port(self) -> int:
        return 22

    @property
    def user(self) -> str:
        """The login: root, or on an awkward host one that has to use sudo."""
        return recipe.LOGIN if self.shape == "awkward" else "root"

    @property
    def root(self) -> Path:
        """The host's root file system, as seen from this machine; its /run and /tmp are elsewhere."""
        return self.directory / "root"

    @cached_property
    def host_key(self) -> str:
        """Its public host key, ``ssh-ed25519 AAAA…``."""
        text = (self.root / "etc/ssh/ssh_host_ed25519_key.pub").read_text(encoding="ascii")
        return " ".join(text.split()[:2])

    # -- life ---------------------------------------------------------------------------------------------------

    def create(self, tree: Tree, names: dict[str, str], machine_id: str | None = None) -> None:
        """Make the disk, the network and the files that are this host's own. It is not started.

        :param names: what goes into /etc/hosts: address by name.
        """
        disk = self.directory / "disk"
        for directory in (disk, self.root):
            directory.mkdir(mode=0o700, parents=True)
        run(self.runner, "mount", "-t", "tmpfs", "-o", f"mode=755,size={self.spec.disk_mib}m", "nixops-lab", disk)
        for part in ("upper", "work"):
            (disk / part).mkdir()
        lower = ":".join(str(layer) for layer in tree.lower(self.shape))
        options = f"lowerdir={lower},upperdir={disk / 'upper'},workdir={disk / 'work'}"
        run(self.runner, "mount", "-t", "overlay", "-o", options, "overlay", self.root)
        self.network.attach(self.runner, self.name, self.index)
        self._settle(names, machine_id or uuid.uuid4().hex)

    def _settle(self, names: dict[str, str], machine_id: str) -> None:
        etc = self.root / "etc"
        (etc / "hostname").write_text(self.name + "\n", encoding="ascii")
        (etc / "machine-id").write_text(machine_id + "\n", encoding="ascii")
        lines = [f"{address} {name}" for name, address in names.items()]
        (etc / "hosts").write_text("\n".join(["127.0.0.1 localhost", "::1 localhost", *lines]) + "\n", encoding="ascii")
        key = etc / "ssh/ssh_host_ed25519_key"
        run(self.runner, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", self.name, "-f", key)
        home = self.root / ("home/" + recipe.LOGIN if self.shape == "awkward" else "root")
        owner = recipe.LOGIN_ID if self.shape == "awkward" else 0
        (home / ".ssh").mkdir(mode=0o700, exist_ok=True)
        keys = home / ".ssh/authorized_keys"
        keys.write_text(self.identity_file.with_suffix(".pub").read_text(encoding="ascii"), encoding="ascii")
        keys.chmod(0o600)
        for path in (home / ".ssh", keys):
            os.chown(path, owner, owner)

    def power_on(self) -> None:
        """Boot it with the disk as it is. Returns at once; see :meth:`wait_ready`.

        :raises HostFault: it runs already.
        """
        group = host_group(self.network.lab, self.name)
        if group.pids():
            raise HostFault(f"the lab host {self.name} is running already")
        ControlGroup(f"{group.name}/launcher").create()
        run(
            self.runner,
            *("setsid", "--fork", "sh", "-c", recipe.file_text("launch.sh"), "launch", self.directory / "console.log"),
            *group.directories,
            *("--", "systemd-nspawn", "--quiet", "--keep-unit", "--register=no", "--boot", "--kill-signal=SIGRTMIN+3"),
            *("--resolv-conf=off", "--timezone=off", "--link-journal=no", "--console=read-only"),
            # A host is master of its own links and routes; with a namespace given to it, it would not be.
            "--capability=CAP_NET_ADMIN",
            f"--machine={machine_name(self.network.lab, self.name)}",
            f"--directory={self.root}",
            f"--network-namespace-path={NAMESPACES / self.network.namespace(self.name)}",
            env={"SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"},
        )

    def power_off(self) -> None:
        """Power loss: everything that runs on the host is gone between two instructions. The disk stays.

        The container's init is killed, and with it, by the kernel, all of its processes. To kill systemd-nspawn
        instead would leave that init running.
        """
        init = self.init_pid
        if init is not None:
            os.kill(init, signal.SIGKILL)
        group = host_group(self.network.lab, self.name)
        deadline = time.monotonic() + 5.0
        while group.pids() and time.monotonic() < deadline:  # systemd-nspawn cleans up and ends, and its launcher
            time.sleep(0.01)
        group.destroy()

    @property
    def init_pid(self) -> int | None:
        """The host's PID 1, as this machine numbers it; ``None`` when the host is off."""
        return leader(host_group(self.network.lab, self.name))

    @property
    def running(self) -> bool:
        return self.init_pid is not None

    def wait_ready(self, timeout: float = 60.0) -> None:
        """Wait until its sshd answers on the lab's network, which it does after the generation has been booted.

        :raises Unreachable: it does not within ``timeout`` seconds; the detail is the end of its console.
        """
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            raise_if_cancelled()
            try:
                with socket.create_connection((self.address, self.port), timeout=1.0) as connection:
                    connection.settimeout(2.0)
                    if connection.recv(256).startswith(b"SSH-"):
                        return
            except OSError:
                pass
            time.sleep(0.05)
        raise Unreachable(
            f"the lab host {self.name} did not answer on {self.address}:{self.port} within {timeout:g} s",
            hint="see its console in the detail" if self.running else "it is not running",
            detail="\n".join(self.console().splitlines()[-15:]),
        )

    def console(self) -> str:
        """What it wrote to its console since it was made, fit to print."""
        try:
            text = (self.directory / "console.log").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""
        return printable(re.sub(r"\x1b\[[0-9;]*m|\r", "", text))

    def partition(self, cut: bool) -> None:
        """Pull the network cable out (``True``), or put it back. Connections are neither closed nor refused."""
        self.network.cut(self.runner, self.index, cut)

    # -- inside -------------------------------------------------------------------------------------------------

    def exec(
        self, *argv: str | Path, stdin: bytes | None = None, check: bool = True, timeout: float = 60.0
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a program inside the host as its root, entering from outside. For preparing and inspecting tests.

        :raises HostFault: the host is off.
        :raises CommandFailed: ``check`` is set and the program ended with another code than 0.
        :raises CommandTimeout: it ran longer than ``timeout`` seconds.
        """
        init = self.init_pid
        if init is None:
            raise HostFault(f"the lab host {self.name} is off")
        program = [str(argument) for argument in argv]
        command = ["nsenter", "-t", str(init), "-m", "-u", "-i", "-n", "-p", "-C", "-r", "-w", "--", *program]
        # The variables are for the program: nsenter itself is found before they are set.
        environment = {"PATH": _PATH, "HOME": "/root", "LANG": "C.UTF-8", "TERM": "dumb"}
        command[0] = _which("nsenter")
        try:
            done = subprocess.run(
                command, input=stdin or b"", capture_output=True, env=environment, timeout=timeout, check=False
            )
        except subprocess.TimeoutExpired:
            raise CommandTimeout(f"{program[0]} inside the lab host {self.name} ran past its {timeout:g} s") from None
        if check and done.returncode != 0:
            text = (done.stderr.strip() or done.stdout.strip()).decode(errors="replace")
            raise CommandFailed(
                f"{program[0]} inside the lab host {self.name} failed with exit code {done.returncode}",
                detail="\n".join(text.splitlines()[-20:]) or None,
            )
        return done

    def boot_id(self) -> str:
        """The id of the host's present boot; another one after each power cycle."""
        return self.exec("cat", "/proc/sys/kernel/random/boot_id").stdout.decode().strip()

    def sudo_mode(self, mode: str) -> None:
        """Let the login of an awkward host use sudo with its ``password``, or with none (``nopasswd``).

        :raises NixopsError: on a plain host, whose login is root.
        """
        if self.shape != "awkward" or mode not in ("password", "nopasswd"):
            raise NixopsError(f"no sudo mode {mode!r} on the {self.shape} lab host {self.name}")
        rule = self.root / "etc/sudoers.d/lab-nopasswd"
        rule.unlink(missing_ok=True)
        if mode == "nopasswd":
            rule.write_text(_NOPASSWD, encoding="ascii")
            rule.chmod(0o440)


def _which(program: str) -> str:
    found = shutil.which(program)
    if found is None:
        raise HostFault(f"{program} is not installed on this machine")
    return found
