"""A user's configuration for the lab: a flake checkout as in the field, its inventory, and a host's first generation.

The checkout evaluates without nixpkgs and without a network: what stands in for nixpkgs is copied into it.
"""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from importlib import resources
from pathlib import Path
from typing import Any, Final

from nixops.errors import BuildFailed
from nixops.inventory.model import RunnerModule, SecretFlavour
from nixops.lab.host import LabHost
from nixops.lab.userinventory import (
    LabHostFacts,
    Services,
    inventory_document,
    managed_runner,
    merge,
    write,
    write_yaml,
)
from nixops.secret import Secret
from nixops.transport.command import Command, Runner
from nixops.values import StorePath

__all__ = ["Imports", "LabHostFacts", "UserRepo", "build", "install_base", "make_user_repo", "send_closure", "toplevel"]

AUTHOR: Final = ("-c", "user.name=Lab", "-c", "user.email=lab@localhost", "-c", "commit.gpgsign=false")


class Imports(StrEnum):
    """How a host's configuration imports the file that nixops renders.

    ``GUARDED`` asks whether the file exists. Many users write it so, and it is the default here: the host's first
    generation can be built from the same checkout, and a checkout from which a failed deploy took its files again
    still evaluates. ``PLAIN`` is the bare line; without the file nothing evaluates. ``NONE`` has no line.
    """

    GUARDED = "guarded"
    PLAIN = "plain"
    NONE = "none"


@dataclass(frozen=True)
class UserRepo:
    """The checkout and what goes with it.

    :ivar path: the git checkout; :ivar inventory_file: the inventory that points to it.
    :ivar base_revision: the commit without nixops's import line, which evaluates in any case.
    """

    path: Path
    inventory_file: Path
    base_revision: str
    local: Runner

    def attribute(self, host: str) -> str:
        """The toplevel of ``host`` in the first commit, as an installable."""
        return f"git+file://{self.path}?rev={self.base_revision}#{toplevel(host)}"

    def git(self, *argv: str) -> str:
        """Run git in the checkout; its output."""
        command = Command.of("git", "-C", self.path, *AUTHOR, *argv)
        return self.local.run(command).check().out.strip()

    def configure(self, host: str, nix: str, *, commit: bool = True) -> None:
        """Replace the host's own settings (``hosts/<host>/local.nix``) by ``nix``, as a user edits them by hand.

        >>> repo.configure("nix-cache02", "lab.failingUnit = true;")  # doctest: +SKIP
        """
        write(self.path / f"hosts/{host}/local.nix", local_module(nix))
        self.git("add", "--intent-to-add", "--", f"hosts/{host}/local.nix")
        if commit:
            self.git("commit", "--quiet", "--allow-empty", "-m", f"{host}: other settings", "--", f"hosts/{host}")


def toplevel(host: str) -> str:
    """The attribute of a host's toplevel in the checkout."""
    return f"nixosConfigurations.{host}.config.system.build.toplevel"


def local_module(nix: str) -> str:
    """The text of ``local.nix`` with the given settings."""
    return f"{{ lib, pkgs, ... }}:\n{{\n  {nix.strip()}\n}}\n" if nix.strip() else "{ ... }:\n{ }\n"


def nix_string(text: str) -> str:
    """``text`` as a Nix string literal."""
    return json.dumps(text, ensure_ascii=False).replace("${", "\\${")


def make_user_repo(
    destination: Path,
    *,
    hosts: Sequence[LabHostFacts],
    forge_url: str,
    bao_address: str,
    local: Runner,
    forge_token: Secret | None = None,
    bao_token: Secret | None = None,
    runner: str = "actions2",
    module: RunnerModule = RunnerModule.GITEA,
    secret: SecretFlavour = SecretFlavour.AGENT,
    imports: Imports = Imports.GUARDED,
    actions1: bool = True,
    overrides: Mapping[str, Any] | None = None,
    runner_overrides: Mapping[str, Any] | None = None,
    host_nix: Mapping[str, str] | None = None,
) -> UserRepo:
    """Make ``nixos-servers`` (git, committed), ``inventory/hosts.yml`` and ``secrets`` below ``destination``.

    :param forge_token: written to a 0600 file that the inventory names; without it the inventory says
        ``{env: FORGEJO_TOKEN}``. :param bao_token: likewise; without it the login comes from the environment.
    :param runner: the runner that nixops manages, on each host with ``runners``.
    :param actions1: whether the hand-written runner is enabled; it needs a forge that answers.
    :param overrides: merged deeply over the whole inventory; :param runner_overrides: over each managed runner.
    :param host_nix: settings by host name for ``hosts/<host>/local.nix``.
    """
    checkout = destination / "nixos-servers"
    _copy_flake(checkout / "nixpkgs")
    words = {
        "system": f"{platform.machine()}-linux",
        "bao_address": nix_string(bao_address),
        "forge_url": nix_string(forge_url),
        "actions1": "true" if actions1 else "false",
        "plain_imports": "",
        "guarded_imports": _guarded(runner) if imports is Imports.GUARDED else "",
    }
    files = resources.files("nixops.lab") / "flake" / "checkout"

    def put(source: str, target: str, host: str = "") -> None:
        text = files.joinpath(source).read_text(encoding="utf-8")
        for word, value in (words | {"host": host}).items():
            text = text.replace(f"@{word}@", value)
        write(checkout / target, text)

    for file in ("flake.nix", "system/default.nix", "system/secrets.nix", "system/vault-secrets.nix"):
        put(file, file)
    with_runners = [h.name for h in hosts if h.runners]
    for file in ("terraform/vault/variables.tf", "terraform/vault/secrets.tf"):
        put(file, file, (with_runners or [hosts[0].name])[0])
    for host in hosts:
        put("host/default.nix" if host.runners else "host/plain.nix", f"hosts/{host.name}/default.nix", host.name)
        write(checkout / f"hosts/{host.name}/local.nix", local_module((host_nix or {}).get(host.name, "")))
        if host.runners:
            put("host/actions-runner.nix", f"hosts/{host.name}/actions-runner.nix", host.name)

    inventory = destination / "inventory" / "hosts.yml"
    repo = UserRepo(checkout, inventory, "", local)
    local.run(Command.of("git", "init", "--quiet", "--initial-branch=master", checkout)).check()
    repo.git("add", "--all")
    repo.git("commit", "--quiet", "-m", "Hosts of the lab")
    base = repo.git("rev-parse", "HEAD")
    if imports is Imports.PLAIN:
        words["plain_imports"] = f"    ./nixops-{runner}.nix"
        for name in with_runners:
            put("host/default.nix", f"hosts/{name}/default.nix", name)
        repo.git("commit", "--quiet", "--all", "-m", f"Import {runner}, which nixops renders")

    managed = managed_runner(runner, module, secret)
    merge(managed, runner_overrides or {})
    services = Services(forge_url, bao_address, forge_token, bao_token)
    document = inventory_document(destination, hosts, services, runner, managed)
    merge(document, overrides or {})
    write_yaml(inventory, document)
    return UserRepo(checkout, inventory, base, local)


