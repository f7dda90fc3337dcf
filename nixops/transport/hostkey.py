"""Host keys as values: parsing, fingerprints, and which algorithms may offer them. Loads nothing heavy."""

from __future__ import annotations

import base64
import binascii
import hashlib
import struct
from dataclasses import dataclass
from typing import Self

# Key type → signature algorithms under which a server may offer such a key (RFC 8332 for RSA; SHA-1 is left out).
ALGORITHMS = {
    "ssh-ed25519": ("ssh-ed25519",),
    "ecdsa-sha2-nistp256": ("ecdsa-sha2-nistp256",),
    "ecdsa-sha2-nistp384": ("ecdsa-sha2-nistp384",),
    "ecdsa-sha2-nistp521": ("ecdsa-sha2-nistp521",),
    "ssh-rsa": ("rsa-sha2-512", "rsa-sha2-256"),
}


@dataclass(frozen=True)
class HostKey:
    """A public host key: its type and its wire form."""

    type: str
    blob: bytes

    @classmethod
    def parse(cls, text: str) -> Self:
        """From ``type base64 [comment]``.

        :raises ValueError: not such a line, or the type inside the blob is another.
        """
        parts = text.split()
        if len(parts) < 2 or parts[0] not in ALGORITHMS:
            raise ValueError(f"not a host key of a known type: {text[:40]!r}")
        try:
            blob = base64.b64decode(parts[1], validate=True)
        except binascii.Error:
            raise ValueError(f"the {parts[0]} key is not valid base64") from None
        if len(blob) < 4 or blob[4 : 4 + struct.unpack(">I", blob[:4])[0]] != parts[0].encode():
            raise ValueError(f"the base64 text is not that of a {parts[0]} key")
        return cls(parts[0], blob)

    @property
    def fingerprint(self) -> str:
        """``SHA256:…`` as ``ssh-keygen -l`` prints it."""
        digest = hashlib.sha256(self.blob).digest()
        return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")

    def __str__(self) -> str:
        return f"{self.type} {base64.b64encode(self.blob).decode()}"


def fingerprint(key: str) -> str:
    """``SHA256:…`` of a ``type base64`` line, as ``ssh-keygen -l`` prints it.

    :raises ValueError: it is not a key.
    """
    return HostKey.parse(key).fingerprint
