"""Merging with origins, validation in plain words at the right place, and choosing what a task works on."""

from __future__ import annotations

from pathlib import Path

import pytest

from nixops.errors import ExitCode, InventoryError, UsageError
from nixops.inventory.load import Loaded, load, locate
from nixops.inventory.model import ManagedRunner, RunnerModule, SecretFlavour

ROOT = Path(__file__).parents[2]
SERVICES = "forge: {url: https://code.example.org, token: {env: T}}\nconfig: {flake: ../flake}\n"
RUNNER = 'name: n, labels: ["native:host"], scope: {user: me}, trusted: [me/a], token: {path: hosts/a/t}'


def loaded(tmp_path: Path, text: str) -> Loaded:
    file = tmp_path / "i.yml"
    file.write_text(text)
    return load(file)


def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> InventoryError:
    monkeypatch.chdir(tmp_path)
    Path("i.yml").write_text(text)
    with pytest.raises(InventoryError) as caught:
        load(Path("i.yml"))
    assert caught.value.exit_code is ExitCode.USAGE
    assert "\n" not in str(caught.value).split("\ni.yml:")[0], "the error itself is one line"
    return caught.value


# -- the shipped files ----------------------------------------------------------------------------------------


def test_the_shipped_inventory_is_the_seeds() -> None:
    found = load(ROOT / "inventory" / "hosts.yml")
    assert found.default_target() == ("nix-cache02", "actions2")
    _, host = found.host("nix-cache02")
    assert host.host_key == ()
    actions1 = host.runners["actions1"]  # type: ignore[index]  # a str finds a RunnerName
    assert not actions1.managed
    _, actions2 = found.runner("nix-cache02", "actions2")
    assert actions2.name == "nix-cache02-native"
    assert actions2.module is RunnerModule.GITEA
    assert actions2.labels == ("native:host",)
    assert actions2.packages == ("bash", "coreutils", "curl", "gawk", "gitMinimal", "gnused", "nodejs", "wget", "nix")
    assert actions2.capacity == 4
    assert actions2.cache.dir == "/var/lib/gitea-runner/actions2/cache"
    assert actions2.trusted == ("torjus/nixos-servers", "torjus/nixos-exporter", "torjus/nixos")
    assert str(actions2.scope) == "user torjus"
    assert actions2.accept_wider_scope
    assert actions2.token.path == "hosts/nix-cache02/forgejo-runner-token-native"
    assert actions2.token_path == "/run/secrets/forgejo-runner-token-native"
    assert actions2.limits.given() == {"MemoryMax": "16G", "CPUQuota": "400%"}
    assert "shared-store" in actions2.accepted_risks
    assert actions2.secret is SecretFlavour.VAULT_SECRETS


def test_the_example_builders_are_a_pool_for_two_systems_at_documentation_addresses() -> None:
    hosts = load(ROOT / "inventory" / "builders.example.yml").inventory.hosts
    assert {h.system for h in hosts.values() if h.builder} == {"x86_64-linux", "aarch64-linux"}
    assert all(h.address.startswith(("192.0.2.", "198.51.100.", "2001:db8:")) for h in hosts.values())


# -- merging --------------------------------------------------------------------------------------------------

LAYERS = """\
defaults:
  user: deploy
  port: 2200
  protected_files: [/a, /b]
  ssh: {keepalive: 5, connect_timeout: 3}
groups:
  one: {system: aarch64-linux, ssh: {keepalive: 6, login_timeout: 4}, builder: {max_jobs: 2, features: [kvm]}}
  two: {ssh: {keepalive: 7}, protected_files: [/c]}
hosts:
  h:
    address: h.example.org
    groups: [one, two]
    port: null
    ssh: {command_timeout: 9}
  k: {address: k.example.org, groups: [two, one], builder: null}
"""


def test_mappings_merge_deeply_and_lists_are_replaced(tmp_path: Path) -> None:
    hosts = loaded(tmp_path, LAYERS).inventory.hosts
    h = hosts["h"]  # type: ignore[index]  # a str finds a HostName
    assert (h.user, h.system, h.protected_files) == ("deploy", "aarch64-linux", ("/c",))
    assert (h.ssh.connect_timeout, h.ssh.login_timeout, h.ssh.keepalive, h.ssh.command_timeout) == (3, 4, 7, 9)
    assert h.builder is not None and h.builder.features == ("kvm",)


