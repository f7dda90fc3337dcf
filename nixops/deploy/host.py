"""What a host runs, boots and would boot, asked in one round trip."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from nixops.errors import HostFault
from nixops.transport.command import Command, Runner
from nixops.values import StorePath

# PATH for every script of ours on a host: a NixOS login has no tools in /bin and /usr/bin.
HOST_PATH: Final = "/run/wrappers/bin:/run/current-system/sw/bin:$PATH:/usr/sbin:/usr/bin:/sbin:/bin"

# The resolved directory of the current generation's tools. Only the directory is resolved: coreutils is one
# program with many names, and `readlink -f` of `cat` would lose which one was meant.
_FACTS: Final = f"""
PATH={HOST_PATH}; export PATH
tools=$(readlink -f /run/current-system/sw/bin) || tools=
echo "running=$(readlink -f /run/current-system)"
echo "booted=$(readlink -f /run/booted-system)"
echo "profile=$(readlink -f /nix/var/nix/profiles/system)"
echo "generation=$(readlink /nix/var/nix/profiles/system)"
read -r boot_id </proc/sys/kernel/random/boot_id && echo "boot_id=$boot_id"
echo "tools=$tools"
echo "revision=$(/run/current-system/sw/bin/nixos-version --configuration-revision 2>/dev/null | head -c 200)"
for tool in sh cat mv rm mkdir ln readlink sed grep head tr date sync sleep flock timeout \\
    systemctl systemd-run nix-env; do
    [ -x "$tools/$tool" ] || echo "missing=$tool"
done
for d in /var/lib/nixops/deploys/*/; do
    [ -e "$d/state" ] || continue
    d=${{d%/}} state='' reason=''
    read -r state <"$d/state"
    [ ! -e "$d/reason" ] || read -r reason <"$d/reason"
    echo "deploy=${{d##*/}} $state $reason"
done
[ -e /run/nixops/lease ] && echo "lease=$(head -c 2000 /run/nixops/lease)"
set -- $(systemctl show -P ActiveState nixos-upgrade.service nixos-upgrade.timer 2>/dev/null)
echo "upgrade=${{1-}}"
echo "upgrade_timer=${{2-}}"
exit 0
"""


# It becomes part of an evaluation; anything else is as good as none.
_REVISION: Final = re.compile(r"[0-9A-Za-z._+-]{1,128}")


@dataclass(frozen=True)
class DeployRecord:
    """A deploy that the host remembers: its id, its state and the reason it gave."""

    id: str
    state: str
    reason: str

    @property
    def finished(self) -> bool:
        """Nothing is left to do; a roll-back that failed is looked at again."""
        return self.state in ("committed", "rolled-back", "refused")


@dataclass(frozen=True)
class HostFacts:
    """Four things that are recorded separately, and what else a plan needs.

    :ivar running: the running system (``/run/current-system``).
    :ivar booted: the system that was booted, ``None`` where the host does not say.
    :ivar profile: what the system profile points to; :ivar generation: its number.
    :ivar revision: of the checkout that the running system was built from, ``None`` where it has none (a dirty tree).
    :ivar tools: the resolved directory of the running generation's programs.
    :ivar missing: programs the guard needs and the host has not.
    :ivar upgrading: ``nixos-upgrade.service`` is at work; :ivar auto_upgrade: its timer is set.
    """

    running: StorePath
    booted: StorePath | None
    profile: StorePath
    generation: int
    boot_id: str
    revision: str | None
    tools: str
    missing: tuple[str, ...]
    deploys: tuple[DeployRecord, ...]
    lease: str | None
    upgrading: bool
    auto_upgrade: bool


def read_facts(runner: Runner) -> HostFacts:
    """Ask the host. Needs root, since the lease and the deploys are root's.

    :raises HostFault: it is no NixOS host, or its profile is not readable.
    """
    result = runner.run(Command.script(_FACTS, root=True, title="asking what the host runs")).check()
    values: dict[str, str] = {}
    missing: list[str] = []
    deploys: list[DeployRecord] = []
    for line in result.out.splitlines():
        key, _, value = line.partition("=")
        if key == "missing":
            missing.append(value)
        elif key == "deploy":
            parts = value.split(" ", 2)
            deploys.append(DeployRecord(parts[0], parts[1] if len(parts) > 1 else "", parts[2] if parts[2:] else ""))
        else:
            values[key] = value
    link = re.fullmatch(r"system-([0-9]+)-link", values.get("generation", ""))
    try:
        if link is None:
            raise ValueError("no generation of the system profile")
        return HostFacts(
            running=StorePath(values["running"]),
            booted=StorePath(values["booted"]) if values.get("booted") else None,
            profile=StorePath(values["profile"]),
            generation=int(link.group(1)),
            boot_id=values["boot_id"],
            revision=values["revision"] if _REVISION.fullmatch(values.get("revision", "")) else None,
            tools=values["tools"],
            missing=tuple(missing),
            deploys=tuple(deploys),
            lease=values.get("lease"),
            upgrading=values.get("upgrade") in ("active", "activating"),
            auto_upgrade=values.get("upgrade_timer") == "active",
        )
    except (KeyError, ValueError) as error:
        raise HostFault(
            f"{runner.host} does not look like a NixOS host: {error}",
            hint="nixops deploys NixOS: /run/current-system and /nix/var/nix/profiles/system must be there",
        ) from None
