"""The main jobs on real hosts, step by step, as ``./demo`` runs them. Ends non-zero if any step is not as it should
be.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from nixops.errors import NixopsError
from nixops.lab.lab import HostSpec
from nixops.lab.setting import Invoked, Setting
from nixops.registry.login import Login

BUILDERS: Final = ("builder01", "builder02")
_CHOSEN: Final = re.compile(rf": on ({'|'.join(BUILDERS)})\b")
_WRITES: Final = re.compile(r'"(PUT|POST|PATCH) ')


class Wrong(Exception):
    """A step is not as it should be."""


def expect(condition: bool, what: str) -> None:
    """:raises Wrong: ``condition`` does not hold."""
    if not condition:
        raise Wrong(what)


@dataclass
class Demo:
    """The steps and how long each took, in seconds."""

    setting: Setting
    times: list[tuple[str, float]] = field(default_factory=list)

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        print(f"\n━━ {title}", flush=True)
        begin = time.monotonic()
        yield
        self.times.append((title, time.monotonic() - begin))
        print(f"   as it should be ({self.times[-1][1]:.1f} s)", flush=True)

    def run(self, *args: str, code: int, show: Callable[[str], bool] = lambda _: True) -> Invoked:
        print(f"   $ invoke {' '.join(args)}", flush=True)
        done = self.setting.invoke(
            *args, on_line=lambda line: print("     " + line, flush=True) if show(line) else None
        )
        expect(done.code == code, f"it ended with {done.code}, not {code}:\n{done!r}")
        return done

    def plan(self) -> None:
        """A plan changes nothing anywhere: the host, Forgejo, OpenBao and the checkout are as before."""
        setting = self.setting
        before = (setting.running(), setting.repo.git("status", "--porcelain"))
        self.run("deploy-runner", "--plan", code=0, show=lambda line: not re.match(r"    ([+@-]|\s*$)", line))
        expect(before == (setting.running(), setting.repo.git("status", "--porcelain")), "the plan changed something")
        asked = [r for r in setting.forge.requests if r.method != "GET" or "registration-token" in r.path]
        # The hand-written runner's own daemon talks to Forgejo too, over another path.
        expect(not [r for r in asked if r.path.startswith("/api/v1")], "the plan asked Forgejo for a token")

    def deploy(self) -> None:
        setting = self.setting
        done = self.run("deploy-runner", "--yes", code=0, show=lambda line: "✓" in line or "runs on" in line)
        expect(setting.running() != setting.base[setting.host.name], "the host still runs the old generation")
        expect(setting.running() == setting.profile() == setting.boot_default(), "it would not boot what it runs")
        expect("FAILED" not in done.out, "a check failed")

    def verify(self) -> None:
        self.run("verify-runner", code=0)

    def job(self) -> None:
        """A trusted repository's job builds with nix, and its output is in the host's store."""
        setting = self.setting
        script = (
            'nix-build --no-out-link -E \'derivation { name = "from-a-job"; system = builtins.currentSystem; '
            'builder = "/bin/sh"; args = [ "-c" "echo built by a job > $out" ]; }\''
        )
        run_id = setting.forge.dispatch("torjus/nixos", [{"run": script}], runs_on="native")
        run = setting.forge.wait_run(run_id, timeout=60)
        for line in run.log:
            print("     " + line)
        found = re.search(r"^/nix/store/[a-z0-9]{32}-from-a-job$", "\n".join(run.log), re.MULTILINE)
        expect(run.status == "success" and found is not None, f"the job ended as {run.status}")
        assert found is not None
        expect((setting.host.root / found.group(0)[1:]).is_file(), "the job's output is not in the host's store")

    def again(self) -> None:
        """A second run has nothing to do and changes nothing."""
        setting = self.setting
        before = setting.running()
        setting.forge.forget_requests()
        done = self.run("deploy-runner", "--yes", code=0, show=lambda line: "nothing to do" in line)
        expect("There is nothing to do" in done.out, f"it found something to do: {done!r}")
        changing = [r for r in setting.forge.requests if r.path.startswith("/api/v1") and r.method != "GET"]
        expect(not changing and setting.running() == before, "it changed something")

    def broken(self) -> None:
        """A generation whose unit fails: the host is back on the old one, and its boot default never moved."""
        setting = self.setting
        before = (setting.running(), setting.profile(), setting.boot_default())
        print("   the host's configuration gets `lab.failingUnit = true;`, a unit that fails", flush=True)
        setting.repo.configure(setting.host.name, "lab.failingUnit = true;")
        words = ("✓", "✗", "rolling", "rolled", "is back")
        done = self.run("deploy-runner", "--yes", code=4, show=lambda line: any(word in line for word in words))
        print(f"   exit code {done.code}: rolled back, and seen on the host to be")
        expect("is back on the old generation" in done.out, "it does not say that the host is back")
        after = (setting.running(), setting.profile(), setting.boot_default())
        expect(before == after, f"the host is not as it was: {before} != {after}")
        self.run("verify-runner", code=0, show=lambda line: "unit-active" in line or "registered" in line)

    def pool(self) -> None:
        """Both builders answer, and nothing is changed by asking."""
        done = self.run("build.pool", code=0)
        expect(all(name in done.out for name in BUILDERS), "a builder is missing in the table")

    def image(self) -> None:
        """Two systems, built natively, pushed from their builders, one index, the tag at last; then pulled back."""
        setting = self.setting
        self.run("build-image", "--push", code=0, show=_plain)
        index = self._pulled("docker")
        expect(len(index["manifests"]) == 2, f"the tag names {len(index['manifests'])} images, not two")
        print(f"   pulled back with skopeo: {', '.join(_platforms(index))}; every digest is right")
        before = setting.registry.log.read_text()
        done = self.run("build-image", "--push", code=0, show=_plain)
        sent = [line for line in setting.registry.log.read_text()[len(before) :].splitlines() if _WRITES.search(line)]
        expect("nothing was uploaded" in done.out and not sent, f"the second push sent something: {sent}")

    def lost_builder(self) -> None:
        """The builder that works is switched off in the middle: the build finishes on the other."""
        setting = self.setting
        flags = ("--flake", str(setting.images.flake), "--attr", "slow", "--systems", "x86_64-linux")
        print(f"   $ invoke build-image {' '.join(flags)}   (and the builder loses its power)", flush=True)
        off: list[str] = []

        def follow(line: str) -> None:
            if _plain(line):
                print("     " + line, flush=True)
            chosen = _CHOSEN.search(line)
            if chosen and not off:
                off.append(chosen[1])
                threading.Timer(3.0, setting.lab.hosts[chosen[1]].power_off).start()

        done = setting.invoke("build-image", *flags, "--format", "text", on_line=follow)
        expect(done.code == 0, f"it ended with {done.code}: {done!r}")
        expect(len(off) == 1 and f"{off[0]} is left out" in done.out, "no builder was lost: nothing was shown")
        other = next(name for name in BUILDERS if name not in off)
        expect(other in done.out, "it was not built on the other builder")

    def _pulled(self, name: str) -> dict[str, Any]:
        """The image with all its systems, pulled by skopeo into a directory; each blob's digest compared."""
        setting, registry = self.setting, self.setting.registry
        into = setting.directory / f"pulled-{name}"
        certificates = setting.directory / "certificates"
        certificates.mkdir(exist_ok=True)
        if registry.ca_file is not None:
            shutil.copyfile(registry.ca_file, certificates / "ca.crt")
        auth = setting.directory / "pull-auth.json"
        auth.touch(mode=0o600)
        auth.write_text(Login(registry.user, registry.password).auth_file(registry.name).reveal())
        options = ("--insecure-policy", "copy", "--quiet", "--all", "--authfile", str(auth), "--src-cert-dir")
        source = f"docker://{registry.reference('team/app:latest')}"
        print(f"   $ skopeo copy --all {source} dir:…", flush=True)
        done = subprocess.run(
            ["skopeo", *options, str(certificates), source, f"dir:{into}"], capture_output=True, text=True, check=False
        )
        expect(done.returncode == 0, f"skopeo cannot pull it: {done.stderr}")
        for blob in into.iterdir():
            digest = hashlib.sha256(blob.read_bytes()).hexdigest()
            named = re.fullmatch(r"([0-9a-f]{64})(\.manifest\.json)?", blob.name)
            expect(named is None or named[1] == digest, f"{blob.name} holds something else")
        index: dict[str, Any] = json.loads((into / "manifest.json").read_text())
        return index


