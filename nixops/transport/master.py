"""One login on a host, shared by every session that follows: OpenSSH's master, with a keeper at its far end.

It ends with this process, however that ends: its stdin is ours, at whose end the keeper on the host stops what runs
and hangs up; and a guard on this machine kills what is left and removes the directory with the sockets.
"""

from __future__ import annotations

import ipaddress
import os
import re
import secrets
import select
import subprocess
import threading
import time
from pathlib import Path

from nixops.errors import HostFault, HostKeyChanged, LoginRefused, Unreachable, printable
from nixops.nix.log import ssh_fault
from nixops.transport.agent import bare_environment
from nixops.transport.exec import Deadline, raise_if_cancelled
from nixops.transport.guard import Guard
from nixops.transport.keeper import STOP_GRACE, keeper_line, new_token
from nixops.transport.target import SshTarget
from nixops.values import Address

# How long the keeper may take to say that it has heard, seconds; a host that is cut off must not hold us up.
_HEARD = 1.0
# How much a login shell may say before the keeper is there, bytes.
_NOISE = 64 * 1024

# What ssh tells of its way, when asked to: no errors.
_TOLD = re.compile(r"debug\d: |Authenticated to |OpenSSH_|Transferred: |Bytes per second: ")


class Master:
    """An open connection. Made by :meth:`open`; safe to use from several threads.

    :ivar lost: set once the connection has ended, for whatever reason.
    :ivar control: its own socket.
    :ivar mark: what commands carry that its keeper shall look after.
    """

    def __init__(self, target: SshTarget, config: Path, control: Path, guard: Guard) -> None:
        self.target = target
        self.lost = threading.Event()
        self.mark = new_token()
        self._link = control
        # Each master's own, as a dying ssh removes the path that it was given: it may be its successor's by then.
        self.control = control.with_name(f"{control.name}.{secrets.token_hex(2)}")
        self._log = control.with_name(f"{self.control.name}.log")
        self._guard = guard
        self._token = new_token()
        self._writing = threading.Lock()
        self._waiting: dict[str, threading.Event] = {}
        # Past the operator's own three signs of life, with room for a busy machine.
        patience = max(10.0, 4 * target.keepalive)
        self._argv = (
            *("ssh", "-F", str(config), "-T", "-o", "ControlMaster=yes", "-o", f"ControlPath={self.control}"),
            *("-o", "LogLevel=DEBUG1"),
            *(str(target.name), keeper_line(self._token, patience, self.mark)),
        )
        self._process = self._start()

    @classmethod
    def open(cls, target: SshTarget, config: Path, control: Path, guard: Guard, deadline: Deadline) -> Master:
        """Log in, and wait until the keeper is there.

        :raises Unreachable: or the subclass of the hop that failed.
        """
        master = cls(target, config, control, guard)
        try:
            master._await(deadline)
            master._share()
        except BaseException:
            master.hang_up()
            # Who waits for the reason does not wait for its process too.
            threading.Thread(target=master._bury, name=f"nixops-ssh-{target.name}", daemon=True).start()
            raise
        threading.Thread(target=master._watch, name=f"nixops-ssh-{target.name}", daemon=True).start()
        return master

    @property
    def alive(self) -> bool:
        return not self.lost.is_set()

    def tell(self, line: str) -> None:
        """A line for the keeper; an empty one is a sign of life. Never waits, never fails: a connection that does
        not take it is about to be lost, and then the keeper knows by itself.
        """
        assert self._process.stdin is not None  # opened as a pipe
        with self._writing:
            try:
                os.write(self._process.stdin.fileno(), f"{line}\n".encode())
            except (OSError, ValueError):
                pass

    def stop(self, group: str) -> None:
        """Stop a process group on the host (``sudo:NUMBER`` one that root owns), and wait until it is gone: at most
        some seconds, and no time for a connection that is lost.
        """
        heard = self._waiting.setdefault(f"heard {group}", threading.Event())
        gone = self._waiting.setdefault(f"gone {group}", threading.Event())
        self.tell(f"stop {group}")
        if self._either(heard, _HEARD):
            self._either(gone, STOP_GRACE + 3.0)

    def hang_up(self) -> None:
        """Begin to end the connection. What still runs over it on the host is stopped by the keeper."""
        assert self._process.stdin is not None  # opened as a pipe
        with self._writing:
            self._process.stdin.close()
        self._process.terminate()

    def close(self) -> None:
        """End the connection now, and wait until its process is gone."""
        self.hang_up()
        self._kill()
        self.lost.set()

    def _either(self, event: threading.Event, seconds: float) -> bool:
        deadline = Deadline(seconds)
        while not event.is_set() and not deadline.passed and self.alive:
            event.wait(min(0.05, deadline.tick()))
        return event.is_set()

    # -- the process ------------------------------------------------------------------------------------------

    def _start(self) -> subprocess.Popen[bytes]:
        try:
            with self._log.open("wb") as log:
                process = subprocess.Popen(
                    self._argv,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env=bare_environment(),
                    start_new_session=True,
                    bufsize=0,
                )
        except OSError as error:
            raise HostFault(
                f"ssh cannot be run on this machine: {error.strerror}", hint="install the OpenSSH client"
            ) from None
        self._guard.add(process.pid)
        assert process.stdin is not None  # opened as a pipe
        os.set_blocking(process.stdin.fileno(), False)
        return process

    def _kill(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(0.5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._guard.release(self._process.pid)
        for left in (self.control, self._log):
            left.unlink(missing_ok=True)

    def _share(self) -> None:
        """Let those who read the config find this connection."""
        fresh = self.control.with_name(f"{self.control.name}.link")
        fresh.symlink_to(self.control.name)
        fresh.replace(self._link)

    def _await(self, deadline: Deadline) -> None:
        assert self._process.stdout is not None  # opened as a pipe
        descriptor = self._process.stdout.fileno()
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        started = time.monotonic()
        held = b""
        while f"{self._token}\n".encode() not in held:
            raise_if_cancelled()
            if poll.poll(deadline.tick() * 1000):
                chunk = os.read(descriptor, 4096)
                if not chunk:
                    raise self._refused()
                held = (held + chunk)[-_NOISE:]
            elif deadline.passed:
                raise self._late(time.monotonic() - started)

    def _watch(self) -> None:
        """Read what the keeper says, and give it signs of life, until the connection ends."""
        assert self._process.stdout is not None  # opened as a pipe
        descriptor = self._process.stdout.fileno()
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        rest = b""
        beat = Deadline(self.target.keepalive)
        while True:
            if poll.poll((beat.left() or 0.0) * 1000):
                chunk = os.read(descriptor, 4096)
                if not chunk:
                    break
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    waiting = self._waiting.pop(line.decode(errors="replace"), None)
                    if waiting is not None:
                        waiting.set()
            if beat.passed:
                self.tell("")
                beat = Deadline(self.target.keepalive)
        self.lost.set()
        # The keeper went, or the connection did: either way this master takes no further session.
        self._bury()

    def _bury(self) -> None:
        self.close()
        self._close_output()

    def _close_output(self) -> None:
        assert self._process.stdout is not None  # opened as a pipe
        self._process.stdout.close()

    # -- what went wrong --------------------------------------------------------------------------------------

    def _said(self) -> tuple[str, str]:
        """What ssh said: its errors, and what it told of its way."""
        lines = self._log.read_text(encoding="utf-8", errors="replace").replace("\r", "").splitlines()
        told = [line for line in lines if _TOLD.match(line)]
        errors = [line for line in lines if line.strip() and not _TOLD.match(line)]
        return "\n".join(errors), "\n".join(told)

    def _refused(self) -> Unreachable:
        """The error of an ssh that ended by itself."""
        errors, told = self._said()
        target = self.target
        if "debug1: Server host key" in told and re.search(r"IDENTIFICATION HAS CHANGED|Host key verif", errors):
            return self._changed(told)
        if "Authenticated to " in told:
            return LoginRefused(
                f"{target} let us in and runs no command for this login",
                hint="does the login have a shell, or is its key bound to one command (authorized_keys)?",
                detail=printable("\n".join(errors.splitlines()[-5:])) or None,
            )
        if "Permission denied (" in errors or "Too many authentication failures" in errors:
            return self._login_refused(errors, told)
        return ssh_fault(errors, target.name, "a login") or Unreachable(
            f"{target.name} cannot be reached: ssh ended during {self._hop(told)}",
            detail=printable("\n".join(errors.splitlines()[-5:])) or None,
        )

    def _late(self, seconds: float) -> Unreachable:
        """The error of an ssh that was still at it when the time was up."""
        target, (_, told) = self.target, self._said()
        within = f"within {round(seconds, 1):g} s"
        if "Authenticated to " in told:
            return LoginRefused(
                f"{target} let us in, and its shell did not answer {within}",
                hint="does the login take commands, or is its key bound to one (authorized_keys)?",
            )
        if "Server host key" in told:
            return LoginRefused(
                f"the login on {target} was not done {within}",
                hint="the host's key was right: is it overloaded, or does its PAM wait for something?",
            )
        if "Connection established" in told:
            return Unreachable(
                f"{target} took the connection, and the SSH handshake was not done {within}",
                hint="the port answers: is the host overloaded, or is that not sshd?",
            )
        if "Connecting to " in told or _is_number(target.address):
            return Unreachable(
                f"{target.name} cannot be reached on port {target.port}: no answer {within}",
                hint="is the host up, and is there a route to it?",
            )
        return Unreachable(
            f"the address {target.address} of {target.name} does not resolve: no answer {within}",
            hint=f"check hosts.{target.name}.address in the inventory, and this machine's DNS",
        )

    def _login_refused(self, errors: str, told: str) -> LoginRefused:
        tried = re.findall(r"debug1: Offering public key: \S+ (\S+ SHA256:\S+)", told)
        if "Trying private key: " in told and self.target.identity_file is not None:
            tried.append(str(self.target.identity_file))  # without its public half beside it, ssh names no fingerprint
        keys = ", ".join(dict.fromkeys(tried)) or "none, as there is no key that could be used"
        return LoginRefused(
            f"{self.target} refused the login; keys tried: {keys}",
            hint=f"is one of them in authorized_keys of {self.target.user} there? (ssh.identity_file, build.ssh_key)",
            detail=printable("\n".join(errors.splitlines()[-3:])),
        )

    def _hop(self, told: str) -> str:
        if "Server host key" in told:
            return "the login"
        return "the SSH handshake" if "Connection established" in told else "connecting"

    def _changed(self, told: str) -> HostKeyChanged:
        offered = re.search(r"Server host key: (\S+ \S+)", told)
        pinned = ", ".join(f"{key.type} {key.fingerprint}" for key in self.target.pinned())
        name, other = self.target.name, offered[1] if offered else "another"
        return HostKeyChanged(
            f"THE HOST KEY OF {name} HAS CHANGED: pinned is {pinned}, offered is {other}",
            hint="nothing was sent. Somebody may stand in between. If the host was reinstalled, compare the offered "
            f"fingerprint with its console, then: invoke trust {name}",
        )


def _is_number(address: Address) -> bool:
    """Whether it is an IP address, which nobody has to resolve."""
    try:
        ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    return True
