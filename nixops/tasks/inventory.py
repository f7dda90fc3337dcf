"""`invoke inventory`."""

from __future__ import annotations

from invoke.tasks import task

from nixops.tasks.support import guarded


@task(
    auto_shortflags=False,
    help={
        "host": "show one host: each value with where it comes from",
        "format": "text, json, ansible, ssh-config, known-hosts or machines",
        "inventory": "the inventory file",
    },
)
@guarded
def inventory(c, host=None, format="text", inventory="inventory/hosts.yml"):  # type: ignore[no-untyped-def]  # invoke inspects the plain signature
    """Show the inventory, or give it out for Ansible, OpenSSH or Nix."""
    from nixops.inventory.output import InventoryOptions, print_inventory

    print_inventory(InventoryOptions(host=host, format=format, inventory=inventory))