def test_the_group_a_host_lists_last_is_the_strongest(tmp_path: Path) -> None:
    hosts = loaded(tmp_path, LAYERS).inventory.hosts
    assert [host.ssh.keepalive for host in hosts.values()] == [7, 6]


def test_a_null_takes_out_what_was_inherited(tmp_path: Path) -> None:
    hosts = loaded(tmp_path, LAYERS).inventory.hosts
    assert hosts["h"].port == 22  # type: ignore[index]  # a str finds a HostName
    assert hosts["k"].builder is None  # type: ignore[index]  # a str finds a HostName


def test_every_value_knows_the_layer_and_the_line_it_comes_from(tmp_path: Path) -> None:
    found = loaded(tmp_path, LAYERS)
    shown = {name[2:]: origin for name, origin in found.origins.items() if name[:2] == ("hosts", "h")}
    assert shown[("user",)].kind == "default" and shown[("user",)].position.line == 2  # type: ignore[union-attr]  # it has one
    assert shown[("ssh", "keepalive")].kind == "group two"
    assert shown[("ssh", "login_timeout")].kind == "group one"
    assert shown[("ssh", "command_timeout")].kind == "host"
    assert shown[("port",)].kind == "built-in" and shown[("port",)].position is None
    assert shown[("builder", "speed_factor")].kind == "built-in"
    assert str(shown[("address",)]) == f"host, {tmp_path / 'i.yml'}:11"


def test_a_scope_and_a_secret_reference_are_replaced_as_one_value(tmp_path: Path) -> None:
    text = (
        SERVICES
        + f"defaults: {{sudo_password: {{env: A}}, runners: {{r: {{{RUNNER}}}}}}}\n"
        + "hosts: {a: {address: a, sudo_password: {file: x}, runners: {r: {scope: {repository: me/a}}}}}\n"
    )
    found = loaded(tmp_path, text)
    host = found.host("a")[1]
    assert host.sudo_password is not None and host.sudo_password.describe() == "file x"
    assert str(found.runner("a", "r")[1].scope) == "repository me/a"


def test_a_host_may_come_from_the_defaults_alone_but_for_its_address(tmp_path: Path) -> None:
    found = loaded(tmp_path, "defaults: {address: a.example.org}\nhosts:\n  a:\n")
    assert found.host("a")[1].address == "a.example.org"


def test_a_thousand_hosts_load_in_seconds(tmp_path: Path) -> None:
    text = "groups: {g: {builder: {max_jobs: 2}}}\nhosts:\n" + "".join(
        f"  h{n}: {{address: h{n}.example.org, groups: [g], ssh: {{keepalive: 5}}}}\n" for n in range(1000)
    )
    found = loaded(tmp_path, text)
    assert len(found.inventory.hosts) == 1000
    assert found.origins[("hosts", "h999", "builder", "max_jobs")].kind == "group g"


def test_a_file_that_would_merge_into_something_huge_is_refused(tmp_path: Path) -> None:
    text = f"defaults: {{protected_files: [{', '.join(['/a'] * 3000)}]}}\nhosts:\n"
    text += "".join(f"  h{n}:\n" for n in range(1000))
    with pytest.raises(InventoryError, match="merged, this is more than"):
        loaded(tmp_path, text)


# -- errors ---------------------------------------------------------------------------------------------------

HOST = "hosts:\n  a:\n    address: a.example.org\n"
MANAGED = f"{SERVICES}hosts:\n  a:\n    address: a.example.org\n    runners:\n      r:\n"
GOOD = {
    "name": "n",
    "labels": '["native:host"]',
    "scope": "{user: me}",
    "trusted": "[me/a]",
    "token": "{path: hosts/a/t}",
}


def runner(**changes: str | None) -> str:
    """An inventory whose runner differs from a good one; its first key is on line 8, column 9."""
    keys = {**GOOD, **changes}
    return MANAGED + "".join(f"        {k}: {v}\n" for k, v in keys.items() if v is not None)


