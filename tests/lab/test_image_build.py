"""`invoke build-image` without a push: natively, on real builders, for two systems, with nothing of AWS anywhere."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nixops.errors import BuildFailed, Interrupted, NoBuilder, UsageError
from nixops.lab.lab import Lab
from nixops.lab.setting import TOP, Invoked
from nixops.transport.exec import Cancellation, cancellable
from nixops.transport.fleet import fan_out
from tests.lab.conftest import LabFactory
from tests.lab.imaging import (
    ARM,
    X86,
    Imaging,
    builders_of_both_systems,
    chosen,
    disregard_load,
    ended,
    eventually,
    roots,
    works,
)
from tests.lab.leaks import Recorders
from tests.lab.reaching import has

pytestmark = pytest.mark.usefixtures("nix_of_the_lab")


@pytest.fixture(scope="module")
def builders(lab_factory: LabFactory) -> Lab:
    return builders_of_both_systems(lab_factory)


@pytest.fixture
def imaging(builders: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Imaging]:
    disregard_load(monkeypatch)
    yield Imaging(tmp_path, builders, hosts=("first", "second"))


def test_an_image_is_built_for_two_systems_and_needs_no_aws_no_registry_and_nothing_heavy(
    imaging: Imaging, builders: Lab
) -> None:
    """Proves: with no AWS configuration of any kind, no registry and no docker login, each system's image is built in
    a builder's store and kept there; and neither boto3, hvac, paramiko nor requests is even loaded."""
    script = (
        "import sys\n"
        "from invoke import Program\n"
        "try:\n    Program().run(sys.argv[1:])\n"
        "except SystemExit as end:\n    code = end.code\n"
        "else:\n    code = 0\n"
        "heavy = {'boto3', 'botocore', 'hvac', 'paramiko', 'fabric', 'requests', 'cryptography', 'rich'}\n"
        "print('LOADED', sorted(heavy & set(sys.modules)), file=sys.stderr)\n"
        "raise SystemExit(code)\n"
    )
    flags = imaging.image(
        "docker", "--systems", f"{X86},{ARM}", "--format", "json", "--inventory", str(imaging.inventory)
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "build-image", "build-image", *flags],
        cwd=TOP,
        env=imaging.environ,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "LOADED []" in done.stderr
    document = json.loads(done.stdout)
    assert document["schema"] == "nixops/image/1" and document["reference"] is None
    assert [image["system"] for image in document["images"]] == [X86, ARM]
    for image in document["images"]:
        host = builders.hosts[image["builder"]]
        assert has(host, image["store_path"])
        assert image["store_path"] in roots(host)
        assert not Path(image["store_path"]).exists()  # it was built there, not here
        assert image["digest"] is None
    assert document["tried"] == [] and document["revision"] == imaging.repo.revision


def test_it_builds_what_an_inventory_describes_when_called_bare(imaging: Imaging) -> None:
    """Proves: without flags the inventory's one image is built, in text for people."""
    done = imaging.invoke()
    assert done.code == 0, done
    assert X86 in done.out and "/nix/store/" in done.out and "not pushed" in done.out


def test_nothing_described_and_nothing_said_is_bad_usage(imaging: Imaging) -> None:
    """Proves: an inventory without images and a bare call end with 2 and say what to write."""
    imaging.change(lambda document: document.pop("images"))
    done = imaging.invoke()
    assert done.code == 2 and "images: {app:" in done.err, done


def test_an_image_that_needs_a_feature_goes_to_the_builder_that_has_it(imaging: Imaging) -> None:
    """Proves: required features of the image below `copyTo` decide who may build it; with nobody, exit 3 and why."""
    with pytest.raises(NoBuilder) as caught:
        imaging.build("featured")
    assert "first" in str(caught.value) and "features" in str(caught.value)
    imaging.change(lambda document: document["hosts"]["second"]["builder"].update(features=["big-parallel"]))
    (image,) = imaging.build("featured").images
    assert image.built is not None and image.built.builder == "second"


