"""Delivering a host's AppRole: the script runs for real against the real OpenBao, as root in a directory of its own.

Without root it runs as root of a user namespace.
"""

from __future__ import annotations

import os
import shutil
import socket
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from nixops.errors import ConnectionLost, HostFault, UsageError, VaultError
from nixops.lab.openbao import BaoServer
from nixops.secret import Redactor, Secret
from nixops.transport.command import Command, LineSink, Result
from nixops.transport.local import LocalRunner
from nixops.values import AbsolutePath, HostName, VaultPath
from nixops.vault.approle import HostRoles, RoleState, WrappedSecretId
from nixops.vault.deliver import (
    Delivered,
    HostAppRole,
    approle_delivered,
    deliver_approle,
    settle_approle,
    withdraw_approle,
)
from nixops.vault.openbao import OpenBao
from nixops.vault.settings import AppRoleLogin, BaoSettings, TokenLogin

HOST = HostName("nix-cache02")
# By its path: some tests leave nothing on the PATH.
UNSHARE = shutil.which("unshare") or "unshare"
FILES = ("role-id", "secret-id", "secret-id-accessor")


class AsRoot:
    """A host's runner on this machine: root as root, and else root of a user namespace."""

    host = "nix-cache02"

    def __init__(self, *prefix: str, shell: str = "sh") -> None:
        self._prefix = prefix if os.geteuid() == 0 else (UNSHARE, "--user", "--map-root-user", *prefix)
        self._shell = shell
        self._local = LocalRunner()

    def run(self, command: Command, on_line: LineSink | None = None) -> Result:
        assert command.root
        assert command.argv[0] == "sh"
        argv = (*self._prefix, self._shell, *command.argv[1:])
        return self._local.run(replace(command, argv=argv, root=False), on_line)


@pytest.fixture(scope="module")
def server() -> Iterator[BaoServer]:
    with BaoServer() as running:
        yield running


@pytest.fixture(scope="module")
def roles(server: BaoServer) -> HostRoles:
    return HostRoles(OpenBao(BaoSettings(server.address, TokenLogin(server.root_token)), Redactor()))


@pytest.fixture(scope="module")
def role(roles: HostRoles) -> RoleState:
    return roles.ensure(HOST)


@pytest.fixture
def directory(tmp_path: Path) -> AbsolutePath:
    return AbsolutePath(str(tmp_path / "vault" / "approle"))


@pytest.fixture
def wrapped(roles: HostRoles, role: RoleState) -> WrappedSecretId:
    return roles.wrap_secret_id(HOST)


Deliver = Callable[..., Delivered]


@pytest.fixture
def deliver(server: BaoServer, roles: HostRoles, role: RoleState, directory: AbsolutePath) -> Deliver:
    """Deliver with the usual arguments, any of which can be given otherwise."""

    def go(wrapped: WrappedSecretId, runner: AsRoot | None = None, **given: object) -> Delivered:
        arguments: dict[str, object] = {
            "directory": directory,
            "address": server.address,
            "namespace": None,
            "host_ca_file": None,
            "role_id": role.role_id,
            "wrapped": wrapped,
            "destroy": lambda: roles.destroy_secret_id(HOST, wrapped.accessor),
            **given,
        }
        return deliver_approle(runner or AsRoot(), **arguments)  # type: ignore[arg-type]  # checked where it is called

    return go


def modes(directory: str) -> dict[str, str]:
    root = Path(directory)
    return {p.name: oct(stat.S_IMODE(p.lstat().st_mode)) for p in (root, *root.iterdir())}


def logs_in(server: BaoServer, directory: str) -> bool:
    """Whether the two files, exactly as they are, log in."""
    role_id, secret_id = (Path(directory, name).read_text() for name in FILES[:2])
    assert role_id == role_id.strip()
    assert secret_id == secret_id.strip()
    login = AppRoleLogin(Secret(role_id), Secret(secret_id))
    try:
        with OpenBao(BaoSettings(server.address, login), Redactor()) as bao:
            bao.read(VaultPath(f"hosts/{HOST}/token"))
    except VaultError:
        return False
    return True


