"""The inventory as Ansible, OpenSSH and Nix take it. OpenSSH itself reads what is made for it."""

from __future__ import annotations

import base64
import json
import subprocess
from pathlib import Path

import pytest

from nixops.errors import UsageError
from nixops.inventory import export, show
from nixops.inventory.load import Loaded, load

ED25519 = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAqt16V6G0qKcT6D39YUHzI+3tuqFe2e4XYfp4KVZysp"
ECDSA = (
    "ecdsa-sha2-nistp256 AAAAE2VjZHNhLXNoYTItbmlzdHAyNTYAAAAIbmlzdHAyNTYAAABBBB91F1jm"
    "HAQpNiXk2YYN2e2+ld2nTG6AMrRjO1wWmxlr/NK4CQBB41dpgOD4wr9FOM+h3iQITTqcFByU7BG/Tno="
)
TEXT = f"""\
forge: {{url: https://code.example.org, token: {{command: [pass, show, hunter2hunter2]}}}}
config: {{flake: ../flake}}
default: {{host: one, runner: native}}
groups: {{builders: {{builder: {{max_jobs: 4}}}}, other: {{}}}}
hosts:
  one:
    address: one.example.org
    user: deploy
    host_key: ["{ECDSA} old@one", "{ED25519}"]
    groups: [builders]
    builder: {{speed_factor: 2, features: [kvm, big-parallel], mandatory_features: [bench]}}
    ssh: {{identity_file: "keys/50% of {{h}}", keepalive: 7}}
    sudo_password: {{env: SUDO}}
    runners:
      native:
        name: n
        labels: ["native:host"]
        scope: {{user: me}}
        trusted: [me/a]
        token: {{path: hosts/one/t}}
  two: {{address: "2001:db8::2", port: 2222, host_key: {ED25519}, groups: [builders], builder: {{systems: [a-b, c-d]}}}}
  six: {{address: "2001:db8::6", builder: {{}}}}
  plain: {{address: 192.0.2.1, groups: [other]}}
  lone: {{address: "fe80::1%eth0"}}
"""


@pytest.fixture
def loaded(tmp_path: Path) -> Loaded:
    file = tmp_path / "i.yml"
    file.write_text(TEXT)
    return load(file)


def fields(text: str, host: str) -> list[str]:
    line = next(line for line in text.splitlines() if not line.startswith("#") and host in line)
    return line.split(" ")


def test_a_builder_is_a_line_of_eight_fields_as_the_nix_manual_has_them(tmp_path: Path) -> None:
    file = tmp_path / "i.yml"
    file.write_text(TEXT.replace("50% of {h}", "key"))
    found = fields(export.to_machines(load(file)), "one.example.org")
    assert found[:7] == [
        "ssh-ng://deploy@one.example.org",
        "x86_64-linux",
        str(tmp_path / "keys" / "key"),
        "4",
        "2",
        "kvm,big-parallel",
        "bench",
    ]
    assert base64.b64decode(found[7]).decode() == ED25519


def test_hosts_that_do_not_build_are_no_machines_and_asking_for_one_says_so(loaded: Loaded) -> None:
    text = export.to_machines(loaded, "six")
    assert text == "ssh-ng://root@[2001:db8::6] x86_64-linux - 1 1 - - -\n"
    with pytest.raises(UsageError, match="host plain has no builder"):
        export.to_machines(loaded, "plain")


def test_a_builder_on_another_port_goes_by_its_name_for_the_uri_holds_no_port(loaded: Loaded) -> None:
    found = fields(export.to_machines(loaded, "two"), "@two")
    assert found[:2] == ["ssh-ng://root@two", "a-b,c-d"]


def test_a_key_whose_path_a_machines_file_cannot_hold_is_refused(loaded: Loaded) -> None:
    with pytest.raises(UsageError, match="a machines file cannot hold the path"):
        export.to_machines(loaded)


def ssh_settings(config: Path, host: str) -> dict[str, str]:
    ran = subprocess.run(["ssh", "-G", "-F", str(config), host], capture_output=True, text=True, check=True)
    return dict(line.split(" ", 1) for line in ran.stdout.splitlines() if " " in line)


