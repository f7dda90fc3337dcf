"""What is rendered for a runner: evaluated by Nix, parsed by the HCL and YAML parsers, never compared as text."""

from __future__ import annotations

import copy
import json
from pathlib import Path, PurePosixPath
from typing import Any

import hcl2
import pytest
import yaml

from nixops.errors import InventoryError, NixopsError, TemplateError, UsageError
from nixops.inventory.derived import connections, filled_path, host_secrets, secret_unit
from nixops.inventory.model import Inventory, ManagedRunner
from nixops.render.context import RunnerFacts
from nixops.render.expected import expected_values
from nixops.render.literal import Language
from nixops.render.parse import parse_check
from nixops.render.runner import RenderedFile, render_runner
from nixops.transport.local import LocalRunner
from nixops.values import HostName, RunnerName
from tests.unit.render_inventory import (
    ACTIONS2,
    HOST,
    HOSTILE,
    SEED,
    TRUSTED,
    evaluated,
    facts,
    forgejo,
    inventory,
)

TOKEN_PATH = "hosts/nix-cache02/forgejo-runner-token-native"
UNIT = "gitea-runner-actions2"


def rendered(document: Inventory, runner: RunnerName = ACTIONS2, known: RunnerFacts | None = None) -> dict[str, str]:
    files = render_runner(document, HOST, runner, known or facts())
    return {str(f.path): f.text for f in files if f.text is not None}


def module(document: Inventory, runner: RunnerName = ACTIONS2, known: RunnerFacts | None = None) -> Any:
    return evaluated(rendered(document, runner, known)[f"hosts/nix-cache02/nixops-{runner}.nix"])


def managed(document: Inventory) -> ManagedRunner:
    found = document.hosts[HOST].runners[ACTIONS2]
    assert isinstance(found, ManagedRunner)
    return found


def test_actions2_is_the_seeds_snippet_attribute_by_attribute() -> None:
    instance = module(inventory())["services"]["gitea-actions-runner"]["instances"]["actions2"]
    packages = ["bash", "coreutils", "curl", "gawk", "gitMinimal", "gnused", "nodejs", "wget", "nix"]
    assert instance == {
        "enable": True,
        "name": "nix-cache02-native",
        "url": "https://code.t-juice.club",
        "tokenFile": "/run/secrets/forgejo-runner-token-native",
        "labels": ["native:host"],
        "hostPackages": [f"/store/{p}" for p in packages],
        "settings": {
            "runner": {"capacity": 4, "shutdown_timeout": "5m"},
            "cache": {"enabled": True, "dir": "/var/lib/gitea-runner/actions2/cache"},
        },
    }


def test_limits_and_stop_times_go_to_the_unit() -> None:
    service = module(inventory())["systemd"]["services"][UNIT]["serviceConfig"]
    assert service["MemoryMax"] == "16G"
    assert service["CPUQuota"] == "400%"
    # Longer than the jobs' own time, and the jobs do not get the signal that the daemon gets.
    assert service["TimeoutStopSec"] == "330s"
    assert service["KillMode"] == "mixed"


def test_the_older_modules_instance_gets_a_user_and_a_state_of_its_own() -> None:
    unit = module(inventory())["systemd"]["services"][UNIT]
    service = unit["serviceConfig"]
    assert service["User"] == service["StateDirectory"] == "gitea-runner-actions2"
    assert service["TemporaryFileSystem"] == "/var/lib:ro"
    assert service["BindPaths"] == "/var/lib/private/gitea-runner-actions2:/var/lib/gitea-runner"
    assert service["WorkingDirectory"] == "-/var/lib/gitea-runner/actions2"
    assert unit["environment"]["HOME"] == "/var/lib/gitea-runner/actions2"
    plain = module(inventory({"isolate": False}))["systemd"]["services"][UNIT]
    assert set(plain["serviceConfig"]) == {"MemoryMax", "CPUQuota", "KillMode", "TimeoutStopSec"}
    assert "environment" not in plain


