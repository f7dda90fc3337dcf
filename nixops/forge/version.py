"""Which Forgejo answers, and what that version can do."""

from __future__ import annotations

import re
from dataclasses import dataclass

from nixops.errors import ForgeError

OLDEST = 7
SUPPORTED = f"Forgejo {OLDEST} and later are supported"
_NUMBERS = re.compile(r"v?(\d{1,4})\.(\d{1,6})(?:\.(\d{1,6}))?(?![\d.])")


@dataclass(frozen=True)
class ForgejoVersion:
    """A Forgejo's version.

    :ivar major: what decides which way a runner gets its credentials.
    :ivar text: as ``GET /version`` gave it, such as ``15.0.3+gitea-1.22.0``.
    """

    major: int
    text: str

    @classmethod
    def parse(cls, text: str) -> ForgejoVersion:
        """Read what ``GET /version`` gave.

        :raises ForgeError: not a version, a Gitea, or a Forgejo before 7 (whose registration is another).
        """
        text = text.strip()
        numbers = _NUMBERS.match(text)
        if numbers is None:
            raise ForgeError(f"{text[:60]!r} is not the version of a Forgejo", hint=SUPPORTED)
        major = int(numbers[1])
        # Forgejo says which Gitea it comes from: "9.0.3+gitea-1.22.0". Gitea itself counts 1.x without that.
        if major < OLDEST:
            kind = "Forgejo" if "gitea" in text[numbers.end() :] else "Gitea (or a Forgejo before 7)"
            raise ForgeError(f"the server is {kind} {text[:60]}", hint=SUPPORTED)
        return cls(major, text)

    @property
    def lists_runners(self) -> bool:
        """Runners can be listed, created and deleted through the API."""
        return self.major >= 15

    @property
    def lists_waiting_jobs(self) -> bool:
        """``{scope}/actions/runners/jobs`` is there; asking it changes nothing."""
        return self.major >= 11

    @property
    def dispatches(self) -> bool:
        """A workflow can be dispatched through the API."""
        return self.major >= 8

    @property
    def returns_run(self) -> bool:
        """A dispatch answers with the run's id, when it is asked to."""
        return self.major >= 11

    @property
    def shows_run(self) -> bool:
        """A run can be asked for by id: surely from 15 on; 12 to 14 differ, so a 404 there says nothing."""
        return self.major >= 12

    @property
    def shows_logs(self) -> bool:
        """A job's log can be read through the API."""
        return self.major >= 17

    def __str__(self) -> str:
        return f"Forgejo {self.text}"
