"""Parsing what was rendered with the real tool, before it replaces anything."""

from __future__ import annotations

from pathlib import PurePosixPath

import yaml

from nixops.errors import HostFault, TemplateError
from nixops.render.literal import Language
from nixops.transport.command import Command, Runner


def parse_check(path: PurePosixPath, text: str, language: Language, runner: Runner) -> None:
    """Parse ``text`` as a file of ``language``. Nix needs ``nix-instantiate``, run by ``runner``.

    :raises HostFault: this user may not use Nix.
    :raises TemplateError: it does not parse; ``detail`` is what the parser says.
    """
    match language:
        case Language.NIX:
            result = runner.run(Command.of("nix-instantiate", "--parse", "-", stdin=text, timeout=60.0))
            if "/nix/var/nix" in result.err and "ermission denied" in result.err:
                raise HostFault(
                    "nix cannot be used by this user",
                    hint="on Debian: be in the group nix-users, and log in again",
                    detail=result.tail(3),
                )
            problem = None if result.ok else result.tail()
        case Language.HCL:
            problem = _hcl(text)
        case Language.YAML:
            problem = _yaml(text)
    if problem is not None:
        raise TemplateError(
            f"{path}: what was rendered is no {language.value}",
            hint="nothing was written; look at the template that its header names",
            detail=problem,
        )


def _hcl(text: str) -> str | None:
    # Imported here: python-hcl2 builds its parser when it is imported.
    import hcl2
    from lark.exceptions import LarkError

    try:
        hcl2.loads(text)
    except LarkError as error:
        return str(error)
    return None


def _yaml(text: str) -> str | None:
    try:
        yaml.safe_load(text)
    except yaml.YAMLError as error:
        return str(error)
    return None
