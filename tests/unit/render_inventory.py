"""Inventories for the tests of rendering, and the seam to this machine."""

from __future__ import annotations

import json
import subprocess
from typing import Any

from nixops.inventory.model import Inventory
from nixops.render.context import RunnerFacts
from nixops.values import HostName, RepoName, RunnerName

HOST = HostName("nix-cache02")
ACTIONS2 = RunnerName("actions2")
TRUSTED = ["torjus/nixos-servers", "torjus/nixos-exporter", "torjus/nixos"]
SEED: dict[str, Any] = {
    "name": "nix-cache02-native",
    "labels": ["native:host"],
    "scope": {"user": "torjus"},
    "trusted": TRUSTED,
    "accept_wider_scope": True,
    "capacity": 4,
    "cache": {"enabled": True, "dir": "/var/lib/gitea-runner/actions2/cache"},
    "limits": {"MemoryMax": "16G", "CPUQuota": "400%"},
    "token": {"path": "hosts/nix-cache02/forgejo-runner-token-native"},
    "accepted_risks": {"shared-store": "trusted repositories already deploy to production"},
}
# Texts that the model lets through and that try to leave their literal.
HOSTILE = [
    '"; services.openssh.settings.PermitRootLogin = "yes',
    '${builtins.readFile "/etc/shadow"}',
    "''${x}'' $${y} \\${z}",
    "a\nb\r\nc\td",
    "${{ github.token }} {{ x }} {% y %}",
    "*/ # // /*",
    "yes",
    "@x: [y]",
    "\u2028\u0085\x1b[31m\x7f",
    "😀 é ",
    "\\",
    '"',
    "'",
]


def inventory(runner: dict[str, Any] | None = None, /, name: str = "actions2", **top: Any) -> Inventory:
    """The seed's ``nix-cache02``; ``runner`` replaces fields of ``actions2`` (``None`` takes one away)."""
    merged = {k: v for k, v in {**SEED, **(runner or {})}.items() if v is not None}
    host = {"address": "nix-cache02.example", "runners": {"actions1": {"managed": False}, name: merged}}
    document = {
        "forge": {"url": "https://code.t-juice.club", "token": {"env": "FORGEJO_TOKEN"}},
        "vault": {"address": "https://vault01.example:8200"},
        "config": {"flake": "../nixos-servers"},
        "hosts": {"nix-cache02": host},
        **top,
    }
    return Inventory.model_validate(document)


def forgejo(**fields: Any) -> dict[str, Any]:
    """What turns ``actions2`` into a runner of the newer module."""
    return {"module": "forgejo-runner", "scope": None, **fields}


def facts(**versions: int) -> RunnerFacts:
    """Facts with a uuid for each trusted repository."""
    uuids = {RepoName(repo): f"uuid-{i}" for i, repo in enumerate([*TRUSTED, "a-b/c", "a/b-c"])}
    return RunnerFacts(uuids, {path.replace("__", "/").replace("_", "-"): v for path, v in versions.items()})


# nixpkgs as far as a rendered module looks into it: what it writes shows as its own text.
STUB = """
let
  package = name: { type = "derivation"; inherit name; outPath = "/store/${name}"; };
  pkgs = builtins.listToAttrs (map (name: { inherit name; value = package name; }) [
    "bash" "coreutils" "curl" "gawk" "gitMinimal" "gnused" "nodejs" "wget" "nix" "openbao"
  ]) // {
    writeText = name: text: text;
    writeShellScript = name: text: "<${name}>";
    nested.deep = package "deep";
  };
in (%s) { inherit pkgs; lib.mkForce = value: value; }
"""


def evaluated(module: str) -> Any:
    """The configuration that a rendered module defines."""
    command = ["nix-instantiate", "--eval", "--strict", "--json", "-"]
    done = subprocess.run(command, input=(STUB % module).encode(), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)
