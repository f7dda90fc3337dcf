"""The lab's stand-in for nixpkgs, evaluated by the real Nix; nothing is built and no store is needed."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import hcl2
import pytest
import yaml

from nixops.inventory.model import Inventory, ManagedRunner, RunnerModule
from nixops.lab.userrepo import Imports, LabHostFacts, UserRepo, make_user_repo, nix_string
from nixops.secret import Secret
from nixops.transport.local import LocalRunner
from nixops.values import HostName, RunnerName

STAND_IN = Path(__file__).parents[2] / "nixops" / "lab" / "flake"
SCRIPTS = sorted((STAND_IN / "scripts").glob("*.sh"))
LIB = f"(import {STAND_IN}).lib"

# Options to try the evaluator with.
OPTIONS = """
  ({ lib, ... }: { _file = "options.nix"; options = {
    text = lib.mkOption { type = lib.types.str; default = "default"; };
    maybe = lib.mkOption { type = lib.types.nullOr lib.types.int; default = null; };
    numbers = lib.mkOption { type = lib.types.listOf lib.types.int; default = [ ]; };
    needed = lib.mkOption { type = lib.types.str; };
    on = lib.mkEnableOption "something";
    instances = lib.mkOption {
      default = { };
      type = lib.types.attrsOf (lib.types.submodule ({ name, config, ... }: { options = {
        label = lib.mkOption { type = lib.types.str; default = name; };
        shout = lib.mkOption { type = lib.types.str; default = lib.toUpper config.label; };
      }; }));
    };
    settings = lib.mkOption {
      default = { };
      type = lib.types.submodule {
        freeformType = lib.types.attrsOf lib.types.anything;
        options.known.level = lib.mkOption { type = lib.types.int; default = 1; };
      };
    };
  }; })
