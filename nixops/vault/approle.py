"""Each host's own AppRole and policy: it may read its own entries, and nothing else.

Enabling the auth method is not done here: it belongs to whoever sets OpenBao up.
"""

from __future__ import annotations

import contextlib
import datetime
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from nixops.errors import UsageError, VaultError
from nixops.secret import Secret
from nixops.values import HostName, VaultPath
from nixops.vault.client import Access, Reply
from nixops.vault.openbao import OpenBao

ISSUER: Final = "nixops"
# The host logs in for the moment of reading a secret; seconds.
TOKEN_TTL: Final = 1200
TOKEN_MAX_TTL: Final = 3600
# A role or an accessor that is not there is answered with any of these, by the request and the server's version.
_ABSENT: Final = (400, 404, 500)


@dataclass(frozen=True)
class RoleUndo:
    """What :meth:`HostRoles.undo` needs. Plain values and no secret: ``dataclasses.asdict`` can be written down.

    :ivar policy_before: the policy's text before, None when there was none; of use where ``policy_written``.
    :ivar role_before: the managed settings of the role before, None when there was none.
    """

    policy_written: bool = False
    policy_before: str | None = None
    role_written: bool = False
    role_before: dict[str, Any] | None = None


@dataclass(frozen=True)
class RoleState:
    """A host's role as :meth:`HostRoles.ensure` left it. A role id names a role; it opens nothing by itself."""

    role_id: str
    role_name: str
    policy_name: str
    changed: bool
    undo: RoleUndo = RoleUndo()


@dataclass(frozen=True)
class RolePlan:
    """What :meth:`HostRoles.ensure` would do: one line for each change, none when all is as it should be.

    :ivar role_id: of the role that is there, None when it would be created.
    """

    role_name: str
    policy_name: str
    changes: tuple[str, ...]
    role_id: str | None


@dataclass(frozen=True)
class WrappedSecretId:
    """A new secret id, wrapped: whoever unwraps ``token`` first gets it, and nobody after.

    :ivar accessor: names the secret id (not the wrapping token), opens nothing; the undo is
        :meth:`HostRoles.destroy_secret_id` with it.
    :ivar ttl_seconds: how long the wrapping token lasts.
    """

    host: HostName
    token: Secret
    accessor: str
    ttl_seconds: int


@dataclass(frozen=True)
class _Found:
    """What is there now."""

    policy: str | None
    role: dict[str, Any] | None = field(default=None)