def test_a_long_runner_name_gives_a_user_that_systemd_takes() -> None:
    name = "a" * 63
    document = inventory(name=name)
    service = module(document, RunnerName(name))["systemd"]["services"][f"gitea-runner-{name}"]["serviceConfig"]
    assert len(service["User"]) <= 31
    assert service["StateDirectory"] == service["User"]


def test_a_dash_in_the_name_is_escaped_in_the_modules_unit_and_not_in_ours() -> None:
    services = module(inventory(name="my-runner"), RunnerName("my-runner"))["systemd"]["services"]
    assert set(services) == {"gitea-runner-my\\x2drunner", "nixops-secret-my-runner"}
    assert services["nixops-secret-my-runner"]["before"] == ["gitea-runner-my\\x2drunner.service"]


def test_a_new_version_of_the_secret_changes_both_units() -> None:
    def triggers(version: int) -> set[str]:
        document = module(inventory(), known=RunnerFacts(secret_versions={TOKEN_PATH: version}))
        return {str(unit["restartTriggers"]) for unit in document["systemd"]["services"].values()}

    assert triggers(3) == {f"['secret/{TOKEN_PATH} version 3']"}
    assert triggers(3) != triggers(4)


def agent(document: Any, unit: str = "nixops-secret-actions2") -> Any:
    command = document["systemd"]["services"][unit]["serviceConfig"]["ExecStart"]
    program, _, config = command.partition(" agent -config=")
    assert program == "/store/openbao/bin/bao"
    return json.loads(config)


def test_the_agent_logs_in_with_the_hosts_role_writes_one_file_and_ends() -> None:
    document = module(inventory())
    unit = document["systemd"]["services"]["nixops-secret-actions2"]
    assert unit["requiredBy"] == unit["before"] == [f"{UNIT}.service"]
    assert unit["after"] == unit["wants"] == ["network-online.target"]
    assert unit["serviceConfig"]["Type"] == "oneshot"
    assert unit["serviceConfig"]["RemainAfterExit"] is True
    assert unit["serviceConfig"]["Restart"] == "on-failure"
    assert unit["serviceConfig"]["ExecStartPre"].endswith(" /run/secrets")
    config = agent(document)
    (method,) = config["auto_auth"]["method"]
    assert method["type"] == "approle"
    assert method["mount_path"] == "auth/approle"
    assert method["config"] == {
        "role_id_file_path": "/var/lib/vault/approle/role-id",
        "secret_id_file_path": "/var/lib/vault/approle/secret-id",
        "remove_secret_id_file_after_reading": False,
    }
    assert "sink" not in config["auto_auth"]
    assert config["exit_after_auth"] is True
    assert config["template_config"]["exit_on_retry_failure"] is True
    (template,) = config["template"]
    assert template["perms"] == "0400"
    assert template["error_on_missing_key"] is True
    assert template["destination"] == "/run/secrets/forgejo-runner-token-native"
    assert (
        template["contents"]
        == f'TOKEN={{{{ with secret "secret/data/{TOKEN_PATH}" }}}}{{{{ .Data.data.token }}}}{{{{ end }}}}\n'
    )
    assert config["vault"]["address"] == "https://vault01.example:8200"
    assert "namespace" not in config["vault"]
    assert "ca_cert" not in config["vault"]


def test_namespace_mounts_and_the_hosts_own_way_to_openbao_reach_the_agent() -> None:
    vault = {
        "address": "https://from-here:8200",
        "host_address": "https://from-there:8200",
        "namespace": "team/a",
        "mount": "kv",
        "host_ca_file": "/etc/ssl/bao.pem",
        "host_approle_mount": "machines",
    }
    config = agent(module(inventory(vault=vault)))
    assert config["vault"] == {
        "address": "https://from-there:8200",
        "namespace": "team/a",
        "ca_cert": "/etc/ssl/bao.pem",
        "retry": {"num_retries": 3},
    }
    assert config["auto_auth"]["method"][0]["namespace"] == "team/a"
    assert config["auto_auth"]["method"][0]["mount_path"] == "auth/machines"
    assert f'"kv/data/{TOKEN_PATH}"' in config["template"][0]["contents"]


