"""What a host says of itself is taken as far as it can be."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from nixops.deploy.host import read_facts
from nixops.errors import HostFault
from nixops.transport.command import Command, LineSink, Result

SYSTEM = "/nix/store/0pfii804jlmidqdpln779dyal36pz07s-nixos-system-h"
FACTS = f"running={SYSTEM}\nbooted=\nprofile={SYSTEM}\ngeneration=system-3-link\nboot_id=b\ntools={SYSTEM}/sw/bin\n"


@dataclass
class Host:
    """A host that answers every command with one text."""

    said: bytes
    host: str = "h"

    def run(self, command: Command, on_line: LineSink | None = None) -> Result:
        assert on_line is None
        return Result(command, 0, self.said, b"", host=self.host)


def test_the_revision_of_a_checkout_is_kept() -> None:
    assert read_facts(Host(f"{FACTS}revision=5f1c0de-dirty\n".encode())).revision == "5f1c0de-dirty"


@pytest.mark.parametrize("revision", [b"", b"\x1b[2J", b'"; x', b"x" * 1000, b"\xff\xfe", b"a b"])
def test_what_is_no_revision_is_none(revision: bytes) -> None:
    """It would become part of an evaluation and of its command line."""
    assert read_facts(Host(FACTS.encode() + b"revision=" + revision + b"\n")).revision is None


def test_what_is_no_store_path_is_refused() -> None:
    with pytest.raises(HostFault, match="does not look like a NixOS host"):
        read_facts(Host(FACTS.encode() + b"running=/nix/store/\x1b[2J\n"))
