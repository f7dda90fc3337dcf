"""Root through sudo: who gets which part of stdin, and what a refusal costs."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from nixops.errors import HostFault, Interrupted, LoginRefused
from nixops.secret import Redactor, Secret
from nixops.transport.command import Command
from nixops.transport.exec import Cancellation, cancellable
from nixops.transport.ssh import SshRunner
from nixops.transport.start import Start
from nixops.transport.sudo import SudoStart
from tests.unit.transport_server import Lab, open_lab


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    with open_lab(tmp_path, monkeypatch) as opened:
        yield opened


def sudo_runner(lab: Lab, password: str | None, redactor: Redactor | None = None) -> SshRunner:
    source = (lambda: Secret(password)) if password is not None else None
    return SshRunner(lab.target, sudo_password=source, redactor=redactor)


PAYLOAD = Command.of("sh", "-c", 'cat; printf %s "$V"; echo err >&2; exit 3', stdin="secret\npayload", root=True)


@pytest.mark.parametrize(
    ("expects", "password"), [("", None), ("", "correct horse"), ("correct horse", "correct horse")]
)
def test_the_payload_gets_its_stdin_variables_and_code_whether_sudo_asks_or_not(
    lab: Lab, expects: str, password: str | None
) -> None:
    lab.server.env["SUDO_EXPECTS"] = expects
    with sudo_runner(lab, password) as runner:
        result = runner.run(replace(PAYLOAD, env={"V": "a 'b'"}))
    assert (result.code, result.stdout, result.stderr) == (3, b"secret\npayloada 'b'", b"err\n")


def test_a_password_that_sudo_does_not_ask_for_never_reaches_the_payload_and_is_never_fetched(lab: Lab) -> None:
    def source() -> Secret:
        raise AssertionError("sudo did not ask")

    with SshRunner(lab.target, sudo_password=source) as runner:
        assert runner.run(Command.of("cat", root=True)).stdout == b""


def test_a_wrong_password_costs_one_try_and_the_payload_is_no_second_guess(lab: Lab) -> None:
    lab.server.env["SUDO_EXPECTS"] = "payload"
    with sudo_runner(lab, "wrong password") as runner:
        for _ in range(2):
            with pytest.raises(LoginRefused, match="did not take the password"):
                runner.run(Command.of("cat", stdin="payload\npayload\n", root=True))
    assert (lab.directory / "sudo.log").read_text() == "wrong password\n"


def test_a_refusal_is_told_without_waiting_for_what_will_not_come(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nixops.transport.sshchannel.GRACE", 30.0)
    lab.server.env["SUDO_EXPECTS"] = "right password"
    with sudo_runner(lab, "wrong password") as runner:
        started = time.monotonic()
        with pytest.raises(LoginRefused):
            runner.run(Command.of("true", root=True))
    assert time.monotonic() - started < 10


def test_a_wrong_password_costs_one_try_even_when_many_ask_at_once(lab: Lab) -> None:
    lab.server.env["SUDO_EXPECTS"] = "right password"
    errors: list[LoginRefused] = []

    with sudo_runner(lab, "wrong password") as runner:

        def work() -> None:
            try:
                runner.run(Command.of("true", root=True))
            except LoginRefused as error:
                errors.append(error)

        threads = [threading.Thread(target=work) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(errors) == 6
    assert (lab.directory / "sudo.log").read_text() == "wrong password\n"


def test_without_a_password_a_sudo_that_wants_one_says_where_to_put_it(lab: Lab) -> None:
    lab.server.env["SUDO_EXPECTS"] = "something"
    with sudo_runner(lab, None) as runner, pytest.raises(LoginRefused) as caught:
        runner.run(Command.of("true", root=True))
    assert "set sudo_password of web" in str(caught.value)
    assert "a password is required" in str(caught.value)


def test_a_host_without_sudo_is_a_host_fault_that_says_where_nixos_has_it(lab: Lab) -> None:
    (lab.directory / "bin" / "sudo").unlink()
    shell = lab.directory / "bin" / "sh"
    shell.symlink_to("/bin/sh")
    lab.server.env["PATH"] = str(shell.parent)
    with sudo_runner(lab, None) as runner, pytest.raises(HostFault, match="/run/wrappers/bin/sudo"):
        runner.run(Command.of("true", root=True))


def test_the_password_is_learned_by_the_redactor(lab: Lab) -> None:
    lab.server.env["SUDO_EXPECTS"] = "correct horse"
    redactor = Redactor()
    with sudo_runner(lab, "correct horse", redactor) as runner:
        runner.run(Command.of("true", root=True)).check()
    assert redactor.clean("the correct horse") == "the ***"


def test_sudos_words_before_the_payload_are_kept_and_its_prompt_is_not() -> None:
    start = SudoStart(Command.of("true", root=True), lambda: Secret("hunter22"))
    prompt = next(part for part in start.shell_line.split() if part.startswith("nixops-password-"))
    marker = next(part for part in start.shell_line.split() if part.startswith("nixops-entered-"))
    assert start.stderr(b"sudo: unable to resolve host\n" + prompt[:9].encode()) == b""
    assert start.stderr(prompt[9:].encode()) == b""
    assert next(start.stdin([])) == b"hunter22\n"
    assert start.stderr(f"{marker} 42\nthe payload's".encode()) == b"sudo: unable to resolve host\nthe payload's"
    assert start.group == 42
    assert "hunter22" not in start.shell_line


def test_a_sudo_that_nobody_waits_for_any_more_gets_no_password_and_its_payload_no_empty_stdin() -> None:
    def password() -> Secret:
        raise AssertionError("asked for in vain")

    asks = SudoStart(Command.of("true", root=True), password)
    prompt = next(part for part in asks.shell_line.split() if part.startswith("nixops-password-"))
    asks.abandon()
    assert not asks.settled
    assert asks.stderr(prompt.encode()) == b""
    assert asks.settled and not asks.entered
    with pytest.raises(Interrupted):
        next(asks.stdin([b"payload"]))


def test_a_sudo_that_lets_in_what_nobody_waits_for_says_whom_to_stop() -> None:
    late = SudoStart(Command.of("true", root=True), None)
    marker = next(part for part in late.shell_line.split() if part.startswith("nixops-entered-"))
    late.abandon()
    late.stderr(f"{marker} 42\n".encode())
    assert late.settled and late.group == 42


@pytest.mark.parametrize("expects", ["", "correct horse"])
def test_what_sudo_lets_in_after_it_was_cancelled_is_stopped(
    lab: Lab, expects: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The password is on its way, or none is needed: sudo cannot be told that nobody waits any more."""
    monkeypatch.setattr("nixops.transport.sshchannel.GRACE", 5.0)
    lab.server.env["SUDO_EXPECTS"] = expects
    seen = lab.directory / "seen"
    script = f"trap 'echo stopped >>{seen}; exit' TERM; echo begun >>{seen}; sleep 60 & wait"
    switch = Cancellation()
    with sudo_runner(lab, expects or None) as runner:
        runner.run(Command.of("true", root=True))
        lab.server.env["SUDO_SLOW"] = "1"
        slow = lab.directory / "sudo.log.slow"

        def cancel_in_time() -> None:
            while not slow.exists():
                time.sleep(0.01)
            switch.cancel()

        threading.Thread(target=cancel_in_time, daemon=True).start()
        with cancellable(switch), pytest.raises(Interrupted):
            runner.run(Command.of("sh", "-c", script, root=True))
    assert seen.read_text() == "begun\nstopped\n"


def test_a_payload_whose_beginning_nobody_hears_does_not_run(tmp_path: Path) -> None:
    line = Start(Command.of("touch", str(tmp_path / "ran"))).shell_line
    reader, writer = os.pipe()
    os.close(reader)
    subprocess.run(["sh", "-c", line], stderr=writer, check=False)
    os.close(writer)
    assert not (tmp_path / "ran").exists()
    assert subprocess.run(["sh", "-c", line], capture_output=True, check=True).stdout == b""
    assert (tmp_path / "ran").exists()


def test_a_fresh_connection_does_not_try_a_refused_password_again(lab: Lab) -> None:
    lab.server.env["SUDO_EXPECTS"] = "right password"
    with sudo_runner(lab, "wrong password") as runner, runner.fresh() as fresh:
        for each in (runner, fresh):
            with pytest.raises(LoginRefused, match="did not take the password"):
                each.run(Command.of("true", root=True))
    assert (lab.directory / "sudo.log").read_text() == "wrong password\n"
