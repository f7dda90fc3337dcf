"""What the lab tests of distributed builds and of the binary cache share: an inventory of lab hosts, and a session."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from nixops.build.session import BuildSession
from nixops.inventory.load import Loaded, load
from nixops.lab.lab import Lab, LabHost
from nixops.secret import Redactor
from tests.lab.reaching import SYSTEM, write_flake

FLAKE = """\
{
  outputs = { self }: let
    derive = name: script: more: derivation ({
      inherit name script;
      system = "@system@";
      builder = "/bin/sh";
      args = [ "-c" script ];
      PATH = "/opt/lab/tools:/usr/bin:/bin";
      salt = "@salt@";
    } // more);
    make = name: script: derive name script { };
    part = seconds: n: make "part-${toString n}-${seconds}" "hostname > $out; sleep ${seconds}";
    parts = seconds: map (part seconds) [ 1 2 3 4 ];
  in {
    packages.@system@ = {
      quick = make "quick" "cat ${toString (parts "0.2")} > $out";
      slow = make "slow" "cat ${toString (parts "5")} > $out";
      endless = make "endless" "sleep 77202; echo > $out";
      bad = make "bad" "echo one; echo two: Connection refused >&2; exit 3";
      fills = make "fills" "head -c 200000000 /dev/zero > $out";
      kvm = derive "kvm" "hostname > $out" { requiredSystemFeatures = [ "kvm" ]; };
    };
    packages.aarch64-linux.other = derive "other" "hostname > $out" { system = "aarch64-linux"; };
    packages.riscv64-linux.none = derive "none" "hostname > $out" { system = "riscv64-linux"; };
    both.@system@ = make "both" "hostname > $out";
    both.aarch64-linux = derive "both" "hostname > $out" { system = "aarch64-linux"; };
  };
}
"""


def make_flake(directory: Path) -> Path:
    write_flake(directory, FLAKE)
    return directory


def host_entry(host: LabHost, **more: Any) -> dict[str, Any]:
    """What the inventory says of a lab host."""
    return {
        "address": host.address,
        "port": host.port,
        "user": host.user,
        "host_key": host.host_key,
        "system": SYSTEM,
        "ssh": {"identity_file": str(host.identity_file), "connect_timeout": 3.0, "keepalive": 1.0},
        **more,
    }


def dead_entry(lab: Lab, **more: Any) -> dict[str, Any]:
    """A host that is not there: its address is one of the lab's own network, so nothing leaves this machine."""
    key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8g"
    return {"address": lab.network.address(lab.network.capacity - 1), "host_key": key, "system": SYSTEM, **more}


def inventory(directory: Path, hosts: Mapping[str, Any], **sections: Any) -> Loaded:
    """Write and load an inventory."""
    file = directory / "hosts.yml"
    file.write_text(yaml.safe_dump({**sections, "hosts": dict(hosts)}, sort_keys=False), encoding="utf-8")
    return load(file)


def session_of(loaded: Loaded, directory: Path, said: list[str]) -> BuildSession:
    """A build's session with an environment of its own; what it says is collected."""
    environ = {"PATH": os.environ["PATH"], "HOME": str(directory), "XDG_STATE_HOME": str(directory / "state")}
    return BuildSession(loaded, Redactor(), environ, say=said.append)
