"""Pinning a host's key: what the host offers is compared, confirmed by a person, and written to the inventory."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nixops.errors import Declined, HostKeyChanged, UsageError
from nixops.inventory.edit import write_host_key
from nixops.inventory.load import Loaded, load, locate
from nixops.transport.hostkey import HostKey
from nixops.ui.question import answered_yes
from nixops.values import HostName


@dataclass(frozen=True)
class Offer:
    """The key that a host offers now, beside those that the inventory pins.

    :ivar key: ``type base64``.
    :ivar pinned: the pinned keys, ``type base64`` each.
    """

    host: HostName
    key: str
    pinned: tuple[str, ...]

    @property
    def known(self) -> bool:
        """Whether the offered key is pinned already."""
        return self.key in self.pinned

    @property
    def fingerprint(self) -> str:
        """``SHA256:…`` of the offered key, as ``ssh-keygen -l`` prints it."""
        return HostKey.parse(self.key).fingerprint

    @property
    def pinned_fingerprints(self) -> tuple[str, ...]:
        return tuple(HostKey.parse(key).fingerprint for key in self.pinned)


def offer(loaded: Loaded, name: str, fetch: Callable[[], str]) -> Offer:
    """What a host offers.

    :param fetch: asks the host (:func:`nixops.transport.ssh.offered_host_key`).
    :raises Unreachable: when it cannot be asked.
    """
    host_name, host = loaded.host(name)
    pinned = tuple(" ".join(key.split()[:2]) for key in host.host_key)
    return Offer(host_name, " ".join(fetch().split()[:2]), pinned)


def pin(
    loaded: Loaded,
    offered: Offer,
    *,
    fingerprint: str | None,
    yes: bool,
    replace: bool,
    ask: Callable[[str], bool],
) -> bool:
    """Write the offered key into the inventory, if it is the one expected. ``False`` when it is pinned already.

    :param fingerprint: the fingerprint that the key must have, learned on another way (the host's console).
    :param yes: do not ask; needs ``fingerprint``, since somebody has to vouch for the key.
    :param replace: replace other pinned keys.
    :raises HostKeyChanged: the key is not the expected one, or another one is pinned and ``replace`` is not set.
    :raises Declined: the answer was no.
    :raises UsageError: ``yes`` without ``fingerprint``.
    """
    if yes and fingerprint is None:
        raise UsageError(
            "--yes needs --fingerprint: a key that nobody compared proves nothing",
            hint=f"on the console of {offered.host}: ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub",
        )
    if fingerprint is not None and not _same_fingerprint(fingerprint, offered.fingerprint):
        raise HostKeyChanged(
            f"{offered.host} offers {offered.fingerprint}, not {fingerprint}; nothing was written",
            hint="somebody may stand in between: compare with ssh-keygen -lf on the host's own console",
        )
    if offered.known:
        return False
    if offered.pinned and not replace:
        raise HostKeyChanged(
            f"{offered.host} offers {offered.fingerprint}, but the inventory pins "
            f"{', '.join(offered.pinned_fingerprints)}; nothing was written",
            hint="if the host was reinstalled, compare on its console and add --replace; else somebody is in between",
        )
    if not yes and not ask(f"Pin {offered.fingerprint} for {offered.host}?"):
        raise Declined("not pinned: the answer was no; nothing was changed")
    write_host_key(loaded, offered.host, offered.key)
    return True


def _same_fingerprint(given: str, actual: str) -> bool:
    """Equal, with or without ``SHA256:`` and padding, as different tools print it."""
    return given.strip().removeprefix("SHA256:").rstrip("=") == actual.removeprefix("SHA256:")


# -- the task -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrustOptions:
    """The flags of the task."""

    host: str
    fingerprint: str | None = None
    yes: bool = False
    replace: bool = False
    inventory: str = "inventory/hosts.yml"


def trust_host(options: TrustOptions, *, ask: Callable[[str], bool] | None = None) -> None:
    """Fetch the key a host offers, show it, and pin it.

    :param ask: puts a question to the operator; by default on the terminal.
    :raises Unreachable: the host cannot be asked; see :func:`pin` for the others.
    """
    from nixops.transport.ssh import offered_host_key
    from nixops.transport.target import SshTarget

    loaded = load(locate(options.inventory, Path.cwd()))
    name, host = loaded.host(options.host)
    target = SshTarget.from_inventory(name, host, loaded.base)
    offered = offer(loaded, name, lambda: offered_host_key(target))
    print(f"{target} offers {offered.key.split()[0]} {offered.fingerprint}", file=sys.stderr)
    for fingerprint in offered.pinned_fingerprints:
        print(f"{loaded.file} pins {fingerprint}", file=sys.stderr)
    written = pin(
        loaded,
        offered,
        fingerprint=options.fingerprint,
        yes=options.yes,
        replace=options.replace,
        ask=ask or ask_on_terminal,
    )
    done = f"pinned in {loaded.file}" if written else f"pinned already in {loaded.file}; nothing changed"
    print(f"{name}: {offered.fingerprint} {done}")


def ask_on_terminal(question: str) -> bool:
    """Whether the operator says yes.

    :raises UsageError: stdin is no terminal, so nobody can be asked.
    """
    if not sys.stdin.isatty():
        raise UsageError(
            "nobody can be asked whether the key is right: stdin is not a terminal",
            hint="say --yes --fingerprint SHA256:…",
        )
    return answered_yes(f"{question} Compare it with ssh-keygen -lf on the host's console.")
