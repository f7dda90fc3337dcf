"""How an image was built, as an in-toto statement with SLSA's provenance: attached to it in the registry.

https://in-toto.io/Statement/v1 and https://slsa.dev/provenance/v1. It is not signed: it says what this side knows, to
those who trust the registry.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from nixops.build.evaluate import FlakeFacts, without_credentials
from nixops.build.model import ImageSpec
from nixops.build.record import SystemImage, stamp, who_built
from nixops.registry.manifest import Manifest
from nixops.values import ImageReference

if TYPE_CHECKING:  # requests is only loaded by those who speak to a registry
    from nixops.registry.client import RegistryClient

STATEMENT: Final = "https://in-toto.io/Statement/v1"
PREDICATE: Final = "https://slsa.dev/provenance/v1"
BUILD_TYPE: Final = "urn:nixops:build-image:1"
# What the artifact is called in the registry; cosign and others look for this one.
ARTIFACT: Final = "application/vnd.in-toto+json"
_PREDICATE_TYPE: Final = "in-toto.io/predicate-type"


def attach_provenance(
    client: RegistryClient,
    destination: ImageReference,
    named: Manifest,
    spec: ImageSpec,
    facts: FlakeFacts,
    images: Sequence[SystemImage],
    state: Path,
) -> str | None:
    """Attach the statement to what the tag names, unless it has one already.

    :param state: where earlier records are: they know the builder of what was in the registry already.
    :returns: the digest of what was attached; None where there was one already.
    :raises RegistryError: the registry refuses it.
    """
    for one in client.referrers(destination.repository, named.digest):
        if one.artifact_type == ARTIFACT and one.annotations.get(_PREDICATE_TYPE, PREDICATE) == PREDICATE:
            return None
    body = json.dumps(statement(destination, named, spec, facts, images, state), separators=(",", ":")).encode()
    return client.attach(destination.repository, named, ARTIFACT, body, {_PREDICATE_TYPE: PREDICATE})


def statement(
    destination: ImageReference,
    named: Manifest,
    spec: ImageSpec,
    facts: FlakeFacts,
    images: Sequence[SystemImage],
    state: Path,
) -> dict[str, Any]:
    """The statement as JSON: what the tag names and each image as subjects, the flake, who built what and when."""
    name = f"{destination.registry}/{destination.repository}"
    digests = [named.digest, *(i.pushed.digest for i in images if i.pushed and i.pushed.digest != named.digest)]
    runs = [_run(image, state) for image in images]
    times = sorted(run[key] for run in runs for key in ("startedOn", "finishedOn") if run.get(key))
    metadata = {"startedOn": times[0], "finishedOn": times[-1]} if times else {"finishedOn": stamp(time.time())}
    source: dict[str, Any] = {"uri": facts.url}
    if facts.revision is not None:
        source["digest"] = {"gitCommit": facts.revision}
    return {
        "_type": STATEMENT,
        "subject": [{"name": name, "digest": _digest(digest)} for digest in digests],
        "predicateType": PREDICATE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {
                    "flake": without_credentials(spec.flake),
                    "attribute": str(spec.attribute),
                    "systems": [str(system) for system in spec.systems],
                },
                "internalParameters": {"dirty": facts.dirty, "images": runs},
                "resolvedDependencies": [source],
            },
            "runDetails": {"builder": {"id": "urn:nixops:pool"}, "metadata": metadata},
        },
    }


def _run(image: SystemImage, state: Path) -> dict[str, Any]:
    made: dict[str, Any] = {
        "system": str(image.system),
        "derivation": str(image.evaluated.drv),
        "output": str(image.out),
        "digest": image.pushed.digest if image.pushed else None,
    }
    if image.built is not None:
        built = image.built
        known: Mapping[str, Any] = {
            "builder": str(built.builder),
            "nix": ".".join(map(str, built.nix)),
            "began": stamp(built.began),
            "ended": stamp(built.ended),
        }
    else:
        known = who_built(state, image.out) or {}
    for key, its in (("builder", "builder"), ("nix", "nix"), ("startedOn", "began"), ("finishedOn", "ended")):
        if known.get(its):
            made[key] = str(known[its])
    return made


def _digest(digest: str) -> dict[str, str]:
    algorithm, _, value = digest.partition(":")
    return {algorithm: value}
