"""What a binary cache says of one store path, read strictly, and whether our key vouches for it.

The format and the fingerprint that is signed are Nix's (``nar-info.cc`` and ``path-info.cc`` in its source).
``cryptography`` is loaded only where a signature is looked at.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Self

from nixops.errors import printable
from nixops.values import StorePath

STORE: Final = "/nix/store"
_NIX32: Final = "0123456789abcdfghijklmnpqrsvwxyz"
_KEY_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_NUMBER: Final = re.compile(r"0|[1-9][0-9]{0,18}")
_FIELD: Final = re.compile(r"([A-Za-z0-9]+): (.*)")
_REQUIRED: Final = ("StorePath", "URL", "NarHash", "NarSize")


class Verdict(StrEnum):
    """What a cache's answer for one path is worth."""

    SERVED = "served"
    MISSING = "missing"
    UNSIGNED = "unsigned"
    WRONG_KEY = "wrong key"
    BAD_SIGNATURE = "bad signature"
    MALFORMED = "malformed"
    NO_ANSWER = "no answer"


class NarinfoError(ValueError):
    """A text is no narinfo that Nix would take; the message says why."""


@dataclass(frozen=True)
class PublicKey:
    """A key that caches sign with: its name, and 32 bytes of Ed25519."""

    name: str
    raw: bytes

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``cache.example.org-1:base64``, as in ``trusted-public-keys``.

        :raises ValueError: it is none; the message says why.
        """
        name, _, encoded = text.strip().partition(":")
        raw = _base64(encoded)
        if not _KEY_NAME.fullmatch(name) or raw is None or len(raw) != 32:
            raise ValueError(f"{text!r} is no public key of a binary cache (name:base64 of 32 bytes)")
        return cls(name, raw)

    def verifies(self, message: bytes, signature: bytes) -> bool:
        """Whether ``signature`` is this key's for ``message``."""
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

        try:
            Ed25519PublicKey.from_public_bytes(self.raw).verify(signature, message)
        except (InvalidSignature, ValueError):  # the latter: 32 bytes that are no point of the curve
            return False
        return True


@dataclass(frozen=True)
class Narinfo:
    """One path as a cache serves it.

    :ivar url: where its archive is, relative to the cache.
    :ivar nar_hash: ``sha256:`` and 52 characters of Nix's base 32, whatever form the cache gave.
    :ivar nar_size: bytes of the archive, unpacked.
    :ivar file_size: bytes that are downloaded, where the cache says so.
    :ivar signatures: each ``name:base64``, unchecked.
    """

    path: StorePath
    url: str
    nar_hash: str
    nar_size: int
    references: tuple[StorePath, ...] = ()
    signatures: tuple[str, ...] = ()
    file_size: int | None = None

    def fingerprint(self) -> bytes:
        """The text that a signature signs: path, hash, size and references, in the order of their names."""
        references = ",".join(sorted(self.references))
        return f"1;{self.path};{self.nar_hash};{self.nar_size};{references}".encode()

    def judge(self, keys: Iterable[PublicKey]) -> tuple[Verdict, str]:
        """Whether one of ``keys`` signed this. A path that needs no signature (its content is its address) needs one
        all the same: the answer is about the cache.

        :returns: SERVED, UNSIGNED, WRONG_KEY or BAD_SIGNATURE, and what is to be said of it.
        """
        known: dict[str, list[PublicKey]] = {}
        for key in keys:
            known.setdefault(key.name, []).append(key)
        if not self.signatures:
            return Verdict.UNSIGNED, "it has no signature"
        message = self.fingerprint()
        names = [text.partition(":")[0] for text in self.signatures]
        ours = [name for name in names if name in known]
        for text in self.signatures:
            name, _, encoded = text.partition(":")
            signature = _base64(encoded)
            if signature is not None and any(key.verifies(message, signature) for key in known.get(name, ())):
                return Verdict.SERVED, f"signed by {name}"
        if ours:
            return Verdict.BAD_SIGNATURE, f"its signature by {ours[0]} does not verify"
        return Verdict.WRONG_KEY, "signed by " + printable(", ".join(dict.fromkeys(names))[:200]) + " only"


