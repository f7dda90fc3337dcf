"""Reading Nix's machines format ("Remote Builds" in the Nix manual): builders, with positions for errors.

A line is: store URI, systems, private key, jobs at once, speed factor, features, mandatory features, base64 of the
public host key; ``-`` or nothing stands for none. As Nix does, ``;`` ends a line too, ``#`` begins a comment and
``@FILE`` stands for that file's lines. What Nix takes and we could not honour is an error, never passed over.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar
from urllib.parse import parse_qsl, unquote

from nixops.build.model import PoolBuilder
from nixops.errors import InventoryError, Position, UsageError
from nixops.transport.hostkey import HostKey
from nixops.transport.target import SshTarget
from nixops.values import Address, HostName, System

V = TypeVar("V")

MAX_BYTES = 1 << 20
_DEEPEST = 5
_FIELDS = 8
_USER = re.compile(r"[a-z_][a-z0-9_.-]{0,31}")
_FEATURE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+:-]{0,127}")
_NAME = r"[A-Za-z0-9_.%-]"
_URI = re.compile(
    rf"(?:(?P<scheme>ssh|ssh-ng)://)?(?:(?P<user>{_NAME}+)@)?"
    rf"(?P<host>\[[0-9A-Fa-f:.%A-Za-z]+\]|{_NAME}+)(?::(?P<port>[0-9]{{1,5}}))?/?(?:\?(?P<query>\S*))?"
)
# Settings of a store URI that change how fast, and not what, is talked to.
_TUNING = frozenset(
    {"compress", "max-connections", "max-connection-age", "path-info-cache-size", "priority", "want-mass-query"}
)
# Names that Nix gives a meaning of their own: this machine's store.
_HERE = frozenset({"auto", "daemon", "local", "dummy"})


@dataclass(frozen=True)
class _Word:
    """A piece of a file and where it stands."""

    text: str
    at: Position

    def error(self, message: str, hint: str | None = None) -> InventoryError:
        return InventoryError(message, hint=hint, position=self.at)


def read_machines(path: Path) -> tuple[PoolBuilder, ...]:
    """The builders of a machines file.

    :raises UsageError: it cannot be read, or is no text of at most 1 MiB.
    :raises InventoryError: a line is wrong; the position says where.
    """
    return parse_machines(_text(path, None), path)


def parse_machines(text: str, file: Path | str, *, system: System | None = None) -> tuple[PoolBuilder, ...]:
    """The builders of a text in the machines format, in its order; each has a name of its own.

    :param file: what positions call it; ``@FILE`` of a relative path starts in its directory.
    :param system: of a line that names none; by default this machine's, as Nix has it.
    :raises InventoryError: a line is wrong; the position says where.
    """
    builders: list[PoolBuilder] = []
    taken: set[str] = set()
    for words in _lines(text, str(file), ()):
        builder = _builder(words, str(file), system or _this_system())
        name = _unique(builder.name, taken)
        taken.add(name.lower())
        builders.append(_renamed(builder, name))
    return tuple(builders)


# -- lines and words ------------------------------------------------------------------------------------------


def _lines(text: str, file: str, above: tuple[str, ...]) -> Iterator[list[_Word]]:
    """The words of each line that says something, those of included files in their place."""
    for number, line in enumerate(text.split("\n"), 1):
        start = 0
        # Nix splits at ';' before it looks for '#', so that a comment ends there too.
        for piece in line.split(";"):
            said = piece.split("#", 1)[0]
            words = [
                _Word(found[0], Position(file, number, start + found.start() + 1))
                for found in re.finditer(r"[^ \t\r\n]+", said)
            ]
            start += len(piece) + 1
            if words and words[0].text.startswith("@"):
                yield from _included(words, file, above)
            elif words:
                yield words


def _included(words: list[_Word], file: str, above: tuple[str, ...]) -> Iterator[list[_Word]]:
    if len(words) > 1:
        raise words[1].error("nothing can stand behind @FILE", "put it on a line of its own")
    word = words[0]
    path = Path(file).parent / word.text[1:]
    if str(path) in (*above, file) or len(above) >= _DEEPEST:
        raise word.error(f"{path} includes itself, or too deep")
    yield from _lines(_text(path, word), str(path), (*above, file))


def _text(path: Path, word: _Word | None) -> str:
    problem: str
    try:
        with path.open("rb") as source:
            data = source.read(MAX_BYTES + 1)
        if len(data) <= MAX_BYTES:
            return data.decode()
        problem = "it has more than 1 MiB"
    except OSError as error:
        problem = error.strerror or type(error).__name__
    except UnicodeDecodeError:
        problem = "it is no UTF-8 text"
    raise UsageError(
        f"the machines file {path} cannot be read: {problem}",
        hint="see build.machines in the inventory",
        position=word.at if word else None,
    )


# -- one line -------------------------------------------------------------------------------------------------


def _builder(words: list[_Word], file: str, system: System) -> PoolBuilder:
    if len(words) > _FIELDS:
        raise words[_FIELDS].error(f"a line has at most {_FIELDS} fields", "join systems and features with commas")

    def field(index: int) -> _Word | None:
        return words[index] if len(words) > index and words[index].text != "-" else None

    if field(0) is None:
        raise words[0].error("the store URI is missing", "begin the line with ssh-ng://user@host")
    target, key, identity = _target(words[0])
    if (given := field(7)) is not None:
        key = _host_key(given, given.text)
    if (given := field(2)) is not None:
        identity = Path(given.text)
    try:
        identity = identity and identity.expanduser()
    except RuntimeError:
        raise (given or words[0]).error(f"{identity} names the home of a user that is not there") from None
    jobs = _number(field(3), 4096, whole=True)
    excluded = "its line in the machines file has no public host key (the eighth field)" if key is None else None
    if jobs == 0:
        excluded = "its line in the machines file allows it no jobs"
    mandatory = _list(field(6))
    return PoolBuilder(
        target=_with(target, key, identity, Path(file).parent),
        systems=tuple(dict.fromkeys(_checked(System, word, text) for word, text in _parts(field(1)))) or (system,),
        max_jobs=max(1, int(jobs)),
        # Nix takes fractions from 2.21 on.
        speed_factor=max(1, round(_number(field(4), 1000, whole=False))),
        features=_list(field(5)),
        mandatory_features=mandatory,
        source=f"machines {file}",
        excluded=excluded,
    )


def _target(word: _Word) -> tuple[SshTarget, HostKey | None, Path | None]:
    found = _URI.fullmatch(word.text)
    if found is None or (found["scheme"] is None and (found["host"] in _HERE or word.text.startswith((".", "/")))):
        # Some write a password there; it is not repeated.
        said = re.sub(r"//[^/@]*:[^/]*@", "//***@", word.text)
        raise word.error(
            f"{said[:200]!r} is no store that is reached by SSH",
            "write ssh-ng://user@host, with ?… behind it for settings",
        )
    user = unquote(found["user"] or "root")
    if not _USER.fullmatch(user):
        raise word.error(f"{user!r} is no user name")
    address = _checked(Address, word, unquote(found["host"].strip("[]")))
    port = int(found["port"] or 22)
    if not 0 < port < 65536:
        raise word.error(f"{port} is no port")
    key: HostKey | None = None
    identity: Path | None = None
    for name, value in parse_qsl(found["query"] or "", keep_blank_values=True):
        if name == "ssh-key":
            identity = Path(value) if value else None
        elif name == "base64-ssh-public-host-key":
            key = _host_key(word, value) if value else None
        elif name not in _TUNING:
            raise word.error(
                f"the setting {name[:100]!r} of a store URI cannot be honoured here",
                "builders are reached through the nix-daemon of their login's PATH",
            )
    target = SshTarget(name=_name(address), address=address, port=port, user=user)
    return target, key, identity


def _with(target: SshTarget, key: HostKey | None, identity: Path | None, base: Path) -> SshTarget:
    return SshTarget(
        name=target.name,
        address=target.address,
        port=target.port,
        user=target.user,
        host_keys=(str(key),) if key else (),
        identity_file=base / identity if identity else None,
    )


def _host_key(word: _Word, text: str) -> HostKey:
    try:
        # The decoded text is a line of a .pub file.
        return HostKey.parse(base64.b64decode(text, validate=True).decode("ascii"))
    except (binascii.Error, UnicodeDecodeError):
        problem = "it is not valid base64 of a text"
    except ValueError as error:
        problem = str(error)
    raise word.error(f"the public host key is wrong: {problem}", "base64 -w0 /etc/ssh/ssh_host_ed25519_key.pub")


def _number(word: _Word | None, most: int, *, whole: bool) -> float:
    """A count, 1 where none is given."""
    if word is None:
        return 1
    if not re.fullmatch(r"\d{1,6}" if whole else r"\d{1,6}(\.\d{0,6})?|\.\d{1,6}", word.text):
        raise word.error(f"{word.text[:50]!r} is no {'number' if whole else 'speed factor'}")
    if float(word.text) > most:
        raise word.error(f"{word.text} is more than {most}")
    return float(word.text)


def _parts(word: _Word | None) -> Iterator[tuple[_Word, str]]:
    if word is not None:
        for found in re.finditer(r"[^,]+", word.text):
            at = Position(word.at.file, word.at.line, word.at.column + found.start())
            yield _Word(found[0], at), found[0]


def _list(word: _Word | None) -> frozenset[str]:
    for part, text in _parts(word):
        if not _FEATURE.fullmatch(text):
            raise part.error(f"{text[:100]!r} is no feature")
    return frozenset(text for _, text in _parts(word))


def _checked(kind: type[V], word: _Word, text: str) -> V:
    try:
        return kind(text)  # type: ignore[call-arg]  # each kind is a checked string
    except ValueError as error:
        raise word.error(str(error)) from None


# -- names ----------------------------------------------------------------------------------------------------


def _name(address: Address) -> HostName:
    """A name for an address: itself where it can be one, else with dashes for what a name cannot hold."""
    return HostName(re.sub(r"[^A-Za-z0-9]+", "-", address).strip("-")[:63].strip("-") or "builder")


def _unique(name: HostName, taken: set[str]) -> HostName:
    number, free = 1, name
    # ssh takes no notice of case where it looks for a host's key: two would have each other's.
    while free.lower() in taken:
        number += 1
        free = HostName(f"{name[: 62 - len(str(number))].rstrip('-')}-{number}")
    return free


def _renamed(builder: PoolBuilder, name: HostName) -> PoolBuilder:
    return builder if name == builder.name else replace(builder, target=replace(builder.target, name=name))


def _this_system() -> System:
    machine = {"arm64": "aarch64"}.get(os.uname().machine, os.uname().machine)
    return System(f"{machine}-{sys.platform}")
