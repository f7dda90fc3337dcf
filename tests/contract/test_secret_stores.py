"""Every place that a secret can be kept in, through the one interface: AWS by real boto3, OpenBao the real server."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nixops.errors import NixopsError, SecretUnavailable, UsageError
from nixops.inventory.fields import SecretRef
from nixops.inventory.model import Vault
from nixops.lab.aws import AwsServer
from nixops.lab.openbao import BaoServer
from nixops.secret import Redactor, Secret
from nixops.transport.local import LocalRunner
from nixops.vault.openbao import OpenBao
from nixops.vault.settings import settings_from
from nixops.vault.store import (
    AgentKey,
    AwsSecretStore,
    CommandSecretStore,
    EnvSecretStore,
    FileSecretStore,
    OpenBaoSecretStore,
    SecretStore,
    builders_key,
)

VALUE = "s3cret-Value-of-the-builders"


@pytest.fixture(scope="module")
def aws() -> Iterator[AwsServer]:
    with AwsServer() as server:
        server.put_secret("nix-runner-ssh-key", Secret(VALUE))
        yield server


@pytest.fixture(scope="module")
def bao() -> Iterator[BaoServer]:
    with BaoServer() as server:
        server.api("POST", "secret/data/hosts/builders/ssh", {"data": {"key": VALUE}})
        yield server


Made = tuple[SecretStore, str, str]


@pytest.fixture
def make(
    aws: AwsServer, bao: BaoServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, Redactor], Made]:
    """A store of the kind, a name that it has and one that it has not."""
    for name, value in aws.environ().items():
        monkeypatch.setenv(name, value)
    (tmp_path / "key").write_text(VALUE + "\n")
    (tmp_path / "key").chmod(0o600)
    local = LocalRunner()

    def opened(redactor: Redactor) -> OpenBao:
        environ = {"BAO_ADDR": bao.address, "BAO_TOKEN": bao.root_token.reveal()}
        return OpenBao(settings_from(Vault(), environ, lambda _: Secret(""), tmp_path), redactor)

    def store(kind: str, redactor: Redactor) -> Made:
        match kind:
            case "aws":
                return AwsSecretStore(redactor), "nix-runner-ssh-key", "nobody"
            case "openbao":
                made = OpenBaoSecretStore(lambda: opened(redactor), redactor, local)
                return made, "hosts/builders/ssh#key", "hosts/builders/ssh#none"
            case "file":
                return FileSecretStore(tmp_path, redactor, local), "key", "none"
            case "env":
                return EnvSecretStore({"KEY": VALUE}, redactor, local), "KEY", "NONE"
            case _:
                return CommandSecretStore(("cat",), tmp_path, redactor, local), "key", "none"

    return store


KINDS = ("aws", "openbao", "file", "env", "command")


@pytest.mark.parametrize("kind", KINDS)
def test_a_secret_comes_out_as_it_was_kept_and_the_redactor_knows_it(
    make: Callable[[str, Redactor], Made], kind: str
) -> None:
    """Proves: the value is whole, it does not print, and no log shows it from here on."""
    redactor = Redactor()
    store, name, _ = make(kind, redactor)
    secret = store.get(name)
    assert secret.reveal() == VALUE
    assert repr(secret) == "***"
    assert redactor.clean(f"sent {VALUE} there") == "sent *** there"


@pytest.mark.parametrize("kind", KINDS)
def test_a_secret_that_is_not_there_is_told_without_any_value(make: Callable[[str, Redactor], Made], kind: str) -> None:
    """Proves: SecretUnavailable, which ends with 2, names what was asked for."""
    store, name, absent = make(kind, Redactor())
    store.get(name)
    with pytest.raises(SecretUnavailable) as caught:
        store.get(absent)
    assert caught.value.exit_code == 2
    assert VALUE not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "name"),
    [("aws", ""), ("openbao", "no-key"), ("openbao", "../x#key"), ("openbao", "a#-"), ("file", ""), ("env", "A B")],
)
def test_a_name_that_is_not_of_the_stores_kind_is_refused_before_it_is_asked(
    make: Callable[[str, Redactor], Made], kind: str, name: str
) -> None:
    """Proves: each name is checked by its grammar."""
    store, _, _ = make(kind, Redactor())
    with pytest.raises(UsageError) as caught:
        store.get(name)
    assert type(caught.value) is UsageError


@pytest.mark.parametrize("name", ["-rf", "", "--help"])
def test_a_commands_secret_cannot_be_named_like_an_option(make: Callable[[str, Redactor], Made], name: str) -> None:
    """Proves: a name never becomes an option of the program."""
    store, _, _ = make("command", Redactor())
    with pytest.raises(UsageError, match="would be taken for an option"):
        store.get(name)


# -- the builders' key ----------------------------------------------------------------------------------------


def keygen(path: Path, *more: str) -> Path:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-C", "", "-f", path, *(more or ("-N", ""))], check=True)
    return path


REF = SecretRef(env="KEY")


def test_a_private_key_gets_the_line_end_that_openssh_wants(tmp_path: Path) -> None:
    """Proves: a key that lost its last newline (as a file reference loses it), or has Windows line ends, loads."""
    text = keygen(tmp_path / "id").read_text()
    for given in (text.rstrip("\n"), text.replace("\n", "\r\n"), "\n" + text + "\n"):
        key = builders_key(REF, lambda _, given=given: Secret(given))  # type: ignore[misc]  # bound at once
        assert key is not None and key.reveal() == text
        (tmp_path / "again").write_text(key.reveal())
        (tmp_path / "again").chmod(0o600)
        subprocess.run(["ssh-keygen", "-y", "-P", "", "-f", tmp_path / "again"], check=True, capture_output=True)


def test_no_reference_means_no_key_to_hold() -> None:
    """Proves: a build that uses the agent or the hosts' own files reads no secret."""

    def never(_ref: SecretRef) -> Secret:
        raise AssertionError("nothing was to be read")

    assert builders_key(None, never) is None


