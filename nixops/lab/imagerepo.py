"""A git repository with a flake of images, for lab hosts to build: shell derivations, nothing from nixpkgs.

Its attributes, for ``x86_64-linux`` and ``aarch64-linux`` each: ``docker`` (an OCI layout with a ``copyTo`` as
nix2container has it), ``archive`` (a docker archive), ``layout`` (an OCI layout alone), ``slow`` (ten seconds),
``endless``, ``slow-push`` and ``endless-push`` (which wait before they push), ``failing``, ``featured`` (needs
big-parallel), ``half`` (fails on aarch64-linux), ``foreign`` (of another architecture, as it says), ``crossed`` (always
built on x86_64-linux), ``large`` (300 MiB), ``named`` (its program has another name), ``refused`` (its program fails),
``odd`` (no image), and ``old``, which is in legacyPackages alone.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from nixops.lab.host import LabHost
from nixops.transport.command import Command, Runner
from nixops.values import FlakeRef

_FILES = (
    "archive.sh",
    "copy-to.sh",
    "flake.nix",
    "images.nix",
    "layer.sh",
    "layout.sh",
    "library.nix",
    "odd.sh",
    "refused.sh",
)


@dataclass(frozen=True)
class ImageRepo:
    """The repository.

    :ivar flake: the reference that Nix takes for it.
    :ivar revision: its one commit.
    """

    directory: Path
    flake: FlakeRef
    revision: str


def make_image_repo(directory: Path, local: Runner, *, salt: str | None = None) -> ImageRepo:
    """Make the repository in ``directory``, which must not be there, with everything committed.

    :param salt: part of every derivation; by default a new one, so that every path is new to every store.
    """
    source = resources.files("nixops.lab") / "flake" / "checkout" / "images"
    directory.mkdir(parents=True)
    for name in _FILES:
        with resources.as_file(source / name) as file:
            shutil.copyfile(file, directory / name)
    flake = directory / "flake.nix"
    text = flake.read_text(encoding="utf-8").replace("@salt@", salt or os.urandom(8).hex())
    flake.write_text(text, encoding="utf-8")

    def git(*argv: str) -> str:
        identity = ("-c", "user.name=Lab", "-c", "user.email=lab@localhost")
        return local.run(Command.of("git", "-C", directory, *identity, *argv)).check().out.strip()

    git("init", "--quiet", "--initial-branch=main")
    git("add", "--all")
    git("commit", "--quiet", "-m", "Images of the lab")
    return ImageRepo(directory, FlakeRef(str(directory.resolve())), git("rev-parse", "HEAD"))


def second_system(host: LabHost, system: str = "aarch64-linux") -> None:
    """Let a lab host build for a second system: the lab's derivations are shell, and run there just as well."""
    script = 'echo "extra-platforms = $1" >>/etc/nix/nix.conf && systemctl restart nix-daemon.service'
    host.exec("sh", "-c", script, "sh", system)
