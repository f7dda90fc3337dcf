"""The modules of the lab's stand-in for NixOS, on real hosts: runners, secrets, Nix's settings, upgrades."""

from __future__ import annotations

from nixops.transport.command import Command
from nixops.transport.local import LocalRunner
from tests.lab.toplevel_site import SLEEPER, USER, Machine, Site, eventually


def _instance(site: Site, label: str) -> str:
    return f"""services.gitea-actions-runner.instances.act-2 = {{
        enable = true; name = "act-2"; url = "{site.forge.url}"; labels = [ "{label}" ];
        tokenFile = "/run/secrets/act-2"; hostPackages = with pkgs; [ bash coreutils nix ];
    }};"""


def test_the_older_module_shares_its_user_and_loses_its_registration_when_labels_change(machine: Machine) -> None:
    """Proves the shape of services.gitea-actions-runner: escaped unit, shared user and state, registration by token."""
    token = machine.site.forge.reset_registration_token(USER)
    machine.file("/run/secrets/act-2", f"TOKEN={token.reveal()}\n")
    unit = "gitea-runner-act\\x2d2.service"
    assert machine.switch(machine.generation(_instance(machine.site, "native:host"))) == 0
    assert machine.site.forge.wait_runner("act-2").labels == ("native",)
    assert machine.unit(unit, "User") == machine.unit("gitea-runner-actions1.service", "User") == "gitea-runner"
    assert machine.unit(unit, "DynamicUser") == "yes"
    assert "-nix/bin" in machine.unit(unit, "Environment")
    state = "/var/lib/private/gitea-runner"
    owners = machine.ask("stat", "-c", "%U", f"{state}/act-2/.runner", f"{state}/actions1/.runner").split()
    assert len(set(owners)) == 1, "both instances' credentials belong to one user"

    machine.site.forge.reset_registration_token(USER)  # the one in the file no longer holds
    code = machine.switch(machine.generation(_instance(machine.site, "other:host")))
    assert code in (0, 4)
    eventually(lambda: int(machine.unit(unit, "NRestarts") or 0) > 0, "it restarts without a registration")
    assert machine.ask("ls", f"{state}/act-2/.runner") == ""


def test_the_newer_module_reads_its_token_as_a_credential_that_no_store_path_holds(either: Machine) -> None:
    """Proves the shape of services.forgejo-runner: connections, LoadCredential, a user of its own."""
    row = either.site.forge.add_runner(USER, f"new-{either.host.name}")
    token = either.site.forge.issued[-1]
    either.file("/run/secrets/new", token)
    system = either.generation(f"""services.forgejo-runner.instances.new-1 = {{
        enable = true;
        settings.runner.labels = [ "new:host" ];
        settings.server.connections.lab = {{ url = "{either.site.forge.url}"; uuid = "{row.uuid}"; token = null; }};
        secrets.server.connections.lab.token_url = "/run/secrets/new";
    }};""")
    assert either.switch(system) == 0
    unit = "forgejo-runner-new\\x2d1.service"

    def declared() -> bool:
        return any(r.uuid == row.uuid and r.status == "idle" for r in either.site.forge.runners)

    eventually(declared, "the runner has declared itself")
    assert either.unit(unit, "DynamicUser") == "yes"
    # The module names no user: systemd makes one of the unit's name, and where that is no user name, of its hash.
    assert either.unit(unit, "User").startswith("_du")
    assert "server__connections__lab__token_url:/run/secrets/new" in either.ask("systemctl", "cat", unit)
    closure = either.ask("nix-store", "-qR", system).split()
    assert either.ask("grep", "-rlF", token, *closure) == ""


def test_vault_secrets_fetches_a_value_with_the_hosts_own_approle_and_again_at_each_boot(either: Machine) -> None:
    """Proves the module of the seed's repository against a real OpenBao: the bare value, 0400, no newline added."""
    bao, name = either.site.bao, either.host.name
    bao.api("POST", f"secret/data/hosts/{name}/demo", {"data": {"token": "the value"}})
    policy = f'path "secret/data/hosts/{name}/*" {{ capabilities = ["read"] }}'
    bao.api("PUT", f"sys/policies/acl/{name}", {"policy": policy})
    bao.api("POST", f"auth/approle/role/{name}", {"token_policies": [name]})
    role = bao.api("GET", f"auth/approle/role/{name}/role-id")["data"]["role_id"]
    secret = bao.api("POST", f"auth/approle/role/{name}/secret-id")["data"]["secret_id"]
    either.host.exec("mkdir", "-p", "-m", "0700", "/var/lib/vault/approle")
    either.file("/var/lib/vault/approle/role-id", role + "\n")
    either.file("/var/lib/vault/approle/secret-id", secret)
    system = either.generation(
        f'vault.secrets.demo = {{ secretPath = "hosts/{name}/demo"; extractKey = "token"; services = [ "sleeper" ]; }};'
        + SLEEPER.format(1000)
    )
    assert either.switch(system) == 0
    assert either.host.exec("cat", "/run/secrets/demo").stdout == b"the value"
    assert either.ask("stat", "-c", "%a %U", "/run/secrets/demo") == "400 root"
    assert either.unit("sleeper.service") == "active"

    either.host.exec("nix-env", "-p", "/nix/var/nix/profiles/system", "--set", system)
    assert either.switch(system, "boot") == 0
    either.power_cycle()
    eventually(lambda: either.unit("sleeper.service") == "active", "what needs the secret runs after a boot")
    assert either.ask("cat", "/run/secrets/demo") == "the value"


def test_nix_settings_replace_the_hosts_own_file_and_give_it_back(either: Machine) -> None:
    """Proves that allowed-users and trusted-users can be tried for real."""
    before = either.ask("cat", "/etc/nix/nix.conf")
    system = either.generation('nix.settings = { trusted-users = [ "root" "@wheel" ]; max-jobs = 1; };')
    assert either.switch(system) == 0
    assert "trusted-users = root @wheel" in either.ask("cat", "/etc/nix/nix.conf")
    assert either.switch(either.base) == 0
    assert either.ask("cat", "/etc/nix/nix.conf") == before


def test_auto_upgrade_has_the_units_of_nixos_and_leaves_a_trace(machine: Machine) -> None:
    """Proves that a timer is set which a deploy has to hold off, and that running it shows."""
    assert machine.switch(machine.generation('system.autoUpgrade = { enable = true; flake = "git+ssh://x"; };')) == 0
    assert machine.unit("nixos-upgrade.timer") == "active"
    assert machine.unit("nixos-upgrade.service") == "inactive"
    machine.host.exec("systemctl", "start", "nixos-upgrade.service")
    assert "switch git+ssh://x" in machine.ask("cat", "/var/log/nixos-upgrade.ran")


def test_a_toplevel_builds_on_the_host_itself(either: Machine) -> None:
    """Proves that a deploy can build on its target, whose programs are not where this machine's are."""
    new = either.generation(SLEEPER.format(1234))
    derivation = LocalRunner().run(Command.of("nix-store", "--query", "--deriver", new)).check().out.strip()
    closure = LocalRunner().run(Command.of("nix-store", "--query", "--requisites", derivation)).check().out.split()
    archive = LocalRunner().run(Command.of("nix-store", "--export", *closure)).check().stdout
    either.host.exec("nix-store", "--import", stdin=archive)
    either.host.exec("nix-store", "--delete", new)
    built = either.host.exec("nix-store", "--realise", derivation, timeout=120).stdout.decode().split()
    assert built == [new]
    assert either.switch(new) == 0
