"""Asking a flake: a small one of our own for each answer, and the lab's, which is shaped like a user's."""

from __future__ import annotations

import subprocess
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from nixops.errors import BuildFailed, HostFault, UsageError
from nixops.inventory.load import load
from nixops.inventory.model import RunnerModule, SecretFlavour
from nixops.lab.userrepo import Imports, LabHostFacts, UserRepo, make_user_repo
from nixops.nix.verbs import Nix
from nixops.render.flake import FlakeAnswer, check_flake, flake_reference, overlay
from nixops.render.literal import Language
from nixops.render.managed import FilePlan, FileStatus, apply_files, plan_files, undo_files
from nixops.render.runner import render_runner
from nixops.transport.local import LocalRunner
from nixops.values import HostName
from tests.unit.render_inventory import ACTIONS2, HOST, facts, forgejo, inventory

# There is no network to ask substituters over.
LOCAL = LocalRunner(env={"NIX_CONFIG": "substituters =\nsandbox = false", "LC_ALL": "C"})
NIX = Nix(LOCAL)
TOPLEVEL = "/nix/store/00000000000000000000000000000000-nixos-system-nix-cache02"

# A flake whose host has what its modules say, as far as our question goes. MODULES are imported, in order.
FLAKE = """
{
  outputs = { self }:
    let
      package = name: {
        inherit name;
        type = "derivation";
        outPath = "/nix/store/00000000000000000000000000000000-${name}";
      };
      pkgs = builtins.listToAttrs (map (name: { inherit name; value = package name; }) [
        "bash" "coreutils" "curl" "gawk" "gitMinimal" "gnused" "nodejs" "wget" "nix" "openbao"
      ]) // { writeText = name: text: text; writeShellScript = name: text: name; };
      merge = a: b: a // builtins.mapAttrs (n: v:
        if builtins.isAttrs v && builtins.isAttrs (a.${n} or null) then merge a.${n} v else v) b;
      modules = map (m: m { inherit pkgs; lib.mkForce = v: v; }) [ MODULES ];
    in {
      hasRev = self ? rev;
      nixosConfigurations.nix-cache02 = {
        inherit pkgs;
        config = builtins.foldl' merge {
          services = { gitea-actions-runner.instances = { }; };
          system.build.toplevel.outPath = "TOPLEVEL";
        } modules;
      };
    };
}
"""


@pytest.fixture(autouse=True)
def _no_settings_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(tmp_path / "gitconfig"))
    (tmp_path / "gitconfig").write_text("[user]\nname = Test\nemail = test@example\n", encoding="utf-8")


def git(root: Path, *args: str) -> str:
    return subprocess.run(["git", "-C", root, *args], capture_output=True, text=True, check=True).stdout


def make_flake(root: Path, *modules: str) -> Path:
    root.mkdir(exist_ok=True)
    text = FLAKE.replace("MODULES", " ".join(f"({m})" for m in modules)).replace("TOPLEVEL", TOPLEVEL)
    (root / "flake.nix").write_text(text, encoding="utf-8")
    return root


OURS = "import ./hosts/nix-cache02/nixops-actions2.nix"


def ask(root: Path, document: Any = None, *, git: bool = False) -> FlakeAnswer:
    document = document or inventory()
    return check_flake(NIX, root, document, HOST, ACTIONS2, facts(), git=git)


def with_ours(root: Path, document: Any = None) -> Path:
    apply_files(
        root, plan_files(root, render_runner(document or inventory(), HOST, ACTIONS2, facts()), adopt=False), LOCAL
    )
    return root


def test_a_flake_with_our_module_answers_with_its_toplevel(tmp_path: Path) -> None:
    root = with_ours(make_flake(tmp_path / "flake", OURS))
    answer = ask(root)
    assert answer.toplevel == TOPLEVEL
    assert answer.installable.endswith("#nixosConfigurations.nix-cache02.config.system.build.toplevel")


