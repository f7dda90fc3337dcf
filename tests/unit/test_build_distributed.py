"""Distributed builds: the machines file, what nix's log says of machines, and the errors that are made of it."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from nixops.build.distributed import Distributed, LeftOut, Output, build_distributed, this_system
from nixops.build.machines import StoreFacts, Worker, machine_uri, machines_file, store_facts, unfit
from nixops.build.model import PoolBuilder, Probe
from nixops.build.watch import Watch
from nixops.errors import BuildFailed, HostFault, UsageError
from nixops.inventory.machines import parse_machines
from nixops.secret import Secret
from nixops.transport.command import Command, LineSink, Result
from nixops.transport.target import SshTarget
from nixops.values import Address, AttrPath, FlakeRef, HostName, StorePath, System

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8g"
X86, ARM = System("x86_64-linux"), System("aarch64-linux")
DRV = "/nix/store/wf5y16qjs0vx6km3h49n64j5pi11y78z-bad.drv"
OTHER = "/nix/store/p6vrxbf251mz8yzpwyksfhz4hxsk5scq-part-1.drv"


def builder(name: str = "one", address: str = "192.0.2.1", **options: object) -> PoolBuilder:
    target = SshTarget(HostName(name), Address(address), host_keys=(KEY,), port=int(str(options.pop("port", 22))))
    return PoolBuilder(target, (X86, ARM), 4, 2, **options)  # type: ignore[arg-type]  # each test names its own


class Scripted:
    """A runner whose answers are given: by a word in the command, the exit code and what it prints."""

    host = "localhost"

    def __init__(self, answers: dict[str, tuple[int, str, str]]) -> None:
        self.answers = answers

    def run(self, command: Command, on_line: LineSink | None = None) -> Result:
        for words, (code, out, err) in self.answers.items():
            if words in " ".join(command.argv):
                if on_line is not None:
                    for line in err.splitlines():
                        on_line(line)
                return Result(command, code, out.encode(), err.encode())
        raise AssertionError(command.argv)


# -- the machines file ----------------------------------------------------------------------------------------


def test_nix_itself_is_given_names_and_a_daemon_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    one = builder(features=frozenset({"kvm", "big-parallel"}), mandatory_features=frozenset({"special"}))
    six = builder("six", "2001:db8::6")
    with machines_file([Probe(one), Probe(six)], Worker.NIX) as file:
        assert file.read_text() == (
            "ssh-ng://root@one x86_64-linux,aarch64-linux - 4 2 big-parallel,kvm special -\n"
            "ssh-ng://root@six x86_64-linux,aarch64-linux - 4 2 - - -\n"
        )
    with machines_file([Probe(one), Probe(six)], Worker.DAEMON) as file:
        read = parse_machines(file.read_text(), "machines", system=X86)
        assert [str(b.target.address) for b in read] == ["192.0.2.1", "2001:db8::6"]
        assert [b.target.host_keys for b in read] == [(KEY,), (KEY,)]
        assert (read[0].max_jobs, read[0].speed_factor, read[0].systems) == (4, 2, (X86, ARM))
        assert (read[0].features, read[0].mandatory_features) == (one.features, one.mandatory_features)
        fields = file.read_text().splitlines()[1].split()
        assert fields[0] == "ssh-ng://root@[2001:db8::6]" == machine_uri(six, Worker.DAEMON)
        assert base64.b64decode(fields[7]).decode() == KEY
    assert list(tmp_path.iterdir()) == []


def test_a_secret_key_is_readable_as_long_as_the_file_is_there_and_in_no_directory(tmp_path: Path) -> None:
    with machines_file([Probe(builder())], Worker.DAEMON, Secret("-----BEGIN\r\nabc\r\n-----END")) as file:
        path = Path(file.read_text().split()[2])
        assert path.read_text() == "-----BEGIN\nabc\n-----END\n"
        assert path.stat().st_mode & 0o777 == 0o600 and path.stat().st_nlink == 0
        assert path.parent == Path(f"/proc/{os.getpid()}/fd")
        assert "BEGIN" not in file.read_text()
    assert not path.exists() or path.stat().st_nlink > 0  # the number may be another file's by now
    # Nix itself logs in through our ssh configuration: it is given no key.
    with machines_file([Probe(builder())], Worker.NIX, Secret("-----BEGIN")) as file:
        assert file.read_text().split()[2] == "-"


def test_a_port_fits_into_the_file_of_a_daemon_from_2_31_on() -> None:
    other = builder(port=2222)
    assert unfit(other, Worker.NIX, (2, 8)) is None
    assert unfit(other, Worker.DAEMON, (2, 31)) is None
    assert "port 2222" in str(unfit(other, Worker.DAEMON, (2, 30)))
    assert unfit(builder(), Worker.DAEMON, (2, 8)) is None
    assert machine_uri(other, Worker.DAEMON) == "ssh-ng://root@192.0.2.1:2222"


@pytest.mark.parametrize(
    ("info", "ping", "facts"),
    [
        ((0, '{"trusted":1,"url":"daemon","version":"2.26.3"}', ""), None, StoreFacts(Worker.DAEMON, True)),
        ((0, '{"trusted":0,"url":"unix:///x","version":"2.30"}', ""), None, StoreFacts(Worker.DAEMON, False)),
        ((0, '{"url":"daemon"}', ""), None, StoreFacts(Worker.DAEMON, None)),
        ((0, '{"trusted":1,"url":"local"}', ""), None, StoreFacts(Worker.NIX, True)),
        (
            (1, "", "not a recognised command"),
            (0, "", "Store URL: local\nVersion: 2.8.0\n"),
            StoreFacts(Worker.NIX, True),
        ),
        ((1, "", "x"), (0, "", "Store URL: daemon\nVersion: 2.8.0\n"), StoreFacts(Worker.DAEMON, None)),
        ((1, "", "x"), (0, "Store URL: daemon\nTrusted: 0\n", ""), StoreFacts(Worker.DAEMON, False)),
    ],
)
def test_who_builds_is_read_from_each_nix(
    info: tuple[int, str, str], ping: tuple[int, str, str] | None, facts: StoreFacts
) -> None:
    runner = Scripted({"store info": info} | ({"store ping": ping} if ping else {}))
    assert store_facts(runner) == facts


def test_a_store_that_is_elsewhere_or_not_there_is_a_fault() -> None:
    with pytest.raises(HostFault, match="works on the store ssh-ng://x, which shares out") as caught:
        store_facts(Scripted({"store info": (0, '{"url":"ssh-ng://x"}', "")}))
    assert "NIX_REMOTE" in str(caught.value.hint)
    broken = {"store info": (1, "", "x"), "store ping": (1, "", "error: cannot connect to socket")}
    with pytest.raises(HostFault, match="cannot open its store") as caught:
        store_facts(Scripted(broken))
    assert "cannot connect to socket" in str(caught.value)


# -- nix's log ------------------------------------------------------------------------------------------------


def start(drv: str, uri: str, number: int = 1) -> str:
    return "@nix " + json.dumps(
        {"action": "start", "id": number, "type": 105, "fields": [drv, uri, 1, 1]}, separators=(",", ":")
    )


def said(text: str, level: int = 0) -> str:
    return "@nix " + json.dumps({"action": "msg", "level": level, "msg": text})


def printed(number: int, text: str) -> str:
    return "@nix " + json.dumps({"action": "result", "id": number, "type": 101, "fields": [text]})


def watched(*lines: str, names: dict[str, HostName] | None = None) -> tuple[Watch, list[str]]:
    heard: list[str] = []
    watch = Watch(names or {"ssh-ng://root@one": HostName("one")}, heard.append)
    for line in lines:
        watch.feed(line)
    return watch, heard


FAILED = f"error: build of '{DRV}' on 'ssh-ng://root@one' failed: builder for '{DRV}' failed with exit code 3"
AFTER = f"error: builder for '{DRV}' failed with exit code 1"


def test_progress_names_the_machine_once() -> None:
    """The machine's own report that it builds follows nix's."""
    watch, heard = watched(start(DRV, "ssh-ng://root@one", 1), start(DRV, "", 2), printed(2, "one"))
    assert heard == ["building bad on one", "bad> one"]
    assert watch.counts() == {"one": 1}
    assert watched(start(DRV, ""))[1] == ["building bad"]
    assert watched(start(DRV, "ssh-ng://root@192.0.2.9"))[0].counts() == {"ssh-ng://root@192.0.2.9": 1}


def test_a_derivation_that_failed_is_told_from_a_machine_that_went() -> None:
    """As Nix 2.8 and 2.26 wrote it, seen with real hosts."""
    begun = start(DRV, "ssh-ng://root@one")
    report = watched(begun, said(FAILED), said(AFTER))[0].reported()
    assert report is not None and (report.drv, report.builder, report.stopped, report.killed) == (
        DRV,
        "one",
        False,
        False,
    )
    for lost in ("error: unexpected end-of-file", "error: Nix daemon disconnected unexpectedly (maybe it crashed?)"):
        watch = watched(begun, said(lost), said(AFTER))[0]
        assert watch.reported() is None and watch.broken_off() == ("one",)
    # One machine lost, and a derivation of another that failed for its own reasons: the latter counts.
    other = said(f"error: builder for '{OTHER}' failed with exit code 1")
    watch = watched(
        begun, start(OTHER, "ssh-ng://root@two"), said("error: unexpected end-of-file"), other, said(FAILED)
    )[0]
    assert watch.reported() is not None and watch.broken_off() == ()
    killed = FAILED.replace("with exit code 3", "due to signal 9 (Killed)")
    reported = watched(begun, said(killed))[0].reported()
    assert reported is not None and reported.killed and not reported.stopped
    stopped = watched(
        begun, said(FAILED.replace(f"builder for '{DRV}' failed with exit code 3", "interrupted by the user"))
    )[0].reported()
    assert stopped is not None and stopped.stopped
    assert watched(said(AFTER))[0].broken_off() == ()  # built here, by no machine


@pytest.mark.parametrize("features", ["(aarch64-linux, kvm)", "(aarch64-linux, [kvm])"], ids=["2.8", "2.26"])
@pytest.mark.parametrize("level", [0, 1], ids=["through a daemon", "directly"])
def test_what_nix_finds_no_machine_for_is_read(features: str, level: int) -> None:
    text = (
        "Failed to find a machine for remote build!\nderivation: x.drv\n"
        f"required (system, features): {features}\n1 available machines:\n(systems, maxjobs, …)"
    )
    assert watched(said(text, level))[0].unfit() == "aarch64-linux, kvm"
    assert watched(said(AFTER))[0].unfit() is None


def test_a_machine_that_nix_could_not_connect_to_is_known() -> None:
    text = "cannot build on 'ssh-ng://root@one?x=1': error: failed to start SSH connection to 'root@one'"
    watch = watched(said(text))[0]
    assert watch.unreached() == {"one": "failed to start SSH connection to 'root@one'"}


@pytest.mark.parametrize("who", ["user", "client"])
def test_a_daemon_that_ignores_our_machines_is_noticed(who: str) -> None:
    text = (
        f"warning: ignoring the {who}-specified setting 'builders', because it is a restricted setting and you are not"
    )
    assert watched(said(text, 1))[0].restricted and watched(text)[0].restricted
    assert not watched(said(text.replace("'builders'", "'sandbox'"), 1))[0].restricted


def test_lines_that_are_no_events_do_no_harm() -> None:
    for line in ("", "x", "@nix ", '@nix {"type":105}', '@nix {"action":"start","type":105,"fields":[]}', "@nix [105]"):
        assert watched(line)[0].counts() == {}


# -- what comes of it -----------------------------------------------------------------------------------------


OUT = StorePath("/nix/store/00000000000000000000000000000001-app")


def test_the_document_and_the_rows_say_who_built_what() -> None:
    outputs = (
        Output(StorePath(DRV), {"out": OUT, "dev": OUT}, "one", X86),
        Output(StorePath(OTHER), {"lib": OUT}, None, ARM),
    )
    result = Distributed("path:/x", "app", outputs, {"one": 3}, (LeftOut("two", "no route to it"),), 1.23456)
    document = result.document()
    assert json.loads(json.dumps(document)) == document
    assert document["outputs"][0] == {
        "system": "x86_64-linux",
        "builder": "one",
        "drv": DRV,
        "store_path": OUT,
        "outputs": {"out": OUT, "dev": OUT},
    }
    assert (document["schema"], document["seconds"]) == ("nixops/build/1", 1.235)
    assert document["tried"] == [{"builder": "two", "reason": "no route to it"}]
    assert document["builders"] == [{"builder": "one", "derivations": 3}]
    assert result.rows() == [("x86_64-linux", "one", OUT), ("aarch64-linux", "was there", OUT)]


class Session:
    """As much of a build's session as one attempt without builders needs."""

    class settings:
        build_timeout = 10.0
        ssh_key = None

    class ssh:
        @staticmethod
        def nix_env() -> dict[str, str]:
            return {}

    class pool:
        @staticmethod
        def probe() -> tuple[Probe, ...]:
            return ()

    def __init__(self, answer: str) -> None:
        self.local = Scripted(
            {
                "store info": (0, '{"trusted":1,"url":"local"}', ""),
                "--version": (0, "nix (Nix) 2.33.0", ""),
                " build ": (0, answer, ""),
            }
        )