@pytest.mark.parametrize(
    ("text", "place", "said", "advice"),
    [
        # keys
        ("host: {}\n" + HOST, "1:1: host: ", "unknown key", "did you mean hosts?"),
        (HOST + "    adress: x\n", "4:5: hosts.a.adress: ", "unknown key", "did you mean address?"),
        (HOST + "    zzz: x\n", "4:5: hosts.a.zzz: ", "unknown key", "known here: address, port"),
        (
            HOST + "    ssh: {keep_alive: 3}\n",
            "4:11: hosts.a.ssh.keep_alive: ",
            "unknown key",
            "did you mean keepalive?",
        ),
        ("groups: {g: {prot: 5}}\n" + HOST, "1:14: groups.g.prot: ", "unknown key", "did you mean port?"),
        ("defaults: {usr: x}\n" + HOST, "1:12: defaults.usr: ", "unknown key", "did you mean user?"),
        ("groups: {all: {}}\n" + HOST, "1:10: groups.all: ", "a name that Ansible's format reserves", "rename"),
        ("defaults: {groups: [x]}\n" + HOST, "1:12: defaults.groups: ", "groups are listed by a host", "move it"),
        ("forge: {}\n" + HOST, "1:1: forge: ", "needs the key url", "write url: https://"),
        ("hosts: {a: {port: 22}}\n", "1:9: hosts.a: ", "needs the key address", "write address: "),
        ("hosts: {a: {address: }}\n", "1:13: hosts.a.address: ", "has no value", "write address: "),
        ("hosts:\n", "1:1: hosts: ", "has no value", "write hosts: "),
        ("hosts: {}\n", "1:1: hosts: ", "found none", "such as hosts:"),
        ("hosts: {a b: {address: a}}\n", '1:9: hosts."a b": ', "'a b' is not a host name", "rename"),
        (
            "hosts: {a: {address: a, runners: {u: {managed: false, capacity: 4}}}}\n",
            "1:55: hosts.a.runners.u.capacity: ",
            "unknown key",
            "a runner with managed: false has only: managed, name, module, labels, token_file",
        ),
        # types
        ("hosts: 5\n", "1:8: hosts: ", "expected a mapping, found the number 5", None),
        ("hosts: {a: x}\n", "1:12: hosts.a: ", "expected a mapping of host settings, found the text 'x'", None),
        ("groups: [a]\n" + HOST, "1:9: groups: ", "expected a mapping, found a list", None),
        (
            HOST + '    port: "22"\n',
            "4:11: hosts.a.port: ",
            "a whole number from 1 to 65535, found the text '22'",
            "without quotes",
        ),
        (HOST + "    port: 022\n", "4:11: hosts.a.port: ", "found the text '022'", "such as port: 22"),
        (HOST + "    port: 99999\n", "4:11: hosts.a.port: ", "from 1 to 65535, found the number 99999", None),
        (HOST + "    user: no\n", "4:11: hosts.a.user: ", "found false (YAML reads a bare no so)", 'quote it: "no"'),
        (HOST + "    user: 5\n", "4:11: hosts.a.user: ", "found the number 5", 'quote it: "5"'),
        (HOST + "    ssh: x\n", "4:10: hosts.a.ssh: ", "expected a mapping, found the text 'x'", "such as ssh: {"),
        (HOST + "    ssh: {keepalive: soon}\n", "4:22: hosts.a.ssh.keepalive: ", "a number of seconds", None),
        (HOST + "    ssh: {keepalive: 0}\n", "4:22: hosts.a.ssh.keepalive: ", "above 0", None),
        (
            HOST + "    protected_files: /x\n",
            "4:22: hosts.a.protected_files: ",
            "a list",
            'write protected_files: ["/x"]',
        ),
        (HOST + "    protected_files: [/x/../y]\n", "4:23: hosts.a.protected_files[0]: ", "an absolute path", None),
        (HOST + "    host_key: AAAA\n", "4:15: hosts.a.host_key: ", "an OpenSSH public key", None),
        (HOST + "    host_key: ssh-ed25519 AAAA\n", "4:15: hosts.a.host_key: ", "is not that of a", "invoke trust a"),
        (HOST + "    groups: [x]\n", "4:14: hosts.a.groups[0]: ", "there is no group 'x'", "NAME: {}"),
        (
            "default: {host: 5}\n" + HOST,
            "1:17: default.host: ",
            "expected a host's name, found the number 5",
            "quote it",
        ),
        # an address that a program would take for an option
        (
            "hosts:\n  a:\n    address: -oProxyCommand=touch\n",
            "3:14: hosts.a.address: ",
            "'-oProxyCommand=touch' is not a host address",
            "a program would take it for an option",
        ),
        ("hosts: {a: {address: 'x '}}\n", "1:22: hosts.a.address: ", "is not a host address", "white space"),
        ("hosts: {a: {address: 'a:b'}}\n", "1:22: hosts.a.address: ", "IPv4 or IPv6", None),
        # runners
        (
            runner(labels="[native]"),
            "9:18: hosts.a.runners.r.labels[0]: ",
            "a label with its schema",
            'write "native:host"; a bare label means docker',
        ),
        (
            runner(labels='["x:hots"]'),
            "9:18: hosts.a.runners.r.labels[0]: ",
            "a label with its schema",
            "a schema is host",
        ),
        (
            runner(labels="native:host"),
            "9:17: hosts.a.runners.r.labels: ",
            "expected a list of labels",
            'labels: ["native:host"]',
        ),
        (runner(labels="[]"), "9:17: hosts.a.runners.r.labels: ", "the list is empty", "such as labels"),
        (runner(labels=None), "7:7: hosts.a.runners.r: ", "needs the key labels", 'write labels: ["native:host"]'),
        (
            runner(name="yes"),
            "8:15: hosts.a.runners.r.name: ",
            "found true (YAML reads a bare yes so)",
            'quote it: "yes"',
        ),
        (runner(name='""'), "8:15: hosts.a.runners.r.name: ", "found an empty text", None),
        (runner(name='"a\\nb"'), "8:15: hosts.a.runners.r.name: ", "control character U+000A", "on one line"),
        (runner(capacity="0"), "13:19: hosts.a.runners.r.capacity: ", "a whole number from 1 to 256", None),
        (
            runner(module="forgejo-runer"),
            "13:17: hosts.a.runners.r.module: ",
            "found the text 'forgejo-runer'",
            "did you mean forgejo-runner?",
        ),
        (
            runner(managed='"no"'),
            "13:18: hosts.a.runners.r.managed: ",
            "expected true or false, found the text 'no'",
            None,
        ),
        (runner(isolate='"yes"'), "13:18: hosts.a.runners.r.isolate: ", "expected true or false", None),
        (
            runner(limits="{CPUQuota: 400}"),
            "13:28: hosts.a.runners.r.limits.CPUQuota: ",
            "found the number 400",
            'write "400%"',
        ),
        (runner(limits="{MemoryMax: 16GB}"), "13:29: hosts.a.runners.r.limits.MemoryMax: ", "16G or 80%", None),
        (
            runner(limits="{MemoryMx: 16G}"),
            "13:18: hosts.a.runners.r.limits.MemoryMx: ",
            "unknown key",
            "did you mean MemoryMax?",
        ),
        (
            runner(accepted_risks="{x: 5}"),
            "13:29: hosts.a.runners.r.accepted_risks.x: ",
            "expected text, found the number 5",
            None,
        ),
        (runner(accepted_risks="{x: }"), "13:26: hosts.a.runners.r.accepted_risks.x: ", "has nothing under it", None),
        (runner(token="{path: ../x}"), "12:23: hosts.a.runners.r.token.path: ", "is not a vault path", None),
        (
            runner(scope="{user: me, admin: true}"),
            "10:9: hosts.a.runners.r.scope: ",
            "exactly one of repository",
            "such as {user",
        ),
        (runner(scope=None), "7:7: hosts.a.runners.r: ", "holds one registration: name its scope", None),
        (runner(module="forgejo-runner"), "10:9: hosts.a.runners.r.scope: ", "leave scope out", None),
        (runner(shutdown_timeout="25h"), "13:27: hosts.a.runners.r.shutdown_timeout: ", "at most 24h", None),
        (runner(trusted="[me/a, me/a]"), "11:9: hosts.a.runners.r.trusted: ", "names a repository twice", None),
        (runner(trusted="[me]"), "11:19: hosts.a.runners.r.trusted[0]: ", "'me' is not a repository", None),
        (
            runner(trusted="[me/a, you/b]"),
            "11:25: hosts.a.runners.r.trusted[1]: ",
            "user me does not admit you/b, which you owns",
            "forgejo-runner",
        ),
        (
            runner(scope="{repository: me/b}"),
            "10:29: hosts.a.runners.r.scope.repository: ",
            "admits me/b alone, but trusted names me/a",
            None,
        ),
        (
            runner(settings="{log: {token: abc}}"),
            "13:26: hosts.a.runners.r.settings.log.token: ",
            "a secret does not stand in an inventory",
            None,
        ),
        (HOST + "    runners: {r: }\n", "4:15: hosts.a.runners.r: ", "has nothing under it", None),
        (HOST + "    runners: {r: 5}\n", "4:18: hosts.a.runners.r: ", "expected a mapping, found the number 5", None),
        (
            HOST + f"    runners: {{r: {{{RUNNER}}}}}\n",
            "4:15: hosts.a.runners.r: ",
            "needs the top-level section forge:",
            None,
        ),
        # names that must exist, and things that must differ
        ("default: {host: b}\n" + HOST, "1:17: default.host: ", "there is no host 'b'", "hosts: a"),
        (
            "default: {host: a, runner: r}\n" + HOST,
            "1:28: default.runner: ",
            "host a has no runner 'r'",
            "its runners: none",
        ),
        (
            "default: {host: a, runner: u}\n" + HOST + "    runners: {u: {managed: false}}\n",
            "1:28: default.runner: ",
            "runner u on a has managed: false",
            None,
        ),
        (HOST + "    deploy: {build: b}\n", "4:21: hosts.a.deploy.build: ", "neither here, target nor a host", None),
        (
            HOST + "    deploy: {build: tarject}\n",
            "4:21: hosts.a.deploy.build: ",
            "neither here",
            "did you mean target?",
        ),
        (
            HOST + "    deploy: {build: b}\n  b: {address: b}\n",
            "4:21: hosts.a.deploy.build: ",
            "host b has no builder",
            None,
        ),
        (
            HOST + "    deploy: {build: b}\n  b: {address: b, system: aarch64-linux, builder: {}}\n",
            "4:21: hosts.a.deploy.build: ",
            "builder b does not build for x86_64-linux",
            "builders for it: none",
        ),
        (HOST + "  b: {address: A.EXAMPLE.ORG}\n", "4:16: hosts.b.address: ", "hosts a and b share the address", None),
        (
            runner() + "      s:\n" + runner().split("      r:\n")[1],
            "18:9: hosts.a.runners.s.token: ",
            "runners r and s share the token path hosts/a/t",
            "an entry of its own",
        ),
        (
            runner() + runner().split("hosts:\n")[1].replace("a:", "b:", 1).replace(" a.", " b."),
            "21:23: hosts.b.runners.r.token.path: ",
            "shares the token path hosts/a/t with runner r on a",
            "an entry of its own",
        ),
        (
            "config: {flake: x, tofu_file: 'x/{hots}.tf'}\n" + HOST,
            "1:31: config.tofu_file: ",
            "'{hots}' is no placeholder",
            "did you mean host?",
        ),
    ],
)
def test_what_is_wrong_is_said_at_its_place_with_what_to_write_instead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, place: str, said: str, advice: str | None
) -> None:
    error = refused(tmp_path, monkeypatch, text)
    assert str(error).startswith(f"i.yml:{place}")
    assert said in error.message
    if advice is not None:
        assert advice in (error.hint or "")