def test_a_module_that_nobody_imports_is_told_with_the_missing_line(tmp_path: Path) -> None:
    root = with_ours(make_flake(tmp_path / "flake"))
    with pytest.raises(UsageError) as caught:
        ask(root)
    assert "hosts/nix-cache02/nixops-actions2.nix" in str(caught.value)
    assert "imports = [ ./nixops-actions2.nix ];" in str(caught.value)
    (root / "hosts/nix-cache02/default.nix").write_text("{ }", encoding="utf-8")
    with pytest.raises(UsageError, match=r"hosts/nix-cache02/default\.nix"):
        ask(root)


def test_a_flake_whose_nixpkgs_lacks_the_module_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"services\.forgejo-runner"):
        ask(make_flake(tmp_path / "flake"), inventory(forgejo()))


def test_other_values_are_listed_as_attribute_wanted_and_found(tmp_path: Path) -> None:
    theirs = (
        "_: { services.gitea-actions-runner.instances.actions2 = { labels = [ ''native:host'' ''x:host'' ]; enable = 1;"
        ' tokenFile = /run/secrets/forgejo-runner-token-native; settings.runner.capacity = "4"; hostPackages = [ ]; };'
        " systemd.services.gitea-runner-actions2.serviceConfig = { MemoryMax = ''1G''; CPUQuota = x: x; }; }"
    )
    root = with_ours(make_flake(tmp_path / "flake", OURS, theirs))
    with pytest.raises(UsageError) as caught:
        ask(root)
    lines = (caught.value.detail or "").split("\n")
    instance = "services.gitea-actions-runner.instances.actions2"
    assert f'{instance}.labels: wanted ["native:host"], found ["native:host", "x:host"]' in lines
    assert f"{instance}.enable: wanted true, found 1" in lines
    assert f'{instance}.settings.runner.capacity: wanted 4, found "4"' in lines
    assert any(line.startswith(f'{instance}.hostPackages: wanted ["bash", "coreutils"') for line in lines)
    assert 'systemd.services.gitea-runner-actions2.serviceConfig.MemoryMax: wanted "16G", found "1G"' in lines
    assert any("CPUQuota" in line and "a function" in line for line in lines)
    assert not any("tokenFile" in line for line in lines), "a path and its text are the same file"


def test_a_hand_written_instance_of_the_same_name_is_no_substitute_for_ours(tmp_path: Path) -> None:
    theirs = "_: { services.gitea-actions-runner.instances.actions2.enable = true; }"
    with pytest.raises(UsageError) as caught:
        ask(make_flake(tmp_path / "flake", theirs))
    assert 'MemoryMax: wanted "16G", found nothing' in str(caught.value)


def test_a_flake_that_does_not_evaluate_is_a_failed_build_with_nix_s_words(tmp_path: Path) -> None:
    with pytest.raises(BuildFailed, match="on purpose"):
        ask(make_flake(tmp_path / "flake", "_: throw ''on purpose''"))


def test_a_toplevel_that_is_no_store_path_is_refused(tmp_path: Path) -> None:
    theirs = "_: { system.build.toplevel.outPath = ''/etc''; }"
    with pytest.raises(BuildFailed, match="store path"):
        ask(with_ours(make_flake(tmp_path / "flake", OURS, theirs)))


def test_everything_is_asked_in_one_evaluation(tmp_path: Path) -> None:
    class Counting:
        def __init__(self) -> None:
            self.calls = 0

        def eval_json(self, installable: str, *, apply: str | None = None, timeout: float = 300.0) -> Any:
            self.calls += 1
            return NIX.eval_json(installable, apply=apply, timeout=timeout)

    counting = Counting()
    root = with_ours(make_flake(tmp_path / "flake", OURS))
    check_flake(counting, root, inventory(), HOST, ACTIONS2, facts(), git=False)
    assert counting.calls == 1


