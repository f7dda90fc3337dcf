"""What an inventory holds. Frozen pydantic models; unknown keys are errors (:mod:`.load` adds the position).

Secrets are never values here, only references (:class:`SecretRef`).
"""

from __future__ import annotations

import hashlib
import re
from enum import StrEnum
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    field_validator,
    model_validator,
)

from nixops.values import AbsolutePath, Address, HostName, RelPath, RepoName, RunnerName, VaultPath


class Model(BaseModel):
    """Frozen, strict about keys, not coercing (``"4"`` is no number)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


PlainText = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
HttpUrl = Annotated[str, StringConstraints(pattern=r"^https?://[A-Za-z0-9.\[\]:_-]+(/[A-Za-z0-9._~/-]*)?$")]
Seconds = Annotated[float, Field(gt=0, le=86400)]
EnvName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Identifier = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$")]


# -- secrets by reference -------------------------------------------------------------------------------------


class OpenBaoRef(Model):
    """A key of a KV v2 entry."""

    path: VaultPath
    key: Identifier


class SecretRef(Model):
    """Where a secret is read from: exactly one of the fields.

    ``file`` must be a regular file of the operator's with no permission for others (0600 or stricter);
    ``command`` is run without a shell and its stdout, less one newline, is the secret.
    """

    env: EnvName | None = None
    file: PlainText | None = None
    openbao: OpenBaoRef | None = None
    aws: PlainText | None = None
    command: Annotated[tuple[str, ...], Field(min_length=1, strict=False)] | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        given = [k for k in ("env", "file", "openbao", "aws", "command") if getattr(self, k) is not None]
        if len(given) != 1:
            raise ValueError("a secret reference names exactly one of env, file, openbao, aws, command")
        return self

    def describe(self) -> str:
        """How an error names it: ``environment variable FORGEJO_TOKEN``. Never the value."""
        if self.env:
            return f"environment variable {self.env}"
        if self.file:
            return f"file {self.file}"
        if self.openbao:
            return f"OpenBao entry {self.openbao.path} (key {self.openbao.key})"
        if self.aws:
            return f"AWS secret {self.aws}"
        return f"command {(self.command or ('',))[0]}"


# -- services -------------------------------------------------------------------------------------------------


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


# -- runners --------------------------------------------------------------------------------------------------


class RunnerModule(StrEnum):
    """Which NixOS module runs it."""

    GITEA = "gitea-actions-runner"
    FORGEJO = "forgejo-runner"

    @property
    def user(self) -> str:
        """The module's DynamicUser."""
        return "gitea-runner" if self is RunnerModule.GITEA else "forgejo-runner"


class SecretFlavour(StrEnum):
    """How the host fetches the secret: the user's ``vault.secrets.<name>`` module, or a unit of our own."""

    VAULT_SECRETS = "vault.secrets"
    AGENT = "agent"


class KvOwner(StrEnum):
    """Who writes the KV entry: nixops through the API, or OpenTofu from the rendered file."""

    API = "api"
    TOFU = "tofu"


Label = Annotated[
    str,
    StringConstraints(pattern=r"^[A-Za-z0-9_.-]+:(host|docker://[A-Za-z0-9._:/@-]+|lxc://[A-Za-z0-9._:/@-]+)$"),
]
NixPackage = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_'-]*(\.[A-Za-z_][A-Za-z0-9_'-]*)*$")]
Duration = Annotated[str, StringConstraints(pattern=r"^([0-9]+(h|m|s))+$")]


def duration_seconds(text: str) -> int:
    """Seconds of a Go-style duration: ``1h30m`` is 5400."""
    return sum(int(n) * {"h": 3600, "m": 60, "s": 1}[u] for n, u in re.findall(r"([0-9]+)([hms])", text))


class Scope(Model):
    """Whose jobs the registration admits: exactly one of the fields."""

    repository: RepoName | None = None
    organization: Identifier | None = None
    user: Identifier | None = None
    admin: Literal[True] | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if sum(v is not None for v in (self.repository, self.organization, self.user, self.admin)) != 1:
            raise ValueError("a scope names exactly one of repository, organization, user, admin")
        return self

    def __str__(self) -> str:
        if self.repository:
            return f"repository {self.repository}"
        if self.organization:
            return f"organization {self.organization}"
        if self.user:
            return f"user {self.user}"
        return "admin (the whole forge)"