def test_without_an_address_for_the_hosts_the_agent_cannot_be_rendered() -> None:
    with pytest.raises(UsageError, match="OpenBao"):
        rendered(inventory(vault={}))
    assert rendered(inventory({"secret": "vault.secrets"}, vault={}))


def test_the_users_own_vault_module_writes_the_value_and_ours_the_form() -> None:
    document = module(inventory({"secret": "vault.secrets"}))
    assert document["vault"]["secrets"] == {
        "forgejo-runner-token-native": {
            "secretPath": TOKEN_PATH,
            "extractKey": "token",
            "outputDir": "/run/secrets/forgejo-runner-token-native.value",
            "mode": "0400",
            "owner": "root",
            "group": "root",
            "services": ["nixops-secret-actions2"],
        }
    }
    services = document["systemd"]["services"]
    file = "/run/secrets/forgejo-runner-token-native"
    assert services["nixops-secret-actions2"]["serviceConfig"]["ExecStart"].endswith(f" env {file}.value {file}")
    assert services["nixops-secret-actions2"]["requiredBy"] == [f"{UNIT}.service"]
    assert services["vault-secret-forgejo-runner-token-native"]["restartTriggers"] == [f"secret/{TOKEN_PATH}"]


def test_the_newer_module_has_one_connection_for_each_trusted_repository() -> None:
    document = module(inventory(forgejo()))
    instance = document["services"]["forgejo-runner"]["instances"]["actions2"]
    names = ["torjus-nixos-servers", "torjus-nixos-exporter", "torjus-nixos"]
    assert instance["settings"]["server"]["connections"] == {
        name: {"url": "https://code.t-juice.club", "uuid": f"uuid-{i}", "token": None} for i, name in enumerate(names)
    }
    assert instance["settings"]["runner"] == {
        "name": "nix-cache02-native",
        "labels": ["native:host"],
        "capacity": 4,
        "shutdown_timeout": "5m",
    }
    file = "/run/secrets/forgejo-runner-token-native"
    assert instance["secrets"]["server"]["connections"] == {n: {"token_url": f"{file}-{n}"} for n in names}
    templates = agent(document)["template"]
    assert [t["destination"] for t in templates] == [f"{file}-{name}" for name in names]
    # Bare, and without the newline that the runner would take for a part of it.
    assert all(t["contents"].startswith("{{ with") and t["contents"].endswith("{{ end }}") for t in templates)
    assert "User" not in document["systemd"]["services"]["forgejo-runner-actions2"]["serviceConfig"]


def test_the_newer_module_takes_its_secrets_from_the_users_vault_module_too() -> None:
    document = module(inventory(forgejo(secret="vault.secrets")))
    assert len(document["vault"]["secrets"]) == 3
    command = document["systemd"]["services"]["nixops-secret-actions2"]["serviceConfig"]["ExecStart"]
    assert " raw /run/secrets/" in command
    assert len(command.split()) == 2 + 2 * 3


def test_a_connection_without_a_uuid_is_an_error_and_not_a_guess() -> None:
    with pytest.raises(TemplateError, match="torjus/nixos-servers"):
        render_runner(inventory(forgejo()), HOST, ACTIONS2, RunnerFacts())


def test_repositories_that_come_to_one_name_are_told_apart() -> None:
    found = connections(managed(inventory(forgejo(trusted=["a-b/c", "a/b-c", "torjus/nixos"]))))
    assert len({c.name for c in found}) == len({c.kv_path for c in found}) == len({c.file for c in found}) == 3
    assert found[2].name == "torjus-nixos"
    assert found[2].kv_path == f"{TOKEN_PATH}-torjus-nixos"
    reordered = connections(managed(inventory(forgejo(trusted=["torjus/nixos", "a/b-c", "a-b/c"]))))
    assert set(reordered) == set(found)


