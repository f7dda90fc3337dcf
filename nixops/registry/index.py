"""The multi-architecture index over the manifests that were pushed, one for each system."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

from nixops.errors import RegistryError, UsageError
from nixops.registry.manifest import (
    DOCKER_LIST,
    DOCKER_MANIFEST,
    OCI_INDEX,
    OCI_MANIFEST,
    Descriptor,
    Manifest,
    canonical,
    is_digest,
)
from nixops.values import System

if TYPE_CHECKING:
    from nixops.build.model import PushedSystem

# Go's names (the OCI image specification has them), by Nix's.
_ARCHITECTURES: Mapping[str, tuple[str, str | None]] = MappingProxyType(
    {
        "x86_64": ("amd64", None),
        "aarch64": ("arm64", None),
        "i386": ("386", None),
        "i486": ("386", None),
        "i586": ("386", None),
        "i686": ("386", None),
        "armv5tel": ("arm", "v5"),
        "armv6l": ("arm", "v6"),
        "armv7a": ("arm", "v7"),
        "armv7l": ("arm", "v7"),
        "riscv64": ("riscv64", None),
        "powerpc64": ("ppc64", None),
        "powerpc64le": ("ppc64le", None),
        "s390x": ("s390x", None),
        "mips": ("mips", None),
        "mipsel": ("mipsle", None),
        "mips64": ("mips64", None),
        "mips64el": ("mips64le", None),
        "loongarch64": ("loong64", None),
    }
)
_SYSTEMS = frozenset({"linux", "darwin", "freebsd", "netbsd", "openbsd", "windows"})


def platform_of(system: System) -> dict[str, str]:
    """What an image's configuration and an index call a Nix system: ``{"architecture": "arm64", "os": "linux"}``.

    ``variant`` only where the architecture alone does not say it (32-bit ARM).

    :raises UsageError: containers have no name for it.
    """
    cpu, _, kernel = system.partition("-")
    if cpu not in _ARCHITECTURES or kernel not in _SYSTEMS:
        raise UsageError(
            f"the system {system} has no name among the platforms of container images",
            hint=f"known are {', '.join(sorted(_ARCHITECTURES))} with {', '.join(sorted(_SYSTEMS))}",
        )
    architecture, variant = _ARCHITECTURES[cpu]
    platform = {"architecture": architecture, "os": kernel}
    return platform | {"variant": variant} if variant else platform


def index_of(entries: Sequence[PushedSystem]) -> bytes:
    """The index over the manifests of ``entries``: the same bytes for the same manifests, whatever their order.

    An OCI index; where every manifest is docker's, docker's manifest list, for registries that keep them apart.

    :raises RegistryError: there is nothing to name, a system is there twice, or one is not a single image.
    """
    if not entries:
        raise RegistryError("an index needs at least one image", hint="push one first")
    made: dict[System, Descriptor] = {}
    for entry in entries:
        if entry.system in made:
            raise RegistryError(f"two images are for {entry.system}", hint="an index has one for each system")
        if entry.media_type not in (OCI_MANIFEST, DOCKER_MANIFEST):
            raise RegistryError(
                f"what was pushed for {entry.system} is no single image but {entry.media_type}",
                hint="the flake's attribute must be an image of one system",
            )
        if not is_digest(entry.digest):
            raise RegistryError(f"{entry.digest!r} is not the digest of a manifest", hint="push the image again")
        made[entry.system] = Descriptor(entry.media_type, entry.digest, entry.size, platform=platform_of(entry.system))
    docker = all(one.media_type == DOCKER_MANIFEST for one in made.values())
    return canonical(
        {
            "schemaVersion": 2,
            "mediaType": DOCKER_LIST if docker else OCI_INDEX,
            "manifests": [made[system].document() for system in sorted(made)],
        }
    )


def media_type_of(body: bytes) -> str:
    """The media type of a manifest or index as its own ``mediaType`` says: what :func:`index_of` made, to put it."""
    return Manifest.of(body, "").media_type
