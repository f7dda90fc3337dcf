"""From a target to a login: every hop that can fail, each with its own error."""

from __future__ import annotations

import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import paramiko
import pytest

from nixops.errors import HostKeyChanged, HostKeyUnknown, LoginRefused, Unreachable
from nixops.transport.ssh import fingerprint, offered_host_key, reachable
from nixops.values import Address
from tests.unit.transport_server import Lab, keys, open_lab, text, write_key


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    with open_lab(tmp_path, monkeypatch) as opened:
        yield opened


def test_hop_1_a_name_that_does_not_resolve(lab: Lab) -> None:
    with pytest.raises(Unreachable, match=r"no-such-host\.invalid of web does not resolve"):
        reachable(replace(lab.target, address=Address("no-such-host.invalid")))


def test_hop_2_nothing_listens(lab: Lab) -> None:
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        port = unheard.getsockname()[1]
        with pytest.raises(Unreachable, match="connection refused") as caught:
            reachable(replace(lab.target, port=port))
    assert f"port {port}" in str(caught.value)
    assert "is sshd running" in str(caught.value)


def test_hop_2_no_answer_in_time(lab: Lab) -> None:
    # A full backlog drops further SYNs, as a host does that is not there.
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
        started = time.monotonic()
        with pytest.raises(Unreachable, match=r"no answer within 0\.5 s"):
            reachable(replace(lab.target, port=full.getsockname()[1], connect_timeout=0.5))
        assert time.monotonic() - started < 2
        for filler in fillers:
            filler.close()


@pytest.mark.parametrize("greeting", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b""])
def test_hop_3_what_answers_does_not_speak_ssh(lab: Lab, greeting: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:

        def answer() -> None:
            connection, _ = other.accept()
            connection.sendall(greeting)
            connection.close()

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(Unreachable, match="does not speak SSH"):
            reachable(replace(lab.target, port=other.getsockname()[1]))


def test_hop_3_what_answers_says_nothing(lab: Lab) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        with pytest.raises(Unreachable, match=r"longer than 0\.5 s|does not speak SSH"):
            reachable(replace(lab.target, port=silent.getsockname()[1], login_timeout=0.5))
        assert time.monotonic() - started < 3


def test_hop_4_an_unpinned_key_is_shown_and_refused(lab: Lab) -> None:
    with pytest.raises(HostKeyUnknown) as caught:
        reachable(replace(lab.target, host_keys=()))
    assert fingerprint(text(keys()["host"])) in str(caught.value) or fingerprint(text(keys()["rsa"])) in str(
        caught.value
    )
    assert "invoke trust web" in str(caught.value)
    assert lab.server.logins == 0


def test_hop_4_a_changed_key_is_refused_with_both_fingerprints(lab: Lab) -> None:
    with pytest.raises(HostKeyChanged) as caught:
        reachable(replace(lab.target, host_keys=(text(keys()["wrong"]),)))
    for key in ("wrong", "host"):
        assert fingerprint(text(keys()[key])) in str(caught.value)
    assert "HAS CHANGED" in str(caught.value)
    assert lab.server.logins == 0


def test_hop_4_a_pinned_type_that_the_host_has_no_more_is_a_change(lab: Lab) -> None:
    lab.server.keys = [keys()["rsa"]]
    with pytest.raises(HostKeyChanged) as caught:
        reachable(lab.target)
    for key in ("rsa", "host"):
        assert fingerprint(text(keys()[key])) in str(caught.value)


def test_a_host_with_several_keys_offers_the_pinned_one(lab: Lab) -> None:
    for name in ("rsa", "host"):
        reachable(replace(lab.target, host_keys=(text(keys()[name]),)))


def test_any_of_several_pinned_keys_of_one_type_will_do(lab: Lab) -> None:
    reachable(replace(lab.target, host_keys=(text(keys()["wrong"]), text(keys()["host"]))))


def test_the_offered_key_can_be_asked_for_without_a_login(lab: Lab) -> None:
    offered = offered_host_key(replace(lab.target, host_keys=(), identity_file=None))
    assert offered in (text(keys()["host"]), text(keys()["rsa"]))
    assert lab.server.logins == 0


def test_hop_5_a_refused_key_is_named(lab: Lab) -> None:
    other = write_key(keys()["other"], lab.directory / "other")
    with pytest.raises(LoginRefused) as caught:
        reachable(replace(lab.target, identity_file=other))
    assert f"{other} {fingerprint(text(keys()['other']))}" in str(caught.value)


def test_hop_5_an_encrypted_key_without_an_agent_says_what_to_do(lab: Lab) -> None:
    path = lab.directory / "encrypted"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "passphrase", "-f", path], check=True)
    with pytest.raises(LoginRefused, match="is encrypted") as caught:
        reachable(replace(lab.target, identity_file=path))
    assert "ssh-add" in str(caught.value)


def test_an_encrypted_key_is_used_out_of_the_agent(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    path = lab.directory / "encrypted"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "passphrase", "-f", path], check=True)
    decrypted = lab.directory / "plain"
    decrypted.write_bytes(path.read_bytes())
    decrypted.chmod(0o600)
    subprocess.run(["ssh-keygen", "-q", "-p", "-P", "passphrase", "-N", "", "-f", decrypted], check=True)
    lab.server.admitted = [paramiko.PKey.from_path(decrypted)]
    sock = lab.directory / "agent"
    agent = subprocess.Popen(["ssh-agent", "-D", "-a", sock], stdout=subprocess.DEVNULL)
    try:
        while not sock.exists():
            time.sleep(0.02)
        monkeypatch.setenv("SSH_AUTH_SOCK", str(sock))
        subprocess.run(["ssh-add", "-q", decrypted], check=True, stderr=subprocess.DEVNULL)
        reachable(replace(lab.target, identity_file=path))
    finally:
        agent.terminate()
        agent.wait()
    assert lab.server.logins == 1


def test_default_keys_are_found_in_the_operators_home(lab: Lab) -> None:
    directory = lab.directory / "home" / ".ssh"
    directory.mkdir(parents=True)
    write_key(keys()["login"], directory / "id_ecdsa")
    reachable(replace(lab.target, identity_file=None))
    assert lab.server.logins == 1


def test_hop_5_no_key_at_all_says_where_to_name_one(lab: Lab) -> None:
    with pytest.raises(LoginRefused, match="there is no key to try") as caught:
        reachable(replace(lab.target, identity_file=None))
    assert "hosts.web.ssh.identity_file" in str(caught.value)


def test_hop_5_a_key_that_others_may_read_is_refused(lab: Lab) -> None:
    assert lab.target.identity_file is not None
    lab.target.identity_file.chmod(0o644)
    with pytest.raises(LoginRefused, match="others may read"):
        reachable(lab.target)


def test_hop_5_a_host_that_wants_a_second_factor(lab: Lab) -> None:
    lab.server.also_wants = "keyboard-interactive"
    with pytest.raises(LoginRefused, match="keyboard-interactive"):
        reachable(lab.target)


def test_the_operators_own_ssh_configuration_is_not_read(lab: Lab) -> None:
    directory = lab.directory / "home" / ".ssh"
    directory.mkdir(parents=True)
    (directory / "config").write_text("Host *\n  HostName 192.0.2.1\n  Port 1\n  User nobody\n  ProxyCommand false\n")
    (lab.directory / "home" / ".fabric.yml").write_text("user: nobody\nport: 1\ngateway: nobody@192.0.2.1\n")
    reachable(lab.target)
    assert lab.server.logins == 1
