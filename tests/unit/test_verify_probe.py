"""The scripts that list and try, run by a real shell; and what a probe copies from the runner's unit."""

from __future__ import annotations

import os
import subprocess
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from nixops.errors import Undecided
from nixops.transport.command import Command, LineSink, Result
from nixops.verify import probe
from nixops.verify.backend import connect
from nixops.verify.listing import list_files
from nixops.verify.model import Subject, Trial
from nixops.verify.probe import Access, Target, run_trials, sandbox, try_to_open
from nixops.verify.unit import UnitFacts
from tests.unit.verify_recorded import NAME, inventory_host

ODD_NAMES = ["plain", "with space", "it's", '"quoted"', "new\nline", "$HOME", "-n", "naïve", "back\\slash"]


@dataclass
class Here:
    """Runs commands on this machine; a transient unit becomes its bare program."""

    host: str = "nix-cache02"
    ran: list[Command] = field(default_factory=list)

    def run(self, command: Command, on_line: LineSink | None = None) -> Result:
        del on_line
        self.ran.append(command)
        argv = command.argv
        if "systemd-run" in argv:
            argv = argv[argv.index("--", 4) + 1 :]
        done = subprocess.run(argv, input=command.stdin_bytes, capture_output=True)
        return Result(command, done.returncode, done.stdout, done.stderr, host=self.host)


def facts(**properties: str) -> UnitFacts:
    shown = {"LoadState": "loaded", **properties}
    return UnitFacts("u.service", {k: (v,) for k, v in shown.items()}, None, frozenset(), 1.0, 1)


@pytest.fixture
def subject() -> Subject:
    host, here = inventory_host(), Here()
    runner = host.runners[NAME]
    assert runner.managed
    return Subject("nix-cache02", host, NAME, runner, "u.service", here, connect(here), facts(), {})


def opened(subject: Subject, *targets: Target) -> tuple[Access, ...]:
    """What comes of trying to open them, with nothing else tried beside it."""
    course = try_to_open(targets)
    (lines,) = run_trials(subject, [next(course)])
    assert not isinstance(lines, Undecided), lines
    with pytest.raises(StopIteration) as end:
        course.send(lines)
    found: tuple[Access, ...] = end.value.value
    return found


def test_files_are_listed_whatever_they_are_called(tmp_path: Path) -> None:
    for name in ODD_NAMES:
        (tmp_path / name).write_text("x")
    (tmp_path / "plain").chmod(0o640)
    entries = {e.path: e for e in list_files(Here(), [str(tmp_path), str(tmp_path / "plain"), "/no/such"])}
    assert set(entries) == {str(tmp_path)} | {str(tmp_path / name) for name in ODD_NAMES}
    plain, status = entries[str(tmp_path / "plain")], (tmp_path / "plain").stat()
    assert (plain.kind, plain.mode, plain.uid, plain.size) == ("f", 0o640, status.st_uid, 1)
    assert plain.identity == f"{status.st_dev}:{status.st_ino}"
    assert entries[str(tmp_path)].kind == "d"


def test_a_link_is_listed_as_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    (tmp_path / "link").symlink_to("secret")
    entries = {e.path: e for e in list_files(Here(), [str(tmp_path / "link")])}
    assert entries[str(tmp_path / "link")].kind == "f"


def test_what_can_be_opened_is_told_and_nothing_is_changed(tmp_path: Path, subject: Subject) -> None:
    (tmp_path / "d").mkdir()
    for name in ODD_NAMES:
        (tmp_path / name).write_text("a secret")
    paths = [str(tmp_path / name) for name in (*ODD_NAMES, "d")]
    found = set(opened(subject, *(Target(p) for p in paths), Target(str(tmp_path / "absent"))))
    files = {Access(p, how) for p in paths[:-1] for how in ("read", "write")}
    assert found == files | {Access(paths[-1], how) for how in ("list", "write")}
    assert {p.name for p in tmp_path.iterdir()} == {*ODD_NAMES, "d"}
    assert list((tmp_path / "d").iterdir()) == []
    assert (tmp_path / "plain").read_text() == "a secret"


def test_nothing_of_a_secret_comes_back(tmp_path: Path, subject: Subject) -> None:
    (tmp_path / "f").write_text("a secret")
    transport = subject.transport
    assert isinstance(transport, Here)
    opened(subject, Target(str(tmp_path / "f")))
    (command,) = transport.ran
    again = transport.run(command)
    assert "a secret" not in again.out + again.err
    assert not any(str(tmp_path) in argument for argument in command.argv)


def test_only_the_file_that_root_saw_counts(tmp_path: Path, subject: Subject) -> None:
    file = tmp_path / "f"
    file.write_text("x")
    status = file.stat()
    assert opened(subject, Target(str(file), f"{status.st_dev}:{status.st_ino}"))
    assert opened(subject, Target(str(file), "1:1")) == ()


def test_a_probe_without_its_tools_is_no_closed_door(
    tmp_path: Path, subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "TOOLS_PATH", str(tmp_path))
    with pytest.raises(Undecided, match="could not try"):
        opened(subject, Target("/etc/passwd"))


def test_a_probe_that_is_cut_off_is_no_answer(subject: Subject) -> None:
    (answer,) = run_trials(subject, [Trial("echo half; exit 0")])
    assert isinstance(answer, Undecided) and "did not come to its end" in str(answer)


def test_nothing_can_be_tried_as_the_user_of_a_unit_that_is_not_there(subject: Subject) -> None:
    with pytest.raises(Undecided, match="not a unit"):
        run_trials(replace(subject, facts=facts(LoadState="not-found")), [Trial("true")])


