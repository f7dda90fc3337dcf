"""From the command line and the inventory to what is asked for: an :class:`ImageSpec`. Nothing is run here.

Every text is checked by the grammar of its kind before anything happens, so that nothing odd reaches a shell, a
registry or a script on a builder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from nixops.build.model import ImageSpec
from nixops.errors import UsageError
from nixops.inventory import nearest
from nixops.inventory.load import Loaded
from nixops.inventory.model import Image
from nixops.values import AttrPath, FlakeRef, ImageReference, System

Value = TypeVar("Value")


@dataclass(frozen=True)
class ImageRequest:
    """What was asked for, as text.

    :ivar image: a name under ``images:``; left out: ``default.image``, or the only one.
    :ivar flake: takes the place of the image's; a path is relative to the working directory.
    :ivar systems: joined by commas.
    :ivar push: a reference; True for the image's own destination; None or False to build and not push.
    """

    image: str | None = None
    flake: str | None = None
    attr: str | None = None
    systems: str | None = None
    push: str | bool | None = None
    provenance: bool = False


def image_spec(loaded: Loaded, request: ImageRequest, directory: Path) -> ImageSpec:
    """What to build.

    :param directory: what a relative path in ``request.flake`` starts from.
    :raises UsageError: something is missing or is not of its grammar; the hint says what to write.
    """
    if request.provenance and not request.push:
        raise UsageError(
            "--provenance attaches to what is pushed, and nothing is to be", hint="add --push, or leave it out"
        )
    image = _image(loaded, request)
    if request.flake is not None:
        flake = flake_at(_checked(FlakeRef, request.flake, "--flake"), directory, "--flake")
    else:
        assert image is not None  # _image saw to it
        flake = flake_at(image.flake, loaded.base, f"{loaded.file}: images: flake")
    if request.attr is not None:
        attribute = _checked(AttrPath, request.attr, "--attr")
    else:
        assert image is not None
        attribute = image.attribute
    if request.systems is not None:
        systems = systems_of(request.systems)
    else:
        assert image is not None
        systems = image.systems
    return ImageSpec(
        flake=flake,
        attribute=attribute,
        systems=systems,
        destination=_destination(image, request),
        provenance=request.provenance or (image is not None and image.provenance),
    )


def _image(loaded: Loaded, request: ImageRequest) -> Image | None:
    """The image meant. None where the command line says everything itself."""
    images = loaded.inventory.images
    name = request.image
    if name is None and request.flake is not None:
        missing = [
            flag
            for flag, value in (("--attr docker", request.attr), ("--systems x86_64-linux", request.systems))
            if value is None
        ]
        if missing:
            raise UsageError(
                f"--flake {request.flake}: nothing is taken from the inventory's images then",
                hint=f"add {' and '.join(missing)}",
            )
        return None
    if name is None:
        default = loaded.inventory.default
        if default is not None and default.image is not None:
            name = default.image
        elif len(images) == 1:
            (name,) = images
        elif images:
            raise UsageError(
                f"{loaded.file}: which image? The inventory has no default image",
                hint=f"--image, one of: {', '.join(images)}",
            )
        else:
            raise UsageError(
                f"{loaded.file}: there is no image to build",
                hint="describe one: images: {app: {flake: ../app, attribute: docker, systems: [x86_64-linux]}}, "
                "or say --flake REF --attr PATH --systems x86_64-linux",
            )
    if name not in images:
        raise UsageError(
            f"{loaded.file}: there is no image {name!r}",
            hint=nearest.hint(name, images, what="images") if images else "the inventory has no images",
        )
    return images[name]


def _destination(image: Image | None, request: ImageRequest) -> ImageReference | None:
    if isinstance(request.push, str):
        return _checked(ImageReference, request.push, "--push")
    if not request.push:
        return None
    if image is None or image.destination is None:
        raise UsageError(
            "--push: it is not said where to",
            hint="--push docker://registry/repository:tag, or images.NAME.destination",
        )
    return image.destination


def systems_of(text: str, flag: str = "--systems") -> tuple[System, ...]:
    """The systems of a command line, joined by commas.

    :param flag: where they stand, for errors.
    :raises UsageError: one is no system, or stands there twice.
    """
    systems = tuple(_checked(System, part.strip(), flag) for part in text.split(","))
    if len(set(systems)) != len(systems):
        raise UsageError(f"{flag} {text}: a system stands there twice")
    return systems


def attribute_of(text: str) -> AttrPath:
    """The attribute path of a command line.

    :raises UsageError: it is none.
    """
    return _checked(AttrPath, text, "--attr")


def flake_of(text: str, directory: Path) -> FlakeRef:
    """The flake reference of a command line; see :func:`flake_at`."""
    return flake_at(_checked(FlakeRef, text, "--flake"), directory, "--flake")


def flake_at(flake: FlakeRef, directory: Path, what: str) -> FlakeRef:
    """``flake`` with a path made absolute; other references stay as they are.

    :param directory: what a relative path starts from.
    :param what: where the reference stands, for errors.
    :raises UsageError: there is no flake in that directory, or its path is one that Nix does not take.
    """
    if not flake.is_path:
        if (directory / flake / "flake.nix").is_file():
            raise UsageError(
                f"{what}: {flake} means an entry of Nix's registry of flakes, and there is a directory of that name",
                hint=f"for the directory write ./{flake}",
            )
        return flake
    path = (directory / Path(flake).expanduser()).resolve()
    if not (path / "flake.nix").is_file():
        raise UsageError(f"{what}: there is no flake.nix in {path}", hint="a path is a directory with a flake")
    return _checked(FlakeRef, str(path), what)


def _checked(kind: Callable[[str], Value], text: str, what: str) -> Value:
    hint = "the attribute goes to --attr" if kind is FlakeRef and "#" in text else None
    try:
        return kind(text)
    except ValueError as error:
        raise UsageError(f"{what}: {error}", hint=hint) from None
