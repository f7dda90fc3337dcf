"""Each host's AppRole and policy on the real OpenBao server."""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from nixops.errors import HostFault, UsageError, VaultError
from nixops.lab.openbao import BaoServer
from nixops.secret import Redactor, Secret
from nixops.values import HostName, VaultPath
from nixops.vault.approle import HostRoles, RoleUndo
from nixops.vault.openbao import OpenBao
from nixops.vault.settings import AppRoleLogin, BaoSettings, TokenLogin


@pytest.fixture(scope="module")
def server() -> Iterator[BaoServer]:
    with BaoServer() as running:
        yield running


@pytest.fixture
def bao(server: BaoServer) -> Iterator[OpenBao]:
    with OpenBao(BaoSettings(server.address, TokenLogin(server.root_token)), Redactor()) as opened:
        yield opened


@pytest.fixture
def roles(bao: OpenBao) -> HostRoles:
    return HostRoles(bao)


@pytest.fixture
def host(request: pytest.FixtureRequest) -> HostName:
    return HostName(f"h{zlib.crc32(request.node.name.encode())}")


def role(server: BaoServer, host: HostName) -> dict[str, Any]:
    found: dict[str, Any] = server.api("GET", f"auth/approle/role/host-{host}")["data"]
    return found


def policy(server: BaoServer, host: HostName) -> str:
    return str(server.api("GET", f"sys/policies/acl/host-{host}")["data"]["policy"])


def gone(server: BaoServer, path: str) -> bool:
    try:
        server.api("GET", path)
    except HostFault as error:
        return "HTTP 404" in error.message
    return False


def secret_id(server: BaoServer, host: HostName, **body: object) -> dict[str, str]:
    """As somebody else would issue it: not wrapped."""
    made: dict[str, str] = server.api("POST", f"auth/approle/role/host-{host}/secret-id", body)["data"]
    return made


def test_the_policy_is_read_on_the_hosts_own_entries_and_nothing_else(roles: HostRoles) -> None:
    assert roles.policy_text(HostName("nix-cache02")) == (
        "# Made by nixops: what the host nix-cache02 may read.\n"
        'path "secret/data/hosts/nix-cache02/*" {\n'
        '  capabilities = ["read"]\n'
        "}\n"
    )
    assert roles.covers(HostName("nix-cache02"), VaultPath("hosts/nix-cache02/token"))
    assert not roles.covers(HostName("nix-cache02"), VaultPath("hosts/nix-cache021/token"))
    assert not roles.covers(HostName("nix-cache02"), VaultPath("shared/token"))


def test_ensure_makes_the_policy_and_the_role_as_they_should_be(
    roles: HostRoles, server: BaoServer, host: HostName
) -> None:
    state = roles.ensure(host)
    assert state.changed
    assert (state.role_name, state.policy_name) == (f"host-{host}", f"host-{host}")
    assert policy(server, host) == roles.policy_text(host)
    found = role(server, host)
    expected = {
        "bind_secret_id": True,
        "secret_id_num_uses": 0,
        "secret_id_ttl": 0,
        "secret_id_bound_cidrs": None,
        "token_bound_cidrs": [],
        "token_policies": [f"host-{host}"],
        "token_no_default_policy": True,
        "token_num_uses": 0,
        "token_ttl": 1200,
        "token_max_ttl": 3600,
    }
    assert {k: found[k] for k in expected} == expected
    assert state.role_id == server.api("GET", f"auth/approle/role/host-{host}/role-id")["data"]["role_id"]


def test_ensure_a_second_time_changes_nothing(roles: HostRoles, host: HostName) -> None:
    first = roles.ensure(host)
    second = roles.ensure(host)
    assert not second.changed
    assert second.role_id == first.role_id
    assert second.undo == RoleUndo()
    assert roles.plan(host).changes == ()


