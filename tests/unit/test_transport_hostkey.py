"""Host keys as values, and targets from the inventory."""

from __future__ import annotations

import base64
import subprocess
from pathlib import Path

import pytest

from nixops.errors import InventoryError
from nixops.inventory import model
from nixops.transport.hostkey import HostKey, fingerprint
from nixops.transport.target import SshTarget
from nixops.values import Address, HostName

ED25519 = "ssh-ed25519 " + base64.b64encode(b"\0\0\0\x0bssh-ed25519\0\0\0\x20" + b"k" * 32).decode()


@pytest.mark.parametrize(("kind", "bits"), [("ed25519", "256"), ("rsa", "2048"), ("ecdsa", "384")])
def test_a_fingerprint_is_what_ssh_keygen_prints(tmp_path: Path, kind: str, bits: str) -> None:
    file = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", kind, "-b", bits, "-N", "", "-f", file], check=True)
    listed = subprocess.run(["ssh-keygen", "-l", "-f", file], capture_output=True, text=True, check=True).stdout
    public = file.with_suffix(".pub").read_text()
    assert fingerprint(public) == listed.split()[1]
    assert str(HostKey.parse(public)) == " ".join(public.split()[:2])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not a host key"),
        ("ssh-dss AAAA", "not a host key"),
        ("ssh-ed25519 ????", "not valid base64"),
        ("ssh-ed25519 AAAA", "not that of a ssh-ed25519 key"),
        ("ssh-rsa " + ED25519.split()[1], "not that of a ssh-rsa key"),
    ],
)
def test_what_is_no_key_says_why(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        HostKey.parse(text)


def test_a_target_takes_everything_from_the_inventory(tmp_path: Path) -> None:
    key = ED25519
    host = model.Host(
        address=Address("192.0.2.7"),
        port=2222,
        user="deploy",
        host_key=(f"{key} comment",),
        ssh=model.Ssh(identity_file="keys/id", connect_timeout=1, login_timeout=2, command_timeout=3, keepalive=4),
    )
    target = SshTarget.from_inventory(HostName("web"), host, tmp_path)
    assert target == SshTarget(
        HostName("web"), Address("192.0.2.7"), 2222, "deploy", (key,), tmp_path / "keys/id", 1, 2, 3, 4
    )
    assert str(target) == "web (deploy@192.0.2.7 port 2222)"


def test_a_tilde_in_the_identity_file_is_the_operators_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    host = model.Host(address=Address("192.0.2.7"), ssh=model.Ssh(identity_file="~/.ssh/id"))
    assert SshTarget.from_inventory(HostName("web"), host, Path("/elsewhere")).identity_file == tmp_path / ".ssh/id"


def test_a_pinned_key_that_is_none_is_an_error_of_the_inventory() -> None:
    host = model.Host(address=Address("192.0.2.7"), host_key=("ssh-ed25519 AAAA",))
    with pytest.raises(InventoryError, match=r"hosts\.web\.host_key"):
        SshTarget.from_inventory(HostName("web"), host, Path("/"))
