"""Builders found in EC2 by their tags, through boto3 and its own chain of credentials, regions and endpoints."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from nixops.build.model import PoolBuilder
from nixops.errors import NixopsError, SecretUnavailable, Unreachable, UsageError
from nixops.inventory.building import Ec2Pool
from nixops.transport.fleet import fan_out
from nixops.transport.hostkey import HostKey
from nixops.transport.target import SshTarget
from nixops.values import Address, HostName, System

# Seconds for a connection, and for each wait on an answer.
_TIMEOUT = 10
_REGIONS_AT_ONCE = 16
# EC2's word for an instance's architecture → the system it builds.
_SYSTEMS = {
    "x86_64": System("x86_64-linux"),
    "arm64": System("aarch64-linux"),
    "i386": System("i686-linux"),
    "x86_64_mac": System("x86_64-darwin"),
    "arm64_mac": System("aarch64-darwin"),
}


def discover_ec2(
    settings: Ec2Pool, *, session: Callable[[], Any] | None = None, page: int = 200
) -> tuple[PoolBuilder, ...]:
    """The running instances that carry all the tags, of all the regions at once, in the order of regions and names.

    What cannot be used (no pinned host key, no address, an architecture that Nix has no system for) is in the result
    with the reason in ``excluded``, so that ``invoke build.pool`` shows it.

    :param session: makes a boto3 session; by default one by boto3's own rules (environment, profile, role).
    :param page: how many are asked for in one request, 5 to 1000.
    :raises UsageError: no region is named anywhere.
    :raises SecretUnavailable: there are no AWS credentials, they are wrong or have ended, or may not ask.
    :raises Unreachable: AWS does not answer.
    """
    made = _opened(session)
    regions = settings.regions or _default_region(made)
    # Clients are made one after the other: a boto3 session is not for several threads. Clients are.
    clients = [(region, _client(made, region)) for region in regions]
    builders: dict[HostName, PoolBuilder] = {}
    for outcome in fan_out(clients, lambda pair: list(_instances(*pair, settings, page)), limit=_REGIONS_AT_ONCE):
        for instance in sorted(outcome.unwrap(), key=_identity):
            region = outcome.item[0]
            builder = _builder(instance, region, settings, frozenset(builders))
            builders[builder.name] = builder
    return tuple(builders.values())


def _opened(session: Callable[[], Any] | None) -> Any:
    import boto3

    make: Callable[[], Any] = session or boto3.session.Session  # boto3 has no types
    with _Told("its configuration"):
        return make()


def _default_region(session: Any) -> tuple[str, ...]:
    if not session.region_name:
        raise UsageError(
            "build.ec2 names no region, and AWS has no default one",
            hint="set build.ec2.regions in the inventory, or AWS_DEFAULT_REGION, or region in the profile",
        )
    return (str(session.region_name),)


def _client(session: Any, region: str) -> Any:
    import botocore.config

    limits: Any = botocore.config.Config  # boto3 has no types
    with _Told(f"EC2 in {region}"):
        return session.client(
            "ec2",
            region_name=region,
            config=limits(
                connect_timeout=_TIMEOUT,
                read_timeout=_TIMEOUT,
                retries={"total_max_attempts": 3, "mode": "standard"},
            ),
        )


def _instances(region: str, client: Any, settings: Ec2Pool, size: int) -> Iterator[Mapping[str, Any]]:
    """Each instance once, from every page."""
    filters = [{"Name": f"tag:{key}", "Values": [_literal(value)]} for key, value in settings.tags.items()]
    filters.append({"Name": "instance-state-name", "Values": ["running"]})
    with _Told(f"EC2 in {region}"):
        pages = client.get_paginator("describe_instances").paginate(
            Filters=filters, PaginationConfig={"PageSize": size}
        )
        for page in pages:
            for reservation in page.get("Reservations", ()):
                yield from reservation.get("Instances", ())


def _literal(value: str) -> str:
    """A filter's value that matches only itself: EC2 takes ``*`` and ``?`` for patterns."""
    return re.sub(r"([*?\\])", r"\\\1", value)


# -- an instance ----------------------------------------------------------------------------------------------


def _tags(instance: Mapping[str, Any]) -> dict[str, str]:
    return {str(tag.get("Key", "")): str(tag.get("Value", "")) for tag in instance.get("Tags") or ()}


def _identity(instance: Mapping[str, Any]) -> tuple[str, str]:
    return _tags(instance).get("Name", ""), str(instance.get("InstanceId", ""))


