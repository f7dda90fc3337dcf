"""OpenSshFiles: what real ssh makes of them (``ssh -G``), and that they are private and go away."""

from __future__ import annotations

import base64
import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from nixops.errors import HostFault, HostKeyUnknown, LoginRefused
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


def test_hosts_whose_names_differ_in_case_alone_do_not_pass_for_each_other() -> None:
    """ssh looks up keys without regard to case, and a name in EC2 or in a machines file is nobody's to guard."""
    other = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAqt16V6G0qKcT6D39YUHzI+3tuqFe2e4XYfp4KVZysp"
    twins = [replace(target(), name=HostName("web")), replace(target(), name=HostName("WEB"), host_keys=(other,))]
    with OpenSshFiles(twins) as files:
        for twin in twins:
            alias = understood(files, twin.name)["hostkeyalias"]
            argv = ["ssh-keygen", "-F", alias, "-f", str(files.known_hosts)]
            found = subprocess.run(argv, capture_output=True, text=True, check=True).stdout.splitlines()
            keys = [" ".join(line.split()[1:3]) for line in found if not line.startswith("#")]
            assert keys == list(twin.host_keys)


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


def test_a_shared_connection_has_a_short_path_of_each_hosts_own() -> None:
    with OpenSshFiles([target("one"), target("two")], shared=True) as files:
        paths = [understood(files, name)["controlpath"] for name in ("one", "two")]
        assert paths == [str(files.control(HostName(name))) for name in ("one", "two")]
        assert len(set(paths)) == 2
        # The master's own name has 5 more, and ssh adds 17 while it makes it; 104 is the least that a system allows.
        assert all(len(path) + 5 + 17 < 104 for path in paths)
        assert understood(files, "one")["controlmaster"] == "false"
        assert "controlpath" not in understood(files, "elsewhere")


def test_a_path_too_long_for_a_socket_is_told_before_anything_connects(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 60)
    long.mkdir()
    with (
        pytest.raises(HostFault, match="too long a path"),
        OpenSshFiles([target()], shared=True, parent=long),
    ):
        pass
    with OpenSshFiles([target()], parent=long) as files:
        assert files.directory.parent == long
    spaced = tmp_path / "a b"
    spaced.mkdir()
    with pytest.raises(HostFault, match="plain name"), OpenSshFiles([target()], parent=spaced):
        pass


def test_with_an_agent_of_ours_no_file_and_no_other_agent_is_asked(tmp_path: Path) -> None:
    with OpenSshFiles([target(identity_file=tmp_path / "none")], agent=tmp_path / "agent") as files:
        read = understood(files, "web")
        assert read["identityagent"] == str(tmp_path / "agent")
        assert read["identityfile"] == "none"


@pytest.fixture
def wrapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[OpenSshFiles]:
    """Files whose ``ssh`` for nix runs a program that prints its arguments."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin/ssh"
    program.write_text('#!/bin/sh\nprintf "[%s]" "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    with OpenSshFiles([target()], shared=True) as files:
        yield files


def as_nix(files: OpenSshFiles, *arguments: str) -> tuple[int, str]:
    """Run ``ssh`` as a nix with these files would find it."""
    env = {**os.environ, **files.nix_env()}
    found = shutil.which("ssh", path=env["PATH"])
    assert found is not None and found.startswith(str(files.directory))
    done = subprocess.run(["ssh", *arguments], env=env, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout


STARTED = ("-oPermitLocalCommand=yes", "-oLocalCommand=echo started")


def test_nix_is_told_that_there_is_no_shared_connection_and_gets_its_word_once(wrapped: OpenSshFiles) -> None:
    """As Nix 2.15 and newer call it: first whether there is a master, then the command."""
    assert as_nix(wrapped, "root@web", "-x", "-T", *STARTED, "-O", "check") == (255, "")
    code, out = as_nix(wrapped, "root@web", "-x", "-T", *STARTED, "--", "nix-daemon", "--stdio")
    assert code == 0
    word, _, called = out.partition("\n")
    assert word == "started"
    assert called.startswith("[-oPermitLocalCommand=no][root@web][-x][-T]")
    assert called.endswith("[--][nix-daemon][--stdio]")


def test_an_older_nix_gets_no_word_that_it_did_not_ask_for(wrapped: OpenSshFiles) -> None:
    assert as_nix(wrapped, "web", "-x", "nix-daemon --stdio")[1] == (
        "[-oPermitLocalCommand=no][web][-x][nix-daemon --stdio]"
    )


@pytest.mark.parametrize("own", [("-M", "-N"), ("-S", "/tmp/x"), ("-oControlPath=none",)])
def test_a_connection_that_nix_shares_by_itself_is_left_alone(wrapped: OpenSshFiles, own: tuple[str, ...]) -> None:
    code, out = as_nix(wrapped, "web", *STARTED, *own)
    assert (code, out) == (0, "".join(f"[{argument}]" for argument in ("web", *STARTED, *own)))


def test_where_no_program_can_be_run_nix_connects_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.statvfs

    class NoExec:
        f_flag = os.ST_NOEXEC

    monkeypatch.setattr(os, "statvfs", lambda path: NoExec if "nixops-ssh-" in str(path) else real(path))
    with OpenSshFiles([target()], shared=True) as files:
        assert files.nix_env() == {"NIX_SSHOPTS": f"-F {files.config} -oControlPath=none"}
