"""Where our scripts find the host's programs."""

from __future__ import annotations

from typing import Final

# A NixOS login through sudo has no tools in /bin and /usr/bin: the current system's come first.
TOOLS_PATH: Final = "/run/wrappers/bin:/run/current-system/sw/bin:$PATH:/usr/sbin:/usr/bin:/sbin:/bin"
# Begins every script and command of the checks.
PREAMBLE: Final = f"PATH={TOOLS_PATH}; export PATH\n"
