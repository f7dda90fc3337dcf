"""KV v2 of OpenBao, always with check-and-set: a write says which version it replaces, or it does not happen."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from nixops.errors import CheckAndSetLost, VaultError
from nixops.secret import Redactor, Secret
from nixops.values import VaultPath
from nixops.vault.client import Access, BaoClient, Reply, VaultUnanswered
from nixops.vault.settings import BaoSettings

_CAS_TEXT = "check-and-set parameter"


@dataclass(frozen=True)
class KvEntry:
    """One readable version of an entry. A value that is no string is given as its JSON text."""

    path: VaultPath
    version: int
    data: dict[str, Secret]


@dataclass(frozen=True)
class _Stored:
    """A version as the server gives it: ``data`` is None for one that is deleted or destroyed."""

    version: int
    data: dict[str, Any] | None = field(repr=False)


@dataclass(frozen=True)
class _Payload:
    """What is written, as JSON takes it. Not shown, since a traceback may show the local variables of its frames."""

    data: Mapping[str, Any] = field(repr=False)


class OpenBao:
    """The KV v2 mount of one OpenBao (or Vault). Every error is a :class:`VaultError`; see :class:`BaoClient`.

    :param redactor: learns every secret that is read or written.
    """

    def __init__(self, settings: BaoSettings, redactor: Redactor) -> None:
        self.settings = settings
        self.redactor = redactor
        self.client = BaoClient(settings, redactor)
        self._mount_checked = False

    def __repr__(self) -> str:
        return f"OpenBao({self.settings.address!r}, mount={self.settings.mount!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Log out (of an AppRole login) and close the connections."""
        self.client.close()

    def check(self) -> None:
        """That it answers, is unsealed, lets us in, and has a KV v2 engine at the mount. Changes nothing.

        :raises VaultSealed: :raises VaultError: which of these is not so, and what to do.
        """
        mount = self.settings.mount
        reply = self._look_up_mount()
        if reply.status == 200:
            self._require_kv2(reply)
            return
        # A mount that is not there, one that the token has no path in, a token or a namespace that is none: the
        # look-up answers alike. Reading an entry that cannot be there tells them apart.
        access = Access("read", f"{mount}/data/hosts/*", ("read",))
        probe = self.client.call(access, lambda api: api.adapter.get(f"/v1/{mount}/data/hosts/-"), expect=(404,))
        if probe.errors:
            raise self.client.refusal(probe, access)

    def read(self, path: VaultPath, version: int | None = None, *, public: Collection[str] = ()) -> KvEntry | None:
        """The entry's current version, or an older one; None where there is none, or it is deleted or destroyed.

        :param public: keys whose values are no secrets, such as a runner's uuid: the redactor does not learn them.
        """
        stored = self._get(path, version)
        if stored is None or stored.data is None:
            return None
        data = {k: Secret(v if isinstance(v, str) else json.dumps(v)) for k, v in stored.data.items()}
        for key, value in data.items():
            if key not in public:
                self.redactor.add(value)
        return KvEntry(path, stored.version, data)

    def version(self, path: VaultPath) -> int:
        """The current version, to be passed as ``cas``; 0 when there is none. A deleted entry keeps its number."""
        stored = self._get(path, None)
        return stored.version if stored else 0

    def keys(self, directory: str) -> tuple[str, ...]:
        """The names of the entries in ``directory`` (below the mount), deleted ones too; none where there is none.

        :raises VaultError: the login may not list there.
        """
        self._check_mount_once()
        mount = self.settings.mount
        reply = self.client.call(
            Access("list", f"{mount}/metadata/{directory}", ("list",)),
            lambda api: api.secrets.kv.v2.list_secrets(directory, mount_point=mount),
            expect=(404,),
        )
        keys = reply.data.get("keys")
        return tuple(k for k in keys if isinstance(k, str) and not k.endswith("/")) if isinstance(keys, list) else ()

    def write(self, path: VaultPath, data: Mapping[str, Secret], *, cas: int, public: Collection[str] = ()) -> int:
        """Write a new version in place of version ``cas`` (0: only if there is no entry), and return its number.

        Whether to write data that has not changed is the caller's decision. An undo needs the path, ``cas`` and
        the returned number: ``restore(path, to_version=cas, from_version=returned)``.

        :raises CheckAndSetLost: the entry is at another version, which stands; both are named.
        :raises VaultUnanswered: no answer came, and the entry could not be read back to see what happened.
        """
        for key, value in data.items():
            if key not in public:
                self.redactor.add(value)
        return self._put(path, _Payload({k: v.reveal() for k, v in data.items()}), cas)

    def update(self, path: VaultPath, data: Mapping[str, Secret], *, cas: int, public: Collection[str] = ()) -> int:
        """As :meth:`write`, but the entry's other keys stay, each with the JSON value it has."""
        stored = self._get(path, None)
        if stored is not None and stored.version != cas:
            raise self._lost(path, cas, stored.version)
        for key, value in data.items():
            if key not in public:
                self.redactor.add(value)
        others = (stored.data or {}) if stored is not None else {}
        return self._put(path, _Payload({**others, **{k: v.reveal() for k, v in data.items()}}), cas)

    def restore(self, path: VaultPath, *, to_version: int, from_version: int) -> int | None:
        """Undo the write that made ``from_version`` out of ``to_version``.

        Where the older version can be read, its data is written again, in place of ``from_version`` only; the new
        number is returned. Where there was none (0, or it was deleted), ``from_version`` is destroyed, and it
        alone: nothing can be read then, as before, and None is returned. What a third party wrote since is never
        touched, not even if it comes in the very moment.

        :raises CheckAndSetLost: somebody wrote a newer version, which stands.
        """
        current = self._get(path, None)
        at = current.version if current else 0
        if at != from_version:
            raise self._lost(path, from_version, at)
        old = self._get(path, to_version) if to_version > 0 else None
        if old is not None and old.data is not None:
            return self._put(path, _Payload(old.data), from_version)
        # Deleting the entry as a whole knows no check-and-set; destroying a version by its number needs none.
        self.destroy(path, (from_version,))
        return None

    def delete(self, path: VaultPath, versions: Sequence[int]) -> None:
        """Delete versions so that :meth:`undelete` can bring them back. The undo needs path and numbers."""
        self._versions("delete", path, versions)

    def undelete(self, path: VaultPath, versions: Sequence[int]) -> None:
        """Bring deleted versions back. Those that are destroyed, or not deleted, stay as they are."""
        self._versions("undelete", path, versions)

    def destroy(self, path: VaultPath, versions: Sequence[int]) -> None:
        """Destroy versions for good; there is no undo. The entry's numbering goes on."""
        self._versions("destroy", path, versions)

    def forget(self, path: VaultPath, *, version: int) -> None:
        """Destroy every version of the entry up to ``version``, for good; none newer is touched.

        :raises CheckAndSetLost: there is a newer one, so somebody still uses the entry; nothing is destroyed.
        """
        at = self.version(path)
        if at != version:
            raise self._lost(path, version, at)
        if version > 0:
            self.destroy(path, tuple(range(1, version + 1)))

    # -- requests ---------------------------------------------------------------------------------------------

    def _get(self, path: VaultPath, version: int | None) -> _Stored | None:
        self._check_mount_once()
        mount = self.settings.mount
        access = Access("read", f"{mount}/data/{path}", ("read",))
        reply = self.client.call(
            access,
            lambda api: api.secrets.kv.v2.read_secret_version(
                path, version=version, mount_point=mount, raise_on_deleted_version=True
            ),
            expect=(404,),
        )
        metadata = reply.data.get("metadata")
        if isinstance(metadata, dict) and isinstance(metadata.get("version"), int):
            data = reply.data.get("data")
            return _Stored(metadata["version"], data if reply.status == 200 and isinstance(data, dict) else None)
        if reply.status == 404 and not reply.errors:
            return None
        if reply.status == 404:
            raise self.client.refusal(reply, access)
        raise VaultError(
            f"OpenBao at {self.settings.address} gave no version with {path}",
            hint=f"is {mount}/ a KV engine of version 2?",
        )

    def _put(self, path: VaultPath, payload: _Payload, cas: int) -> int:
        self._check_mount_once()
        mount = self.settings.mount
        access = Access("write", f"{mount}/data/{path}", ("create", "update"))
        try:
            reply = self.client.call(
                access,
                lambda api: api.secrets.kv.v2.create_or_update_secret(path, payload.data, cas=cas, mount_point=mount),
                expect=(400, 404),
            )
        except VaultUnanswered as error:
            unanswered = error
        else:
            if reply.status == 400 and any(_CAS_TEXT in e for e in reply.errors):
                raise self._lost(path, cas, None)
            made = reply.data.get("version")
            if reply.status >= 300 or not isinstance(made, int):
                raise self.client.refusal(reply, access)
            return made
        return self._what_happened(path, payload, cas, unanswered)

    def _what_happened(self, path: VaultPath, payload: _Payload, cas: int, error: VaultUnanswered) -> int:
        """After a write without an answer: the version it made, if it did; else the error, saying what is so."""
        try:
            stored = self._get(path, None)
        except VaultError:
            raise VaultUnanswered(
                f"{error.message}; whether {path} is at version {cas} or {cas + 1} now could not be read",
                hint=error.hint,
            ) from None
        at = stored.version if stored else 0
        if stored is not None and at == cas + 1 and stored.data == payload.data:
            return at
        if at == cas:
            raise VaultError(f"{error.message}; nothing was written to {path}", hint=error.hint) from None
        raise self._lost(path, cas, at)

    def _versions(self, verb: str, path: VaultPath, versions: Sequence[int]) -> None:
        self._check_mount_once()
        mount = self.settings.mount
        call = {
            "delete": "delete_secret_versions",
            "undelete": "undelete_secret_versions",
            "destroy": "destroy_secret_versions",
        }[verb]
        self.client.call(
            Access(verb, f"{mount}/{verb}/{path}", ("update",)),
            lambda api: getattr(api.secrets.kv.v2, call)(path, list(versions), mount_point=mount),
        )

    def _lost(self, path: VaultPath, expected: int, current: int | None) -> CheckAndSetLost:
        if current is None:
            try:
                current = self.version(path)
            except VaultError:
                pass  # it is told below that it is not known
        now = "another version" if current is None else f"version {current}" if current else "gone (version 0)"
        was = f"version {expected}" if expected else "no entry (version 0)"
        return CheckAndSetLost(
            f"somebody else changed {self.settings.mount}/{path}: expected was {was}, and it is at {now} now, "
            "which stands",
            hint="see who writes it, and run it again",
        )

    # -- the mount --------------------------------------------------------------------------------------------

    def _check_mount_once(self) -> None:
        """That the mount is KV v2. In KV v1 every v2 path reads as absent, so a write would be lost in it."""
        if self._mount_checked:
            return
        reply = self._look_up_mount()
        # Refused: the request that follows is refused too, and names the path and the policy better.
        if reply.status == 200:
            self._require_kv2(reply)
            self._mount_checked = True

    def _look_up_mount(self) -> Reply:
        mount = self.settings.mount
        return self.client.call(
            Access("look up", f"sys/internal/ui/mounts/{mount}", ("read",)),
            lambda api: api.adapter.get(f"/v1/sys/internal/ui/mounts/{mount}"),
            expect=(403, 404),
        )

    def _require_kv2(self, reply: Reply) -> None:
        mount = self.settings.mount
        options = reply.data.get("options")
        kind = reply.data.get("type")
        version = options.get("version") if isinstance(options, dict) else None
        if kind == "kv" and version == "2":
            return
        is_a = f"a KV engine of version {version or 1}" if kind in ("kv", "generic") else f"of type {kind}"
        raise VaultError(
            f"the mount {mount}/ of OpenBao at {self.settings.address} is {is_a}, and KV version 2 is needed",
            hint=f"name another in vault.mount, or: bao kv enable-versioning {mount}/"
            if kind in ("kv", "generic")
            else "name another in vault.mount",
        )
