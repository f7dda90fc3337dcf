"""A host for ``guard.sh`` without a host: a tree in a temporary directory, with the programs that it calls.

The script is the real one, run by the real ``sh`` with the real ``flock`` and ``timeout``; what stands in are
``switch-to-configuration``, ``nix-env`` and ``systemctl``. Files below ``fault`` tell them how to fail.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from nixops.deploy import guard

SCRIPT = Path(guard.__file__).with_name("guard.sh")
NONCE = "0123456789abcdef"
OLD, NEW, THIRD = "aaa-old", "bbb-new", "ccc-third"
REAL_TOOLS = (
    *("sh", "cat", "mv", "rm", "mkdir", "ln", "readlink", "sed", "grep", "head"),
    *("date", "sleep", "tr", "flock", "timeout"),
)

_SWITCH = """#!/bin/sh
root={root}; name={name}
echo "$1 $name" >>$root/calls
how=$(cat "$root/fault/$1-$name" 2>/dev/null) || how=0
case $how in
hang) exec sleep 60 ;;
silent) exit 0 ;;
half) ln -sfn $root/nix/store/$name $root/run/current-system; exec sleep 60 ;;
esac
case $1 in
test) [ "$how" = 0 ] || [ "$how" = 4 ] && ln -sfn $root/nix/store/$name $root/run/current-system ;;
boot)
    link=$(readlink $root/nix/var/nix/profiles/system); n=${{link#system-}}; n=${{n%-link}}
    if [ "$how" = 0 ] && [ -e $root/boot/loader/loader.conf ]; then
        printf 'timeout 5\\ndefault nixos-generation-%s.conf\\n' "$n" >$root/boot/loader/loader.conf
        printf 'title NixOS\\noptions init=/nix/store/%s/init loglevel=4\\n' $name \
            >$root/boot/loader/entries/nixos-generation-$n.conf
    fi ;;
esac
exit $how
"""

_NIX_ENV = """#!/bin/sh
root={root}; profiles=$root/nix/var/nix/profiles
echo "nix-env $3" >>$root/calls
how=$(cat "$root/fault/nix-env$3" 2>/dev/null) || how=0
[ "$how" = hang ] && exec sleep 60
[ "$how" = 0 ] || exit $how
case $3 in
--set) ln -sfn "$4" $profiles/system-42-link; ln -sfn system-42-link $profiles/system ;;
--switch-generation) ln -sfn "system-$4-link" $profiles/system ;;
esac
"""

# `kill` ends the unit's whole session, as systemd ends a control group.
_SYSTEMCTL = """#!/bin/sh
for unit do :; done
unit=${{unit#nixops-}}; unit=${{unit%%-*}}
case $1 in
list-units) [ ! -e {root}/failed ] || cat {root}/failed ;;
kill) [ ! -e {root}/units/$unit ] || {pkill} -KILL --session "$(cat {root}/units/$unit)" ;;
esac
exit 0
"""

_SYNC = """#!/bin/sh
[ -e {root}/fault/sync ] && exit 1
exit 0
"""


def _found(program: str) -> str:
    found = shutil.which(program)
    assert found is not None, f"this machine has no {program}"
    return found


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


@dataclass
class GuardHost:
    """The tree; ``start`` and ``end`` run the guard's modes in it."""

    root: Path
    activation_seconds: int = 3
    confirm_seconds: int = 5
    loader: str | None = None
    boot_id: str = field(default_factory=_boot_id)
    running_units: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for place in ("nix/var/nix/profiles", "nix/var/nix/gcroots", "run", "boot/loader/entries", "fault", "units"):
            (self.root / place).mkdir(parents=True)
        tools = self.root / "tools"
        tools.mkdir()
        for name in REAL_TOOLS:
            (tools / name).symlink_to(_found(name))
        self._program(tools / "nix-env", _NIX_ENV)
        self._program(tools / "systemctl", _SYSTEMCTL, pkill=_found("pkill"))
        self._program(tools / "sync", _SYNC)
        for name in (OLD, NEW, THIRD):
            self._program(self.store(name) / "bin/switch-to-configuration", _SWITCH, name=name)
        self.set_running(OLD)
        (self.root / "nix/var/nix/profiles/system-41-link").symlink_to(self.store(OLD))
        (self.root / "nix/var/nix/profiles/system").symlink_to("system-41-link")
        self.set_boot_default(OLD, 41)
        for kind, name in (("old", OLD), ("new", NEW)):
            (self.root / f"nix/var/nix/gcroots/nixops-x-{kind}").symlink_to(self.store(name))

    def _program(self, path: Path, text: str, **values: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.format(root=self.root, **values))
        path.chmod(0o755)

    def store(self, name: str) -> Path:
        return self.root / "nix/store" / name

    @property
    def directory(self) -> Path:
        return self.root / "deploy"

    def facts(self) -> str:
        """What the script's ``facts`` prints, with the parameters written."""
        self.prepare()
        argv = [str(self.root / "tools/sh"), str(SCRIPT), "facts", str(self.directory)]
        return subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True).stdout.strip()

    # -- what the host is like ----------------------------------------------------------------------------------

    def set_running(self, name: str) -> None:
        link = self.root / "run/current-system"
        link.unlink(missing_ok=True)
        link.symlink_to(self.store(name))

    def set_profile(self, name: str) -> None:
        subprocess.run([self.root / "tools/nix-env", "-p", "system", "--set", self.store(name)], check=True)

    def set_boot_default(self, name: str, generation: int) -> None:
        loader = self.root / "boot/loader"
        (loader / "loader.conf").write_text(f"timeout 5\ndefault nixos-generation-{generation}.conf\n")
        (loader / f"entries/nixos-generation-{generation}.conf").write_text(f"options init=/nix/store/{name}/init\n")

    def fault(self, what: str, how: str = "1") -> None:
        (self.root / "fault" / what).write_text(how)

    def mend(self, what: str) -> None:
        (self.root / "fault" / what).unlink()

    @property
    def running(self) -> str:
        return (self.root / "run/current-system").resolve().name

    @property
    def profile(self) -> str:
        return (self.root / "nix/var/nix/profiles/system").resolve().name

    @property
    def boot_default(self) -> str:
        return Path(self.run("facts").stdout.decode().strip()).name

    @property
    def is_at(self) -> tuple[str, str, str]:
        """Running, profile and boot default."""
        return self.running, self.profile, self.boot_default

    @property
    def calls(self) -> list[str]:
        file = self.root / "calls"
        return file.read_text().splitlines() if file.exists() else []

    @property
    def roots(self) -> int:
        return len(list((self.root / "nix/var/nix/gcroots").iterdir()))

    # -- the transaction ----------------------------------------------------------------------------------------

    def prepare(self, state: str | None = "prepared") -> None:
        """What the operator's side leaves before it starts the units."""
        self.directory.mkdir(exist_ok=True)
        values = {
            "root": str(self.root),
            "id": "x",
            "nonce": NONCE,
            "tools": str(self.root / "tools"),
            "old": str(self.store(OLD)),
            "new": str(self.store(NEW)),
            "profile": str(self.root / "nix/var/nix/profiles/system-41-link"),
            "generation": "41",
            "boot_id": self.boot_id,
            "activation_seconds": str(self.activation_seconds),
            "confirm_seconds": str(self.confirm_seconds),
        }
        values["profile"] = str(Path(values["profile"]).resolve())
        (self.directory / "params").write_text("".join(f"{k}={shlex.quote(v)}\n" for k, v in values.items()))
        loader = self.loader or self.run("facts").stdout.decode().strip()
        with (self.directory / "params").open("a") as params:
            params.write(f"loader={shlex.quote(loader)}\n")
        (self.directory / "lock").touch()
        (self.directory / "deadline").write_text(f"{int(float(Path('/proc/uptime').read_text().split()[0])) + 600}\n")
        if state is not None:
            (self.directory / "state").write_text(state + "\n")

    def run(self, mode: str) -> subprocess.CompletedProcess[bytes]:
        """A mode that ends by itself."""
        return subprocess.run(
            [self.root / "tools/sh", SCRIPT, mode, self.directory], capture_output=True, timeout=60, check=False
        )

    def start(self, mode: str) -> subprocess.Popen[bytes]:
        """A mode as a unit of its own."""
        unit = {"run": "guard", "watch": "watchdog", "recover": "recover"}[mode]
        process = subprocess.Popen(
            [self.root / "tools/sh", SCRIPT, mode, self.directory],
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        (self.root / "units" / unit).write_text(str(process.pid))
        self.running_units.append(process)
        return process

    def kill(self, unit: str = "guard") -> None:
        subprocess.run([self.root / "tools/systemctl", "kill", "--signal=KILL", f"nixops-{unit}-x.service"], check=True)

    def stop_everything(self) -> None:
        for process in self.running_units:
            if process.poll() is None:
                os.kill(process.pid, signal.SIGCONT)
            process.wait(timeout=1) if process.poll() is not None else None
        for unit in (self.root / "units").iterdir():
            self.kill(unit.name)
        for process in self.running_units:
            process.wait(timeout=10)

    @property
    def state(self) -> str:
        file = self.directory / "state"
        return file.read_text().strip() if file.exists() else ""

    @property
    def reason(self) -> str:
        file = self.directory / "reason"
        return file.read_text().strip() if file.exists() else ""

    def give(self, word: str, nonce: str = NONCE, why: str = "") -> None:
        new = self.directory / "verdict.new"
        new.write_text(f"{word} {nonce} {why}\n")
        new.rename(self.directory / "verdict")

    def until(self, condition: Callable[[], bool], what: str, seconds: float = 20.0) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"not within {seconds} s: {what}; state {self.state}, {self.reason}"
            time.sleep(0.02)

    def reach(self, *states: str) -> None:
        self.until(lambda: self.state in states, f"state {' or '.join(states)}")