# -- leaks first ----------------------------------------------------------------------------------------------


class Watch:
    """Samples the command line and environment of every process, as often as it can."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self.seen: set[bytes] = set()
        self.sweeps = 0

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        mine = Path("/proc", str(os.getpid()))
        while not self._stop.is_set():
            for process in Path("/proc").glob("[0-9]*"):
                if process == mine:
                    continue
                for name in ("cmdline", "environ"):
                    try:
                        self.seen.add((process / name).read_bytes())
                    except OSError:
                        continue
            self.sweeps += 1

    def saw(self, text: str) -> bool:
        return any(text.encode() in blob for blob in self.seen.copy())

    def look(self) -> None:
        """Wait until every process that runs now has been looked at."""
        wanted, end = self.sweeps + 2, time.monotonic() + 60
        while self.sweeps < wanted:
            assert time.monotonic() < end
            time.sleep(0.02)


class SlowProxy:
    """Passes TCP connections on after ``look``, so that what talks through it can be watched."""

    def __init__(self, port: int, look: Callable[[], object]) -> None:
        self._to = port
        self._look = look
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._look()
            server = socket.create_connection(("127.0.0.1", self._to))
            for one, other in ((client, server), (server, client)):
                threading.Thread(target=self._pump, args=(one, other), daemon=True).start()

    @staticmethod
    def _pump(one: socket.socket, other: socket.socket) -> None:
        try:
            while data := one.recv(65536):
                other.sendall(data)
            other.shutdown(socket.SHUT_WR)
        except OSError:
            pass


def test_the_watch_sees_a_secret_on_a_command_line_and_in_an_environment() -> None:
    """The leak test below can fail: the same watch finds what is there to be found."""
    with Watch() as watch:
        for poison, leak in (
            ("poison-in-argv", ["sh", "-c", "read -r line; :", "poison-in-argv"]),
            ("poison-in-environ", ["env", "POISON=poison-in-environ", "cat"]),
            # What the script takes care not to do: a variable that is exported already goes to every program.
            ("poison-inherited", ["env", "nixops_token=old", "sh", "-c", "nixops_token=poison-inherited; cat; :"]),
        ):
            with subprocess.Popen(leak, stdin=subprocess.PIPE) as process:
                assert process.stdin is not None
                end = time.monotonic() + 60
                while not watch.saw(poison) and time.monotonic() < end:
                    time.sleep(0.02)
                process.stdin.close()
            assert watch.saw(poison)


@pytest.mark.parametrize("shell", ["sh", "bash", "dash"])
def test_no_process_shows_the_wrapping_token_or_the_secret_id(
    server: BaoServer,
    wrapped: WrappedSecretId,
    deliver: Deliver,
    directory: AbsolutePath,
    monkeypatch: pytest.MonkeyPatch,
    shell: str,
) -> None:
    """No command line and no environment, of the shell, curl and all others, while the delivery is slowed down."""
    for name in ("token", "secret", "answer"):
        monkeypatch.setenv(f"nixops_{name}", "inherited")
    watch = Watch()
    proxy = SlowProxy(server.port, watch.look)
    try:
        with watch:
            deliver(wrapped, AsRoot(shell=shell), address=proxy.address)
    finally:
        proxy.close()
    assert watch.saw("--config")  # curl was seen at work
    assert not watch.saw(wrapped.token.reveal())
    assert not watch.saw(Path(directory, "secret-id").read_text())


def test_no_file_but_the_one_meant_for_it_holds_a_secret(
    wrapped: WrappedSecretId, deliver: Deliver, directory: AbsolutePath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".curlrc").write_text(f'trace-ascii = "{tmp_path}/trace"\n')
    deliver(wrapped)
    secret_id = Path(directory, "secret-id").read_text()
    holders = [p for p in tmp_path.rglob("*") if p.is_file() and secret_id in p.read_text(errors="replace")]
    assert holders == [Path(directory, "secret-id")]
    assert not [
        p for p in tmp_path.rglob("*") if p.is_file() and wrapped.token.reveal() in p.read_text(errors="replace")
    ]


# -- what is delivered ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", ["sh", "bash", "dash"])
def test_the_files_are_closed_complete_and_log_in(
    server: BaoServer,
    role: RoleState,
    wrapped: WrappedSecretId,
    deliver: Deliver,
    directory: AbsolutePath,
    shell: str,
) -> None:
    delivered = deliver(wrapped, AsRoot(shell=shell))
    assert modes(directory) == {"approle": "0o700", **dict.fromkeys(FILES, "0o400")}
    assert Path(directory, "role-id").read_text() == role.role_id
    assert Path(directory, "secret-id-accessor").read_text() == wrapped.accessor
    assert logs_in(server, directory)
    assert delivered == Delivered(directory, wrapped.accessor, None)


def test_the_parents_of_the_directory_can_be_passed_by_others(
    wrapped: WrappedSecretId, deliver: Deliver, directory: AbsolutePath
) -> None:
    """Other services may have theirs beside ours: only our own directory is closed."""
    deliver(wrapped)
    assert stat.S_IMODE(Path(directory).parent.stat().st_mode) == 0o755


def test_what_a_host_has_can_be_asked(
    roles: HostRoles, role: RoleState, wrapped: WrappedSecretId, deliver: Deliver, directory: AbsolutePath
) -> None:
    assert approle_delivered(AsRoot(), directory) is None
    deliver(wrapped)
    found = approle_delivered(AsRoot(), directory)
    assert found == HostAppRole(role.role_id, wrapped.accessor, closed=True)
    assert roles.secret_id_valid(HOST, wrapped.accessor)
    Path(directory, "secret-id").chmod(0o440)
    found = approle_delivered(AsRoot(), directory)
    assert found is not None
    assert not found.closed


def test_an_older_delivery_is_replaced_and_named(
    server: BaoServer, roles: HostRoles, wrapped: WrappedSecretId, deliver: Deliver, directory: AbsolutePath
) -> None:
    deliver(wrapped)
    Path(directory).chmod(0o755)
    Path(directory, ".nixops.abcdef").mkdir()  # of a run that was killed
    Path(directory, ".nixops.abcdef", "secret-id").write_text("left over")
    again = roles.wrap_secret_id(HOST)
    done = deliver(again)
    assert done == Delivered(directory, again.accessor, wrapped.accessor)
    assert modes(directory) == {"approle": "0o700", ".previous": "0o700", **dict.fromkeys(FILES, "0o400")}
    assert settle_approle(AsRoot(), done)
    assert modes(directory) == {"approle": "0o700", **dict.fromkeys(FILES, "0o400")}
    assert wrapped.accessor in roles.destroy_older(HOST, keep=again.accessor)
    assert logs_in(server, directory)


def test_withdrawing_puts_back_what_was_replaced(
    server: BaoServer, roles: HostRoles, wrapped: WrappedSecretId, deliver: Deliver, directory: AbsolutePath
) -> None:
    """A deploy that is rolled back leaves the host with the AppRole it had, and that still opens."""
    deliver(wrapped)
    before = {name: Path(directory, name).read_text() for name in FILES}
    again = roles.wrap_secret_id(HOST)
    done = deliver(again)
    assert withdraw_approle(AsRoot(), done) is True
    roles.destroy_secret_id(HOST, again.accessor)
    assert {p.name: p.read_text() for p in Path(directory).iterdir()} == before
    assert modes(directory) == {"approle": "0o700", **dict.fromkeys(FILES, "0o400")}
    assert logs_in(server, directory)


def test_withdrawing_puts_back_what_somebody_else_had_issued_for_the_same_role(
    roles: HostRoles, role: RoleState, wrapped: WrappedSecretId, deliver: Deliver, directory: AbsolutePath
) -> None:
    Path(directory).mkdir(parents=True)
    Path(directory, "role-id").write_text(role.role_id + "\n")
    Path(directory, "secret-id").write_text("their-secret-id\n")
    done = deliver(wrapped)
    assert done.replaced is None
    assert withdraw_approle(AsRoot(), done) is True
    found = {p.name: p.read_text() for p in Path(directory).iterdir()}
    assert found == {"role-id": role.role_id + "\n", "secret-id": "their-secret-id\n"}


def test_a_delivery_can_be_withdrawn_once_and_only_that_one(
    roles: HostRoles, wrapped: WrappedSecretId, deliver: Deliver, directory: AbsolutePath
) -> None:
    first = deliver(wrapped)
    second = deliver(roles.wrap_secret_id(HOST))
    assert withdraw_approle(AsRoot(), first) is False
    assert settle_approle(AsRoot(), first) is False
    assert settle_approle(AsRoot(), second) is True
    assert withdraw_approle(AsRoot(), second) is True
    assert not Path(directory).exists()
    assert withdraw_approle(AsRoot(), second) is False


def test_a_namespace_and_https_reach_the_host_too(tmp_path: Path) -> None:
    directory = AbsolutePath(str(tmp_path / "approle"))
    with BaoServer(tls=True) as server:
        server.namespace("team")
        assert server.ca_file is not None
        ca_file = str(server.ca_file)
        settings = BaoSettings(server.address, TokenLogin(server.root_token), namespace="team", ca_file=server.ca_file)
        roles = HostRoles(OpenBao(settings, Redactor()))
        role_id = roles.ensure(HOST).role_id

        def go(address: str, namespace: str | None, ca: str | None) -> Delivered:
            wrapped = roles.wrap_secret_id(HOST)
            return deliver_approle(
                AsRoot(),
                directory=directory,
                address=address,
                namespace=namespace,
                host_ca_file=ca,
                role_id=role_id,
                wrapped=wrapped,
                destroy=lambda: roles.destroy_secret_id(HOST, wrapped.accessor),
            )

        with pytest.raises(VaultError, match="certificate"):
            go(server.address, "team", None)
        delivered = go(server.address, "team", ca_file)
        assert roles.ours(HOST) == (delivered.accessor,)


# -- faults: told, nothing half done, the secret id destroyed -------------------------------------------------


def expect_failure(
    kind: type[Exception], text: str, deliver: Callable[[], object], roles: HostRoles, wrapped: WrappedSecretId
) -> str:
    """The failure says ``text``, shows no secret, and the issued secret id opens nothing any more."""
    with pytest.raises(kind, match=text) as caught:
        deliver()
    assert wrapped.token.reveal() not in str(caught.value)
    assert not roles.secret_id_valid(HOST, wrapped.accessor)
    return str(caught.value)


def test_an_intercepted_wrapping_token_is_told_loudly_and_what_was_taken_opens_nothing(
    server: BaoServer,
    roles: HostRoles,
    role: RoleState,
    wrapped: WrappedSecretId,
    deliver: Deliver,
    directory: AbsolutePath,
) -> None:
    taken = server.api("POST", "sys/wrapping/unwrap", token=wrapped.token)["data"]["secret_id"]
    text = expect_failure(VaultError, "SOMEBODY ELSE MAY HAVE TAKEN", lambda: deliver(wrapped), roles, wrapped)
    assert "audit log" in text
    assert not Path(directory).exists()
    with pytest.raises(HostFault, match="invalid role or secret ID"):
        server.api("POST", "auth/approle/login", {"role_id": role.role_id, "secret_id": taken})


def test_an_intercepted_token_leaves_the_old_files_in_place(
    server: BaoServer, roles: HostRoles, wrapped: WrappedSecretId, deliver: Deliver, directory: AbsolutePath
) -> None:
    deliver(wrapped)
    before = {name: Path(directory, name).read_text() for name in FILES}
    again = roles.wrap_secret_id(HOST)
    server.api("POST", "sys/wrapping/unwrap", token=again.token)
    expect_failure(VaultError, "SOMEBODY ELSE", lambda: deliver(again), roles, again)
    assert {p.name: p.read_text() for p in Path(directory).iterdir()} == before
    assert logs_in(server, directory)


def test_a_secret_id_that_was_put_in_place_of_ours_is_refused(
    server: BaoServer, roles: HostRoles, wrapped: WrappedSecretId, deliver: Deliver, directory: AbsolutePath
) -> None:
    """Somebody unwraps ours and wraps another for the host, to be let in with it or to watch it."""
    other = roles.wrap_secret_id(HOST)
    forged = replace(wrapped, token=other.token)
    expect_failure(VaultError, "MAY HAVE REPLACED IT", lambda: deliver(forged), roles, forged)
    assert not Path(directory).exists()


def test_if_even_destroying_fails_the_accessor_is_named(
    server: BaoServer, wrapped: WrappedSecretId, deliver: Deliver
) -> None:
    server.api("POST", "sys/wrapping/unwrap", token=wrapped.token)

    def destroy() -> None:
        raise VaultError("OpenBao is away")

    with pytest.raises(VaultError, match=r"SOMEBODY ELSE.*could not be destroyed: OpenBao is away") as caught:
        deliver(wrapped, destroy=destroy)
    assert wrapped.accessor in str(caught.value)


def test_an_openbao_that_the_host_cannot_reach_is_told_with_curls_reason(
    roles: HostRoles, wrapped: WrappedSecretId, deliver: Deliver, directory: AbsolutePath
) -> None:
    text = expect_failure(
        VaultError,
        "cannot reach OpenBao at http://127.0.0.1:1",
        lambda: deliver(wrapped, address="http://127.0.0.1:1"),
        roles,
        wrapped,
    )
    assert "vault.host_address" in text
    assert not Path(directory).exists()


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"HTTP/1.1 503 Unavailable\r\nContent-Length: 0\r\n\r\n", "HTTP 503"),
        (b"HTTP/1.1 307 Temporary\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n", "HTTP 307"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", "not OpenBao's"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\ncut", "cannot reach"),
    ],
)
def test_an_answer_that_is_none_is_told_and_nothing_is_kept(
    roles: HostRoles,
    wrapped: WrappedSecretId,
    deliver: Deliver,
    directory: AbsolutePath,
    answer: bytes,
    said: str,
) -> None:
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        client, _ = listener.accept()
        client.recv(65536)
        client.sendall(answer)
        client.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        expect_failure(VaultError, said, lambda: deliver(wrapped, address=address), roles, wrapped)
    finally:
        thread.join()
        listener.close()
    assert not Path(directory).exists()


def test_somebody_elses_approle_on_the_host_is_left_as_it_is(
    roles: HostRoles, wrapped: WrappedSecretId, deliver: Deliver, directory: AbsolutePath
) -> None:
    """The host may have been given one long ago, with another policy, by hand."""
    Path(directory).mkdir(parents=True)
    Path(directory, "role-id").write_text("another-role\n")
    Path(directory, "secret-id").write_text("another-secret\n")
    expect_failure(HostFault, "did not deliver; it was left as it is", lambda: deliver(wrapped), roles, wrapped)
    assert Path(directory, "secret-id").read_text() == "another-secret\n"
    found = approle_delivered(AsRoot(), directory)
    assert found == HostAppRole("another-role", None, closed=False)


@pytest.mark.parametrize("kind", ["link", "file"])
def test_a_directory_that_is_none_is_left_alone(
    roles: HostRoles, wrapped: WrappedSecretId, deliver: Deliver, directory: AbsolutePath, tmp_path: Path, kind: str
) -> None:
    Path(directory).parent.mkdir()
    if kind == "link":
        (tmp_path / "elsewhere").mkdir()
        Path(directory).symlink_to(tmp_path / "elsewhere")
    else:
        Path(directory).write_text("")
    said = "is a symbolic link" if kind == "link" else "is not a directory"
    expect_failure(HostFault, said, lambda: deliver(wrapped), roles, wrapped)
    assert not list(tmp_path.glob("elsewhere/*"))


TOOLS = ("id", "stat", "cat", "curl", "sed", "dirname", "mkdir", "mktemp", "chmod", "chown", "mv", "rm")
MORE_TOOLS = ("cp", "rmdir", "sync", "wc")


def tools_in(directory: Path, missing: str = "") -> str:
    """A directory with the tools that a host needs, and no others."""
    tools = directory / "tools"
    tools.mkdir()
    for tool in (*TOOLS, *MORE_TOOLS):
        if tool != missing:
            (tools / tool).symlink_to(shutil.which(tool) or "/nowhere")
    return str(tools)


class Awkward(AsRoot):
    """A host with nothing in the usual directories, nor on its PATH."""

    def __init__(self) -> None:
        super().__init__(shell=shutil.which("sh") or "sh")

    def run(self, command: Command, on_line: LineSink | None = None) -> Result:
        assert isinstance(command.stdin, Secret)
        script = command.stdin.reveal()
        assert ":/usr/bin:/bin:" in script
        script = script.replace(":/usr/bin:/bin:", ":")
        return super().run(replace(command, stdin=Secret(script), env={"PATH": "/nowhere"}), on_line)


@pytest.mark.parametrize("missing", ["curl", "sed", "mktemp"])
def test_a_missing_tool_is_named_before_the_token_is_used(
    roles: HostRoles, wrapped: WrappedSecretId, deliver: Deliver, tmp_path: Path, missing: str
) -> None:
    search = (tools_in(tmp_path, missing),)
    said = f"there is no {missing} on this host"
    expect_failure(HostFault, said, lambda: deliver(wrapped, Awkward(), search=search), roles, wrapped)


def test_further_directories_are_searched_for_tools(wrapped: WrappedSecretId, deliver: Deliver, tmp_path: Path) -> None:
    """A host whose tools are in none of the usual places."""
    deliver(wrapped, Awkward(), search=(tools_in(tmp_path),))


def test_a_full_disk_is_told_and_the_old_files_stay(
    server: BaoServer, roles: HostRoles, wrapped: WrappedSecretId, deliver: Deliver, directory: AbsolutePath
) -> None:
    """A limit on the size of files stands for a full disk: nothing can be written, everything else works."""
    deliver(wrapped)
    before = {name: Path(directory, name).read_text() for name in FILES}
    again = roles.wrap_secret_id(HOST)
    # The signal of that limit is ignored, as it is not sent for a full disk either.
    limit = (
        "import os, resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (8, 8)); os.execvp(sys.argv[1], sys.argv[1:])"
    )
    limited = AsRoot("python3", "-c", limit)
    expect_failure(HostFault, "disk full", lambda: deliver(again, limited), roles, again)
    assert {p.name: p.read_text() for p in Path(directory).iterdir()} == before
    assert logs_in(server, directory)


def test_a_lost_connection_destroys_nothing_for_the_files_may_be_in_place(
    roles: HostRoles, wrapped: WrappedSecretId, deliver: Deliver
) -> None:
    class Lost(AsRoot):
        def run(self, command: Command, on_line: LineSink | None = None) -> Result:
            super().run(command, on_line)
            raise ConnectionLost("the connection to nix-cache02 ended")

    with pytest.raises(ConnectionLost):
        deliver(wrapped, Lost())
    assert roles.secret_id_valid(HOST, wrapped.accessor)


@pytest.mark.parametrize("name", ["address", "namespace", "host_ca_file"])
def test_nothing_can_leave_its_place_in_curls_configuration(
    wrapped: WrappedSecretId, deliver: Deliver, name: str
) -> None:
    with pytest.raises(UsageError, match="character"):
        deliver(wrapped, **{name: 'x"\noutput = "/etc/passwd'})