class Cache(Model):
    """The runner's own actions cache."""

    enabled: bool = True
    dir: AbsolutePath | None = None


ByteSize = Annotated[str, StringConstraints(pattern=r"^([1-9][0-9]*[KMGT]?|[1-9][0-9]?%|100%|infinity)$")]
Percent = Annotated[str, StringConstraints(pattern=r"^[1-9][0-9]{0,5}%$")]
Weight = Annotated[int, Field(ge=1, le=10000)]


class Limits(Model):
    """systemd limits of the runner's unit, under systemd's own names (systemd.resource-control(5))."""

    MemoryMax: ByteSize | None = None
    MemoryHigh: ByteSize | None = None
    MemorySwapMax: (
        Annotated[str, StringConstraints(pattern=r"^(0|[1-9][0-9]*[KMGT]?|[1-9][0-9]?%|100%|infinity)$")] | None
    ) = None
    CPUQuota: Percent | None = None
    CPUWeight: Weight | None = None
    IOWeight: Weight | None = None
    TasksMax: Annotated[int, Field(ge=16, le=4194304)] | None = None
    Nice: Annotated[int, Field(ge=-20, le=19)] | None = None

    def given(self) -> dict[str, str | int]:
        """The limits that are set, by systemd's name."""
        return {k: v for k, v in self.model_dump().items() if v is not None}


class TokenEntry(Model):
    """The KV entry that holds the runner's credential.

    With several connections each gets an entry of its own: ``<path>-<owner>-<repo>``.
    """

    path: VaultPath
    key: Identifier = "token"
    owner: KvOwner = Field(default=KvOwner.API, strict=False)


class Workflow(Model):
    """The workflow rendered for each trusted repository."""

    name: PlainText = "Build"
    commands: Annotated[tuple[str, ...], Field(strict=False, min_length=1)] = ("nix build",)
    checkout: PlainText = "actions/checkout@v4"


class ManagedRunner(Model):
    """A runner instance that nixops renders, registers and deploys."""

    managed: Literal[True] = True
    name: PlainText
    module: RunnerModule = Field(default=RunnerModule.GITEA, strict=False)
    labels: Annotated[tuple[Label, ...], Field(min_length=1, strict=False)]
    scope: Scope | None = None
    trusted: Annotated[tuple[RepoName, ...], Field(min_length=1, strict=False)]
    accept_wider_scope: bool = False
    host_packages: Annotated[tuple[NixPackage, ...], Field(strict=False)] = (
        "bash",
        "coreutils",
        "curl",
        "gawk",
        "gitMinimal",
        "gnused",
        "nodejs",
        "wget",
        "nix",
    )
    extra_host_packages: Annotated[tuple[NixPackage, ...], Field(strict=False)] = ()
    capacity: Annotated[int, Field(ge=1, le=256)] = 1
    shutdown_timeout: Duration = "5m"
    cache: Cache = Cache()
    limits: Limits = Limits()
    token: TokenEntry
    token_file: AbsolutePath | None = None
    secret: SecretFlavour = Field(default=SecretFlavour.AGENT, strict=False)
    isolate: bool = True
    accepted_risks: dict[Identifier, PlainText] = {}
    workflow: Workflow = Workflow()
    settings: dict[str, Any] = {}

    @field_validator("shutdown_timeout")
    @classmethod
    def _bounded(cls, value: str) -> str:
        if not 0 <= duration_seconds(value) <= 86400:
            raise ValueError("shutdown_timeout is at most 24h")
        return value

    @model_validator(mode="after")
    def _scope_fits_module(self) -> Self:
        if self.module is RunnerModule.GITEA and self.scope is None:
            raise ValueError(
                "module gitea-actions-runner holds one registration: name its scope (repository, organization, "
                "user or admin), or use module forgejo-runner with one connection per trusted repository"
            )
        if self.module is RunnerModule.FORGEJO and self.scope is not None:
            raise ValueError("module forgejo-runner holds one connection per trusted repository: leave scope out")
        if len(set(self.trusted)) != len(self.trusted):
            raise ValueError("trusted names a repository twice")
        return self

    @property
    def packages(self) -> tuple[str, ...]:
        """All packages on the PATH of host jobs, in order, each once."""
        return tuple(dict.fromkeys((*self.host_packages, *self.extra_host_packages)))

    @property
    def secret_name(self) -> str:
        """The last segment of the token's path: names the file below /run/secrets and the ``vault.secrets`` entry."""
        return self.token.path.rsplit("/", 1)[-1]

    @property
    def token_path(self) -> str:
        """The file on the host that the module reads (one registration)."""
        return self.token_file or f"/run/secrets/{self.secret_name}"


