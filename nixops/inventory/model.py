"""What an inventory holds. Frozen pydantic models; unknown keys are errors (:mod:`.load` adds the position).

Secrets are never values here, only references (:class:`SecretRef`).
"""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, StringConstraints, field_validator, model_validator

from nixops.inventory.building import BinaryCache, Build, Builder, Ec2Pool, Image, Registry
from nixops.inventory.fields import HttpUrl, Identifier, Model, OpenBaoRef, PlainText, Seconds, SecretRef
from nixops.inventory.runners import (
    Cache,
    KvOwner,
    Label,
    Limits,
    ManagedRunner,
    Runner,
    RunnerModule,
    Scope,
    SecretFlavour,
    TokenEntry,
    UnmanagedRunner,
    Workflow,
    duration_seconds,
    unit_name,
    unit_user,
)
from nixops.values import AbsolutePath, Address, HostName, RegistryName, RelPath, RunnerName, System

__all__ = [
    "BinaryCache",
    "Build",
    "Builder",
    "Cache",
    "Config",
    "Default",
    "Deploy",
    "Ec2Pool",
    "Forge",
    "Host",
    "HostKey",
    "Image",
    "Inventory",
    "KvOwner",
    "Label",
    "Limits",
    "ManagedRunner",
    "Model",
    "OpenBaoRef",
    "Registry",
    "Runner",
    "RunnerModule",
    "Scope",
    "SecretFlavour",
    "SecretRef",
    "Ssh",
    "TokenEntry",
    "UnmanagedRunner",
    "Vault",
    "VaultAppRoleAuth",
    "Workflow",
    "duration_seconds",
    "unit_name",
    "unit_user",
]


class Forge(Model):
    """The Forgejo whose API gives runners their credentials."""

    url: HttpUrl
    token: SecretRef
    ca_file: PlainText | None = None
    timeout: Seconds = 30.0


class VaultAppRoleAuth(Model):
    role_id: SecretRef
    secret_id: SecretRef
    mount: Identifier = "approle"


class Vault(Model):
    """The OpenBao (or Vault) that keeps what the hosts fetch.

    Left out, ``address``, ``namespace``, ``ca_file`` and the login come from ``BAO_*``, then ``VAULT_*``.
    ``host_address`` is how hosts reach it, where that differs from the operator's way.
    """

    address: HttpUrl | None = None
    host_address: HttpUrl | None = None
    mount: Identifier = "secret"
    namespace: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)*/?$")] | None = None
    ca_file: PlainText | None = None
    host_ca_file: AbsolutePath | None = None
    timeout: Seconds = 30.0
    token: SecretRef | None = None
    approle: VaultAppRoleAuth | None = None
    host_approle_mount: Identifier = "approle"
    role_prefix: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]*$")] = "host-"

    @model_validator(mode="after")
    def _one_login(self) -> Self:
        if self.token and self.approle:
            raise ValueError("name one login: token or approle")
        return self


class Config(Model):
    """The user's flake and where in it our files go. ``{host}``, ``{runner}`` and ``{repo}`` are filled in.

    :ivar flake: directory of the flake's checkout, relative to the inventory file.
    :ivar attribute: the flake's attribute of a host's configuration.
    """

    flake: PlainText
    attribute: Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_'.{}-]*$")] = (
        "nixosConfigurations.{host}"
    )
    runner_module: RelPath = RelPath("hosts/{host}/nixops-{runner}.nix")
    tofu_file: RelPath = RelPath("terraform/vault/nixops-{host}-{runner}.tf")
    workflow_file: RelPath = RelPath("workflows/{repo}/.forgejo/workflows/nixops-{runner}.yml")
    build_timeout: Seconds = 7200.0


# -- hosts ----------------------------------------------------------------------------------------------------


class Ssh(Model):
    """How to connect. Times are seconds; connection, login and command each have their own."""

    identity_file: PlainText | None = None
    connect_timeout: Seconds = 10.0
    login_timeout: Seconds = 20.0
    command_timeout: Seconds = 120.0
    keepalive: Seconds = 15.0


class Deploy(Model):
    """The guarded transaction's bounds, in seconds, and where the toplevel is built.

    :ivar build: ``here``, ``target``, or the name of a host with ``builder``.
    """

    build: PlainText = "here"
    activation_timeout: Seconds = 300.0
    confirm_timeout: Seconds = 120.0
    lease_timeout: Seconds = 120.0


HostKey = Annotated[
    str,
    StringConstraints(pattern=r"^(ssh-ed25519|ssh-rsa|ecdsa-sha2-nistp(256|384|521)) [A-Za-z0-9+/]+={0,2}( [ -~]*)?$"),
]


class Host(Model):
    """One host after ``defaults → group → host``."""

    address: Address
    port: Annotated[int, Field(ge=1, le=65535)] = 22
    user: Annotated[str, StringConstraints(pattern=r"^[a-z_][a-z0-9_.-]{0,31}$")] = "root"
    host_key: Annotated[tuple[HostKey, ...], Field(strict=False)] = ()
    sudo_password: SecretRef | None = None
    system: System = System("x86_64-linux")
    groups: Annotated[tuple[Identifier, ...], Field(strict=False)] = ()
    builder: Builder | None = None
    ssh: Ssh = Ssh()
    deploy: Deploy = Deploy()
    approle_dir: AbsolutePath = AbsolutePath("/var/lib/vault/approle")
    protected_files: Annotated[tuple[AbsolutePath, ...], Field(strict=False)] = ()
    runners: dict[RunnerName, Runner] = Field(default_factory=dict)

    @field_validator("host_key", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _token_paths_differ(self) -> Self:
        seen: dict[str, str] = {}
        for name, runner in self.runners.items():
            if isinstance(runner, ManagedRunner):
                for place in (runner.token.path, runner.token_path):
                    if place in seen:
                        raise ValueError(f"runners {seen[place]} and {name} share the token path {place}")
                    seen[place] = name
        return self


class Default(Model):
    """What a task called bare works on."""

    host: HostName | None = None
    runner: RunnerName | None = None
    image: Identifier | None = None

    @model_validator(mode="after")
    def _runner_of_a_host(self) -> Self:
        if self.runner is not None and self.host is None:
            raise ValueError("a default runner needs its host beside it")
        return self


class Inventory(Model):
    """The whole inventory, validated and merged."""

    forge: Forge | None = None
    vault: Vault = Vault()
    config: Config | None = None
    default: Default | None = None
    build: Build = Build()
    images: dict[Identifier, Image] = Field(default_factory=dict)
    registries: dict[RegistryName, Registry] = Field(default_factory=dict)
    cache: BinaryCache | None = None
    hosts: Annotated[dict[HostName, Host], Field(min_length=1)]
