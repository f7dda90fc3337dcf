"""Pushing an image from the builder that built it: ``push.sh`` runs there, watched from here.

The registry's login goes over on stdin, into a file on tmpfs that ``REGISTRY_AUTH_FILE`` names there. It is removed
however the push ends: a line goes over every two seconds, and without them ``push.sh`` stops what it started.
"""

from __future__ import annotations

import base64
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import resources
from typing import Final

from nixops.build.model import BuiltSystem, Shape
from nixops.errors import CommandTimeout, PushFailed, Unreachable, UsageError
from nixops.nix.log import full_disk, plain
from nixops.secret import Secret
from nixops.transport.command import Command, LineSink, Result
from nixops.transport.exec import StreamRunner
from nixops.values import ImageReference

# How often a sign of life goes over, and after how many seconds without one the builder gives up.
BEAT: Final = 2.0
SILENCE: Final = 15
# What is left to the builder to end a push whose time is up, before this side does.
_SPARE: Final = 20.0
_MAX_ANSWER: Final = 64 * 1024
# How much of what the pushing program says is passed on, characters; and after how much it is stopped.
_SHOWN: Final = 1 << 20
_MOST: Final = 64 << 20
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")
# Go's words for a registry that is not reached at all, as opposed to one that refuses.
_NO_ROUTE: Final = re.compile(
    r"dial tcp|no such host|i/o timeout|connection refused|network is unreachable|no route to host"
    r"|TLS handshake timeout|connection reset by peer|Temporary failure in name resolution",
    re.IGNORECASE,
)
# Why push.sh did not even begin, where another builder may well be able to.
_UNFIT: Final = {
    "memory": "has no tmpfs with room that its login may write to, and a registry's login belongs on no disk",
    "skopeo": "has no skopeo on its login's PATH, which pushes an image that has no copyTo of its own",
    "gone": "does not have the image any more",
    "printf": "has a shell without a printf of its own, to which a registry's login cannot be told",
}


class BuilderUnfit(Unreachable):
    """This builder cannot push the image, and another may: it counts as a fault of the builder's."""


@dataclass(frozen=True)
class RegistryAccess:
    """What a builder needs to push somewhere.

    :ivar auth_file: the text of the file that ``REGISTRY_AUTH_FILE`` names; None for a registry without a login.
    :ivar authority: the PEM text of the authority that the registry's certificate is checked by; empty: the usual.
    :ivar tls: False for plain HTTP.
    """

    auth_file: Secret | None
    authority: bytes = b""
    tls: bool = True


@dataclass(frozen=True)
class Sent:
    """What came of a push.

    :ivar digest: of the manifest, as the program that pushed it says; None where it does not.
    :ivar shape: how it was pushed.
    """

    digest: str | None
    shape: Shape
    seconds: float


def script() -> str:
    """The text of ``push.sh``."""
    return (resources.files("nixops.build") / "push.sh").read_text(encoding="utf-8")


def push_system(
    runner: StreamRunner,
    built: BuiltSystem,
    destination: ImageReference,
    access: RegistryAccess,
    *,
    timeout: float,
    root: str | None = None,
    on_line: LineSink | None = None,
    clean: Callable[[str], str] = str,
) -> Sent:
    """Push one system's image from its builder.

    :param destination: checked by its grammar, as every argument here: a ``copy-to`` may expand them unquoted.
    :param timeout: seconds for the push.
    :param root: the link on the builder that keeps the image from garbage collection; removed after a push.
    :param on_line: gets what the pushing program says, as far as that has an end.
    :param clean: takes secrets out of what stands in an error.
    :raises PushFailed: the program or the registry refused.
    :raises UsageError: the output is nothing that can be pushed.
    :raises BuilderUnfit: the builder lacks something for it. :raises Unreachable: it was lost.
    """
    began = time.monotonic()
    feed = _Feed(access)
    command = Command.of(
        *("sh", "-c", script(), "nixops-push", built.evaluated.shape, built.out, built.evaluated.program or ""),
        *(f"{destination.registry}/{destination.repository}:{destination.tag}", "tls" if access.tls else "plain"),
        *(f"{timeout:.0f}", str(SILENCE), root or ""),
        timeout=timeout + _SPARE,
        title="the push",
    )
    try:
        result = runner.stream(command, stdin=feed, stdout=feed.take, on_line=_Heard(built, on_line).line)
    except CommandTimeout:
        raise _too_long(built, destination, timeout) from None
    finally:
        feed.end()
    said = clean(plain(result.tail(15)))
    return _outcome(result, said, feed.answer(), built, destination, timeout, time.monotonic() - began)


