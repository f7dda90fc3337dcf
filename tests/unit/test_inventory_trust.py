"""Pinning a host key: what is compared, what is asked, and that one line of the file changes and nothing else."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from nixops.errors import Declined, ExitCode, HostFault, HostKeyChanged, InventoryError, UsageError
from nixops.inventory.edit import write_host_key
from nixops.inventory.load import load
from nixops.inventory.trust import Offer, ask_on_terminal, offer, pin
from nixops.values import HostName

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAqt16V6G0qKcT6D39YUHzI+3tuqFe2e4XYfp4KVZysp"
FINGERPRINT = "SHA256:XvRlK2hDK0VUC8ubMN1Jy1klnhzAPVHcRxGzAdQhB+c"
OTHER = (
    "ecdsa-sha2-nistp256 AAAAE2VjZHNhLXNoYTItbmlzdHAyNTYAAAAIbmlzdHAyNTYAAABBBB91F1jm"
    "HAQpNiXk2YYN2e2+ld2nTG6AMrRjO1wWmxlr/NK4CQBB41dpgOD4wr9FOM+h3iQITTqcFByU7BG/Tno="
)
OTHER_FINGERPRINT = "SHA256:bXKKHJV7mrhY6OjtHwdjx3FhP9eDx0OO40fb5Rlsb8A"


def pinned(tmp_path: Path, text: str, host: str = "a") -> str:
    """The text after the key was written."""
    file = tmp_path / "i.yml"
    file.write_bytes(text.encode())
    write_host_key(load(file), HostName(host), KEY)
    assert load(file).inventory.hosts[HostName(host)].host_key == (KEY,)
    assert [p.name for p in tmp_path.iterdir()] == ["i.yml"], "no draft is left"
    return file.read_bytes().decode()


def changes(before: str, after: str) -> list[str]:
    lines = difflib.ndiff(before.splitlines(), after.splitlines())
    return [line for line in lines if line[0] in "+-"]


def test_the_key_goes_below_the_address_and_the_comments_stay(tmp_path: Path) -> None:
    before = (
        "# head\nhosts:\n  a:  # the first\n    # where\n    address: a.example.org  # here\n"
        "\n    user: root\n  b: {address: b}  # flow\n# end"
    )
    assert changes(before, pinned(tmp_path, before)) == [f"+     host_key: {KEY}"]


def test_the_shipped_inventory_can_be_pinned(tmp_path: Path) -> None:
    before = (Path(__file__).parents[2] / "inventory" / "hosts.yml").read_text()
    assert changes(before, pinned(tmp_path, before, "nix-cache02")) == [f"+     host_key: {KEY}"]


@pytest.mark.parametrize(
    ("before", "changed"),
    [
        ("hosts: {a: {address: x}}\n", [f"+ hosts: {{a: {{host_key: {KEY}, address: x}}}}"]),
        ("hosts:\n  a: {address: x}\n", [f"+   a: {{host_key: {KEY}, address: x}}"]),
        ("defaults: {address: x}\nhosts:\n  a:\n", [f"+     host_key: {KEY}"]),
        ("defaults: {address: x}\nhosts:\n  a:", [f"+     host_key: {KEY}"]),
        ("defaults: {address: x}\nhosts:\n  a: {}\n", [f"+   a: {{host_key: {KEY}}}"]),
        ("defaults: {address: x}\nhosts:\n  a:\n    # none\n    user: root\n", [f"+     host_key: {KEY}"]),
        ("hosts:\n  a:\n    address: x\n    host_key: # none yet\n", [f"+     host_key: {KEY} # none yet"]),
        ("hosts:\n  a:\n    address: x\n    host_key: [] # none yet\n", [f"+     host_key: {KEY} # none yet"]),
        ("hosts:\n  a:\n    address:\n      x\n    user: root\n", [f"+     host_key: {KEY}"]),
        ("hosts:\n  a:\n    address: 'x'\n", [f"+     host_key: {KEY}"]),
    ],
)
def test_one_line_changes_in_each_way_a_host_is_written(tmp_path: Path, before: str, changed: list[str]) -> None:
    found = changes(before, pinned(tmp_path, before))
    added = [line for line in found if line[0] == "+"]
    assert added == changed
    assert len(found) - len(added) <= 1


@pytest.mark.parametrize(
    "written",
    [
        f"host_key: {OTHER}",
        f'host_key: "{OTHER} comment"',
        f"host_key: ['{OTHER}', {OTHER}]",
        f"host_key:\n      - {OTHER}\n      - {OTHER} x",
        f"host_key:\n    - {OTHER}",
        f"host_key: [\n      {OTHER}\n    ]",
    ],
)
def test_another_key_is_replaced_however_it_is_written(tmp_path: Path, written: str) -> None:
    before = f"hosts:\n  a:\n    {written} # why\n    address: x\n    user: root # who\n"
    after = pinned(tmp_path, before)
    assert after == f"hosts:\n  a:\n    host_key: {KEY} # why\n    address: x\n    user: root # who\n"


def test_windows_line_ends_stay(tmp_path: Path) -> None:
    after = pinned(tmp_path, "hosts:\r\n  a:\r\n    address: x\r\n")
    assert after == f"hosts:\r\n  a:\r\n    address: x\r\n    host_key: {KEY}\r\n"


@pytest.mark.parametrize(
    "text",
    [
        "defaults: &d {address: x}\nhosts: {a: *d}\n",
        "groups: {g: &h {address: x}}\nhosts:\n  a:\n    <<: *h\n",
        f"hosts:\n  a:\n    address: x\n    host_key: |-\n      {OTHER}\n",
        "hosts:\n  ? a\n  : address: x\n",
        "hosts:\n  a: ~\ndefaults: {address: x}\n",
    ],
)
def test_a_layout_that_no_line_fits_is_left_alone_and_the_line_to_write_given(tmp_path: Path, text: str) -> None:
    file = tmp_path / "i.yml"
    file.write_text(text)
    with pytest.raises(InventoryError) as caught:
        write_host_key(load(file), HostName("a"), KEY)
    assert f"under hosts.a: host_key: {KEY}" in (caught.value.hint or "")
    assert file.read_text() == text
    assert [p.name for p in tmp_path.iterdir()] == ["i.yml"]


def test_a_host_with_merged_keys_and_one_of_its_own_gets_the_line_there(tmp_path: Path) -> None:
    text = "groups: {g: &h {user: deploy}}\nhosts:\n  a:\n    <<: *h\n    address: x\n"
    assert changes(text, pinned(tmp_path, text)) == [f"+     host_key: {KEY}"]


def test_the_files_mode_stays_and_a_link_stays_a_link(tmp_path: Path) -> None:
    real = tmp_path / "real.yml"
    real.write_text("hosts: {a: {address: x}}\n")
    real.chmod(0o640)
    link = tmp_path / "i.yml"
    link.symlink_to("real.yml")
    write_host_key(load(link), HostName("a"), KEY)
    assert link.is_symlink()
    assert real.stat().st_mode & 0o777 == 0o640
    assert KEY in real.read_text()


def test_a_file_that_cannot_be_replaced_is_a_fault_of_the_machine_and_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "i.yml"
    file.write_text("hosts: {a: {address: x}}\n")
    found = load(file)

    def full(descriptor: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(HostFault, match="No space left") as caught:
        write_host_key(found, HostName("a"), KEY)
    assert caught.value.exit_code is ExitCode.FAILED
    assert file.read_text() == "hosts: {a: {address: x}}\n"


# -- what is compared and asked -------------------------------------------------------------------------------


class Answers:
    """Answers a question, and remembers it."""

    def __init__(self, answer: bool) -> None:
        self.answer = answer
        self.asked: list[str] = []

    def __call__(self, question: str) -> bool:
        self.asked.append(question)
        return self.answer


def trusted(
    tmp_path: Path,
    *,
    pinned: str = "",
    fingerprint: str | None = None,
    yes: bool = False,
    replace: bool = False,
    ask: Callable[[str], bool] | None = None,
) -> bool:
    file = tmp_path / "i.yml"
    file.write_text(f"hosts:\n  a:\n    address: x\n{f'    host_key: {pinned}' if pinned else ''}\n")
    found = load(file)
    offered = offer(found, "a", lambda: KEY + " some comment")
    return pin(found, offered, fingerprint=fingerprint, yes=yes, replace=replace, ask=ask or Answers(True))


def test_the_offered_key_is_written_after_a_yes(tmp_path: Path) -> None:
    answers = Answers(True)
    assert trusted(tmp_path, ask=answers)
    assert KEY in (tmp_path / "i.yml").read_text()
    assert FINGERPRINT in answers.asked[0]


def test_a_no_changes_nothing(tmp_path: Path) -> None:
    with pytest.raises(Declined):
        trusted(tmp_path, ask=Answers(False))
    assert KEY not in (tmp_path / "i.yml").read_text()


def test_yes_needs_a_fingerprint_for_somebody_has_to_vouch(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--yes needs --fingerprint"):
        trusted(tmp_path, yes=True)


@pytest.mark.parametrize("given", [FINGERPRINT, FINGERPRINT.removeprefix("SHA256:"), FINGERPRINT + "="])
def test_yes_with_the_right_fingerprint_asks_nobody(tmp_path: Path, given: str) -> None:
    answers = Answers(False)
    assert trusted(tmp_path, yes=True, fingerprint=given, ask=answers)
    assert answers.asked == []


def test_a_fingerprint_that_does_not_match_ends_with_3_and_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(HostKeyChanged) as caught:
        trusted(tmp_path, yes=True, fingerprint=OTHER_FINGERPRINT, replace=True)
    assert caught.value.exit_code is ExitCode.UNREACHABLE
    assert FINGERPRINT in caught.value.message and OTHER_FINGERPRINT in caught.value.message
    assert KEY not in (tmp_path / "i.yml").read_text()


def test_a_key_that_is_pinned_already_changes_nothing_and_asks_nobody(tmp_path: Path) -> None:
    answers = Answers(False)
    assert not trusted(tmp_path, pinned=f"[{OTHER}, {KEY} here]", ask=answers)
    assert answers.asked == []


def test_another_pinned_key_is_only_replaced_when_told_to(tmp_path: Path) -> None:
    with pytest.raises(HostKeyChanged, match="--replace") as caught:
        trusted(tmp_path, pinned=OTHER)
    assert OTHER_FINGERPRINT in caught.value.message
    assert trusted(tmp_path, pinned=OTHER, replace=True)
    assert OTHER not in (tmp_path / "i.yml").read_text()


def test_without_a_terminal_nobody_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with (tmp_path / "stdin").open("w+") as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        with pytest.raises(UsageError, match="--fingerprint"):
            ask_on_terminal("sure?")


def test_fingerprints_are_those_of_ssh_keygen() -> None:
    offered = Offer(HostName("a"), KEY, (OTHER,))
    assert offered.fingerprint == FINGERPRINT
    assert offered.pinned_fingerprints == (OTHER_FINGERPRINT,)
