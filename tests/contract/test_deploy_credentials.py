"""Credentials against the real OpenBao and the stateful Forgejo: decided without a trace, minted once, taken back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nixops.deploy import credentials as creds
from nixops.deploy.journal import Journal
from nixops.deploy.undo import Clients, undo
from nixops.errors import UsageError, VaultError
from nixops.forge.forgejo import Forgejo
from nixops.inventory.model import ManagedRunner
from nixops.lab.forgejo_server import ForgejoServer
from nixops.lab.openbao import BaoServer
from nixops.secret import Redactor, Secret
from nixops.transport.local import LocalRunner
from nixops.values import HostName, RepoName, RunnerName
from nixops.vault.approle import HostRoles
from nixops.vault.openbao import OpenBao
from nixops.vault.settings import BaoSettings, TokenLogin

HOST, NAME = HostName("nix-cache02"), RunnerName("actions2")
TRUSTED = ("torjus/nixos-servers", "torjus/nixos-exporter", "torjus/nixos")


def runner(**changes: Any) -> ManagedRunner:
    values: dict[str, Any] = {
        "name": "nix-cache02-native",
        "labels": ["native:host"],
        "scope": {"user": "torjus"},
        "trusted": list(TRUSTED),
        "token": {"path": "hosts/nix-cache02/forgejo-runner-token-native"},
    }
    values.update(changes)
    return ManagedRunner.model_validate({k: v for k, v in values.items() if v is not None})


@pytest.fixture(scope="module")
def server() -> Iterator[BaoServer]:
    with BaoServer() as running:
        yield running


@pytest.fixture
def bao(server: BaoServer, request: pytest.FixtureRequest) -> Iterator[OpenBao]:
    # A namespace for each test keeps their entries apart.
    redactor = Redactor()
    settings = BaoSettings(
        address=server.address,
        namespace=None,
        mount="secret",
        ca_file=None,
        timeout=10.0,
        login=TokenLogin(server.root_token),
    )
    with OpenBao(settings, redactor) as client:
        yield client
        for entry in ("", *(f"-{r.replace('/', '-')}" for r in TRUSTED)):
            server.api("DELETE", f"secret/metadata/hosts/nix-cache02/forgejo-runner-token-native{entry}")


class World:
    """One Forgejo of a version, with the seed's account and repositories."""

    def __init__(self, version: int, bao: OpenBao, directory: Path) -> None:
        self.server = ForgejoServer(version=version)
        self.bao = bao
        self.directory = directory

    def __enter__(self) -> World:
        self.server.__enter__()
        self.server.add_user("torjus")
        for repo in (*TRUSTED, "torjus/dotfiles"):
            self.server.add_repo(repo)
        self.forge = Forgejo(self.server.url, self.server.add_token("torjus"), redactor=Redactor())
        return self

    def __exit__(self, *_: object) -> None:
        self.forge.close()
        self.server.__exit__(None, None, None)

    def decide(self, wanted: ManagedRunner) -> tuple[creds.Credential, ...]:
        return creds.decide(wanted, self.bao, self.forge.version(), self.forge.list_runners)

    def mint_all(self, wanted: ManagedRunner) -> Journal:
        journal = Journal(self.directory, host=HOST, runner=NAME)
        for credential in self.decide(wanted):
            if credential.mint:
                creds.mint(
                    credential,
                    host=HOST,
                    name=NAME,
                    runner=wanted,
                    forge=self.forge,
                    version=self.forge.version(),
                    bao=self.bao,
                    journal=journal,
                )
        return journal

    def clients(self) -> Clients:
        def none() -> Any:
            raise AssertionError("this undo needs no host")

        return Clients(lambda: self.forge, lambda: self.bao, lambda: HostRoles(self.bao), none, LocalRunner())


@pytest.mark.parametrize("version", [7, 11, 15, 17])
def test_a_plan_asks_for_no_token_and_leaves_no_trace(version: int, bao: OpenBao, tmp_path: Path) -> None:
    with World(version, bao, tmp_path) as world:
        found = world.decide(runner())
        assert [c.mint for c in found] == [True] and found[0].planned_version == 1
        assert not any("registration-token" in r.path or r.method != "GET" for r in world.server.requests)


@pytest.mark.parametrize("version", [7, 11, 15, 17])
def test_the_older_module_gets_one_registration_token_and_a_second_run_none(
    version: int, bao: OpenBao, tmp_path: Path
) -> None:
    with World(version, bao, tmp_path) as world:
        world.mint_all(runner())
        world.server.forget_requests()
        again = world.decide(runner())
        assert [c.mint for c in again] == [False] and again[0].version == 1
        assert not any("registration-token" in r.path for r in world.server.requests)


