"""What a push means to the registry: staging tags, comparing what is there with what was sent, the index, the tag.

Each system's image goes under a tag of its own first, made from the system and the hash of what Nix built. So the
registry itself remembers what it was given: the same output again needs no upload, whoever asks, and the tag that
people use moves last and in one step.
"""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any, Final

from nixops.build.model import PushedSystem
from nixops.build.push import Sent
from nixops.errors import PushFailed, RegistryError
from nixops.registry.index import index_of, media_type_of, platform_of
from nixops.registry.manifest import Manifest, digest_of
from nixops.values import ImageReference, StorePath, System

if TYPE_CHECKING:  # requests is only loaded by those who speak to a registry
    from nixops.registry.client import RegistryClient

# An image's configuration is some kilobytes.
_CONFIG_LIMIT: Final = 4 * 1024 * 1024


def staging_reference(destination: ImageReference, system: System, out: StorePath) -> ImageReference:
    """Where one system's image goes: ``nixops-x86_64-linux-<hash>`` in the destination's repository."""
    return destination.tagged(f"nixops-{system}-{out.hash_part}")


def already_there(client: RegistryClient, staging: ImageReference, system: System) -> PushedSystem | None:
    """The image, if the registry has the whole of it; None where it has to be pushed.

    :raises RegistryError: the registry refuses or fails.
    """
    began = time.monotonic()
    manifest = client.manifest(staging.repository, staging.tag)
    if manifest is None or manifest.is_index or client.complete(staging.repository, manifest):
        return None
    if _misfit(client, staging, manifest, system) is not None:
        return None
    return _pushed(staging, system, manifest, False, time.monotonic() - began)


def confirm(client: RegistryClient, staging: ImageReference, system: System, sent: Sent) -> PushedSystem:
    """Ask the registry for what was just pushed, and compare: digest, every blob, the architecture.

    :raises PushFailed: it is not there, not whole, or another image.
    """
    manifest = client.manifest(staging.repository, staging.tag)
    if manifest is None:
        raise PushFailed(
            f"{system}'s image was pushed, and the registry has no {staging}", hint="look at the registry's log"
        )
    if sent.digest is not None and sent.digest != manifest.digest:
        raise PushFailed(
            f"the registry has another image under {staging} than was pushed",
            hint="did somebody else push there at the same time? Run it again",
            detail=f"pushed: {sent.digest}\nthere:  {manifest.digest}",
        )
    if manifest.is_index:
        raise PushFailed(
            f"what was pushed for {system} is an index over several images",
            hint="the flake's attribute must be an image of one system",
        )
    missing = client.complete(staging.repository, manifest)
    if missing:
        raise PushFailed(
            f"the registry lacks parts of the image {staging} that was pushed to it",
            hint="look at the registry's log and its disk",
            detail="\n".join(missing),
        )
    misfit = _misfit(client, staging, manifest, system)
    if misfit is not None:
        raise PushFailed(
            f"the image of {system} says of itself that it is for {misfit}",
            hint="is its architecture set by hand, or does the flake build it for another system?",
        )
    return _pushed(staging, system, manifest, True, sent.seconds)


def named_digest(pushed: list[PushedSystem]) -> str:
    """The digest of what the tag shall name: see :func:`prepare`, which makes it."""
    return pushed[0].digest if len(pushed) == 1 else digest_of(index_of(pushed))


def prepare(client: RegistryClient, destination: ImageReference, pushed: list[PushedSystem]) -> Manifest:
    """What the tag shall name: the image itself, or for several systems an index over them, which is there
    afterwards under its digest, and compared.

    :raises RegistryError: the registry refuses it, or does not give it back. :raises PushFailed: an image is gone.
    """
    repository = destination.repository
    if len(pushed) == 1:
        manifest = client.manifest(repository, pushed[0].digest)
        if manifest is None:
            raise PushFailed(f"the registry lost {pushed[0].reference} in a moment", hint="run it again")
        return manifest
    body = index_of(pushed)
    index = client.manifest(repository, digest_of(body))
    if index is None:
        client.put_manifest(repository, digest_of(body), body, media_type_of(body))
        index = client.manifest(repository, digest_of(body))
    if index is None or index.body != body:
        raise PushFailed(f"the registry does not give back the index that was put for {destination}")
    missing = client.complete(repository, index)
    if missing:
        raise PushFailed(f"the registry lacks images that the index for {destination} names", detail="\n".join(missing))
    return index


def move_tag(client: RegistryClient, destination: ImageReference, named: Manifest) -> None:
    """Let the tag name it, and look whether it does: also after a request that failed, which may yet have been
    carried out.

    :raises RegistryError: it failed, and the tag does not name it; the error says what it names.
    :raises PushFailed: it names something else.
    """
    repository, tag = destination.repository, destination.tag
    failed: RegistryError | None = None
    try:
        client.put_manifest(repository, tag, named.body, named.media_type)
    except RegistryError as error:
        failed = error
    try:
        there = client.manifest(repository, tag)
    except RegistryError as error:
        raise _unknown(failed or error, destination) from None
    if there is not None and there.digest == named.digest:
        return
    names = there.digest if there is not None else "nothing"
    if failed is not None:
        failed.detail = "\n".join(filter(None, (failed.detail, f"asked afterwards, {destination} names {names}")))
        raise failed
    raise PushFailed(
        f"{destination} does not name what it was moved to",
        hint="did somebody else push to the same tag at the same time?",
        detail=f"ours:  {named.digest}\nthere: {names}",
    )


def _unknown(error: RegistryError, destination: ImageReference) -> RegistryError:
    said = f"{destination} may have moved or not: the registry could not be asked afterwards; the next run tells"
    error.detail = "\n".join(filter(None, (error.detail, said)))
    return error


def _misfit(client: RegistryClient, staging: ImageReference, manifest: Manifest, system: System) -> str | None:
    """The platform that the image's configuration names, where it is not the system's."""
    config = manifest.config
    if config is None:
        return "no platform at all"
    try:
        document: dict[str, Any] = json.loads(client.blob(staging.repository, config.digest, _CONFIG_LIMIT))
        found = {"architecture": str(document["architecture"]), "os": str(document["os"])}
    except (ValueError, KeyError, TypeError):
        return "no platform at all"
    wanted = platform_of(system)
    if all(found[key] == wanted[key] for key in found):
        return None
    return f"{found['os']}/{found['architecture']}"


def _pushed(staging: ImageReference, system: System, manifest: Manifest, uploaded: bool, took: float) -> PushedSystem:
    return PushedSystem(system, staging, manifest.digest, manifest.size, manifest.media_type, uploaded, took)
