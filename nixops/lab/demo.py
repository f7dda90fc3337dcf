"""The main job on real hosts, step by step, as ``./demo`` runs it. Ends non-zero if any step is not as it should be."""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from nixops.errors import NixopsError
from nixops.lab.setting import Invoked, Setting


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
        setting.repo.configure(setting.host.name, "lab.failingUnit = true;")
        words = ("✓", "✗", "roll", "is back")
        done = self.run("deploy-runner", "--yes", code=4, show=lambda line: any(word in line for word in words))
        print(f"   exit code {done.code}: rolled back, and seen on the host to be")
        expect("is back on the old generation" in done.err, "it does not say that the host is back")
        after = (setting.running(), setting.profile(), setting.boot_default())
        expect(before == after, f"the host is not as it was: {before} != {after}")
        self.run("verify-runner", code=0, show=lambda line: "unit-active" in line or "registered" in line)


def main() -> int:
    """Run all steps; 0 when each was as it should be."""
    begin = time.monotonic()
    directory = Path(tempfile.mkdtemp(prefix="nixops-demo-"))
    times: list[tuple[str, float]] = []
    try:
        print("\n━━ Booting a lab: nix-cache02, OpenBao, Forgejo 15, a flake (the first time, its root tree too)")
        with Setting(directory, name="demo", say=lambda line: print("   " + line, flush=True)) as setting:
            demo = Demo(setting, times)
            times.append(("the lab", time.monotonic() - begin))
            print(f"   up ({times[-1][1]:.1f} s)")
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
