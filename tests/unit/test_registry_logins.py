"""Where a login comes from: the inventory, docker's and podman's files, and the helpers that they name."""

from __future__ import annotations

import base64
import json
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nixops.errors import NixopsError, SecretUnavailable, UsageError
from nixops.inventory.building import Registry
from nixops.inventory.fields import SecretRef
from nixops.registry.login import Login
from nixops.registry.logins import login_for
from nixops.secret import Redactor, Secret
from nixops.transport.local import LocalRunner
from nixops.values import RegistryName

NAME = RegistryName("registry.example.org:5000")
DOCKER = RegistryName("docker.io")
PASSWORD = "correct:horse-battery"  # with a colon, which belongs to it


def never(ref: SecretRef) -> Secret:
    raise AssertionError(f"{ref.describe()} was read")


def asking(
    base: Path,
    settings: Registry | None = None,
    *,
    registry: RegistryName = NAME,
    environ: dict[str, str] | None = None,
    resolve: Callable[[SecretRef], Secret] = never,
    redactor: Redactor | None = None,
) -> Callable[[], Login | None]:
    return login_for(
        registry,
        settings,
        environ={"HOME": str(base / "home"), "XDG_RUNTIME_DIR": str(base / "run")} if environ is None else environ,
        base=base,
        resolve=resolve,
        local=LocalRunner(env={"PATH": f"{base}:/usr/bin:/bin"}),
        redactor=redactor,
    )


def pair(user: str = "ci", password: str = PASSWORD) -> str:
    return base64.b64encode(f"{user}:{password}".encode()).decode()


def write(file: Path, document: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(document if isinstance(document, str) else json.dumps(document))
    return file


def helper(base: Path, name: str, script: str) -> None:
    file = write(base / f"docker-credential-{name}", f"#!/bin/sh\n{script}\n")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)


# -- what a build that does not push loads ---------------------------------------------------------------------


@pytest.mark.parametrize("module", ["login", "logins", "manifest", "index"])
def test_what_does_not_speak_to_a_registry_loads_nothing_that_does(module: str) -> None:
    code = f"import sys, nixops.registry.{module}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"requests", "urllib3", "boto3", "botocore", "cryptography"} & set(loaded)


# -- the value ------------------------------------------------------------------------------------------------


def test_a_login_shows_its_password_nowhere() -> None:
    login = Login("ci", Secret(PASSWORD))
    assert PASSWORD not in f"{login!r} {login} {login.basic()} {login.auth_file(NAME)}"


def test_the_file_for_the_builder_holds_this_registry_alone() -> None:
    assert json.loads(Login("ci", Secret(PASSWORD)).auth_file(NAME).reveal()) == {
        "auths": {"registry.example.org:5000": {"auth": pair()}}
    }
    identity = Login("ci", Secret("identity-token"), identity=True)
    assert json.loads(identity.auth_file(NAME).reveal()) == {
        "auths": {"registry.example.org:5000": {"auth": pair("ci", ""), "identitytoken": "identity-token"}}
    }


# -- the inventory --------------------------------------------------------------------------------------------