@pytest.mark.parametrize("kind", [(), ("-m", "PEM", "-t", "rsa", "-b", "2048")], ids=["openssh", "pem"])
def test_a_key_with_a_passphrase_is_refused_in_words(tmp_path: Path, kind: tuple[str, ...]) -> None:
    """Proves: a key that nobody could use without a terminal is told apart, in both of OpenSSH's formats."""
    text = keygen(tmp_path / "id", "-N", "passphrase", *kind).read_text()
    with pytest.raises(SecretUnavailable, match="asks for a passphrase") as caught:
        builders_key(REF, lambda _: Secret(text), {"SSH_AUTH_SOCK": "/run/agent"})
    assert "your ssh-agent has it" in str(caught.value)
    assert text.splitlines()[1] not in str(caught.value)


@pytest.mark.parametrize("text", ["", "hello", "ssh-ed25519 AAAA", "-----BEGIN CERTIFICATE-----\nAAAA\n"])
def test_what_is_no_private_key_is_refused_without_being_quoted(text: str) -> None:
    """Proves: a public key, a certificate or something else in its place is told before any login fails."""
    with pytest.raises(SecretUnavailable, match="environment variable KEY holds no private key"):
        builders_key(REF, lambda _: Secret(text))


def test_the_operators_agent_is_asked_which_keys_it_has(tmp_path: Path) -> None:
    """Proves: against a real ssh-agent: none, one, gone."""
    key = keygen(tmp_path / "id")
    process = subprocess.Popen(
        ["ssh-agent", "-D", "-a", str(tmp_path / "agent")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        while not (tmp_path / "agent").is_socket():
            assert process.poll() is None
        environ = {"SSH_AUTH_SOCK": str(tmp_path / "agent")}
        agent = AgentKey.of(environ)
        with pytest.raises(SecretUnavailable, match="the ssh-agent holds no key"):
            agent.fingerprints(LocalRunner())
        subprocess.run(["ssh-add", "-q", key], env={**os.environ, **environ}, check=True)
        listed = subprocess.run(["ssh-keygen", "-lf", key], capture_output=True, text=True, check=True).stdout
        assert agent.fingerprints(LocalRunner()) == (listed.split()[1],)
    finally:
        process.terminate()
        process.wait()
    with pytest.raises(SecretUnavailable, match="does not answer"):
        agent.fingerprints(LocalRunner())
    (tmp_path / "agent").unlink(missing_ok=True)
    with pytest.raises(SecretUnavailable, match="is not there"):
        AgentKey.of(environ)
    with pytest.raises(NixopsError, match="SSH_AUTH_SOCK is not set"):
        AgentKey.of({})