def build(answer: str) -> Distributed:
    session = Session(answer)
    return build_distributed(FlakeRef("/x"), AttrPath("app"), session, local_jobs=1)  # type: ignore[arg-type]  # a stand-in


class Flapping(Session):
    """One builder, which answers whenever it is asked; nix reaches it for a first derivation and not for the next."""

    class pool:
        @staticmethod
        def probe() -> tuple[Probe, ...]:
            return (Probe(builder()),)

    def __init__(self, uri: str) -> None:
        super().__init__("")
        self.attempts = 0
        lost = (start(DRV, uri), said(f"cannot build on '{uri}': error: failed to start SSH connection"))
        answer = json.dumps([{"drvPath": DRV, "outputs": {"out": OUT}}])
        self.rounds = [(1, "", "\n".join(lost)), (0, answer, start(DRV, uri))]
        self.scripted = self.local
        self.local = self  # type: ignore[assignment]  # it is asked for one thing

    host = "localhost"

    def run(self, command: Command, on_line: LineSink | None = None) -> Result:
        if " build " in " ".join(command.argv):
            self.scripted.answers[" build "] = self.rounds[self.attempts]
            self.attempts += 1
        return self.scripted.run(command, on_line)


def test_a_builder_that_nix_reached_and_then_did_not_was_lost_and_is_asked_again() -> None:
    session, heard = Flapping("ssh-ng://root@one"), list[str]()
    make: Callable[..., Distributed] = build_distributed
    result = make(FlakeRef("/x"), AttrPath("app"), session, on_event=heard.append)
    assert session.attempts == 2
    assert result.left_out == () and result.outputs[0].builder == "one"
    assert "one was lost in the middle, and answers again: once more" in heard


@pytest.mark.parametrize("cut", [0, len("/nix/store/")], ids=["to 2.32", "from 2.33"])
def test_both_shapes_of_nixs_answer_are_read(cut: int) -> None:
    answer = [{"drvPath": DRV[cut:], "outputs": {"out": OUT[cut:]}, "startTime": 0}]
    (output,) = build(json.dumps(answer)).outputs
    assert (output.drv, output.path, output.builder, output.system) == (DRV, OUT, None, this_system())


@pytest.mark.parametrize(
    "answer", ["", "{}", "[]", "[1]", '[{"drvPath":"x","outputs":{}}]', f'[{{"drvPath":"{DRV}","outputs":{{}}}}]']
)
def test_an_answer_that_is_none_is_told(answer: str) -> None:
    with pytest.raises(BuildFailed, match="printed something"):
        build(answer)


def test_several_systems_need_a_place_in_the_attribute(monkeypatch: pytest.MonkeyPatch) -> None:
    make: Callable[..., Distributed] = build_distributed
    with pytest.raises(UsageError, match=r"2 systems") as caught:
        make(FlakeRef("/x"), AttrPath("app"), Session("[]"), systems=[X86, ARM])
    assert "packages.{system}.app" in str(caught.value.hint)
