"""`invoke trust HOST`."""

from __future__ import annotations

from invoke.tasks import task

from nixops.tasks.support import guarded


@task(
    positional=["host"],
    auto_shortflags=False,
    help={
        "host": "the host's name in the inventory",
        "fingerprint": "the fingerprint that the key must have (SHA256:…), read on the host's own console",
        "yes": "do not ask; needs --fingerprint",
        "replace": "replace the key that is pinned now",
        "inventory": "the inventory file",
    },
)
@guarded
def trust(c, host, fingerprint="", yes=False, replace=False, inventory="inventory/hosts.yml"):  # type: ignore[no-untyped-def]  # invoke inspects the plain signature
    """Pin a host's key: show the one it offers, ask, and write it into the inventory."""
    from nixops.errors import UsageError
    from nixops.inventory.trust import TrustOptions, trust_host

    if host.startswith("-"):
        raise UsageError(f"{host} is no host", hint="invoke trust HOST; its flags: invoke --help trust")
    trust_host(TrustOptions(host, fingerprint or None, yes, replace, inventory))
