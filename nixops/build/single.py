"""Any attribute of a flake, built on the best builder of its system, which keeps it for a day."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nixops.build.distributed import SCHEMA
from nixops.build.evaluate import without_credentials
from nixops.build.image import Event, ImageResult, build_image
from nixops.build.model import ImageSpec
from nixops.values import AttrPath, FlakeRef, System

if TYPE_CHECKING:
    from nixops.build.session import BuildSession


@dataclass(frozen=True)
class Single:
    """What came of it: each system's output is in the store of the builder that made it."""

    built: ImageResult

    def rows(self) -> list[tuple[str, ...]]:
        """Rows for :data:`nixops.build.distributed.HEADER`."""
        return [(str(i.system), str(i.built.builder) if i.built else "-", str(i.out)) for i in self.built.images]

    def document(self) -> dict[str, Any]:
        """The JSON document, schema ``nixops/build/1``. Times are seconds."""
        spec = self.built.spec
        return {
            "schema": SCHEMA,
            "flake": without_credentials(spec.flake),
            "attribute": str(spec.attribute),
            "distributed": False,
            "outputs": [
                {
                    "system": str(image.system),
                    "builder": str(image.built.builder) if image.built else None,
                    "drv": str(image.evaluated.drv),
                    "store_path": str(image.out),
                    "outputs": {"out": str(image.out)},
                }
                for image in self.built.images
            ],
            "builders": [],
            "tried": [{"builder": t.builder, "reason": t.reason} for t in self.built.tried],
            "seconds": round(self.built.seconds, 3),
        }


def build_single(
    flake: FlakeRef,
    attribute: AttrPath,
    systems: tuple[System, ...],
    session: BuildSession,
    *,
    on_event: Callable[[Event], None] = lambda _: None,
) -> Single:
    """Build an attribute for each of ``systems``, each on the best builder of its system, with failover.

    :raises BuildFailed: it does not evaluate or build. :raises NoBuilder: nobody is left to build a system.
    """
    spec = ImageSpec(flake, attribute, systems, copy_to=False)
    return Single(build_image(spec, session, on_event=on_event))
