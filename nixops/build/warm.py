"""Filling the binary cache with what hosts will ask it for, and proving that it serves it.

A host that upgrades itself evaluates its system and then substitutes. So each host's toplevel is built in the cache
host's store, kept there from garbage collection, and then every path of its closure is asked for at the cache's URL,
as the host will: served, and signed by a key of ours.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from nixops.build.evaluate import flake_facts
from nixops.build.proof import HostProof, Proof, prove
from nixops.errors import BuildFailed, NixopsError, UsageError
from nixops.inventory.building import BinaryCache
from nixops.nix.closure import store_failed
from nixops.nix.narinfo import PublicKey
from nixops.nix.store_uri import StoreUri
from nixops.nix.verbs import Nix
from nixops.render.flake import flake_reference
from nixops.transport.command import Command, Runner
from nixops.transport.fleet import fan_out
from nixops.transport.target import SshTarget
from nixops.values import FlakeRef, HostName, StorePath, System

if TYPE_CHECKING:
    from nixops.build.session import BuildSession
    from nixops.inventory.load import Loaded

Say = Callable[[str], None]

# How many hosts at once: while one builds, the next is evaluated. What two have in common is built once, since the
# store's own locks see to that.
_AT_ONCE: Final = 2

_FACTS: Final = """
t: {
  drv = builtins.unsafeDiscardStringContext t.drvPath;
  out = builtins.unsafeDiscardStringContext t.outPath;
  system = t.system or null;
}
"""

# $1 is what to do, $2 the host's name, $3 the store path. Root's roots are links of our own, made before the build, so
# that nothing is collected in between; `nix-store --add-root` of anybody else needs the path to be there. One that a
# killed run left behind goes after two days. A host's name has no dot in it.
_ROOTS: Final = """
set -eu
if [ "$(id -u)" = 0 ]; then
  directory=/nix/var/nix/gcroots/nixops-warm
  hash=${3#/nix/store/}
  reserved=$directory/$2.${hash%%-*}
  case $1 in
  reserve)
    mkdir -p "$directory"
    find "$directory" -name '*.*' -mtime +1 -exec rm -f {} +
    ln -sfn "$3" "$reserved"
    ;;
  keep)
    nix-store --check-validity "$3"
    ln -sfn "$3" "$reserved"
    mv -fT "$reserved" "$directory/$2"
    ;;
  drop) rm -f "$reserved" ;;
  esac
elif [ "$1" = keep ]; then
  directory=${XDG_STATE_HOME:-$HOME/.local/state}/nixops/warm
  mkdir -p "$directory"
  nix-store --add-root "$directory/$2" --realise "$3" >/dev/null