def parse_narinfo(text: str) -> Narinfo:
    """Read a narinfo.

    :raises NarinfoError: Nix would not take it, or it contradicts itself.
    """
    if not text.endswith("\n"):
        raise NarinfoError("it is cut off: its last line has no end")
    fields: dict[str, str] = {}
    signatures: list[str] = []
    for line in text[:-1].split("\n"):
        found = _FIELD.fullmatch(line)
        if found is None:
            raise NarinfoError(f"a line is no 'name: value': {line[:80]!r}")
        name, value = found[1], found[2]
        if name == "Sig":
            signatures.append(value)
        elif name in fields:
            raise NarinfoError(f"it says {name} twice")
        else:
            fields[name] = value
    for name in _REQUIRED:
        if not fields.get(name):
            raise NarinfoError(f"it does not say {name}")
    size = _number(fields, "NarSize")
    if size == 0:
        raise NarinfoError("its NarSize is 0")
    return Narinfo(
        path=_path(fields["StorePath"]),
        url=fields["URL"],
        nar_hash=nar_hash(fields["NarHash"]),
        nar_size=size,
        references=tuple(_path(f"{STORE}/{name}") for name in fields.get("References", "").split()),
        signatures=tuple(signatures),
        file_size=_number(fields, "FileSize") if "FileSize" in fields else None,
    )


def parse_cache_info(text: str) -> Mapping[str, str]:
    """Read a cache's ``nix-cache-info``: ``StoreDir``, ``Priority`` and so on.

    :raises NarinfoError: it is none.
    """
    pairs = [line.partition(":") for line in text.splitlines() if line.strip()]
    fields = {name.strip(): value.strip() for name, colon, value in pairs if colon}
    if "StoreDir" not in fields:
        raise NarinfoError("it does not say StoreDir")
    return fields


def nar_hash(text: str) -> str:
    """A SHA-256 in any form that Nix reads, in the form that is signed.

    :raises NarinfoError: it is none.
    """
    for prefix, forms in (("sha256:", (_hex, _from_nix32, _base64)), ("sha256-", (_base64,))):
        if text.startswith(prefix):
            for form in forms:
                digest = form(text.removeprefix(prefix))
                if digest is not None and len(digest) == 32:
                    return f"sha256:{nix32(digest)}"
    raise NarinfoError(f"{text[:120]!r} is no SHA-256 hash")


def nix32(data: bytes) -> str:
    """``data`` in Nix's base 32: its own alphabet, the last bits first."""
    value = int.from_bytes(data, "little")
    length = (len(data) * 8 + 4) // 5
    return "".join(_NIX32[(value >> (5 * place)) & 31] for place in reversed(range(length)))


def _from_nix32(text: str) -> bytes | None:
    if len(text) != 52 or any(c not in _NIX32 for c in text):
        return None
    value = 0
    for character in text:
        value = value << 5 | _NIX32.index(character)
    return value.to_bytes(32, "little") if value < 1 << 256 else None


def _hex(text: str) -> bytes | None:
    return bytes.fromhex(text) if re.fullmatch(r"[0-9a-fA-F]{64}", text) else None


def _base64(text: str) -> bytes | None:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):  # the latter: characters beyond ASCII
        return None


def _number(fields: Mapping[str, str], name: str) -> int:
    if not _NUMBER.fullmatch(fields[name]):
        raise NarinfoError(f"its {name} is no number: {fields[name][:40]!r}")
    return int(fields[name])


def _path(text: str) -> StorePath:
    try:
        return StorePath(text)
    except ValueError:
        raise NarinfoError(f"{text[:300]!r} is no store path") from None
