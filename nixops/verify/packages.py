"""The inventory's host packages are on the PATH that jobs really get."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Final

from nixops.verify.model import Check, Subject, Trial, Trying, failed, passed

# What a package of nixpkgs brings, where the program is not called as the attribute is. One or two programs of
# each are enough to tell that its bin directory is there. No shell builtins: they are found without a PATH.
PROGRAMS: Final = {
    "bashInteractive": ("bash",),
    "busybox": ("busybox",),
    "coreutils": ("ls", "cat", "sort"),
    "coreutils-full": ("ls", "cat", "sort"),
    "diffutils": ("diff",),
    "dnsutils": ("dig",),
    "docker-client": ("docker",),
    "findutils": ("find", "xargs"),
    "gawk": ("awk",),
    "gcc": ("gcc",),
    "git": ("git",),
    "gitFull": ("git",),
    "gitMinimal": ("git",),
    "git-lfs": ("git-lfs",),
    "gnugrep": ("grep",),
    "gnumake": ("make",),
    "gnupatch": ("patch",),
    "gnupg": ("gpg",),
    "gnused": ("sed",),
    "gnutar": ("tar",),
    "iproute2": ("ip",),
    "iputils": ("ping",),
    "lix": ("nix",),
    "nix": ("nix",),
    "nixUnstable": ("nix",),
    "nixStable": ("nix",),
    "nodejs": ("node",),
    "openbao": ("bao",),
    "openssh": ("ssh",),
    "opentofu": ("tofu",),
    "procps": ("ps",),
    "python3Minimal": ("python3",),
    "ripgrep": ("rg",),
    "util-linux": ("flock",),
}
_FAMILIES: Final = (
    (re.compile(r"nixVersions\..*|lixPackageSets\..*|nix_[0-9_]+|lix_[0-9_]+"), ("nix",)),
    (re.compile(r"nodejs(_[0-9]+|-slim.*)"), ("node",)),
    (re.compile(r"python3[0-9]*"), ("python3",)),
    (re.compile(r"gcc[0-9]+"), ("gcc",)),
)

_LOOK: Final = """
PATH=$RUNNER_PATH
for program do
    found=$(command -v -- "$program") || found=
    echo "$program $found"
done
"""


def _known_programs(package: str) -> tuple[str, ...] | None:
    for pattern, programs in _FAMILIES:
        if pattern.fullmatch(package):
            return programs
    return PROGRAMS.get(package)


def programs_of(package: str) -> tuple[str, ...]:
    """The programs that show that ``package`` (an attribute of nixpkgs) is there: by default the one of its name."""
    return _known_programs(package) or (package.rsplit(".", 1)[-1],)


def brings_nix(runner_packages: tuple[str, ...]) -> bool:
    """Whether one of the packages is Nix (or Lix), so that jobs are meant to build."""
    return any("nix" in programs_of(package) for package in runner_packages)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _store_names(path: tuple[str, ...]) -> list[str]:
    """``git-minimal`` for an entry ``/nix/store/…-git-minimal-2.47.0/bin``."""
    found = []
    for entry in path:
        match = re.match(r"/nix/store/[0-9a-z]{32}-(.+)", str(PurePosixPath(*PurePosixPath(entry).parts[:4])))
        if match:
            found.append(re.split(r"-(?=[0-9])", match.group(1), maxsplit=1)[0])
    return found


def _named_on_path(package: str, path: tuple[str, ...]) -> bool:
    """Whether the store name of a PATH entry is that of ``package``, of which no program is known by name."""
    if _known_programs(package) is not None:
        return False
    wanted = _plain(package.rsplit(".", 1)[-1])
    return any(
        _plain(name) in (wanted, wanted.rstrip("0123456789")) or (len(wanted) > 3 and _plain(name).endswith(wanted))
        for name in _store_names(path)
    )


def host_packages(subject: Subject) -> Trying:
    """Each package's programs are found as a job would find them: in the unit's sandbox, on the service's PATH.

    A package whose programs are not known by name also counts when a PATH entry has its name in the store.
    """
    if subject.facts.process is None:
        return failed(expected="a running service with a PATH", found="no process", todo="start the unit")
    path, packages = subject.facts.process.path, subject.runner.packages
    wanted = dict.fromkeys(program for package in packages for program in programs_of(package))
    lines = yield Trial(_LOOK, tuple(wanted))
    found = {program for line in lines for program, _, at in [line.partition(" ")] if "/" in at}
    missing = [
        package
        for package in packages
        if not all(program in found for program in programs_of(package)) and not _named_on_path(package, path)
    ]
    if missing:
        return failed(
            expected="every package of host_packages on the PATH of the running service",
            found="no sign of " + ", ".join(f"{p} ({' '.join(programs_of(p))})" for p in missing),
            todo=f"check hostPackages in the runner's module, and restart {subject.unit} if it still has an older PATH",
        )
    return passed(f"{len(packages)} packages on the service's PATH: " + " ".join(packages))


CHECKS = (Check("host-packages", host_packages, applies=lambda _host, _name, runner: bool(runner.packages)),)
