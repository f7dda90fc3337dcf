"""Exit 7, on a real host: neither generation can be had, or nobody knows which one it is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from nixops.lab.setting import Setting
from tests.lab.deploying import change, the_host
from tests.lab.transacting import BOUNDS, came_up, configure, deploy, deployed, note, started


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    yield from deployed(tmp_path_factory)


def test_a_failed_roll_back_ends_with_7_and_says_what_to_do(setting: Setting) -> None:
    """Neither generation can be activated: exit 7, never 4, with the command to run by hand."""
    configure(setting, "lab.failingUnit = true;")
    setting.host.exec("sh", "-c", "mkdir -p /run/nixos; echo 2 >/run/nixos/lab-activation-exit")
    before = setting.snapshot()
    done = deploy(setting)
    assert done.code == 7 and "switch-to-configuration test" in done.err and "act now" in done.err, done
    assert setting.boot_default() == before["boot default"]
    # Mended by hand, as the message says; then everything is as it was.
    setting.host.exec("rm", "/run/nixos/lab-activation-exit")
    setting.host.exec(f"{before['running']}/bin/switch-to-configuration", "test")
    configure(setting, "")
    again = deploy(setting)
    assert again.code == 0 and setting.running() == before["running"], again


def test_a_host_that_never_comes_back_ends_with_7(setting: Setting) -> None:
    """Power loss without a return: nobody knows what it runs, and that is said; the next run takes up from there."""
    # The operator waits for as long as the host might take to decide: half a minute more than all of its bounds.
    short = {"activation_timeout": 10, "confirm_timeout": 10}
    change(setting, lambda d: the_host(d)["deploy"].update(short))
    configure(setting, note("gone"))
    running = setting.running()
    process = started(setting, "awaiting-confirm")
    setting.host.power_off()
    _, err = process.communicate(timeout=240)
    setting.host.power_on()
    came_up(setting)
    assert process.returncode == 7 and "did not say within 70 s" in err, err
    change(setting, lambda d: the_host(d)["deploy"].update(BOUNDS["deploy"]))
    configure(setting, "")
    done = deploy(setting)
    assert done.code == 0 and "deploy" in done.err and setting.running() == running, done