class _Heard:
    """What the pushing program says: passed on, bounded, and never for ever."""

    def __init__(self, built: BuiltSystem, on_line: LineSink | None) -> None:
        self._built = built
        self._on_line = on_line
        self._size = 0

    def line(self, text: str) -> None:
        """A line. :raises PushFailed: there were too many."""
        shown = self._size < _SHOWN
        self._size += len(text) + 1
        if self._on_line is not None and shown:
            self._on_line(text if self._size < _SHOWN else "… (it says more, which is not shown)")
        if self._size > _MOST:
            raise PushFailed(
                f"what pushes {self._built.evaluated.system}'s image from {self._built.builder} was stopped: it had "
                f"said more than {_MOST >> 20} MiB",
                hint="look at the image's copyTo: does it repeat itself for ever?",
            )


class _Feed:
    """The stdin of ``push.sh``, which lasts as long as the push, and its stdout, which says when that is over."""

    def __init__(self, access: RegistryAccess) -> None:
        self._access = access
        self._over = threading.Event()
        self._said = b""

    def __iter__(self) -> Iterator[bytes]:
        given = self._access.auth_file
        # One line each, whatever the text was: nothing of the builder's own logins is used where there is none.
        login = json.dumps(json.loads(given.reveal()) if given is not None else {"auths": {}})
        yield f"{login}\n{base64.b64encode(self._access.authority).decode()}\n".encode()
        beat = 0
        while not self._over.wait(BEAT):
            beat += 1
            yield f"{beat}\n".encode()

    def take(self, piece: bytes) -> None:
        """A piece of stdout. Once it is over, stdin ends too."""
        if len(self._said) < _MAX_ANSWER:
            self._said += piece
        if self._said.endswith(b"\nend\n"):
            self._over.set()

    def end(self) -> None:
        """No more signs of life."""
        self._over.set()

    def answer(self) -> dict[str, str]:
        lines = (line.partition(" ") for line in self._said.decode(errors="replace").splitlines())
        return {key: value for key, _, value in lines}


def _outcome(
    result: Result,
    said: str,
    answer: dict[str, str],
    built: BuiltSystem,
    destination: ImageReference,
    timeout: float,
    took: float,
) -> Sent:
    if answer.get("code") == "0":
        digest = answer.get("digest", "")
        return Sent(digest if _DIGEST.fullmatch(digest) else None, _shape(answer), took)
    refused = answer.get("refused")
    if refused in _UNFIT:
        raise BuilderUnfit(f"{built.builder} {_UNFIT[refused]}", detail=said)
    if refused == "shape":
        raise UsageError(
            f"{built.evaluated.installable} cannot be pushed: {said.splitlines()[-1] if said else 'it is no image'}",
            hint="an image is what has a copyTo (nix2container), an OCI layout, or a docker archive (dockerTools)",
        )
    if refused == "silence":
        raise PushFailed(
            f"the push from {built.builder} was stopped there: it had no sign of life from here for {SILENCE} s",
            hint="was this machine asleep? Run it again",
        )
    if full_disk(said):
        raise BuilderUnfit(f"the disk of {built.builder} is full: the push failed", detail=said)
    # 137: it did not heed being told to end, and was killed.
    if answer.get("code") in ("124", "137") and took >= timeout:
        raise _too_long(built, destination, timeout)
    if _NO_ROUTE.search(said):
        raise BuilderUnfit(f"{built.builder} does not reach the registry {destination.registry}", detail=said)
    code = answer.get("code", str(result.code))
    raise PushFailed(
        f"{built.builder} could not push {built.evaluated.system}'s image to {destination} (exit code {code})",
        hint="its last lines are below; the tag is where it was",
        detail=said,
    )


def _shape(answer: dict[str, str]) -> Shape:
    try:
        return Shape(answer.get("shape", ""))
    except ValueError:
        return Shape.UNKNOWN


def _too_long(built: BuiltSystem, destination: ImageReference, timeout: float) -> PushFailed:
    return PushFailed(
        f"the push of {built.evaluated.system}'s image from {built.builder} to {destination} did not end within "
        f"{timeout:g} s",
        hint="see build.push_timeout; run again, and what is there already is not sent again",
    )
