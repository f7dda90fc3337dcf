"""Our files beside the user's: headers, drift, adoption, atomic replacement, git, and taking it all back."""

from __future__ import annotations

import json
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath

import pytest

from nixops.errors import CommandFailed, DriftError, ExitCode, HostFault, TemplateError, UsageError
from nixops.render.header import read_header, with_header
from nixops.render.literal import Language
from nixops.render.managed import FilePlan, FileStatus, FilesUndo, apply_files, files_undo, plan_files, undo_files
from nixops.render.runner import RenderedFile
from nixops.render.state import commit_files, uncommitted
from nixops.transport.local import LocalRunner
from nixops.values import HostName, RunnerName

HOST, RUNNER = HostName("nix-cache02"), RunnerName("actions2")
NIX = PurePosixPath("hosts/nix-cache02/nixops-actions2.nix")
YAML = PurePosixPath("workflows/torjus/nixos/w.yml")
TOFU = PurePosixPath("terraform/vault/nixops.tf")
LOCAL = LocalRunner()


@pytest.fixture(autouse=True)
def _no_settings_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "gitconfig"))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    (tmp_path / "gitconfig").write_text("[user]\nname = Test\nemail = test@example\n", encoding="utf-8")


def git(root: Path, *args: str) -> str:
    done = subprocess.run(["git", "-C", root, *args], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    root = tmp_path / "plain"
    (root / "hosts/nix-cache02").mkdir(parents=True)
    (root / "hosts/nix-cache02/actions-runner.nix").write_text("{ }\n", encoding="utf-8")
    return root


@pytest.fixture
def checkout(plain: Path) -> Path:
    git(plain, "init", "-q")
    git(plain, "add", "-A")
    git(plain, "commit", "-qm", "base")
    return plain


def file(body: str | None, path: PurePosixPath = NIX, *, host: HostName = HOST) -> RenderedFile:
    language = {".nix": Language.NIX, ".yml": Language.YAML, ".tf": Language.HCL}[path.suffix]
    text = None if body is None else with_header(body, template="t.nix.j2", host=host, runner=RUNNER, language=language)
    return RenderedFile(path, language, text, host, RUNNER)


def plans(root: Path, *files: RenderedFile, adopt: bool = False) -> tuple[FilePlan, ...]:
    return plan_files(root, files, adopt=adopt)


def write(root: Path, *files: RenderedFile, adopt: bool = False) -> FilesUndo:
    return apply_files(root, plans(root, *files, adopt=adopt), LOCAL)


def snapshot(root: Path) -> dict[str, tuple[bytes, int, int]]:
    found = {}
    for path in sorted(root.rglob("*")):
        if path.is_file() and ".git" not in path.relative_to(root).parts:
            seen = path.stat()
            found[str(path.relative_to(root))] = (path.read_bytes(), seen.st_mode, seen.st_mtime_ns)
    return found


def shape(root: Path) -> list[str]:
    return sorted(str(p.relative_to(root)) for p in root.rglob("*") if ".git" not in p.relative_to(root).parts)


def index(root: Path) -> str:
    return git(root, "ls-files", "--stage") + git(root, "status", "--porcelain")


def contents(root: Path) -> dict[str, bytes]:
    return {name: entry[0] for name, entry in snapshot(root).items()}


# -- header -----------------------------------------------------------------------------------------------------------


def test_a_header_tells_whose_the_file_is_and_whether_it_was_edited() -> None:
    text = file("{ a = 1; }\n").text
    assert text is not None
    header = read_header(text)
    assert header is not None
    assert (header.template, header.host, header.runner, header.edited) == (
        "t.nix.j2",
        "nix-cache02",
        "actions2",
        False,
    )
    assert all(line.startswith("#") for line in text.split("\n")[:4])


@pytest.mark.parametrize("old", ["a = 1", "# Made by", "template=t.nix.j2", "{ a", "\n\n{"])
def test_any_edit_shows_the_headers_own_lines_included(old: str) -> None:
    text = file("{ a = 1; }\n").text
    assert text is not None
    edited = text.replace(old, {"\n\n{": "\n{"}.get(old, old + "9"), 1)
    assert edited != text
    header = read_header(edited)
    assert header is not None
    assert header.edited or header.template != "t.nix.j2"
    for more in (text + " ", text + "\n", "# mine\n" + text):
        header = read_header(more)
        assert header is not None
        assert header.edited


def test_a_line_like_ours_deep_in_a_users_file_makes_it_no_file_of_ours() -> None:
    text = file("{ }").text
    assert text is not None
    assert read_header("#\n" * 20 + text) is None
    assert read_header("{ }\n") is None
    assert read_header("") is None


# -- planning ---------------------------------------------------------------------------------------------------------


def test_a_new_file_is_planned_with_its_diff_and_nothing_is_written(plain: Path) -> None:
    before = snapshot(plain)
    (plan,) = plans(plain, file("{ a = 1; }\n"))
    assert plan.status == "new"
    assert "+++ b/hosts/nix-cache02/nixops-actions2.nix" in plan.diff
    assert "+{ a = 1; }" in plan.diff
    assert snapshot(plain) == before


def test_a_second_rendering_changes_nothing_not_even_a_time(checkout: Path) -> None:
    write(checkout, file("{ a = 1; }\n"), file("a: 1\n", YAML))
    before = snapshot(checkout)
    again = plans(checkout, file("{ a = 1; }\n"), file("a: 1\n", YAML))
    assert {p.status for p in again} == {FileStatus.UNCHANGED}
    assert all(p.diff == "" for p in again)
    assert apply_files(checkout, again, LOCAL) == FilesUndo(())
    assert snapshot(checkout) == before


def test_a_changed_rendering_replaces_our_file_and_keeps_its_permissions(plain: Path) -> None:
    write(plain, file("{ a = 1; }\n"))
    (plain / NIX).chmod(0o600)
    inode = (plain / NIX).stat().st_ino
    (plan,) = plans(plain, file("{ a = 2; }\n"))
    assert plan.status == "changed"
    apply_files(plain, [plan], LOCAL)
    assert "a = 2" in (plain / NIX).read_text()
    assert (plain / NIX).stat().st_mode & 0o777 == 0o600
    assert (plain / NIX).stat().st_ino != inode, "replaced by a rename, not written over"


def test_an_edit_by_hand_is_drift_with_a_diff_and_is_not_replaced(plain: Path) -> None:
    write(plain, file("{ a = 1; }\n"))
    edited = (plain / NIX).read_text() + "# my note\n"
    (plain / NIX).write_text(edited, encoding="utf-8")
    with pytest.raises(DriftError) as caught:
        plans(plain, file("{ a = 2; }\n"))
    assert caught.value.exit_code is ExitCode.USAGE
    assert "-# my note" in str(caught.value)
    (reported,) = plan_files(plain, [file("{ a = 2; }\n")], adopt=False, report_drift=True)
    assert reported.status == "drift"
    with pytest.raises(DriftError):
        apply_files(plain, [reported], LOCAL)
    assert (plain / NIX).read_text() == edited


def test_drift_is_taken_over_when_it_is_adopted(plain: Path) -> None:
    write(plain, file("{ a = 1; }\n"))
    with (plain / NIX).open("a") as handle:
        handle.write("# my note\n")
    (plan,) = plans(plain, file("{ a = 2; }\n"), adopt=True)
    assert plan.status == "adopted"
    assert "-# my note" in plan.diff
    apply_files(plain, [plan], LOCAL)
    assert plans(plain, file("{ a = 2; }\n"))[0].status == "unchanged"


def test_a_file_without_our_header_is_the_users_until_it_is_adopted(plain: Path) -> None:
    (plain / NIX).write_text("{ mine = true; }\n", encoding="utf-8")
    with pytest.raises(UsageError, match=r"nixops-actions2\.nix") as caught:
        plans(plain, file("{ a = 1; }\n"))
    assert "--adopt" in str(caught.value)
    (plan,) = plans(plain, file("{ a = 1; }\n"), adopt=True)
    assert plan.status == "adopted"
    assert (plain / NIX).read_text() == "{ mine = true; }\n"


def test_another_runners_file_is_never_taken_not_even_when_adopting(plain: Path) -> None:
    write(plain, file("{ a = 1; }\n", host=HostName("other")))
    for adopt in (False, True):
        with pytest.raises(UsageError, match="other"):
            plans(plain, file("{ a = 1; }\n"), adopt=adopt)


def test_a_file_that_is_no_text_is_refused(plain: Path) -> None:
    (plain / NIX).write_bytes(b"\xff\xfe")
    for adopt in (False, True):
        with pytest.raises(UsageError, match="UTF-8"):
            plans(plain, file("{ }"), adopt=adopt)


def test_a_file_that_should_not_be_there_is_removed_if_it_is_ours(plain: Path) -> None:
    assert plans(plain, file(None, TOFU)) == ()
    write(plain, file("a = 1\n", TOFU))
    (plan,) = plans(plain, file(None, TOFU))
    assert (plan.status, plan.after) == (FileStatus.REMOVED, None)
    undo = apply_files(plain, [plan], LOCAL)
    assert not (plain / TOFU).exists()
    undo_files(plain, undo, LOCAL)
    assert plans(plain, file("a = 1\n", TOFU))[0].status == "unchanged"


def test_the_users_and_other_runners_files_are_not_removed(plain: Path) -> None:
    write(plain, file("a = 1\n", TOFU, host=HostName("other")))
    assert plans(plain, file(None, TOFU)) == ()
    (plain / TOFU).write_text("a = 1\n", encoding="utf-8")
    assert plans(plain, file(None, TOFU), adopt=True) == ()


def test_a_file_to_remove_that_was_edited_is_drift(plain: Path) -> None:
    write(plain, file("a = 1\n", TOFU))
    with (plain / TOFU).open("a") as handle:
        handle.write("b = 2\n")
    with pytest.raises(DriftError):
        plans(plain, file(None, TOFU))
    assert plans(plain, file(None, TOFU), adopt=True)[0].status == "removed"


def test_workflows_of_repositories_no_longer_trusted_go(plain: Path) -> None:
    gone = PurePosixPath("workflows/torjus/old/w.yml")
    users = PurePosixPath("workflows/torjus/own/w.yml")
    write(plain, file("a: 1\n", YAML), file("a: 1\n", gone))
    (plain / users).parent.mkdir()
    (plain / users).write_text("a: 1\n", encoding="utf-8")
    pattern = replace(file(None, YAML), path=PurePosixPath("workflows/*/*/w.yml"))
    found = plans(plain, file("a: 1\n", YAML), pattern)
    assert [(p.path, str(p.status)) for p in found] == [(YAML, "unchanged"), (gone, "removed")]


def test_a_missing_checkout_is_bad_usage(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="checkout"):
        plans(tmp_path / "absent", file("{ }"))


def test_a_symbolic_link_on_the_way_is_refused(plain: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "x.nix").write_text("{ }", encoding="utf-8")
    (plain / "linked").symlink_to(outside)
    (plain / NIX).symlink_to(outside / "x.nix")
    (plain / "dangling.nix").symlink_to(tmp_path / "nowhere")
    for path in (PurePosixPath("linked/x.nix"), NIX, PurePosixPath("dangling.nix")):
        with pytest.raises(UsageError, match="symbolic link"):
            plans(plain, file("{ }", path), adopt=True)
    assert (outside / "x.nix").read_text() == "{ }"


def test_a_link_made_after_the_plan_is_refused_too(plain: Path, tmp_path: Path) -> None:
    planned = plans(plain, file("{ }", PurePosixPath("new/x.nix")))
    (tmp_path / "outside").mkdir()
    (plain / "new").symlink_to(tmp_path / "outside")
    with pytest.raises(UsageError, match="symbolic link"):
        apply_files(plain, planned, LOCAL)
    assert list((tmp_path / "outside").iterdir()) == []


@pytest.mark.parametrize("path", ["/etc/x.nix", "../x.nix", "a/../../x.nix", ".git/x.nix"])
def test_a_path_that_leaves_the_checkout_is_refused(plain: Path, path: str) -> None:
    with pytest.raises(UsageError):
        plans(plain, file("{ }", PurePosixPath(path)))


def test_a_path_through_a_file_or_onto_a_directory_is_refused(plain: Path) -> None:
    for path in ("hosts/nix-cache02/actions-runner.nix/x.nix", "hosts/nix-cache02"):
        broken = replace(file("{ }"), path=PurePosixPath(path))
        with pytest.raises(UsageError, match="is no"):
            plans(plain, broken)


# -- doing and undoing ------------------------------------------------------------------------------------------------


def test_everything_is_parsed_before_anything_is_replaced(checkout: Path) -> None:
    write(checkout, file("{ a = 1; }\n"))
    before, known = snapshot(checkout), index(checkout)
    broken = plans(checkout, file("{ a = 2; }\n"), file("a: [\n", YAML))
    with pytest.raises(TemplateError, match=r"w\.yml"):
        apply_files(checkout, broken, LOCAL)
    assert (snapshot(checkout), index(checkout)) == (before, known)


@contextmanager
def small_files() -> Iterator[None]:
    """A real failure in the middle of writing: no file may grow beyond 16 KiB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16384, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_fails_in_the_middle_puts_everything_back(checkout: Path) -> None:
    write(checkout, file("{ a = 1; }\n"), file("a = 1\n", TOFU))
    before, known, there = contents(checkout), index(checkout), shape(checkout)
    planned = plans(checkout, file("{ a = 2; }\n"), file(None, TOFU), file(f"a: {'x' * 20000}\n", YAML))
    assert [str(p.status) for p in planned] == ["changed", "removed", "new"]
    prepared = files_undo(checkout, planned, LOCAL)
    with small_files(), pytest.raises(HostFault, match="cannot be written") as caught:
        apply_files(checkout, planned, LOCAL, prepared=prepared)
    assert caught.value.exit_code is ExitCode.FAILED
    assert "failed too" not in str(caught.value)
    assert (contents(checkout), index(checkout), shape(checkout)) == (before, known, there)


def test_one_file_that_cannot_be_put_back_does_not_keep_the_others(checkout: Path, tmp_path: Path) -> None:
    undo = write(checkout, file("{ a = 1; }\n"), file("a = 1\n", TOFU), file("a: 1\n", YAML))
    (checkout / TOFU).unlink()
    (checkout / TOFU).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="symbolic link"):
        undo_files(checkout, undo, LOCAL)
    assert not (checkout / NIX).exists()
    assert not (checkout / YAML).exists()


def test_a_name_too_long_for_the_file_system_is_told(plain: Path) -> None:
    with pytest.raises(UsageError, match="too long"):
        plans(plain, file("a: 1\n", PurePosixPath(f"hosts/{'x' * 300}.yml")))


def test_git_that_refuses_leaves_all_as_it_was(checkout: Path) -> None:
    before, there = contents(checkout), shape(checkout)
    planned = plans(checkout, file("{ a = 1; }\n"), file("a: 1\n", YAML))
    lock = checkout / ".git/index.lock"
    lock.touch()
    with pytest.raises(CommandFailed, match="git"):
        apply_files(checkout, planned, LOCAL)
    lock.unlink()
    assert (contents(checkout), shape(checkout)) == (before, there)
    assert git(checkout, "status", "--porcelain") == ""


def test_a_file_changed_between_plan_and_writing_is_not_lost(plain: Path) -> None:
    planned = plans(plain, file("{ a = 1; }\n"))
    (plain / NIX).write_text("{ mine = 1; }\n", encoding="utf-8")
    with pytest.raises(DriftError, match="just changed"):
        apply_files(plain, planned, LOCAL)
    assert (plain / NIX).read_text() == "{ mine = 1; }\n"


def test_no_temporary_file_is_left(checkout: Path) -> None:
    write(checkout, file("{ a = 1; }\n"), file("a: 1\n", YAML))
    assert not [name for name in shape(checkout) if Path(name).name.startswith(".nixops-")]


def test_a_new_file_is_known_to_git_by_intent_and_nothing_is_staged(checkout: Path) -> None:
    write(checkout, file("{ a = 1; }\n"))
    assert git(checkout, "status", "--porcelain") == f" A {NIX}\n"
    assert git(checkout, "diff", "--cached", "--name-only") == ""


def test_undo_makes_the_checkout_what_it_was_the_index_included(checkout: Path) -> None:
    write(checkout, file("{ a = 1; }\n"), file("a = 1\n", TOFU))
    git(checkout, "add", "-A")
    git(checkout, "commit", "-qm", "ours")
    (checkout / NIX).chmod(0o640)
    git(checkout, "config", "core.fileMode", "false")
    before, known, there = contents(checkout), index(checkout), shape(checkout)
    planned = plans(checkout, file("{ a = 2; }\n"), file(None, TOFU), file("a: 1\n", YAML))
    assert [str(p.status) for p in planned] == ["changed", "removed", "new"]
    undo = apply_files(checkout, planned, LOCAL)
    assert contents(checkout) != before
    # Through a journal and another process.
    again = FilesUndo.from_json(json.loads(json.dumps(undo.to_json())))
    assert again == undo
    undo_files(checkout, again, LOCAL)
    assert (contents(checkout), index(checkout), shape(checkout)) == (before, known, there)
    assert (checkout / NIX).stat().st_mode & 0o777 == 0o640
    undo_files(checkout, again, LOCAL)
    assert (contents(checkout), index(checkout), shape(checkout)) == (before, known, there)


def test_undo_works_in_a_checkout_without_any_commit(plain: Path) -> None:
    git(plain, "init", "-q")
    git(plain, "add", "-A")
    known = index(plain)
    undo = write(plain, file("{ a = 1; }\n"))
    assert f" A {NIX}" in git(plain, "status", "--porcelain")
    undo_files(plain, undo, LOCAL)
    assert index(plain) == known


def test_undo_of_a_removed_file_that_git_knew_by_intent_only(checkout: Path) -> None:
    write(checkout, file("a = 1\n", TOFU))
    known = git(checkout, "status", "--porcelain")
    undo = write(checkout, file(None, TOFU))
    assert git(checkout, "status", "--porcelain") == ""
    assert git(checkout, "ls-files", "terraform") == ""
    undo_files(checkout, undo, LOCAL)
    assert git(checkout, "status", "--porcelain") == known


def test_undo_after_a_kill_before_git_was_told_still_restores(checkout: Path) -> None:
    planned = plans(checkout, file("{ a = 1; }\n"), file("a: 1\n", YAML))
    undo = files_undo(checkout, planned, LOCAL)
    (checkout / NIX).write_text(planned[0].after or "", encoding="utf-8")
    undo_files(checkout, undo, LOCAL)
    assert git(checkout, "status", "--porcelain") == ""
    assert shape(checkout) == ["hosts", "hosts/nix-cache02", "hosts/nix-cache02/actions-runner.nix"]


def test_undo_leaves_what_was_edited_since_and_says_so(checkout: Path) -> None:
    undo = write(checkout, file("{ a = 1; }\n"), file("a: 1\n", YAML))
    (checkout / NIX).write_text("{ mine = 1; }\n", encoding="utf-8")
    with pytest.raises(DriftError, match=r"nixops-actions2\.nix"):
        undo_files(checkout, undo, LOCAL)
    assert (checkout / NIX).read_text() == "{ mine = 1; }\n"
    assert not (checkout / YAML).exists()


def test_a_staged_file_of_the_users_stays_staged(checkout: Path) -> None:
    (checkout / "own.nix").write_text("{ }\n", encoding="utf-8")
    git(checkout, "add", "own.nix")
    undo = write(checkout, file("{ a = 1; }\n"))
    undo_files(checkout, undo, LOCAL)
    assert git(checkout, "status", "--porcelain") == "A  own.nix\n"


def test_an_unchanged_file_that_git_forgot_is_made_known_again(checkout: Path) -> None:
    write(checkout, file("{ a = 1; }\n"))
    git(checkout, "reset", "-q")
    assert git(checkout, "status", "--porcelain") == f"?? {NIX}\n"
    undo = write(checkout, file("{ a = 1; }\n"))
    assert git(checkout, "status", "--porcelain") == f" A {NIX}\n"
    undo_files(checkout, undo, LOCAL)
    assert git(checkout, "status", "--porcelain") == f"?? {NIX}\n"


def test_a_path_that_git_ignores_is_refused_before_anything_is_written(checkout: Path) -> None:
    (checkout / ".gitignore").write_text("nixops-*.nix\n", encoding="utf-8")
    with pytest.raises(UsageError, match="ignores"):
        write(checkout, file("{ a = 1; }\n"), file("a: 1\n", YAML))
    assert not (checkout / NIX).exists()
    assert not (checkout / YAML).exists()


def test_a_flake_below_the_top_of_its_checkout_works_the_same(tmp_path: Path) -> None:
    top = tmp_path / "top"
    root = top / "nixos"
    root.mkdir(parents=True)
    (root / "flake.nix").write_text("{ }", encoding="utf-8")
    git(top, "init", "-q")
    git(top, "add", "-A")
    git(top, "commit", "-qm", "base")
    undo = write(root, file("{ a = 1; }\n"))
    assert git(top, "status", "--porcelain") == f" A nixos/{NIX}\n"
    assert uncommitted(root, [NIX], LOCAL) == (str(NIX),)
    undo_files(root, undo, LOCAL)
    assert git(top, "status", "--porcelain") == ""


def test_without_git_files_are_written_all_the_same(plain: Path) -> None:
    undo = write(plain, file("{ a = 1; }\n"))
    assert uncommitted(plain, [NIX], LOCAL) == ()
    with pytest.raises(UsageError, match="git"):
        commit_files(plain, [NIX], "x", LOCAL)
    undo_files(plain, undo, LOCAL)
    assert not (plain / NIX).exists()


def test_a_checkout_of_another_user_is_told_with_the_command_that_helps(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # git's own switch for its own test of this.
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    with pytest.raises(UsageError, match=r"safe\.directory"):
        write(checkout, file("{ a = 1; }\n"))
    assert not (checkout / NIX).exists()


# -- committed state --------------------------------------------------------------------------------------------------


def test_uncommitted_names_what_differs_from_the_last_commit(checkout: Path) -> None:
    paths = [NIX, YAML, PurePosixPath("hosts/nix-cache02/actions-runner.nix")]
    assert uncommitted(checkout, paths, LOCAL) == ()
    write(checkout, file("{ a = 1; }\n"), file("a: 1\n", YAML))
    assert uncommitted(checkout, paths, LOCAL) == (str(NIX), str(YAML))
    assert uncommitted(checkout, [], LOCAL) == ()
    git(checkout, "commit", "-qm", "x", "--", str(NIX))
    assert uncommitted(checkout, paths, LOCAL) == (str(YAML),)


def test_committing_takes_our_files_and_leaves_what_else_is_staged(checkout: Path) -> None:
    (checkout / "own.nix").write_text("{ }\n", encoding="utf-8")
    git(checkout, "add", "own.nix")
    (checkout / "hosts/nix-cache02/actions-runner.nix").write_text("{ b = 1; }\n", encoding="utf-8")
    write(checkout, file("{ a = 1; }\n"), file("a: 1\n", YAML))
    revision = commit_files(checkout, [NIX, YAML], "nixops: actions2\n\nwith 'quotes' and $x\n", LOCAL)
    assert revision == git(checkout, "rev-parse", "HEAD").strip()
    assert git(checkout, "log", "-1", "--format=%B").startswith("nixops: actions2\n\nwith 'quotes' and $x")
    assert set(git(checkout, "show", "--name-only", "--format=").split()) == {str(NIX), str(YAML)}
    assert git(checkout, "status", "--porcelain") == " M hosts/nix-cache02/actions-runner.nix\nA  own.nix\n"
    assert commit_files(checkout, [NIX, YAML], "again", LOCAL) is None


def test_committing_takes_removed_and_untracked_files_too(checkout: Path) -> None:
    write(checkout, file("a = 1\n", TOFU))
    commit_files(checkout, [TOFU], "with", LOCAL)
    write(checkout, file(None, TOFU))
    (checkout / YAML).parent.mkdir(parents=True)
    (checkout / YAML).write_text("a: 1\n", encoding="utf-8")
    assert commit_files(checkout, [TOFU, YAML], "without", LOCAL)
    assert git(checkout, "status", "--porcelain") == ""
    assert str(TOFU) not in git(checkout, "ls-files")


def test_a_hook_that_refuses_is_told_and_nothing_is_committed(checkout: Path) -> None:
    write(checkout, file("{ a = 1; }\n"))
    hook = checkout / ".git/hooks/pre-commit"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text("#!/bin/sh\necho 'not today' >&2\nexit 1\n", encoding="utf-8")
    hook.chmod(0o755)
    head = git(checkout, "rev-parse", "HEAD")
    with pytest.raises(CommandFailed, match="not today"):
        commit_files(checkout, [NIX], "x", LOCAL)
    assert git(checkout, "rev-parse", "HEAD") == head
