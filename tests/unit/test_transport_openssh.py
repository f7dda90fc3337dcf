"""OpenSshFiles: what real ssh makes of them (``ssh -G``), and that they are private and go away."""

from __future__ import annotations

import base64
import stat
import subprocess
from pathlib import Path

import pytest

from nixops.errors import HostKeyUnknown, LoginRefused
from nixops.transport.openssh import OpenSshFiles
from nixops.transport.target import SshTarget
from nixops.values import Address, HostName

KEY = "ssh-ed25519 " + base64.b64encode(b"\0\0\0\x0bssh-ed25519\0\0\0\x20" + b"k" * 32).decode()


def target(name: str = "web", address: str = "192.0.2.7", **options: object) -> SshTarget:
    return SshTarget(HostName(name), Address(address), host_keys=(KEY,), **options)  # type: ignore[arg-type]  # any field


def understood(files: OpenSshFiles, name: str) -> dict[str, str]:
    """What ssh itself reads out of the config for a host."""
    out = subprocess.run(["ssh", "-G", "-F", files.config, name], capture_output=True, text=True, check=True).stdout
    return dict(line.split(" ", 1) for line in out.splitlines() if " " in line)


def test_ssh_reads_the_trust_policy_and_the_way_to_the_host() -> None:
    with OpenSshFiles([target(port=2222, user="deploy", connect_timeout=1.5, keepalive=7.0)]) as files:
        read = understood(files, "web")
        assert read["hostname"] == "192.0.2.7"
        assert (read["port"], read["user"], read["hostkeyalias"]) == ("2222", "deploy", "web")
        assert read["userknownhostsfile"] == str(files.known_hosts)
        assert read["globalknownhostsfile"] == "/dev/null"
        assert read["stricthostkeychecking"] in ("true", "yes")
        assert read["batchmode"] == "yes"
        assert (read["connecttimeout"], read["serveraliveinterval"], read["serveralivecountmax"]) == ("2", "7", "3")
        assert (read["controlmaster"], read["forwardagent"]) == ("false", "no")
        assert files.known_hosts.read_text() == f"web {KEY}\n"


def test_hosts_at_one_address_keep_their_own_ports_and_keys() -> None:
    with OpenSshFiles([target("one", port=2201), target("two", port=2202)]) as files:
        assert [understood(files, name)["port"] for name in ("one", "two")] == ["2201", "2202"]
        assert [line.split()[0] for line in files.known_hosts.read_text().splitlines()] == ["one", "two"]


def test_a_host_that_is_not_of_the_inventory_has_no_key_to_be_known_by() -> None:
    with OpenSshFiles([target()]) as files:
        read = understood(files, "elsewhere")
        assert read["stricthostkeychecking"] in ("true", "yes")
        assert read["userknownhostsfile"] == str(files.known_hosts)
        assert read["globalknownhostsfile"] == "/dev/null"


def test_an_ipv6_scope_is_not_taken_for_a_token() -> None:
    with OpenSshFiles([target(address="fe80::1%eth0")]) as files:
        assert understood(files, "web")["hostname"] == "fe80::1%eth0"


def test_an_identity_whose_path_would_need_quoting_is_reached_through_a_link(tmp_path: Path) -> None:
    identity = tmp_path / 'my "key" %h ${HOME}'
    identity.write_text("key")
    identity.with_name(identity.name + ".pub").write_text("public")
    with OpenSshFiles([target(identity_file=identity)]) as files:
        read = understood(files, "web")
        assert read["identitiesonly"] == "yes"
        link = Path(read["identityfile"])
        assert (link.resolve(), link.read_text()) == (identity.resolve(), "key")
        assert Path(f"{link}.pub").read_text() == "public"


def test_a_missing_identity_is_told_before_nix_runs(tmp_path: Path) -> None:
    with pytest.raises(LoginRefused, match="is not there"), OpenSshFiles([target(identity_file=tmp_path / "none")]):
        pass


def test_a_host_without_a_pinned_key_is_refused_before_nix_runs() -> None:
    with pytest.raises(HostKeyUnknown, match="invoke trust web"):
        OpenSshFiles([SshTarget(HostName("web"), Address("192.0.2.7"))])


def test_the_directory_is_private_has_no_spaces_and_goes_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spaced = tmp_path / "with a space"
    spaced.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(spaced))
    with OpenSshFiles([target()]) as files:
        directory = files.directory
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        assert files.nix_env() == {"NIX_SSHOPTS": f"-F {files.config}"}
        assert len(files.nix_env()["NIX_SSHOPTS"].split()) == 2
    assert not directory.exists()
    with pytest.raises(RuntimeError):
        _ = files.config
