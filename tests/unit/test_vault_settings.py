"""Where OpenBao's address, namespace, authority and login come from, and which of several wins."""

from __future__ import annotations

from pathlib import Path

import pytest

from nixops.errors import ExitCode, SecretUnavailable, UsageError
from nixops.inventory.model import SecretRef, Vault
from nixops.secret import Secret
from nixops.vault.settings import AppRoleLogin, BaoSettings, TokenLogin, settings_from

ADDRESS = {"BAO_ADDR": "https://bao.example.org:8200"}


def resolve(ref: SecretRef) -> Secret:
    return Secret(f"resolved-{ref.env}")


def settings(vault: Vault, environ: dict[str, str], base: Path = Path("/nowhere")) -> BaoSettings:
    return settings_from(vault, environ, resolve, base)


def token(found: BaoSettings) -> str:
    assert isinstance(found.login, TokenLogin)
    return found.login.token.reveal()


@pytest.mark.parametrize(
    ("inventory", "environ", "expected"),
    [
        (
            "https://i.example",
            {"BAO_ADDR": "https://b.example", "VAULT_ADDR": "https://v.example"},
            "https://i.example",
        ),
        (None, {"BAO_ADDR": "https://b.example", "VAULT_ADDR": "https://v.example"}, "https://b.example"),
        (None, {"BAO_ADDR": "", "VAULT_ADDR": "https://v.example/"}, "https://v.example"),
    ],
)
def test_the_address_comes_from_the_inventory_then_bao_then_vault(
    inventory: str | None, environ: dict[str, str], expected: str
) -> None:
    assert settings(Vault(address=inventory), {**environ, "BAO_TOKEN": "s.token1"}).address == expected


def test_namespace_and_authority_follow_the_same_order(tmp_path: Path) -> None:
    for name in ("inventory.pem", "bao.pem", "vault.pem"):
        (tmp_path / name).write_text("x")
    environ = {
        **ADDRESS,
        "BAO_TOKEN": "s.token1",
        "BAO_NAMESPACE": "b/team/",
        "VAULT_NAMESPACE": "v",
        "BAO_CACERT": str(tmp_path / "bao.pem"),
        "VAULT_CACERT": str(tmp_path / "vault.pem"),
    }
    given = settings(Vault(namespace="i", ca_file="inventory.pem"), environ, tmp_path)
    assert (given.namespace, given.ca_file) == ("i", tmp_path / "inventory.pem")
    bao = settings(Vault(), environ)
    assert (bao.namespace, bao.ca_file) == ("b/team", tmp_path / "bao.pem")
    vault = settings(Vault(), {k: v for k, v in environ.items() if k not in ("BAO_NAMESPACE", "BAO_CACERT")})
    assert (vault.namespace, vault.ca_file) == ("v", tmp_path / "vault.pem")


def test_the_login_of_the_inventory_wins_over_every_variable() -> None:
    environ = {**ADDRESS, "BAO_TOKEN": "s.bao", "VAULT_TOKEN": "s.vault"}
    assert token(settings(Vault(token=SecretRef(env="MINE")), environ)) == "resolved-MINE"
    given = Vault.model_validate(
        {"approle": {"role_id": {"env": "ROLE"}, "secret_id": {"env": "SECRET"}, "mount": "ci"}}
    )
    assert settings(given, environ).login == AppRoleLogin(Secret("resolved-ROLE"), Secret("resolved-SECRET"), "ci")


def test_a_bao_login_of_any_kind_wins_over_a_vault_one() -> None:
    environ = {**ADDRESS, "VAULT_TOKEN": "s.vault", "BAO_ROLE_ID": "role", "BAO_SECRET_ID": "secret"}
    assert settings(Vault(), environ).login == AppRoleLogin(Secret("role"), Secret("secret"))
    assert token(settings(Vault(), {**environ, "BAO_TOKEN": "s.bao"})) == "s.bao"
    assert token(settings(Vault(), {**ADDRESS, "VAULT_TOKEN": "s.vault"})) == "s.vault"