def test_arguments_arrive_as_they_are(subject: Subject) -> None:
    given = ("a b", "it's", "$HOME", "`id`", "%s", "-c", "")
    (lines,) = run_trials(subject, [Trial('for a do printf "%s|" "$a"; done; echo', given)])
    assert lines == ("a b|it's|$HOME|`id`|%s|-c||",)


def test_what_is_tried_together_is_nothing_to_each_other(subject: Subject) -> None:
    begin = time.monotonic()
    answers = run_trials(
        subject,
        [
            Trial("echo one; PATH=/nowhere; HOME=/nowhere; cd /; umask 0; return 0"),
            Trial("echo two; exit 7"),
            Trial("echo three; printf 'and a ha'; sleep 60 & sleep 60", timeout=1),
            Trial("kill -KILL $$"),
            Trial("cat; printf five; false"),
            Trial('[ "$PATH" != /nowhere ] && [ "$HOME" != /nowhere ] && umask && pwd'),
        ],
    )
    assert time.monotonic() - begin < 30
    assert [a if isinstance(a, tuple) else "undecided" for a in answers] == [
        ("one",),
        "undecided",
        "undecided",
        "undecided",
        ("five",),
        (f"{_umask():04o}", str(Path.cwd())),
    ]
    assert "for which it had 1 s" in str(answers[2]) and "three" not in str(answers[2]) and "@" not in str(answers[2])


def _umask() -> int:
    now = os.umask(0o022)
    os.umask(now)
    return now


@pytest.mark.parametrize("cut", range(0, 200, 7))
def test_an_answer_that_is_cut_off_anywhere_is_not_taken_for_one(subject: Subject, cut: int) -> None:
    class CutOff(Here):
        def run(self, command: Command, on_line: LineSink | None = None) -> Result:
            whole = super().run(command, on_line)
            return replace(whole, stdout=whole.stdout[: max(0, len(whole.stdout) - cut)])

    whole: list[tuple[str, ...]] = [("one", "1"), ("two", "2")]
    try:
        answers = run_trials(
            replace(subject, transport=CutOff()), [Trial("echo one; echo 1"), Trial("echo two; echo 2")]
        )
    except Undecided as error:
        assert cut and "could not try" in str(error)
    else:
        assert all(isinstance(a, Undecided) or a == w for a, w in zip(answers, whole, strict=True))
        assert isinstance(answers[1], Undecided) == (cut > 1)


def test_what_is_tried_cannot_speak_for_another(subject: Subject) -> None:
    transport = subject.transport
    assert isinstance(transport, Here)
    forged = "printf '%s\\n' '@0123456789abcdef end 1' '@end' '@0123456789abcdef uid 0' 'end 1'"
    first, second = run_trials(subject, [Trial(forged), Trial("exit")])
    assert first == ("@0123456789abcdef end 1", "@end", "@0123456789abcdef uid 0", "end 1")
    assert isinstance(second, Undecided)
    # The mark is another each time, and is in nothing that a trial is given.
    marks = set()
    for _ in range(2):
        (lines,) = run_trials(subject, [Trial("env; cat; tr '\\0' '\\n' </proc/$$/cmdline")])
        mark = transport.ran[-1].stdin_bytes.decode().split('echo "@')[1][:16]
        assert isinstance(lines, tuple) and "probe() {" in lines and not any(mark in line for line in lines)
        marks.add(mark)
    assert len(marks) == 2


def test_the_probe_is_stopped_by_the_host_itself(subject: Subject) -> None:
    run_trials(subject, [Trial("true", timeout=33)])
    transport = subject.transport
    assert isinstance(transport, Here)
    (command,) = transport.ran
    assert "RuntimeMaxSec=33" in command.argv
    assert command.timeout == 43
    assert command.root


@pytest.mark.parametrize(("each", "all_of_them"), [((12, 33), 45), ((60, 60, 120), 180), ((60,) * 7 + (120,), 180)])
def test_a_round_is_bounded_too(subject: Subject, each: tuple[int, ...], all_of_them: int) -> None:
    run_trials(subject, [Trial("true", timeout=seconds) for seconds in each])
    transport = subject.transport
    assert isinstance(transport, Here)
    assert f"RuntimeMaxSec={all_of_them}" in transport.ran[0].argv and transport.ran[0].timeout == all_of_them + 10


def test_a_probe_gets_what_shapes_access_and_nothing_else() -> None:
    given = sandbox(
        facts(
            User="gitea-runner",
            DynamicUser="yes",
            StateDirectory="gitea-runner",
            BindPaths="/a:/b:rbind",
            CapabilityBoundingSet="",
            AmbientCapabilities="",
            SystemCallFilter="~",
            RuntimeDirectory="gitea-runner",
            EnvironmentFiles="/run/secrets/token (ignore_errors=no)",
            MemoryMax="1",
        )
    )
    assert given == (
        "User=gitea-runner",
        "DynamicUser=yes",
        "StateDirectory=gitea-runner",
        "BindPaths=/a:/b:rbind",
        "CapabilityBoundingSet=",
    )


def test_a_unit_with_a_credential_is_probed_with_one_that_is_none_of_its_own() -> None:
    given = sandbox(replace(facts(User="u"), credentials=("token:/run/secrets/token",)))
    assert given == ("User=u", "SetCredential=nixops-verify:none")


def test_files_that_hold_a_units_credentials_are_known() -> None:
    unit = replace(
        facts(EnvironmentFiles="/run/secrets/a b (ignore_errors=yes)"), credentials=("token:/run/secrets/c", "x", "")
    )
    assert unit.credential_files == ("/run/secrets/a b", "/run/secrets/c")
