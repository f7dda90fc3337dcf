"""The lab's network: one bridge per lab, one namespace and one veth pair per host, nothing routed anywhere.

The operator's side is the bridge's own address, so traffic never leaves this machine and no forwarding is needed.
Every name begins with the lab's mark, so that what a killed run left can be found by name alone.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nixops.errors import HostFault
from nixops.lab.machine import run
from nixops.transport.command import Command, Runner

# Set aside for benchmarks between machines of one laboratory (RFC 2544): nobody routes it. 128 labs of 1021 hosts.
RANGE = ipaddress.IPv4Network("198.18.0.0/15")
PREFIX = 22
NAMESPACES = Path("/run/netns")


def mark(lab: str) -> str:
    """What the names of a lab's links and namespaces begin with: a link's name has at most 15 characters."""
    return "nl" + hashlib.sha256(lab.encode()).hexdigest()[:6]


def choose_subnet(lab: str, taken: Iterable[ipaddress.IPv4Network]) -> ipaddress.IPv4Network:
    """A subnet for ``lab`` that overlaps none of ``taken``: the same for the same name, as long as that is free.

    :raises HostFault: all are taken.
    """
    candidates = list(RANGE.subnets(new_prefix=PREFIX))
    busy = list(taken)
    first = int(hashlib.sha256(lab.encode()).hexdigest(), 16) % len(candidates)
    for candidate in candidates[first:] + candidates[:first]:
        if not any(candidate.overlaps(network) for network in busy):
            return candidate
    raise HostFault(f"no subnet of {RANGE} is free for the lab", hint="take other labs down: invoke lab.down --name …")


def subnets_in_use(runner: Runner) -> list[ipaddress.IPv4Network]:
    """Every IPv4 network that this machine has an address in or a route to, but the default route."""
    found: list[ipaddress.IPv4Network] = []
    for link in json.loads(run(runner, "ip", "-json", "-4", "address").out or "[]"):
        for info in link.get("addr_info", ()):
            found.append(ipaddress.IPv4Interface(f"{info['local']}/{info['prefixlen']}").network)
    for route in json.loads(run(runner, "ip", "-json", "-4", "route").out or "[]"):
        if re.match(r"\d", route.get("dst", "")):
            found.append(ipaddress.IPv4Network(route["dst"], strict=False))
    return found


@dataclass(frozen=True)
class Network:
    """The names and addresses of one lab's network. What exists of them, the kernel knows."""

    lab: str
    subnet: ipaddress.IPv4Network

    @property
    def bridge(self) -> str:
        return mark(self.lab)

    @property
    def gateway(self) -> str:
        """The operator's side, on the bridge."""
        return str(self.subnet.network_address + 1)

    @property
    def capacity(self) -> int:
        """How many hosts have an address here."""
        return self.subnet.num_addresses - 3

    def address(self, index: int) -> str:
        """The address of the host with this number, from 0."""
        return str(self.subnet.network_address + 2 + index)

    def link(self, index: int) -> str:
        """The operator's end of a host's veth pair."""
        return f"{mark(self.lab)}-{index}"

    def namespace(self, host: str) -> str:
        return f"{mark(self.lab)}-{host}"

    def create(self, runner: Runner) -> None:
        """Make the bridge. Its hardware address is fixed, or it would change with each host that joins."""
        octets = hashlib.sha256(self.lab.encode()).digest()[:5].hex(":")
        _batch(
            runner,
            f"link add {self.bridge} address 02:{octets} type bridge forward_delay 0 stp_state 0",
            f"link set {self.bridge} addrgenmode none",
            f"address add {self.gateway}/{self.subnet.prefixlen} dev {self.bridge}",
            f"link set {self.bridge} up",
        )

    def attach(self, runner: Runner, host: str, index: int) -> None:
        """Make a host's namespace and plug it in; inside, it is ``eth0`` with its address."""
        namespace, link = self.namespace(host), self.link(index)
        _batch(
            runner,
            f"netns add {namespace}",
            f"link add {link} type veth peer name eth0 netns {namespace}",
            f"link set {link} addrgenmode none master {self.bridge} up",
        )
        _batch(
            runner,
            "link set lo up",
            "link set eth0 addrgenmode none",
            f"address add {self.address(index)}/{self.subnet.prefixlen} dev eth0",
            "link set eth0 up",
            namespace=namespace,
        )

    def cut(self, runner: Runner, index: int, cut: bool) -> None:
        """Pull the plug of a host, or put it back.

        Once it is back the host is found again at once: what this machine asked for in vain while it was out would
        fail for another second or two whoever connects in that time.
        """
        run(runner, "ip", "link", "set", self.link(index), "down" if cut else "up")
        if not cut:
            run(runner, "ip", "neigh", "flush", "to", self.address(index))


def remove_network(runner: Runner, lab: str) -> None:
    """Remove every namespace and link of ``lab``, whatever there is of them."""
    prefix = mark(lab)
    links = [link["ifname"] for link in json.loads(run(runner, "ip", "-json", "link").out or "[]")]
    ours = [name for name in links if name == prefix or name.startswith(f"{prefix}-")]
    _tear_down(runner, [f"link del {name}" for name in sorted(ours, reverse=True)])
    namespaces = [path.name for path in NAMESPACES.glob(f"{prefix}-*")]
    _tear_down(runner, [f"netns del {name}" for name in namespaces])


def _batch(runner: Runner, *lines: str, namespace: str | None = None) -> None:
    inside = ["-netns", namespace] if namespace else []
    run(runner, "ip", *inside, "-batch", "-", stdin="\n".join(lines) + "\n")


def _tear_down(runner: Runner, lines: Sequence[str]) -> None:
    """Run each line though others fail (the far end of a pair is gone with the near one)."""
    if lines:
        runner.run(Command.of("ip", "-force", "-batch", "-", stdin="\n".join(lines) + "\n"))
