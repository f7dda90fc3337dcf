"""`invoke deploy-runner` by two operators, each with a journal of their own: one takes over what the other made."""

from __future__ import annotations

from pathlib import Path

from nixops.inventory.model import RunnerModule
from tests.lab.deploying import HOST, deploy, deploys, setting_for, versions
from tests.lab.reaching import wait_for


def test_what_a_killed_deploy_made_stays_once_another_operator_has_deployed_with_it(tmp_path: Path) -> None:
    """The second operator has a journal of their own: they take over the first one's registrations and AppRole.

    Proves that the first operator's next run does not take these from under the running service.
    """
    bounds = {HOST: {"deploy": {"confirm_timeout": 20, "lease_timeout": 3}}}
    with setting_for(tmp_path, "second", module=RunnerModule.FORGEJO, settings=bounds) as setting:
        killed = setting.start("deploy-runner", "--yes")
        wait_for(lambda: len(deploys(setting)) == 1, 60, "the activation begins")
        killed.kill()
        killed.communicate()
        other = tmp_path / "other"

        def second() -> bool:
            done = deploy(setting, environ={"XDG_STATE_HOME": str(other)})
            assert done.code in (0, 6), done
            return done.code == 0

        wait_for(second, 60, "the first operator's lease has ended")
        before = setting.snapshot(), versions(setting), deploys(setting)
        first = deploy(setting, "--format", "json")
        assert first.code == 0 and first.document["outcome"] == "unchanged", first
        assert "left as it is" in first.err and (setting.snapshot(), versions(setting), deploys(setting)) == before
        assert "killed" not in deploy(setting).err
