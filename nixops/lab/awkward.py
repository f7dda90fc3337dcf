"""The tree's awkward shape: a layer that makes the plain one as inhospitable as a NixOS of the field.

/usr/bin and /bin hold ``sh`` and ``env``, /usr/sbin only a helper of PAM that libpam names by path; every program is in
the tools directory, where only a login's PATH leads to (through the running system); nobody logs in as root; the login
is no trusted user.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from nixops.lab import recipe
from nixops.lab.machine import run
from nixops.lab.plain import write
from nixops.transport.command import Runner

_PROGRAM_DIRECTORIES = ("usr/bin", "usr/sbin")
_KEPT = {"sh", "env"}
_PLACE = re.compile(r"(?:/usr)?/s?bin/([^/\s]+)$")
_TOOLS = Path(recipe.TOOLS)


def make_layer(runner: Runner, root: Path, layer: Path) -> None:
    """Make ``layer``, to be laid over ``root`` (same file system: programs become further links to the same files)."""
    tools = layer / _TOOLS.relative_to("/")
    tools.mkdir(parents=True)
    names = _move_programs(root, layer, tools)
    _retarget_links(root, layer, names)
    _rewrite_units(root, layer, names)
    _login(runner, root, layer)
    write(layer / "etc/environment", recipe.ENVIRONMENT)
    write(layer / "etc/profile", recipe.PROFILE)
    write(layer / "etc/sudoers", recipe.SUDOERS, 0o440)
    write(layer / "etc/ssh/sshd_config.d/lab.conf", recipe.SSHD.format(root="no"))
    write(layer / "etc/nix/nix.conf", recipe.NIX_AWKWARD)
    for directory in sorted(path for path in layer.rglob("*") if path.is_dir() and not path.is_symlink()):
        below = root / directory.relative_to(layer)
        if below.is_dir():  # overlayfs shows the upper layer's owner and mode
            shutil.copystat(below, directory)
            os.chown(directory, below.stat().st_uid, below.stat().st_gid)


def _move_programs(root: Path, layer: Path, tools: Path) -> set[str]:
    """Put every program into ``tools`` and hide its old place; returns the names that were moved."""
    programs = {
        path.name: path for directory in reversed(_PROGRAM_DIRECTORIES) for path in (root / directory).iterdir()
    }
    for name, path in programs.items():
        place = tools / name
        if path.is_symlink():
            target = str(path.readlink())
            found = _PLACE.search(target) or re.fullmatch(r"(?:\.\./s?bin/)?([^/]+)", target)
            # Links among the programs stay among them; others (to /etc/alternatives) are absolute and stay as they are.
            place.symlink_to(found[1] if found else target)
        else:
            _link_program(path, place, programs)
    for directory in _PROGRAM_DIRECTORIES:
        opaque = layer / directory
        opaque.mkdir(parents=True)
        # overlayfs shows nothing of the layers below where the directory has this mark.
        os.setxattr(opaque, "trusted.overlay.opaque", b"y")
    os.link((root / "usr/bin/sh").resolve(), layer / "usr/bin/sh")
    for kept in ("usr/bin/env", "usr/sbin/unix_chkpwd"):
        os.link(root / kept, layer / kept)
    return set(programs)


def _link_program(path: Path, place: Path, programs: Iterable[str]) -> None:
    mode = path.stat().st_mode
    with path.open("rb") as program:
        first = program.readline(200)
    match = re.match(rb"#!\s*(?:/usr)?/s?bin/(\S+)", first)
    if match and match[1].decode() in programs and match[1].decode() not in _KEPT:
        # As NixOS does it: an interpreter is named by the place it is really at.
        write(place, "")
        place.write_bytes(b"#!" + str(_TOOLS / match[1].decode()).encode() + path.read_bytes()[match.end() :])
        place.chmod(mode & 0o777)
    elif mode & 0o6000:
        # On NixOS no file of the store has these bits; /run/wrappers gets copies that do.
        shutil.copyfile(path, place)
        place.chmod(mode & 0o777)
    else:
        os.link(path, place)


def _retarget_links(root: Path, layer: Path, names: set[str]) -> None:
    """Links elsewhere in the tree that led to a program (alternatives, git's own directory) lead to it again."""
    for top in ("etc", "usr/lib", "usr/libexec", "var/lib"):
        for directory, folders, files in os.walk(root / top):
            for name in (*folders, *files):
                path = Path(directory) / name
                if not path.is_symlink():
                    continue
                target = "/" + os.path.normpath(os.path.relpath(_absolute(root, path), root))
                found = re.fullmatch(r"(?:/usr)?/s?bin/([^/]+)", target)
                if found and found[1] in names and found[1] not in _KEPT:
                    place = layer / path.relative_to(root)
                    place.parent.mkdir(parents=True, exist_ok=True)
                    place.symlink_to(_TOOLS / found[1])


def _absolute(root: Path, link: Path) -> str:
    """Where ``link`` points, as a path of this machine, one step only."""
    target = str(link.readlink())
    return f"{root}{target}" if target.startswith("/") else str(link.parent / target)


def _rewrite_units(root: Path, layer: Path, names: set[str]) -> None:
    """Let units name their programs where they are; systemd would look up a bare name in /usr/bin."""
    for directory in ("usr/lib/systemd/system", "etc/systemd/system"):
        for path in (root / directory).rglob("*"):
            if path.suffix not in (".service", ".socket", ".conf") or path.is_symlink() or not path.is_file():
                continue
            text = path.read_text(encoding="utf-8")
            rewritten = rewrite_unit(text, names)
            if rewritten != text:
                write(layer / path.relative_to(root), rewritten)


def rewrite_unit(text: str, names: set[str]) -> str:
    """``text`` of a unit with the programs that it runs, or asks after, where they are in the awkward shape."""

    def moved(match: re.Match[str]) -> str:
        prefix, program = match[1], match[2]
        found = re.fullmatch(r"(?:(?:/usr)?/s?bin/)?([^/]+)", program)
        if found and found[1] in names and found[1] not in _KEPT:
            return f"{prefix}{_TOOLS / found[1]}"
        return match[0]

    return re.sub(
        r"^((?:Exec\w+|ConditionPathExists|AssertPathExists)=[-@:+!|]*)(\S+)", moved, text, flags=re.MULTILINE
    )


def _login(runner: Runner, root: Path, layer: Path) -> None:
    """The one login: in the group sudo, with a password for it, a key is put there by each host."""
    user, number = recipe.LOGIN, recipe.LOGIN_ID
    shell = f"{recipe.TOOLS}/bash"
    # The least rounds that crypt(3) takes: sudo asks hundreds of times, and this password opens nothing but the lab.
    hashed = ("openssl", "passwd", "-6", "-salt", "rounds=1000$nixops-lab", "-stdin")
    password = run(runner, "chroot", root, *hashed, stdin=recipe.sudo_password() + "\n")
    passwd = (root / "etc/passwd").read_text(encoding="utf-8")
    passwd = re.sub(r"^(root:.*:)[^:]*$", rf"\g<1>{shell}", passwd, count=1, flags=re.MULTILINE)
    write(layer / "etc/passwd", f"{passwd}{user}:x:{number}:{number}:{user}:/home/{user}:{shell}\n")
    group = (root / "etc/group").read_text(encoding="utf-8")
    group = re.sub(r"^(sudo:[^:]*:[^:]*:).*$", rf"\g<1>{user}", group, flags=re.MULTILINE)
    write(layer / "etc/group", f"{group}{user}:x:{number}:\n")
    shadow = (root / "etc/shadow").read_text(encoding="utf-8")
    write(layer / "etc/shadow", f"{shadow}{user}:{password.out.strip()}:20000:0:99999:7:::\n", 0o640)
    gshadow = (root / "etc/gshadow").read_text(encoding="utf-8")
    gshadow = re.sub(r"^(sudo:[^:]*:[^:]*:).*$", rf"\g<1>{user}", gshadow, flags=re.MULTILINE)
    write(layer / "etc/gshadow", f"{gshadow}{user}:!::\n", 0o640)
    for name in ("shadow", "gshadow"):
        os.chown(layer / "etc" / name, 0, (root / "etc" / name).stat().st_gid)
    home = layer / "home" / user
    home.mkdir(parents=True)
    home.chmod(0o700)
    os.chown(home, number, number)