fi
"""


@dataclass(frozen=True)
class Warmed:
    """One host's system in the cache host's store.

    :ivar closure: every path that it needs; empty where it was not built.
    :ivar error: why it was not.
    """

    host: HostName
    toplevel: StorePath | None
    closure: tuple[StorePath, ...]
    seconds: float
    error: NixopsError | None = None


def warm_cache(
    loaded: Loaded, hosts: Sequence[HostName], session: BuildSession, on_event: Say = lambda _: None
) -> Proof:
    """Build each host's toplevel on the cache host, root it there, and ask the cache for all of it.

    A host whose system does not build keeps no other from being warmed.

    :param hosts: names of the inventory; see :func:`warm_targets`.
    :param on_event: is told progress in words.
    :returns: what the cache serves and what it lacks; :meth:`nixops.build.proof.Proof.check` raises for the latter.
    :raises UsageError: the inventory names no cache or no flake.
    :raises Unreachable: or a subclass: the cache host is not reached.
    """
    from nixops.transport.mux import SshPool

    cache, keys = cache_of(loaded)
    systems = _Systems(loaded)
    systems.note_changes(session.local, on_event)
    name, host = loaded.host(cache.host)
    target = SshTarget.from_inventory(name, host, loaded.base)
    key = loaded.inventory.build.ssh_key if host.builder is not None else None
    identity = session.resolve(key) if key is not None else None
    with SshPool([target], redactor=session.redactor, identity=identity) as ssh:
        # Before anything is evaluated: that may take minutes.
        there = ssh.connect(name, timeout=target.connect_timeout + target.login_timeout)
        builds = host.builder.systems if host.builder and host.builder.systems else (host.system,)
        warming = _Warming(systems, Nix(session.local, env=ssh.nix_env()), there, target, builds, on_event)
        warmed = [outcome.unwrap() for outcome in fan_out(hosts, warming.warm, limit=_AT_ONCE)]
    return _proven(loaded, cache, keys, warmed, on_event)


def verify_cache(
    loaded: Loaded, hosts: Sequence[HostName], session: BuildSession, on_event: Say = lambda _: None
) -> Proof:
    """Ask the cache for the hosts' systems as the flake has them now; nothing is built and no host is asked.

    What a system needs is taken from what the cache says of it, as a host does that substitutes.

    :raises UsageError: the inventory names no cache or no flake.
    """
    cache, keys = cache_of(loaded)
    systems = _Systems(loaded)
    systems.note_changes(session.local, on_event)
    nix = Nix(session.local)

    def evaluate(name: HostName) -> Warmed:
        begin = time.monotonic()
        on_event(f"{name}: evaluating its system")
        try:
            out = systems.evaluate(nix, name).out
        except BuildFailed as error:
            return Warmed(name, None, (), time.monotonic() - begin, error)
        return Warmed(name, out, (out,), time.monotonic() - begin)

    warmed = [outcome.unwrap() for outcome in fan_out(hosts, evaluate, limit=_AT_ONCE)]
    return _proven(loaded, cache, keys, warmed, on_event)


def warm_targets(loaded: Loaded, host: str | None, group: str | None) -> tuple[HostName, ...]:
    """The hosts that a command line means.

    :raises UsageError: it names none, both ways at once, or a host or group that there is not.
    """
    if (host is None) == (group is None):
        hint = f"--host NAME or --group NAME; hosts: {', '.join(list(loaded.inventory.hosts)[:12])}"
        raise UsageError("which hosts? Name one, or a group of them", hint=hint)
    if host is not None:
        return (loaded.host(host)[0],)
    assert group is not None  # one of them is given
    return loaded.group(group)


def cache_of(loaded: Loaded) -> tuple[BinaryCache, list[PublicKey]]:
    """The inventory's cache and its keys.

    :raises UsageError: it names none, or a key is none.
    """
    cache = loaded.inventory.cache
    if cache is None:
        raise UsageError(
            f"{loaded.file} has no `cache`",
            hint="say which: cache: {url: https://nix-cache.example.org, host: nix-cache02, "
            'public_keys: ["nix-cache.example.org-1:…"]}',
        )
    try:
        return cache, [PublicKey.parse(key) for key in cache.public_keys]
    except ValueError as error:
        raise UsageError(f"{loaded.file}: cache.public_keys: {error}") from None


@dataclass(frozen=True)
class Toplevel:
    """A host's system, evaluated. ``system`` is what it is built on, where the derivation says so."""

    drv: StorePath
    out: StorePath
    system: System | None


class _Systems:
    """The toplevels of the user's flake.

    :raises UsageError: the inventory names no flake, or it is not there.
    """

    def __init__(self, loaded: Loaded) -> None:
        config = loaded.inventory.config
        if config is None:
            raise UsageError(
                f"{loaded.file} has no `config`", hint="say where the flake is: config: {flake: ../nixos-servers}"
            )
        self.checkout = (loaded.base / Path(config.flake).expanduser()).resolve()
        if not (self.checkout / "flake.nix").is_file():
            raise UsageError(
                f"{loaded.file}: config.flake: there is no flake.nix in {self.checkout}",
                hint="the path is relative to the inventory file",
            )
        self.timeout = config.build_timeout
        self._attribute = config.attribute
        self._reference = flake_reference(self.checkout, git=True)

    def note_changes(self, local: Runner, say: Say) -> None:
        """Say when the checkout has changes that no revision has: what is built is then not what hosts upgrade to."""
        if flake_facts(local, FlakeRef(self._reference)).dirty:
            say(
                f"note: {self.checkout} has uncommitted changes; a host that upgrades from its branch needs other paths"
            )

    def installable(self, host: HostName) -> str:
        return f"{self._reference}#{self._attribute.replace('{host}', host)}.config.system.build.toplevel"

    def evaluate(self, nix: Nix, host: HostName) -> Toplevel:
        """The host's system.

        :raises BuildFailed: it does not evaluate.
        """
        answer: Mapping[str, Any] = nix.eval_json(self.installable(host), apply=_FACTS, timeout=self.timeout)
        try:
            system = System(answer["system"]) if answer["system"] else None
            return Toplevel(StorePath(answer["drv"]), StorePath(answer["out"]), system)
        except (ValueError, TypeError, KeyError) as error:
            raise BuildFailed(f"the toplevel of {host} is no derivation: {error}") from None


