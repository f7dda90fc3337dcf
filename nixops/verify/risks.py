"""Known risks of a host runner that no check can rule out: they are shown, with the reason they were accepted for.

A risk that is only stated is no failure, accepted or not: nothing on the host differs. What breaks a boundary (another
instance's state within reach, a group that gives root) is a failing check instead; where the inventory accepts that
risk under the check's own key, the check passes and shows the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from nixops.inventory.model import ManagedRunner
from nixops.verify.model import CheckResult
from nixops.verify.packages import brings_nix

PREFIX: Final = "risk-"


@dataclass(frozen=True)
class Risk:
    """One stated risk.

    :ivar key: its name under ``accepted_risks``.
    :ivar tell: what it comes to for this runner, or ``None`` where it does not apply.
    """

    key: str
    tell: Callable[[ManagedRunner], str | None]


def _shared_store(runner: ManagedRunner) -> str | None:
    if not brings_nix(runner.packages):
        return None
    return "a job of a trusted repository can put any derivation into the store, and so into the cache served from it"


def _host_resources(runner: ManagedRunner) -> str | None:
    limits = ", ".join(f"{k}={v}" for k, v in runner.limits.given().items()) or "no systemd limits"
    return f"jobs use the host's CPU, memory and disk ({runner.capacity} at once, {limits})"


def _wider_scope(runner: ManagedRunner) -> str | None:
    if runner.scope is None or runner.scope.repository is not None:
        return None
    return f"the registration admits every repository of {runner.scope}, not only the trusted ones"


def _fork_pull_requests(runner: ManagedRunner) -> str | None:
    del runner
    return "pull requests from forks of a trusted repository reach this runner, subject to Forgejo's approval setting"


RISKS: Final = (
    Risk("shared-store", _shared_store),
    Risk("host-resources", _host_resources),
    Risk("wider-scope", _wider_scope),
    Risk("fork-pull-requests", _fork_pull_requests),
)


def risk_results(runner: ManagedRunner, judged: frozenset[str]) -> tuple[CheckResult, ...]:
    """The risks that apply, then what else the inventory accepts.

    :param judged: keys that belong to a check, whose own result shows the reason.
    """
    results: list[CheckResult] = []
    for risk in RISKS:
        text = risk.tell(runner)
        reason = runner.accepted_risks.get(risk.key)
        if reason is None and risk.key == "wider-scope" and runner.accept_wider_scope:
            reason = "accept_wider_scope: true in the inventory"
        if text is not None:
            hint = "" if reason else f"; nobody has accepted it yet: give a reason under accepted_risks.{risk.key}"
            results.append(CheckResult(PREFIX + risk.key, True, text + hint, reason))
    known = {risk.key for risk in RISKS} | judged
    results += [
        CheckResult(PREFIX + key, True, "a risk that the inventory names", reason)
        for key, reason in runner.accepted_risks.items()
        if key not in known
    ]
    return tuple(results)