def test_user_and_password_of_the_inventory_win_and_are_read_once(tmp_path: Path) -> None:
    write(tmp_path / "home/.docker/config.json", {"auths": {NAME: {"auth": pair("other")}}})
    read: list[SecretRef] = []

    def resolve(ref: SecretRef) -> Secret:
        read.append(ref)
        time.sleep(0.05)
        return Secret(PASSWORD)

    redactor = Redactor()
    settings = Registry(user="ci", password=SecretRef(env="TOKEN"))
    login = asking(tmp_path, settings, resolve=resolve, redactor=redactor)
    assert read == [], "nothing is read before it is asked for"
    threads = [threading.Thread(target=login) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert login() == Login("ci", Secret(PASSWORD))
    assert read == [SecretRef(env="TOKEN")]
    assert redactor.clean(PASSWORD) == "***"


def test_a_named_docker_configuration_is_relative_to_the_inventory(tmp_path: Path) -> None:
    write(tmp_path / "docker.json", {"auths": {NAME: {"auth": pair()}}})
    assert asking(tmp_path, Registry(docker_config="docker.json"))() == Login("ci", Secret(PASSWORD))


@pytest.mark.parametrize(
    ("document", "words"), [(None, "no such file"), ({"auths": {"other": {"auth": pair()}}}, "no login for registry")]
)
def test_a_named_docker_configuration_that_has_no_login_is_the_users_error(
    tmp_path: Path, document: Any, words: str
) -> None:
    if document is not None:
        write(tmp_path / "docker.json", document)
    with pytest.raises(UsageError, match=words) as caught:
        asking(tmp_path, Registry(docker_config="docker.json"))()
    assert "docker --config" in str(caught.value.hint)


# -- the usual places -----------------------------------------------------------------------------------------

PLACES = [
    ("REGISTRY_AUTH_FILE", "mine.json"),
    ("XDG_RUNTIME_DIR", "run/containers/auth.json"),
    ("HOME", "home/.config/containers/auth.json"),
    ("DOCKER_CONFIG", "docker/config.json"),
]
ENVIRON = {"REGISTRY_AUTH_FILE": "mine.json", "XDG_RUNTIME_DIR": "run", "HOME": "home", "DOCKER_CONFIG": "docker"}


def test_the_usual_places_are_looked_at_in_the_order_of_podman_and_docker(tmp_path: Path) -> None:
    environ = {key: str(tmp_path / value) for key, value in ENVIRON.items()}
    for _, place in PLACES:
        write(tmp_path / place, {"auths": {NAME: {"auth": pair(place.replace("/", "_"))}}})
    for _, place in PLACES:
        login = asking(tmp_path, environ=environ)()
        assert login is not None
        assert login.user == place.replace("/", "_")
        (tmp_path / place).unlink()
    assert asking(tmp_path, environ=environ)() is None, "then it is anonymous"


def test_without_a_variable_of_its_own_dockers_directory_is_in_the_home(tmp_path: Path) -> None:
    write(tmp_path / "home/.docker/config.json", {"auths": {NAME: {"auth": pair()}}})
    assert asking(tmp_path)() == Login("ci", Secret(PASSWORD))
    assert asking(tmp_path, environ={})() is None, "without a home there is none"


def test_a_place_without_a_login_for_this_registry_leaves_it_to_the_next(tmp_path: Path) -> None:
    write(tmp_path / "run/containers/auth.json", {"auths": {"other.example.org": {"auth": pair("other")}}})
    write(tmp_path / "home/.docker/config.json", {"auths": {NAME: {"auth": pair()}}})
    assert asking(tmp_path)() == Login("ci", Secret(PASSWORD))


@pytest.mark.parametrize(
    "key", [NAME, f"https://{NAME}", f"http://{NAME}", f"https://{NAME}/", f"https://{NAME}/v1/", f"https://{NAME}/v2/"]
)
def test_a_registry_is_found_under_each_form_of_its_name(tmp_path: Path, key: str) -> None:
    write(tmp_path / "home/.docker/config.json", {"auths": {key: {"auth": pair()}}})
    assert asking(tmp_path)() == Login("ci", Secret(PASSWORD))


@pytest.mark.parametrize("key", ["https://index.docker.io/v1/", "docker.io", "index.docker.io", "registry-1.docker.io"])
def test_docker_io_is_found_under_the_names_that_it_has(tmp_path: Path, key: str) -> None:
    write(tmp_path / "home/.docker/config.json", {"auths": {key: {"auth": pair()}}})
    assert asking(tmp_path, registry=DOCKER)() == Login("ci", Secret(PASSWORD))


@pytest.mark.parametrize("key", ["registry.example.org", f"{NAME}1", f"evil.{NAME}", f"{NAME}/team/app", "https://"])
def test_another_registrys_login_is_never_taken(tmp_path: Path, key: str) -> None:
    write(tmp_path / "home/.docker/config.json", {"auths": {key: {"auth": pair()}}})
    assert asking(tmp_path)() is None


@pytest.mark.parametrize(
    ("entry", "login"),
    [
        ({"auth": pair()}, Login("ci", Secret(PASSWORD))),
        ({"username": "ci", "password": PASSWORD}, Login("ci", Secret(PASSWORD))),
        ({"auth": pair("ci", PASSWORD + "\0\0")}, Login("ci", Secret(PASSWORD))),
        ({"auth": pair("0000", ""), "identitytoken": "idt-1"}, Login("0000", Secret("idt-1"), identity=True)),
        ({"identitytoken": "idt-1"}, Login("<token>", Secret("idt-1"), identity=True)),
        ({}, None),
        ({"auth": pair("ci", "")}, None),
        ({"email": "ci@example.org"}, None),
    ],
)
def test_each_form_of_an_entry_is_read(tmp_path: Path, entry: Any, login: Login | None) -> None:
    write(tmp_path / "home/.docker/config.json", {"auths": {NAME: entry}})
    assert asking(tmp_path)() == login


@pytest.mark.parametrize(
    "document",
    [
        "{ hidden-secret",
        '["hidden-secret"]',
        "[" * 100_000,
        " " * (1 << 20) + "{}",
        {"auths": ["hidden-secret"]},
        {"credHelpers": "hidden-secret"},
        {"credsStore": ["hidden-secret"]},
        {"auths": {NAME: "hidden-secret"}},
        {"auths": {NAME: {"auth": "hidden-secret!"}}},
        {"auths": {NAME: {"auth": base64.b64encode(b"hidden-secret").decode()}}},
        {"auths": {NAME: {"auth": base64.b64encode(b"\xff\xfe:").decode()}}},
        {"credsStore": "../../bin/hidden-secret"},
    ],
)
def test_a_file_that_cannot_be_read_is_named_and_not_quoted(tmp_path: Path, document: Any) -> None:
    file = write(tmp_path / "home/.docker/config.json", document)
    with pytest.raises(UsageError) as caught:
        asking(tmp_path)()
    assert str(file) in str(caught.value)
    assert "hidden" not in str(caught.value)


def test_a_directory_in_the_place_of_the_file_is_the_users_error(tmp_path: Path) -> None:
    (tmp_path / "home/.docker/config.json").mkdir(parents=True)
    with pytest.raises(UsageError, match="cannot be read"):
        asking(tmp_path)()


# -- helpers --------------------------------------------------------------------------------------------------


def test_a_helper_is_asked_on_its_stdin_and_never_on_its_command_line(tmp_path: Path) -> None:
    answer = json.dumps({"ServerURL": NAME, "Username": "ci", "Secret": PASSWORD})
    helper(tmp_path, "lab", f"echo \"$@\" > {tmp_path}/args; cat > {tmp_path}/stdin; echo '{answer}'")
    write(tmp_path / "home/.docker/config.json", {"credHelpers": {NAME: "lab"}, "auths": {NAME: {"auth": pair("old")}}})
    assert asking(tmp_path)() == Login("ci", Secret(PASSWORD))
    assert (tmp_path / "args").read_text() == "get\n"
    assert (tmp_path / "stdin").read_text() == NAME


def test_the_store_for_all_is_asked_where_the_registry_has_no_helper_of_its_own(tmp_path: Path) -> None:
    answer = json.dumps({"Username": "ci", "Secret": PASSWORD})
    helper(tmp_path, "all", f"echo '{answer}'")
    helper(tmp_path, "other", "exit 9")
    write(tmp_path / "home/.docker/config.json", {"credsStore": "all", "credHelpers": {"x.example.org": "other"}})
    assert asking(tmp_path)() == Login("ci", Secret(PASSWORD))


def test_the_store_is_asked_for_docker_io_by_the_name_that_docker_uses(tmp_path: Path) -> None:
    helper(tmp_path, "all", f'cat > {tmp_path}/stdin; echo \'{{"Username":"ci","Secret":"x"}}\'')
    write(tmp_path / "home/.docker/config.json", {"credsStore": "all"})
    assert asking(tmp_path, registry=DOCKER)() == Login("ci", Secret("x"))
    assert (tmp_path / "stdin").read_text() == "https://index.docker.io/v1/"


def test_an_identity_token_of_a_helper_is_one(tmp_path: Path) -> None:
    helper(tmp_path, "lab", 'echo \'{"Username":"<token>","Secret":"idt-1"}\'')
    write(tmp_path / "home/.docker/config.json", {"credHelpers": {NAME: "lab"}})
    assert asking(tmp_path)() == Login("<token>", Secret("idt-1"), identity=True)


def test_a_helper_that_has_nothing_leaves_it_to_the_file(tmp_path: Path) -> None:
    helper(tmp_path, "lab", "echo 'credentials not found in native keychain'; exit 1")
    document: dict[str, Any] = {"credHelpers": {NAME: "lab"}}
    write(tmp_path / "home/.docker/config.json", document)
    assert asking(tmp_path)() is None
    write(tmp_path / "home/.docker/config.json", {**document, "auths": {NAME: {"auth": pair()}}})
    assert asking(tmp_path)() == Login("ci", Secret(PASSWORD))


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (None, "cannot be started"),
        ("echo hidden-secret; echo hidden-secret >&2; exit 3", "failed with exit code 3"),
        ("echo hidden-secret", "says nothing that can be read"),
        ('echo \'{"Username":"ci"}\'', "says nothing that can be read"),
        ('echo \'{"Username":5,"Secret":"hidden-secret"}\'', "says nothing that can be read"),
        ("echo '[\"hidden-secret\"]'", "says nothing that can be read"),
    ],
)
def test_a_helper_that_fails_is_named_and_not_quoted(tmp_path: Path, script: str | None, words: str) -> None:
    if script is not None:
        helper(tmp_path, "lab", script)
    write(tmp_path / "home/.docker/config.json", {"credHelpers": {NAME: "lab"}})
    with pytest.raises(SecretUnavailable, match=words) as caught:
        asking(tmp_path)()
    assert "docker-credential-lab" in str(caught.value)
    assert "hidden" not in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize("name", ["../x", "a b", "x;y", "-x", "x\ny", ""])
