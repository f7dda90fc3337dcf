"""Each check holds on a good host, and fails for its own reason on one that is not."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from nixops.errors import ConnectionLost, UsageError
from nixops.transport.command import Command, LineSink, Result
from nixops.values import RunnerName
from nixops.verify.model import CheckResult
from nixops.verify.run import CHECKS, planned_checks, verify_runner
from tests.unit.verify_recorded import NAME, Clock, RecordedHost, check, failures, inventory_host

Change = Callable[[RecordedHost], object]


def put(what: dict[str, str], key: str, value: str) -> None:
    what[key] = value


def test_a_good_host_passes_every_check() -> None:
    results = check(RecordedHost())
    assert failures(results) == set()
    assert len(results) == 18


def test_the_plan_names_what_is_reported_in_its_order() -> None:
    for host in (inventory_host(), inventory_host(host_packages=["bash"], limits={}, accepted_risks={"x": "y"})):
        assert planned_checks(host, NAME) == tuple(check(RecordedHost(), host))


def test_checks_that_the_inventory_does_not_ask_for_are_left_out() -> None:
    planned = planned_checks(inventory_host(host_packages=["bash"], limits={}), NAME)
    assert not {"limits-in-force", "store-build", "risk-shared-store"} & set(planned)


CASES: list[tuple[str, Change, str]] = [
    ("dynamic-user", lambda h: put(h.unit, "DynamicUser", "no"), "DynamicUser=no"),
    ("dynamic-user", lambda h: setattr(h, "uid", 997), "uid 997"),
    ("dynamic-user", lambda h: setattr(h, "accounts", "x:x:63984:1::/:/bin/sh\n"), "/etc/passwd"),
    ("dynamic-user", lambda h: setattr(h, "accounts", "gitea-runner-actions2:x:1:1::/:/b\n"), "/etc/passwd"),
    ("limits-in-force", lambda h: put(h.unit, "MemoryMax", "infinity"), "MemoryMax=infinity"),
    ("limits-in-force", lambda h: put(h.cgroup, "cpu.max", "max 100000"), "cpu.max"),
    ("host-packages", lambda h: h.programs.remove("sort"), "no sign of coreutils (ls cat sort)"),
    ("secret-files", lambda h: put(h.files, "/run/secrets/runner-token", "0444 root:root"), "0444 root:root"),
    ("secret-files", lambda h: put(h.files, "/run/secrets/runner-token", "0400 gitea:root"), "0400 gitea:root"),
    ("secret-files", lambda h: h.files.pop("/run/secrets/runner-token"), "no regular file"),
    ("secret-files", lambda h: setattr(h, "well_formed", False), "another format"),
    ("approle-closed", lambda h: put(h.directories, "/var/lib/vault/approle", "0755 root:root"), "0755 of uid 0"),
    ("approle-closed", lambda h: put(h.files, "/var/lib/vault/approle/role-id", "0440 root:root"), "0440"),
    ("approle-closed", lambda h: put(h.files, "/var/lib/vault/approle/role-id", "0400 u:u"), "uid 1000"),
    ("approle-closed", lambda h: h.directories.pop("/var/lib/vault/approle"), "no directory"),
    ("approle-closed", lambda h: h.opened.add(("read", "/var/lib/vault/approle/role-id")), "role-id (read)"),
    ("approle-closed", lambda h: h.opened.add(("list", "/var/lib/vault/approle")), "approle (list)"),
    ("secrets-unreadable", lambda h: h.opened.add(("read", "/run/secrets/deep/backup")), "deep/backup (read)"),
    ("secrets-unreadable", lambda h: h.opened.add(("write", "/run/secrets/deep/backup")), "(write)"),
    (
        "instances-separate",
        lambda h: h.opened.add(("read", "/var/lib/private/gitea-runner/actions1/.runner")),
        ".runner (read)",
    ),
    ("instances-separate", lambda h: h.opened.add(("read", "/proc/695/environ")), "/proc/695/environ"),
    ("instances-separate", lambda h: h.opened.add(("write", "/var/lib/private/gitea-runner")), "(write)"),
    ("instances-separate", lambda h: put(h.other, "User", "gitea-runner-actions2"), "shared with actions1"),
    ("root-groups", lambda h: setattr(h, "groups", "docker"), "docker"),
    ("store-not-writable", lambda h: setattr(h, "writing", "readable\nsystem\nwrite /nix/store"), "/nix/store"),
    ("store-not-writable", lambda h: setattr(h, "writing", ""), "no access"),
    ("nix-trust", lambda h: setattr(h, "settings", "trusted-users = root *\nallowed-users = *\n"), "names *"),
    ("nix-trust", lambda h: setattr(h, "daemon", "trusted"), "the daemon trusts it"),
    (
        "nix-trust",
        lambda h: setattr(h, "settings", "trusted-users = root\nallowed-users = root\n"),
        "allowed-users = root",
    ),
    ("nix-trust", lambda h: setattr(h, "daemon", "refused"), "admitted by Nix's allowed-users"),
    ("nix-trust", lambda h: setattr(h, "daemon", "error: no socket"), "could not be asked"),
    ("nix-trust", lambda h: setattr(h, "settings", ""), "could not be read"),
    ("store-build", lambda h: setattr(h, "build", "failed 1\nerror: no daemon"), "no daemon"),
    ("store-build", lambda h: setattr(h, "build", "built /etc/passwd"), "something else than a store path"),
    ("registered", lambda h: setattr(h, "registration", "@config\n@declared\n0\n"), "none beside the running daemon"),
    (
        "registered",
        lambda h: setattr(h, "registration", h.registration.replace("forge.lab", "other.lab")),
        "http://other.lab:3000",
    ),
    (
        "registered",
        lambda h: setattr(h, "registration", h.registration.replace("-native", "-old")),
        "nix-cache02-old",
    ),
    ("registered", lambda h: setattr(h, "registration", "@registration\n{{\n"), "not JSON"),
]


@pytest.mark.parametrize(("name", "change", "said"), CASES, ids=[f"{c[0]}: {c[2]}" for c in CASES])
def test_a_check_fails_for_its_reason_and_no_other_fails_with_it(name: str, change: Change, said: str) -> None:
    recorded = RecordedHost()
    change(recorded)
    results = check(recorded)
    assert failures(results) == {name}
    assert said in results[name].detail


def test_an_open_cache_key_fails_as_a_key_and_as_a_secret() -> None:
    recorded = RecordedHost(opened={("read", "/run/secrets/cache-secret")})
    results = check(recorded)
    assert failures(results) == {"cache-key-unreadable", "secrets-unreadable"}
    assert "make a new one" in results["cache-key-unreadable"].detail


@pytest.mark.parametrize("told_by", ["nix", "harmonia"])
def test_a_signing_key_that_the_host_itself_names_is_tried_too(told_by: str) -> None:
    recorded = RecordedHost(opened={("read", "/etc/cache.key")})
    recorded.files["/etc/cache.key"] = "0444 root:root"
    if told_by == "nix":
        recorded.settings += "secret-key-files = /etc/no-such.key /etc/cache.key\n"
    else:
        recorded.cache_units = "/etc/cache.key\n"
    results = check(recorded)
    assert failures(results) == {"cache-key-unreadable"}
    assert "/etc/cache.key (read)" in results["cache-key-unreadable"].detail


def test_nix_is_asked_for_its_settings_once() -> None:
    for settings, fail in ((RecordedHost().settings, set[str]()), ("", {"nix-trust"})):
        recorded = RecordedHost(settings=settings)
        assert failures(check(recorded)) == fail
        assert sum("config show" in " ".join(command.argv) for command in recorded.ran) == 1


def test_a_protected_file_that_is_not_there_has_not_been_shown_to_be_closed() -> None:
    host = inventory_host().model_copy(update={"protected_files": ("/etc/harmonia.key",)})
    results = check(RecordedHost(), host)
    assert failures(results) == {"cache-key-unreadable"}
    assert "no /etc/harmonia.key" in results["cache-key-unreadable"].detail


def test_another_file_of_the_same_name_in_the_runners_mounts_does_not_count() -> None:
    recorded = RecordedHost(opened={("list", "/var/lib/private/gitea-runner")}, identity="43:78")
    assert failures(check(recorded)) == set()


def test_a_group_named_in_trusted_users_is_found() -> None:
    recorded = RecordedHost(groups="builders", settings="trusted-users = root @builders\nallowed-users = *\n")
    results = check(recorded)
    assert failures(results) == {"nix-trust"}
    assert "@builders" in results["nix-trust"].detail


def test_an_accepted_risk_shows_its_reason_and_passes() -> None:
    recorded = RecordedHost(groups="podman")
    put(recorded.other, "User", "gitea-runner-actions2")
    host = inventory_host(accepted_risks={"shared-state": "one team owns both", "container-socket": "by design"})
    results = check(recorded, host)
    assert failures(results) == set()
    assert results["instances-separate"].accepted == "one team owns both"
    assert "shared with actions1" in results["instances-separate"].detail
    assert results["root-groups"].accepted == "by design"


def test_a_reason_does_not_turn_a_boundary_into_a_risk() -> None:
    recorded = RecordedHost(daemon="trusted")
    host = inventory_host(accepted_risks={"nix-trust": "we like it"})
    assert failures(check(recorded, host)) == {"nix-trust"}


def test_stated_risks_are_shown_with_their_reason_or_with_how_to_accept_them() -> None:
    results = check(RecordedHost(), inventory_host(accepted_risks={"shared-store": "they deploy", "own": "ours"}))
    assert results["risk-shared-store"] == CheckResult(
        "risk-shared-store",
        True,
        "a job of a trusted repository can put any derivation into the store, and so into the cache served from it",
        "they deploy",
    )
    assert results["risk-own"].accepted == "ours"
    assert results["risk-host-resources"].accepted is None
    assert "accepted_risks.host-resources" in results["risk-host-resources"].detail
    assert "MemoryMax=1G" in results["risk-host-resources"].detail
    assert "user torjus" in results["risk-wider-scope"].detail


@pytest.mark.parametrize(
    ("broken", "fail"),
    [
        ("listing files", {"approle-closed", "cache-key-unreadable", "secrets-unreadable", "instances-separate"}),
        ("reading the registration", {"registered"}),
        (
            "trying as the runner's user",
            {
                "host-packages",
                "approle-closed",
                "cache-key-unreadable",
                "secrets-unreadable",
                "instances-separate",
                "store-not-writable",
                "nix-trust",
                "store-build",
            },
        ),
    ],
)
def test_a_missing_tool_is_never_a_pass(broken: str, fail: set[str]) -> None:
    results = check(RecordedHost(broken={broken}))
    assert failures(results) == fail
    assert all("could not be decided" in results[name].detail for name in fail)


def test_without_systemd_nothing_but_the_stated_risks_passes() -> None:
    results = check(RecordedHost(broken={"reading the unit"}))
    assert {n for n in results if not n.startswith("risk-")} == failures(results)


def test_a_probe_that_ran_as_somebody_else_proves_nothing() -> None:
    results = check(RecordedHost(probe_uid=1))
    assert "secrets-unreadable" in failures(results)
    assert "proves nothing" in results["secrets-unreadable"].detail


def test_a_unit_that_is_not_there_fails_what_depends_on_it() -> None:
    recorded = RecordedHost()
    recorded.unit = {"LoadState": "not-found", "ActiveState": "inactive", "SubState": "dead", "MainPID": "0"}
    clock = Clock()
    results = check(recorded, clock=clock)
    assert "LoadState=not-found" in results["unit-active"].detail
    assert {"unit-active", "secrets-unreadable", "store-build", "registered", "root-groups"} <= failures(results)
    assert clock.now == 0


def test_an_absent_other_instance_is_said_and_is_no_failure() -> None:
    recorded = RecordedHost()
    recorded.other = {"LoadState": "not-found", "MainPID": "0"}
    results = check(recorded)
    assert failures(results) == set()
    assert "actions1 is not on this host" in results["instances-separate"].detail


def test_a_host_with_a_single_instance_is_fine() -> None:
    assert failures(check(RecordedHost(), inventory_host(other=False))) == set()


def test_a_lost_connection_is_no_set_of_failures() -> None:
    class Going(RecordedHost):
        def run(self, command: Command, on_line: LineSink | None = None) -> Result:
            if command.name == "listing files":
                raise ConnectionLost("nix-cache02 went away")
            return super().run(command, on_line)

    with pytest.raises(ConnectionLost):
        check(Going())


def test_what_a_host_says_is_made_fit_to_print() -> None:
    results = check(RecordedHost(build="failed 1\n\x1b[2Jerror"))
    assert "\\x1b[2Jerror" in results["store-build"].detail


def test_everything_runs_as_root_and_nothing_secret_is_read_back() -> None:
    recorded = RecordedHost()
    check(recorded)
    assert all(command.root for command in recorded.ran)
    for command in recorded.ran:
        text = " ".join(command.argv) + command.stdin_bytes.decode()
        for line in text.splitlines():
            assert "cat --" not in line or "/dev/null" in line


def test_each_result_is_given_as_it_comes() -> None:
    seen: list[CheckResult] = []
    results = verify_runner(
        RecordedHost(), host_name="h", host=inventory_host(), runner_name=NAME, on_check=seen.append
    )
    assert sorted(r.name for r in seen) == sorted(r.name for r in results)


@pytest.mark.parametrize("name", ["actions1", "actions9"])
def test_a_runner_that_is_not_managed_cannot_be_checked(name: str) -> None:
    with pytest.raises(UsageError, match="actions2"):
        planned_checks(inventory_host(), RunnerName(name))


def test_all_that_is_to_be_tried_is_tried_in_one_unit() -> None:
    recorded = RecordedHost()
    results = check(recorded)
    tried = [command for command in recorded.ran if command.name == "trying as the runner's user"]
    assert len(tried) == 1 and failures(results) == set()
    assert tried[0].stdin_bytes.decode().count("timeout -k ") == sum(c.tries for c in CHECKS)


def test_a_trial_without_an_end_fails_its_check_alone() -> None:
    class Stuck(RecordedHost):
        def _probe(self, script: str, args: Sequence[str]) -> str | None:
            return None if "nix-build" in script else super()._probe(script, args)

    results = check(Stuck())
    assert failures(results) == {"store-build"}
    assert "could not be decided" in results["store-build"].detail and "120 s" in results["store-build"].detail
