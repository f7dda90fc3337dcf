"""From a target to a logged-in connection, or to an error that names the hop that failed.

The hops, in order, each with words of its own: name, route and port, SSH at all, host key, login.
"""

from __future__ import annotations

import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import fabric.config
import fabric.connection
import paramiko
from paramiko.channel import Channel
from paramiko.common import MSG_CHANNEL_CLOSE, MSG_CHANNEL_REQUEST
from paramiko.message import Message

from nixops.errors import HostKeyChanged, HostKeyUnknown, LoginRefused, Unreachable
from nixops.transport.exec import Deadline, raise_if_cancelled
from nixops.transport.hostkey import ALGORITHMS, HostKey
from nixops.transport.sshgate import on_channel_close
from nixops.transport.sshlogin import Login
from nixops.transport.target import SshTarget

# Everything that paramiko would log there comes out of here as an exception; its tracebacks are for nobody.
LOG_CHANNEL = "nixops.transport.paramiko"
# Unanswered signs of life that end a connection.
KEEPALIVE_COUNT = 3

# Fabric carries no types.
_Connection: Any = fabric.connection.Connection
_Config: Any = fabric.config.Config


@dataclass(frozen=True)
class Link:
    """A logged-in connection: Fabric's, and the transport below it."""

    connection: Any
    transport: paramiko.Transport

    @property
    def active(self) -> bool:
        return self.transport.is_active()

    def close(self) -> None:
        """End it, and give its thread a second to end too, so that no socket outlives its runner."""
        self.connection.client.close()
        self.transport.join(1.0)


def connect(target: SshTarget) -> Link:
    """A Fabric connection to ``target``, logged in, its host key one of the pinned.

    No configuration but the target's is used: no ``~/.ssh/config``, no ``~/.ssh/known_hosts``, no ``fabric.yml``.

    :raises Unreachable: or the subclass of the hop that failed.
    """
    pinned = target.pinned()
    policy = PinnedKeys(target, pinned)
    login = Login(target)
    connection = _Connection(
        host=str(target.address),
        user=target.user,
        port=target.port,
        config=_Config(lazy=True, overrides={"load_ssh_configs": False}),
        connect_kwargs={
            "sock": dial(target),
            "timeout": target.login_timeout,
            "banner_timeout": target.login_timeout,
            "auth_timeout": target.login_timeout,
            "channel_timeout": target.connect_timeout,
            "transport_factory": _factory(target, pinned),
            "auth_strategy": login,
        },
    )
    connection.client.set_missing_host_key_policy(policy)
    connection.client.set_log_channel(_quiet_log())
    deadline = Deadline(target.login_timeout)
    # paramiko bounds each step of a login; this bounds the whole of it.
    watchdog = threading.Timer(target.login_timeout, connection.client.close)
    watchdog.daemon = True
    watchdog.start()
    try:
        connection.open()
        if deadline.passed:
            raise paramiko.SSHException("login time-out")
    except BaseException as error:
        watchdog.cancel()
        connection.client.close()
        if isinstance(error, Exception):
            raise explain(target, error, late=deadline.passed, key_seen=policy.accepted, login=login) from None
        raise
    watchdog.cancel()
    transport: paramiko.Transport = connection.transport
    transport.set_keepalive(max(1, round(target.keepalive)))
    return Link(connection, transport)


def offered_host_key(target: SshTarget) -> str:
    """The key that the host offers now, ``type base64``, of the type that we prefer. It proves nothing by itself.

    :raises Unreachable: the host cannot be asked.
    """
    transport = paramiko.Transport(dial(target))
    transport.set_log_channel(_quiet_log())
    transport.banner_timeout = target.login_timeout
    deadline = Deadline(target.login_timeout)
    try:
        transport.start_client(timeout=target.login_timeout)
        key = transport.get_remote_server_key()
        return str(HostKey(key.get_name(), key.asbytes()))
    except (paramiko.SSHException, EOFError, OSError) as error:
        raise explain(target, error, late=deadline.passed) from None
    finally:
        transport.close()


# -- hop 1 and 2: name, route and port ------------------------------------------------------------------------