def test_dots_in_a_repository_leave_the_connections_name_but_not_the_entry() -> None:
    (found,) = connections(managed(inventory(forgejo(trusted=["torjus/site.example"]))))
    assert found.name == "torjus-site-example"
    assert found.kv_path.endswith("-torjus-site.example")


def test_one_connections_token_path_may_not_meet_another_runners() -> None:
    other = {**SEED, "token": {"path": f"{TOKEN_PATH}-torjus-nixos"}}
    document = inventory(forgejo()).model_dump()
    hosts = copy.deepcopy(document["hosts"])
    hosts["nix-cache02"]["runners"]["other"] = other
    with pytest.raises(UsageError, match="share"):
        render_runner(inventory(hosts=hosts), HOST, ACTIONS2, facts())


def test_the_inventorys_free_settings_go_beside_ours_and_may_not_contradict_them() -> None:
    free = {"log": {"level": "debug"}, "runner": {"fetch_interval": "5s"}, "container": {"a b": ["${x}", 1, None]}}
    found = module(inventory({"settings": free}))["services"]["gitea-actions-runner"]["instances"]["actions2"][
        "settings"
    ]
    assert found["log"] == free["log"]
    assert found["container"] == free["container"]
    assert found["runner"] == {"capacity": 4, "shutdown_timeout": "5m", "fetch_interval": "5s"}
    with pytest.raises(UsageError, match=r"settings\.runner\.capacity"):
        rendered(inventory({"settings": {"runner": {"capacity": 9}}}))
    with pytest.raises(UsageError, match=r"settings\.server\.connections"):
        rendered(inventory(forgejo(settings={"server": {"connections": {"torjus-nixos": {"token": "x"}}}})))


def test_a_setting_without_a_literal_is_told_with_the_templates_line() -> None:
    with pytest.raises(TemplateError) as caught:
        rendered(inventory({"settings": {"x": {1, 2}}}))
    assert caught.value.position is not None


def test_packages_may_be_nested_and_are_each_named_once() -> None:
    packages = {"host_packages": ["bash", "nested.deep"], "extra_host_packages": ["nix", "bash"]}
    instance = module(inventory(packages))["services"]["gitea-actions-runner"]["instances"]["actions2"]
    assert instance["hostPackages"] == ["/store/bash", "/store/deep", "/store/nix"]


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("kind", [{}, forgejo()], ids=["gitea", "forgejo"])
def test_no_text_of_the_inventory_leaves_its_literal(text: str, kind: dict[str, Any]) -> None:
    document = inventory(
        {
            **kind,
            "name": text,
            "accepted_risks": {"shared-store": text},
            "workflow": {"name": text, "commands": [text, "nix build"], "checkout": text},
            "settings": {"x": {text: [text, {text: text}]}},
            "token": {"path": TOKEN_PATH, "owner": "tofu"},
        }
    )
    files = rendered(document)
    found = evaluated(files["hosts/nix-cache02/nixops-actions2.nix"])
    assert set(found) == {"services", "systemd"}
    ((_, instances),) = found["services"].items()
    instance = instances["instances"]["actions2"]
    assert instance["settings"]["x"] == {text: [text, {text: text}]}
    assert (instance["settings"]["runner"] if kind else instance)["name"] == text
    options = hcl2.SerializationOptions(strip_string_quotes=True, with_comments=False, explicit_blocks=False)
    tofu = hcl2.loads(files["terraform/vault/nixops-nix-cache02-actions2.tf"], serialization_options=options)
    assert set(tofu) == {"variable", "resource"}
    described = [next(iter(v.values())).get("description", "") for v in tofu["variable"]]
    assert described[0] == f"Runner token of {text} ({host_secrets(managed(document))[0].kv_path})"
    flow = yaml.safe_load(files["workflows/torjus/nixos/.forgejo/workflows/nixops-actions2.yml"])
    assert flow["name"] == text
    assert flow["jobs"]["build"]["steps"] == [{"uses": text}, {"run": text}, {"run": "nix build"}]


