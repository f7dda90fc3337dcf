"""Attaching one thing to another in a registry: by the referrers API, or by its fallback tag.

The distribution specification, 1.1: an artifact's manifest names its ``subject``. A registry with the API lists it by
itself, and says so when it is put (``OCI-Subject``). For one without, clients keep an index of a subject's artifacts
under the tag ``sha256-<hex>``.
"""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import urlsplit

from nixops.errors import RegistryError
from nixops.registry.fault import RegistryRefused
from nixops.registry.http import REDIRECTS, Answer
from nixops.registry.manifest import (
    MANIFEST_LIMIT,
    OCI_EMPTY,
    OCI_INDEX,
    OCI_MANIFEST,
    Descriptor,
    Manifest,
    canonical,
    digest_of,
)
from nixops.transport.web import joined

_EMPTY = b"{}"
_MOST_PAGES = 100
_ATTEMPTS = 5
# Two who write the fallback tag at once overwrite each other: each looks again after about this long, seconds.
_SETTLE = 0.2
# A registry without the API says so in one of these ways.
_NO_API = frozenset({404, 405, 406, 501})


@dataclass(frozen=True)
class Receipt:
    """What a registry said of a manifest that was put.

    :ivar subject: the digest among whose referrers it has put it; None from a registry without the referrers API.
    """

    digest: str
    subject: str | None


class Registry(Protocol):
    """What this needs of a registry's client."""

    def manifest(self, repository: str, reference: str) -> Manifest | None: ...
    def put(self, repository: str, reference: str, body: bytes, media_type: str) -> Receipt: ...
    def put_blob(self, repository: str, body: bytes) -> str: ...
    def ask(
        self,
        method: str,
        repository: str,
        path: str,
        *,
        ok: Collection[int] = (200,),
        headers: Mapping[str, str] = ...,
        limit: int = ...,
    ) -> Answer: ...


