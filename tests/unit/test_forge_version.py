"""Versions as Forgejo gives them, and what each can do."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nixops.errors import ForgeError
from nixops.forge.version import ForgejoVersion


@pytest.mark.parametrize(
    ("text", "major"),
    [
        ("9.0.3+gitea-1.22.0", 9),
        ("15.0.3+gitea-1.22.0", 15),
        ("7.0.16+gitea-1.21.11", 7),
        ("16.0.0-dev-123-0123abcd+gitea-1.22.0", 16),
        ("v17.1+gitea-1.22.0\n", 17),
        ("42.0.0", 42),
    ],
)
def test_the_major_version_is_read(text: str, major: int) -> None:
    version = ForgejoVersion.parse(text)
    assert (version.major, version.text) == (major, text.strip())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1.22.6", "Gitea"),
        ("1.23.0+dev-12-gabc", "Gitea"),
        ("6.0.2+gitea-1.21.4", "Forgejo 6.0.2"),
        ("", "not the version of a Forgejo"),
        ("latest", "not the version of a Forgejo"),
        ("17", "not the version of a Forgejo"),
    ],
)
def test_what_is_not_supported_is_refused_with_what_is(text: str, said: str) -> None:
    with pytest.raises(ForgeError) as error:
        ForgejoVersion.parse(text)
    assert said in error.value.message
    assert error.value.hint == "Forgejo 7 and later are supported"


@given(st.text())
def test_any_text_gives_a_version_or_a_clear_error(text: str) -> None:
    try:
        assert ForgejoVersion.parse(text).major >= 7
    except ForgeError as error:
        assert error.hint


def test_what_each_version_can_do() -> None:
    can = {
        n: {k for k in ("lists_runners", "lists_waiting_jobs", "dispatches", "returns_run") if getattr(v, k)}
        for n in range(7, 18)
        if (v := ForgejoVersion.parse(f"{n}.0.0+gitea-1.22.0"))
    }
    assert can[7] == set()
    assert can[8] == can[10] == {"dispatches"}
    assert can[11] == can[14] == {"dispatches", "lists_waiting_jobs", "returns_run"}
    assert can[15] == can[17] == {"dispatches", "lists_waiting_jobs", "returns_run", "lists_runners"}