class HostRoles:
    """The roles at one AppRole mount.

    :param mount: where the hosts' AppRole method is mounted (``vault.host_approle_mount``).
    :param prefix: of role and policy names (``vault.role_prefix``): ``host-`` gives ``host-nix-cache02``.
    """

    def __init__(self, bao: OpenBao, *, mount: str = "approle", prefix: str = "host-") -> None:
        self._bao = bao
        self._mount = mount
        self._prefix = prefix

    def name(self, host: HostName) -> str:
        """The name of the host's role, and of its policy. The server keeps both in lower case."""
        return f"{self._prefix}{host}".lower()

    def policy_text(self, host: HostName) -> str:
        """The policy: read on the host's entries and nothing else.

        In a namespace the same text is kept in that namespace, where paths are relative to it.
        """
        return (
            f"# Made by nixops: what the host {host} may read.\n"
            f'path "{self._bao.settings.mount}/data/hosts/{host}/*" {{\n'
            '  capabilities = ["read"]\n'
            "}\n"
        )

    @staticmethod
    def covers(host: HostName, path: VaultPath) -> bool:
        """Whether the host's policy lets it read the entry ``path``."""
        return path.startswith(f"hosts/{host}/")

    def settings(self, host: HostName) -> dict[str, Any]:
        """The role's settings that are managed. Others, such as bound CIDRs, stay as somebody may have set them."""
        return {
            "bind_secret_id": True,
            "secret_id_num_uses": 0,
            "secret_id_ttl": 0,
            "token_policies": [self.name(host)],
            # The default policy would let the token do more than read: tools, cubbyhole, look-ups of itself.
            "token_no_default_policy": True,
            "token_num_uses": 0,
            "token_ttl": TOKEN_TTL,
            "token_max_ttl": TOKEN_MAX_TTL,
        }

    def plan(self, host: HostName) -> RolePlan:
        """What :meth:`ensure` would do. Reads only.

        :raises UsageError: a role or policy of this name is somebody else's.
        :raises VaultError: the auth method is not enabled, or the token may not look.
        """
        found = self._find(host)
        name = self.name(host)
        changes: list[str] = []
        if found.policy is None:
            changes.append(f"create policy {name}: read on {self._bao.settings.mount}/data/hosts/{host}/*")
        elif not _same_policy(found.policy, self.policy_text(host)):
            changes.append(f"change policy {name}: read on {self._bao.settings.mount}/data/hosts/{host}/* only")
        if found.role is None:
            changes.append(f"create role {name} at auth/{self._mount}")
        else:
            for key, value in _differences(found.role, self.settings(host)).items():
                changes.append(f"change role {name} at auth/{self._mount}: {key} {found.role.get(key)} -> {value}")
        role_id = None if found.role is None else self._role_id(name)
        return RolePlan(name, name, tuple(changes), role_id)

    def ensure(self, host: HostName) -> RoleState:
        """Make the host's policy and role what they should be; write only what is not.

        :raises UsageError: a role or policy of this name is somebody else's; nothing was written.
        """
        found = self._find(host)
        name, text, wanted = self.name(host), self.policy_text(host), self.settings(host)
        undo = RoleUndo()
        if found.policy is None or not _same_policy(found.policy, text):
            self._write_policy(name, text)
            undo = RoleUndo(True, found.policy)
        if found.role is None or _differences(found.role, wanted):
            before = None if found.role is None else {k: found.role.get(k) for k in wanted}
            undo = RoleUndo(undo.policy_written, undo.policy_before, True, before)
            try:
                self._write_role(name, wanted)
            except VaultError:
                # Nothing half done: the policy that was written a moment ago goes back first.
                with contextlib.suppress(VaultError):
                    self.undo(host, undo)
                raise
        changed = undo.policy_written or undo.role_written
        return RoleState(self._role_id(name), name, name, changed, undo)

    def undo(self, host: HostName, undo: RoleUndo) -> None:
        """Take back what :meth:`ensure` wrote, as far as it still stands as written; what others changed stays.

        A role that ``ensure`` created goes, and with it every secret id of it.
        """
        found = self._find(host)
        name = self.name(host)
        if undo.role_written and found.role is not None and not _differences(found.role, self.settings(host)):
            if undo.role_before is None:
                self._bao.client.call(
                    Access("delete", f"auth/{self._mount}/role/{name}", ("delete",)),
                    lambda api: api.auth.approle.delete_role(name, mount_point=self._mount),
                )
            else:
                self._write_role(name, undo.role_before)
        if undo.policy_written and found.policy is not None and _same_policy(found.policy, self.policy_text(host)):
            if undo.policy_before is None:
                self._bao.client.call(
                    Access("delete", f"sys/policies/acl/{name}", ("delete",)),
                    lambda api: api.sys.delete_acl_policy(name),
                )
            else:
                self._write_policy(name, undo.policy_before)

    # -- secret ids -------------------------------------------------------------------------------------------

    def wrap_secret_id(self, host: HostName, ttl_seconds: int = 120) -> WrappedSecretId:
        """Issue a new secret id for the host, wrapped; it never comes here unwrapped.

        Its metadata says that nixops issued it, for which host and when, so that it can be told from others.
        """
        name = self.name(host)
        metadata = {
            "issued_by": ISSUER,
            "host": str(host),
            "issued_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        reply = self._bao.client.call(
            Access("issue a secret id", f"auth/{self._mount}/role/{name}/secret-id", ("update",)),
            lambda api: api.auth.approle.generate_secret_id(
                name, metadata=metadata, mount_point=self._mount, wrap_ttl=f"{ttl_seconds}s"
            ),
        )
        info = reply.body.get("wrap_info")
        token = info.get("token") if isinstance(info, dict) else None
        accessor = info.get("wrapped_accessor") if isinstance(info, dict) else None
        if not isinstance(token, str) or not isinstance(accessor, str) or not accessor:
            raise VaultError(
                f"OpenBao at {self._bao.settings.address} gave no wrapped secret id for {name}",
                hint="OpenBao 2, or Vault 1.10 and later, tells the accessor of what it wrapped",
            )
        return WrappedSecretId(host, self._bao.redactor.add(Secret(token)), accessor, ttl_seconds)

    def secret_id_valid(self, host: HostName, accessor: str) -> bool:
        """Whether the secret id that ``accessor`` names still belongs to the host's role."""
        return self._look_up(host, accessor) is not None

    def ours(self, host: HostName) -> tuple[str, ...]:
        """Accessors of the secret ids that nixops issued for this host, oldest first; nobody else's."""
        name = self.name(host)
        access = Access("list", f"auth/{self._mount}/role/{name}/secret-id", ("list",))
        reply = self._bao.client.call(
            access,
            lambda api: api.auth.approle.list_secret_id_accessors(name, mount_point=self._mount),
            expect=_ABSENT,
        )
        self._require_ok_or_absent(reply, access)
        if reply.status >= 300:
            return ()
        accessors = reply.data.get("keys")
        if not isinstance(accessors, list):
            raise VaultError(f"OpenBao at {self._bao.settings.address} gave no list of the secret ids of {name}")
        mine: list[tuple[str, str]] = []
        for accessor in map(str, accessors):
            data = self._look_up(host, accessor) or {}
            metadata = data.get("metadata") or {}
            if metadata.get("issued_by") == ISSUER and metadata.get("host") == host:
                mine.append((sortable_time(str(data.get("creation_time", ""))), accessor))
        return tuple(accessor for _, accessor in sorted(mine))

    def destroy_secret_id(self, host: HostName, accessor: str) -> None:
        """Destroy one secret id, for good. One that is gone already is no error."""
        name = self.name(host)
        access = Access("destroy", f"auth/{self._mount}/role/{name}/secret-id-accessor/destroy", ("update",))
        reply = self._bao.client.call(
            access,
            lambda api: api.auth.approle.destroy_secret_id_accessor(name, accessor, mount_point=self._mount),
            expect=_ABSENT,
        )
        self._require_ok_or_absent(reply, access)

    def destroy_older(self, host: HostName, *, keep: str) -> tuple[str, ...]:
        """After a deploy has held: destroy the secret ids that nixops issued before ``keep``; returns their accessors.

        Nothing is destroyed when ``keep`` is not one of ours, and never a secret id that somebody else issued.
        """
        mine = self.ours(host)
        if keep not in mine:
            return ()
        older = mine[: mine.index(keep)]
        for accessor in older:
            self.destroy_secret_id(host, accessor)
        return older

    # -- requests ---------------------------------------------------------------------------------------------

    def _look_up(self, host: HostName, accessor: str) -> dict[str, Any] | None:
        name = self.name(host)
        access = Access("look up", f"auth/{self._mount}/role/{name}/secret-id-accessor/lookup", ("update",))
        reply = self._bao.client.call(
            access,
            lambda api: api.auth.approle.read_secret_id_accessor(name, accessor, mount_point=self._mount),
            expect=_ABSENT,
        )
        self._require_ok_or_absent(reply, access)
        return reply.data if reply.status == 200 and reply.data else None

    def _require_ok_or_absent(self, reply: Reply, access: Access) -> None:
        self._require_mount(reply, access, absent=("does not exist", "failed to find accessor"))

    def _find(self, host: HostName) -> _Found:
        """The policy and role that are there, if they are ours to change."""
        name = self.name(host)
        role = self._bao.client.call(
            access := Access("read", f"auth/{self._mount}/role/{name}", ("read",)),
            lambda api: api.auth.approle.read_role(name, mount_point=self._mount),
            expect=(404,),
        )
        self._require_mount(role, access)
        policy = self._bao.client.call(
            Access("read", f"sys/policies/acl/{name}", ("read",)),
            lambda api: api.sys.read_acl_policy(name),
            expect=(404,),
        )
        text = policy.data.get("policy") if policy.status == 200 else None
        found = _Found(text if isinstance(text, str) else None, role.data if role.status == 200 else None)
        if found.role is not None and found.role.get("token_policies") != [name]:
            raise self._foreign(f"the role {name} at auth/{self._mount}", "has other policies than its own")
        ours = self.policy_text(host)
        if found.policy is not None and not _same_policy(found.policy, ours) and _marker(ours) not in found.policy:
            raise self._foreign(f"the policy {name}", "was not made by nixops and says something else")
        return found

    def _require_mount(self, reply: Reply, access: Access, absent: tuple[str, ...] = ()) -> None:
        if reply.status < 300 or any(text in error for text in absent for error in reply.errors):
            return
        if reply.status == 404 and not reply.errors:
            return
        if any("no handler for route" in e for e in reply.errors):
            raise VaultError(
                f"OpenBao at {self._bao.settings.address} has no AppRole auth method at {self._mount}/",
                hint=f"enable it, which nixops leaves to you: bao auth enable -path={self._mount} approle "
                "(with the namespace, if there is one), or name another in vault.host_approle_mount",
            )
        raise self._bao.client.refusal(reply, access)

    def _foreign(self, what: str, why: str) -> UsageError:
        return UsageError(
            f"{what} of OpenBao at {self._bao.settings.address} {why}",
            hint="it is left alone: choose another vault.role_prefix, or remove it",
        )

    def _role_id(self, name: str) -> str:
        reply = self._bao.client.call(
            Access("read", f"auth/{self._mount}/role/{name}/role-id", ("read",)),
            lambda api: api.auth.approle.read_role_id(name, mount_point=self._mount),
        )
        role_id = reply.data.get("role_id")
        if not isinstance(role_id, str) or not re.fullmatch(r"[A-Za-z0-9._-]+", role_id):
            raise VaultError(f"OpenBao at {self._bao.settings.address} gave no usable role id for {name}")
        return role_id

    def _write_policy(self, name: str, text: str) -> None:
        self._bao.client.call(
            Access("write", f"sys/policies/acl/{name}", ("create", "update")),
            lambda api: api.sys.create_or_update_acl_policy(name, text, pretty_print=False),
        )

    def _write_role(self, name: str, settings: Mapping[str, Any]) -> None:
        self._bao.client.call(
            Access("write", f"auth/{self._mount}/role/{name}", ("create", "update")),
            lambda api: api.auth.approle.create_or_update_approle(
                name, mount_point=self._mount, **{k: v for k, v in settings.items() if v is not None}
            ),
        )


def sortable_time(text: str) -> str:
    """A UTC time as Go writes it (``…:15Z``, ``…:15.4Z``), with nine digits of its second, to sort as text."""
    whole, _, fraction = text.removesuffix("Z").partition(".")
    return f"{whole}.{fraction:0<9}"


def _marker(text: str) -> str:
    return text.splitlines()[0]


def _same_policy(one: str, other: str) -> bool:
    """Whether two policies say the same, but for comments and white space."""

    def bare(text: str) -> str:
        return re.sub(r"\s+", "", re.sub(r"(?m)^\s*(#|//).*$", "", text))

    return bare(one) == bare(other)


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in wanted.items() if found.get(k) != v}
