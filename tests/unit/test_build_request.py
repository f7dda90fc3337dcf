"""What `build-image` is asked for: each text by its own grammar, and what is left out taken from the inventory."""

from __future__ import annotations

from pathlib import Path

import pytest

from nixops.build.model import ImageSpec
from nixops.build.request import ImageRequest, image_spec
from nixops.errors import ExitCode, UsageError
from nixops.inventory.load import Loaded, load
from nixops.values import FlakeRef

INVENTORY = """
images:
  app:
    flake: ./app
    attribute: docker
    systems: [x86_64-linux, aarch64-linux]
    destination: registry.example.org/team/app:latest
  tool: {flake: github:torjus/tool, attribute: "packages.{system}.image", systems: [x86_64-linux]}
hosts:
  one: {address: 192.0.2.1}
"""


@pytest.fixture
def loaded(tmp_path: Path) -> Loaded:
    return inventory(tmp_path, INVENTORY)


def inventory(tmp_path: Path, text: str) -> Loaded:
    (tmp_path / "app").mkdir(exist_ok=True)
    (tmp_path / "app/flake.nix").write_text("{ outputs = _: { }; }")
    (tmp_path / "hosts.yml").write_text(text)
    return load(tmp_path / "hosts.yml")


def asked(loaded: Loaded, **request: str | bool | None) -> ImageSpec:
    return image_spec(loaded, ImageRequest(**request), loaded.base)  # type: ignore[arg-type]  # each test names fields


def refused(loaded: Loaded, **request: str | bool | None) -> str:
    with pytest.raises(UsageError) as caught:
        asked(loaded, **request)
    assert caught.value.exit_code == ExitCode.USAGE
    return str(caught.value)


def test_an_image_of_the_inventory_brings_everything_and_is_not_pushed_unasked(loaded: Loaded) -> None:
    spec = asked(loaded, image="app")
    assert spec.flake == str(loaded.base / "app")
    assert (spec.attribute, spec.systems) == ("docker", ("x86_64-linux", "aarch64-linux"))
    assert spec.destination is None and not spec.provenance


def test_push_without_a_value_takes_the_images_own_destination(loaded: Loaded) -> None:
    assert asked(loaded, image="app", push=True).destination == "registry.example.org/team/app:latest"


def test_push_with_a_reference_takes_that_one_with_or_without_its_scheme(loaded: Loaded) -> None:
    for text in ("docker://r.example.org:5000/a/b:c", "r.example.org:5000/a/b:c"):
        destination = asked(loaded, image="app", push=text).destination
        assert destination is not None
        assert (destination.registry, destination.repository, destination.tag) == ("r.example.org:5000", "a/b", "c")


def test_the_command_line_is_stronger_than_the_inventory(loaded: Loaded) -> None:
    spec = asked(loaded, image="app", attr="packages.{system}.other", systems="aarch64-linux")
    assert (spec.attribute, spec.systems) == ("packages.{system}.other", ("aarch64-linux",))


def test_bare_with_one_image_takes_it_and_with_a_default_takes_that(tmp_path: Path) -> None:
    one = "images: {app: {flake: ./app, attribute: docker, systems: [x86_64-linux]}}\nhosts: {a: {address: a}}\n"
    assert asked(inventory(tmp_path, one)).attribute == "docker"
    assert asked(inventory(tmp_path, INVENTORY + "default: {image: tool}\n")).flake == "github:torjus/tool"


def test_bare_without_a_default_lists_the_choices(loaded: Loaded) -> None:
    assert "app, tool" in refused(loaded)


def test_bare_without_any_image_says_how_to_describe_one(tmp_path: Path) -> None:
    assert "images: {app:" in refused(inventory(tmp_path, "hosts: {a: {address: a}}\n"))


def test_an_unknown_image_gets_the_nearest_name(loaded: Loaded) -> None:
    assert "app" in refused(loaded, image="aap")


def test_a_flake_alone_says_what_is_missing(loaded: Loaded) -> None:
    message = refused(loaded, flake="./app")
    assert "--attr" in message and "--systems" in message


