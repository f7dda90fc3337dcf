"""What lab tests share: ways to reach a lab host, to give it something to build, and to look at it from outside."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from nixops.lab.lab import LabHost
from nixops.lab.recipe import TOOLS, sudo_password
from nixops.secret import Secret
from nixops.transport.ssh import SshRunner
from nixops.transport.target import SshTarget
from nixops.values import Address, HostName

SYSTEM: Final = f"{os.uname().machine}-linux"
# Nothing may wait for a substituter that is not there.
OFFLINE: Final = {"NIX_CONFIG": "substituters ="}


def target_of(host: LabHost) -> SshTarget:
    """A lab host as an inventory could describe it, with short bounds."""
    return SshTarget(
        HostName(host.name),
        Address(host.address),
        port=host.port,
        user=host.user,
        host_keys=(" ".join(host.host_key.split()[:2]),),
        identity_file=host.identity_file,
        connect_timeout=5.0,
        login_timeout=15.0,
        keepalive=1.0,
    )


def runner_of(host: LabHost) -> SshRunner:
    return SshRunner(target_of(host), sudo_password=lambda: Secret(sudo_password()))


def write_flake(directory: Path, text: str) -> str:
    """Write a flake whose paths are new to every store (``@salt@``), for this machine's system (``@system@``).

    :returns: its reference.
    """
    directory.mkdir(parents=True, exist_ok=True)
    salted = text.replace("@system@", SYSTEM).replace("@salt@", os.urandom(8).hex())
    (directory / "flake.nix").write_text(salted, encoding="utf-8")
    return f"path:{directory}"


def processes(host: LabHost, words: str = "") -> list[str]:
    """Command lines on the host that contain ``words``. An awkward host has no ps on its PATH."""
    lines = host.exec(f"{TOOLS}/ps", "-eww", "-o", "args=").stdout.decode(errors="replace").splitlines()
    return [line for line in lines if words in line]


def has(host: LabHost, path: str) -> bool:
    """Whether a store path is valid on a host."""
    return host.exec("nix-store", "--check-validity", path, check=False).returncode == 0


def eventually(condition: Callable[[], object], seconds: float = 60.0) -> bool:
    """Whether ``condition`` holds within that time; by default one in which also a busy machine gets there."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.1)
    return bool(condition())


def wait_for(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Wait until ``condition`` holds, and fail where it does not."""
    assert eventually(condition, seconds), f"not within {seconds} s: {what}"
