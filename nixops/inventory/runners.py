"""The runners of a host: what the inventory says of each, and what follows from it for its unit."""

from __future__ import annotations

import hashlib
import re
from enum import StrEnum
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, StringConstraints, Tag, field_validator, model_validator

from nixops.inventory.fields import ByteSize, Identifier, Model, PlainText
from nixops.values import AbsolutePath, RepoName, RunnerName, VaultPath


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
    accepted_risks: dict[Identifier, PlainText] = Field(default_factory=dict)
    workflow: Workflow = Workflow()
    settings: dict[str, Any] = Field(default_factory=dict)

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
