"""A host in memory for the checks: answers as a real one gave them (systemd 257, Nix 2.26), each of them changeable."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field

from nixops.inventory import model
from nixops.transport.command import Command, LineSink, Result
from nixops.values import RunnerName
from nixops.verify.model import CheckResult, Patience
from nixops.verify.run import verify_runner

OURS = "gitea-runner-actions2.service"
OTHER = "gitea-runner-actions1.service"
NAME = RunnerName("actions2")
UUID = "22222222-2222-2222-2222-222222222222"
IDENTITY = "43:77"

_UNIT = {
    "MainPID": "694",
    "Result": "success",
    "NRestarts": "0",
    "ExecMainStartTimestampMonotonic": "2088547523",
    "ExecMainStatus": "0",
    "Job": "0",
    "ControlGroup": f"/system.slice/{OURS}",
    "CPUQuotaPerSecUSec": "1.500000s",
    "MemoryMax": "1073741824",
    "EnvironmentFiles": "/run/secrets/runner-token (ignore_errors=no)",
    "WorkingDirectory": "!/var/lib/gitea-runner/actions2",
    "Nice": "0",
    "CapabilityBoundingSet": "cap_chown cap_kill",
    "AmbientCapabilities": "",
    "User": "gitea-runner-actions2",
    "Group": "gitea-runner-actions2",
    "DynamicUser": "yes",
    "ProtectSystem": "strict",
    "SystemCallFilter": "~",
    "StateDirectory": "gitea-runner-actions2",
    "BindPaths": "/var/lib/private/gitea-runner-actions2:/var/lib/gitea-runner:rbind",
    "TemporaryFileSystem": "/var/lib:ro",
    "LoadState": "loaded",
    "ActiveState": "active",
    "SubState": "running",
    "InvocationID": "e3a02f4c2bd84be4b1900af1545de432",
}
_OTHER_UNIT = {
    **_UNIT,
    "MainPID": "695",
    "User": "gitea-runner",
    "StateDirectory": "gitea-runner",
    "EnvironmentFiles": "/run/secrets/actions1-token (ignore_errors=no)",
}
_PATH = ":".join(
    f"/nix/store/1svk98kqvif242ifrxfwnzh7x9wk8ws8-{name}/bin"
    for name in ("coreutils-9.5", "git-minimal-2.47.0", "nix-2.26.1", "nodejs-22.11.0")
)


@dataclass
class RecordedHost:
    """A good host until a test changes one of its answers.

    :ivar looks: changes to our unit's properties for the second, third… time it is read.
    :ivar registrations: what the registration's files say the second, third… time.
    :ivar opened: what the runner's user can open: ``read``, ``list`` or ``write``, and the path.
    :ivar broken: titles of commands that fail with 127 and print nothing.
    """

    host: str = "nix-cache02"
    unit: dict[str, str] = field(default_factory=lambda: dict(_UNIT))
    other: dict[str, str] = field(default_factory=lambda: dict(_OTHER_UNIT))
    looks: list[dict[str, str]] = field(default_factory=list)
    uid: int = 63984
    probe_uid: int | None = None
    nice: int | str = 0
    groups: str = ""
    uptime: float = 2204.7
    started: float = 2088.54
    accounts: str = "root:x:0:0::/root:/bin/sh\n"
    cgroup: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(
        default_factory=lambda: {
            "/run/secrets/runner-token": "0400 root:root",
            "/run/secrets/actions1-token": "0400 root:root",
            "/run/secrets/cache-secret": "0400 root:root",
            "/run/secrets/deep/backup": "0400 root:root",
            "/var/lib/vault/approle/role-id": "0400 root:root",
            "/var/lib/vault/approle/secret-id": "0400 root:root",
            "/var/lib/private/gitea-runner/actions1/.runner": "0600 root:root",
        }
    )
    directories: dict[str, str] = field(
        default_factory=lambda: {
            "/run/secrets": "0755 root:root",
            "/var/lib/vault/approle": "0700 root:root",
            "/var/lib/private/gitea-runner": "0755 root:root",
        }
    )
    well_formed: bool = True
    opened: set[tuple[str, str]] = field(default_factory=set)
    identity: str = IDENTITY
    programs: set[str] = field(default_factory=lambda: {"ls", "cat", "sort", "git", "nix", "node"})
    writing: str = "readable\nsystem\n"
    settings: str = "trusted-users = root\nallowed-users = *\n"
    cache_units: str = ""
    daemon: str = "untrusted"
    build: str = "built /nix/store/y83akzdczwfwqn9jrrb690l5x8cfn0cm-nixops-verify-d0f3e548006bd88f"
    registration: str = (
        '@registration\n"uuid": "22222222-2222-2222-2222-222222222222"\n"name": "nix-cache02-native"\n'
        '"address": "http://forge.lab:3000"\n@config\n@declared\n0\n'
    )
    registrations: list[str] = field(default_factory=list)
    path: str = _PATH
    our_unit: str = OURS
    broken: set[str] = field(default_factory=set)
    ran: list[Command] = field(default_factory=list)

    def run(self, command: Command, on_line: LineSink | None = None) -> Result:
        """The seam. What no answer is recorded for is a defect of the test."""
        del on_line
        self.ran.append(command)
        if command.name in self.broken:
            return Result(command, 127, b"", b"sh: 1: not found\n", host=self.host)
        code, text = self._answer(command)
        return Result(command, code, text.encode(), b"", host=self.host)

    def _answer(self, command: Command) -> tuple[int, str]:
        script = command.stdin_bytes.decode()
        match command.name:
            case "reading the unit":
                return 0, self._units(command.argv[4:])
            case "listing files":
                return 0, self._listing(command.argv[4:])
            case "trying as the runner's user":
                uid = self.uid if self.probe_uid is None else self.probe_uid
                return 0, self._unit_of_trials(script, uid)
            case "reading the registration":
                said = self.registration
                self.registration = self.registrations.pop(0) if self.registrations else said
                return 0, said + "@end\n"
        return self._testinfra(command.argv[2].split("export PATH\n", 1)[1])

    def _units(self, units: Sequence[str]) -> str:
        if len(units) == 1 and self.looks:
            self.unit |= self.looks.pop(0)
            self.uptime += 1
        blocks, processes = [], []
        for unit in units:
            shown = self.unit if unit == self.our_unit else self.other
            blocks.append("".join(f"{k}={v}\n" for k, v in shown.items()))
            process = f"@process\npid={shown['MainPID']}\nmember={self.groups}\nnamed=\n"
            if shown["MainPID"] != "0":
                cgroup = "".join(f"cgroup={k} {v}\n" for k, v in self.cgroup.items())
                uid = self.uid if unit == self.our_unit else 63182
                process += f"Uid={uid}\t{uid}\t{uid}\t{uid}\nGid={uid}\t{uid}\nGroups={uid} \ngroup=\n"
                process += f"nice={self.nice}\nstarted={int(self.started * 100)}\npath={self.path}\n{cgroup}"
            processes.append(process)
        return "\n".join(blocks) + f"@host\nuptime={self.uptime}\nmemory=24684092\n" + "".join(processes) + "@end\n"

    def _listing(self, paths: Sequence[str]) -> str:
        records = []
        for kind, have in (("d", self.directories), ("f", self.files)):
            for path, seen in have.items():
                if any(path == p or path.startswith(p + "/") for p in paths):
                    mode, owner = seen.split(" ")
                    uid = 0 if owner == "root:root" else 1000
                    records.append(f"{IDENTITY}\t{kind}\t{mode}\t{uid}\t{uid}\t9\t{path}\0")
        return "".join(records) + "@end\0"

    def _unit_of_trials(self, script: str, uid: int) -> str:
        words = shlex.split(script, comments=False)
        mark = next(word for word in words if word.startswith("@")).split(" ")[0]
        said = f"{mark} uid {uid}\n"
        starts = [i for i, word in enumerate(words) if word == "-c"]
        for number, start in enumerate(starts):
            # timeout -k 5 SECONDS /bin/sh -c TEXT sh ARGUMENT… < /dev/null
            end = words.index("<", start)
            answer = self._probe(words[start + 1], words[start + 3 : end])
            said += f"\n{mark} begin {number}\n" + (
                f"{answer}\n{mark} end {number}\n" if answer is not None else "half"
            )
        return said

    def _probe(self, script: str, args: Sequence[str]) -> str | None:
        """What a trial says; None where it does not come to its end."""
        if "ls -A --" in script:
            found = [f"{how} {i} {self.identity}" for i, p in enumerate(args) for how, q in self.opened if p == q]
            return "\n".join(found)
        if "for program do" in script:
            return "\n".join(f"{p} {'/bin/' + p if p in self.programs else ''}" for p in args)
        if "db.sqlite" in script:
            return self.writing
        if "store ping" in script:
            return self.daemon
        if "nix-build" in script:
            return self.build
        raise AssertionError(f"no answer recorded for the probe {script}")

    def _testinfra(self, line: str) -> tuple[int, str]:
        if "config show" in line:
            return 0, self.settings
        if "systemctl cat" in line:
            return 0, self.cache_units
        if "TOKEN=" in line or "wc -l" in line:
            return (0 if self.well_formed else 1), ""
        words = shlex.split(line)
        path = words[-1]
        if line.startswith("test -f"):
            return (0 if path in self.files else 1), ""
        if line.startswith("test -d"):
            return (0 if path in self.directories else 1), ""
        if line.startswith("stat -Lc"):
            mode, owner = (self.files | self.directories)[path].split(" ")
            user, group = owner.split(":")
            return 0, {"%a": mode.lstrip("0"), "%U": user, "%G": group}[words[2]]
        if line.startswith("grep -qs") and path == "/etc/passwd":
            # A basic regular expression of GNU grep.
            pattern = words[-2].replace("\\|", "|")
            return (0 if re.search(pattern, self.accounts, re.MULTILINE) else 1), ""
        raise AssertionError(f"no answer recorded for {line}")


def inventory_host(other: bool = True, **runner: object) -> model.Host:
    """A host with ``actions2`` (changed by ``runner``) and, beside it, the hand-written ``actions1``."""
    ours = {
        "name": "nix-cache02-native",
        "labels": ["native:host"],
        "scope": {"user": "torjus"},
        "trusted": ["torjus/nixos-servers"],
        "host_packages": ["coreutils", "gitMinimal", "nodejs", "nix"],
        "limits": {"MemoryMax": "1G", "CPUQuota": "150%"},
        "token": {"path": "hosts/nix-cache02/runner-token"},
        **runner,
    }
    runners: dict[str, object] = {"actions2": ours}
    if other:
        runners["actions1"] = {"managed": False, "token_file": "/run/secrets/actions1-token"}
    return model.Host.model_validate({"address": "nix-cache02", "runners": runners})


class Clock:
    """Time that only passes by sleeping."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def check(
    recorded: RecordedHost,
    host: model.Host | None = None,
    forge: object = None,
    clock: Clock | None = None,
    unit: str = OURS,
) -> dict[str, CheckResult]:
    """All results by name."""
    time = clock or Clock()
    recorded.our_unit = unit
    results = verify_runner(
        recorded,
        host_name="nix-cache02",
        host=host or inventory_host(),
        runner_name=NAME,
        forge=forge,  # type: ignore[arg-type]  # tests hand in lists of their own runners
        forge_url="http://forge.lab:3000",
        patience=Patience(sleep=time.sleep, clock=time),
    )
    return {result.name: result for result in results}


def failures(results: dict[str, CheckResult]) -> set[str]:
    """Names of the checks that failed."""
    return {name for name, result in results.items() if not result.ok}
