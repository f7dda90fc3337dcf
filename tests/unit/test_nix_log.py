"""Nix's internal-json: logs recorded from Nix 2.8 and 2.26, building here and in a store over SSH."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nixops.errors import (
    BuildFailed,
    ConnectionLost,
    HostFault,
    HostKeyChanged,
    HostKeyUnknown,
    LoginRefused,
    NixopsError,
    Unreachable,
)
from nixops.nix.log import NixLog, explain, ssh_fault

DATA = Path(__file__).parent / "data" / "nix"


def read(name: str, lines: list[str] | None = None) -> NixLog:
    log = NixLog(lines.append if lines is not None else None)
    for line in (DATA / f"{name}.log").read_text().splitlines():
        log.feed(line)
    return log


def error_of(name: str) -> NixopsError:
    return explain(read(name), "building .#x", "builder01")


@pytest.mark.parametrize("name", ["2.8-local-bad", "2.8-remote-bad", "2.26-remote-bad"])
def test_a_failed_derivation_is_named_with_the_end_of_its_log(name: str) -> None:
    (failure,) = read(name).failed()
    assert failure.drv == "/nix/store/a2dqqhqa77nm146m51bl3vglgnn931yy-bad-0.1.drv"
    assert failure.lines == ("line1", "line2", "boom red")
    error = error_of(name)
    assert type(error) is BuildFailed
    first = f"building .#x failed: builder for '{failure.drv}' failed with exit code 3 (its whole log, on builder01:"
    assert str(error).startswith(first)
    assert "bad-0.1> line1\nbad-0.1> line2\nbad-0.1> boom red" in str(error)
    assert "\x1b" not in str(error)


@pytest.mark.parametrize("name", ["2.8-remote-badDep", "2.26-local-badDep", "2.26-remote-badDep"])
def test_the_dependency_that_failed_comes_before_what_needed_it(name: str) -> None:
    below, above = read(name).failed()
    assert (below.lines, above.lines) == (("under",), ())
    text = str(error_of(name))
    assert "below-1.drv' failed with exit code 1" in text.splitlines()[0]
    assert "below-1> under" in text
    assert "also: 1 dependencies of derivation" in text


@pytest.mark.parametrize("name", ["2.8-remote-hash", "2.26-remote-hash"])
def test_a_hash_mismatch_shows_both_hashes(name: str) -> None:
    error = error_of(name)
    assert type(error) is BuildFailed
    assert "hash mismatch" in str(error)
    assert "sha256-AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=" in str(error)
    assert "sha256-c8s4WKaHqElMozIwUwFigvPa051Cz2LKTnndoqrH2aw=" in str(error)


def test_an_evaluation_error_keeps_its_trace() -> None:
    error = error_of("2.26-remote-evalError")
    assert type(error) is BuildFailed
    assert "no such thing" in str(error)
    assert "flake.nix:8:15" in str(error)
    assert type(error_of("2.8-remote-evalError")) is BuildFailed


@pytest.mark.parametrize("version", ["2.8", "2.26"])
@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("ssh-noname", Unreachable, "its address does not resolve"),
        ("ssh-refused", Unreachable, "connection refused"),
        ("ssh-changed", HostKeyChanged, "A KEY OTHER THAN THE PINNED ONE"),
        ("ssh-unknown", HostKeyUnknown, "no key of it is pinned"),
        ("nologin", LoginRefused, "refused the login"),
        ("lost", ConnectionLost, "was lost during building"),
        ("full-build", HostFault, "the disk of builder01 is full"),
    ],
)
def test_a_fault_of_the_builder_is_told_from_a_failed_build(
    version: str, name: str, kind: type[NixopsError], words: str
) -> None:
    error = error_of(f"{version}-{name}")
    assert type(error) is kind
    assert words in str(error)
    assert "builder01" in str(error)


def test_a_full_disk_in_a_copy_is_the_hosts_fault() -> None:
    assert type(error_of("2.8-full-copy")) is HostFault


def test_a_build_whose_own_log_speaks_of_connections_is_still_a_failed_build() -> None:
    log = NixLog()
    drv = "/nix/store/a2dqqhqa77nm146m51bl3vglgnn931yy-net-1.drv"
    for event in (
        {"action": "start", "id": 1, "type": 105, "fields": [drv, "", 1, 1], "level": 3, "text": ""},
        {"action": "result", "id": 1, "type": 101, "fields": ["curl: Connection refused; Broken pipe"]},
        {
            "action": "msg",
            "level": 0,
            "msg": f"error: builder for '{drv}' failed;\n last 1 log lines:\n > curl: Connection refused; Broken pipe",
        },
    ):
        log.feed("@nix " + json.dumps(event))
    assert type(explain(log, "building .#net", "builder01")) is BuildFailed


def test_the_wording_of_nix_2_31_is_read_too() -> None:
    log = NixLog()
    drv = "/nix/store/a2dqqhqa77nm146m51bl3vglgnn931yy-new-1.drv"
    message = f"error: Cannot build '{drv}'.\n       Reason: builder failed with exit code 1.\n       Output paths: …"
    log.feed("@nix " + json.dumps({"action": "msg", "level": 0, "msg": message}))
    error = explain(log, "building .#new", "builder01")
    assert f"Cannot build '{drv}'; Reason: builder failed with exit code 1" in str(error)


def test_progress_is_told_in_words() -> None:
    lines: list[str] = []
    read("2.26-remote-bad", lines)
    assert "building bad-0.1" in lines
    assert "bad-0.1> line2" in lines
    assert not [line for line in lines if line.startswith("@nix") or "\x1b" in line]
    assert read("2.26-remote-bad").said[-1] in lines


def test_lines_that_are_not_nixs_own_are_kept_and_said() -> None:
    lines: list[str] = []
    log = NixLog(lines.append)
    log.feed("ssh: connect to host web port 22: Connection refused")
    log.feed("@nix this is not JSON")
    log.feed('@nix ["neither an object"]')
    log.feed("")
    assert log.foreign == ("ssh: connect to host web port 22: Connection refused", "@nix this is not JSON")
    assert lines == ["ssh: connect to host web port 22: Connection refused"]


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: (
            st.lists(inner)
            | st.dictionaries(st.sampled_from(["action", "fields", "id", "level", "msg", "type"]), inner)
        ),
    )
)
def test_no_line_whatever_breaks_the_reader(event: object) -> None:
    log = NixLog()
    for action in ("start", "stop", "result", "msg", None):
        for kind in (105, 101, 100, None):
            body = {**event, "action": action, "type": kind} if isinstance(event, dict) else event
            log.feed("@nix " + json.dumps(body))
    explain(log, "anything", "anywhere")


def said(*errors: str, foreign: tuple[str, ...] = ()) -> NixLog:
    """A log with these errors of Nix's own, after these lines of other programs."""
    log = NixLog()
    for line in foreign:
        log.feed(line)
    for error in errors:
        log.feed("@nix " + json.dumps({"action": "msg", "level": 0, "msg": f"\x1b[31;1merror:\x1b[0m {error}"}))
    return log


