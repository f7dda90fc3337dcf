"""Where the operator's state is: XDG's place, never the working directory, and nobody else's to read."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import pytest

from nixops.errors import HostFault, UsageError
from nixops.state import private_directory, state_directory


def test_the_state_directory_is_xdgs(tmp_path: Path) -> None:
    assert state_directory({"XDG_STATE_HOME": str(tmp_path)}) == tmp_path / "nixops"
    assert state_directory({"HOME": "/home/op"}) == Path("/home/op/.local/state/nixops")
    # A relative one means nothing, by XDG.
    assert state_directory({"XDG_STATE_HOME": "state", "HOME": "/home/op"}) == Path("/home/op/.local/state/nixops")


def test_an_operator_without_any_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(uid: int) -> pwd.struct_passwd:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    with pytest.raises(UsageError, match="neither HOME nor a password entry") as caught:
        state_directory({"HOME": "relative"})
    assert "XDG_STATE_HOME" in str(caught.value.hint)


def test_what_is_made_above_it_is_the_operators_alone_too(tmp_path: Path) -> None:
    """With a umask of 0, anybody could put a claims directory of his own in the place of ours."""
    before = os.umask(0)
    try:
        made = private_directory(tmp_path / "state" / "nixops" / "claims")
    finally:
        os.umask(before)
    assert [each.stat().st_mode & 0o777 for each in (made, made.parent, made.parent.parent)] == [0o700] * 3


def test_a_private_directory_is_the_operators_alone(tmp_path: Path) -> None:
    made = private_directory(tmp_path / "nixops" / "claims")
    assert made.stat().st_mode & 0o777 == 0o700
    assert private_directory(made) == made
    (tmp_path / "file").write_text("")
    with pytest.raises(HostFault, match="cannot be made: Not a directory"):
        private_directory(tmp_path / "file" / "claims")
