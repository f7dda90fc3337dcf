"""What a registry asks for in WWW-Authenticate is read strictly, whatever it sends."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nixops.registry.challenge import Challenge, parse_challenges

NAMES = st.from_regex(r"[a-z][a-z0-9_-]{0,10}", fullmatch=True)


def test_a_bearer_challenge_has_its_parameters() -> None:
    header = 'Bearer realm="https://auth.example.org/token",service="registry",scope="repository:a/b:pull,push"'
    assert parse_challenges(header) == (
        Challenge(
            "bearer",
            {
                "realm": "https://auth.example.org/token",
                "service": "registry",
                "scope": "repository:a/b:pull,push",
            },
        ),
    )


@pytest.mark.parametrize(
    ("header", "schemes"),
    [
        ("", []),
        ("Basic", ["basic"]),
        ('BASIC realm="x"', ["basic"]),
        ('Basic realm="x", Bearer realm="https://a/b"', ["basic", "bearer"]),
        ('Negotiate, Basic realm="x"', ["negotiate", "basic"]),
        ('Negotiate YIIB+/==, Basic realm="x"', ["negotiate", "basic"]),
        ("Bearer realm = token , service=x", ["bearer"]),
        (',, Basic realm="x"', ["basic"]),
    ],
)
def test_several_challenges_in_one_header_are_told_apart(header: str, schemes: list[str]) -> None:
    assert [one.scheme for one in parse_challenges(header)] == schemes


def test_a_quoted_value_may_hold_quotes_commas_and_other_schemes() -> None:
    (found,) = parse_challenges(r'Bearer realm="a \"b\", Basic realm=c",service="d\\"')
    assert found.parameters == {"realm": 'a "b", Basic realm=c', "service": "d\\"}


def test_the_first_of_a_parameter_that_comes_twice_counts() -> None:
    (found,) = parse_challenges('Bearer realm="https://right/",Realm="https://wrong/"')
    assert found.parameters["realm"] == "https://right/"


def test_a_header_without_end_gives_nothing() -> None:
    assert parse_challenges("Basic " * 5000) == ()


@given(st.text(max_size=300))
def test_any_text_is_read_without_an_error(text: str) -> None:
    for one in parse_challenges(text):
        assert one.scheme == one.scheme.lower()


@given(st.lists(st.tuples(NAMES, st.dictionaries(NAMES, st.text(max_size=20), min_size=1, max_size=3)), max_size=3))
def test_what_is_written_by_the_rules_is_read_back(challenges: list[tuple[str, dict[str, str]]]) -> None:
    def quoted(value: str) -> str:
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'

    header = ", ".join(
        f"{scheme} " + ", ".join(f"{key}={quoted(value)}" for key, value in parameters.items())
        for scheme, parameters in challenges
    )
    assert [(one.scheme, dict(one.parameters)) for one in parse_challenges(header)] == challenges