def test_the_first_error_of_the_file_is_the_message_and_the_others_follow_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = refused(tmp_path, monkeypatch, HOST + "    prot: 5\n    user: 7\n  b: {address: -x}\n")
    lines = str(error).splitlines()
    assert lines[0].startswith("i.yml:4:5: hosts.a.prot: unknown key (and 2 more below)")
    assert [line.split(" ")[1] for line in lines[1:]] == ["hosts.a.user:", "hosts.b.address:"]


def test_a_wrong_value_in_a_group_is_reported_once_and_in_the_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = refused(
        tmp_path,
        monkeypatch,
        "groups: {g: {port: x}}\nhosts: {a: {address: a, groups: [g]}, b: {address: b, groups: [g]}}\n",
    )
    assert str(error).startswith("i.yml:1:20: groups.g.port: expected a whole number")
    assert error.detail is None


@pytest.mark.parametrize(
    "text",
    [
        "forge: {url: https://x, token: hunter2hunter2}\n",
        "forge: {url: https://x, token: {env: 'hunter2hunter2 '}}\n",
        "forge: {url: https://x, token: {openbao: {path: '/hunter2hunter2', key: k}}}\n",
        "forge: {url: https://x, token: {command: hunter2hunter2}}\n",
        "forge: {url: 'https://u:hunter2hunter2@x', token: {env: T}}\n",
        "vault: {token: [hunter2hunter2]}\n",
        "defaults: {sudo_password: hunter2hunter2}\n",
        "vault: {approle: {role_id: hunter2hunter2, secret_id: {env: S}}}\n",
    ],
)
def test_a_secret_that_stands_in_the_wrong_place_is_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    error = refused(tmp_path, monkeypatch, text + HOST)
    assert "hunter2" not in str(error)


