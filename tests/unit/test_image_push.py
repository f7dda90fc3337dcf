"""A push as the operator's side sees it: what goes over, what comes back, what each answer means."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable, Iterable

import pytest

from nixops.build import push as module
from nixops.build.model import BuiltSystem, Evaluated, Shape
from nixops.build.push import BuilderUnfit, RegistryAccess, Sent, push_system
from nixops.errors import CommandTimeout, ExitCode, PushFailed, UsageError
from nixops.secret import Secret
from nixops.transport.command import Command, LineSink, Result
from nixops.transport.exec import ChunkSink
from nixops.values import HostName, ImageReference, StorePath, System

DIGEST = "sha256:" + "a" * 64
DESTINATION = ImageReference("registry.example.org:5000/team/app:1")
EVALUATED = Evaluated(
    system=System("x86_64-linux"),
    installable="/srv/app#packages.x86_64-linux.docker",
    drv=StorePath("/nix/store/00000000000000000000000000000000-copy-to.drv"),
    out=StorePath("/nix/store/11111111111111111111111111111111-copy-to"),
    shape=Shape.COPY_TO,
)
BUILT = BuiltSystem(
    EVALUATED, HostName("builder01"), StorePath(EVALUATED.out or ""), (2, 26), seconds=1.0, began=0.0, ended=1.0
)


class Builder:
    """Answers as ``push.sh`` would, and takes stdin to its end, as ssh does."""

    host = "builder01"

    def __init__(self, said: bytes, stderr: bytes = b"", *, error: Exception | None = None) -> None:
        self.said = said
        self.stderr = stderr
        self.error = error
        self.stdin = b""
        self.command: Command | None = None
        self.sink: LineSink | None = None
        self.stdin_ended = threading.Event()

    def run(self, command: Command, on_line: LineSink | None = None) -> Result:
        raise AssertionError(f"a push is streamed, and {command.name} was not ({on_line})")

    def stream(
        self,
        command: Command,
        *,
        stdin: Iterable[bytes] | None = None,
        stdout: ChunkSink | None = None,
        on_line: LineSink | None = None,
    ) -> Result:
        self.command, self.sink = command, on_line
        source = iter(stdin or ())
        self.stdin = next(source)
        if self.error is not None:
            raise self.error
        assert stdout is not None
        for at in range(0, len(self.said), 7):  # in pieces that end anywhere
            stdout(self.said[at : at + 7])
        if self.said.endswith(b"end\n"):  # else it is killed with its stdin open
            for more in source:
                self.stdin += more
            self.stdin_ended.set()
        return Result(command, 0, b"", self.stderr, host=self.host)


def push(builder: Builder, access: RegistryAccess | None = None, timeout: float = 60.0) -> Sent:
    return push_system(builder, BUILT, DESTINATION, access or RegistryAccess(None), timeout=timeout, root="/root/link")


def test_login_and_authority_go_over_on_stdin_alone_each_on_a_line() -> None:
    builder = Builder(b"shape copyTo\ndigest " + DIGEST.encode() + b"\ncode 0\nend\n")
    login = Secret('{\n "auths": {"registry.example.org:5000": {"auth": "dXNlcjpwYXNzd29yZA=="}}\n}')
    sent = push(builder, RegistryAccess(login, authority=b"-----BEGIN\nMII\n"))
    assert (sent.digest, sent.shape) == (DIGEST, Shape.COPY_TO)
    first, second, *_ = builder.stdin.decode().split("\n")
    assert json.loads(first) == json.loads(login.reveal())
    assert base64.b64decode(second) == b"-----BEGIN\nMII\n"
    assert builder.command is not None
    assert "dXNlcjpwYXNzd29yZA" not in " ".join(builder.command.argv) + repr(builder.command.env)
    assert builder.command.argv[-8:] == (
        "copyTo", BUILT.out, "", "registry.example.org:5000/team/app:1", "tls", "60", "15", "/root/link",
    )  # fmt: skip
    assert builder.stdin_ended.is_set()


def test_without_a_login_the_builders_own_are_not_used_either() -> None:
    builder = Builder(b"shape copyTo\ncode 0\nend\n")
    assert push(builder, RegistryAccess(None, tls=False)).digest is None
    assert builder.stdin.startswith(b'{"auths": {}}\n\n')
    assert builder.command is not None and "plain" in builder.command.argv


def test_signs_of_life_go_over_until_the_builder_says_that_it_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves: without the last line from the other side, a line goes over each time the beat has passed."""
    monkeypatch.setattr(module, "BEAT", 0.01)
    taken: list[bytes] = []

    class Slow(Builder):
        def stream(
            self,
            command: Command,
            *,
            stdin: Iterable[bytes] | None = None,
            stdout: ChunkSink | None = None,
            on_line: LineSink | None = None,
        ) -> Result:
            assert stdout is not None and stdin is not None and on_line is not None
            for piece in stdin:
                taken.append(piece)
                if len(taken) == 4:
                    stdout(b"shape copyTo\ncode 0\nend\n")
            return Result(command, 0, b"", b"")

    push(Slow(b""))
    assert len(taken) == 4 and len(set(taken)) == 4


