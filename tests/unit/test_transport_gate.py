"""A channel's CLOSE never overtakes what is on its way, whoever closes it and whenever."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

from nixops.transport.sshgate import Gate, on_channel_close


def test_a_close_waits_for_what_is_being_sent_and_nothing_follows_it() -> None:
    said: list[str] = []
    channel: Any = SimpleNamespace(_handle_close=lambda _: said.append("their close answered"))
    gate = Gate(channel)
    on_its_way, may_go_on = threading.Event(), threading.Event()

    def slow() -> None:
        on_its_way.set()
        may_go_on.wait(5)
        said.append("data")

    sender = threading.Thread(target=lambda: gate.send(slow))
    sender.start()
    on_its_way.wait(5)
    # paramiko's own thread must not wait here: it also carries the answers that the sender may need.
    on_channel_close(channel, None)  # type: ignore[arg-type]  # the message has nothing in it
    assert said == []
    may_go_on.set()
    sender.join(5)
    assert said == ["data", "their close answered"]
    assert gate.send(lambda: said.append("late")) is False and not gate.open
    assert said[-1] == "their close answered"


def test_a_close_with_nothing_on_its_way_happens_at_once() -> None:
    said: list[str] = []
    gate = Gate(SimpleNamespace())  # type: ignore[arg-type]  # only an attribute is set on it
    gate.send(lambda: said.append("data"))
    gate.shut(lambda: said.append("close"))
    assert said == ["data", "close"]


def test_a_failed_send_still_lets_the_close_out() -> None:
    said: list[str] = []
    gate = Gate(SimpleNamespace())  # type: ignore[arg-type]  # as above

    def failing() -> None:
        gate.shut(lambda: said.append("close"))
        raise OSError("gone")

    try:
        gate.send(failing)
    except OSError:
        said.append("failed")
    assert said == ["close", "failed"]


def test_a_channel_without_a_gate_is_answered_as_paramiko_does() -> None:
    said: list[object] = []
    on_channel_close(SimpleNamespace(_handle_close=said.append), "message")  # type: ignore[arg-type]  # as above
    assert said == ["message"]
