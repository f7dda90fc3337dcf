"""From what Nix prints to an evaluated image: one evaluation for each place, plain words for what is wrong."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest

from nixops.build.evaluate import (
    FlakeFacts,
    apply_function,
    candidates,
    evaluate_image,
    flake_facts,
    without_credentials,
)
from nixops.build.model import ImageSpec, Shape
from nixops.errors import BuildFailed, UsageError
from nixops.nix.verbs import Nix
from nixops.transport.command import Command, LineSink, Result
from nixops.values import AttrPath, FlakeRef, System

X86 = System("x86_64-linux")
DRV = "/nix/store/00000000000000000000000000000000-copy-to.drv"
OUT = "/nix/store/11111111111111111111111111111111-copy-to"


class Scripted:
    """A runner that gives prepared answers, in order, and remembers what it was asked."""

    host = "localhost"

    def __init__(self, *answers: tuple[int, str, str]) -> None:
        self._answers = list(answers)
        self.asked: list[Sequence[str]] = []

    def run(self, command: Command, on_line: LineSink | None = None) -> Result:
        self.asked.append(command.argv)
        code, out, err = self._answers.pop(0)
        if on_line is not None:
            for line in err.splitlines():
                on_line(line)
        return Result(command, code, out.encode(), err.encode())


def answer(**changes: object) -> tuple[int, str, str]:
    found = {
        "kind": "derivation",
        "drv": DRV,
        "out": OUT,
        "system": "x86_64-linux",
        "copyTo": True,
        "features": [],
        "program": "",
    }
    return 0, json.dumps(found | changes), ""


def error(text: str) -> tuple[int, str, str]:
    return 1, "", "@nix " + json.dumps({"action": "msg", "level": 0, "msg": f"error: {text}"}) + "\n"


def lacking(attribute: str, more: str = "") -> tuple[int, str, str]:
    return error(f"flake 'path:/x' does not provide attribute 'packages.x.{attribute}' or '{attribute}'{more}")


def spec(attribute: str = "docker", *, copy_to: bool = True) -> ImageSpec:
    return ImageSpec(FlakeRef("/srv/app"), AttrPath(attribute), (X86,), copy_to=copy_to)


def test_an_attribute_is_looked_for_where_nix_build_looks_or_where_system_says() -> None:
    assert candidates(AttrPath("docker"), X86) == ("packages.x86_64-linux.docker", "legacyPackages.x86_64-linux.docker")
    assert candidates(AttrPath("images.{system}.app"), X86) == ("images.x86_64-linux.app",)


def test_one_evaluation_is_enough_where_the_attribute_is() -> None:
    runner = Scripted(answer(features=["kvm", ""], program="upload"))
    facts = FlakeFacts(FlakeRef("/srv/app"), "git+file:///srv/app", "abc", False)
    found = evaluate_image(Nix(runner), spec(), X86, facts)
    assert len(runner.asked) == 1
    assert (found.drv, found.out, found.shape, found.program) == (DRV, OUT, Shape.COPY_TO, "upload")
    assert found.features == frozenset({"kvm"})
    assert found.installable == "/srv/app#packages.x86_64-linux.docker"


def test_the_second_place_is_asked_when_the_first_has_it_not() -> None:
    runner = Scripted(lacking("packages.x86_64-linux.docker"), answer())
    assert evaluate_image(Nix(runner), spec(), X86).installable.endswith("#legacyPackages.x86_64-linux.docker")


def test_what_is_nowhere_is_bad_usage_with_the_names_tried_and_nixs_guess() -> None:
    runner = Scripted(
        lacking("packages.x86_64-linux.docker", "\n       Did you mean dockr?"),
        lacking("legacyPackages.x86_64-linux.docker"),
    )
    with pytest.raises(UsageError) as caught:
        evaluate_image(Nix(runner), spec(), X86)
    assert "packages.x86_64-linux.docker and no legacyPackages.x86_64-linux.docker" in caught.value.message
    assert caught.value.hint == "did you mean dockr?"


def test_an_attribute_that_the_image_itself_lacks_is_a_failed_evaluation() -> None:
    """Not a reason to look elsewhere: the image is there, and its expression is wrong."""
    runner = Scripted(error("attribute 'curl' missing"))
    with pytest.raises(BuildFailed, match="curl"):
        evaluate_image(Nix(runner), spec(), X86)
    assert len(runner.asked) == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kind": "lambda"}, "no derivation but a lambda"),
        ({"system": "aarch64-linux"}, "built on aarch64-linux, not on x86_64-linux"),
        ({"system": ""}, "built on an unknown system"),
        ({"program": "../../bin/sh"}, "no name of a program"),
        ({"program": "a b"}, "no name of a program"),
        ({"program": 5}, "no name of a program"),
        ({"drv": "/nix/store/../../etc/passwd"}, "its drvPath is '/nix/store/../../etc/passwd'"),
        ({"drv": "/nix/store/00000000000000000000000000000000-app"}, "its drvPath is"),
    ],
)
def test_what_cannot_be_built_natively_or_named_safely_is_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        evaluate_image(Nix(Scripted(answer(**changes))), spec(), X86)


def test_an_output_that_is_known_only_when_it_is_built_is_none() -> None:
    placeholder = "/1rz4g4znpzjwh1xymhjpm42vipw92pr73vdgl6xs1hycac8kf2n9"
    assert evaluate_image(Nix(Scripted(answer(out=placeholder))), spec(), X86).out is None


def test_without_images_in_mind_copyto_is_left_alone() -> None:
    runner = Scripted(answer(copyTo=False))
    assert evaluate_image(Nix(runner), spec(copy_to=False), X86).shape is Shape.UNKNOWN
    assert any("pushed = false &&" in part for part in runner.asked[0])
    assert "pushed = true &&" in apply_function(True)


# -- the flake ------------------------------------------------------------------------------------------------


def metadata(**changes: object) -> tuple[int, str, str]:
    found: dict[str, object] = {
        "url": "github:owner/app/abc",
        "resolvedUrl": "github:owner/app",
        "revision": "abc",
        "locked": {"type": "github", "rev": "abc"},
    }
    return 0, json.dumps({k: v for k, v in (found | changes).items() if v is not None}), ""


def test_a_reference_is_locked_so_that_every_system_has_the_same_revision() -> None:
    facts = flake_facts(Scripted(metadata()), FlakeRef("github:owner/app"))
    assert (facts.reference, facts.revision, facts.dirty) == ("github:owner/app/abc", "abc", False)


def test_a_directory_is_evaluated_as_it_is() -> None:
    git = metadata(url="git+file:///srv/app", revision=None, locked={"type": "git", "narHash": "x"})
    facts = flake_facts(Scripted(git), FlakeRef("/srv/app"))
    assert (facts.reference, facts.revision, facts.dirty) == ("/srv/app", None, True)
    path = metadata(url="path:/srv/app", revision=None, locked={"type": "path"})
    assert not flake_facts(Scripted(path), FlakeRef("/srv/app")).dirty


def test_no_flake_and_no_json_are_told_in_a_line() -> None:
    with pytest.raises(BuildFailed, match="is no flake that Nix can read"):
        flake_facts(Scripted((1, "", "error: getting status of '/srv/app'")), FlakeRef("/srv/app"))
    with pytest.raises(BuildFailed, match="something unknown"):
        flake_facts(Scripted((0, "[]", "")), FlakeRef("/srv/app"))


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("github:owner/app", "github:owner/app"),
        ("git+ssh://git@example.org/app", "git+ssh://git@example.org/app"),
        ("git+ssh://git:hunter22@example.org/app", "git+ssh://***@example.org/app"),
        ("git+https://ghp_0123@example.org/app?ref=x", "git+https://***@example.org/app?ref=x"),
        ("https://example.org/a.tar.gz?access_token=abc&x=1", "https://example.org/a.tar.gz?access_token=***&x=1"),
    ],
)
def test_a_reference_is_shown_and_kept_without_its_credentials(given: str, shown: str) -> None:
    assert without_credentials(given) == shown