def test_terminal_control_in_a_value_is_made_visible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = refused(tmp_path, monkeypatch, 'hosts: {a: {address: "\\e[2Jx"}}\n')
    assert "\x1b" not in str(error)


# -- choosing -------------------------------------------------------------------------------------------------

POOL = (
    SERVICES
    + f"""\
hosts:
  a:
    address: a
    runners:
      one: {{{RUNNER}}}
      two: {{{RUNNER.replace("hosts/a/t", "hosts/a/u")}}}
      hand: {{managed: false}}
  b:
    address: b
    groups: [g]
    runners:
      only: {{{RUNNER.replace("hosts/a/t", "hosts/b/t")}}}
groups: {{g: {{}}}}
"""
)


def test_bare_and_without_a_default_the_choices_are_listed(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        loaded(tmp_path, POOL).default_target()
    assert caught.value.exit_code is ExitCode.USAGE
    assert caught.value.hint == "choose: --host a --runner one; --host a --runner two; --host b --runner only"


def test_a_host_with_one_managed_runner_needs_no_runner_named(tmp_path: Path) -> None:
    found = loaded(tmp_path, POOL)
    assert found.target("b", None) == ("b", "only")
    with pytest.raises(UsageError, match="which runner on a"):
        found.target("a", None)


def test_the_default_fills_in_what_is_left_out(tmp_path: Path) -> None:
    found = loaded(tmp_path, "default: {host: a, runner: two}\n" + POOL)
    assert found.target(None, None) == ("a", "two")
    assert found.target("a", None) == ("a", "two")
    assert found.target(None, "one") == ("a", "one")
    assert found.target("b", None) == ("b", "only")


def test_unknown_names_get_the_nearest_one(tmp_path: Path) -> None:
    found = loaded(tmp_path, POOL.replace("  a:", "  nix-cache02:"))
    for call, advice in (
        (lambda: found.host("nix-cach02"), "did you mean nix-cache02?"),
        (lambda: found.host("zzz"), "hosts: nix-cache02, b"),
        (lambda: found.runner("nix-cache02", "on"), "did you mean one?"),
        (lambda: found.group("h"), "groups: g"),
    ):
        with pytest.raises(UsageError) as caught:
            call()
        assert caught.value.hint == advice


def test_a_runner_that_is_not_managed_cannot_be_worked_on(tmp_path: Path) -> None:
    found = loaded(tmp_path, POOL)
    with pytest.raises(UsageError, match="managed: false") as caught:
        found.runner("a", "hand")
    assert "one, two" in (caught.value.hint or "")
    assert isinstance(found.runner("a", "one")[1], ManagedRunner)


def test_a_group_is_its_hosts(tmp_path: Path) -> None:
    assert loaded(tmp_path, POOL).group("g") == ("b",)


def test_the_default_inventory_is_found_from_a_directory_below(tmp_path: Path) -> None:
    (tmp_path / "inventory").mkdir()
    (tmp_path / "inventory" / "hosts.yml").write_text(HOST)
    below = tmp_path / "inventory" / "deep"
    below.mkdir()
    assert locate("inventory/hosts.yml", tmp_path) == Path("inventory/hosts.yml")
    assert locate("inventory/hosts.yml", below) == tmp_path / "inventory" / "hosts.yml"
    assert locate("other.yml", below) == Path("other.yml")
