"""What Nix on a host is set to, as far as the checks want to know."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from nixops.verify.model import Remote

FEATURES: Final = "--extra-experimental-features nix-command"
# Older versions of Nix, and Lix, call it show-config.
_SHOW: Final = f"""
{{ nix {FEATURES} config show 2> /dev/null || nix {FEATURES} show-config; }} |
    grep -E '^(trusted-users|allowed-users|secret-key-files) ='
"""


@dataclass(frozen=True)
class NixSettings:
    """Settings of a host's Nix by their names.

    :ivar said: what Nix had to say where it does not tell them.
    """

    values: Mapping[str, str]
    said: str

    @classmethod
    def read(cls, remote: Remote) -> NixSettings:
        """Ask the host's Nix, as root."""
        shown = remote.run(_SHOW)
        return cls(dict(re.findall(r"^([a-z-]+) = ?(.*)$", shown.stdout, re.MULTILINE)), shown.stderr)

    def words(self, name: str) -> list[str]:
        """The words of a setting that is a list; none where it is not known."""
        return self.values.get(name, "").split()
