"""Secrets of AWS Secrets Manager, through boto3 and its own chain of credentials, regions and endpoints."""

from __future__ import annotations

from typing import Any

from nixops.errors import SecretUnavailable
from nixops.secret import Secret
from nixops.vault.files import MAX_BYTES

_TIMEOUT = 20


def read_aws_secret(secret_id: str) -> Secret:
    """The current value of the secret ``secret_id`` (a name or an ARN), exactly as it is kept.

    A binary secret is taken as UTF-8 text. An ARN brings its own region. Seen fit for private keys: the newline
    at the end, which OpenSSH wants, stays.

    :raises SecretUnavailable: there are no AWS credentials, no region, no such secret, no permission, no answer.
    """
    import boto3
    import botocore.config
    import botocore.exceptions

    connect: Any = boto3.session.Session  # boto3 has no types
    limits: Any = botocore.config.Config
    parts = secret_id.split(":")
    region = parts[3] if len(parts) >= 7 and parts[0] == "arn" else None
    problem: tuple[str, str]
    try:
        client = connect().client(
            "secretsmanager",
            region_name=region,
            config=limits(connect_timeout=_TIMEOUT, read_timeout=_TIMEOUT, retries={"total_max_attempts": 3}),
        )
        answer = client.get_secret_value(SecretId=secret_id)
    except botocore.exceptions.NoRegionError:
        problem = ("no AWS region is set", "set AWS_DEFAULT_REGION, or region in the profile, or give the secret's ARN")
    except (botocore.exceptions.NoCredentialsError, botocore.exceptions.PartialCredentialsError):
        problem = ("there are no AWS credentials", "log in: aws sso login, or AWS_PROFILE, or AWS_ACCESS_KEY_ID")
    except botocore.exceptions.ClientError as error:
        problem = _refused(str(error.response.get("Error", {}).get("Code", "an error")))
    except botocore.exceptions.BotoCoreError as error:
        # Its text can hold a request, a profile's settings or a credential process's output: the kind will do.
        hint = "check the network, AWS_PROFILE and AWS_DEFAULT_REGION"
        problem = (f"AWS could not be asked ({type(error).__name__})", hint)
    except (OSError, ValueError) as error:
        problem = (f"AWS could not be asked ({type(error).__name__})", "check AWS_PROFILE and AWS_ENDPOINT_URL")
    else:
        return _value(answer.get("SecretString"), answer.get("SecretBinary"), secret_id)
    message, hint = problem
    raise SecretUnavailable(f"the AWS secret {secret_id} cannot be read: {message}", hint=hint)


def _refused(code: str) -> tuple[str, str]:
    match code:
        case "ResourceNotFoundException":
            return "there is no such secret", "check its name, the region and the account"
        case "AccessDeniedException" | "AccessDenied":
            return "permission denied", "the identity needs secretsmanager:GetSecretValue (and kms:Decrypt) on it"
        case "ExpiredTokenException" | "ExpiredToken" | "UnrecognizedClientException" | "InvalidClientTokenId":
            return f"the AWS credentials are wrong or have ended ({code})", "log in again: aws sso login"
        case _:
            return f"AWS gave {code}", "look it up in the documentation of Secrets Manager"


def _value(text: object, binary: object, secret_id: str) -> Secret:
    if isinstance(binary, bytes) and text is None:
        try:
            text = binary.decode()
        except UnicodeDecodeError:
            text = None
    if not isinstance(text, str) or not text or "\0" in text or len(text) > MAX_BYTES:
        raise SecretUnavailable(f"the AWS secret {secret_id} holds no text", hint="store it as a string")
    return Secret(text)