def _builder(instance: Mapping[str, Any], region: str, settings: Ec2Pool, taken: frozenset[HostName]) -> PoolBuilder:
    tags = _tags(instance)
    number = str(instance.get("InstanceId", "")) or "instance"
    name = _name(tags.get("Name") or number) or _name(number) or HostName("instance")
    # ssh takes no notice of case where it looks for a host's key: two would have each other's.
    if any(name.lower() == other.lower() for other in taken):
        name = HostName(f"{name[: 62 - len(number)].rstrip('-')}-{number}")
    field = "PrivateIpAddress" if settings.address == "private" else "PublicIpAddress"
    address = str(instance.get(field) or "")
    architecture = str(instance.get("Architecture", ""))
    systems = settings.builder.systems or tuple(s for s in (_SYSTEMS.get(architecture),) if s is not None)
    key, problem = _host_key(tags, settings.host_key_tag)
    if not systems:
        problem = f"Nix has no system for its architecture {architecture or 'unknown'}"
    if not address:
        problem = f"it has no {settings.address} address"
    return PoolBuilder(
        target=SshTarget(
            name=name,
            # One without an address is only shown; its id stands where the address would.
            address=Address(address or number),
            port=settings.port,
            user=settings.user,
            host_keys=(key,) if key else (),
        ),
        systems=systems,
        max_jobs=settings.builder.max_jobs,
        speed_factor=settings.builder.speed_factor,
        features=frozenset(map(str, settings.builder.features)),
        mandatory_features=frozenset(map(str, settings.builder.mandatory_features)),
        source=f"ec2 {region}",
        excluded=problem,
    )


def _host_key(tags: Mapping[str, str], tag: str) -> tuple[str | None, str | None]:
    """The pinned key, or why there is none. A tag holds 256 characters: an ed25519 or ECDSA key fits, RSA does not."""
    if not tags.get(tag):
        return None, f"its tag {tag} pins no host key"
    try:
        return str(HostKey.parse(tags[tag])), None
    except ValueError as error:
        return None, f"its tag {tag} holds no host key: {error}"


def _name(text: str) -> HostName | None:
    name = re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-")[:63].strip("-")
    return HostName(name) if name else None


# -- faults ---------------------------------------------------------------------------------------------------


class _Told:
    """Turns what boto3 raises in its block into our errors. Their texts are not quoted: they can hold a request."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, NixopsError):
            raise _told(error, self._what) from None


def _told(error: Exception, what: str) -> NixopsError:
    import botocore.exceptions as faults

    login = "log in: aws sso login, or AWS_PROFILE, or AWS_ACCESS_KEY_ID"
    if isinstance(error, faults.NoRegionError):
        return UsageError("no AWS region is set", hint="set build.ec2.regions, or AWS_DEFAULT_REGION")
    if isinstance(error, faults.ProfileNotFound | faults.ConfigParseError):
        return UsageError(
            f"the AWS configuration does not hold ({type(error).__name__})", hint="check AWS_PROFILE and ~/.aws/config"
        )
    if isinstance(error, faults.NoCredentialsError | faults.PartialCredentialsError):
        return SecretUnavailable(f"builders cannot be looked for in {what}: there are no AWS credentials", hint=login)
    if isinstance(error, faults.ClientError):
        return _refused(str(error.response.get("Error", {}).get("Code", "an error")), what)
    if isinstance(error, faults.EndpointConnectionError | faults.HTTPClientError):
        return Unreachable(
            f"{what} does not answer ({type(error).__name__})",
            hint="check the network, the region and AWS_ENDPOINT_URL",
        )
    if isinstance(error, faults.BotoCoreError):
        return SecretUnavailable(f"{what} could not be asked ({type(error).__name__})", hint=login)
    return Unreachable(
        f"{what} could not be asked ({type(error).__name__})", hint="check AWS_PROFILE and AWS_ENDPOINT_URL"
    )


def _refused(code: str, what: str) -> NixopsError:
    if code in ("UnauthorizedOperation", "AccessDenied", "AccessDeniedException"):
        return SecretUnavailable(
            f"the AWS identity may not look for builders in {what} ({code})", hint="it needs ec2:DescribeInstances"
        )
    if code in ("AuthFailure", "ExpiredToken", "ExpiredTokenException", "RequestExpired", "InvalidClientTokenId"):
        return SecretUnavailable(
            f"the AWS credentials are wrong or have ended, or {what} is not enabled for them ({code})",
            hint="log in again: aws sso login; check build.ec2.regions and this machine's clock",
        )
    return Unreachable(f"{what} gave {code}", hint="look it up in the documentation of EC2")
