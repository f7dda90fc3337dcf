"""Small values whose type makes the wrong call impossible: a checked string, never a bare one.

Each class checks its grammar when it is made and raises :class:`ValueError` with a text that is fit for an
error message. They are strings, so they print, compare and serialise as such.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Any, ClassVar, Self

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema


class _Checked(str):
    """A string that matched its class's grammar."""

    __slots__ = ()
    pattern: ClassVar[re.Pattern[str]]
    what: ClassVar[str]

    def __new__(cls, value: str) -> Self:
        if not cls.pattern.fullmatch(value):
            raise ValueError(f"{value!r} is not {cls.what}")
        return super().__new__(cls, value)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(cls, core_schema.str_schema())


class HostName(_Checked):
    """A host's name in the inventory, as NixOS's ``networking.hostName`` takes it."""

    __slots__ = ()
    pattern = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?")
    what = "a host name (letters, digits and dashes, at most 63)"


class Address(_Checked):
    """What to connect to: a DNS name or an IP address. Never an option, so ``ssh`` cannot take it for one."""

    __slots__ = ()
    pattern = re.compile(r"(?!-)[A-Za-z0-9_]([A-Za-z0-9_.:-]{0,251}[A-Za-z0-9])?(%[A-Za-z0-9]+)?|::1")
    what = "a host address (a DNS name or an IP address, and nothing that begins with a dash)"

    def __new__(cls, value: str) -> Self:
        self = super().__new__(cls, value)
        if ":" in value:
            ipaddress.ip_address(value.split("%")[0])
        return self


class RunnerName(_Checked):
    """The name of a runner instance in the inventory and in the NixOS module."""

    __slots__ = ()
    pattern = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}")
    what = "a runner name (letters, digits, dashes and underscores, beginning with a letter or digit)"

    def systemd_escaped(self) -> str:
        """As ``systemd-escape`` writes it in a unit's name: ``-`` becomes ``\\x2d``."""
        return self.replace("-", "\\x2d")


class RepoName(_Checked):
    """``owner/repository`` on the forge."""

    __slots__ = ()
    pattern = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*/(?!\.{1,2}$)[A-Za-z0-9_.-]+")
    what = "a repository (owner/name)"

    @property
    def owner(self) -> str:
        return self.split("/")[0]

    @property
    def repo(self) -> str:
        return self.split("/")[1]


class StorePath(_Checked):
    """A path of the Nix store, with its 32-character hash and its name, and nothing below it."""

    __slots__ = ()
    pattern = re.compile(r"/nix/store/[0-9abcdfghijklmnpqrsvwxyz]{32}-[A-Za-z0-9+._?=-]{1,211}")
    what = "a store path"

    @property
    def hash_part(self) -> str:
        return self[11:43]

    @property
    def name(self) -> str:
        return self[44:]


class AbsolutePath(_Checked):
    """An absolute path on a host, normalised: no ``.``, ``..`` or empty components, no white space."""

    __slots__ = ()
    pattern = re.compile(r"(/(?!\.{1,2}(/|$))[A-Za-z0-9+._@=,:-]+)+")
    what = "an absolute path without '..', white space or special characters"


class VaultPath(_Checked):
    """A path below a KV mount: ``hosts/nix-cache02/forgejo-runner-token-native``."""

    __slots__ = ()
    pattern = re.compile(r"(?!.*(^|/)\.{1,2}(/|$))[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)*")
    what = "a vault path (segments of letters, digits, '_', '.', '-', joined by '/')"


class RelPath(_Checked):
    """A path inside a checkout, with optional ``{host}``-style placeholders; it cannot leave the checkout."""

    __slots__ = ()
    pattern = re.compile(r"(?!.*(^|/)\.{1,2}(/|$))[A-Za-z0-9_.{}+-]+(/[A-Za-z0-9_.{}+-]+)*")
    what = "a relative path inside the checkout"