@dataclass(frozen=True)
class _Warming:
    """Building hosts' systems in one store, and keeping them there.

    :ivar builds: the systems that the store's machine builds by itself.
    """

    systems: _Systems
    nix: Nix
    there: Runner
    target: SshTarget
    builds: tuple[System, ...]
    say: Say

    def warm(self, host: HostName) -> Warmed:
        """Build, root, and tell the closure. What keeps this host from being warmed is in the value.

        :raises Unreachable: the cache host is gone: that is nobody's fault but its own.
        """
        begin = time.monotonic()
        found: Toplevel | None = None
        try:
            self.say(f"{host}: evaluating its system")
            found = self.systems.evaluate(self.nix, host)
            self._roots("reserve", host, found.out)
            self.say(f"{host}: building {found.out.name} on {self.target.name}")
            try:
                self.nix.build_derivation(
                    found.drv,
                    store=StoreUri.ssh_ng(self.target),
                    timeout=self.systems.timeout,
                    on_line=lambda line: self.say(f"{host}: {line}"),
                )
                self._roots("keep", host, found.out)
            except BaseException:
                self._release(host, found.out)
                raise
            closure = self._closure(found.out)
        except BuildFailed as error:
            out = found.out if found is not None else None
            return Warmed(host, out, (), time.monotonic() - begin, self._explained(host, error, found))
        self.say(f"{host}: {len(closure)} paths, kept on {self.target.name}")
        return Warmed(host, found.out, closure, time.monotonic() - begin)

    def _explained(self, host: HostName, error: BuildFailed, found: Toplevel | None) -> BuildFailed:
        hint = error.hint
        if found is not None and found.system is not None and found.system not in self.builds:
            # The cache host may well have builders of its own for it: only now is it known that it does not.
            own = ", ".join(self.builds)
            hint = f"{host} is {found.system}, and {self.target.name} builds {own}: see its own builders"
        return BuildFailed(f"the system of {host} is not built: {error.message}", hint=hint, detail=error.detail)

    def _roots(self, action: str, host: HostName, toplevel: StorePath) -> None:
        result = self.there.run(Command.script(_ROOTS, action, host, toplevel, timeout=120.0, title="keeping a path"))
        if not result.ok:
            raise store_failed(result, f"keep {toplevel.name} from garbage collection")

    def _release(self, host: HostName, toplevel: StorePath) -> None:
        try:
            self._roots("drop", host, toplevel)
        except NixopsError as error:
            self.say(f"{host}: what was reserved for it on {self.target.name} stays for two days: {error.message}")

    def _closure(self, toplevel: StorePath) -> tuple[StorePath, ...]:
        result = self.there.run(Command.of("nix-store", "-qR", toplevel, timeout=300.0))
        if not result.ok:
            raise store_failed(result, f"tell what {toplevel} consists of")
        return tuple(StorePath(line) for line in result.out.split())


def _proven(loaded: Loaded, cache: BinaryCache, keys: Sequence[PublicKey], warmed: Sequence[Warmed], say: Say) -> Proof:
    hosts = [HostProof(w.host, w.toplevel, w.closure, w.seconds, w.error) for w in warmed]
    ca_file = loaded.base / Path(cache.ca_file).expanduser() if cache.ca_file else None
    return prove(cache.url, cache.host, keys, hosts, ca_file=ca_file, say=say)
