"""What stays of an image that was built: a small JSON file in the operator's state directory, and no secret in it."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from nixops.build.evaluate import FlakeFacts, without_credentials
from nixops.build.model import BuiltSystem, Evaluated, ImageSpec, PushedSystem, Tried
from nixops.errors import HostFault
from nixops.state import private_directory
from nixops.values import StorePath, System

SCHEMA: Final = "nixops/image-record/1"
# How many are kept; the oldest go.
KEEP: Final = 500
# What is set aside for one, bytes; and after how many seconds what was set aside is nobody's any more.
_ROOM: Final = 64 * 1024
_ABANDONED: Final = 24 * 3600.0


@dataclass(frozen=True)
class SystemImage:
    """What became of one system's image.

    :ivar out: the output; where it was in the registry already, as evaluation has it.
    :ivar built: None where nothing had to be built, since the registry had it already.
    :ivar pushed: None where nothing was to be pushed.
    :ivar seconds: for all of it.
    """

    evaluated: Evaluated
    out: StorePath
    seconds: float
    built: BuiltSystem | None = None
    pushed: PushedSystem | None = None

    @property
    def system(self) -> System:
        return self.evaluated.system


def stamp(seconds: float) -> str:
    """A Unix time as RFC 3339 has it, in UTC: ``2026-11-21T08:15:00Z``."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def record_document(
    spec: ImageSpec,
    facts: FlakeFacts,
    images: Sequence[SystemImage],
    *,
    digest: str | None,
    moved: bool,
    tried: Sequence[Tried] = (),
) -> dict[str, Any]:
    """The record as JSON.

    :param digest: what the tag names now; None where nothing was pushed.
    :param moved: whether it was this run that moved the tag there.
    """
    return {
        "schema": SCHEMA,
        "recorded": stamp(time.time()),
        "flake": without_credentials(spec.flake),
        "url": facts.url,
        "revision": facts.revision,
        "dirty": facts.dirty,
        "attribute": str(spec.attribute),
        "reference": str(spec.destination) if spec.destination else None,
        "digest": digest,
        "moved": moved,
        "images": [_image(image) for image in images],
        "tried": [{"builder": t.builder, "system": str(t.system), "reason": t.reason} for t in tried],
    }


def _image(image: SystemImage) -> dict[str, Any]:
    built, pushed = image.built, image.pushed
    return {
        "system": str(image.system),
        "derivation": str(image.evaluated.drv),
        "output": str(image.out),
        "builder": str(built.builder) if built else None,
        "nix": ".".join(map(str, built.nix)) if built else None,
        "began": stamp(built.began) if built else None,
        "ended": stamp(built.ended) if built else None,
        "build_seconds": round(built.seconds, 3) if built else None,
        "digest": pushed.digest if pushed else None,
        "media_type": pushed.media_type if pushed else None,
        "size": pushed.size if pushed else None,
        "uploaded": pushed.uploaded if pushed else None,
        "push_seconds": round(pushed.seconds, 3) if pushed else None,
    }


def write_record(state: Path, document: Mapping[str, Any]) -> Path:
    """Write it below ``state``: whole or not at all, and on the disk when this returns.

    :raises HostFault: it cannot be written.
    """
    with reserved(state) as keep:
        return keep(document)


@contextmanager
def reserved(state: Path) -> Iterator[Callable[[Mapping[str, Any]], Path]]:
    """Room for a record: what the block gets writes it, as :func:`write_record` does.

    So a disk that is full, or a directory that nobody may write to, is told of before a tag moves and not after.

    :raises HostFault: there is no room, or no place.
    """
    directory = private_directory(private_directory(state) / "images")
    name = f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{secrets.token_hex(4)}"
    path, beside = directory / f"{name}.json", directory / f".{name}"
    with _told(directory, "the tag is where it was"):
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with _told(directory, "the tag is where it was"):
            _fill(descriptor, b"\n" * _ROOM)

        def keep(document: Mapping[str, Any]) -> Path:
            text = (json.dumps(document, indent=2) + "\n").encode()
            with _told(directory, "the image itself is where it should be"):
                _fill(descriptor, text)
                os.ftruncate(descriptor, len(text))
                os.fsync(descriptor)
                beside.rename(path)
                _sync(directory)
            return path

        yield keep
    finally:
        os.close(descriptor)
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
    _sweep(directory)


@contextmanager
def _told(directory: Path, state: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise HostFault(
            f"the image's record cannot be written to {directory}: {error.strerror}",
            hint=f"make room, or set XDG_STATE_HOME; {state}",
        ) from None


def _fill(descriptor: int, data: bytes) -> None:
    with os.fdopen(os.dup(descriptor), "wb") as file:
        file.seek(0)
        file.write(data)


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sweep(directory: Path) -> None:
    """Remove the oldest records, and what a killed run had reserved."""
    left = [path for path in directory.glob(".[0-9]*T*") if _age(path) > _ABANDONED]
    for old in (*sorted(directory.glob("*.json"))[:-KEEP], *left):
        with contextlib.suppress(OSError):
            old.unlink()


def _age(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return 0.0


def records(state: Path) -> Iterator[Mapping[str, Any]]:
    """The records, the newest first; what cannot be read is passed over."""
    for path in sorted((state / "images").glob("*.json"), reverse=True):
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(document, dict) and document.get("schema") == SCHEMA:
            yield document


def who_built(state: Path, out: StorePath) -> Mapping[str, Any] | None:
    """What an earlier record says of the build of this output; None where no record has it."""
    for document in records(state):
        images = document.get("images")
        for image in images if isinstance(images, list) else ():
            if isinstance(image, dict) and image.get("output") == out and image.get("builder"):
                return image
    return None
