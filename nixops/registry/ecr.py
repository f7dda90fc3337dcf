"""Logins to Amazon's registries: a token from boto3, for the registry's own account and region.

A token lives for 12 hours at most; it is asked for once and again when it is old. Credentials, endpoints and profiles
are those of boto3's own chain. No error quotes what AWS answered: it may hold the token.
"""

from __future__ import annotations

import base64
import binascii
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Any

from nixops.errors import SecretUnavailable
from nixops.registry.login import Login
from nixops.secret import Secret
from nixops.values import RegistryName

_TIMEOUT = 20
_PUBLIC = frozenset({"public.ecr.aws", "ecr-public.aws.com"})
# Tokens of the public registry are given in one region alone.
_PUBLIC_REGION = "us-east-1"
# 123456789012.dkr.ecr.eu-central-1.amazonaws.com, dkr.ecr-fips, dual-stack (dkr-ecr … on.aws), China, and the
# partitions with domains of their own.
_NAME = re.compile(
    r"(?P<account>[0-9]{12})\.dkr[.-]ecr(?P<fips>-fips)?\.(?P<region>[a-z]{2,6}(?:-[a-z0-9]+)+)\."
    r"(?:amazonaws\.com(?:\.cn)?|amazonaws\.eu|on\.aws|on\.amazonwebservices\.(?:com\.cn|eu)"
    r"|c2s\.ic\.gov|sc2s\.sgov\.gov|cloud\.adc-e\.uk|csp\.hci\.ic\.gov)"
)


@dataclass(frozen=True)
class EcrName:
    """What a registry's name says of it.

    :ivar account: whose it is; None where the name does not say, as for a name of one's own.
    :ivar region: None: that of boto3's chain.
    :ivar fips: the name is that of the validated endpoints; the token comes from one too.
    :ivar public: the public registry, whose tokens come from an API of its own.
    """

    account: str | None = None
    region: str | None = None
    fips: bool = False
    public: bool = False


def ecr_name(registry: RegistryName) -> EcrName | None:
    """What ``registry`` is, where Amazon gave it its name; None for any other."""
    if registry.lower() in _PUBLIC:
        return EcrName(region=_PUBLIC_REGION, public=True)
    found = _NAME.fullmatch(registry.lower().removesuffix(":443"))
    if found is None:
        return None
    return EcrName(found["account"], found["region"], fips=found["fips"] is not None)


def ecr_login(registry: RegistryName, *, clock: Callable[[], float] = time.time) -> Login:
    """A new login with a token of AWS; ``expires`` is when the token ends, by this machine's ``clock`` (Unix time).

    A registry that has not Amazon's name (one behind a name of one's own) is taken for one of the account and region
    that boto3's chain gives.

    :raises SecretUnavailable: no credentials, no region, no permission, no answer, or an answer without a token.
    """
    import boto3
    import botocore.config
    import botocore.exceptions

    connect: Any = boto3.session.Session  # boto3 has no types
    limits: Any = botocore.config.Config
    name = ecr_name(registry) or EcrName()
    problem: tuple[str, str]
    try:
        client = connect().client(
            "ecr-public" if name.public else "ecr",
            region_name=name.region,
            config=limits(
                connect_timeout=_TIMEOUT,
                read_timeout=_TIMEOUT,
                retries={"total_max_attempts": 3},
                use_fips_endpoint=True if name.fips else None,
            ),
        )
        asked = {"registryIds": [name.account]} if name.account else {}
        answer = client.get_authorization_token(**asked)
    except botocore.exceptions.NoRegionError:
        problem = ("no AWS region is set", "set AWS_DEFAULT_REGION, or region in the profile")
    except (botocore.exceptions.NoCredentialsError, botocore.exceptions.PartialCredentialsError):
        problem = ("there are no AWS credentials", "log in: aws sso login, or AWS_PROFILE, or AWS_ACCESS_KEY_ID")
    except botocore.exceptions.ClientError as error:
        code = str(error.response.get("Error", {}).get("Code", "an error"))
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        problem = _refused(code, status, public=name.public)
    except botocore.exceptions.BotoCoreError as error:
        # Its text can hold a request, a profile's settings or a credential process's output: the kind will do.
        problem = (f"AWS could not be asked ({type(error).__name__})", "check the network and AWS_PROFILE")
    except (OSError, ValueError) as error:
        problem = (f"AWS could not be asked ({type(error).__name__})", "check AWS_PROFILE and AWS_ENDPOINT_URL")
    else:
        return _login(answer, name, registry, clock())
    message, hint = problem
    raise SecretUnavailable(f"there is no token for the registry {registry}: {message}", hint=hint)


def _refused(code: str, status: object, *, public: bool) -> tuple[str, str]:
    match code:
        case (
            "ExpiredTokenException"
            | "ExpiredToken"
            | "UnrecognizedClientException"
            | "InvalidClientTokenId"
            | "InvalidSignatureException"
        ):
            return f"the AWS credentials are wrong or have ended ({code})", "log in again: aws sso login"
        case "ThrottlingException" | "TooManyRequestsException":
            return f"AWS was asked too often ({code})", "wait, then run the command again"
        case _ if status == 403 or code in ("AccessDeniedException", "AccessDenied"):
            rights = "ecr:GetAuthorizationToken"
            if public:
                rights = "ecr-public:GetAuthorizationToken and sts:GetServiceBearerToken"
            return "permission denied", f"the identity needs {rights}"
        case _:
            return f"AWS gave {code}", "look it up in the documentation of Amazon ECR"


def _login(answer: Mapping[str, Any], name: EcrName, registry: RegistryName, now: float) -> Login:
    data = answer.get("authorizationData")
    entries = [data] if isinstance(data, dict) else data if isinstance(data, list) else []
    for entry in entries:
        endpoint = str(entry.get("proxyEndpoint") or "")
        if name.account and endpoint and not endpoint.removeprefix("https://").startswith(f"{name.account}."):
            continue  # of another account than the registry's
        login = _pair(entry.get("authorizationToken"))
        if login is not None:
            user, password = login
            return Login(user, password, _ends(entry.get("expiresAt"), answer, now))
    raise SecretUnavailable(
        f"there is no token for the registry {registry}: AWS's answer holds none for its account",
        hint="is AWS_ENDPOINT_URL an endpoint of AWS, and may this identity use the registry?",
    )


def _pair(token: object) -> tuple[str, Secret] | None:
    """``AWS`` and the password, which the token holds as basic authentication does."""
    if not isinstance(token, str):
        return None
    try:
        user, colon, password = base64.b64decode(token, validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError):
        return None
    return (user, Secret(password)) if user and colon and password else None


def _ends(expires: object, answer: Mapping[str, Any], now: float) -> float:
    """When the token ends, by this machine's clock.

    The life of a token is the time from AWS's ``Date`` to its end: a clock that is wrong here changes nothing. One
    without an end is good for this once.
    """
    if not isinstance(expires, datetime):
        return now
    headers = (answer.get("ResponseMetadata") or {}).get("HTTPHeaders") or {}
    try:
        there = parsedate_to_datetime(str(headers.get("date"))).timestamp()
    except (TypeError, ValueError):
        there = now
    return now + max(0.0, expires.timestamp() - there)