def test_through_git_only_what_git_knows_is_seen(tmp_path: Path) -> None:
    root = make_flake(tmp_path / "flake", OURS)
    git(root, "init", "-q")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "base")
    with_ours(root)
    assert ask(root, git=True).toplevel == TOPLEVEL, "known by intent is enough"
    git(root, "reset", "-q")
    with pytest.raises(BuildFailed):
        ask(root, git=True)


@pytest.mark.parametrize("name", ["a b", "a#b", "a?b", "a%20b", "ä", "a'b", "a\nb"])
def test_a_checkout_whose_name_nix_would_misread_is_refused(tmp_path: Path, name: str) -> None:
    root = make_flake(tmp_path / name, OURS)
    for through_git in (False, True):
        with pytest.raises(UsageError, match="cannot be named"):
            ask(root, git=through_git)


def test_a_checkout_may_have_dots_and_other_harmless_characters(tmp_path: Path) -> None:
    root = with_ours(make_flake(tmp_path / "nixos-servers.v2_a~b+c,d=e@f", OURS))
    assert ask(root).toplevel == TOPLEVEL


def test_a_flake_below_the_top_of_its_checkout_is_named_with_its_directory(tmp_path: Path) -> None:
    top = tmp_path / "top"
    top.mkdir()
    root = make_flake(top / "nixos", OURS, "import ../shared.nix")
    (top / "shared.nix").write_text("_: { }", encoding="utf-8")
    git(top, "init", "-q")
    git(top, "add", "-A")
    git(top, "commit", "-qm", "base")
    assert flake_reference(root, git=True) == f"git+file://{top}?dir=nixos"
    plans = plan_files(root, render_runner(inventory(), HOST, ACTIONS2, facts()), adopt=False)
    with overlay(root, plans, LOCAL) as tree:
        assert tree.name == "nixos"
        assert ask(tree).toplevel == TOPLEVEL, "the shared file beside the flake is in the copy too"
        assert NIX.eval_json(flake_reference(tree, git=False) + "#hasRev") is False


# -- the copy ---------------------------------------------------------------------------------------------------------


def plan(path: str, before: str | None, after: str | None) -> FilePlan:
    return FilePlan(PurePosixPath(path), FileStatus.CHANGED, Language.NIX, before, after, "")


def test_the_copy_holds_what_git_tracks_as_it_is_now_and_our_files(tmp_path: Path) -> None:
    root = tmp_path / "checkout"
    (root / "dir").mkdir(parents=True)
    for name in ("a.nix", "dir/b.nix", "deleted.nix", "ours.nix", "gone.nix"):
        (root / name).write_text("old", encoding="utf-8")
    (root / "run.sh").write_text("x", encoding="utf-8")
    (root / "run.sh").chmod(0o755)
    (root / "link").symlink_to("a.nix")
    (root / ".gitignore").write_text("result\n", encoding="utf-8")
    git(root, "init", "-q")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "base")
    (root / "a.nix").write_text("edited", encoding="utf-8")
    (root / "deleted.nix").unlink()
    (root / "untracked.nix").write_text("x", encoding="utf-8")
    (root / "result").write_text("x", encoding="utf-8")
    (root / "intended.nix").write_text("x", encoding="utf-8")
    git(root, "add", "-N", "intended.nix")
    before = git(root, "status", "--porcelain")
    files = [plan("new/ours.nix", None, "new"), plan("ours.nix", "old", "new"), plan("gone.nix", "old", None)]
    with overlay(root, files, LOCAL) as tree:
        found = {str(p.relative_to(tree)) for p in tree.rglob("*") if not p.is_dir()}
        assert found == {
            "a.nix",
            "dir/b.nix",
            "run.sh",
            "link",
            ".gitignore",
            "intended.nix",
            "new/ours.nix",
            "ours.nix",
        }
        assert (tree / "a.nix").read_text() == "edited"
        assert (tree / "ours.nix").read_text() == "new"
        assert (tree / "link").is_symlink()
        assert (tree / "run.sh").stat().st_mode & 0o111
        assert tree.parent.stat().st_mode & 0o077 == 0
        place = tree
    assert not place.exists()
    assert git(root, "status", "--porcelain") == before
    assert (root / "ours.nix").read_text() == "old"


