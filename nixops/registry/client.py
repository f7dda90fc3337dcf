"""One registry, as the OCI distribution specification has it: manifests, blobs, referrers."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

from nixops.errors import RegistryError, UsageError
from nixops.inventory.building import Registry
from nixops.registry.auth import Authenticator
from nixops.registry.fault import NoAnswer, RegistryRefused, error_codes, oversized, refusal_hint, said
from nixops.registry.http import (
    ATTEMPTS,
    CONNECTIONS,
    ERROR_LIMIT,
    PASSING,
    REDIRECTS,
    Answer,
    RegistryHttp,
)
from nixops.registry.login import Login
from nixops.registry.manifest import (
    ACCEPTED,
    MANIFEST_LIMIT,
    Descriptor,
    Manifest,
    digest_of,
    is_digest,
    matches,
)
from nixops.registry.referrers import Receipt, Referrers
from nixops.secret import Redactor, Secret
from nixops.transport.web import joined, shown
from nixops.values import ImageReference, RegistryName
from nixops.vault.files import expanded

_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_OCTETS = {"Content-Type": "application/octet-stream"}
# Docker's own registry is not found under the name that its references have.
_DOCKER_IO = frozenset({"docker.io", "index.docker.io"})
_NOTHING: Mapping[str, str] = {}


class RegistryClient:
    """One registry's API; a context manager. Several threads may use it at once.

    :param settings: the inventory's ``registries`` entry; an empty one for a registry that has none.
    :param login: gives the login when the registry first asks for one, and again each time it is needed
        (:func:`nixops.registry.logins.login_for`).
    :param redactor: learns the password and each token.
    :param base: where a relative ``ca_file`` starts: the inventory file's directory.
    :raises UsageError: the settings' ``ca_file`` cannot be used.
    """

    def __init__(
        self,
        registry: RegistryName,
        *,
        settings: Registry,
        login: Callable[[], Login | None],
        redactor: Redactor,
        base: Path,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.registry = registry
        self._docker_io = registry in _DOCKER_IO
        self._http = RegistryHttp(
            registry,
            "registry-1.docker.io" if self._docker_io else registry,
            tls=settings.tls,
            ca_file=expanded(base, settings.ca_file) if settings.ca_file else None,
            timeout=settings.timeout,
            redactor=redactor,
            sleep=sleep,
        )
        self._auth = Authenticator(self._http, login, clock=clock)
        self._referrers = Referrers(self, sleep)
        self._sleep = sleep

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    # -- manifests --------------------------------------------------------------------------------------------

    def manifest(self, repository: str, reference: str) -> Manifest | None:
        """The manifest or index that a tag or a digest names; None where there is none.

        Its digest is computed from what came, and compared with what was asked for and what the registry calls it.

        :raises RegistryError: the registry refuses, fails, or gives something else than it says.
        """
        answer = self.ask(
            "GET",
            repository,
            f"manifests/{_reference(reference)}",
            ok=(200, 404),
            headers={"Accept": ", ".join(ACCEPTED)},
            limit=MANIFEST_LIMIT,
            follow=True,
        )
        if answer.status == 404:
            return None
        wanted = {reference} if is_digest(reference) else set()
        _compare(answer, answer.body, wanted)
        return Manifest.of(
            answer.body, answer.headers.get("content-type", ""), f"{self.registry}/{repository} {reference}"
        )

    def put_manifest(self, repository: str, reference: str, body: bytes, media_type: str) -> str:
        """Keep ``body`` under a tag or under its digest; a tag that there was moves to it.

        :returns: the digest, which is what the registry calls it too.
        :raises RegistryError: the registry refuses it (it must have every blob that is named), or calls it otherwise.
        """
        return self.put(repository, reference, body, media_type).digest

    def put(self, repository: str, reference: str, body: bytes, media_type: str) -> Receipt:
        """As :meth:`put_manifest`; also tells whether the registry has put it among its subject's referrers."""
        if len(body) > MANIFEST_LIMIT:
            raise oversized(f"registry {self.registry}: a manifest for {repository}", MANIFEST_LIMIT)
        if is_digest(reference) and not matches(body, reference):
            raise UsageError(f"the manifest for {self.registry}/{repository} has another digest than {reference}")
        answer = self.ask(
            "PUT",
            repository,
            f"manifests/{_reference(reference)}",
            push=True,
            ok=(200, 201, 202),
            headers={"Content-Type": media_type},
            body=body,
        )
        _compare(answer, body, set())
        return Receipt(digest_of(body), answer.headers.get("oci-subject"))

    def complete(self, repository: str, manifest: Manifest) -> tuple[str, ...]:
        """The digests of what ``manifest`` names and the registry lacks: configuration, layers, an index's manifests.

        All are asked for at once. A layer that is to be had elsewhere (``urls``) need not be there.
        """
        if manifest.is_index:
            return self._missing(manifest.manifests, lambda digest: self._has(repository, f"manifests/{digest}"))
        config = (manifest.config,) if manifest.config else ()
        blobs = (*config, *(layer for layer in manifest.layers if not layer.urls))
        return self._missing(blobs, lambda digest: self.has_blob(repository, digest))

    def _missing(self, named: Iterable[Descriptor], has: Callable[[str], bool]) -> tuple[str, ...]:
        digests = list(dict.fromkeys(one.digest for one in named))
        if not digests:
            return ()
        # The first alone: it is what learns how the registry wants us to log in.
        found = [has(digests[0])]
        with ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="nixops-registry") as threads:
            asked = [threads.submit(copy_context().run, has, digest) for digest in digests[1:]]
            found += [one.result() for one in asked]
        return tuple(digest for digest, there in zip(digests, found, strict=True) if not there)

    # -- blobs ------------------------------------------------------------------------------------------------

    def has_blob(self, repository: str, digest: str) -> bool:
        """Whether the repository holds this blob."""
        return self._has(repository, f"blobs/{_digest(digest)}")

    def _has(self, repository: str, path: str) -> bool:
        headers = {"Accept": ", ".join(ACCEPTED)}
        return self.ask("HEAD", repository, path, ok=(200, 404), headers=headers, follow=True).status == 200

    def blob(self, repository: str, digest: str, limit: int) -> bytes:
        """A blob's content, whose digest has been compared.

        :param limit: the most bytes it may have.
        :raises RegistryError: it is not there, larger, or something else than its digest says.
        """
        path = f"blobs/{_digest(digest)}"
        answer = self.ask("GET", repository, path, headers={"Accept": "*/*"}, limit=limit, follow=True)
        if not matches(answer.body, digest):
            raise _altered(answer, digest_of(answer.body), digest)
        return answer.body

    def put_blob(self, repository: str, body: bytes) -> str:
        """Keep ``body``, in one piece, unless the repository holds it already; its digest.

        An upload that failed on the way is begun again, a bounded number of times.
        """
        digest = digest_of(body)
        for attempt in range(ATTEMPTS):
            if self.has_blob(repository, digest):
                return digest
            try:
                self._upload(repository, body, digest)
                return digest
            except (NoAnswer, RegistryRefused) as error:
                passing = error.again if isinstance(error, NoAnswer) else error.status in PASSING
                if not passing or attempt == ATTEMPTS - 1:
                    raise
            self._sleep(0.25 * 2**attempt)
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _upload(self, repository: str, body: bytes, digest: str) -> None:
        begun = self.ask("POST", repository, "blobs/uploads/", push=True, ok=(202,), body=b"")
        place = joined(begun.url, begun.headers.get("location", ""))
        if not begun.headers.get("location") or not self._http.allowed(place):
            raise RegistryError(
                f"{begun.what}: the registry names no place for the upload that can be used: "
                f"{self._http.excerpt(shown(place))}",
                hint="a registry with TLS must name one with TLS: does the proxy before it set X-Forwarded-Proto?",
            )
        url = place + ("&" if urlsplit(place).query else "?") + f"digest={digest}"
        done = self._send("PUT", url, repository, True, _OCTETS, body, ERROR_LIMIT, again=False, follow=False)
        if done.status not in (201, 200, 204):
            raise self._refusal(done, repository, push=True)
        _compare(done, body, set())

    # -- referrers --------------------------------------------------------------------------------------------

    def referrers(self, repository: str, digest: str) -> tuple[Descriptor, ...]:
        """What is attached to a manifest: by the referrers API, and where there is none, by the fallback tag."""
        return self._referrers.of(repository, _digest(digest))

    def attach(
        self,
        repository: str,
        subject: Manifest | Descriptor,
        artifact_type: str,
        body: bytes,
        annotations: Mapping[str, str] = _NOTHING,
        *,
        layer_type: str | None = None,
    ) -> str:
        """Attach ``body`` to a manifest, as an artifact whose one layer it is; the artifact manifest's digest.

        The same again is the same digest, and changes nothing. Where the registry has no referrers API the artifact
        is also listed under the fallback tag ``sha256-…``.

        :param artifact_type: what it is, as a media type.
        :param layer_type: the media type of ``body``; ``artifact_type`` where left out.
        :raises RegistryError: the registry refuses, or another's change of the fallback tag came in between each time.
        """
        descriptor = subject.descriptor if isinstance(subject, Manifest) else subject
        return self._referrers.attach(repository, descriptor, artifact_type, body, annotations, layer_type)

    # -- requests ---------------------------------------------------------------------------------------------

    def ask(
        self,
        method: str,
        repository: str,
        path: str,
        *,
        push: bool = False,
        ok: Collection[int] = (200,),
        headers: Mapping[str, str] = _NOTHING,
        body: bytes | None = None,
        limit: int = ERROR_LIMIT,
        follow: bool = False,
    ) -> Answer:
        """One request below ``/v2/<repository>/``, with the login that the registry asks for.

        :param push: it takes the right to push, and not only to pull.
        :param ok: the statuses that are an answer; any other is an error.
        :raises RegistryError: the registry refuses or fails.
        """
        url = f"{self._http.base}/v2/{self._named(_repository(repository))}/{path}"
        answer = self._send(method, url, repository, push, headers, body, limit, again=method != "POST", follow=follow)
        if answer.status not in ok:
            raise self._refusal(answer, repository, push)
        return answer

    def _named(self, repository: str) -> str:
        return f"library/{repository}" if self._docker_io and "/" not in repository else repository

    def _send(
        self,
        method: str,
        url: str,
        repository: str,
        push: bool,
        headers: Mapping[str, str],
        body: bytes | None,
        limit: int,
        *,
        again: bool,
        follow: bool,
    ) -> Answer:
        scope = f"repository:{self._named(repository)}:{'pull,push' if push else 'pull'}"
        # Three: to learn what is asked for, and once more for a token that ended in between.
        for attempt in range(3):
            # An upload may go to another host, as a pre-signed address: the login stays here.
            sent: Secret | None = self._auth.header(scope) if self._http.ours(url) else None
            answer = self._http.send(
                method, url, authorization=sent, headers=headers, body=body, limit=limit, again=again, follow=follow
            )
            if answer.status != 401 or not self._http.ours(answer.url) or attempt == 2:
                return answer
            if not self._auth.challenged(answer, scope, sent):
                return answer
        raise AssertionError("unreachable: the last attempt returns")

    def _refusal(self, answer: Answer, repository: str, push: bool) -> RegistryRefused:
        if answer.status in REDIRECTS:
            place = self._http.excerpt(shown(joined(answer.url, answer.headers.get("location", ""))))
            return RegistryRefused(
                answer.status,
                f"{answer.what} was redirected to {place}, which is not followed",
                hint="name the registry by its final address; one that redirects to https must not have tls: false",
            )
        words = said(answer.body, answer.headers.get("content-type", ""), self._http.excerpt)
        return RegistryRefused(
            answer.status,
            f"{answer.what} was refused with {answer.status}" + (f": {words}" if words else ""),
            hint=refusal_hint(
                answer.status,
                f"{'push to' if push else 'pull from'} {repository}",
                registry=self.registry,
                user=self._auth.user,
                logged_in=self._auth.user is not None,
            ),
            codes=error_codes(answer.body),
        )


def _repository(text: str) -> str:
    try:
        if ImageReference(f"localhost/{text}:x").repository == text:
            return text
    except ValueError:
        pass
    raise UsageError(f"{text!r} is not the name of a repository in a registry")


def _reference(text: str) -> str:
    if not (_TAG.fullmatch(text) or is_digest(text)):
        raise UsageError(f"{text!r} is neither a tag nor a digest")
    return text


def _digest(text: str) -> str:
    if not is_digest(text):
        raise UsageError(f"{text!r} is not a digest")
    return text


def _compare(answer: Answer, body: bytes, wanted: set[str]) -> None:
    """:raises RegistryError: ``body`` is not what was asked for, or the registry calls it by another digest."""
    called = answer.headers.get("docker-content-digest")
    # An algorithm that is not known here cannot be compared; the one asked for always is.
    named = {called} if called is not None and is_digest(called) else set()
    for digest in sorted(wanted | named):
        if not matches(body, digest):
            raise _altered(answer, digest_of(body), digest)


def _altered(answer: Answer, found: str, wanted: str) -> RegistryError:
    return RegistryError(
        f"{answer.what}: the content is {found}, and should be {wanted}",
        hint="the registry, or a proxy before it, gives something else than was pushed: trust nothing from it",
    )