def dial(target: SshTarget) -> socket.socket:
    """A TCP connection to the target, trying each of its addresses within ``connect_timeout`` seconds.

    :raises Unreachable: the name does not resolve; no route; refused; no answer in time.
    """
    deadline = Deadline(target.connect_timeout)
    reasons: list[str] = []
    for family, _, _, _, address in _resolve(target, deadline):
        raise_if_cancelled()
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.settimeout(max(0.05, deadline.left() or 0.0))
            sock.connect(address)
            _watch_peer(sock, target.keepalive)
            return sock
        except TimeoutError:
            reasons.append(f"{address[0]}: no answer within {target.connect_timeout:g} s")
        except ConnectionRefusedError:
            reasons.append(f"{address[0]}: connection refused")
        except OSError as error:
            reasons.append(f"{address[0]}: {(error.strerror or str(error)).lower()}")
        sock.close()
    refused = all("refused" in reason for reason in reasons)
    raise Unreachable(
        f"{target.name} cannot be reached on port {target.port}: {'; '.join(reasons)}",
        hint="the host is up but nothing listens there: is sshd running, is the port right?"
        if refused
        else "is the host up, and is there a route to it?",
    )


_AddressInfo = tuple[Any, Any, int, str, tuple[Any, ...]]


def _resolve(target: SshTarget, deadline: Deadline) -> list[_AddressInfo]:
    found: list[_AddressInfo] = []
    failure: list[Exception] = []

    def look_up() -> None:
        try:
            found.extend(socket.getaddrinfo(str(target.address), target.port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            failure.append(error)

    # getaddrinfo takes no time-out and a resolver may take half a minute.
    thread = threading.Thread(target=look_up, name="nixops-resolve", daemon=True)
    thread.start()
    thread.join(deadline.left())
    if found:
        return found
    reason = getattr(failure[0], "strerror", None) or str(failure[0]) if failure else "the resolver did not answer"
    raise Unreachable(
        f"the address {target.address} of {target.name} does not resolve: {reason}",
        hint="check hosts." + target.name + ".address in the inventory, and this machine's DNS",
    )


def _watch_peer(sock: socket.socket, keepalive: float) -> None:
    """Let the kernel notice a peer that is gone, in a read as well as in a write."""
    seconds = max(1, round(keepalive))
    options = [
        ("SO_KEEPALIVE", socket.SOL_SOCKET, 1),
        ("TCP_KEEPIDLE", socket.IPPROTO_TCP, seconds),
        ("TCP_KEEPINTVL", socket.IPPROTO_TCP, seconds),
        ("TCP_KEEPCNT", socket.IPPROTO_TCP, KEEPALIVE_COUNT),
        # Without it, data on its way keeps a dead connection for the 15 minutes of tcp_retries2.
        ("TCP_USER_TIMEOUT", socket.IPPROTO_TCP, seconds * 1000 * KEEPALIVE_COUNT),
        ("TCP_NODELAY", socket.IPPROTO_TCP, 1),
    ]
    for name, level, value in options:
        number = getattr(socket, name, None)  # not every system has all of them
        if number is not None:
            sock.setsockopt(level, number, value)


# -- hop 4: the host key --------------------------------------------------------------------------------------


class PinnedKeys(paramiko.MissingHostKeyPolicy):
    """Accepts the pinned keys and nothing else. The client has no other list of keys, so it always asks here."""

    def __init__(self, target: SshTarget, pinned: Iterable[HostKey]) -> None:
        self._target = target
        self._pinned = tuple(pinned)
        self.accepted = False

    def missing_host_key(self, _client: paramiko.SSHClient, _hostname: str, key: paramiko.PKey) -> None:
        """:raises HostKeyUnknown: nothing is pinned. :raises HostKeyChanged: something else is."""
        offered = HostKey(key.get_name(), key.asbytes())
        if not self._pinned:
            raise HostKeyUnknown(
                f"no host key is pinned for {self._target.name}; it offers {offered.type} {offered.fingerprint}",
                hint=f"compare that with the host's console, then pin it: invoke trust {self._target.name}",
            )
        if offered not in self._pinned:
            raise changed(self._target, self._pinned, offered)
        self.accepted = True


def changed(target: SshTarget, pinned: Iterable[HostKey], offered: HostKey) -> HostKeyChanged:
    """The error of a host that offers a key other than the pinned."""
    expected = ", ".join(f"{key.type} {key.fingerprint}" for key in pinned)
    return HostKeyChanged(
        f"THE HOST KEY OF {target.name} HAS CHANGED: pinned is {expected}, offered is "
        f"{offered.type} {offered.fingerprint}",
        hint="nothing was sent. Somebody may stand in between. If the host was reinstalled, compare the offered "
        f"fingerprint with its console, then: invoke trust {target.name}",
    )


# -- paramiko, as we need it ----------------------------------------------------------------------------------


# paramiko gives -1 where a command ended without a status; a signal is told apart by standing below this.
SIGNALLED = -1000


def _on_channel_request(channel: Channel, message: Message) -> None:
    """Note a command's death by a signal (RFC 4254, 6.10), which paramiko drops; leave all else to paramiko."""
    start = message.packet.tell()
    if message.get_text() == "exit-signal":
        message.get_boolean()
        channel.exit_status = SIGNALLED - signal_number(message.get_text())
        channel.status_event.set()
        return
    message.packet.seek(start)
    theirs: Any = channel
    theirs._handle_request(message)


def signal_number(name: str) -> int:
    """The number of a signal that SSH names without its ``SIG`` (RFC 4254, 6.10). Unknown ones count as TERM."""
    try:
        return int(signal.Signals[f"SIG{name.split('@')[0]}"])
    except KeyError:
        return int(signal.SIGTERM)


def _factory(target: SshTarget, pinned: tuple[HostKey, ...]) -> Callable[..., paramiko.Transport]:
    def make(sock: socket.socket, disabled_algorithms: Any = None) -> paramiko.Transport:
        transport = paramiko.Transport(sock, disabled_algorithms=disabled_algorithms)
        transport.handshake_timeout = target.login_timeout
        table: Any = transport  # the table is private to paramiko, and the only place to hook in
        table._channel_handler_table = {
            **table._channel_handler_table,
            MSG_CHANNEL_REQUEST: _on_channel_request,
            MSG_CHANNEL_CLOSE: on_channel_close,
        }
        if pinned:
            # A host with several keys offers the one that the client asks for first: ask for the pinned only.
            wanted = [algorithm for key in pinned for algorithm in ALGORITHMS[key.type]]
            transport.get_security_options().key_types = list(dict.fromkeys(wanted))
        return transport

    return make


def _quiet_log() -> str:
    logging.getLogger(LOG_CHANNEL).setLevel(logging.CRITICAL + 1)
    return LOG_CHANNEL


# -- errors ---------------------------------------------------------------------------------------------------


def explain(
    target: SshTarget, error: Exception, *, late: bool = False, key_seen: bool = False, login: Login | None = None
) -> Exception:
    """What ``error`` of a connection attempt means, in words fit for the user.

    :param late: the whole login's time was up.
    :param key_seen: the host key had been accepted, so the fault lies in the login.
    """
    if isinstance(error, Unreachable):
        return error
    text = str(error) or type(error).__name__
    if key_seen and (late or "timeout" in text.lower()):
        return LoginRefused(
            f"the login on {target} took longer than {target.login_timeout:g} s",
            hint="the host's key was right: is it overloaded, or does its PAM wait for something? (ssh.login_timeout)",
        )
    if late:
        return Unreachable(
            f"{target} took the connection, but the SSH handshake took longer than {target.login_timeout:g} s",
            hint="the port answers: is the host overloaded, or is that not sshd? (ssh.login_timeout)",
        )
    if key_seen and login is not None:
        return login.refused(text)
    if isinstance(error, paramiko.ssh_exception.IncompatiblePeer) and "host key" in text and target.host_keys:
        return changed(target, target.pinned(), HostKey.parse(offered_host_key(target)))
    if isinstance(error, paramiko.ssh_exception.IncompatiblePeer):
        return Unreachable(f"{target} and this machine have no SSH algorithm in common: {text}")
    if "banner" in text or "protocol version" in text:
        return Unreachable(
            f"what answers on port {target.port} of {target.name} ({target.address}) does not speak SSH",
            hint="is the port right? sshd may also be turning new connections away (MaxStartups)",
        )
    return Unreachable(f"the SSH handshake with {target} failed: {text}")