class Referrers:
    """The artifacts of a registry's manifests."""

    def __init__(self, registry: Registry, sleep: Callable[[float], None]) -> None:
        self._registry = registry
        self._sleep = sleep
        self._tagging = threading.Lock()

    def of(self, repository: str, digest: str) -> tuple[Descriptor, ...]:
        """What is attached to the manifest ``digest``, each once, in the registry's order."""
        listed = self._listed(repository, digest)
        if listed is not None:
            return listed
        return self._tagged(repository, digest)[1]

    def attach(
        self,
        repository: str,
        subject: Descriptor,
        artifact_type: str,
        body: bytes,
        annotations: Mapping[str, str],
        layer_type: str | None,
    ) -> str:
        """See :meth:`nixops.registry.client.RegistryClient.attach`."""
        config = Descriptor(OCI_EMPTY, self._registry.put_blob(repository, _EMPTY), len(_EMPTY))
        layer = Descriptor(layer_type or artifact_type, self._registry.put_blob(repository, body), len(body))
        document = {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "artifactType": artifact_type,
            "config": config.document(),
            "layers": [layer.document()],
            "subject": Descriptor(subject.media_type, subject.digest, subject.size).document(),
        }
        if annotations:
            document["annotations"] = dict(sorted(annotations.items()))
        manifest = canonical(document)
        made = Descriptor(
            OCI_MANIFEST, digest_of(manifest), len(manifest), artifact_type=artifact_type, annotations=annotations
        )
        receipt = self._registry.put(repository, made.digest, manifest, OCI_MANIFEST)
        if receipt.subject is None:
            with self._tagging:
                self._tag(repository, subject.digest, made)
        elif receipt.subject != subject.digest:
            raise RegistryError(
                f"the registry lists {made.digest} in {repository} under another manifest than {subject.digest}",
                hint="this is a fault of the registry",
            )
        return made.digest

    # -- the API ----------------------------------------------------------------------------------------------

    def _listed(self, repository: str, digest: str) -> tuple[Descriptor, ...] | None:
        """What the API lists; None where the registry has none."""
        found: dict[str, Descriptor] = {}
        path = f"referrers/{digest}"
        for page in range(_MOST_PAGES):
            try:
                answer = self._registry.ask(
                    "GET",
                    repository,
                    path,
                    ok=(200, *_NO_API, *REDIRECTS),
                    headers={"Accept": OCI_INDEX},
                    limit=MANIFEST_LIMIT,
                )
            except RegistryRefused as refused:
                if "UNSUPPORTED" in refused.codes:
                    return None
                raise
            if answer.status != 200 or not _is_index(answer):
                if page == 0:
                    return None
                raise RegistryError(
                    f"{answer.what}: the registry's list of referrers breaks off after {page} pages",
                    hint="look at the registry's log, then run the command again",
                )
            index = Manifest.of(answer.body, OCI_INDEX, answer.what)
            for one in index.manifests:
                found.setdefault(one.digest, one)
            query = _next(answer)
            if query is None:
                return tuple(found.values())
            path = f"referrers/{digest}?{query}"
        raise RegistryError(
            f"the registry lists more than {_MOST_PAGES} pages of referrers of {digest}", hint="look at the registry"
        )

    # -- the fallback tag -------------------------------------------------------------------------------------

    def _tagged(self, repository: str, digest: str) -> tuple[Manifest | None, tuple[Descriptor, ...]]:
        tag = fallback_tag(digest)
        index = self._registry.manifest(repository, tag)
        if index is None:
            return None, ()
        if index.media_type != OCI_INDEX:
            raise RegistryError(
                f"the tag {tag} of {repository} is not an index of referrers but {index.media_type}",
                hint="the specification keeps tags of this form for that: delete the tag, or give its image another",
            )
        return index, tuple({one.digest: one for one in index.manifests}.values())

    def _tag(self, repository: str, digest: str, made: Descriptor) -> None:
        """Add ``made`` to the index under the fallback tag.

        The specification has no compare-and-set: what another client writes in the same moment can overwrite ours,
        so it is looked for after a while, and added again.
        """
        for attempt in range(_ATTEMPTS):
            index, listed = self._tagged(repository, digest)
            if any(one.digest == made.digest for one in listed):
                return
            entries = list(index.parsed["manifests"]) if index is not None and listed else []
            document = dict(index.parsed) if index is not None else {"schemaVersion": 2, "mediaType": OCI_INDEX}
            document["manifests"] = [*entries, made.document()]
            self._registry.put(repository, fallback_tag(digest), canonical(document), OCI_INDEX)
            self._sleep(_SETTLE * random.uniform(0.75, 1.25) * (attempt + 1))
            if any(one.digest == made.digest for one in self._tagged(repository, digest)[1]):
                return
        raise RegistryError(
            f"{made.digest} is in {repository}, and could not be listed under the tag {fallback_tag(digest)}: "
            f"somebody else wrote that tag {_ATTEMPTS} times in between",
            hint="run the command again",
        )


def fallback_tag(digest: str) -> str:
    """The tag under which referrers of ``digest`` are listed where there is no API: ``sha256-<hex>``, cut to 128."""
    return digest.replace(":", "-", 1)[:128]


def _is_index(answer: Answer) -> bool:
    """Some registries answer unknown paths with a page of their own, and 200."""
    kind = answer.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == OCI_INDEX:
        return True
    try:
        return bool(json.loads(answer.body)["mediaType"] == OCI_INDEX)
    except (ValueError, RecursionError, KeyError, TypeError):
        return False


def _next(answer: Answer) -> str | None:
    """The query of the next page, from ``Link: <…>; rel="next"``; its path is ours, wherever it points."""
    for link in answer.headers.get("link", "").split(","):
        target, _, rest = link.strip().partition(">")
        if target.startswith("<") and 'rel="next"' in rest.replace("rel=next", 'rel="next"'):
            return _query(joined(answer.url, target[1:]))
    return None


def _query(url: str) -> str | None:
    try:
        return urlsplit(url).query or None
    except ValueError:
        return None
