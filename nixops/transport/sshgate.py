"""Nothing may follow a channel's CLOSE: OpenSSH ends the whole connection for data or an EOF on a channel it has freed.

paramiko decides what to send under the channel's lock, but sends it after it has let go of the lock. Its own thread
answers the host's CLOSE, so a command that ends while its stdin is still being written can see our CLOSE overtake
our EOF, and every other command of the connection dies with it. Under load this was seen within a minute.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from paramiko.channel import Channel
from paramiko.message import Message

_ATTRIBUTE = "nixops_gate"


class Gate:
    """Lets messages of one channel out, and its CLOSE only after them. No lock is held while something is sent."""

    def __init__(self, channel: Channel) -> None:
        self._lock = threading.Lock()
        self._sending = 0
        self._shut = False
        self._later: list[Callable[[], None]] = []
        setattr(channel, _ATTRIBUTE, self)

    @property
    def open(self) -> bool:
        """Nobody has closed the channel yet."""
        return not self._shut

    def send(self, work: Callable[[], object]) -> bool:
        """Do ``work``, which sends and must not wait for the host; false when the channel is closed already."""
        with self._lock:
            if self._shut:
                return False
            self._sending += 1
        try:
            work()
        finally:
            with self._lock:
                self._sending -= 1
                later = self._later if self._sending == 0 else []
                self._later = self._later if self._sending else []
            for close in later:
                close()
        return True

    def shut(self, close: Callable[[], None]) -> None:
        """Let nothing more out, then ``close``: at once, or when what is on its way has gone."""
        with self._lock:
            self._shut = True
            if self._sending:
                self._later.append(close)
                return
        close()


def on_channel_close(channel: Channel, message: Message) -> None:
    """The host has closed a channel: answer it behind what is on its way. Takes the place of paramiko's handler."""
    theirs: Any = channel
    gate: Gate | None = getattr(channel, _ATTRIBUTE, None)
    if gate is None:
        theirs._handle_close(message)
    else:
        gate.shut(lambda: theirs._handle_close(message))