@pytest.mark.parametrize(
    ("errors", "foreign", "kind"),
    [
        (("unexpected end-of-file",), (), ConnectionLost),
        (("Nix daemon disconnected unexpectedly (maybe it crashed?)",), (), ConnectionLost),
        (("writing to file: Broken pipe",), (), ConnectionLost),
        (("reading from file: Connection reset by peer",), (), ConnectionLost),
        (("unexpected end-of-file",), ("Timeout, server web not responding.",), ConnectionLost),
        ((), ("client_loop: send disconnect: Broken pipe",), ConnectionLost),
        (("cannot connect to socket at '/nix/var/nix/daemon-socket/socket': Connection refused",), (), Unreachable),
        (("cannot open connection to remote store 'ssh-ng://web': error: unexpected end-of-file",), (), Unreachable),
        (("failed to start SSH connection to 'root@web'",), ("ssh: connect … Operation timed out",), Unreachable),
        (("opening a connection to remote store 'ssh-ng://web' previously failed",), (), Unreachable),
        (("cannot open connection to remote store 'x': protocol mismatch, got 'welcome'",), (), Unreachable),
        (("unexpected end-of-file",), ("bash: line 1: nix-daemon: command not found",), Unreachable),
    ],
)
def test_what_nix_itself_says_of_the_store_is_the_stores_fault(
    errors: tuple[str, ...], foreign: tuple[str, ...], kind: type[NixopsError]
) -> None:
    assert type(explain(said(*errors, foreign=foreign), "building .#x", "builder01")) is kind


@pytest.mark.parametrize(
    ("errors", "foreign"),
    [
        (("Connection refused by the throw; Broken pipe",), ()),
        (("unexpected end-of-file; Nix daemon disconnected unexpectedly",), ()),
        (("unable to download 'https://example.org/x': Couldn't connect to server (7)",), ()),
        # A flake's input that git fetches over ssh: no word of it is about the store.
        (
            ("program 'git' failed with exit code 128",),
            ("ssh: connect to host example.org port 22: Connection refused",),
        ),
        (("program 'git' failed with exit code 128",), ("Host key verification failed.",)),
        (
            ("builder for '/nix/store/a2dqqhqa77nm146m51bl3vglgnn931yy-x-1.drv' failed with exit code 1",),
            ("Broken pipe",),
        ),
    ],
)
def test_what_an_evaluation_or_a_fetch_met_is_not_the_stores_fault(
    errors: tuple[str, ...], foreign: tuple[str, ...]
) -> None:
    assert type(explain(said(*errors, foreign=foreign), "building .#x", "builder01")) is BuildFailed


def test_a_log_quoted_in_nixs_error_is_no_word_of_nixs() -> None:
    error = (
        "builder for '/nix/store/a2dqqhqa77nm146m51bl3vglgnn931yy-x-1.drv' failed with exit code 1;\n"
        "       last 2 log lines:\n       > error: unexpected end-of-file\n       > cannot connect to socket at x"
    )
    assert type(explain(said(error), "building .#x", "builder01")) is BuildFailed


def test_ssh_that_speaks_of_nothing_known_is_no_fault() -> None:
    assert ssh_fault("Warning: Permanently added 'x'", "web", "a login") is None
    refused = ssh_fault("ssh: connect to host 192.0.2.1 port 22: Connection refused", "web", "a login")
    assert type(refused) is Unreachable
    assert "web cannot be reached for a login: connection refused" in str(refused)
    banner = ssh_fault("Connection timed out during banner exchange", "web", "a login")
    assert "what answers does not speak SSH" in str(banner)