@pytest.mark.parametrize("version", [9, 15, 17])
def test_the_newer_module_gets_exactly_the_trusted_repositories_one_registration_each(
    version: int, bao: OpenBao, tmp_path: Path
) -> None:
    wanted = runner(module="forgejo-runner", scope=None)
    with World(version, bao, tmp_path) as world:
        world.mint_all(wanted)
        again = world.decide(wanted)
        assert {c.repo for c in again} == set(TRUSTED) and not any(c.mint for c in again)
        assert len({c.uuid for c in again}) == 3 and creds.UNKNOWN_UUID not in {c.uuid for c in again}
        assert len(world.server.runners) == 3


def test_a_registration_deleted_in_the_web_interface_is_made_again_and_only_that_one(
    bao: OpenBao, tmp_path: Path
) -> None:
    wanted = runner(module="forgejo-runner", scope=None)
    with World(15, bao, tmp_path) as world:
        world.mint_all(wanted)
        lost = world.server.runners[0]
        world.server.delete_runner(lost.id)
        again = world.decide(wanted)
        assert [c.mint for c in again].count(True) == 1
        assert next(c for c in again if c.mint).why.startswith("its registration")


def test_what_was_made_is_taken_back_in_forgejo_and_in_openbao(bao: OpenBao, tmp_path: Path) -> None:
    wanted = runner(module="forgejo-runner", scope=None)
    with World(15, bao, tmp_path) as world:
        journal = world.mint_all(wanted)
        done = undo(journal.effects, world.clients())
        assert not [d for d in done if d.problem] and len(done) == 6
        assert len(world.server.runners) == 0
        assert all(c.mint for c in world.decide(wanted))


def test_undoing_a_second_version_gives_back_what_the_first_one_held(bao: OpenBao, tmp_path: Path) -> None:
    wanted = runner()
    bao.write(wanted.token.path, {"other": Secret("kept-by-hand")}, cas=0)
    with World(15, bao, tmp_path) as world:
        journal = world.mint_all(wanted)
        both = bao.read(wanted.token.path)
        assert both is not None and set(both.data) == {"other", "token", "scope"}
        undo(journal.effects, world.clients())
        after = bao.read(wanted.token.path)
        assert after is not None and {k: v.reveal() for k, v in after.data.items()} == {"other": "kept-by-hand"}


def test_a_write_by_somebody_else_since_the_plan_is_not_lost(bao: OpenBao, tmp_path: Path) -> None:
    wanted = runner()
    with World(15, bao, tmp_path) as world:
        planned = world.decide(wanted)[0]
        bao.write(wanted.token.path, {"token": Secret("theirs-not-ours")}, cas=0)
        with pytest.raises(VaultError, match="version"):
            creds.mint(
                planned,
                host=HOST,
                name=NAME,
                runner=wanted,
                forge=world.forge,
                version=world.forge.version(),
                bao=bao,
                journal=Journal(tmp_path, host=HOST, runner=NAME),
            )
        entry = bao.read(wanted.token.path)
        assert entry is not None and entry.data["token"].reveal() == "theirs-not-ours"


def test_no_credential_stands_in_the_journal(bao: OpenBao, tmp_path: Path) -> None:
    wanted = runner(module="forgejo-runner", scope=None)
    with World(15, bao, tmp_path) as world:
        text = world.mint_all(wanted).file.read_text()
        tokens = list(world.server.issued)
        assert len(tokens) >= 4 and not [t for t in tokens if t in text]


@pytest.mark.parametrize("token", ["two\nlines-of-it", "with blanks in it", "x" * 700_000])
def test_an_entry_that_holds_no_token_is_told_before_anything_is_deployed(
    bao: OpenBao, tmp_path: Path, token: str
) -> None:
    wanted = runner()
    bao.write(wanted.token.path, {"token": Secret(token)}, cas=0)
    with World(15, bao, tmp_path) as world, pytest.raises(VaultError, match="is no token") as caught:
        world.decide(wanted)
    assert token not in str(caught.value)


def test_an_entry_that_tofu_owns_is_never_written(bao: OpenBao, tmp_path: Path) -> None:
    wanted = runner(token={"path": "hosts/nix-cache02/forgejo-runner-token-native", "owner": "tofu"})
    with World(15, bao, tmp_path) as world, pytest.raises(UsageError, match="OpenTofu owns"):
        world.decide(wanted)


def test_a_wider_scope_is_told_by_name(bao: OpenBao, tmp_path: Path) -> None:
    with World(15, bao, tmp_path) as world:
        assert creds.wider_than_trusted(runner(), world.forge) == (RepoName("torjus/dotfiles"),)


def test_a_trusted_repository_outside_the_scope_is_an_error(bao: OpenBao, tmp_path: Path) -> None:
    with World(15, bao, tmp_path) as world, pytest.raises(UsageError, match="does not admit"):
        creds.wider_than_trusted(runner(trusted=["torjus/nixos", "torjus/absent"]), world.forge)
