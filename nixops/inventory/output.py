"""What `invoke inventory` prints, in each of its formats."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nixops.errors import UsageError
from nixops.inventory import export, nearest, show
from nixops.inventory.load import Loaded, load, locate

if TYPE_CHECKING:
    from nixops.ui.report import Reporter


@dataclass(frozen=True)
class InventoryOptions:
    """The flags of the task."""

    host: str | None = None
    format: str = "text"
    inventory: str = "inventory/hosts.yml"


def print_inventory(options: InventoryOptions, reporter: Reporter | None = None) -> None:
    """Print the inventory to stdout.

    :raises UsageError: for an unknown format or host, or an inventory that does not load.
    """
    if options.format not in export.FORMATS:
        raise UsageError(
            f"there is no format {options.format!r}", hint=nearest.hint(options.format, export.FORMATS, what="formats")
        )
    loaded = load(locate(options.inventory, Path.cwd()))
    if options.format == "text":
        _text(loaded, options.host, reporter or _reporter())
        return
    formats: dict[str, Callable[[], str]] = {
        "json": lambda: _json(export.to_json(loaded, options.host)),
        "ansible": lambda: _json(
            export.ansible_host(loaded, options.host) if options.host else export.to_ansible(loaded)
        ),
        "ssh-config": lambda: export.to_ssh_config(loaded, options.host),
        "known-hosts": lambda: export.to_known_hosts(loaded, options.host),
        "machines": lambda: export.to_machines(loaded, options.host),
    }
    print(formats[options.format](), end="")


def _reporter() -> Reporter:
    from nixops.secret import Redactor
    from nixops.ui.report import Reporter

    return Reporter(Redactor())


def _json(document: object) -> str:
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def _text(loaded: Loaded, host: str | None, reporter: Reporter) -> None:
    if host is not None:
        name, _ = loaded.host(host)
        reporter.table(str(name), show.VALUES_HEADER, list(show.value_rows(loaded, host)))
        return
    reporter.table("Hosts", show.HOSTS_HEADER, list(show.host_rows(loaded)))
    if runners := list(show.runner_rows(loaded)):
        reporter.result()
        reporter.table("Runners", show.RUNNERS_HEADER, runners)