def test_a_plan_says_what_would_change_and_writes_nothing(roles: HostRoles, server: BaoServer, host: HostName) -> None:
    plan = roles.plan(host)
    assert plan.role_id is None
    assert [c.split(":")[0] for c in plan.changes] == [
        f"create policy host-{host}",
        f"create role host-{host} at auth/approle",
    ]
    assert gone(server, f"auth/approle/role/host-{host}")
    assert gone(server, f"sys/policies/acl/host-{host}")
    state = roles.ensure(host)
    server.api("POST", f"auth/approle/role/host-{host}", {"secret_id_num_uses": 3})
    plan = roles.plan(host)
    assert plan.changes == (f"change role host-{host} at auth/approle: secret_id_num_uses 3 -> 0",)
    assert plan.role_id == state.role_id
    assert role(server, host)["secret_id_num_uses"] == 3


def test_a_plan_is_possible_with_a_token_that_can_only_read(server: BaoServer, host: HostName) -> None:
    server.api(
        "POST",
        "sys/policies/acl/looker",
        {
            "policy": 'path "auth/approle/role/+" { capabilities = ["read"] }\n'
            'path "sys/policies/acl/+" { capabilities = ["read"] }'
        },
    )
    token = server.api("POST", "auth/token/create", {"policies": ["looker"]})["auth"]["client_token"]
    looker = HostRoles(OpenBao(BaoSettings(server.address, TokenLogin(Secret(token))), Redactor()))
    assert len(looker.plan(host).changes) == 2
    with pytest.raises(VaultError, match="denied permission to write sys/policies/acl") as caught:
        looker.ensure(host)
    assert 'capabilities = ["create", "update"]' in (caught.value.hint or "")


def test_a_drifted_policy_of_ours_is_put_right(roles: HostRoles, server: BaoServer, host: HostName) -> None:
    roles.ensure(host)
    wide = roles.policy_text(host).replace("/hosts/", "/")
    server.api("POST", f"sys/policies/acl/host-{host}", {"policy": wide})
    assert roles.plan(host).changes == (f"change policy host-{host}: read on secret/data/hosts/{host}/* only",)
    state = roles.ensure(host)
    assert state.undo == RoleUndo(policy_written=True, policy_before=wide)
    assert policy(server, host) == roles.policy_text(host)


def test_a_policy_that_says_the_same_in_other_words_is_left_as_it_is(
    roles: HostRoles, server: BaoServer, host: HostName
) -> None:
    """Somebody may keep it in OpenTofu, with comments and formatting of their own."""
    text = f'# by OpenTofu\npath "secret/data/hosts/{host}/*"   {{ capabilities = ["read"] }}'
    server.api("POST", f"sys/policies/acl/host-{host}", {"policy": text})
    roles.ensure(host)
    assert policy(server, host) == text


def test_a_policy_or_role_of_somebody_else_is_never_changed(
    roles: HostRoles, server: BaoServer, host: HostName
) -> None:
    theirs = 'path "secret/data/theirs" { capabilities = ["read"] }'
    server.api("POST", f"sys/policies/acl/host-{host}", {"policy": theirs})
    asks: tuple[Callable[[], object], ...] = (lambda: roles.plan(host), lambda: roles.ensure(host))
    for ask in asks:
        with pytest.raises(UsageError, match="not made by nixops") as caught:
            ask()
        assert "vault.role_prefix" in (caught.value.hint or "")
    assert policy(server, host) == theirs
    server.api("DELETE", f"sys/policies/acl/host-{host}")
    server.api("POST", f"auth/approle/role/host-{host}", {"token_policies": ["theirs"]})
    for ask in asks:
        with pytest.raises(UsageError, match="has other policies than its own"):
            ask()
    assert gone(server, f"sys/policies/acl/host-{host}")


def test_restrictions_that_somebody_added_to_the_role_stay(roles: HostRoles, server: BaoServer, host: HostName) -> None:
    roles.ensure(host)
    server.api("POST", f"auth/approle/role/host-{host}", {"token_bound_cidrs": ["10.0.0.0/8"]})
    assert not roles.ensure(host).changed
    assert role(server, host)["token_bound_cidrs"] == ["10.0.0.0/8"]


def test_an_auth_method_that_is_not_enabled_is_an_error_that_says_how(bao: OpenBao, host: HostName) -> None:
    elsewhere = HostRoles(bao, mount="hosts")
    asks: tuple[Callable[[], object], ...] = (lambda: elsewhere.plan(host), lambda: elsewhere.ensure(host))
    for ask in asks:
        with pytest.raises(VaultError, match="no AppRole auth method at hosts/") as caught:
            ask()
        assert "bao auth enable -path=hosts approle" in (caught.value.hint or "")
    assert "hosts/" not in json.dumps(list(bao.client._hvac.sys.list_auth_methods().data))


