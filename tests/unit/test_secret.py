"""Secrets do not print themselves, and the redactor finds them in every form they come back in."""

from __future__ import annotations

import base64
import copy
import io
import json
import logging
import pickle
import traceback
import urllib.parse
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nixops.secret import MASK, Redactor, Secret

VALUE = 'pa$$"w0rd/with+signs\\and ümlaut'
values = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=6, max_size=60).filter(
    lambda t: len(t.strip()) >= 6 and "***" not in t and "\n" not in t and "\r" not in t
)


@dataclass(frozen=True)
class Holder:
    token: Secret


def test_no_way_of_printing_a_secret_shows_it() -> None:
    secret = Secret(VALUE)
    shown = [str(secret), repr(secret), f"{secret}", f"{secret!r:>40}", str(Holder(secret)), "%s" % secret]  # noqa: UP031
    assert all(VALUE not in text and MASK in text for text in shown)


def test_a_secret_is_never_pickled_or_copied_to_a_file() -> None:
    with pytest.raises(TypeError):
        pickle.dumps(Secret(VALUE))
    with pytest.raises(TypeError):
        copy.copy(Secret(VALUE))


def test_a_secret_does_not_change_and_compares_by_value() -> None:
    secret = Secret("a-secret")
    with pytest.raises(AttributeError):
        secret._value = "other"
    assert secret == Secret("a-secret") and secret != Secret("another") and len({secret, Secret("a-secret")}) == 1


@given(values)
def test_the_redactor_finds_every_form_a_server_may_give_back(value: str) -> None:
    redactor = Redactor([Secret(value)])
    forms = [
        value,
        json.dumps({"message": value}),
        json.dumps({"message": value}, ensure_ascii=False),
        urllib.parse.quote(value, safe=""),
        urllib.parse.urlencode({"token": value}),
        base64.b64encode(value.encode()).decode(),
    ]
    for form in forms:
        cleaned = redactor.clean(f"before {form} after")
        assert MASK in cleaned and value not in cleaned


@given(values, st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), max_size=5))
def test_the_redactor_finds_a_secret_inside_a_longer_base64_text(value: str, user: str) -> None:
    encoded = base64.b64encode(f"{user}:{value}".encode()).decode()
    cleaned = Redactor([Secret(value)]).clean(encoded)
    if len(value.encode()) >= 12:
        assert MASK in cleaned


def test_the_redactor_cleans_log_records_and_their_exceptions() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.addFilter(Redactor([Secret(VALUE)]))
    logger = logging.Logger("test")
    logger.addHandler(handler)
    try:
        raise ValueError(f"server said {VALUE}")
    except ValueError:
        logger.exception("with %s", VALUE)
        assert VALUE in traceback.format_exc()
    assert VALUE not in stream.getvalue() and stream.getvalue().count(MASK) >= 2


def test_a_value_too_short_to_be_a_secret_does_not_blank_out_the_text() -> None:
    assert Redactor([Secret("ab")]).clean("about abbeys") == "about abbeys"
