"""Store derivations as values, from the JSON of every Nix in use."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nixops.errors import BuildFailed
from nixops.values import StorePath, System


@dataclass(frozen=True)
class Derivation:
    """What a ``.drv`` says.

    :ivar outputs: each output's path by its name; ``None`` where it is known only once it is built.
    :ivar input_drvs: which outputs of which derivations it is built from.
    :ivar input_srcs: the store paths that it is built from besides.
    :ivar env: its environment; structured attributes are JSON under ``__json``, as the file itself has them.
    """

    system: System
    outputs: Mapping[str, StorePath | None]
    input_drvs: Mapping[StorePath, tuple[str, ...]] = field(default_factory=dict)
    input_srcs: tuple[StorePath, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)


def parse_derivations(document: Any) -> dict[StorePath, Derivation]:
    """Read what ``nix derivation show`` (2.15 and newer) and ``nix show-derivation`` print: an object by path, with
    store paths less their directory from 2.32 on, under ``derivations`` from 2.33 on.

    :raises BuildFailed: it is none of these.
    """
    try:
        if isinstance(document.get("derivations"), dict):
            document = document["derivations"]
        return {_whole(path): _derivation(entry) for path, entry in document.items()}
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise BuildFailed(f"nix derivation show printed something unknown: {error}") from None


def _derivation(entry: dict[str, Any]) -> Derivation:
    inputs = entry.get("inputs", {})
    drvs = inputs["drvs"] if "drvs" in inputs else entry["inputDrvs"]
    srcs = inputs["srcs"] if "srcs" in inputs else entry["inputSrcs"]
    env = {str(name): str(value) for name, value in entry["env"].items()}
    structured = entry.get("structuredAttrs")
    if structured is not None and "__json" not in env:
        env["__json"] = json.dumps(structured)
    return Derivation(
        system=System(entry["system"]),
        outputs={name: _output(output) for name, output in entry["outputs"].items()},
        input_drvs={_whole(path): _wanted(wanted) for path, wanted in drvs.items()},
        input_srcs=tuple(_whole(path) for path in srcs),
        env=env,
    )


def _output(output: dict[str, Any]) -> StorePath | None:
    path = output.get("path")
    return None if path is None else _whole(path)


def _wanted(wanted: Any) -> tuple[str, ...]:
    """A list of outputs, or from 2.18 on an object that has it beside what it knows of dynamic derivations."""
    return tuple(str(name) for name in (wanted["outputs"] if isinstance(wanted, dict) else wanted))


def _whole(path: str) -> StorePath:
    return StorePath(path if path.startswith("/") else f"/nix/store/{path}")
