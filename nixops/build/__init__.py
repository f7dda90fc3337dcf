"""Building on a pool of builders that survives its builders; images, their push and their record.

The library behind ``invoke build-image``, ``build``, ``build.pool`` and ``warm-cache``: frozen values in, frozen values
out, and errors of :mod:`nixops.errors`. ``examples/imagespec.py`` shows how a Python tool uses it.

    from nixops.build import BuildSession, ImageRequest, build_image, image_spec

Each name is loaded when it is first used: importing this package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nixops.build.distributed import Distributed, build_distributed
    from nixops.build.image import Event, ImageResult, build_image
    from nixops.build.model import Evaluated, ImageSpec, PoolBuilder, Probe, PushedSystem, Tried
    from nixops.build.pool import Pool, pool_of
    from nixops.build.request import ImageRequest, image_spec
    from nixops.build.session import BuildSession
    from nixops.build.single import Single, build_single
    from nixops.build.warm import verify_cache, warm_cache, warm_targets

__all__ = [
    "BuildSession",
    "Distributed",
    "Evaluated",
    "Event",
    "ImageRequest",
    "ImageResult",
    "ImageSpec",
    "Pool",
    "PoolBuilder",
    "Probe",
    "PushedSystem",
    "Single",
    "Tried",
    "build_distributed",
    "build_image",
    "build_single",
    "image_spec",
    "pool_of",
    "verify_cache",
    "warm_cache",
    "warm_targets",
]

_PLACES = {
    "distributed": ("Distributed", "build_distributed"),
    "image": ("Event", "ImageResult", "build_image"),
    "model": ("Evaluated", "ImageSpec", "PoolBuilder", "Probe", "PushedSystem", "Tried"),
    "pool": ("Pool", "pool_of"),
    "request": ("ImageRequest", "image_spec"),
    "session": ("BuildSession",),
    "single": ("Single", "build_single"),
    "warm": ("verify_cache", "warm_cache", "warm_targets"),
}


def __getattr__(name: str) -> Any:
    for module, names in _PLACES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