def test_another_mount_and_prefix_work(bao: OpenBao, server: BaoServer, host: HostName) -> None:
    server.api("POST", "sys/auth/machines", {"type": "approle"})
    state = HostRoles(bao, mount="machines", prefix="nix-").ensure(host)
    assert state.role_name == f"nix-{host}"
    assert server.api("GET", f"auth/machines/role/nix-{host}/role-id")["data"]["role_id"] == state.role_id


def test_what_ensure_made_can_be_undone_from_what_was_written_down(
    roles: HostRoles, server: BaoServer, host: HostName
) -> None:
    state = roles.ensure(host)
    kept = json.loads(json.dumps(dataclasses.asdict(state.undo)))
    roles.undo(host, RoleUndo(**kept))
    assert gone(server, f"auth/approle/role/host-{host}")
    assert gone(server, f"sys/policies/acl/host-{host}")


def test_what_ensure_changed_goes_back_to_what_it_was(roles: HostRoles, server: BaoServer, host: HostName) -> None:
    roles.ensure(host)
    server.api("POST", f"auth/approle/role/host-{host}", {"token_ttl": 60, "secret_id_num_uses": 5})
    state = roles.ensure(host)
    roles.undo(host, RoleUndo(**json.loads(json.dumps(dataclasses.asdict(state.undo)))))
    assert (role(server, host)["token_ttl"], role(server, host)["secret_id_num_uses"]) == (60, 5)
    assert policy(server, host) == roles.policy_text(host)


def test_undo_leaves_what_somebody_changed_since(roles: HostRoles, server: BaoServer, host: HostName) -> None:
    state = roles.ensure(host)
    server.api("POST", f"auth/approle/role/host-{host}", {"token_ttl": 60})
    roles.undo(host, state.undo)
    assert role(server, host)["token_ttl"] == 60


def test_a_role_that_may_not_be_written_leaves_no_policy_behind(server: BaoServer, host: HostName) -> None:
    server.api(
        "POST",
        "sys/policies/acl/half",
        {
            "policy": 'path "auth/approle/role/+" { capabilities = ["read"] }\n'
            'path "sys/policies/acl/+" { capabilities = ["read", "create", "update", "delete"] }'
        },
    )
    token = server.api("POST", "auth/token/create", {"policies": ["half"]})["auth"]["client_token"]
    half = HostRoles(OpenBao(BaoSettings(server.address, TokenLogin(Secret(token))), Redactor()))
    with pytest.raises(VaultError, match="denied permission to write auth/approle/role"):
        half.ensure(host)
    assert gone(server, f"sys/policies/acl/host-{host}")


def test_in_a_namespace_everything_is_made_in_that_namespace(server: BaoServer, host: HostName) -> None:
    server.namespace("team")
    inside = BaoSettings(server.address, TokenLogin(server.root_token), namespace="team")
    state = HostRoles(OpenBao(inside, Redactor())).ensure(host)
    assert gone(server, f"sys/policies/acl/host-{host}")
    found = server.api("GET", f"auth/approle/role/host-{host}/role-id", namespace="team")
    assert found["data"]["role_id"] == state.role_id


# -- secret ids -----------------------------------------------------------------------------------------------


def test_a_wrapped_secret_id_opens_the_hosts_entries_and_no_others(
    roles: HostRoles, bao: OpenBao, server: BaoServer, host: HostName
) -> None:
    state = roles.ensure(host)
    wrapped = roles.wrap_secret_id(host)
    unwrapped = server.api("POST", "sys/wrapping/unwrap", token=wrapped.token)["data"]
    assert unwrapped["secret_id_accessor"] == wrapped.accessor
    bao.write(VaultPath(f"hosts/{host}/token"), {"token": Secret("its-own-value")}, cas=0)
    bao.write(VaultPath(f"hosts/{host}x/token"), {"token": Secret("another-value")}, cas=0)
    login = AppRoleLogin(Secret(state.role_id), Secret(unwrapped["secret_id"]))
    with OpenBao(BaoSettings(server.address, login), Redactor()) as as_host:
        entry = as_host.read(VaultPath(f"hosts/{host}/token"))
        assert entry is not None
        assert entry.data["token"].reveal() == "its-own-value"
        for other in (f"hosts/{host}x/token", "shared/token"):
            with pytest.raises(VaultError, match="denied permission"):
                as_host.read(VaultPath(other))
        with pytest.raises(VaultError, match="denied permission"):
            as_host.write(VaultPath(f"hosts/{host}/token"), {"token": Secret("overwritten")}, cas=1)
        with pytest.raises(HostFault, match="HTTP 403"):
            server.api("GET", "auth/token/lookup-self", token=Secret(as_host.client._hvac.token))


