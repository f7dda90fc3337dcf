"""The verbs: JSON of every Nix in use, and the nix that is installed here."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nixops.errors import BuildFailed, CommandTimeout, TemplateError
from nixops.nix.closure import PathInfo
from nixops.nix.derivation import Derivation, parse_derivations
from nixops.nix.store_uri import StoreUri
from nixops.nix.verbs import Nix, parse_path_info
from nixops.transport.command import Command, LineSink, Result
from nixops.transport.local import LocalRunner
from nixops.transport.target import SshTarget
from nixops.values import Address, HostName, StorePath, System

LIBRARY = StorePath("/nix/store/ahh7n98qw88dkfh7rk1vsxj1idy5zz7g-dep-1.0")
TOOL = StorePath("/nix/store/zia2cfjzm10hz8mh2i7zsz32q9fqknpy-good-1.2")
DRV = StorePath("/nix/store/knsigg8m1c2wj5cy3mcyzclybmhpy04x-good-1.2.drv")
OFFLINE = {"NIX_CONFIG": "substituters ="}


class Answers:
    """A runner that gives one recorded answer and keeps the command it was asked."""

    host = "localhost"

    def __init__(self, stdout: Any, code: int = 0, stderr: str = "") -> None:
        self._stdout = stdout if isinstance(stdout, str) else json.dumps(stdout)
        self._code = code
        self._stderr = stderr
        self.asked: list[Command] = []

    def run(self, command: Command, on_line: LineSink | None = None) -> Result:
        self.asked.append(command)
        for line in self._stderr.splitlines():
            if on_line is not None:
                on_line(line)
        return Result(command, self._code, self._stdout.encode(), self._stderr.encode())


# What Nix printed, verbatim but for fields that are not read.
OLD_LIST = [
    {"path": LIBRARY, "narSize": 120, "references": [], "ultimate": True},
    {"path": TOOL, "narSize": 168, "references": [LIBRARY], "signatures": ["cache-1:c2ln"]},
    {"path": "/nix/store/00000000000000000000000000000000-absent", "valid": False},
]
BY_PATH = {
    LIBRARY: {"narSize": 120, "references": [], "signatures": []},
    TOOL: {"narSize": 168, "references": [LIBRARY], "signatures": ["cache-1:c2ln"]},
    "/nix/store/00000000000000000000000000000000-absent": None,
}
BY_BASE_NAME = {
    "version": 2,
    "storeDir": "/nix/store",
    "info": {
        LIBRARY[11:]: {"narSize": 120, "references": [], "signatures": []},
        TOOL[11:]: {
            "narSize": 168,
            "references": [LIBRARY[11:]],
            "signatures": [{"keyName": "cache-1", "sig": "c2ln"}],
        },
    },
}


@pytest.mark.parametrize("document", [OLD_LIST, BY_PATH, BY_BASE_NAME], ids=["2.8", "2.26", "2.33"])
def test_path_info_of_every_nix_reads_the_same(document: Any) -> None:
    assert parse_path_info(json.loads(json.dumps(document))) == (
        PathInfo(LIBRARY, 120),
        PathInfo(TOOL, 168, (LIBRARY,), ("cache-1:c2ln",)),
    )


@pytest.mark.parametrize("document", [1, "text", [1], [{"path": "/etc/passwd"}], {"/etc/passwd": {}}])
def test_path_info_that_is_none_is_no_traceback(document: Any) -> None:
    with pytest.raises(BuildFailed, match="printed something unknown"):
        parse_path_info(document)


def test_a_build_reads_derivation_and_output() -> None:
    answer = [{"drvPath": DRV, "outputs": {"out": TOOL}, "startTime": 1, "stopTime": 2}]
    built = Nix(Answers(answer)).build(".#good", timeout=10)
    assert (built.drv, built.out) == (DRV, TOOL)


def test_a_derivation_without_out_but_one_output_is_read() -> None:
    built = Nix(Answers([{"drvPath": DRV, "outputs": {"doc": TOOL}}])).build(".#good", timeout=10)
    assert built.out == TOOL


@pytest.mark.parametrize(
    "answer",
    [[], [{}], [{"drvPath": DRV, "outputs": {"dev": TOOL, "doc": TOOL}}], [{"drvPath": DRV}] * 2, ["/nix/store/x"], {}],
)
def test_a_build_of_something_else_is_no_traceback(answer: Any) -> None:
    with pytest.raises(BuildFailed, match="is not one derivation"):
        Nix(Answers(answer)).build(".#good", timeout=10)


def test_output_that_is_no_json_is_no_traceback() -> None:
    with pytest.raises(BuildFailed, match="not JSON"):
        Nix(Answers("warning: hello")).eval_json(".#x")


def test_an_installable_cannot_become_an_option() -> None:
    runner = Answers([{"drvPath": DRV, "outputs": {"out": TOOL}}])
    Nix(runner).build("--expr", timeout=10)
    (command,) = runner.asked
    assert command.argv[command.argv.index("--") :] == ("--", "--expr")


def test_a_store_over_ssh_without_pinned_keys_is_refused() -> None:
    store = StoreUri.ssh_ng(SshTarget(HostName("web"), Address("192.0.2.7"), user="deploy"))
    assert str(store) == "ssh-ng://deploy@web"
    runner = Answers([])
    with pytest.raises(ValueError, match="OpenSshFiles"):
        Nix(runner).build(".#x", store=store, timeout=10)
    assert runner.asked == []


def test_a_build_in_another_store_uses_no_builder_of_this_machine() -> None:
    runner = Answers([{"drvPath": DRV, "outputs": {"out": TOOL}}])
    store = StoreUri.ssh_ng(SshTarget(HostName("web"), Address("192.0.2.7")))
    Nix(runner, env={"NIX_SSHOPTS": "-F x"}).build(".#x", store=store, timeout=10)
    argv = runner.asked[0].argv
    assert argv[argv.index("--builders") + 1] == ""
    assert argv[argv.index("--eval-store") + 1] == "auto"
    assert argv[argv.index("--store") + 1] == "ssh-ng://root@web"


# -- the real nix of this machine -----------------------------------------------------------------------------


FLAKE = """\
{ outputs = { self }: let
    make = script: derivation {
      name = "unit"; system = "@system@"; builder = "/bin/sh"; args = [ "-c" script ];
      PATH = "/usr/bin:/bin:/run/current-system/sw/bin"; salt = "@salt@";
    };
  in {
    value = { a = 1; b = [ "x" ]; };
    broken = throw "this does not evaluate";
    good = make "echo fine > $out";
    bad = make "echo that went wrong; exit 3";
    slow = make "echo waiting; sleep 1000";
  };
}
"""


@pytest.fixture
def flake(tmp_path: Path) -> str:
    system = "aarch64-linux" if os.uname().machine == "aarch64" else "x86_64-linux"
    # The salt makes every run build anew.
    text = FLAKE.replace("@system@", system).replace("@salt@", os.urandom(8).hex())
    (tmp_path / "flake.nix").write_text(text)
    return f"path:{tmp_path}"


@pytest.fixture
def nix() -> Nix:
    return Nix(LocalRunner(), env=OFFLINE)


def test_the_version_is_read(nix: Nix) -> None:
    assert nix.version() >= (2, 8)


def test_values_are_evaluated_and_functions_applied(nix: Nix, flake: str) -> None:
    assert nix.eval_json(f"{flake}#value") == {"a": 1, "b": ["x"]}
    assert nix.eval_json(f"{flake}#value", apply="v: v.a + 41") == 42


def test_an_evaluation_error_is_told_with_nixs_words(nix: Nix, flake: str) -> None:
    with pytest.raises(BuildFailed, match="this does not evaluate"):
        nix.eval_json(f"{flake}#broken")


@pytest.mark.nix_build
def test_a_build_gives_a_valid_path_and_a_failed_one_its_log(nix: Nix, flake: str) -> None:
    built = nix.build(f"{flake}#good", timeout=60)
    (info,) = nix.path_info([built.out])
    assert (info.path, info.nar_size > 0) == (built.out, True)
    with pytest.raises(BuildFailed, match="unit> that went wrong"):
        nix.build(f"{flake}#bad", timeout=60)


@pytest.mark.nix_build
def test_a_build_past_its_time_shows_progress_and_no_json(nix: Nix, flake: str) -> None:
    # What the build need not do any more within its time.
    nix.eval_json(f"{flake}#slow.drvPath")
    with pytest.raises(CommandTimeout) as caught:
        nix.build(f"{flake}#slow", timeout=10)
    assert "unit> waiting" in str(caught.value)
    assert "@nix" not in str(caught.value)


def test_absent_paths_are_left_out_of_path_info(nix: Nix) -> None:
    assert nix.path_info([StorePath("/nix/store/00000000000000000000000000000000-absent")]) == ()
    assert nix.path_info([]) == ()


def test_text_that_is_not_nix_is_a_template_error_with_its_place(nix: Nix) -> None:
    nix.parse("{ lib, ... }: { a = lib.mkForce 1; }", "module.nix")
    with pytest.raises(TemplateError, match=r"module\.nix is not valid Nix") as caught:
        nix.parse("{ a = 1 }", "module.nix")
    assert ":1:9" in str(caught.value)


# -- derivations ----------------------------------------------------------------------------------------------

LIBRARY_DRV = StorePath("/nix/store/1wbrd7x3xb5lilmxqq752yjqzfbjgm35-dep-1.0.drv")
SOURCE = StorePath("/nix/store/nmlnk9civms7w5mjc5s8nafd9miv9lgx-flake.nix")
WHOLE = Derivation(
    system=System("x86_64-linux"),
    outputs={"out": TOOL, "later": None},
    input_drvs={LIBRARY_DRV: ("dev", "out")},
    input_srcs=(SOURCE,),
    env={"name": "good-1.2", "requiredSystemFeatures": "kvm"},
)
ENTRY: dict[str, Any] = {"args": [], "builder": "/bin/sh", "system": "x86_64-linux", "env": dict(WHOLE.env)}
OUTPUTS = {"out": {"path": TOOL}, "later": {"hashAlgo": "r:sha256"}}
BASE_OUTPUTS = {"out": {"path": TOOL[11:]}, "later": {"hashAlgo": "sha256", "method": "nar"}}
SHOWN: dict[str, Any] = {
    "2.8": {DRV: {**ENTRY, "outputs": OUTPUTS, "inputSrcs": [SOURCE], "inputDrvs": {LIBRARY_DRV: ["dev", "out"]}}},
    "2.26": {
        DRV: {
            **ENTRY,
            "name": "good-1.2",
            "outputs": OUTPUTS,
            "inputSrcs": [SOURCE],
            "inputDrvs": {LIBRARY_DRV: {"dynamicOutputs": {}, "outputs": ["dev", "out"]}},
        }
    },
    "2.32": {
        DRV[11:]: {
            **ENTRY,
            "version": 3,
            "outputs": BASE_OUTPUTS,
            "inputSrcs": [SOURCE[11:]],
            "inputDrvs": {LIBRARY_DRV[11:]: {"dynamicOutputs": {}, "outputs": ["dev", "out"]}},
        }
    },
    "2.33": {
        "version": 4,
        "derivations": {
            DRV[11:]: {
                **ENTRY,
                "version": 4,
                "outputs": BASE_OUTPUTS,
                "inputs": {
                    "drvs": {LIBRARY_DRV[11:]: {"dynamicOutputs": {}, "outputs": ["dev", "out"]}},
                    "srcs": [SOURCE[11:]],
                },
            }
        },
    },
}


@pytest.mark.parametrize("version", SHOWN)
def test_a_derivation_of_every_nix_reads_the_same(version: str) -> None:
    assert parse_derivations(json.loads(json.dumps(SHOWN[version]))) == {DRV: WHOLE}


def test_structured_attributes_are_under_json_as_in_the_file() -> None:
    shown = {DRV: {**SHOWN["2.8"][DRV], "env": {"out": TOOL}, "structuredAttrs": {"requiredSystemFeatures": ["kvm"]}}}
    env = parse_derivations(shown)[DRV].env
    assert json.loads(env["__json"]) == {"requiredSystemFeatures": ["kvm"]}


@pytest.mark.parametrize("document", [1, [], {"x": {}}, {DRV: 1}, {DRV: {}}, {"derivations": {DRV: []}}, None])
def test_a_derivation_that_is_none_is_no_traceback(document: Any) -> None:
    with pytest.raises(BuildFailed, match="printed something unknown"):
        parse_derivations(document)


class Script:
    """A runner that answers each command by a function, and keeps them."""

    host = "localhost"

    def __init__(self, answer: Callable[[Command], tuple[int, Any, str]]) -> None:
        self._answer = answer
        self.asked: list[Command] = []

    def run(self, command: Command, on_line: LineSink | None = None) -> Result:
        self.asked.append(command)
        code, out, error = self._answer(command)
        if error and on_line is not None:
            on_line("@nix " + json.dumps({"action": "msg", "level": 0, "msg": f"error: {error}"}))
        return Result(command, code, json.dumps(out).encode(), b"")


def test_a_nix_without_the_newer_word_is_asked_by_the_older_and_only_once_by_both() -> None:
    def answer(command: Command) -> tuple[int, Any, str]:
        if "show-derivation" in command.argv:
            return 0, SHOWN["2.8"], ""
        return 1, None, "'derivation' is not a recognised command"

    runner = Script(answer)
    nix = Nix(runner)
    assert nix.derivation(DRV) == nix.derivation(DRV, recursive=True) == {DRV: WHOLE}
    words = [("show-derivation" in c.argv, "--recursive" in c.argv) for c in runner.asked]
    assert words == [(False, False), (True, False), (True, True)]


def test_a_derivation_with_one_other_output_is_built_by_asking_what_it_has() -> None:
    entry = {**SHOWN["2.8"][DRV], "outputs": {"doc": {"path": TOOL}}}

    def answer(command: Command) -> tuple[int, Any, str]:
        if "derivation" in command.argv:
            return 0, {DRV: entry}, ""
        if 'outputs = [ "out" ]' in command.argv[-1]:
            return 1, None, f"derivation '{DRV}' does not have wanted outputs 'out'"
        return 0, [{"drvPath": DRV, "outputs": {"doc": TOOL}}], ""

    runner = Script(answer)
    store = StoreUri("daemon")
    assert Nix(runner).build_derivation(DRV, store=store, timeout=10).out == TOOL
    assert all(DRV in command.argv[-1] for command in runner.asked)
    entry["outputs"] = {"doc": {"path": TOOL}, "dev": {"path": LIBRARY}}
    with pytest.raises(BuildFailed, match="does not have wanted outputs"):
        Nix(runner).build_derivation(DRV, store=store, timeout=10)


@pytest.mark.nix_build
def test_a_derivation_of_the_real_store_is_read_and_built(tmp_path: Path) -> None:
    expression = (
        'derivation { name = "real"; system = builtins.currentSystem; builder = "/bin/sh"; '
        f'args = [ "-c" "echo > $out; echo > $dev" ]; salt = "{os.urandom(8).hex()}"; outputs = [ "out" "dev" ]; }}'
    )
    made = LocalRunner().run(Command.of("nix-instantiate", "--add-root", tmp_path / "root", "-E", expression)).check()
    drv = StorePath(str(Path(made.out.strip().partition("!")[0]).readlink()))
    nix = Nix(LocalRunner(), env=OFFLINE)
    assert set(nix.derivation(drv)[drv].outputs) == {"out", "dev"}
    built = nix.build_derivation(drv, store=StoreUri("auto"), timeout=60)
    assert built.out == nix.derivation(drv)[drv].outputs["out"]
    assert Path(built.out).read_text() == "\n"
