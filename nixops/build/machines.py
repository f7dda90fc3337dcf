"""Which machines Nix's own distributed build may use: a file in its machines format, for nix itself or its daemon.

Who reads the file makes a difference. Where nix works on the store by itself (root's, or one without a daemon), it
runs ``ssh`` with our configuration, so a line has our name for the builder and nothing else. A daemon runs ``ssh`` as
root and knows nothing of us, so there a line says it all: address, key, host key.
"""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Final

from nixops.build.model import PoolBuilder, Probe
from nixops.errors import HostFault
from nixops.secret import Secret
from nixops.transport.command import Command, Runner
from nixops.transport.scratch import Scratch

# From here on Nix takes a port in the URI of a machine (nix#7044).
_PORTS: Final = (2, 31)


class Worker(Enum):
    """Who builds, and so who starts ``ssh``."""

    NIX = "nix itself"
    DAEMON = "the nix daemon"


@dataclass(frozen=True)
class StoreFacts:
    """How nix on this machine works on its store.

    :ivar trusted: whether the daemon lets us name machines; None where it does not say (before Nix 2.19).
    """

    worker: Worker
    trusted: bool | None


def store_facts(local: Runner) -> StoreFacts:
    """Ask nix how it works on its store.

    :raises HostFault: it works on another machine's, or does not say.
    """
    store = ("nix", "--extra-experimental-features", "nix-command", "store")
    result = local.run(Command.of(*store, "info", "--json", timeout=60.0, title="nix store info"))
    if result.ok:
        try:
            answer = json.loads(result.out)
            return _facts(str(answer["url"]), bool(answer["trusted"]) if "trusted" in answer else None)
        except (ValueError, KeyError, TypeError):
            pass  # a Nix between the versions known: it may still have the older verb
    # Before 2.19 it is called ping, and prints for people.
    older = local.run(Command.of(*store, "ping", timeout=60.0, title="nix store ping"))
    text = f"{older.out}\n{older.err}"
    url = re.search(r"^Store URL: (\S+)", text, re.MULTILINE)
    if not older.ok or url is None:
        raise HostFault("nix on this machine cannot open its store", detail=(older if older.err else result).tail())
    trusted = re.search(r"^Trusted: ([01])", text, re.MULTILINE)
    return _facts(url[1], trusted[1] == "1" if trusted else None)


def _facts(url: str, trusted: bool | None) -> StoreFacts:
    if url.startswith(("daemon", "unix:")):
        return StoreFacts(Worker.DAEMON, trusted)
    if url.startswith(("local", "/", "auto")):
        return StoreFacts(Worker.NIX, True)
    raise HostFault(
        f"nix on this machine works on the store {url}, which shares out its builds itself",
        hint="unset NIX_REMOTE, or build without --distributed",
    )


def unfit(builder: PoolBuilder, worker: Worker, version: tuple[int, int]) -> str | None:
    """Why ``worker`` cannot be told of a builder that can be reached; None where it can.

    :param version: of nix on this machine.
    """
    if worker is Worker.NIX:
        return None
    if builder.target.port != 22 and version < _PORTS:
        return (
            f"it listens on port {builder.target.port}, which the machines file of a nix daemon before 2.31 cannot "
            "say (root, without the daemon, can build there)"
        )
    return None


@contextmanager
def machines_file(probes: Sequence[Probe], worker: Worker, identity: Secret | None = None) -> Iterator[Path]:
    """A machines file of the builders that answered, in a private directory, for as long as the block runs.

    :param identity: the private key for all of them, where the inventory keeps it as a secret. A daemon's ssh reads
        it from memory of this process, so it is in no file and ends with us.
    """
    with ExitStack() as stack:
        directory = Scratch("nixops-machines-", runtime=True)
        stack.callback(directory.remove)
        key: str | None = None
        if identity is not None and worker is Worker.DAEMON:
            key = stack.enter_context(_in_memory(identity))
        lines = [_line(probe.builder, worker, key, directory.path) for probe in probes]
        file = directory.path / "machines"
        file.write_text("".join(line + "\n" for line in lines), encoding="ascii")
        yield file


def machine_uri(builder: PoolBuilder, worker: Worker) -> str:
    """The store URI of a builder in the machines file, which is also how nix's log names it."""
    target = builder.target
    if worker is Worker.NIX:
        return f"ssh-ng://{target.user}@{target.name}"
    place = f"[{target.address}]" if ":" in target.address else str(target.address)
    return f"ssh-ng://{target.user}@{place}" + (f":{target.port}" if target.port != 22 else "")


def _line(builder: PoolBuilder, worker: Worker, key: str | None, directory: Path) -> str:
    target = builder.target
    identity, host_key = "-", "-"
    if worker is Worker.DAEMON:
        identity = key or _linked(target.identity_file, directory / f"identity-{target.name}")
        # One key fits, and OpenSSH prefers ed25519.
        keys = sorted(target.host_keys, key=lambda text: not text.startswith("ssh-ed25519"))
        host_key = base64.b64encode(keys[0].encode()).decode() if keys else "-"
    fields = (
        machine_uri(builder, worker),
        ",".join(builder.systems),
        identity,
        str(builder.max_jobs),
        str(builder.speed_factor),
        ",".join(sorted(builder.features)) or "-",
        ",".join(sorted(builder.mandatory_features)) or "-",
        host_key,
    )
    return " ".join(fields)


def _linked(identity: Path | None, link: Path) -> str:
    """A name without white space for a private key; root reads it through the link."""
    if identity is None:
        return "-"
    link.symlink_to(identity.absolute())
    return str(link)


@contextmanager
def _in_memory(key: Secret) -> Iterator[str]:
    """A path at which root finds ``key`` as long as we live: a file without a directory entry."""
    descriptor = os.memfd_create("nixops-key", os.MFD_CLOEXEC)
    try:
        os.fchmod(descriptor, 0o600)
        text = key.reveal().replace("\r\n", "\n").strip() + "\n"
        os.write(descriptor, text.encode())
        yield f"/proc/{os.getpid()}/fd/{descriptor}"
    finally:
        os.close(descriptor)