def test_a_wrapping_token_works_once_and_only_for_its_time(roles: HostRoles, server: BaoServer, host: HostName) -> None:
    roles.ensure(host)
    wrapped = roles.wrap_secret_id(host, ttl_seconds=90)
    assert server.api("POST", "sys/wrapping/lookup", {"token": wrapped.token.reveal()})["data"]["creation_ttl"] == 90
    server.api("POST", "sys/wrapping/unwrap", token=wrapped.token)
    with pytest.raises(HostFault, match="wrapping token is not valid"):
        server.api("POST", "sys/wrapping/unwrap", token=wrapped.token)


def test_a_wrapping_token_is_known_to_the_redactor_and_not_shown(
    roles: HostRoles, bao: OpenBao, host: HostName
) -> None:
    roles.ensure(host)
    wrapped = roles.wrap_secret_id(host)
    assert wrapped.token.reveal() not in repr(wrapped)
    assert bao.redactor.clean(wrapped.token.reveal()) == "***"


def test_a_secret_id_says_who_issued_it_for_which_host_and_when(
    roles: HostRoles, server: BaoServer, host: HostName
) -> None:
    roles.ensure(host)
    wrapped = roles.wrap_secret_id(host)
    found = server.api(
        "POST",
        f"auth/approle/role/host-{host}/secret-id-accessor/lookup",
        {"secret_id_accessor": wrapped.accessor},
    )["data"]
    assert (found["metadata"]["issued_by"], found["metadata"]["host"]) == ("nixops", host)
    assert found["metadata"]["issued_at"][:10] == found["creation_time"][:10]
    assert found["secret_id_num_uses"] == 0


def test_older_secret_ids_of_ours_are_destroyed_and_nobody_elses(
    roles: HostRoles, server: BaoServer, host: HostName
) -> None:
    roles.ensure(host)
    theirs = secret_id(server, host)["secret_id_accessor"]
    other_host = secret_id(server, host, metadata='{"issued_by": "nixops", "host": "another"}')["secret_id_accessor"]
    first, second, third = (roles.wrap_secret_id(host).accessor for _ in range(3))
    assert roles.ours(host) == (first, second, third)
    assert roles.destroy_older(host, keep=second) == (first,)
    assert roles.ours(host) == (second, third)
    assert [roles.secret_id_valid(host, a) for a in (theirs, other_host, first)] == [True, True, False]


def test_nothing_is_destroyed_when_the_one_to_keep_is_not_ours(
    roles: HostRoles, server: BaoServer, host: HostName
) -> None:
    roles.ensure(host)
    ours = roles.wrap_secret_id(host).accessor
    theirs = secret_id(server, host)["secret_id_accessor"]
    assert roles.destroy_older(host, keep=theirs) == ()
    assert roles.destroy_older(host, keep="no-such-accessor") == ()
    assert roles.secret_id_valid(host, ours)


def test_destroying_a_secret_id_twice_is_no_error(roles: HostRoles, host: HostName) -> None:
    roles.ensure(host)
    wrapped = roles.wrap_secret_id(host)
    roles.destroy_secret_id(host, wrapped.accessor)
    roles.destroy_secret_id(host, wrapped.accessor)
    assert not roles.secret_id_valid(host, wrapped.accessor)


def test_there_are_no_secret_ids_of_a_role_that_is_not_there(roles: HostRoles, host: HostName) -> None:
    assert roles.ours(host) == ()
    assert not roles.secret_id_valid(host, "no-such-accessor")
