"""The root tree that all hosts of all labs share: built once from Debian packages, then only ever read.

The cache holds two kinds of directories. ``packages-…`` is Debian as debootstrap leaves it, and takes a minute.
``tree-…`` is made from that in seconds, by links to the same files, and has two parts: ``root``, the whole system in
its plain shape, and ``awkward``, a layer to lie over it. Both are built beside their final place and renamed, so what
is there is complete.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from nixops.errors import CommandFailed, HostFault
from nixops.lab import apt, awkward, plain, recipe
from nixops.lab.machine import locked, run, unmount_below
from nixops.transport.command import Command, Runner

CACHE = Path("/var/cache/nixops-lab")
# About 1 GB while it is built; and nothing is worse to debug than a tree with half a package.
NEEDED_BYTES = 2 * 1024**3

Say = Callable[[str], None]


@dataclass(frozen=True)
class Tree:
    """A finished tree. ``lower(shape)`` gives its layers for overlayfs, the uppermost first."""

    directory: Path

    def lower(self, shape: str) -> tuple[Path, ...]:
        """The layers of a host of this shape."""
        root = self.directory / "root"
        return (self.directory / "awkward", root) if shape == "awkward" else (root,)


def ensure_tree(runner: Runner, *, cache: Path = CACHE, say: Say = lambda _: None) -> Tree:
    """The tree of the present recipe; built when it is not in the cache (about a minute and a half).

    Two processes do not build at once, and what an interrupted build left is removed first.

    :param cache: where trees are kept; outside of any checkout, and on a file system that may hold set-user-ID files.
    :param say: is told in a line when there is something to wait for.
    :raises HostFault: there is no mirror, or no space.
    :raises CommandFailed: a package could not be fetched or configured.
    """
    openbao = recipe.openbao_binary()
    tree = Tree(cache / f"tree-{recipe.tree_digest(openbao, (recipe, plain, awkward))}")
    if tree.directory.is_dir():
        return tree
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    with locked(cache / "lock"):
        for left in cache.glob(".build-*"):
            unmount_below(runner, left)
            shutil.rmtree(left)
        packages = cache / f"packages-{recipe.packages_digest()}"
        if not packages.is_dir():
            say(f"building the lab's root tree from Debian {recipe.SUITE} (once; about a minute and a half)")
            if shutil.disk_usage(cache).free < NEEDED_BYTES:
                raise HostFault(f"there is not enough space in {cache} for the lab's root tree", hint="free 2 GB there")
            with _built(packages) as building:
                _install(runner, building)
        if not tree.directory.is_dir():
            with _built(tree.directory) as building:
                run(runner, "cp", "--archive", "--link", packages / "root", building / "root", timeout=300.0)
                plain.settle(building / "root", openbao.path)
                awkward.make_layer(runner, building / "root", building / "awkward")
            _forget_old(cache, {packages, tree.directory})
    return tree


def _forget_old(cache: Path, keep: set[Path]) -> None:
    """Delete what earlier recipes made and no host runs from. What is younger than a day may be wanted in a moment."""
    mounted = Path("/proc/self/mountinfo").read_text(encoding="utf-8")
    for old in {*cache.glob("tree-*"), *cache.glob("packages-*")} - keep:
        if str(old) not in mounted and time.time() - old.stat().st_mtime > 24 * 3600:
            shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _built(final: Path) -> Iterator[Path]:
    """A directory to build in, which becomes ``final`` when all went well."""
    building = final.with_name(f".build-{final.name}")
    building.mkdir(mode=0o700)
    try:
        yield building
        building.rename(final)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def remove_trees(runner: Runner, *, cache: Path = CACHE) -> None:
    """Delete every cached tree, and the cache. Hosts that run from one must be down."""
    if not cache.is_dir():
        return
    with locked(cache / "lock"):
        unmount_below(runner, cache)
        shutil.rmtree(cache)


def _install(runner: Runner, building: Path) -> None:
    """Make ``root`` in ``building``: the packages of the recipe, configured, and no service started."""
    root = building / "root"
    proxies = apt.apt_proxies(runner)
    mirror = apt.find_mirror(recipe.SUITE, apt.read_sources(), apt.fetcher(proxies))
    keyring = building / "keyring.gpg"
    keyring.write_bytes(mirror.keyring)
    env = {**proxies, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"}
    command = _contained(
        "debootstrap",
        "--variant=minbase",
        f"--keyring={keyring}",
        f"--include={','.join(recipe.PACKAGES)}",
        recipe.SUITE,
        str(root),
        mirror.uri,
        *_script(),
    )
    result = runner.run(Command.of(*command, env=env, timeout=1500.0))
    # It ends with an error for packages that are only not configured yet, which is finished below; without dpkg it
    # did not come that far.
    if not (root / "usr/bin/apt-get").exists():
        log = root / "debootstrap/debootstrap.log"
        raise CommandFailed(
            "debootstrap could not make the lab's root tree",
            hint="check that apt works on this machine",
            detail=result.tail() + ("\n" + log.read_text(errors="replace")[-1500:] if log.exists() else ""),
        )
    _finish(runner, root, env)
    keyring.unlink()


def _contained(*argv: str) -> list[str]:
    """A command with mounts and processes of its own, which all go away with it, and which itself goes away with us."""
    return ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--pid", "--fork", "--kill-child", *argv]


def _script() -> list[str]:
    """An older debootstrap does not know the suite's name, but all of Debian's suites are made by the same script."""
    scripts = Path("/usr/share/debootstrap/scripts")
    return [] if (scripts / recipe.SUITE).exists() else [str(scripts / "sid")]


def _finish(runner: Runner, root: Path, env: dict[str, str]) -> None:
    """Configure what debootstrap left unconfigured, and check that nothing is left so."""
    policy = root / "usr/sbin/policy-rc.d"
    policy.write_text("#!/bin/sh\nexit 101\n", encoding="utf-8")
    policy.chmod(0o755)
    script = (
        'mount --rbind /dev "$1/dev" && mount -t proc proc "$1/proc" || exit 1\n'
        'chroot "$1" dpkg --configure -a\n'
        'chroot "$1" apt-get -y -f install || exit 1\n'
        'test -z "$(chroot "$1" dpkg --audit)" || exit 1\n'
        # The first use of the store on each host would create its database: do that once, here.
        'chroot "$1" nix-store --init\n'
    )
    command = _contained("sh", "-s", "--", str(root))
    runner.run(Command.of(*command, stdin=script, env=env, timeout=600.0)).check(
        "the packages of the lab's root tree could not be configured"
    )
    policy.unlink()
    shutil.rmtree(root / "debootstrap", ignore_errors=True)
    run(runner, "chroot", root, "apt-get", "clean")
