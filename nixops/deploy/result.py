"""The documents that machines read (DESIGN: "The JSON document of anything that touches hosts")."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

from nixops.errors import ExitCode
from nixops.ui.report import Step
from nixops.verify.model import CheckResult

# Of each task's document; a change that breaks its readers gets another number.
DEPLOY_SCHEMA: Final = "nixops/deploy/1"
VERIFY_SCHEMA: Final = "nixops/verify/1"
RENDER_SCHEMA: Final = "nixops/render/1"


class Outcome(StrEnum):
    """How it ended for one host."""

    COMMITTED = "committed"
    UNCHANGED = "unchanged"
    PLANNED = "planned"
    ROLLED_BACK = "rolled-back"
    FAILED = "failed"
    UNREACHABLE = "unreachable"
    LOCKED = "locked"
    UNKNOWN = "unknown"


# Over several hosts, the first of these that occurred is the exit code of the whole (DESIGN).
PRECEDENCE = (
    ExitCode.UNKNOWN_STATE,
    ExitCode.ROLLED_BACK,
    ExitCode.FAILED,
    ExitCode.UNREACHABLE,
    ExitCode.LEASED,
    ExitCode.CHECKS_FAILED,
)

BY_EXIT_CODE = {
    ExitCode.UNREACHABLE: Outcome.UNREACHABLE,
    ExitCode.ROLLED_BACK: Outcome.ROLLED_BACK,
    ExitCode.LEASED: Outcome.LOCKED,
    ExitCode.UNKNOWN_STATE: Outcome.UNKNOWN,
}


@dataclass(frozen=True)
class HostResult:
    """What a task did to one host. ``from_`` and ``to`` are toplevels, where they are known."""

    host: str
    outcome: Outcome
    from_: str | None = None
    to: str | None = None
    steps: Sequence[Step] = ()
    checks: Sequence[CheckResult] = ()
    error: str | None = None
    plan: dict[str, Any] | None = None

    def document(self) -> dict[str, Any]:
        """As JSON; ``plan`` is there only where one was asked for."""
        body: dict[str, Any] = {
            "host": self.host,
            "outcome": self.outcome.value,
            "from": self.from_,
            "to": self.to,
            "steps": [{"name": s.name, "seconds": round(s.seconds, 3)} for s in self.steps],
            "checks": [
                {"name": c.name, "ok": c.ok, "detail": c.detail, **({"accepted": c.accepted} if c.accepted else {})}
                for c in self.checks
            ],
            "error": self.error,
        }
        return body if self.plan is None else {**body, "plan": self.plan}


@dataclass(frozen=True)
class Document:
    """One document of a task: its schema, its outcome and its hosts."""

    schema: str
    outcome: Outcome
    hosts: Sequence[HostResult] = field(default_factory=tuple)
    error: str | None = None

    def dumps(self) -> str:
        """One JSON text, with a newline at its end left to the caller."""
        body: dict[str, Any] = {"schema": self.schema, "outcome": self.outcome.value}
        if self.error is not None:
            body["error"] = self.error
        body["hosts"] = [h.document() for h in self.hosts]
        return json.dumps(body, indent=2)
