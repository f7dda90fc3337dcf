"""What a task about one runner was asked for: its command line, and the runner on a host that this means."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nixops.inventory.model import Host, ManagedRunner
from nixops.values import HostName, RunnerName


@dataclass(frozen=True)
class DeployOptions:
    """The command line of ``deploy-runner``, ``verify-runner`` and ``render``."""

    host: str | None = None
    runner: str | None = None
    plan_only: bool = False
    yes: bool = False
    inventory: str = "inventory/hosts.yml"
    format: str = "text"
    adopt: bool = False
    commit: bool = False
    templates: str | None = None

    @property
    def json(self) -> bool:
        return self.format == "json"


@dataclass(frozen=True)
class Subject:
    """Which runner on which host, with its inventory; ``templates``: a directory that overrides shipped ones."""

    host_name: HostName
    host: Host
    name: RunnerName
    runner: ManagedRunner
    templates: Path | None = None
