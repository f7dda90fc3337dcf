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


class System(_Checked):
    """A Nix system: ``x86_64-linux``."""

    __slots__ = ()
    pattern = re.compile(r"[a-z][a-z0-9_]{0,31}-[a-z][a-z0-9]{0,31}")
    what = "a Nix system (such as x86_64-linux)"


class FlakeRef(_Checked):
    """Where a flake is: a path, or a reference such as ``github:owner/repo/branch`` (``nix flake --help``).

    A narrower grammar than Nix's: no white space, no quotes, no ``$``, no leading dash, no ``#``, since the
    attribute is a value of its own, and no login in a URL, since the reference is shown, recorded, and an argument of
    nix that every user of this machine can read.
    """

    __slots__ = ()
    pattern = re.compile(r"(?=.{1,1024}$)[A-Za-z0-9_./~][A-Za-z0-9_./~:%@+,=-]*(\?[A-Za-z0-9_./~:&=%@+,-]*)?")
    what = "a flake reference (a path or a URL such as github:owner/repo, without the #attribute)"
    # A user alone is a login before https (a token), and none before ssh (git).
    _login = re.compile(
        r"https?://[^/?#]*@|://[^/?#@:]*:[^/?#]*@|[?&][A-Za-z_-]*(token|password|passwd|secret|api_?key)=",
        re.IGNORECASE,
    )

    def __new__(cls, value: str) -> Self:
        if cls._login.search(value):
            raise ValueError(
                "a flake reference with a login in it is not taken, as it is shown and recorded: "
                "let nix have it from access-tokens or netrc-file of nix.conf"
            )
        return super().__new__(cls, value)

    @property
    def is_path(self) -> bool:
        """Whether it is a directory on this machine: ``.``, ``../app``, ``/srv/app``, ``~/app``."""
        return self.startswith((".", "/", "~"))


class AttrPath(_Checked):
    """A flake's attribute: ``docker``, ``packages.{system}.docker``. ``{system}`` is filled in for each system."""

    __slots__ = ()
    _part = r"([A-Za-z_][A-Za-z0-9_-]*|\{system\})"
    pattern = re.compile(rf"(?=.{{1,512}}$){_part}(\.{_part})*")
    what = "an attribute path (names joined by '.', with {system} where a system stands)"


class RegistryName(_Checked):
    """A registry as image references name it: its host, and its port where it is not the usual one."""

    __slots__ = ()
    pattern = re.compile(
        r"(localhost|(?=[^:]*\.)[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?|[A-Za-z0-9][A-Za-z0-9-]*(?=:)|\[[0-9a-fA-F:]+\])(:[0-9]{1,5})?"
    )
    what = "a registry (host or host:port, such as registry.example.org:5000)"


class ImageReference(_Checked):
    """An image in a registry, by tag: ``registry.example.org:5000/team/app:1.2``.

    The grammar is the distribution project's, with the registry and the tag required: what is left out elsewhere
    means somebody's default. ``docker://`` may stand before it and is not part of the value.
    """

    __slots__ = ()
    _component = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
    pattern = re.compile(
        rf"(?P<registry>{RegistryName.pattern.pattern})/(?P<repository>{_component}(?:/{_component})*)"
        r":(?P<tag>[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})"
    )
    what = "an image reference (registry/repository:tag; the repository in small letters)"

    def __new__(cls, value: str) -> Self:
        self = super().__new__(cls, value.removeprefix("docker://"))
        if len(self.repository) > 255:
            raise ValueError(f"{value!r} is not {cls.what}: the repository has more than 255 characters")
        return self

    def _group(self, name: str) -> str:
        found = self.pattern.fullmatch(self)
        assert found is not None  # __new__ saw to it
        return found[name]

    @property
    def registry(self) -> RegistryName:
        return RegistryName(self._group("registry"))

    @property
    def repository(self) -> str:
        return self._group("repository")

    @property
    def tag(self) -> str:
        return self._group("tag")

    def tagged(self, tag: str) -> ImageReference:
        """The same repository under another tag."""
        return ImageReference(f"{self.registry}/{self.repository}:{tag}")
