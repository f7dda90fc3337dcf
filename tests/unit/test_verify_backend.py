"""testinfra over our runner."""

from __future__ import annotations

import shlex
import subprocess
import sys
from dataclasses import dataclass, field

import pytest

from nixops.errors import ConnectionLost
from nixops.transport.command import Command, LineSink, Result
from nixops.verify.backend import RunnerBackend, connect


@dataclass
class Shell:
    """Runs what it is given with this machine's own shell, and remembers it."""

    host: str = "nix-cache02"
    ran: list[Command] = field(default_factory=list)

    def run(self, command: Command, on_line: LineSink | None = None) -> Result:
        del on_line
        self.ran.append(command)
        done = subprocess.run(shlex.split(command.shell_line()), input=command.stdin_bytes, capture_output=True)
        return Result(command, done.returncode, done.stdout, done.stderr, host=self.host)


def test_an_exit_code_of_255_is_a_result() -> None:
    assert connect(Shell()).run("exit 255").rc == 255


@pytest.mark.parametrize("text", ["a b", "it's", '"', "$HOME", "`id`", "%s", "naïve", "a\nb", "-n", ""])
def test_an_argument_arrives_as_it_is(text: str) -> None:
    assert connect(Shell()).run("printf '[%%s]' %s", text).stdout == f"[{text}]"


def test_a_command_without_arguments_keeps_its_percent_signs() -> None:
    assert connect(Shell()).run("printf '%s' hello").stdout == "hello"


def test_bytes_that_are_not_utf_8_are_no_exception() -> None:
    result = connect(Shell()).run(r"printf 'a\377b'")
    assert result.stdout == "a�b"
    assert result.stdout_bytes == b"a\xffb"


def test_commands_run_as_root_with_a_time_out() -> None:
    shell = Shell()
    connect(shell, timeout=7).run("true")
    connect(shell, root=False).run("true")
    assert [(c.root, c.timeout) for c in shell.ran] == [(True, 7), (False, 30.0)]


def test_the_encoding_is_not_asked_of_a_python_on_the_host() -> None:
    shell = Shell()
    assert "ï" in connect(shell).run("printf ï").stdout
    assert len(shell.ran) == 1


def test_testinfra_modules_work_over_it() -> None:
    host = connect(Shell())
    file = host.file("/etc/passwd")
    assert file.is_file
    assert not file.is_directory
    assert file.mode == 0o644
    assert (file.user, file.group) == ("root", "root")
    assert file.contains("^root:")
    assert not host.file("/no/such/file").is_file


def test_root_is_not_gained_a_second_time() -> None:
    backend = RunnerBackend(Shell())
    backend.sudo = True
    assert backend.get_command("id %s", "-u") == "id -u"
    backend.sudo_user = "nobody"
    assert backend.get_command("id") == "sudo -u nobody /bin/sh -c id"


def test_a_lost_connection_is_no_result() -> None:
    class Gone:
        host = "nix-cache02"

        def run(self, command: Command, on_line: LineSink | None = None) -> Result:
            del command, on_line
            raise ConnectionLost("nix-cache02 went away")

    with pytest.raises(ConnectionLost):
        connect(Gone()).run("true")


def test_a_plan_does_not_load_testinfra() -> None:
    code = "import sys, nixops.verify.run; print('testinfra' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