def test_the_builder_that_holds_the_inputs_already_is_preferred(imaging: Imaging) -> None:
    """Proves: of two idle builders, the one on which most of the image was built before gets it, though the other is
    faster by the inventory; what it had is not built again."""
    imaging.change(lambda document: document["hosts"].pop("first"))
    imaging.build("docker")
    faster = {**imaging.hosts["first"], "builder": {**imaging.hosts["first"]["builder"], "speed_factor": 3}}
    imaging.change(lambda document: document.update(hosts={"first": faster, "second": imaging.hosts["second"]}))
    imaging.events.clear()
    (image,) = imaging.build("containers.app.{system}").images
    assert image.built is not None and image.built.builder == "second", imaging.said()
    assert "building" not in imaging.said()


def test_two_builds_at_once_spread_over_the_pool_and_an_interrupt_stops_the_remote_build(
    imaging: Imaging, builders: Lab
) -> None:
    """Proves: while one build runs on a builder, a second of the same operator goes to the other; when the first is
    interrupted, neither its builder's shell nor what that runs is left there, and its claim is given back."""
    switch = Cancellation()

    def endless() -> object:
        with cancellable(switch):
            return imaging.build("endless")

    first = imaging.begin(endless)  # type: ignore[arg-type]  # it never returns
    busy, other = chosen(builders, lambda host: works(host, "sleep 77102"), "the endless build")
    (image,) = imaging.build("docker").images
    assert image.built is not None and image.built.builder == other.name
    switch.cancel()
    with pytest.raises(Interrupted):
        first.wait()
    eventually(lambda: not works(busy, "sleep 77102"), 10, "the remote build has ended")
    assert list((imaging.state / "nixops" / "claims").glob("*.claim")) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupting_the_command_ends_with_130_and_leaves_nothing_running(
    imaging: Imaging, builders: Lab, number: signal.Signals
) -> None:
    """Proves: Ctrl-C and TERM end `invoke build-image` with 130, and the build on the builder with it."""
    imaging.change(lambda document: document["hosts"].pop("second"))
    process = imaging.start(*imaging.image("endless", "--systems", X86))
    eventually(lambda: works(builders.hosts["first"], "sleep 77102"), 90, "the endless build")
    process.send_signal(number)
    assert ended(process).code == 130
    eventually(lambda: not works(builders.hosts["first"], "sleep 77102"), 10, "the remote build has ended")


def test_a_build_that_fails_shows_the_end_of_its_log_and_is_not_tried_elsewhere(imaging: Imaging) -> None:
    """Proves: a failed derivation is the image's fault, whatever its log says of space and hosts: exit 1 with its last
    lines, nobody is left out for it, and no second builder is asked."""
    with pytest.raises(BuildFailed) as caught:
        imaging.build("failing")
    assert "failed with exit code 3" in str(caught.value)
    assert "first line of a build that fails" in str(caught.value)
    assert "No space left on this shelf" in str(caught.value)
    assert sum(": on " in str(event) for event in imaging.events) == 1, imaging.said()
    (image,) = imaging.build("docker").images
    assert image.built is not None and image.built.tried == ()


def test_what_the_flake_does_not_have_is_bad_usage_before_any_builder_works(imaging: Imaging) -> None:
    """Proves: a missing attribute, one that is no derivation, and one for another system end with 2 and name what was
    looked for; an expression that throws is a failed evaluation with Nix's words."""
    with pytest.raises(UsageError) as caught:
        imaging.build("dockr", X86)
    assert "packages.x86_64-linux.dockr and no legacyPackages.x86_64-linux.dockr" in str(caught.value)
    assert "did you mean docker?" in str(caught.value)
    with pytest.raises(UsageError, match="is no derivation but a set"):
        imaging.build("packages.{system}", X86)
    with pytest.raises(UsageError, match=f"is built on {X86}, not on {ARM}"):
        imaging.build("crossed", ARM)
    with pytest.raises(BuildFailed, match="this image does not evaluate"):
        imaging.build("misplaced", X86)
    assert not any(": on " in str(event) for event in imaging.events)


def test_attributes_are_found_as_nix_finds_them(imaging: Imaging) -> None:
    """Proves: below packages, else below legacyPackages, or where {system} says."""
    assert imaging.build("old").images[0].evaluated.installable.endswith("#legacyPackages.x86_64-linux.old")
    assert (
        imaging.build("containers.app.{system}")
        .images[0]
        .evaluated.installable.endswith("#containers.app.x86_64-linux")
    )