def _guarded(runner: str) -> str:
    file = f"./nixops-{runner}.nix"
    comment = "# Rendered by nixops; not there before the first deploy."
    return f"\n  {comment}\n  ++ lib.optional (builtins.pathExists {file}) {file}"


def _copy_flake(destination: Path) -> None:
    with resources.as_file(resources.files("nixops.lab") / "flake") as source:
        shutil.copytree(source, destination, ignore=shutil.ignore_patterns("checkout", "__pycache__"))


# -- a host's first generation -----------------------------------------------------------------------------------

# $1 is the toplevel. What a host has that was installed and booted: a system profile, a boot loader that starts it,
# and the generation running and booted.
_INSTALL: Final = """
set -eu
touch /etc/NIXOS
mkdir -p /nix/var/nix/profiles /nix/var/nix/gcroots
nix-env --profile /nix/var/nix/profiles/system --set "$1"
"$1/bin/switch-to-configuration" switch
ln -sfn "$1" /run/booted-system
ln -sfn /run/booted-system /nix/var/nix/gcroots/booted-system
ln -sfn /run/current-system /nix/var/nix/gcroots/current-system
"""

_PUT_FILE: Final = """
set -eu
umask 077
mkdir -p /var/lib/lab-secrets
cat >"/var/lib/lab-secrets/$1"
chmod 0400 "/var/lib/lab-secrets/$1"
"""


def build(repo: UserRepo, installable: str) -> StorePath:
    """Build one output here, without asking any substituter.

    :raises BuildFailed: with the end of the log.
    """
    settings = "experimental-features = nix-command flakes\nsandbox = false\nsubstituters =\n"
    command = Command.of("nix", "build", "--no-link", "--json", installable, env={"NIX_CONFIG": settings}, timeout=600)
    result = repo.local.run(command)
    if not result.ok:
        raise BuildFailed(f"{installable} cannot be built", detail=result.tail())
    return StorePath(json.loads(result.out)[0]["outputs"]["out"])


def send_closure(host: LabHost, repo: UserRepo, path: StorePath) -> None:
    """Bring ``path`` and all that it refers to into the host's store, from outside."""
    closure = repo.local.run(Command.of("nix-store", "--query", "--requisites", path)).check().out.split()
    wanted = (
        host.exec("nix-store", "--check-validity", "--print-invalid", *closure, check=False).stdout.decode().split()
    )
    if wanted:
        archive = repo.local.run(Command.of("nix-store", "--export", *(p for p in closure if p in wanted))).check()
        host.exec("nix-store", "--import", stdin=archive.stdout)


def install_base(
    host: LabHost,
    repo: UserRepo,
    *,
    actions1_token: Secret | None = None,
    cache_secret: Secret | None = None,
) -> StorePath:
    """Give ``host`` its first generation, built here from the checkout's first commit; returns it.

    The host then has what the seed's has: the generation running, booted and the boot default, and in /run/secrets,
    again after each boot, ``cache-secret`` and ``actions1``'s ``forgejo-runner-token``, both 0400 and root's.

    :param actions1_token: the registration token of the hand-written runner, as its forge gave it. Where the
        checkout was made with ``actions1`` and the token is wrong or the forge away, the runner's unit fails.
    :raises BuildFailed: the checkout does not build. :raises CommandFailed: the host refused, with its words.
    """
    path = build(repo, repo.attribute(host.name))
    send_closure(host, repo, path)
    secrets = {
        "cache-secret": (cache_secret or Secret("cache.lab-1:not-a-real-signing-key")).reveal(),
        "forgejo-runner-token": f"TOKEN={actions1_token.reveal() if actions1_token else 'none'}\n",
    }
    for name, value in secrets.items():
        host.exec("sh", "-c", _PUT_FILE, "sh", name, stdin=value.encode())
    host.exec("sh", "-c", _INSTALL, "sh", path, timeout=180)
    return path
