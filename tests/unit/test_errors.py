"""Errors are one line with a position and a hint, own their exit code, and cannot move a terminal's cursor."""

from __future__ import annotations

import pytest

from nixops import errors
from nixops.errors import ExitCode, NixopsError, Position, printable
from nixops.tasks.support import guarded


def test_an_error_says_where_what_and_what_to_do() -> None:
    error = errors.InventoryError("unknown key", hint="did you mean labels?", position=Position("a.yml", 3, 7))
    assert str(error) == "a.yml:3:7: unknown key (did you mean labels?)"


def test_control_characters_from_a_host_do_not_reach_the_terminal() -> None:
    assert "\x1b" not in str(NixopsError("bad \x1b[2J host", detail="\x9b31m\u202e"))
    assert printable("tab\tand\nline") == "tab\tand\nline"


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (errors.BuildFailed, 1),
        (errors.VaultSealed, 1),
        (errors.UsageError, 2),
        (errors.DriftError, 2),
        (errors.HostKeyChanged, 3),
        (errors.RolledBack, 4),
        (errors.ChecksFailed, 5),
        (errors.Leased, 6),
        (errors.HostStateUnknown, 7),
        (errors.Interrupted, 130),
    ],
)
def test_the_exit_codes_are_the_contract(kind: type[NixopsError], code: int) -> None:
    assert kind.exit_code == code


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (errors.Leased("held"), 6, "error: held"),
        (KeyboardInterrupt(), 130, "error: interrupted"),
        (ZeroDivisionError("x"), 1, "a defect in nixops: ZeroDivisionError"),
    ],
)
def test_no_task_shows_a_traceback(
    raised: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NIXOPS_TRACEBACK", raising=False)

    @guarded
    def body() -> None:
        raise raised

    with pytest.raises(SystemExit) as stop:
        body()
    text = capsys.readouterr().err
    assert stop.value.code == code and said in text and "Traceback" not in text


def test_the_exit_code_enum_matches_the_classes() -> None:
    assert {e.value for e in ExitCode} == {0, 1, 2, 3, 4, 5, 6, 7, 130}
