"""The secret id comes to the host wrapped, over stdin, and is unwrapped there: it never passes through here.

The host needs ``sh``, ``curl``, coreutils and ``sed``.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nixops.errors import HostFault, NixopsError, UsageError, VaultError
from nixops.secret import Redactor, Secret
from nixops.transport.command import Command, Result, Runner
from nixops.values import AbsolutePath
from nixops.vault.approle import WrappedSecretId
from nixops.vault.deliver_script import DELIVER, LOOK, SETTLE, WITHDRAW, Ended

# What can stand between quotes in a curl configuration, where '\' and '"' are special.
_QUOTABLE = re.compile(r"[^\x00-\x1f\x7f\"\\]*")
_CREDENTIAL = re.compile(r"[A-Za-z0-9._-]+")
_UNWRAP_SECONDS = 30


@dataclass(frozen=True)
class Delivered:
    """What a delivery did; plain values and no secret, so that it can be written down for :func:`withdraw_approle`.

    :ivar accessor: of the secret id that is in place now.
    :ivar replaced: accessor of the one of ours that was there before; None when there was none.
    """

    directory: AbsolutePath
    accessor: str
    replaced: str | None


@dataclass(frozen=True)
class HostAppRole:
    """The AppRole that a host has.

    :ivar accessor: of its secret id if nixops delivered it, None if somebody else put it there.
    :ivar closed: directory and files belong to root and are open to nobody else.
    """

    role_id: str
    accessor: str | None
    closed: bool


def deliver_approle(
    runner: Runner,
    *,
    directory: AbsolutePath,
    address: str,
    namespace: str | None,
    host_ca_file: str | None,
    role_id: str,
    wrapped: WrappedSecretId,
    destroy: Callable[[], None],
    search: Sequence[str] = (),
) -> Delivered:
    """Put ``role-id`` and ``secret-id`` (0400, root) into ``directory`` (0700, root) on the host.

    The host unwraps the secret id itself. Each file is complete or not there; the old ones stay until the new
    ones are written. ``secret-id-accessor`` beside them says which one it is. Neither file ends with a newline.

    :param address: OpenBao's URL as the host reaches it.
    :param destroy: destroys the secret id on OpenBao
        (``lambda: roles.destroy_secret_id(host, wrapped.accessor)``); called whenever it is sure that the host
        does not use it, and first of all when somebody else may have it.
    :param search: further directories of the host where its tools are.
    :raises VaultError: OpenBao refused the host, is not reached from it, or the wrapping token was used before.
    :raises HostFault: the host could not keep the files; also when the directory holds somebody else's AppRole.
    :raises Unreachable: the connection ended: whether the files are in place is not known, so the secret id is
        not destroyed. :func:`approle_delivered` tells.
    """
    values = {
        "directory": directory,
        "address": address.rstrip("/"),
        "namespace": namespace or "",
        "ca_file": host_ca_file or "",
        "role_id": role_id,
        "accessor": wrapped.accessor,
        "search": ":".join(search),
        "seconds": str(_UNWRAP_SECONDS),
        "token": wrapped.token.reveal(),
    }
    for name in ("address", "namespace", "ca_file"):
        if not _QUOTABLE.fullmatch(values[name]):
            raise UsageError(f"the {name.replace('_', ' ')} {values[name]!r} holds a character that it cannot")
    for name in ("role_id", "accessor", "token"):
        if not _CREDENTIAL.fullmatch(values[name]):
            raise VaultError(f"OpenBao gave a {name.replace('_', ' ')} that is none")
    result = _run(runner, "the delivery of the AppRole", DELIVER, values, timeout=_UNWRAP_SECONDS + 60.0)
    if result.ok:
        told = dict(line.split("=", 1) for line in result.out.splitlines() if "=" in line)
        return Delivered(directory, wrapped.accessor, told.get("replaced") or None)
    text = Redactor([wrapped.token]).clean(result.tail()).strip()
    failure = _failure(result, text, runner.host, directory, address)
    try:
        destroy()
    except NixopsError as error:
        raise type(failure)(
            f"{failure.message}; and its secret id could not be destroyed: {error.message}",
            hint=f"destroy it by hand, accessor {wrapped.accessor}; {failure.hint or ''}".rstrip("; "),
        ) from None
    raise failure


def approle_delivered(runner: Runner, directory: AbsolutePath, *, search: Sequence[str] = ()) -> HostAppRole | None:
    """The AppRole in ``directory`` on the host; None when a file is missing or empty. Changes nothing.

    :raises HostFault: it could not be looked at.
    """
    result = _run(runner, "looking for the AppRole", LOOK, {"directory": directory, "search": ":".join(search)})
    if not result.ok:
        raise HostFault(
            f"{runner.host} could not look for the AppRole in {directory}", detail=result.tail(), hint="see below"
        )
    told = dict(line.split("=", 1) for line in result.out.splitlines() if "=" in line)
    if told.get("there") != "yes":
        return None
    return HostAppRole(told.get("role_id", ""), told.get("accessor") or None, told.get("closed") == "yes")


def withdraw_approle(runner: Runner, delivered: Delivered, *, search: Sequence[str] = ()) -> bool:
    """Undo of a delivery: put back what it replaced, or take the files (and an empty directory) away again.

    Only if they are still those of this delivery; returns whether they were. Do it before its secret id is
    destroyed, and before those of older deliveries are.
    """
    return _on_ours(runner, "withdrawing the AppRole", WITHDRAW, delivered, search)


def settle_approle(runner: Runner, delivered: Delivered, *, search: Sequence[str] = ()) -> bool:
    """A delivery stands for good: remove what it replaced, which was kept for :func:`withdraw_approle`."""
    return _on_ours(runner, "settling the AppRole", SETTLE, delivered, search)


def _on_ours(runner: Runner, title: str, body: str, delivered: Delivered, search: Sequence[str]) -> bool:
    values = {"directory": delivered.directory, "accessor": delivered.accessor, "search": ":".join(search)}
    result = _run(runner, title, body, values)
    if not result.ok:
        raise HostFault(f"{runner.host}: {title} in {delivered.directory} failed", detail=result.tail())
    return "done=yes" in result.out.splitlines()


def _run(runner: Runner, title: str, body: str, values: dict[str, str], timeout: float = 60.0) -> Result:
    # Everything that varies is an assignment in the script, which comes on stdin; argv is the same for all.
    # A variable that the environment already has would be handed on to every program: unset makes a new one.
    head = "".join(f"unset nixops_{k}\nnixops_{k}={shlex.quote(v)}\n" for k, v in values.items())
    script = Secret(f"set +a\n{head}{body}")
    return runner.run(Command.of("sh", "-s", "--", stdin=script, root=True, timeout=timeout, title=title))


def _failure(result: Result, text: str, host: str, directory: str, address: str) -> VaultError | HostFault:
    match result.code:
        case Ended.USED:
            return VaultError(
                f"SOMEBODY ELSE MAY HAVE TAKEN THE SECRET ID of {host}: its wrapping token was used before the host "
                "used it, or ran out. The secret id was destroyed and opens nothing",
                hint="look at OpenBao's audit log for sys/wrapping/unwrap, and at who can read what goes to the host; "
                "if the delivery was only slow, run it again",
            )
        case Ended.SUBSTITUTED:
            return VaultError(
                f"what {host} unwrapped is not the secret id that was issued for it: SOMEBODY MAY HAVE REPLACED IT. "
                "The issued one was destroyed and opens nothing",
                hint="look at OpenBao's audit log, and at who can change what goes to the host",
            )
        case Ended.NETWORK:
            return VaultError(
                f"{host} cannot reach OpenBao at {address}: {text}",
                hint="set vault.host_address (and vault.host_ca_file) to what the host uses",
            )
        case Ended.HTTP:
            return VaultError(f"OpenBao at {address} refused {host}: {text}", hint="see OpenBao's log")
        case Ended.ANSWER:
            return VaultError(
                f"{host} got an answer from {address} that is not OpenBao's",
                hint="is vault.host_address right, and is there a proxy?",
            )
        case Ended.FOREIGN:
            return HostFault(
                f"{directory} on {host} holds an AppRole that nixops did not deliver; it was left as it is",
                hint="give this host an approle_dir of its own for nixops, or move the old files away",
            )
        case _:
            return HostFault(f"{host} could not keep its AppRole in {directory}: {text}", hint="see above")