def test_a_vault_approle_of_the_environment_is_taken() -> None:
    environ = {**ADDRESS, "VAULT_ROLE_ID": "role", "VAULT_SECRET_ID": "secret"}
    assert settings(Vault(), environ).login == AppRoleLogin(Secret("role"), Secret("secret"))


@pytest.mark.parametrize(("there", "missing"), [("ROLE_ID", "SECRET_ID"), ("SECRET_ID", "ROLE_ID")])
def test_half_an_approle_is_an_error_that_names_the_other_half(there: str, missing: str) -> None:
    with pytest.raises(UsageError) as caught:
        settings(Vault(), {**ADDRESS, f"BAO_{there}": "half-of-it", "VAULT_TOKEN": "s.vault"})
    assert f"BAO_{missing}" in str(caught.value)
    assert "half-of-it" not in str(caught.value)


def test_the_token_file_of_bao_login_is_the_last_resort(tmp_path: Path) -> None:
    file = tmp_path / ".vault-token"
    file.write_text("s.fromfile\n")
    file.chmod(0o600)
    environ = {**ADDRESS, "HOME": str(tmp_path)}
    assert token(settings(Vault(), environ)) == "s.fromfile"
    assert token(settings(Vault(), {**environ, "VAULT_TOKEN": "s.vault"})) == "s.vault"


def test_a_token_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    file = tmp_path / ".vault-token"
    file.write_text("s.fromfile\n")
    file.chmod(0o644)
    with pytest.raises(SecretUnavailable, match="chmod 600") as caught:
        settings(Vault(), {**ADDRESS, "HOME": str(tmp_path)})
    assert "s.fromfile" not in str(caught.value)


def test_a_missing_address_names_the_ways_to_give_it() -> None:
    with pytest.raises(UsageError) as caught:
        settings(Vault(), {"BAO_TOKEN": "s.token1"})
    assert caught.value.exit_code is ExitCode.USAGE
    for way in ("vault.address", "BAO_ADDR", "VAULT_ADDR"):
        assert way in str(caught.value)


def test_a_missing_login_names_the_ways_to_give_it(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        settings(Vault(), {**ADDRESS, "HOME": str(tmp_path)})
    assert caught.value.exit_code is ExitCode.USAGE
    for way in ("vault.token", "vault.approle", "BAO_TOKEN", "BAO_ROLE_ID", "VAULT_TOKEN", "~/.vault-token"):
        assert way in str(caught.value)


@pytest.mark.parametrize(
    ("variable", "value"),
    [("BAO_ADDR", "bao.example.org:8200"), ("BAO_NAMESPACE", "a b"), ("BAO_CACERT", "/nowhere/ca.pem")],
)
def test_a_malformed_variable_is_a_usage_error_that_names_it(variable: str, value: str) -> None:
    with pytest.raises(UsageError) as caught:
        settings(Vault(), {**ADDRESS, "BAO_TOKEN": "s.token1", variable: value})
    assert variable in str(caught.value)
    assert value in str(caught.value)


@pytest.mark.parametrize("value", ["two words-secret", "line\nsecret", "   ", 'quote"secret'])
def test_a_token_that_cannot_be_one_is_refused_without_being_shown(value: str) -> None:
    with pytest.raises(UsageError) as caught:
        TokenLogin(Secret(value))
    assert "secret" not in str(caught.value)


def test_white_space_around_a_token_is_dropped() -> None:
    assert TokenLogin(Secret(" s.abcdef\r\n")).token.reveal() == "s.abcdef"


def test_settings_do_not_show_their_login() -> None:
    found = settings(Vault(), {**ADDRESS, "BAO_ROLE_ID": "role-value", "BAO_SECRET_ID": "secret-value"})
    assert "role-value" not in repr(found)
    assert "secret-value" not in repr(found)


@pytest.mark.parametrize(
    "login",
    [
        {"token": {"openbao": {"path": "a/b", "key": "token"}}},
        {"approle": {"role_id": {"env": "ROLE"}, "secret_id": {"openbao": {"path": "a/b", "key": "token"}}}},
    ],
)
def test_a_login_that_is_kept_in_openbao_itself_is_refused(login: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="which it opens"):
        settings(Vault.model_validate(login), ADDRESS)
