"""One method for each verb of Nix that is used, over the :class:`Runner` seam. Nix 2.8 and newer.

Every call names the experimental features it needs, since the machine's own configuration may not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from nixops.errors import BuildFailed, CommandTimeout, HostFault, TemplateError
from nixops.nix.closure import PathInfo
from nixops.nix.derivation import Derivation, parse_derivations
from nixops.nix.log import NixLog, explain, plain
from nixops.nix.store_uri import StoreUri
from nixops.transport.command import Command, LineSink, Result, Runner
from nixops.values import StorePath

__all__ = ["Built", "Derivation", "Nix", "parse_path_info"]

_FEATURES = ("--extra-experimental-features", "nix-command flakes")


@dataclass(frozen=True)
class Built:
    """What a build gave.

    :ivar out: the output ``out``, or the only one there is.
    """

    drv: StorePath
    out: StorePath


class Nix:
    """Nix on the runner's machine.

    :param env: environment for every call. A store over SSH needs
        :meth:`nixops.transport.openssh.OpenSshFiles.nix_env` (or that of a :class:`nixops.transport.mux.SshPool`) in
        it: without, nix would trust what the operator's own ssh configuration trusts, so such a call is refused.
    """

    def __init__(self, runner: Runner, *, env: Mapping[str, str] = MappingProxyType({})) -> None:
        self._runner = runner
        self._env = dict(env)
        self._show: tuple[str, ...] = ("derivation", "show")

    def version(self) -> tuple[int, int]:
        """``(2, 8)`` of Nix 2.8.0."""
        result = self._run("nix", "--version", timeout=30.0).check()
        found = re.search(r"(\d+)\.(\d+)", result.out.rsplit(")", 1)[-1])
        if not found:
            raise HostFault(f"{self._runner.host} has a nix whose version cannot be read: {result.out.strip()!r}")
        return int(found[1]), int(found[2])

    def eval_json(self, installable: str, *, apply: str | None = None, timeout: float = 300.0) -> Any:
        """The value of ``installable``, with the Nix function ``apply`` applied to it.

        :raises BuildFailed: the evaluation failed; ``detail`` is the end of Nix's error.
        """
        extra = ("--apply", apply) if apply is not None else ()
        # Without the option, a flake whose lock file lacks an input gets one written: into the user's checkout.
        result, log = self._logged("eval", "--json", "--no-write-lock-file", *extra, "--", installable, timeout=timeout)
        if not result.ok:
            raise explain(log, f"evaluating {installable}", self._runner.host)
        return _json(result)

    def build(
        self,
        installable: str,
        *,
        store: StoreUri | None = None,
        timeout: float,
        on_line: LineSink | None = None,
    ) -> Built:
        """Build ``installable``; nothing is linked, so nothing keeps the result from garbage collection.

        :param store: evaluate here and build in that store, on its own machine; by default the machine's own.
        :param timeout: seconds for evaluation and build together.
        :param on_line: gets progress in words.
        :raises BuildFailed: the evaluation or a derivation failed; ``detail`` is the end of its log.
        :raises Unreachable: or a subclass: the store is not there, or was lost.
        :raises HostFault: its disk is full.
        """
        return self._build(("--no-write-lock-file",), ("--", installable), installable, store, timeout, on_line)

    def build_derivation(
        self, drv: StorePath, *, store: StoreUri, timeout: float, on_line: LineSink | None = None
    ) -> Built:
        """Build the output ``out`` (or the only one) of a derivation that was evaluated here, in ``store``, without
        evaluating it again; the derivation and what it needs of this machine's store are copied there.

        :raises BuildFailed: it is not there, or it failed; ``detail`` is the end of its log.
        :raises Unreachable: or a subclass: the store is not there, or was lost.
        :raises HostFault: its disk is full.
        """
        what = drv.name.removesuffix(".drv")
        try:
            return self._build((), ("--expr", _as_package(drv, "out")), what, store, timeout, on_line)
        except BuildFailed as error:
            if not _NO_SUCH_OUTPUT.search(str(error)):
                raise
            outputs = self.derivation(drv)[drv].outputs
            if len(outputs) != 1:
                raise
            (only,) = outputs
            return self._build((), ("--expr", _as_package(drv, only)), what, store, timeout, on_line)

    def derivation(self, drv: StorePath, *, recursive: bool = False) -> Mapping[StorePath, Derivation]:
        """What a derivation of this machine's store says, by its path; ``recursive``: all that it needs, too.

        :raises BuildFailed: it is not there.
        """
        options = ("--recursive",) if recursive else ()
        result, log = self._logged(*self._show, *options, "--", drv, timeout=300.0)
        if not result.ok and "is not a recognised command" in "\n".join((*log.errors, *log.foreign)):
            self._show = ("show-derivation",)  # to Nix 2.14
            result, log = self._logged(*self._show, *options, "--", drv, timeout=300.0)
        if not result.ok:
            raise explain(log, f"reading {drv}", self._runner.host)
        return parse_derivations(_json(result))

    def path_info(
        self, paths: Sequence[StorePath], *, recursive: bool = False, store: StoreUri | None = None
    ) -> tuple[PathInfo, ...]:
        """What the store knows of ``paths`` (and, ``recursive``, of their closures). Absent paths are left out."""
        if not paths:
            return ()
        options = ("--recursive",) if recursive else ()
        result, log = self._logged(
            "path-info", "--json", *options, *self._at("--store", store), "--", *paths, timeout=300.0
        )
        if not result.ok:
            if any("is not valid" in error for error in log.errors):
                return ()
            raise explain(log, "asking for store paths", store.host if store else self._runner.host)
        return parse_path_info(_json(result))

    def copy(
        self,
        paths: Sequence[StorePath],
        *,
        to: StoreUri,
        from_: StoreUri | None = None,
        timeout: float,
        on_line: LineSink | None = None,
    ) -> None:
        """Copy the closures of ``paths``. The login on the other side must be one that Nix trusts there; for
        another see :func:`nixops.nix.copy.import_closure`.

        :raises HostFault: the host does not trust the login, or its disk is full.
        :raises Unreachable: or a subclass: a store is not there, or was lost.
        """
        # What was built here is signed by nobody. A login that is not trusted is refused all the same.
        result, log = self._logged(
            "copy",
            "--no-check-sigs",
            *self._at("--from", from_),
            *self._at("--to", to),
            "--",
            *paths,
            timeout=timeout,
            on_line=on_line,
        )
        if result.ok:
            return
        if any("lacks a signature by a trusted key" in e or "lacks a valid signature" in e for e in log.errors):
            raise HostFault(
                f"{to.host} does not take unsigned paths from this login",
                hint="Nix there does not trust it (trusted-users): import through root instead",
            )
        raise explain(log, "copying", to.host if to.needs_ssh or from_ is None else from_.host)

    def parse(self, text: str, what: str) -> None:
        """Let Nix parse ``text``.

        :param what: what it is, for the error.
        :raises TemplateError: it is not Nix.
        """
        result = self._run("nix-instantiate", "--parse", "-", stdin=text, timeout=60.0)
        if not result.ok:
            raise TemplateError(f"{what} is not valid Nix", detail=plain(result.tail()))

    # -- running ----------------------------------------------------------------------------------------------

    def _build(
        self,
        options: Sequence[str],
        installable: Sequence[str],
        what: str,
        store: StoreUri | None,
        timeout: float,
        on_line: LineSink | None,
    ) -> Built:
        # Without --builders the machine's own builders would be tried for what belongs on the store's machine.
        where = ("--eval-store", "auto", "--builders", "", *self._at("--store", store)) if store else ()
        result, log = self._logged(
            "build", "--json", "--no-link", *options, *where, *installable, timeout=timeout, on_line=on_line
        )
        if not result.ok:
            raise explain(log, f"building {what}", store.host if store else self._runner.host)
        return _built(_json(result), what)

    def _at(self, option: str, store: StoreUri | None) -> tuple[str, ...]:
        if store is None:
            return ()
        if store.needs_ssh and "NIX_SSHOPTS" not in self._env:
            raise ValueError(f"{store} needs the environment of OpenSshFiles: no host key would be pinned")
        return (option, store.text)

    def _logged(self, verb: str, *args: str, timeout: float, on_line: LineSink | None = None) -> tuple[Result, NixLog]:
        log = NixLog(on_line)
        command = Command.of(
            "nix",
            *_FEATURES,
            "--log-format",
            "internal-json",
            verb,
            *args,
            env=self._env,
            timeout=timeout,
            title=f"nix {verb}",
        )
        try:
            return self._runner.run(command, log.feed), log
        except CommandTimeout as error:
            # Its detail is the end of stderr, which is JSON here.
            raise CommandTimeout(error.message, hint=error.hint, detail="\n".join(log.said)) from None

    def _run(self, *argv: str, timeout: float, stdin: str | None = None) -> Result:
        return self._runner.run(Command.of(*argv, env=self._env, timeout=timeout, stdin=stdin))


def parse_path_info(document: Any) -> tuple[PathInfo, ...]:
    """Read what ``nix path-info --json`` prints: a list (to Nix 2.18), an object by path (from 2.19), or that
    object under ``info`` with store paths less their directory (from 2.33).

    :raises BuildFailed: it is none of these.
    """
    directory = "/nix/store"
    if isinstance(document, dict) and isinstance(document.get("info"), dict):
        directory = str(document.get("storeDir", directory))
        document = document["info"]

    def whole(path: str) -> StorePath:
        return StorePath(path if path.startswith("/") else f"{directory}/{path}")

    try:
        if isinstance(document, list):
            pairs = [(entry["path"], entry) for entry in document if entry.get("valid", True)]
        else:
            pairs = [(path, entry) for path, entry in document.items() if entry is not None]
        return tuple(
            PathInfo(
                path=whole(path),
                nar_size=int(entry.get("narSize", 0)),
                references=tuple(sorted(whole(reference) for reference in entry.get("references", ()))),
                signatures=tuple(_signature(signature) for signature in entry.get("signatures", ())),
            )
            for path, entry in pairs
        )
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise BuildFailed(f"nix path-info printed something unknown: {error}") from None


# Nix 2.8, and 2.26, where a derivation lacks the output that is asked for.
_NO_SUCH_OUTPUT = re.compile(r"does not have (?:wanted )?outputs?\b")


def _as_package(drv: StorePath, output: str) -> str:
    """A Nix expression for an output of a derivation that is in the store already.

    A derivation's path on the command line means different things to different versions of Nix (all its outputs, or
    the file itself; ``drv!out``, ``drv^out``), and to some a path in the store that is built in, where it is not yet.
    An expression means the same to all. ``outPath`` must be a store path, and which one is not looked at.

    :param output: an output's name, which has no character that a Nix string would need quoted (nor has ``drv``).
    """
    return (
        f'{{ type = "derivation"; name = "given"; drvPath = "{drv}"; outPath = "{drv}"; outputName = "{output}"; '
        f'outputs = [ "{output}" ]; "{output}" = {{ outPath = "{drv}"; }}; }}'
    )


def _signature(signature: Any) -> str:
    """Text up to 2.33, then an object ``{keyName, sig}``."""
    return f"{signature['keyName']}:{signature['sig']}" if isinstance(signature, dict) else str(signature)


def _built(document: Any, installable: str) -> Built:
    """Read what ``nix build --json`` prints: a list with one object for each thing built."""
    try:
        (entry,) = document
        outputs: dict[str, str] = entry["outputs"]
        out = outputs["out"] if "out" in outputs or len(outputs) != 1 else next(iter(outputs.values()))
        return Built(StorePath(entry["drvPath"]), StorePath(out))
    except (ValueError, TypeError, KeyError):
        raise BuildFailed(
            f"{installable} is not one derivation with an output 'out'",
            hint="name a single derivation",
            detail=json.dumps(document)[:400],
        ) from None


def _json(result: Result) -> Any:
    try:
        return json.loads(result.out)
    except ValueError:
        raise BuildFailed(
            f"{result.command.name} printed something that is not JSON", detail=result.out[:400]
        ) from None