@pytest.mark.parametrize(
    ("said", "stderr", "kind", "words"),
    [
        (b"refused shape\nend\n", b"x is neither", UsageError, "x is neither"),
        (b"refused memory\nend\n", b"no tmpfs", BuilderUnfit, "no tmpfs"),
        (b"refused skopeo\nend\n", b"", BuilderUnfit, "no skopeo"),
        (b"refused gone\nend\n", b"", BuilderUnfit, "does not have the image any more"),
        (b"refused silence\nend\n", b"", PushFailed, "no sign of life"),
        (b"code 1\nend\n", b"unauthorized: access denied", PushFailed, "unauthorized"),
        (b"code 1\nend\n", b"write: No space left on device", BuilderUnfit, "disk of builder01 is full"),
        (b"code 1\nend\n", b"dial tcp 192.0.2.1:443: i/o timeout", BuilderUnfit, "does not reach the registry"),
        (b"code 1\nend\n", b"lookup registry: no such host", BuilderUnfit, "does not reach the registry"),
        (b"shape copyTo\n", b"", PushFailed, "could not push"),
        (b"", b"", PushFailed, "could not push"),
    ],
)
def test_what_each_end_of_a_push_means(said: bytes, stderr: bytes, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind) as caught:
        push(Builder(said, stderr))
    assert words in str(caught.value)


def test_a_builder_that_is_not_fit_counts_as_one_that_is_not_reached() -> None:
    """Proves: the next builder is tried for it, and with nobody left the command ends with 3."""
    from nixops.build.failover import infrastructure_fault

    with pytest.raises(BuilderUnfit) as caught:
        push(Builder(b"refused skopeo\nend\n"))
    assert infrastructure_fault(caught.value, BUILT.builder) and caught.value.exit_code == ExitCode.UNREACHABLE


@pytest.mark.parametrize(
    "make",
    [
        lambda: Builder(b"code 124\nend\n"),
        lambda: Builder(b"code 137\nend\n"),  # it did not heed TERM
        lambda: Builder(b"", error=CommandTimeout("the push ran past")),
    ],
)
def test_a_push_that_takes_too_long_is_told_as_that(make: Callable[[], Builder]) -> None:
    with pytest.raises(PushFailed, match="did not end within 0 s"):
        push(make(), timeout=0.0)


def test_a_digest_that_is_none_is_not_believed() -> None:
    assert push(Builder(b"shape copyTo\ndigest ../../etc\ncode 0\nend\n")).digest is None


class Talkative(Builder):
    """Says something for ever, until its reader has had enough."""

    def stream(
        self,
        command: Command,
        *,
        stdin: Iterable[bytes] | None = None,
        stdout: ChunkSink | None = None,
        on_line: LineSink | None = None,
    ) -> Result:
        assert command.name == "the push" and stdin is not None and stdout is not None and on_line is not None
        for _ in range(10_000):
            on_line("x" * 40_000)
        raise AssertionError("nobody stopped it")


def test_a_program_that_never_stops_talking_is_stopped_and_not_shown_for_ever() -> None:
    """Proves: of some hundred MiB only the first is passed on, and the program does not get to its end."""
    lines: list[str] = []
    with pytest.raises(PushFailed, match="said more than 64 MiB"):
        push_system(Talkative(b""), BUILT, DESTINATION, RegistryAccess(None), timeout=60.0, on_line=lines.append)
    assert sum(map(len, lines)) < 1 << 20
    assert lines[0] == "x" * 40_000 and "not shown" in lines[-1]


def test_what_the_program_prints_stands_in_no_error_as_it_is() -> None:
    """Proves: an error of a push is clean before it leaves: also for who calls the library."""
    builder = Builder(b"shape copyTo\ncode 1\nend\n", stderr=b"the login is hunter2\n")
    with pytest.raises(PushFailed) as caught:
        push_system(
            builder,
            BUILT,
            DESTINATION,
            RegistryAccess(None),
            timeout=60.0,
            clean=lambda text: text.replace("hunter2", "***"),
        )
    assert caught.value.detail == "the login is ***"
