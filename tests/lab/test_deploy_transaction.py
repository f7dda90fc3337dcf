"""What goes wrong in the activation itself, on a real host: it goes back, and what went wrong is said."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from nixops.lab.setting import Setting
from tests.lab.deploying import change, the_host
from tests.lab.transacting import BOUNDS, configure, deploy, deployed, unchanged


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    yield from deployed(tmp_path_factory)


@pytest.fixture
def before(setting: Setting) -> Iterator[dict[str, str]]:
    yield from unchanged(setting)


def test_an_activation_that_fails_is_rolled_back(setting: Setting, before: dict[str, str]) -> None:
    """switch-to-configuration ends with 3: exit 4, the host is back, its boot default never moved."""
    configure(setting, "lab.activationFails = 3;")
    done = deploy(setting, "--format", "json")
    assert done.code == 4, done
    result = done.document["hosts"][0]
    assert done.document["outcome"] == "rolled-back" == result["outcome"] and "ended with 3" in result["error"]


def test_a_unit_that_fails_is_rolled_back(setting: Setting, before: dict[str, str]) -> None:
    """Activated, but units failed: exit 4, and the unit's own words are shown."""
    configure(setting, "lab.failingUnit = true;")
    done = deploy(setting)
    assert done.code == 4 and "this unit fails on purpose" in done.err, done


def test_an_activation_that_hangs_is_rolled_back_after_its_time(setting: Setting, before: dict[str, str]) -> None:
    """It runs past deploy.activation_timeout."""
    change(setting, lambda d: the_host(d)["deploy"].update(activation_timeout=12))
    configure(setting, "lab.activationHangs = true;")
    done = deploy(setting)
    change(setting, lambda d: the_host(d)["deploy"].update(BOUNDS["deploy"]))
    assert done.code == 4 and "12 s" in done.err, done


def test_failed_checks_roll_back(setting: Setting, before: dict[str, str]) -> None:
    """The generation activates well, but makes every user trusted: a check says no, and the host goes back."""
    configure(setting, 'nix.settings.trusted-users = [ "root" "*" ];')
    done = deploy(setting)
    assert done.code == 4 and "nix-trust" in done.err, done


def test_a_boot_loader_that_silently_does_nothing_is_not_believed(setting: Setting, before: dict[str, str]) -> None:
    """switch-to-configuration boot ends with 0 and changed nothing (nixpkgs#189966): the commit is undone."""
    configure(setting, "lab.bootloaderSilentlyFails = true;")
    done = deploy(setting)
    assert done.code == 4 and "boot loader" in done.err, done
    links = (
        setting.host.exec("sh", "-c", "ls -dv /nix/var/nix/profiles/system-*-link | xargs readlink -f")
        .stdout.decode()
        .split()
    )
    assert links[-1] == before["profile"], "the generation that lost would be offered in the boot menu"
