"""The lab's server programs: each is told from another server at its port, ends with its block, and says why not."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

import pytest

from nixops.errors import HostFault, UsageError
from nixops.lab import process
from nixops.lab.aws import AwsServer
from nixops.lab.openbao import BaoServer
from nixops.lab.process import ServerProgram
from nixops.lab.registry import RegistryServer

PROGRAMS = [AwsServer, BaoServer, pytest.param(RegistryServer, marks=pytest.mark.registry)]


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_server_that_was_quicker_at_the_port_is_not_taken_for_ours(
    program: Callable[..., ServerProgram], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Proves: where another process takes the free port first, and answers there, ours goes to the next; where the port
    was asked for, the start fails with the program's own words."""
    with socket.create_server(("127.0.0.1", 0)) as quicker:
        taken = quicker.getsockname()[1]
        free_port = process.free_port
        ports = [taken]
        monkeypatch.setattr(process, "free_port", lambda bind: ports.pop(0) if ports else free_port(bind))
        with program() as server:
            assert server.port != taken and ports == []
        with pytest.raises(HostFault, match="does not start") as caught, program(port=taken):
            raise AssertionError("it has started on a port that is taken")
    assert "address already in use" in str(caught.value).lower()


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_server_ends_with_its_block_and_leaves_nothing(program: Callable[..., ServerProgram]) -> None:
    with program() as server:
        pid, directory = server.pid, server.directory
        assert server.listens in server.log.read_bytes()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert not directory.exists()
    for ask in (lambda: server.pid, lambda: server.log):
        with pytest.raises(UsageError, match="is not running"):
            ask()
