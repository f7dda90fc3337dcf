"""Registrations for repositories that are no longer trusted: found by their entries, taken away, others left alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nixops.deploy import credentials as creds
from nixops.deploy.journal import Journal
from nixops.deploy.retire import Retired, find_retired, retire
from nixops.errors import UsageError
from nixops.forge.forgejo import Forgejo
from nixops.inventory.derived import host_secrets
from nixops.inventory.model import ManagedRunner, Scope
from nixops.lab.forgejo_server import ForgejoServer
from nixops.lab.openbao import BaoServer
from nixops.secret import Redactor, Secret
from nixops.transport.command import Command, LineSink, Result
from nixops.transport.local import LocalRunner
from nixops.values import HostName, RepoName, RunnerName, VaultPath
from nixops.vault.openbao import OpenBao
from nixops.vault.settings import BaoSettings, TokenLogin

HOST, NAME = HostName("nix-cache02"), RunnerName("actions2")
TRUSTED = (RepoName("torjus/nixos-servers"), RepoName("torjus/nixos-exporter"), RepoName("torjus/nixos"))
BASE = "hosts/nix-cache02/forgejo-runner-token-native"


class AsOneself(LocalRunner):
    """This machine in place of the host, without root: the files of these tests are one's own."""

    def run(self, command: Command, on_line: LineSink | None = None) -> Result:
        return super().run(replace(command, root=False), on_line)


def runner(*trusted: str, **changes: Any) -> ManagedRunner:
    values = {
        "name": "nix-cache02-native",
        "module": "forgejo-runner",
        "labels": ["native:host"],
        "trusted": list(trusted or TRUSTED),
        "token": {"path": BASE},
    }
    return ManagedRunner.model_validate({**values, **changes})


class World:
    """A Forgejo, an OpenBao and one client of each."""

    def __init__(self, bao: BaoServer, version: int, directory: Path, token: Secret | None = None) -> None:
        self.server = ForgejoServer(version)
        self.journal = Journal(directory / "journal", host=HOST, runner=NAME)
        # Files that a test's inventory names are looked for on the host, which here is this machine.
        self.directory = directory
        self.notes: list[str] = []
        settings = BaoSettings(
            address=bao.address,
            namespace=None,
            mount="secret",
            ca_file=None,
            timeout=10.0,
            login=TokenLogin(token or bao.root_token),
        )
        self.bao = OpenBao(settings, Redactor())

    def __enter__(self) -> World:
        self.server.__enter__()
        self.server.add_user("torjus")
        for repository in TRUSTED:
            self.server.add_repo(repository)
        self.forge = Forgejo(self.server.url, self.server.add_token("torjus"), redactor=Redactor())
        return self

    def __exit__(self, *_: object) -> None:
        self.forge.close()
        self.bao.close()
        self.server.__exit__(None, None, None)

    def deploy(self, wanted: ManagedRunner, name: RunnerName = NAME) -> None:
        for credential in creds.decide(wanted, self.bao, self.forge.version(), self.forge.list_runners):
            if credential.mint:
                creds.mint(
                    credential,
                    host=HOST,
                    name=name,
                    runner=wanted,
                    forge=self.forge,
                    version=self.forge.version(),
                    bao=self.bao,
                    journal=self.journal,
                )

    def retired(self, wanted: ManagedRunner, *others: ManagedRunner) -> tuple[Retired, ...]:
        return find_retired(
            HOST,
            NAME,
            wanted,
            {secret.kv_path for each in (wanted, *others) for secret in host_secrets(each)},
            bao=self.bao,
            version=self.forge.version(),
            listed=self.forge.list_runners,
            on_note=self.notes.append,
        )

    def scopes(self) -> list[str]:
        return sorted(r.scope for r in self.server.runners)


@pytest.fixture(scope="module")
def openbao() -> Iterator[BaoServer]:
    with BaoServer() as running:
        yield running


@pytest.fixture
def bao(openbao: BaoServer) -> Iterator[BaoServer]:
    yield openbao
    for key in openbao.api("LIST", "secret/metadata/hosts/nix-cache02")["data"]["keys"]:
        openbao.api("DELETE", f"secret/metadata/hosts/nix-cache02/{key}")


@pytest.mark.parametrize("version", [15, 17])
def test_a_repository_taken_from_the_list_loses_its_registration_its_file_and_its_entry(
    bao: BaoServer, version: int, tmp_path: Path
) -> None:
    file = tmp_path / "token"
    with World(bao, version, tmp_path) as world:
        world.deploy(runner(token_file=str(file)))
        assert world.retired(runner(token_file=str(file))) == ()
        # Two stay, so that the file's name keeps the repository's.
        fewer = runner(*TRUSTED[:2], token_file=str(file))
        (found,) = world.retired(fewer)
        assert found.scope == Scope(repository=TRUSTED[2]) and len(found.registrations) == 1 and not found.stays
        assert world.scopes() == sorted(TRUSTED), "looking changed something"
        left = tmp_path / "token-torjus-nixos"
        left.write_text("the token")
        assert "was deleted" in retire(found, world.forge, world.bao, AsOneself())
        assert world.scopes() == sorted(TRUSTED[:2]) and not left.exists()
        assert world.bao.read(found.path) is None and world.retired(fewer) == ()
        world.deploy(runner())
        assert world.scopes() == sorted(TRUSTED), "trusted again, it is registered again"