def test_a_nul_in_the_inventory_is_refused() -> None:
    with pytest.raises(TemplateError, match="NUL"):
        rendered(inventory({"name": "a\0b"}))


def test_the_workflow_asks_for_the_runners_label_on_every_push() -> None:
    files = rendered(inventory())
    for repo in TRUSTED:
        flow = yaml.safe_load(files[f"workflows/{repo}/.forgejo/workflows/nixops-actions2.yml"])
        assert flow == {
            "name": "Build",
            "on": ["push"],
            "jobs": {"build": {"runs-on": "native", "steps": [{"uses": "actions/checkout@v4"}, {"run": "nix build"}]}},
        }


def tofu_of(document: Inventory, runner: RunnerName = ACTIONS2) -> Any:
    text = rendered(document, runner)[f"terraform/vault/nixops-nix-cache02-{runner}.tf"]
    options = hcl2.SerializationOptions(strip_string_quotes=True, with_comments=False, explicit_blocks=False)
    return hcl2.loads(text, serialization_options=options)


def test_opentofu_gets_a_write_only_entry_and_no_value() -> None:
    found = tofu_of(inventory({"token": {"path": TOKEN_PATH, "owner": "tofu"}}))
    token, version = found["variable"]
    assert token["forgejo_runner_token_native"]["sensitive"] is True
    assert token["forgejo_runner_token_native"]["ephemeral"] is True
    assert "default" not in token["forgejo_runner_token_native"]
    assert version["forgejo_runner_token_native_version"]["default"] == 1
    (resource,) = found["resource"]
    assert resource["vault_kv_secret_v2"]["forgejo_runner_token_native"] == {
        "mount": "secret",
        "name": TOKEN_PATH,
        "data_json_wo": '${jsonencode({"token" = var.forgejo_runner_token_native})}',
        "data_json_wo_version": "${var.forgejo_runner_token_native_version}",
    }


def test_two_hosts_with_one_secret_name_get_two_variables() -> None:
    one = {**SEED, "token": {"path": "hosts/a/token", "owner": "tofu"}}
    hosts = {
        "nix-cache02": {"address": "a", "runners": {"actions2": one}},
        "nix-cache03": {
            "address": "b",
            "runners": {"actions2": {**one, "token": {"path": "hosts/b/token", "owner": "tofu"}}},
        },
    }
    document = inventory(hosts=hosts)
    here = tofu_of(document)
    files = render_runner(document, HostName("nix-cache03"), ACTIONS2, facts())
    there = next(f.text for f in files if f.language is Language.HCL)
    assert there is not None
    names = {name for v in here["variable"] for name in v}
    assert all(f'variable "{name}"' not in there for name in names)


def test_an_entry_that_the_api_owns_has_no_opentofu_file() -> None:
    files = render_runner(inventory(), HOST, ACTIONS2, facts())
    (tofu,) = [f for f in files if f.language is Language.HCL]
    assert tofu.text is None


def test_every_rendered_file_is_parsed_by_its_real_tool() -> None:
    local = LocalRunner()
    kinds: list[dict[str, Any]] = [{}, forgejo(), {"secret": "vault.secrets"}, forgejo(secret="vault.secrets")]
    for kind in kinds:
        document = inventory({**kind, "token": {"path": TOKEN_PATH, "owner": "tofu"}})
        for file in render_runner(document, HOST, ACTIONS2, facts()):
            if file.text is not None:
                parse_check(file.path, file.text, file.language, local)


@pytest.mark.parametrize(
    ("language", "text"),
    [(Language.NIX, "{ a = ; }"), (Language.HCL, "a = {\n"), (Language.YAML, "a: [")],
)
def test_what_does_not_parse_is_a_template_error_with_the_parsers_words(language: Language, text: str) -> None:
    with pytest.raises(TemplateError, match=r"x/y") as caught:
        parse_check(PurePosixPath("x/y"), text, language, LocalRunner())
    assert caught.value.detail