def test_openssh_reads_from_the_configuration_what_the_inventory_says(loaded: Loaded, tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text(export.to_ssh_config(loaded))
    one = ssh_settings(config, "one")
    assert (one["hostname"], one["port"], one["user"]) == ("one.example.org", "22", "deploy")
    assert (one["stricthostkeychecking"], one["hostkeyalias"], one["identitiesonly"]) == ("true", "one", "yes")
    assert one["serveraliveinterval"] == "7"
    # Percent signs are expanded when the key is opened, so they are doubled here.
    assert one["identityfile"] == str(tmp_path / "keys" / "50%% of {h}")
    two = ssh_settings(config, "two")
    assert (two["hostname"], two["port"], two["user"]) == ("2001:db8::2", "2222", "root")
    assert ssh_settings(config, "lone")["hostname"] == "fe80::1%eth0"


def test_a_path_that_ssh_config_cannot_hold_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "i.yml"
    file.write_text("hosts: {a: {address: a, ssh: {identity_file: 'a\"b'}}}\n")
    with pytest.raises(UsageError, match="ssh_config cannot hold the path"):
        export.to_ssh_config(load(file))


def test_openssh_finds_the_pinned_keys_by_name_and_by_address(loaded: Loaded, tmp_path: Path) -> None:
    known = tmp_path / "known_hosts"
    known.write_text(export.to_known_hosts(loaded))
    for name, keys in (
        ("one", [ECDSA, ED25519]),
        ("one.example.org", [ECDSA, ED25519]),
        ("two", [ED25519]),
        ("[2001:db8::2]:2222", [ED25519]),
    ):
        ran = subprocess.run(["ssh-keygen", "-F", name, "-f", str(known)], capture_output=True, text=True, check=True)
        found = [line.split(" ", 1)[1] for line in ran.stdout.splitlines() if not line.startswith("#")]
        assert found == keys, name
    assert "# plain: no host key pinned; run: invoke trust plain\n" in known.read_text()
    assert "old@one" not in known.read_text()


def test_ansible_gets_groups_and_every_hosts_variables_in_one_call(loaded: Loaded) -> None:
    listed = export.to_ansible(loaded)
    assert listed["builders"] == {"hosts": ["one", "two"]}
    assert listed["ungrouped"] == {"hosts": ["six", "lone"]}
    assert listed["all"] == {"children": ["ungrouped", "builders", "other"]}
    variables = listed["_meta"]["hostvars"]
    assert set(variables) == {"one", "two", "six", "plain", "lone"}
    assert variables["one"] == export.ansible_host(loaded, "one")
    assert variables["one"]["ansible_host"] == "one.example.org"
    assert variables["one"]["ansible_become"] is True
    assert variables["two"]["ansible_port"] == 2222
    assert variables["one"]["nixops_runners"] == {"native": {"managed": True, "labels": ["native:host"]}}
    json.dumps(listed)


def test_the_json_document_has_every_value_with_its_origin(loaded: Loaded) -> None:
    document = json.loads(json.dumps(export.to_json(loaded, "one")))
    assert document["schema"] == "nixops/inventory/1"
    assert list(document["hosts"]) == ["one"]
    one = document["hosts"]["one"]
    assert one["settings"]["builder"]["max_jobs"] == 4
    assert one["origins"]["builder.max_jobs"]["kind"] == "group builders"
    assert one["origins"]["builder.max_jobs"]["line"] == 4
    assert one["origins"]["port"] == {"kind": "built-in", "file": None, "line": None, "column": None}


def test_references_to_secrets_are_described_and_nothing_more(loaded: Loaded) -> None:
    rows = [" ".join(row) for row in show.value_rows(loaded, "one")]
    everything = json.dumps(export.to_json(loaded)) + "\n".join(rows) + json.dumps(export.to_ansible(loaded))
    assert "hunter2" not in everything
    assert "environment variable SUDO" in everything
    assert "command pass" in everything


def test_the_rows_for_people_name_value_file_line_and_layer(loaded: Loaded) -> None:
    rows = {row[0]: row[1:] for row in show.value_rows(loaded, "one")}
    assert rows["builder.max_jobs"] == ("4", f"{loaded.file}:4 (group builders)")
    assert rows["ssh.keepalive"] == ("7.0", f"{loaded.file}:12 (host)")
    assert rows["port"] == ("22", "built-in")
    assert rows["runners.native.labels"][0] == "[native:host]"
    hosts = {row[0]: row for row in show.host_rows(loaded)}
    assert hosts["two"][1] == "2001:db8::2 port 2222"
    assert hosts["plain"][4] == "not pinned"
    assert [row[1] for row in show.runner_rows(loaded)] == ["native (default)"]
