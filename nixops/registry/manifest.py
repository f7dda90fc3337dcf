"""What a registry holds, as values: digests, descriptors, manifests (OCI image and distribution specifications)."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from nixops.errors import RegistryError

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_EMPTY = "application/vnd.oci.empty.v1+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
# In the order of preference; a registry that is not told of a type converts or refuses.
ACCEPTED = (OCI_MANIFEST, OCI_INDEX, DOCKER_MANIFEST, DOCKER_LIST)
# What the distribution specification has registries take, and clients expect, of a manifest.
MANIFEST_LIMIT = 4 * 1024 * 1024

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}")
_MEDIA_TYPE = re.compile(r"[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]{0,126}/[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]{0,126}")


def is_digest(text: str) -> bool:
    """Whether ``text`` is a digest of an algorithm that the specification registers."""
    return _DIGEST.fullmatch(text) is not None


def digest_of(body: bytes, algorithm: str = "sha256") -> str:
    """``sha256:…`` of ``body``."""
    return f"{algorithm}:{hashlib.new(algorithm, body, usedforsecurity=True).hexdigest()}"


def matches(body: bytes, digest: str) -> bool:
    """Whether ``digest`` (of either algorithm) is that of ``body``."""
    return is_digest(digest) and digest_of(body, digest.partition(":")[0]) == digest


def canonical(document: Mapping[str, Any]) -> bytes:
    """``document`` as JSON that is the same bytes, and thus the same digest, each time. The order of keys is kept."""
    return json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()


@dataclass(frozen=True)
class Descriptor:
    """Points to content: its type, digest and size in bytes.

    :ivar urls: where else it may be had; a layer with these need not be in the registry.
    """

    media_type: str
    digest: str
    size: int
    artifact_type: str | None = None
    annotations: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    platform: Mapping[str, str] | None = None
    urls: tuple[str, ...] = ()

    def document(self) -> dict[str, Any]:
        """As JSON has it; what is empty is left out."""
        made: dict[str, Any] = {"mediaType": self.media_type, "digest": self.digest, "size": self.size}
        if self.artifact_type:
            made["artifactType"] = self.artifact_type
        if self.annotations:
            made["annotations"] = dict(sorted(self.annotations.items()))
        if self.platform:
            made["platform"] = dict(self.platform)
        return made

    @classmethod
    def parse(cls, value: object, what: str) -> Descriptor:
        """The descriptor that stands in a document.

        :param what: where it stands, for the error.
        :raises RegistryError: it is none.
        """
        if not isinstance(value, dict):
            raise _wrong(what, "a descriptor is not a mapping")
        kind, digest, size = value.get("mediaType"), value.get("digest"), value.get("size")
        if not isinstance(kind, str) or not _MEDIA_TYPE.fullmatch(kind):
            raise _wrong(what, "a descriptor has no media type")
        if not isinstance(digest, str) or not is_digest(digest):
            raise _wrong(what, "a descriptor has no digest (sha256 or sha512)")
        if not isinstance(size, int) or isinstance(size, bool) or size < 0:
            raise _wrong(what, "a descriptor has no size")
        platform = value.get("platform")
        urls = value.get("urls") or ()
        artifact = value.get("artifactType")
        return cls(
            kind,
            digest,
            size,
            artifact_type=artifact if isinstance(artifact, str) else None,
            annotations=MappingProxyType(_texts(value.get("annotations"))),
            platform=MappingProxyType(_texts(platform)) if isinstance(platform, dict) else None,
            urls=tuple(str(url) for url in urls) if isinstance(urls, list) else (),
        )


@dataclass(frozen=True)
class Manifest:
    """A manifest or an index, exactly as the registry gave it.

    :ivar digest: ``sha256:…`` of ``body``, computed here.
    :ivar size: of ``body``, in bytes.
    :ivar parsed: the JSON of ``body``.
    """

    digest: str
    media_type: str
    size: int
    body: bytes = field(repr=False)
    parsed: Mapping[str, Any] = field(repr=False)

    @classmethod
    def of(cls, body: bytes, media_type: str, what: str = "a manifest") -> Manifest:
        """Check ``body`` and make it a value.

        :param media_type: as the registry's ``Content-Type`` says, parameters included; empty: as the body says.
        :raises RegistryError: it is no manifest, or its own ``mediaType`` is another.
        """
        try:
            parsed = json.loads(body)
        except (ValueError, RecursionError):
            raise _wrong(what, "it is not JSON") from None
        if not isinstance(parsed, dict):
            raise _wrong(what, "it is not a JSON object")
        kind = media_type.partition(";")[0].strip().lower()
        inner = parsed.get("mediaType")
        if inner is not None and not isinstance(inner, str):
            raise _wrong(what, "its mediaType is not a text")
        if parsed.get("schemaVersion") == 1:
            raise RegistryError(
                f"{what} is in the format of docker's first schema, which has no digests to compare",
                hint="push the image again with a tool of this decade",
            )
        if kind in ("", "application/json", "text/plain", "application/octet-stream"):
            kind = inner or ""
        if inner is not None and inner != kind:
            raise _wrong(what, f"the registry calls it {kind!r}, and it calls itself {inner!r}")
        if not _MEDIA_TYPE.fullmatch(kind):
            raise _wrong(what, "it has no media type")
        return cls(digest_of(body), kind, len(body), body, MappingProxyType(parsed))

    @property
    def is_index(self) -> bool:
        """Whether it names manifests, one for each platform."""
        return self.media_type in (OCI_INDEX, DOCKER_LIST)

    @property
    def descriptor(self) -> Descriptor:
        """What points to it."""
        return Descriptor(self.media_type, self.digest, self.size)

    @property
    def config(self) -> Descriptor | None:
        """Its configuration's descriptor; an index has none."""
        value = self.parsed.get("config")
        return None if value is None else Descriptor.parse(value, self.digest)

    @property
    def layers(self) -> tuple[Descriptor, ...]:
        """Its layers, the lowest first."""
        return self._list("layers")

    @property
    def manifests(self) -> tuple[Descriptor, ...]:
        """The manifests that an index names."""
        return self._list("manifests")

    @property
    def subject(self) -> Descriptor | None:
        """What it was attached to, if it was."""
        value = self.parsed.get("subject")
        return None if value is None else Descriptor.parse(value, self.digest)

    @property
    def artifact_type(self) -> str | None:
        """What it is, where it is no image; by the specification the configuration's type counts if it names none."""
        value = self.parsed.get("artifactType")
        if isinstance(value, str) and value:
            return value
        config = self.config
        return config.media_type if config else None

    def _list(self, key: str) -> tuple[Descriptor, ...]:
        value = self.parsed.get(key)
        if value is None:
            return ()
        if not isinstance(value, list):
            raise _wrong(self.digest, f"its {key} are not a list")
        return tuple(Descriptor.parse(one, self.digest) for one in value)


def _texts(value: object) -> dict[str, str]:
    if not isinstance(value, dict):
        return {}
    return {key: text for key, text in value.items() if isinstance(text, str)}


def _wrong(what: str, why: str) -> RegistryError:
    return RegistryError(f"{what} cannot be used as a manifest: {why}", hint="push it again, and look at the registry")
