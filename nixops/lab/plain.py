"""The tree's plain shape: Debian with a NixOS-like boot, and none of the services that a container has no use for."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from nixops.lab import recipe


def settle(root: Path, openbao: Path) -> None:
    """Finish the freshly installed tree at ``root``: settings, tools, boot; and nothing left of where it came from."""
    _forget_origin(root)
    units = root / "etc/systemd/system"
    for unit in recipe.MASKED:
        (units / unit).unlink(missing_ok=True)
        (units / unit).symlink_to("/dev/null")
    # They make units of disks, consoles and init scripts: none are here, and every daemon-reload would ask again.
    for generator in (root / "usr/lib/systemd/system-generators").iterdir():
        mask = root / "etc/systemd/system-generators" / generator.name
        mask.parent.mkdir(exist_ok=True)
        mask.symlink_to("/dev/null")
    write(units / "nixops-lab-boot.service", recipe.file_text("nixops-lab-boot.service"))
    (units / "multi-user.target.wants/nixops-lab-boot.service").symlink_to("../nixops-lab-boot.service")
    write(units / "ssh.service.d/lab.conf", recipe.SSH_UNIT)
    write(root / "etc/systemd/journald.conf.d/lab.conf", recipe.JOURNALD)
    write(root / "etc/ssh/sshd_config.d/lab.conf", recipe.SSHD.format(root="prohibit-password"))
    _plain_logins(root)
    write(root / "etc/nix/nix.conf", recipe.NIX_PLAIN)
    _open_daemon(root)
    _own_build_users(root)
    write(root / "etc/NIXOS", "")
    write(root / "etc/fstab", "")

    tools = root / recipe.TOOLS.lstrip("/")
    tools.parent.mkdir(parents=True, exist_ok=True)
    tools.symlink_to("/usr/bin")
    shutil.copyfile(openbao, root / "usr/bin/bao")
    (root / "usr/bin/bao").chmod(0o755)

    write(root / "opt/lab/boot", recipe.file_text("boot.sh"), 0o755)
    bootstrap = root / recipe.BOOTSTRAP.lstrip("/")
    write(bootstrap / "init", recipe.file_text("bootstrap-init.sh"), 0o755)
    (bootstrap / "sw").mkdir()
    (bootstrap / "sw/bin").symlink_to(recipe.TOOLS)
    write(root / "boot/loader/loader.conf", recipe.LOADER)
    write(root / "boot/loader/entries/nixos-generation-0.conf", recipe.LOADER_ENTRY)


def write(path: Path, text: str, mode: int = 0o644) -> None:
    """Write a file of the tree with exactly this mode. It is a new file: the old one may have other links."""
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(mode)


def _forget_origin(root: Path) -> None:
    """Hosts have no network but the lab's, and each has a name, an id and keys of its own."""
    write(root / "etc/apt/sources.list", "")
    for directory in ("var/lib/apt/lists", "var/cache/apt", "var/log/apt"):
        shutil.rmtree(root / directory, ignore_errors=True)
        (root / directory).mkdir(parents=True)
    for file in [
        *root.glob("etc/apt/sources.list.d/*"),
        *root.glob("etc/apt/apt.conf.d/*proxy*"),
        *root.glob("etc/ssh/ssh_host_*"),
        *root.glob("var/log/*.log"),
        root / "etc/resolv.conf",
        root / "etc/machine-id",
        root / "var/lib/dbus/machine-id",
    ]:
        file.unlink(missing_ok=True)


def _open_daemon(root: Path) -> None:
    """Let everybody talk to the Nix daemon, as on NixOS; Debian's package keeps that to a group."""
    for file in root.glob("usr/lib/tmpfiles.d/*.conf"):
        text = file.read_text(encoding="utf-8")
        if "daemon-socket" in text:
            opened = re.sub(r"^(d\s+/nix/var/nix/daemon-socket)\s.*$", r"\1 0755 root root", text, flags=re.MULTILINE)
            write(root / "etc/tmpfiles.d" / file.name, opened)


def _plain_logins(root: Path) -> None:
    """Let no login run Debian's scripts for a message of the day, which NixOS has not."""
    for file in (root / "etc/pam.d/sshd", root / "etc/pam.d/login"):
        text = file.read_text(encoding="utf-8")
        write(file, re.sub(r"^session\s.*\bpam_motd\.so\b.*\n", "", text, flags=re.MULTILINE))


def _own_build_users(root: Path) -> None:
    """Give Nix's build users ids that no user of this machine has.

    When a build ends, Nix kills whatever else runs as its build user; a Nix on this machine sees the processes of all
    hosts, and would end a build inside one of them.
    """
    passwd = root / "etc/passwd"
    text = re.sub(
        r"^(nixbld(\d+):x):\d+:",
        lambda found: f"{found[1]}:{recipe.BUILD_USERS + int(found[2])}:",
        passwd.read_text(encoding="utf-8"),
        flags=re.MULTILINE,
    )
    write(passwd, text)
