"""The examples as they are shipped: the flake with stand-ins for its inputs, the Python tool that calls the library."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nixops.lab.imagerepo import second_system
from nixops.lab.lab import HostSpec, Lab
from nixops.lab.registry import RegistryServer
from nixops.lab.setting import TOP
from tests.lab.conftest import LabFactory
from tests.lab.imaging import ARM, X86, Imaging, raw
from tests.lab.leaks import Needles, telltale

EXAMPLES = TOP / "examples"

pytestmark = pytest.mark.usefixtures("nix_of_the_lab")

# What the example takes of nixpkgs.
NIXPKGS = """\
{
  outputs = { self }: let
    tool = system: name: text: derivation {
      inherit name system text;
      builder = "/bin/sh";
      args = [ "-c" "mkdir -p $out/bin; echo \\"$text\\" >$out/bin/$name; chmod 755 $out/bin/$name" ];
      PATH = "/usr/bin:/bin";
      salt = "@salt@";
    };
    each = make: builtins.listToAttrs (map (s: { name = s; value = make s; }) [ "x86_64-linux" "aarch64-linux" ]);
  in {
    lib.genAttrs = names: f: builtins.listToAttrs (map (name: { inherit name; value = f name; }) names);
    legacyPackages = each (system: {
      writeShellScriptBin = tool system;
      cacert = tool system "cacert" "certificates";
    });
  };
}
"""

# What it takes of nix2container: an image is a derivation with a copyTo, here over the lab's layout.
NIX2CONTAINER = """\
{
  inputs.nixpkgs.url = "path:@nixpkgs@";
  outputs = { self, nixpkgs }: let
    lab = import @images@/library.nix;
    each = make: builtins.listToAttrs (map (s: { name = s; value = make s; }) [ "x86_64-linux" "aarch64-linux" ]);
  in {
    packages = each (system: {
      nix2container = {
        buildLayer = { deps }: map toString deps;
        buildImage = { name, config, layers }: let
          made = lab { inherit system; salt = builtins.toJSON [ config layers ]; };
        in made.program name;
      };
    });
  };
}
"""


@pytest.fixture(scope="module")
def builders(lab_factory: LabFactory) -> Lab:
    lab = lab_factory(HostSpec("first"), HostSpec("second"))
    second_system(lab.hosts["first"])
    return lab


@pytest.fixture
def imaging(builders: Lab, registry: RegistryServer, tmp_path: Path) -> Imaging:
    """``first`` builds for both systems, ``second`` for one."""
    second = {"builder": {"max_jobs": 2, "systems": [X86]}}
    return Imaging(tmp_path, builders, registry, settings={"second": second})


@pytest.fixture
def inputs(imaging: Imaging, tmp_path: Path) -> dict[str, str]:
    """Stand-ins for the flake's inputs, by the reference that takes the place of each."""
    made: dict[str, str] = {}
    nixpkgs, container = tmp_path / "nixpkgs", tmp_path / "nix2container"
    shutil.copytree(imaging.repo.directory, container, ignore=shutil.ignore_patterns(".git", "flake.nix"))
    nixpkgs.mkdir()
    (nixpkgs / "flake.nix").write_text(NIXPKGS.replace("@salt@", os.urandom(8).hex()))
    text = NIX2CONTAINER.replace("@nixpkgs@", str(nixpkgs)).replace("@images@", ".")
    (container / "flake.nix").write_text(text)
    made["github:NixOS/nixpkgs/nixos-unstable"] = f"path:{nixpkgs}"
    made["github:nlewo/nix2container"] = f"path:{container}"
    return made


def test_the_flake_evaluates_as_it_is_for_both_systems(inputs: dict[str, str]) -> None:
    """Proves: the shipped flake.nix, not a copy, gives an image with a copyTo for each system, made of that system's
    own packages: there is nothing cross-built in it."""
    nixpkgs, container = inputs.values()
    overrides = ("--override-input", "nixpkgs", nixpkgs, "--override-input", "nix2container", container)
    for system in (X86, ARM):
        apply = "x: { system = x.system; copyTo = x.copyTo.system; drv = x.drvPath; }"
        done = subprocess.run(
            ["nix", "eval", "--json", "--no-write-lock-file", *overrides, "--apply", apply,
             f"path:{EXAMPLES / 'flake'}#packages.{system}.docker"],
            capture_output=True,
            text=True,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        answer = json.loads(done.stdout)
        assert (answer["system"], answer["copyTo"]) == (system, system)
    assert "cross" not in (EXAMPLES / "flake" / "flake.nix").read_text().split("{", 1)[1].lower()


def test_a_python_tool_gets_an_image_for_two_platforms_by_its_digest(
    imaging: Imaging, registry: RegistryServer, inputs: dict[str, str], tmp_path: Path
) -> None:
    """Proves: examples/imagespec.py, run as a tool's user would, has the example flake's image built on builders of
    each system and pushed, and gives its name by digest; a second call gives the same; odd names are refused."""
    flake = tmp_path / "example"
    flake.mkdir()
    text = (EXAMPLES / "flake" / "flake.nix").read_text()
    for url, stand_in in inputs.items():
        assert text.count(f'"{url}"') == 1
        text = text.replace(f'"{url}"', f'"{stand_in}"')
    (flake / "flake.nix").write_text(text)
    command = [
        *(sys.executable, str(EXAMPLES / "imagespec.py"), "--inventory", str(imaging.inventory), "--flake", str(flake)),
        *("--registry", registry.name, "--name", "team/example", "--tag", "1.2"),
        *("--platform", "linux/amd64", "--platform", "linux/arm64"),
    ]
    names = []
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, env=imaging.environ, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        names.append(done.stdout.strip())
    index = raw(registry, registry.reference("team/example:1.2"))
    assert {entry["platform"]["architecture"] for entry in index["manifests"]} == {"amd64", "arm64"}
    assert names[0] == names[1] and names[0].startswith(f"{registry.name}/team/example@sha256:")
    refused = subprocess.run(
        [*command, "--attribute", "no such; attribute"],
        capture_output=True,
        text=True,
        env=imaging.environ,
        check=False,
    )
    assert refused.returncode == 2 and refused.stderr.startswith("error: --attr: "), refused.stderr


def test_a_python_tool_shows_no_login_whatever_a_program_tells(imaging: Imaging, registry: RegistryServer) -> None:
    """Proves: an image's own program that prints the registry's login, and what a terminal would obey, is shown by
    examples/imagespec.py without either, while it runs and in the error."""
    (imaging.repo.directory / "refused.sh").write_text(telltale())
    done = subprocess.run(
        [
            *(sys.executable, str(EXAMPLES / "imagespec.py"), "--inventory", str(imaging.inventory)),
            *("--flake", str(imaging.repo.directory), "--attribute", "refused"),
            *("--registry", registry.name, "--name", "team/telltale", "--tag", "1"),
        ],
        capture_output=True,
        text=True,
        env=imaging.environ,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr.count('***"}}}') == 2 and "error: " in done.stderr, done.stderr
    needles = Needles({"the registry's password": registry.password.reveal()})
    assert not needles.within((done.stdout + done.stderr).encode()), done.stderr
    assert "\033" not in done.stderr and "\007" not in done.stderr, done.stderr