def test_before_15_the_entry_goes_and_the_registration_is_named(bao: BaoServer, tmp_path: Path) -> None:
    with World(bao, 9, tmp_path) as world:
        world.deploy(runner())
        (found,) = world.retired(runner(*TRUSTED[:2]))
        uuid = next(r.uuid for r in world.server.runners if r.scope == TRUSTED[2])
        assert uuid in found.stays and "cannot delete" in found.stays
        said = retire(found, world.forge, world.bao, AsOneself())
        assert uuid in said and len(world.server.runners) == 3 and world.bao.read(found.path) is None


def test_a_runner_whose_name_or_entry_begins_as_ours_does_is_left_alone(bao: BaoServer, tmp_path: Path) -> None:
    other = runner(token={"path": f"{BASE}-more"})
    with World(bao, 15, tmp_path) as world:
        world.deploy(runner())
        world.deploy(other, RunnerName("actions21"))
        (found,) = world.retired(runner(*TRUSTED[:2]), other)
        retire(found, world.forge, world.bao, AsOneself())
        assert len(world.server.runners) == 5
        assert sum("actions21 " in r.description for r in world.server.runners) == 3
        # And where its inventory is another one, its entries are still not ours.
        assert {r.path for r in world.retired(runner(*TRUSTED[:2]))} == set()


def test_minting_anew_deletes_our_own_left_over_and_no_other_runners_registration(
    bao: BaoServer, tmp_path: Path
) -> None:
    with World(bao, 15, tmp_path) as world:
        world.server.add_runner(Scope(repository=TRUSTED[0]), "nix-cache02-native", "nixops: nix-cache02/actions2 [x]")
        theirs = world.server.add_runner(
            Scope(repository=TRUSTED[0]), "nix-cache02-native", "nixops: nix-cache02/actions21 [y]"
        )
        world.deploy(runner(TRUSTED[0]))
        assert len(world.server.runners) == 2 and theirs.uuid in {r.uuid for r in world.server.runners}


def test_a_repository_that_is_gone_leaves_nothing_to_delete_but_its_entry(bao: BaoServer, tmp_path: Path) -> None:
    with World(bao, 15, tmp_path) as world:
        world.deploy(runner())
        world.server.fault(r".*/torjus/nixos/actions/runners.*", status=404, body=b'{"message":"x"}', times=9)
        (found,) = world.retired(runner(*TRUSTED[:2]))
        assert found.registrations == () and not found.stays and not world.notes


def test_a_repository_that_may_no_longer_be_administered_is_said_and_keeps_its_entry(
    bao: BaoServer, tmp_path: Path
) -> None:
    with World(bao, 15, tmp_path) as world:
        world.deploy(runner())
        world.server.fault(r".*/torjus/nixos/actions/runners.*", status=403, body=b'{"message":"no"}', times=9)
        assert world.retired(runner(*TRUSTED[:2])) == ()
        assert len(world.notes) == 1 and "repository torjus/nixos" in world.notes[0]


def test_a_login_that_may_not_list_is_told_so_and_nothing_is_taken_away(bao: BaoServer, tmp_path: Path) -> None:
    policy = f'path "secret/data/{BASE}*" {{ capabilities = ["read"] }}'
    bao.api("PUT", "sys/policies/acl/no-list", {"policy": policy})
    token = bao.api("POST", "auth/token/create", {"policies": ["no-list"]})["auth"]["client_token"]
    with World(bao, 15, tmp_path) as world:
        world.deploy(runner())
        with World(bao, 15, tmp_path, Secret(token)) as poor:
            assert poor.retired(runner(*TRUSTED[:2])) == () and "no longer trusted is not known" in poor.notes[0]
        bao.api("DELETE", "sys/policies/acl/no-list")


def test_entries_of_opentofu_and_entries_that_nixops_did_not_write_are_not_looked_at(
    bao: BaoServer, tmp_path: Path
) -> None:
    with World(bao, 15, tmp_path) as world:
        world.deploy(runner())
        world.bao.write(VaultPath(f"{BASE}-theirs"), {"token": Secret("kept-by-hand")}, cas=0)
        assert world.retired(runner(token={"path": BASE, "owner": "tofu"})) == ()
        assert world.retired(runner()) == ()


def test_a_registration_does_not_move_to_another_scope(bao: BaoServer, tmp_path: Path) -> None:
    older = {"module": "gitea-actions-runner", "scope": {"user": "torjus"}}
    with World(bao, 15, tmp_path) as world:
        world.deploy(runner(**older))
        with pytest.raises(UsageError, match="registration for user torjus, and the inventory says repository"):
            world.deploy(runner(TRUSTED[0], **{**older, "scope": {"repository": TRUSTED[0]}}))


def test_a_key_of_the_token_that_nixops_writes_itself_is_refused(bao: BaoServer, tmp_path: Path) -> None:
    with World(bao, 15, tmp_path) as world:
        world.bao.write(VaultPath(BASE), {"token": Secret("kept-by-hand")}, cas=0)
        with pytest.raises(UsageError, match=r"token\.key"):
            world.deploy(runner(token={"path": BASE, "key": "uuid"}))
