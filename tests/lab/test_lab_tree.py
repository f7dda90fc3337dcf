"""The cached root tree: complete or not there, whatever happened while it was built."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from nixops.lab import recipe
from nixops.lab.apt import read_sources
from nixops.lab.machine import mounts_below
from nixops.lab.tree import CACHE, ensure_tree, remove_trees
from nixops.transport.local import LocalRunner


@pytest.fixture
def cache() -> Iterator[Path]:
    """A cache of the test's own that has the packages already: links, so on the same file system as the real one."""
    ensure_tree(LocalRunner())
    directory = Path(tempfile.mkdtemp(prefix="nixops-lab-test-", dir=CACHE.parent))
    packages = f"packages-{recipe.packages_digest()}"
    subprocess.run(["cp", "--archive", "--link", CACHE / packages, directory / packages], check=True)
    try:
        yield directory
    finally:
        for point in mounts_below(directory):
            subprocess.run(["umount", point], check=True)
        shutil.rmtree(directory, ignore_errors=True)


def test_what_a_killed_build_left_is_removed_and_two_processes_build_once(cache: Path) -> None:
    """Proves that a half-built tree, with a file system still mounted in it, is cleaned up and never taken for a
    whole one, that processes that want the tree at the same time wait for one build, and that trees of earlier recipes
    do not pile up."""
    old, young = cache / "tree-of-last-month", cache / "tree-of-today"
    for tree in (old, young):
        tree.mkdir()
    os.utime(old, (1.7e9, 1.7e9))
    half = cache / ".build-tree-0123"
    (half / "root/proc").mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", half / "root/proc"], check=True)
    script = (
        "import sys; from pathlib import Path; from nixops.lab.tree import ensure_tree;"
        "from nixops.transport.local import LocalRunner;"
        "print(ensure_tree(LocalRunner(), cache=Path(sys.argv[1])).directory)"
    )
    argv = [sys.executable, "-c", script, str(cache)]
    running = [subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    built = {process.communicate(timeout=200)[0].strip() for process in running}
    assert [process.returncode for process in running] == [0, 0]
    assert len(built) == 1
    left = sorted(path.name for path in cache.iterdir())
    assert left == sorted(["lock", f"packages-{recipe.packages_digest()}", Path(built.pop()).name, young.name])

    remove_trees(LocalRunner(), cache=cache)
    assert not cache.exists()


def test_the_tree_does_not_say_which_mirror_it_came_from() -> None:
    """Proves that hosts know no mirror: neither apt's sources nor the logs of the build name one."""
    root = ensure_tree(LocalRunner()).directory / "root"
    mirrors = {urlsplit(source.uri).hostname for source in read_sources()} - {None, ""}
    assert mirrors
    patterns = [word for mirror in mirrors for word in ("-e", str(mirror))]
    places = [root / place for place in ("etc/apt", "var/lib/apt", "var/cache/apt", "var/log", "etc/resolv.conf")]
    found = subprocess.run(["grep", "-rIl", "-F", *patterns, *places], capture_output=True, text=True)
    assert found.stdout == ""
    assert not (root / "debootstrap").exists()


def test_every_package_of_the_tree_is_configured() -> None:
    """Proves that no host boots from a tree with half a package."""
    root = ensure_tree(LocalRunner()).directory / "root"
    status = subprocess.run(
        ["dpkg-query", f"--admindir={root}/var/lib/dpkg", "-W", "-f", "${Package} ${Status}\n"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    installed = {line.split()[0] for line in status}
    assert set(recipe.PACKAGES) <= installed
    assert [line for line in status if not line.endswith("install ok installed")] == []