def _say(line: str) -> None:
    print("   " + line, flush=True)


def _plain(line: str) -> bool:
    """Whether a line is news, and not a program's own chatter."""
    return re.search(r"> |Copying |Getting |Writing |Running |: copying |: building ", line) is None


def _platforms(index: dict[str, Any]) -> list[str]:
    return [f"{m['platform']['os']}/{m['platform']['architecture']}" for m in index["manifests"]]


def main() -> int:
    """Run all steps; 0 when each was as it should be."""
    begin = time.monotonic()
    directory = Path(tempfile.mkdtemp(prefix="nixops-demo-"))
    times: list[tuple[str, float]] = []
    try:
        print("\n━━ Booting a lab: nix-cache02, two builders, OpenBao, Forgejo 15, a registry")
        hosts = [HostSpec(name) for name in ("nix-cache02", *BUILDERS)]
        with Setting(directory, name="demo", hosts=hosts, images=True, say=_say) as setting:
            demo = Demo(setting, times)
            times.append(("the lab", time.monotonic() - begin))
            print(f"   up ({times[-1][1]:.1f} s)")
            print("   (below, lines that repeat or say little are left out of what the commands print)")
            with demo.step("1. The plan: what would be done, and nothing is"):
                demo.plan()
            with demo.step("2. The deploy: register, keep, render, build, copy, activate, check, commit"):
                demo.deploy()
            with demo.step("3. The checks alone"):
                demo.verify()
            with demo.step("4. A job of a trusted repository runs `nix build` on the host"):
                demo.job()
            with demo.step("5. Deploying again: nothing to do"):
                demo.again()
            with demo.step("6. A broken generation: rolled back"):
                demo.broken()
            with demo.step("7. The pool of builders"):
                demo.pool()
            with demo.step("8. An image for two systems: built, pushed, indexed, pulled back; again: nothing to do"):
                demo.image()
            with demo.step("9. A builder dies in the middle of a build"):
                demo.lost_builder()
    except (Wrong, NixopsError) as error:
        print(f"\nNOT as it should be: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; the lab is down", file=sys.stderr)
        return 130
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    print("\n━━ How long it took")
    for title, seconds in times:
        print(f"   {seconds:6.1f} s  {title}")
    print(f"   {time.monotonic() - begin:6.1f} s  in all; the lab is down, nothing is left running")
    return 0


if __name__ == "__main__":
    sys.exit(main())
