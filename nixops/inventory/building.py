"""What the inventory says of building: builders, images, the registries they go to, the binary cache."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from nixops.inventory.fields import HttpUrl, Identifier, Model, PlainText, Seconds, SecretRef
from nixops.values import AttrPath, FlakeRef, HostName, ImageReference, System


class Builder(Model):
    """A host that builds for others; the fields are those of Nix's machines format."""

    max_jobs: Annotated[int, Field(ge=1, le=4096)] = 1
    speed_factor: Annotated[int, Field(ge=1, le=1000)] = 1
    features: Annotated[tuple[Identifier, ...], Field(strict=False)] = ()
    mandatory_features: Annotated[tuple[Identifier, ...], Field(strict=False)] = ()
    systems: Annotated[tuple[System, ...], Field(strict=False)] = ()


class Ec2Pool(Model):
    """Builders found in EC2, by tag; credentials come from boto3's own chain.

    An instance's ``Name`` tag (or its id) is its name, its architecture its system. Its host key stands in a tag of
    its own: without, it is shown and not used.
    """

    tags: Annotated[dict[Annotated[str, StringConstraints(min_length=1, max_length=128)], str], Field(min_length=1)]
    regions: Annotated[tuple[Identifier, ...], Field(strict=False)] = ()
    address: Literal["private", "public"] = "private"
    host_key_tag: Annotated[str, StringConstraints(min_length=1, max_length=128)] = "ssh-host-key"
    user: Annotated[str, StringConstraints(pattern=r"^[a-z_][a-z0-9_.-]{0,31}$")] = "root"
    port: Annotated[int, Field(ge=1, le=65535)] = 22
    builder: Builder = Builder()


class Build(Model):
    """The pool of builders and its bounds. Times are seconds, ``min_free`` is MiB of the builder's store.

    :ivar ssh_key: the private key for the builders' logins; left out: each host's ``ssh.identity_file``, else the
        operator's own ssh-agent and keys.
    :ivar machines: a file in Nix's machines format whose builders are part of the pool.
    """

    ssh_key: SecretRef | None = None
    machines: PlainText | None = None
    ec2: Ec2Pool | None = None
    probe_timeout: Annotated[float, Field(gt=0, le=300)] = 5.0
    build_timeout: Seconds = 7200.0
    push_timeout: Seconds = 3600.0
    quarantine: Annotated[float, Field(ge=0, le=86400)] = 300.0
    min_free: Annotated[int, Field(ge=0, le=1_000_000_000)] = 1024


class Image(Model):
    """An image: the flake's attribute, built once for each system, and where it goes."""

    flake: FlakeRef
    attribute: AttrPath
    systems: Annotated[tuple[System, ...], Field(min_length=1, strict=False)]
    destination: ImageReference | None = None
    provenance: bool = False

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        if len(set(self.systems)) != len(self.systems):
            raise ValueError("systems names a system twice")
        return self


class Registry(Model):
    """How to talk to a registry, where the docker configuration of the operator does not say all.

    The login is one of: ``user`` and ``password``; ``docker_config``; ``ecr`` (a token from AWS for the registry's
    own account and region, which is also what a registry with ECR's name gets). ``tls: false`` is plain HTTP.
    """

    user: PlainText | None = None
    password: SecretRef | None = None
    docker_config: PlainText | None = None
    ecr: Literal[True] | None = None
    ca_file: PlainText | None = None
    tls: bool = True
    timeout: Seconds = 30.0

    @model_validator(mode="after")
    def _one_login(self) -> Self:
        if (self.user is None) != (self.password is None):
            raise ValueError("user and password belong together")
        if sum(v is not None for v in (self.user, self.docker_config, self.ecr)) > 1:
            raise ValueError("name one login: user and password, docker_config, or ecr")
        return self


CacheKey = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}:[A-Za-z0-9+/]{43}=$")]


class BinaryCache(Model):
    """The binary cache that hosts substitute from, which ``invoke warm-cache`` fills and asks.

    :ivar host: whose store it serves.
    :ivar public_keys: our keys, as ``nix.settings.trusted-public-keys`` has them; a signature by one is required.
    """

    url: HttpUrl
    host: HostName
    public_keys: Annotated[tuple[CacheKey, ...], Field(min_length=1, strict=False)]
    ca_file: PlainText | None = None
