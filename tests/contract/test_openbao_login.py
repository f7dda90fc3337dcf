"""Logging in to the real OpenBao server: tokens, AppRole, namespaces, TLS; and every refusal."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nixops.errors import VaultError
from nixops.inventory.model import Vault
from nixops.lab.openbao import BaoServer
from nixops.secret import Redactor, Secret
from nixops.values import VaultPath
from nixops.vault.openbao import OpenBao
from nixops.vault.settings import AppRoleLogin, BaoSettings, TokenLogin, settings_from

PATH = VaultPath("hosts/login/token")
POLICY = 'path "secret/data/hosts/*" { capabilities = ["create", "update", "read"] }'


@pytest.fixture(scope="module")
def server() -> Iterator[BaoServer]:
    with BaoServer() as running:
        running.api("POST", "sys/policies/acl/deployer", {"policy": POLICY})
        yield running


def token(server: BaoServer, *policies: str, namespace: str | None = None) -> Secret:
    body = {"policies": list(policies), "ttl": "10m"}
    return Secret(server.api("POST", "auth/token/create", body, namespace=namespace)["auth"]["client_token"])


def approle(server: BaoServer, *, mount: str = "approle", namespace: str | None = None, ttl: int = 600) -> AppRoleLogin:
    role = f"auth/{mount}/role/deployer"
    server.api("POST", role, {"token_policies": ["deployer"], "token_ttl": ttl}, namespace=namespace)
    role_id = server.api("GET", f"{role}/role-id", namespace=namespace)["data"]["role_id"]
    secret_id = server.api("POST", f"{role}/secret-id", namespace=namespace)["data"]["secret_id"]
    return AppRoleLogin(Secret(role_id), Secret(secret_id), mount)


def use(settings: BaoSettings, redactor: Redactor | None = None) -> None:
    """Check, write and read: what a deploy does."""
    with OpenBao(settings, redactor or Redactor()) as bao:
        bao.check()
        written = bao.write(PATH, {"token": Secret("some-value")}, cas=bao.version(PATH))
        entry = bao.read(PATH)
        assert entry is not None
        assert entry.version == written


def test_a_token_with_just_the_policy_it_needs_is_enough(server: BaoServer) -> None:
    use(BaoSettings(server.address, TokenLogin(token(server, "deployer"))))


def test_an_approle_login_is_enough_and_its_token_is_known_to_the_redactor(server: BaoServer) -> None:
    redactor = Redactor()
    login = approle(server)
    settings = BaoSettings(server.address, login)
    use(settings, redactor)
    assert redactor.clean(login.secret_id.reveal()) == "***"
    with OpenBao(settings, redactor) as bao:
        bao.check()
        assert redactor.clean(bao.client._hvac.token) == "***"


def test_an_approle_at_another_mount_works(server: BaoServer) -> None:
    server.api("POST", "sys/auth/ci-roles", {"type": "approle"})
    use(BaoSettings(server.address, approle(server, mount="ci-roles")))


def test_the_token_of_an_approle_login_is_revoked_at_the_end(server: BaoServer) -> None:
    with OpenBao(BaoSettings(server.address, approle(server)), Redactor()) as bao:
        bao.check()
        used = Secret(bao.client._hvac.token)
        assert server.api("GET", "auth/token/lookup-self", token=used)
    with pytest.raises(Exception, match="HTTP 403"):
        server.api("GET", "auth/token/lookup-self", token=used)


def test_a_login_that_ends_during_a_long_deploy_is_renewed_by_logging_in_again(server: BaoServer) -> None:
    """A build can take longer than a token lives."""
    with OpenBao(BaoSettings(server.address, approle(server, ttl=1)), Redactor()) as bao:
        bao.check()
        first = bao.client._hvac.token
        time.sleep(1.3)
        bao.version(PATH)
        assert bao.client._hvac.token != first


def test_a_refused_approle_login_says_so_and_what_to_do(server: BaoServer) -> None:
    login = approle(server)
    bad = AppRoleLogin(login.role_id, Secret("00000000-aaaa-bbbb-cccc-000000000000"))
    with pytest.raises(VaultError, match="invalid role or secret ID") as caught:
        OpenBao(BaoSettings(server.address, bad), Redactor()).check()
    assert "issue a new secret id" in (caught.value.hint or "")
    assert bad.secret_id.reveal() not in str(caught.value)


def test_an_approle_mount_that_is_not_there_is_named(server: BaoServer) -> None:
    login = AppRoleLogin(Secret("role-value"), Secret("secret-value"), "nope")
    with pytest.raises(VaultError, match="no AppRole auth method at nope/") as caught:
        OpenBao(BaoSettings(server.address, login), Redactor()).check()
    assert "bao auth enable -path=nope approle" in (caught.value.hint or "")


def test_a_denied_path_names_the_stanza_that_is_needed(server: BaoServer) -> None:
    server.api(
        "POST", "sys/policies/acl/reader", {"policy": 'path "secret/data/hosts/mine" { capabilities = ["read"] }'}
    )
    bao = OpenBao(BaoSettings(server.address, TokenLogin(token(server, "reader"))), Redactor())
    with pytest.raises(VaultError, match="denied permission to read secret/data/hosts/login/token") as caught:
        bao.read(PATH)
    assert 'path "secret/data/hosts/login/token" { capabilities = ["read"] }' in (caught.value.hint or "")
    with pytest.raises(VaultError, match="denied permission to write secret/data/hosts/mine") as caught:
        bao.write(VaultPath("hosts/mine"), {"token": Secret("some-value")}, cas=0)
    assert 'capabilities = ["create", "update"]' in (caught.value.hint or "")
    with pytest.raises(VaultError, match="denied permission to destroy secret/destroy/hosts/mine"):
        bao.destroy(VaultPath("hosts/mine"), (1,))


def test_the_stanza_that_an_error_names_is_the_one_that_helps(server: BaoServer) -> None:
    """The policy is taken out of the error, word by word, and then the same request works."""
    server.api("POST", "sys/policies/acl/growing", {"policy": 'path "secret/data/other" { capabilities = ["read"] }'})
    bao = OpenBao(BaoSettings(server.address, TokenLogin(token(server, "growing"))), Redactor())
    path = VaultPath("hosts/growing/token")
    with pytest.raises(VaultError) as caught:
        bao.write(path, {"token": Secret("some-value")}, cas=0)
    stanza = (caught.value.hint or "").split("lacks: ")[1]
    server.api("POST", "sys/policies/acl/growing", {"policy": stanza})
    assert bao.write(path, {"token": Secret("some-value")}, cas=0) == 1


@pytest.mark.parametrize("login", [TokenLogin(Secret("s.wrongwrongwrongwrongwrong"))])
def test_a_wrong_token_is_denied_without_being_shown(server: BaoServer, login: TokenLogin) -> None:
    bao = OpenBao(BaoSettings(server.address, login), Redactor())
    asks: tuple[Callable[[], object], ...] = (bao.check, lambda: bao.read(PATH))
    for ask in asks:
        with pytest.raises(VaultError, match="denied permission") as caught:
            ask()
        assert "the token is wrong or has ended" in (caught.value.hint or "")
        assert login.token.reveal() not in str(caught.value)


def test_a_real_namespace_keeps_its_entries_apart(server: BaoServer) -> None:
    server.namespace("team")
    server.api("POST", "sys/policies/acl/deployer", {"policy": POLICY}, namespace="team")
    inside = BaoSettings(server.address, approle(server, namespace="team"), namespace="team")
    path = VaultPath("hosts/apart/token")
    with OpenBao(inside, Redactor()) as bao:
        bao.check()
        assert bao.write(path, {"token": Secret("of-the-team")}, cas=0) == 1
    with OpenBao(BaoSettings(server.address, TokenLogin(server.root_token)), Redactor()) as outside:
        assert outside.read(path) is None


def test_a_namespace_that_is_not_there_is_told(server: BaoServer) -> None:
    settings = BaoSettings(server.address, TokenLogin(server.root_token), namespace="nope")
    bao = OpenBao(settings, Redactor())
    asks: tuple[Callable[[], object], ...] = (bao.check, lambda: bao.read(PATH))
    for ask in asks:
        with pytest.raises(VaultError, match="namespace nope, does not have this namespace"):
            ask()


def test_an_approle_login_in_a_namespace_that_is_not_there_is_told(server: BaoServer) -> None:
    settings = BaoSettings(server.address, approle(server), namespace="nope")
    with pytest.raises(VaultError, match="does not have this namespace"):
        OpenBao(settings, Redactor()).check()


def test_a_rate_limit_is_told_as_one(server: BaoServer) -> None:
    server.api("POST", "sys/mounts/slow", {"type": "kv", "options": {"version": "2"}})
    server.api("POST", "sys/quotas/rate-limit/slow", {"path": "slow/", "rate": 1})
    bao = OpenBao(BaoSettings(server.address, TokenLogin(server.root_token), mount="slow"), Redactor())
    with pytest.raises(VaultError, match=r"rate limit \(HTTP 429\)") as caught:
        for _ in range(10):
            bao.read(PATH)
    assert "wait" in (caught.value.hint or "")


def test_https_works_with_the_authority_of_the_settings() -> None:
    with BaoServer(tls=True) as server:
        assert server.address.startswith("https://")
        use(BaoSettings(server.address, TokenLogin(server.root_token), ca_file=server.ca_file))
        with pytest.raises(VaultError, match="not trusted") as caught:
            OpenBao(BaoSettings(server.address, TokenLogin(server.root_token)), Redactor()).check()
        assert "vault.ca_file" in (caught.value.hint or "")
        plain = server.address.replace("https", "http")
        with pytest.raises(VaultError, match="not its JSON"):
            OpenBao(BaoSettings(plain, TokenLogin(server.root_token)), Redactor()).check()


def test_an_authority_file_that_holds_no_certificate_is_told(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("no certificate")
    with BaoServer(tls=True) as server:
        settings = BaoSettings(server.address, TokenLogin(server.root_token), ca_file=tmp_path / "ca.pem")
        with pytest.raises(VaultError, match=r"not trusted: .*no certificate"):
            OpenBao(settings, Redactor()).check()


def test_the_settings_decide_and_not_what_hvac_would_read_itself(
    server: BaoServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """hvac takes VAULT_* and ~/.vault-token, requests ~/.netrc and its own authorities: none gets in the way."""
    monkeypatch.setenv("VAULT_ADDR", "http://127.0.0.1:1")
    monkeypatch.setenv("VAULT_TOKEN", "s.notthisone")
    monkeypatch.setenv("VAULT_NAMESPACE", "nope")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".vault-token").write_text("s.notthisone")
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login x password y\n")
    (tmp_path / ".netrc").chmod(0o600)
    given = Vault(address=server.address)
    environ = {**os.environ, "BAO_TOKEN": token(server, "deployer").reveal(), "VAULT_NAMESPACE": ""}
    use(settings_from(given, environ, lambda _: Secret(""), tmp_path))


def test_a_server_that_is_not_there_is_told_with_its_address(server: BaoServer) -> None:
    for address, reason in (
        ("http://127.0.0.1:1", "Connection refused"),
        ("http://bao.invalid:8200", "known"),
    ):
        with pytest.raises(VaultError, match=reason) as caught:
            OpenBao(BaoSettings(address, TokenLogin(server.root_token)), Redactor()).check()
        assert address in caught.value.message


def test_the_root_token_is_on_no_command_line_and_in_no_environment(server: BaoServer) -> None:
    """What the leak tests look for must not come from the lab's own server."""
    secret = server.root_token.reveal().encode()
    for name in ("cmdline", "environ"):
        assert secret not in Path(f"/proc/{server.pid}/{name}").read_bytes()
    assert json.dumps(server.api("GET", "auth/token/lookup-self")["data"]["policies"]) == '["root"]'
