"""References to secrets: each kind read for real, each refusal told without quoting the secret."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from nixops.errors import SecretUnavailable
from nixops.inventory.model import Inventory, SecretRef
from nixops.secret import Redactor, Secret
from nixops.transport.local import LocalRunner
from nixops.vault import refs
from nixops.vault.refs import resolve_ref, secret_variables

VALUE = "correct-horse-battery"


def resolve(
    ref: dict[str, Any], base: Path, environ: dict[str, str] | None = None, redactor: Redactor | None = None
) -> Secret:
    return resolve_ref(
        SecretRef.model_validate(ref),
        environ=environ or {},
        base=base,
        local=LocalRunner(),
        redactor=redactor or Redactor(),
        openbao=None,
    )


def private(path: Path, text: str = VALUE, mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


def test_every_kind_is_known_to_the_redactor_when_it_is_returned(tmp_path: Path) -> None:
    private(tmp_path / "token")
    for ref in ({"env": "MINE"}, {"file": "token"}, {"command": ["printf", VALUE]}):
        redactor = Redactor()
        assert resolve(ref, tmp_path, {"MINE": VALUE}, redactor).reveal() == VALUE
        assert redactor.clean(f"it is {VALUE}") == "it is ***"


def test_every_variable_that_holds_a_secret_is_found_wherever_its_reference_stands() -> None:
    document = {
        "forge": {"url": "https://code.example.org", "token": {"env": "OF_THE_FORGE"}},
        "vault": {"approle": {"role_id": {"env": "ROLE"}, "secret_id": {"file": "secret-id"}}},
        "hosts": {"gunter": {"address": "192.0.2.1", "sudo_password": {"env": "OF_SUDO"}}},
    }
    inventory = Inventory.model_validate(document)
    opening = {f"{family}_{name}" for family in ("BAO", "VAULT") for name in ("TOKEN", "ROLE_ID", "SECRET_ID")}
    assert secret_variables(inventory) == {"OF_THE_FORGE", "ROLE", "OF_SUDO"} | opening


def test_a_variable_that_is_not_set_or_empty_is_named(tmp_path: Path) -> None:
    with pytest.raises(SecretUnavailable, match="MINE is not set"):
        resolve({"env": "MINE"}, tmp_path)
    with pytest.raises(SecretUnavailable, match="MINE is empty"):
        resolve({"env": "MINE"}, tmp_path, {"MINE": ""})


@pytest.mark.parametrize(
    ("text", "value"), [(VALUE, VALUE), (f"{VALUE}\n", VALUE), (f"{VALUE}\r\n", VALUE), (f"{VALUE}\n\n", f"{VALUE}\n")]
)
def test_one_newline_at_the_end_of_a_file_is_removed(tmp_path: Path, text: str, value: str) -> None:
    (tmp_path / "token").write_bytes(text.encode())
    (tmp_path / "token").chmod(0o400)
    assert resolve({"file": "token"}, tmp_path).reveal() == value


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o610, 0o660])
def test_a_file_with_any_permission_for_others_is_refused_with_the_command_that_mends_it(
    tmp_path: Path, mode: int
) -> None:
    path = private(tmp_path / "token", mode=mode)
    with pytest.raises(SecretUnavailable, match=f"chmod 600 {path}") as caught:
        resolve({"file": str(path)}, tmp_path)
    assert VALUE not in str(caught.value)


def test_a_file_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = private(tmp_path / "token")
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(SecretUnavailable, match="belongs to user id"):
        resolve({"file": str(path)}, tmp_path)


def test_what_is_no_regular_file_is_refused_and_a_pipe_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    (tmp_path / "directory").mkdir(mode=0o700)
    for name in ("pipe", "directory"):
        with pytest.raises(SecretUnavailable, match="regular file"):
            resolve({"file": name}, tmp_path)


def test_a_link_to_an_open_file_is_judged_by_the_file(tmp_path: Path) -> None:
    private(tmp_path / "open", mode=0o644)
    (tmp_path / "link").symlink_to("open")
    with pytest.raises(SecretUnavailable, match="0644"):
        resolve({"file": "link"}, tmp_path)


@pytest.mark.parametrize(
    ("content", "said"), [(b"", "empty"), (b"\n", "empty"), (b"\xff\xfe", "UTF-8"), (b"a\0b", "UTF-8")]
)
def test_a_file_without_text_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "token").write_bytes(content)
    (tmp_path / "token").chmod(0o600)
    with pytest.raises(SecretUnavailable, match=said):
        resolve({"file": "token"}, tmp_path)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(SecretUnavailable, match=r"token.*No such file"):
        resolve({"file": "token"}, tmp_path)


def test_a_command_runs_without_a_shell_in_the_directory_of_the_inventory(tmp_path: Path) -> None:
    assert resolve({"command": ["echo", "$HOME;", "*"]}, tmp_path).reveal() == "$HOME; *"
    assert resolve({"command": ["pwd"]}, tmp_path).reveal() == str(tmp_path)


def test_a_command_that_fails_shows_neither_of_its_outputs(tmp_path: Path) -> None:
    script = f"echo {VALUE}; echo {VALUE} >&2; exit 9"
    with pytest.raises(SecretUnavailable, match="exit code 9") as caught:
        resolve({"command": ["sh", "-c", "echo $0 | tee /dev/stderr; exit 9", VALUE[::-1]]}, tmp_path)
    assert f"\n{VALUE[::-1]}" not in str(caught.value)
    path = private(tmp_path / "helper", f"#!/bin/sh\n{script}\n", 0o700)
    with pytest.raises(SecretUnavailable, match="exit code 9") as caught:
        resolve({"command": [str(path)]}, tmp_path)
    assert VALUE not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_command_that_is_not_there_or_says_nothing_is_told(tmp_path: Path) -> None:
    with pytest.raises(SecretUnavailable, match="no-such-program"):
        resolve({"command": ["no-such-program"]}, tmp_path)
    with pytest.raises(SecretUnavailable, match="empty"):
        resolve({"command": ["true"]}, tmp_path)


def test_a_command_that_hangs_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refs, "COMMAND_SECONDS", 0.3)
    with pytest.raises(SecretUnavailable, match=r"within 0\.3 s"):
        resolve({"command": ["sleep", "30"]}, tmp_path)


def test_the_login_of_openbao_cannot_be_read_from_openbao(tmp_path: Path) -> None:
    with pytest.raises(SecretUnavailable, match="log in to OpenBao itself"):
        resolve({"openbao": {"path": "a/b", "key": "token"}}, tmp_path)


# -- AWS: the real boto3 against a small endpoint --------------------------------------------------------------


class SecretsManager(ThreadingHTTPServer):
    """GetSecretValue of AWS Secrets Manager, over HTTP."""

    secrets: dict[str, dict[str, str]]
    error: tuple[int, str] | None
    seen: list[dict[str, str]]


class Handler(BaseHTTPRequestHandler):
    server: SecretsManager

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append({n: self.headers[n] for n in ("X-Amz-Target", "Authorization")})
        status, body = 200, self.server.secrets.get(asked["SecretId"], {})
        if self.server.error or not body:
            status, code = self.server.error or (400, "ResourceNotFoundException")
            body = {"__type": code, "message": f"{code} {VALUE}"}
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/x-amz-json-1.1")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[SecretsManager]:
    server = SecretsManager(("127.0.0.1", 0), Handler)
    server.secrets, server.error, server.seen = {}, None, []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    for name in [n for n in os.environ if n.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "example-secret-key")
    monkeypatch.setenv("AWS_ENDPOINT_URL_SECRETS_MANAGER", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setenv("AWS_REGION", "us-west-2")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-west-2")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


KEY = "-----BEGIN OPENSSH PRIVATE KEY-----\nabc\n-----END OPENSSH PRIVATE KEY-----\n"


def test_an_aws_secret_is_read_exactly_as_it_is_kept(aws: SecretsManager, tmp_path: Path) -> None:
    aws.secrets["nix-runner-ssh-key"] = {"SecretString": KEY}
    assert resolve({"aws": "nix-runner-ssh-key"}, tmp_path).reveal() == KEY
    assert aws.seen[0]["X-Amz-Target"] == "secretsmanager.GetSecretValue"


def test_a_binary_aws_secret_is_taken_as_text_and_an_arn_brings_its_region(
    aws: SecretsManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arn = "arn:aws:secretsmanager:eu-north-1:123456789012:secret:key-AbCdEf"
    aws.secrets[arn] = {"SecretBinary": "aGVsbG8tc2VjcmV0"}
    monkeypatch.delenv("AWS_REGION")
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    assert resolve({"aws": arn}, tmp_path).reveal() == "hello-secret"
    assert "/eu-north-1/" in aws.seen[0]["Authorization"]
    with pytest.raises(SecretUnavailable, match="no AWS region"):
        resolve({"aws": "nix-runner-ssh-key"}, tmp_path)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ((400, "ResourceNotFoundException"), "no such secret"),
        ((400, "AccessDeniedException"), "GetSecretValue"),
        ((400, "ExpiredTokenException"), "log in again"),
        ((500, "InternalServiceError"), "InternalServiceError"),
    ],
)
def test_a_refusal_by_aws_is_told_without_its_text(
    aws: SecretsManager, tmp_path: Path, error: tuple[int, str], said: str
) -> None:
    aws.error = error
    with pytest.raises(SecretUnavailable, match=said) as caught:
        resolve({"aws": "nix-runner-ssh-key"}, tmp_path)
    assert VALUE not in str(caught.value)
    assert caught.value.__context__ is None


def test_missing_aws_credentials_and_an_unreachable_endpoint_are_told(
    aws: SecretsManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.delenv("AWS_ACCESS_KEY_ID")
        patch.delenv("AWS_SECRET_ACCESS_KEY")
        with pytest.raises(SecretUnavailable, match="no AWS credentials"):
            resolve({"aws": "nix-runner-ssh-key"}, tmp_path)
    monkeypatch.setenv("AWS_ENDPOINT_URL_SECRETS_MANAGER", "http://127.0.0.1:1")
    with pytest.raises(SecretUnavailable, match="EndpointConnectionError"):
        resolve({"aws": "nix-runner-ssh-key"}, tmp_path)
