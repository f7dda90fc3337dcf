"""`invoke deploy-runner` and the user's checkout: what is committed, edited by hand, taken over, changed."""

from __future__ import annotations

from pathlib import Path

from nixops.lab.setting import TRUSTED, Setting
from tests.lab.deploying import (
    HOST,
    TOKEN,
    call,
    change,
    deploy,
    deployed,
    is_unchanged,
    planned,
    runs_a_job,
    setting_for,
    the_runner,
    versions,
)

MODULE = f"hosts/{HOST}/nixops-actions2.nix"
FILES = {MODULE, *(f"workflows/{repo}/.forgejo/workflows/nixops-actions2.yml" for repo in TRUSTED)}


def test_what_is_committed_edited_adopted_and_limited(tmp_path: Path) -> None:
    """One checkout through its life: --commit, a new revision, an edit by hand, --adopt, another limit.

    Proves that only the rendered files are committed, that a toplevel which differs by its revision alone is shown
    as such and not activated, that an edit by hand is never replaced unasked, and that a changed limit changes that
    limit and nothing of the registration.
    """
    with setting_for(tmp_path, "life") as setting:
        git = setting.repo.git
        (setting.repo.path / "README.md").write_text("not committed\n")
        (setting.repo.path / "staged.txt").write_text("staged\n")
        git("add", "staged.txt")
        result = deployed(setting, "--commit")
        assert set(git("show", "--name-only", "--format=", "HEAD").split()) == FILES
        assert git("status", "--porcelain").splitlines() == ["A  staged.txt", "?? README.md"]
        git("rm", "-q", "--cached", "staged.txt")
        # The tree is clean now, so the toplevel has a revision, which the one that runs has not.
        (setting.repo.path / "staged.txt").unlink()
        only_the_revision_differs(setting, result["to"])
        registration = setting.snapshot()["forgejo"], versions(setting)

        module = setting.repo.path / MODULE
        module.write_text(module.read_text().replace('"16G"', '"1G"'))
        before = setting.snapshot()
        done = deploy(setting)
        assert done.code == 2 and MODULE in done.err and "--adopt" in done.err, done
        assert '-      MemoryMax = "1G";' in done.err and '+      MemoryMax = "16G";' in done.err, done
        assert setting.snapshot() == before
        # What is taken over is what ran before the edit.
        assert deployed(setting, "--adopt")["to"] == result["to"]

        change(setting, lambda d: the_runner(d)["limits"].update(MemoryMax="2G"))
        plan = planned(setting)
        (file,) = [f for f in plan["files"] if f["status"] != "unchanged"]
        changed = [x for x in file["diff"].splitlines() if x[:1] in "+-" and "sha256=" not in x][2:]
        assert changed == ['-      MemoryMax = "16G";', '+      MemoryMax = "2G";'], file["diff"]
        assert [s["action"] for s in plan["secrets"]] == ["keep"] and not plan["host_role"]["changes"]
        deployed(setting)
        assert (
            setting.host.exec("systemctl", "show", "-P", "MemoryMax", "gitea-runner-actions2").stdout == b"2147483648\n"
        )
        assert (setting.snapshot()["forgejo"], versions(setting)) == registration
        runs_a_job(setting, TRUSTED[0])

        # --commit holds for what an earlier run left uncommitted, and a refusal does not unsay the deploy.
        hook = setting.repo.path / ".git/hooks/pre-commit"
        hook.write_text("#!/bin/sh\necho not on a Friday >&2; exit 1\n")
        hook.chmod(0o755)
        done = deploy(setting, "--commit", "--format", "json")
        assert done.code == 1 and done.document["outcome"] == "unchanged" and "not on a Friday" in done.err, done
        hook.unlink()
        assert deploy(setting, "--commit").code == 0
        assert git("show", "--name-only", "--format=", "HEAD") == MODULE

        # Deployed from a clean tree, the running system has a revision; the next commit gives it another.
        setting.repo.configure(HOST, 'environment.etc."note".text = "of a clean tree";')
        result = deployed(setting)
        assert (
            git("rev-parse", "HEAD")
            == setting.host.exec("nixos-version", "--configuration-revision").stdout.decode().strip()
        )
        git("commit", "-q", "--allow-empty", "-m", "Nothing of the hosts")
        only_the_revision_differs(setting, result["to"])

        # What was changed on the host behind our back is a matter of the checks; still one document.
        setting.host.exec("chmod", "0444", f"/run/secrets/{TOKEN}")
        done = deploy(setting, "--format", "json")
        assert done.code == 5 and "secret-files" in done.document["hosts"][0]["error"], done


def only_the_revision_differs(setting: Setting, running: str) -> None:
    """The flake's toplevel is another one, is said to differ by the revision alone, and is not activated."""
    done = call(setting, "deploy-runner", "--plan")
    assert done.code == 0 and "only by the checkout's revision" in done.out, done
    assert "There is nothing to do." in done.out and running not in done.out, done
    assert is_unchanged(setting).document["hosts"][0]["to"] == running