def test_a_helpers_name_that_is_none_starts_nothing(tmp_path: Path, name: str) -> None:
    write(tmp_path / "home/.docker/config.json", {"credHelpers": {NAME: name}})
    with pytest.raises(NixopsError, match="name that no helper has"):
        asking(tmp_path)()


# -- logins that end ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("life", "kept", "old"), [(43200, 39599, 39601), (400, 299, 301), (0, 29, 31), (-9, 29, 31)])
def test_a_login_that_ends_is_read_again_before_it_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, life: float, kept: float, old: float
) -> None:
    now = [1000.0]
    made: list[Login] = []

    def give(registry: RegistryName, *, clock: Callable[[], float]) -> Login:
        made.append(Login("AWS", Secret(f"token-number-{len(made)}"), clock() + life))
        return made[-1]

    monkeypatch.setattr("nixops.registry.logins.ecr_login", give)
    redactor = Redactor()
    login = login_for(
        RegistryName("123456789012.dkr.ecr.eu-central-1.amazonaws.com"),
        None,
        environ={},
        base=tmp_path,
        resolve=never,
        local=LocalRunner(),
        redactor=redactor,
        clock=lambda: now[0],
    )
    assert login() is login() is made[0]
    now[0] = 1000 + kept
    assert login() is made[0]
    now[0] = 1000 + old
    assert login() is made[1]
    assert redactor.clean("token-number-0 token-number-1") == "*** ***"
