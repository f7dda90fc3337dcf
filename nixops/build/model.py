"""The values that building passes along. Nothing here has an effect or loads anything heavy."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from nixops.transport.target import SshTarget
from nixops.values import AttrPath, FlakeRef, HostName, ImageReference, StorePath, System


@dataclass(frozen=True)
class PoolBuilder:
    """A machine that may build: a host of the inventory, a line of a machines file, or an instance in EC2.

    :ivar systems: what it builds for, at least one.
    :ivar max_jobs: how many builds it runs at once.
    :ivar speed_factor: how fast it is, compared with the others.
    :ivar source: ``inventory``, ``machines FILE`` or ``ec2 REGION``: where it comes from, for people.
    :ivar excluded: why it cannot be used whatever it answers, such as a host key that nobody pinned.
    """

    target: SshTarget
    systems: tuple[System, ...]
    max_jobs: int = 1
    speed_factor: int = 1
    features: frozenset[str] = frozenset()
    mandatory_features: frozenset[str] = frozenset()
    source: str = "inventory"
    excluded: str | None = None

    @property
    def name(self) -> HostName:
        return self.target.name

    def takes(self, system: System, required: frozenset[str]) -> bool:
        """Whether Nix's own rules let it build this: its system, required features, mandatory ones asked for."""
        known = self.features | self.mandatory_features
        return system in self.systems and required <= known and self.mandatory_features <= required


@dataclass(frozen=True)
class Probe:
    """What a builder answered when it was asked, or why it did not.

    :ivar reason: why it cannot be used; None when it can.
    :ivar nix: ``(2, 26)`` of Nix 2.26.1.
    :ivar load: the load average of the last minute.
    :ivar free: bytes that its store's file system has free.
    :ivar building: how many derivations it builds at the moment, whoever asked for them.
    :ivar claims: how many builds of this operator's machine use it at the moment.
    :ivar seconds: how long it took to answer.
    """

    builder: PoolBuilder
    reason: str | None = None
    nix: tuple[int, int] | None = None
    cores: int | None = None
    load: float | None = None
    free: int | None = None
    building: int | None = None
    claims: int = 0
    seconds: float = 0.0

    @property
    def usable(self) -> bool:
        return self.reason is None


@dataclass(frozen=True)
class Tried:
    """A builder that was to build or push and could not, and why: a line of the log and of the document."""

    builder: str
    system: System
    reason: str


class Shape(StrEnum):
    """How an image's output is pushed."""

    COPY_TO = "copyTo"  # nix2container: a program that pushes the image
    ARCHIVE = "docker-archive"  # dockerTools: a tar file, compressed or not
    LAYOUT = "oci-layout"  # a directory with an index.json
    UNKNOWN = "unknown"  # decided once it is built


@dataclass(frozen=True)
class ImageSpec:
    """What to build: the flake's attribute, once for each system, and where it goes.

    :ivar flake: as Nix takes it; a path is absolute.
    :ivar destination: where a push takes it; None for a build that stays where it is.
    :ivar copy_to: build the attribute's ``copyTo`` where it has one; False for what is no image.
    """

    flake: FlakeRef
    attribute: AttrPath
    systems: tuple[System, ...]
    destination: ImageReference | None = None
    provenance: bool = False
    copy_to: bool = True


@dataclass(frozen=True)
class Evaluated:
    """One system's image after evaluation, before anything is built.

    :ivar drv: the derivation to build: the image's ``copyTo`` where it has one, else the image itself.
    :ivar out: its output path, known beforehand (None for a content-addressed derivation).
    :ivar features: the ``requiredSystemFeatures`` of that derivation.
    :ivar program: ``meta.mainProgram`` of ``copyTo``, where it says one.
    """

    system: System
    installable: str
    drv: StorePath
    out: StorePath | None
    shape: Shape
    features: frozenset[str] = frozenset()
    program: str | None = None


@dataclass(frozen=True)
class BuiltSystem:
    """One system's image, built. Times are seconds; ``began`` and ``ended`` are Unix times."""

    evaluated: Evaluated
    builder: HostName
    out: StorePath
    nix: tuple[int, int]
    seconds: float
    began: float
    ended: float
    tried: tuple[Tried, ...] = ()


@dataclass(frozen=True)
class PushedSystem:
    """One system's manifest in the registry, asked for and compared.

    :ivar uploaded: False when the registry had it already and nothing was sent.
    """

    system: System
    reference: ImageReference
    digest: str
    size: int
    media_type: str
    uploaded: bool
    seconds: float