def test_a_push_of_an_image_without_a_destination_says_so(loaded: Loaded) -> None:
    assert "not said where to" in refused(loaded, image="tool", push=True)


def test_a_provenance_of_what_is_not_pushed_is_refused_and_one_of_the_inventory_is_for_pushes(tmp_path: Path) -> None:
    loaded = inventory(tmp_path, INVENTORY.replace("attribute: docker", "attribute: docker\n    provenance: true"))
    assert "--push" in refused(loaded, image="tool", provenance=True)
    assert asked(loaded, image="app").destination is None
    assert asked(loaded, image="app", push=True).provenance


def test_a_directory_without_a_flake_is_refused(loaded: Loaded) -> None:
    assert "no flake.nix" in refused(loaded, flake="./nothing", attr="a", systems="x86_64-linux")


def test_a_directory_that_looks_like_a_name_is_pointed_to_its_path(loaded: Loaded) -> None:
    assert "write ./app" in refused(loaded, flake="app", attr="docker", systems="x86_64-linux")


def test_a_path_that_nix_does_not_take_is_refused(loaded: Loaded) -> None:
    odd = loaded.base / "with space"
    odd.mkdir()
    (odd / "flake.nix").write_text("{ }")
    (loaded.base / "link").symlink_to(odd)
    assert "flake reference" in refused(loaded, flake="./link", attr="a", systems="x86_64-linux")


def test_an_attribute_in_the_flake_reference_is_pointed_to_its_flag(loaded: Loaded) -> None:
    assert "--attr" in refused(loaded, flake="./app#docker", attr="a", systems="x86_64-linux")


HOSTILE = (
    "-oProxyCommand=x",
    "a b",
    "a'b",
    'a"b',
    "a$(touch x)",
    "a`touch x`",
    "a;b",
    "a|b",
    "a&&b",
    "a\nb",
    "a\n",
    "a\\b",
    "a*",
    "a>b",
    "",
    "é",
)


@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_text_is_refused_by_every_grammar(loaded: Loaded, text: str) -> None:
    """Some `copy-to` scripts expand their arguments unquoted: nothing odd may get as far as that."""
    rest = {"attr": "docker", "systems": "x86_64-linux"}
    refused(loaded, flake=text, **rest)
    refused(loaded, image="app", attr=text)
    refused(loaded, image="app", systems=text)
    refused(loaded, image="app", push=f"registry.example.org/app:{text}")
    refused(loaded, image="app", push=f"registry.example.org/{text}:tag")
    refused(loaded, image="app", push=f"{text}/app:tag")


@pytest.mark.parametrize(
    "text",
    [
        "app:latest",  # no registry: somebody's default
        "team/app:latest",
        "registry.example.org/app",  # no tag
        "registry.example.org/App:latest",
        "registry.example.org/app@sha256:" + "0" * 64,
        "oci:/tmp/x:latest",
        "docker://docker://registry.example.org/app:latest",
        "registry.example.org//app:latest",
        "registry.example.org/../app:latest",
        "registry.example.org/" + "a" * 256 + ":latest",
        "registry.example.org/app:" + "a" * 129,
    ],
)
def test_what_is_no_tag_in_a_registry_is_refused(loaded: Loaded, text: str) -> None:
    assert "image reference" in refused(loaded, image="app", push=text)


def test_a_password_in_a_flake_reference_is_refused(loaded: Loaded) -> None:
    for login in (
        "git+https://me:hunter22@example.org/app",
        "git+https://hunter22@example.org/app",
        "git+ssh://git:hunter22@example.org/app",
        "https://example.org/app.tar.gz?private_token=hunter22",
        "github:owner/app?ref=x&access_token=hunter22",
    ):
        with pytest.raises(UsageError, match="a login in it is not taken") as caught:
            image_spec(loaded, ImageRequest(flake=login, attr="a", systems="x86_64-linux"), Path("/"))
        assert "hunter22" not in str(caught.value)
    for plain in ("git+ssh://git@example.org/app", "git+https://example.org/app?ref=x&publicKey=abc&keytype=y"):
        assert FlakeRef(plain) == plain