"""


def evaluate(expression: str) -> subprocess.CompletedProcess[str]:
    """Evaluate with no store at all, so that nothing outside is asked or written."""
    return subprocess.run(
        ["nix-instantiate", "--eval", "--strict", "--json", "--store", "dummy://", "--expr", expression],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def value(expression: str) -> Any:
    """What ``expression`` evaluates to."""
    done = evaluate(expression)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def error(expression: str) -> str:
    """How the evaluation of ``expression`` fails."""
    done = evaluate(expression)
    assert done.returncode != 0, f"evaluated to {done.stdout}"
    return done.stderr


def modules(*texts: str) -> str:
    """The configuration that the option set above gets from these modules, as an expression."""
    return f"({LIB}.evalModules {{ modules = [ {OPTIONS} {' '.join(texts)} ]; }}).config"


def system(nix: str) -> str:
    """The configuration of a whole system with these settings, as an expression."""
    return f"({LIB}.nixosSystem {{ modules = [ ({{ config, lib, pkgs, ... }}: {{ {nix} }}) ]; }}).config"


# -- the module evaluator ------------------------------------------------------------------------------------------


def test_a_force_beats_a_plain_definition_which_beats_a_default() -> None:
    plain, force, default = (
        '{ text = "plain"; }',
        '({lib,...}: { text = lib.mkForce "force"; })',
        ('({lib,...}: { text = lib.mkDefault "weak"; })'),
    )
    assert value(modules() + ".text") == "default"
    assert value(modules(default) + ".text") == "weak"
    assert value(modules(default, plain) + ".text") == "plain"
    assert value(modules(force, plain, default) + ".text") == "force"


def test_lists_are_concatenated_in_the_order_that_before_and_after_ask_for() -> None:
    ordered = "({lib,...}: { numbers = lib.mkMerge [ (lib.mkAfter [ 9 ]) [ 5 ] (lib.mkBefore [ 1 ]) ]; })"
    assert value(modules(ordered, "{ numbers = [ 6 ]; }") + ".numbers") == [1, 5, 6, 9]


def test_a_condition_may_depend_on_the_configuration_that_it_is_part_of() -> None:
    conditional = '({config,lib,...}: { config = lib.mkIf config.on { text = "on"; instances.a = { }; }; })'
    assert value(modules(conditional) + ".instances") == {}
    assert value(modules(conditional, "{ on = true; }") + ".text") == "on"


def test_a_submodule_knows_its_name_and_merges_definitions_from_several_modules() -> None:
    texts = ('{ instances.a.label = "x"; instances.b = { }; }', '{ instances.b.shout = "!"; }')
    assert value(modules(*texts) + ".instances") == {
        "a": {"label": "x", "shout": "X"},
        "b": {"label": "b", "shout": "!"},
    }


def test_a_freeform_setting_is_merged_deeply_beside_the_declared_ones() -> None:
    texts = ("{ settings = { known.level = 2; a.b = 1; }; }", "{ settings = { known.other = true; a.c = 2; }; }")
    assert value(modules(*texts) + ".settings") == {"a": {"b": 1, "c": 2}, "known": {"level": 2, "other": True}}


def test_conflicting_values_are_an_error_that_names_the_option_and_both_files() -> None:
    text = error(modules('{ _file = "a.nix"; text = "1"; }', '{ _file = "b.nix"; text = "2"; }') + ".text")
    assert "The option `text' has conflicting definition values:" in text
    assert '- In `a.nix\': "1"' in text
    assert '- In `b.nix\': "2"' in text


def test_an_unknown_option_is_refused_with_its_name_and_the_file_that_sets_it() -> None:
    text = error(modules('{ _file = "a.nix"; txet = "typo"; }') + ".text")
    assert "The option `txet' does not exist." in text
    assert '- In `a.nix\': "typo"' in text


def test_a_value_of_the_wrong_type_is_refused_with_the_type_that_is_wanted() -> None:
    text = error(modules('{ _file = "a.nix"; numbers = [ "4" ]; }') + ".numbers")
    assert "is not of type `signed integer'" in text
    assert "a.nix" in text


def test_an_option_without_default_that_nobody_sets_is_an_error_only_when_it_is_used() -> None:
    assert value(modules() + ".on") is False
    assert "The option `needed' is used but not defined." in error(modules() + ".needed")


def test_a_module_that_mixes_config_with_settings_beside_it_is_refused() -> None:
    assert "has an unsupported attribute `text'" in error(modules('{ config = { }; text = "x"; }') + ".text")


def test_a_file_that_two_modules_import_counts_once(tmp_path: Path) -> None:
    (tmp_path / "shared.nix").write_text("{ numbers = [ 1 ]; }", encoding="utf-8")
    (tmp_path / "one.nix").write_text("{ imports = [ ./shared.nix ]; }", encoding="utf-8")
    text = modules(str(tmp_path / "one.nix"), f"{{ imports = [ {tmp_path}/shared.nix ]; }}")
    assert value(text + ".numbers") == [1]


def test_an_import_of_a_file_that_is_not_there_fails_as_in_nix(tmp_path: Path) -> None:
    assert "No such file or directory" in error(modules(f"{{ imports = [ {tmp_path}/none.nix ]; }}") + ".text")


# -- the modules of a system ----------------------------------------------------------------------------------------

RUNNER = """services.gitea-actions-runner.instances.%s = {
  enable = true; name = "n"; url = "http://f"; tokenFile = "/run/secrets/t"; labels = [ "native:host" ];
  hostPackages = [ pkgs.nix pkgs.bash ];
};"""


def test_the_older_runner_module_has_escaped_units_and_one_user_for_all() -> None:
    units = system(RUNNER % "a" + RUNNER % '"b-2"') + ".systemd.services"
    names = value(f"builtins.attrNames ({units})")
    assert "gitea-runner-a" in names
    assert "gitea-runner-b\\x2d2" in names
    service = value(f'({units})."gitea-runner-b\\\\x2d2".serviceConfig')
    assert service["User"] == "gitea-runner"
    assert service["StateDirectory"] == "gitea-runner"
    assert service["WorkingDirectory"] == "-/var/lib/gitea-runner/b-2"
    assert service["EnvironmentFile"] == "/run/secrets/t"
    assert (service["Restart"], service["RestartSec"], service["DynamicUser"]) == ("on-failure", 2, True)


def test_a_unit_of_the_older_module_can_be_overridden_only_by_force() -> None:
    plain = RUNNER % "a" + 'systemd.services.gitea-runner-a.serviceConfig.User = "mine";'
    user = ".systemd.services.gitea-runner-a.serviceConfig.User"
    assert "conflicting definition values" in error(system(plain) + user)
    assert value(system(plain.replace('"mine"', 'lib.mkForce "mine"')) + user) == "mine"


def test_docker_labels_without_a_container_runtime_stop_the_toplevel() -> None:
    docker = (RUNNER % "a").replace("native:host", "x:docker://y")
    path = ".system.build.toplevel.name"
    assert "requires either docker or podman" in error(system(docker) + path)
    assert value(system(docker + "virtualisation.podman.enable = true;") + path) == "nixos-system-nixos-24.11.lab"


CONNECTION = """services.forgejo-runner.instances."n-1" = {
  enable = true;
  settings.runner.labels = [ "native:host" ];
  settings.server.connections.c = { url = "http://f"; uuid = "u"; %s };
  secrets.server.connections.c.token_url = "/run/secrets/t";
};"""


def test_the_newer_runner_module_turns_secrets_into_credentials() -> None:
    config = system(CONNECTION % "token = null;")
    service = value(config + '.systemd.services."forgejo-runner-n\\\\x2d1".serviceConfig')
    assert service["LoadCredential"] == ["server__connections__c__token_url:/run/secrets/t"]
    assert "User" not in service
    assert service["StateDirectory"] == "forgejo-runner/n-1"
    connection = value(config + '.services.forgejo-runner.instances."n-1".settings.server.connections.c')
    assert connection == {
        "url": "http://f",
        "uuid": "u",
        "token": None,
        "token_url": "file:$CREDENTIALS_DIRECTORY/server__connections__c__token_url",
    }


def test_the_newer_runner_module_wants_exactly_one_of_token_and_token_url() -> None:
    name = ".system.build.toplevel.name"
    assert "connections.c.token' is used but not defined" in error(system(CONNECTION % "") + name)
    assert "needs to have exactly one of" in error(system(CONNECTION % 'token = "t";') + name)


def test_a_list_in_a_service_becomes_one_line_each_and_a_null_none() -> None:
    nix = """systemd.services.x = { script = "true"; environment.A = "a b"; environment.B = null; serviceConfig = {
      BindPaths = [ "/a" "/b" ]; ReadOnlyPaths = null; NoNewPrivileges = true; }; };"""
    service = value(system(nix) + ".systemd.services.x")
    assert service["serviceConfig"]["BindPaths"] == ["/a", "/b"]
    text = value(system(nix) + '.systemd.units."x.service".text')
    assert "BindPaths=/a\nBindPaths=/b\n" in text
    assert "NoNewPrivileges=true\n" in text
    assert 'Environment="A=a b"\n' in text
    assert "ReadOnlyPaths" not in text
    assert 'Environment="B' not in text


def test_an_unknown_option_of_a_system_is_refused_at_its_innermost_known_place() -> None:
    text = error(system("services.forgejo-runner.instance.x = { };") + ".system.stateVersion")
    assert "The option `services.forgejo-runner.instance' does not exist." in text


def test_an_unknown_package_is_an_error_that_names_it() -> None:
    text = error(system("environment.systemPackages = [ pkgs.cachix ];") + ".environment.systemPackages")
    assert "cachix" in text


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_the_scripts_of_a_generation_are_posix_shell(script: Path) -> None:
    assert subprocess.run(["sh", "-n", script], check=False).returncode == 0


# -- the checkout ---------------------------------------------------------------------------------------------------


def make(directory: Path, **options: Any) -> UserRepo:
    facts = LabHostFacts(
        HostName("nix-cache02"), "192.0.2.7", "ssh-ed25519 AAAA", directory / "key", sudo_password=Secret("pass-word")
    )
    other = LabHostFacts(HostName("other-1"), "192.0.2.8", "ssh-ed25519 BBBB", directory / "key", runners=False)
    return make_user_repo(
        directory,
        hosts=[facts, other],
        forge_url="http://192.0.2.1:3000",
        bao_address="http://192.0.2.1:8200",
        local=LocalRunner(),
        forge_token=Secret("forge-token-1"),
        bao_token=Secret("bao-token-1"),
        **options,
    )


def evaluate_host(repo: UserRepo, attribute: str, rev: str | None = None) -> subprocess.CompletedProcess[str]:
    """Evaluate an attribute of the checkout as a flake, in a store of its own."""
    reference = f"git+file://{repo.path}" + (f"?rev={rev}" if rev else "")
    return subprocess.run(
        [
            *("nix", "eval", "--extra-experimental-features", "nix-command flakes", "--json"),
            *("--store", f"local?root={repo.path.parent}/store"),
            f"{reference}#nixosConfigurations.{attribute}",
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_checkout_is_a_flake_whose_hosts_have_their_hand_written_runner(tmp_path: Path) -> None:
    repo = make(tmp_path)
    done = evaluate_host(repo, "nix-cache02.config.services.gitea-actions-runner.instances.actions1.tokenFile")
    assert json.loads(done.stdout) == "/run/secrets/forgejo-runner-token", done.stderr
    revision = evaluate_host(repo, "other-1.config.system.configurationRevision")
    assert json.loads(revision.stdout) == repo.base_revision == repo.git("rev-parse", "HEAD")


def test_a_dirty_checkout_has_no_revision(tmp_path: Path) -> None:
    repo = make(tmp_path)
    repo.configure("other-1", 'time.timeZone = "UTC";', commit=False)
    assert json.loads(evaluate_host(repo, "other-1.config.system.configurationRevision").stdout) is None
    repo.configure("other-1", 'time.timeZone = "UTC";')
    assert json.loads(evaluate_host(repo, "other-1.config.system.configurationRevision").stdout)


@pytest.mark.parametrize("imports", list(Imports))
def test_each_way_to_import_what_is_rendered_sees_the_file_once_git_knows_of_it(
    tmp_path: Path, imports: Imports
) -> None:
    repo = make(tmp_path, imports=imports)
    attribute = "nix-cache02.config.time.timeZone"
    assert json.loads(evaluate_host(repo, attribute, repo.base_revision).stdout) is None
    before = evaluate_host(repo, attribute)
    assert (before.returncode == 0) == (imports is not Imports.PLAIN)

    rendered = repo.path / "hosts/nix-cache02/nixops-actions2.nix"
    rendered.write_text('{ ... }: { time.timeZone = "UTC"; }\n', encoding="utf-8")
    assert evaluate_host(repo, attribute).stdout == before.stdout, "a flake sees no untracked file"
    repo.git("add", "--intent-to-add", "--all")
    found = json.loads(evaluate_host(repo, attribute).stdout)
    assert found == (None if imports is Imports.NONE else "UTC")


@pytest.mark.parametrize("module", list(RunnerModule))
def test_the_inventory_of_the_checkout_is_valid_and_holds_no_secret(tmp_path: Path, module: RunnerModule) -> None:
    repo = make(tmp_path, module=module, runner_overrides={"capacity": 2}, overrides={"forge": {"timeout": 5}})
    text = repo.inventory_file.read_text(encoding="utf-8")
    inventory = Inventory.model_validate(yaml.safe_load(text))
    runner = inventory.hosts[HostName("nix-cache02")].runners[RunnerName("actions2")]
    assert isinstance(runner, ManagedRunner)
    assert (runner.module, runner.capacity) == (module, 2)
    assert inventory.forge
    assert inventory.forge.timeout == 5
    for name, secret in {"forge-token": "forge-token-1", "bao-token": "bao-token-1"}.items():
        file = tmp_path / "secrets" / name
        assert secret not in text
        assert file.read_text(encoding="utf-8") == secret + "\n"
        assert file.stat().st_mode & 0o777 == 0o600


def test_the_hand_written_opentofu_files_are_hcl(tmp_path: Path) -> None:
    repo = make(tmp_path)
    with (repo.path / "terraform/vault/variables.tf").open(encoding="utf-8") as file:
        names = [name.strip('"') for entry in hcl2.load(file)["variable"] for name in entry]
    assert names == ["vault_address", "forgejo_runner_token"]
    with (repo.path / "terraform/vault/secrets.tf").open(encoding="utf-8") as file:
        assert "hosts/nix-cache02/forgejo-runner-token" in str(hcl2.load(file)["locals"])


def test_a_url_in_the_checkout_is_a_nix_string_whatever_it_holds() -> None:
    hostile = 'a"b\\c${d}\n$'
    assert value(nix_string(hostile)) == hostile