def test_the_copy_is_gone_after_an_error_too(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    seen = []
    with pytest.raises(RuntimeError), overlay(tmp_path / "x", [], LOCAL) as tree:
        seen.append(tree)
        raise RuntimeError
    assert not seen[0].exists()


def test_without_git_the_copy_holds_every_file(tmp_path: Path) -> None:
    root = tmp_path / "plain"
    root.mkdir()
    (root / "a.nix").write_text("x", encoding="utf-8")
    with overlay(root, [plan("b.nix", None, "y")], LOCAL) as tree:
        assert {p.name for p in tree.iterdir()} == {"a.nix", "b.nix"}


def test_a_checkout_that_cannot_be_copied_is_told(tmp_path: Path) -> None:
    with pytest.raises(HostFault, match="copy"), overlay(tmp_path / "absent", [], LOCAL):
        pass


# -- the lab's flake --------------------------------------------------------------------------------------------------


def user_repo(directory: Path, **options: Any) -> UserRepo:
    key = directory / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    public = " ".join(key.with_suffix(".pub").read_text().split()[:2])
    host = LabHostFacts(HostName("nix-cache02"), "192.0.2.2", public, key)
    return make_user_repo(
        directory,
        hosts=[host],
        forge_url="http://192.0.2.1:3000",
        bao_address="http://192.0.2.1:8200",
        local=LOCAL,
        **options,
    )


@pytest.mark.parametrize("secret", list(SecretFlavour))
@pytest.mark.parametrize("module", list(RunnerModule))
def test_a_users_flake_takes_every_flavour_and_gets_its_checkout_back(
    tmp_path: Path, module: RunnerModule, secret: SecretFlavour
) -> None:
    """The rendered module has the options that a module system checks, and evaluates to our values."""
    repo = user_repo(tmp_path, module=module, secret=secret)
    document = load(repo.inventory_file).inventory
    plans = plan_files(repo.path, render_runner(document, HOST, ACTIONS2, facts()), adopt=False)
    with overlay(repo.path, plans, LOCAL) as tree:
        planned = ask(tree, document)
    assert repo.git("status", "--porcelain") == ""
    with pytest.raises(UsageError, match="imports"):
        ask(repo.path, document, git=True)
    undo = apply_files(repo.path, plans, LOCAL)
    assert ask(repo.path, document, git=True).toplevel == planned.toplevel
    undo_files(repo.path, undo, LOCAL)
    assert repo.git("status", "--porcelain") == ""


def test_a_users_flake_without_the_imports_line_is_told_where_it_belongs(tmp_path: Path) -> None:
    repo = user_repo(tmp_path, imports=Imports.NONE)
    document = load(repo.inventory_file).inventory
    plans = plan_files(repo.path, render_runner(document, HOST, ACTIONS2, facts()), adopt=False)
    with overlay(repo.path, plans, LOCAL) as tree, pytest.raises(UsageError) as caught:
        ask(tree, document)
    assert caught.value.hint == "add this line to hosts/nix-cache02/default.nix: imports = [ ./nixops-actions2.nix ];"


def test_a_users_override_of_our_limit_is_found(tmp_path: Path) -> None:
    override = 'systemd.services.gitea-runner-actions2.serviceConfig.MemoryMax = lib.mkForce "1G";'
    repo = user_repo(tmp_path, host_nix={"nix-cache02": override})
    document = load(repo.inventory_file).inventory
    plans = plan_files(repo.path, render_runner(document, HOST, ACTIONS2, facts()), adopt=False)
    with overlay(repo.path, plans, LOCAL) as tree, pytest.raises(UsageError, match="MemoryMax"):
        ask(tree, document)
