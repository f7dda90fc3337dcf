"""Writing a host key into an inventory file in place: one line changes, comments and layout stay."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from nixops.errors import HostFault, InventoryError
from nixops.inventory.load import Loaded, load
from nixops.inventory.model import Inventory
from nixops.inventory.positions import Entry, Items, Node, Place, Scalar, Table, parse
from nixops.inventory.source import read_text
from nixops.values import HostName


def write_host_key(loaded: Loaded, host: HostName, key: str) -> None:
    """Pin ``key`` for ``host`` in the file that ``loaded`` came from, instead of whatever is pinned there now.

    The new text is loaded before it takes the old one's place, in one rename: it must hold the same inventory but
    for this key, or the file stays as it is.

    :param key: ``type base64``, without a comment.
    :raises InventoryError: the file's layout does not allow it (the host is written through an alias, say); the
        hint is the line to write by hand.
    :raises HostFault: the file cannot be written.
    """
    path = loaded.file
    text = read_text(path)
    changed = _with_key(text, parse(text, str(path)), host, key)
    refusal = InventoryError(
        f"{path}: the host key of {host} cannot be written here by a program",
        hint=f"write it by hand, under hosts.{host}: host_key: {key}",
    )
    if changed is None:
        raise refusal
    # Through a link, the file that it names is replaced, not the link.
    real = path.resolve()
    draft = _draft(real, changed)
    try:
        if not _differs_by_key_alone(loaded.inventory, draft, host, key):
            raise refusal
        shutil.copymode(real, draft)
        owner = real.stat()
        if (owner.st_uid, owner.st_gid) != (draft.stat().st_uid, draft.stat().st_gid):
            os.chown(draft, owner.st_uid, owner.st_gid)
        draft.replace(real)
    except OSError as error:
        raise _not_written(path, error) from None
    finally:
        draft.unlink(missing_ok=True)


def _draft(real: Path, text: str) -> Path:
    """A new file beside ``real`` that holds ``text``, on the disk."""
    try:
        descriptor, name = tempfile.mkstemp(dir=real.parent, prefix=f".{real.name}.")
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise _not_written(real, error) from None
    return Path(name)


def _not_written(path: Path, error: OSError) -> HostFault:
    return HostFault(f"{path}: cannot be written: {error.strerror}", hint="check its permissions and the disk")


def _differs_by_key_alone(old: Inventory, draft: Path, host: HostName, key: str) -> bool:
    try:
        new = load(draft).inventory
    except InventoryError:
        return False
    pinned = old.hosts[host].model_copy(update={"host_key": (key,)})
    return new == old.model_copy(update={"hosts": {**old.hosts, host: pinned}})


def _with_key(text: str, root: Table, host: str, key: str) -> str | None:
    """The text with the key in it, or ``None`` where it has no place to put one line."""
    hosts = root.entries.get("hosts")
    entry = hosts.value.entries.get(host) if hosts and not hosts.shared and isinstance(hosts.value, Table) else None
    if entry is None or entry.shared:
        return None
    lines = text.splitlines(keepends=True)
    newline = "\r\n" if lines and lines[0].endswith("\r\n") else "\n"
    if isinstance(entry.value, Scalar):
        # `name:` with nothing under it: everything comes from the defaults and groups.
        indent = " " * (entry.key.column + 1)
        return _insert(lines, entry.key.line, f"{indent}host_key: {key}", newline)
    if not isinstance(entry.value, Table):
        return None
    own = entry.value.entries.get("host_key")
    if own is not None and not own.shared:
        return _replace(lines, own, key)
    return _add(lines, entry.value, key, newline)


def _replace(lines: list[str], entry: Entry, key: str) -> str | None:
    """The value of an existing ``host_key:`` replaced, from its first character to its last."""
    value = entry.value
    if isinstance(value, Scalar) and value.block:
        return None
    start: Place = (entry.at.line, entry.at.column)
    end = _end(value)
    if end is None:
        return None
    written = key
    if isinstance(value, Scalar) and value.value is None and not value.written:
        # `host_key:` with nothing behind it: the value begins right after the colon.
        written = f" {key}"
    elif isinstance(value, Items) and entry.at.line > entry.key.line:
        # A block list below its key: the key moves up beside it.
        start = (entry.key.line, entry.key.column + len("host_key:"))
        if lines[entry.key.line - 1][entry.key.column - 1 :].rstrip() != "host_key:":
            return None
        written = f" {key}"
    before = [*lines[: start[0] - 1], lines[start[0] - 1][: start[1] - 1]]
    after = [lines[end[0] - 1][end[1] - 1 :], *lines[end[0] :]]
    return "".join([*before, written, *after])


def _end(node: Node) -> Place | None:
    if isinstance(node, Items) and node.items:
        last = node.items[-1]
        if isinstance(last, Scalar) and last.block:
            return None
    return node.end


def _add(lines: list[str], table: Table, key: str, newline: str) -> str | None:
    """A ``host_key`` added to a host's mapping: after its address, else before its first key."""
    own = {name: entry for name, entry in table.entries.items() if not entry.shared}
    if table.flow:
        line = lines[table.position.line - 1]
        opening = line.find("{", table.position.column - 1)
        if opening < 0:
            return None
        separator = ", " if table.entries else ""
        lines[table.position.line - 1] = f"{line[: opening + 1]}host_key: {key}{separator}{line[opening + 1 :]}"
        return "".join(lines)
    if not own:
        return None
    address = own.get("address")
    anchor = address or next(iter(own.values()))
    indent = " " * (anchor.key.column - 1)
    # A line of its own takes the indentation of its neighbour: what stands before that key must be only that.
    if lines[anchor.key.line - 1][: anchor.key.column - 1].strip():
        return None
    after = address.value.end[0] if address else anchor.key.line - 1
    return _insert(lines, after, f"{indent}host_key: {key}", newline)


def _insert(lines: list[str], after: int, line: str, newline: str) -> str:
    """``line`` after the line number ``after`` (from 1; 0 is before the first)."""
    if after and not lines[after - 1].endswith("\n"):
        lines[after - 1] += newline
    return "".join([*lines[:after], line + newline, *lines[after:]])
