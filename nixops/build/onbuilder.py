"""One system's image on one builder: kept from garbage collection, built, and pushed from there."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from nixops.build.later import Later
from nixops.build.model import BuiltSystem, Evaluated, Probe, PushedSystem
from nixops.build.publish import confirm, staging_reference
from nixops.build.push import BuilderUnfit, RegistryAccess, push_system
from nixops.errors import HostFault
from nixops.nix.log import full_disk
from nixops.nix.store_uri import StoreUri
from nixops.transport.command import Command, LineSink
from nixops.transport.exec import StreamRunner
from nixops.values import ImageReference, StorePath

if TYPE_CHECKING:
    from nixops.build.session import BuildSession

# How long a build that was not pushed is kept, minutes.
KEPT: Final = 24 * 60

# $1: the output, as evaluation has it, or empty. $2: the root's name. $3: minutes that a root is kept.
# A root may point to what is not there yet: so there is no moment in which the output is without. Only root's login
# may make one where the collector looks; another's is made afterwards, by way of Nix.
_PREPARE: Final = """
umask 022
if [ "$(id -u)" -eq 0 ] && [ -n "$1" ]; then
    roots=/nix/var/nix/gcroots/nixops-images
    mkdir -p "$roots" && find "$roots" -maxdepth 1 -type l -mmin "+$3" -exec rm -f {} +
    ln -sfn "$1" "$roots/$2" && printf 'root %s\\n' "$roots/$2"
fi
if [ -n "$1" ] && nix-store --check-validity "$1" 2>/dev/null; then
    echo 'valid yes'
fi
exit 0
"""

# $1: the output. $2: the root's name. $3: minutes.
_KEEP: Final = """
umask 022
if [ "$(id -u)" -eq 0 ]; then
    roots=/nix/var/nix/gcroots/nixops-images
else
    roots=${XDG_STATE_HOME:-$HOME/.local/state}/nixops/roots
fi
mkdir -p "$roots" || exit 1
find "$roots" -maxdepth 1 -type l -mmin "+$3" -exec rm -f {} +
nix-store --realise "$1" --add-root "$roots/$2" --indirect >/dev/null || exit 1
printf 'root %s\\n' "$roots/$2"
"""


@dataclass(frozen=True)
class Built:
    """A system's image on a builder; ``root`` is the link there that keeps it."""

    system: BuiltSystem
    root: str | None


def build_on(
    session: BuildSession, evaluated: Evaluated, probe: Probe, runner: StreamRunner, on_line: LineSink | None = None
) -> Built:
    """Build what was evaluated in the builder's store, unless it is there already.

    :raises BuildFailed: the derivation failed; ``detail`` is the end of its log.
    :raises Unreachable: or a subclass: the builder was lost. :raises HostFault: its disk is full.
    """
    target = probe.builder.target
    name = f"{(evaluated.out or evaluated.drv).hash_part}-{secrets.token_hex(4)}"
    began, clock = time.time(), time.monotonic()
    said = _said(runner, _PREPARE, evaluated.out or "", name)
    out = evaluated.out
    if out is None or said.get("valid") != "yes":
        built = session.remote_nix().build_derivation(
            evaluated.drv,
            store=StoreUri.ssh_ng(target),
            timeout=session.settings.build_timeout,
            on_line=on_line,
        )
        out = built.out
    root = said.get("root") or _said(runner, _KEEP, out, name).get("root")
    system = BuiltSystem(
        evaluated=evaluated,
        builder=target.name,
        out=out,
        nix=probe.nix or (0, 0),
        seconds=time.monotonic() - clock,
        began=began,
        ended=time.time(),
    )
    return Built(system, root)


def push_from(
    session: BuildSession,
    built: Built,
    destination: ImageReference,
    runner: StreamRunner,
    on_line: LineSink | None = None,
) -> PushedSystem:
    """Push it from its builder under its staging tag, and ask the registry for what it has.

    :raises PushFailed: it could not be pushed, or the registry has something else.
    :raises BuilderUnfit: the builder lacks something for it, or does not reach the registry though we do.
    :raises RegistryError: the registry does not answer us either.
    """
    name = destination.registry
    client = session.registry(name)
    staging = staging_reference(destination, built.system.evaluated.system, built.system.out)
    login = session.login(name)
    access = RegistryAccess(
        login.auth_file(name) if login is not None else None,
        authority=session.authority(name),
        tls=session.registry_settings(name).tls,
    )
    try:
        sent = push_system(
            runner,
            built.system,
            staging,
            access,
            timeout=session.settings.push_timeout,
            root=built.root,
            on_line=on_line,
            clean=session.redactor.clean,
        )
    except BuilderUnfit:
        # Where the registry is away for us too, no other builder would do better: this raises that instead.
        Later(lambda: client.manifest(staging.repository, staging.tag)).value()
        raise
    # In a thread of its own, as a request cannot be interrupted: whoever waits for it can.
    return Later(lambda: confirm(client, staging, built.system.evaluated.system, sent)).value()


def _said(runner: StreamRunner, script: str, out: StorePath | str, name: str) -> dict[str, str]:
    """What a script of ours printed: lines of a word and a value."""
    result = runner.run(Command.script(script, out, name, str(KEPT), title="keeping the image", timeout=120.0))
    if not result.ok:
        if full_disk(result.err):
            raise HostFault(f"the disk of {runner.host} is full: the image cannot be kept", detail=result.tail(5))
        raise BuilderUnfit(
            f"{runner.host} cannot keep what it built from garbage collection (exit code {result.code})",
            detail=result.tail(5),
        )
    pairs = (line.partition(" ") for line in result.out.splitlines())
    return {key: value for key, _, value in pairs}