def test_a_login_that_is_not_root_builds_as_well_and_keeps_the_output(builders: Lab, tmp_path: Path) -> None:
    """Proves: on a builder whose login is no trusted user and not root, the image is built and rooted: it survives a
    garbage collection there."""
    imaging = Imaging(tmp_path, builders, hosts=("third",))
    imaging.change(lambda document: document["hosts"]["third"]["builder"].update(systems=[X86]))
    (image,) = imaging.build("layout").images
    host = builders.hosts["third"]
    host.exec("nix-store", "--gc")
    assert has(host, image.out)


def test_what_was_never_pushed_is_kept_for_a_day(imaging: Imaging, builders: Lab) -> None:
    """Proves: a build that is not pushed survives a collection on its builder; two days later, the next build there
    lets go of it, and of nothing younger."""
    imaging.change(lambda document: document["hosts"].pop("second"))
    host = builders.hosts["first"]
    (old,) = imaging.build("docker").images
    host.exec("nix-store", "--gc")
    assert has(host, old.out)
    host.exec(
        "sh", "-c", 'find /nix/var/nix/gcroots/nixops-images -lname "$0" -exec touch -h -d "2 days ago" {} +', old.out
    )
    (young,) = imaging.build("layout").images
    assert old.out not in roots(host) and young.out in roots(host)


def test_a_dirty_tree_is_built_as_it_is_and_the_record_says_so(imaging: Imaging) -> None:
    """Proves: uncommitted changes are built; the record has no revision and says that the tree was dirty, names
    derivation, output, builder, Nix and times, is the operator's alone, and holds no more."""
    script = imaging.repo.directory / "odd.sh"
    script.write_text(script.read_text() + "# changed\n")
    result = imaging.build("docker")
    assert result.record.stat().st_mode & 0o777 == 0o600
    record = json.loads(result.record.read_text())
    assert record["schema"] == "nixops/image-record/1"
    assert (record["revision"], record["dirty"], record["reference"]) == (None, True, None)
    (image,) = record["images"]
    assert image["derivation"].endswith("-copy-to.drv") and image["output"] == result.images[0].out
    assert image["builder"] in ("first", "second") and image["nix"].startswith("2.")
    assert image["began"] <= image["ended"] and image["began"].endswith("Z")


HOSTILE = (
    {"--attr": "docker; touch OWNED"},
    {"--attr": "$(touch OWNED)"},
    {"--attr": "docker\ntouch OWNED"},
    {"--attr": 'docker"'},
    {"--attr": "-docker"},
    {"--flake": "./x' y"},
    {"--flake": "$(touch OWNED)"},
    {"--flake": "x\ny"},
    {"--flake": "--impure"},
    {"--flake": "/tmp#docker"},
    {"--push": "docker://registry.example.org/app:1 --dest-creds a:b"},
    {"--push": "docker://registry.example.org/app:$(touch OWNED)"},
    {"--push": "docker://registry.example.org/app:1\n2"},
    {"--push": "docker://registry.example.org/App:1"},
    {"--push": "docker://-registry/app:1"},
    {"--push": "docker://registry.example.org/app"},
    {"--systems": "x86_64-linux,;touch OWNED"},
    {"--systems": "x86_64-linux x"},
)


def test_hostile_names_are_refused_before_anything_runs(imaging: Imaging, tmp_path: Path) -> None:
    """Proves: a flake, an attribute, a system or a reference with spaces, quotes, `$()`, newlines or a leading dash
    ends with 2, and neither nix, git nor ssh has been started for it."""
    recorders = Recorders(tmp_path / "recorders", ("nix", "nix-store", "git", "ssh", "sh"))
    environ = {"PATH": recorders.path(imaging.environ["PATH"])}
    usual = {"--flake": str(imaging.repo.directory), "--attr": "docker", "--systems": X86}

    def refused(flags: dict[str, str]) -> tuple[dict[str, str], Invoked]:
        return flags, imaging.invoke(*(f"{flag}={value}" for flag, value in flags.items()), environ=environ)

    cases = [*(usual | hostile for hostile in HOSTILE), {"--image": "app;touch OWNED"}]
    for outcome in fan_out(cases, refused, limit=4):
        flags, done = outcome.unwrap()
        assert done.code == 2, (flags, done)
        assert done.err.startswith("error: "), (flags, done)
    assert list(recorders.seen()) == []
    assert not (TOP / "OWNED").exists() and not list(tmp_path.rglob("OWNED"))