def test_rendering_twice_gives_the_same_text_with_no_path_of_this_machine() -> None:
    first, second = rendered(inventory()), rendered(inventory())
    assert first == second
    for text in first.values():
        assert str(Path.cwd()) not in text
        assert "runner actions2 of host nix-cache02" in text
        assert "invoke render --host nix-cache02 --runner actions2" in text


def test_a_template_of_the_users_own_takes_the_place_of_ours(tmp_path: Path) -> None:
    (tmp_path / "workflow.yml.j2").write_text("name: {{ label }}\n", encoding="utf-8")
    files = render_runner(inventory(), HOST, ACTIONS2, facts(), templates=tmp_path)
    texts = [f.text for f in files if f.language is Language.YAML and f.text is not None]
    assert [yaml.safe_load(t) for t in texts] == [{"name": "native"}] * 3


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"runner_module": "hosts/{hots}/x.nix"}, "placeholder"),
        ({"runner_module": ".git/hooks/{runner}"}, "git"),
        ({"workflow_file": "workflows/{runner}.yml"}, "several files"),
        ({"runner_module": "x", "workflow_file": "x"}, "several files"),
    ],
)
def test_paths_that_cannot_be_right_are_refused(config: dict[str, str], word: str) -> None:
    with pytest.raises(UsageError, match=word):
        rendered(inventory(config={"flake": "..", **config}))


def test_a_repository_named_with_dots_cannot_lead_out_of_the_checkout() -> None:
    # An inventory refuses such a name; whoever calls the function itself is refused too.
    config = inventory().config
    assert config is not None
    with pytest.raises(UsageError, match="workflow_file"):
        filled_path(config, "workflow_file", HOST, ACTIONS2, "torjus/..")


def test_a_path_with_every_placeholder_filled_stays_relative() -> None:
    config = inventory().config
    assert config is not None
    path = filled_path(config, "workflow_file", HOST, ACTIONS2, "torjus/nixos")
    assert path == PurePosixPath("workflows/torjus/nixos/.forgejo/workflows/nixops-actions2.yml")


@pytest.mark.parametrize(
    ("host", "runner"), [("nix-cache02", "actions1"), ("nix-cache02", "absent"), ("absent", "actions2")]
)
def test_only_a_managed_runner_of_a_known_host_is_rendered(host: str, runner: str) -> None:
    with pytest.raises(UsageError):
        render_runner(inventory(), HostName(host), RunnerName(runner), facts())


@pytest.mark.parametrize("missing", ["forge", "config"])
def test_an_inventory_without_forge_or_flake_renders_nothing(missing: str) -> None:
    without: dict[str, Any] = {missing: None}
    with pytest.raises(NixopsError, match="inventory names no") as caught:
        rendered(inventory(**without))
    assert not isinstance(caught.value, InventoryError)


def test_what_the_flake_must_give_back_is_what_the_module_says() -> None:
    """Every expected value is found in the evaluated module, for both modules."""
    for kind in ({}, forgejo()):
        document = inventory(kind)
        found = module(document)
        wanted = expected_values(document, HOST, ACTIONS2, facts())
        assert len(wanted) > 12
        for name, value in wanted.items():
            at: Any = found
            for part in name.replace('"', "").split("."):
                at = at[part]
            if name.endswith("hostPackages"):
                value = [f"/store/{p}" for p in value]
            assert at == value, name
    assert secret_unit(ACTIONS2) == "nixops-secret-actions2"


def test_a_rendered_file_is_a_value() -> None:
    (first, *_) = render_runner(inventory(), HOST, ACTIONS2, facts())
    assert isinstance(first, RenderedFile)
    assert first == render_runner(inventory(), HOST, ACTIONS2, facts())[0]