class UnmanagedRunner(Model):
    """A runner that is known (its state and credentials are what ours must not read) but not rendered."""

    managed: Literal[False]
    name: PlainText | None = None
    module: RunnerModule = Field(default=RunnerModule.GITEA, strict=False)
    labels: Annotated[tuple[Label, ...], Field(strict=False)] = ()
    token_file: AbsolutePath | None = None


def _kind(value: Any) -> str:
    managed = value.get("managed", True) if isinstance(value, dict) else getattr(value, "managed", True)
    return "unmanaged" if managed is False else "managed"


Runner = Annotated[
    Annotated[ManagedRunner, Tag("managed")] | Annotated[UnmanagedRunner, Tag("unmanaged")],
    Discriminator(_kind),
]


def unit_name(runner: RunnerName, module: RunnerModule) -> str:
    """The systemd unit that the module makes for an instance, with ``.service``."""
    prefix = "gitea-runner" if module is RunnerModule.GITEA else "forgejo-runner"
    return f"{prefix}-{runner.systemd_escaped()}.service"


def unit_user(runner: RunnerName, module: RunnerModule, *, isolate: bool) -> str:
    """The user and the state directory that an instance's unit is given.

    The older module gives all its instances one user; ``isolate`` overrides it with one of the instance's own.
    systemd refuses a dynamic user's name of more than 31 characters when the unit starts (and no earlier), so a
    long one ends in a digest. The newer module names no user: systemd makes one of the unit's name, and what is
    said here is only its state directory.
    """
    if module is RunnerModule.FORGEJO or not isolate:
        return module.user
    user = f"{module.user}-{runner}"
    if len(user) > 31:
        user = f"{module.user}-{hashlib.sha256(runner.encode()).hexdigest()[:12]}"
    return user


# -- hosts ----------------------------------------------------------------------------------------------------


class Builder(Model):
    """A host that builds for others; the fields are those of Nix's machines format."""

    max_jobs: Annotated[int, Field(ge=1, le=4096)] = 1
    speed_factor: Annotated[int, Field(ge=1, le=1000)] = 1
    features: Annotated[tuple[Identifier, ...], Field(strict=False)] = ()
    mandatory_features: Annotated[tuple[Identifier, ...], Field(strict=False)] = ()
    systems: Annotated[tuple[Identifier, ...], Field(strict=False)] = ()


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
    system: Identifier = "x86_64-linux"
    groups: Annotated[tuple[Identifier, ...], Field(strict=False)] = ()
    builder: Builder | None = None
    ssh: Ssh = Ssh()
    deploy: Deploy = Deploy()
    approle_dir: AbsolutePath = AbsolutePath("/var/lib/vault/approle")
    protected_files: Annotated[tuple[AbsolutePath, ...], Field(strict=False)] = ()
    runners: dict[RunnerName, Runner] = {}

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

    host: HostName
    runner: RunnerName | None = None


class Inventory(Model):
    """The whole inventory, validated and merged."""

    forge: Forge | None = None
    vault: Vault = Vault()
    config: Config | None = None
    default: Default | None = None
    hosts: Annotated[dict[HostName, Host], Field(min_length=1)]
