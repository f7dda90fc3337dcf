"""Jinja2 with one difference: ``{{ value }}`` writes a literal of the file's language.

Raw text needs ``| raw`` at the place. A macro's result is text like any other, so it needs ``| raw`` too. The
target language is told by the suffix of the template's name (``x.nix.j2``); what it includes must be of the same.
"""

from __future__ import annotations

import re
import secrets
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jinja2

from nixops.errors import Position, TemplateError, UsageError
from nixops.render import guard
from nixops.render.literal import Language, attribute_path, identifier, literal
from nixops.secret import Secret


class Raw(str):
    """Text that a template marked with ``| raw``. Joining it with anything makes it a plain text again."""

    __slots__ = ()


def shipped_templates() -> Path:
    """The project's own templates: ``templates/`` at the top of the checkout.

    :raises UsageError: there is none, because the package was installed without its checkout.
    """
    directory = Path(__file__).resolve().parents[2] / "templates"
    if not directory.is_dir():
        raise UsageError(
            "the templates of nixops are not beside the package",
            hint="work from a checkout (pip install -e .), or name a directory with --templates",
        )
    return directory


class Engine:
    """Runs templates.

    :param templates: a directory whose files take the place of the shipped ones, file by file.
    """

    def __init__(self, templates: Path | None = None) -> None:
        if templates is not None and not templates.is_dir():
            raise UsageError(f"no directory of templates at {templates}")
        own = [templates] if templates is not None else []
        try:
            self._directories = [*own, shipped_templates()]
        except UsageError:
            if not own:
                raise
            self._directories = own

    def render(self, name: str, context: Mapping[str, Any]) -> str:
        """What the template ``name`` makes of ``context``.

        :raises TemplateError: the template is missing or wrong, uses an undefined name, holds a value where none
            may stand, or a value has no literal; with file and line where they are known.
        """
        language = Language.of_template(name)
        rendering = _Rendering(language)
        environment = jinja2.Environment(  # noqa: S701 -- autoescape is for HTML; literal() escapes
            loader=_OneLanguage(self._directories, language),
            undefined=jinja2.StrictUndefined,
            finalize=rendering.finalize,
            keep_trailing_newline=True,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        environment.filters["raw"] = _raw
        environment.filters["identifier"] = lambda text: Raw(identifier(text))
        if language is Language.NIX:
            environment.filters["attribute"] = lambda parts: Raw(attribute_path(parts))
        try:
            text = environment.get_template(name).render(dict(context))
        except Exception as error:
            raise _explained(error, name) from error
        try:
            return rendering.fill(text)
        except TemplateError as error:
            error.message = f"template {name}: {error.message}"
            raise


class _OneLanguage(jinja2.FileSystemLoader):
    """Refuses a template of another language: its values would be written in the wrong one."""

    def __init__(self, directories: list[Path], language: Language) -> None:
        super().__init__(directories)
        self._language = language

    def get_source(self, environment: jinja2.Environment, template: str) -> tuple[str, str, Callable[[], bool]]:
        if Language.of_template(template) is not self._language:
            raise TemplateError(f"template {template} is included from a template of {self._language.value}")
        return super().get_source(environment, template)


class _Rendering:
    """The values that one rendering met, by the mark that stands for each."""

    def __init__(self, language: Language) -> None:
        self._language = language
        self._nonce = secrets.token_hex(8)
        self._marks = guard.pattern(self._nonce)
        self._literals: dict[int, str] = {}

    def finalize(self, value: Any) -> str:
        """Called by Jinja2 for every ``{{ value }}``, constants included, and for no text of the template's own."""
        if isinstance(value, Raw):
            return str.__str__(value)
        number = len(self._literals)
        self._literals[number] = literal(self._plain(value), self._language)
        return guard.mark(self._nonce, number)

    def _plain(self, value: Any) -> Any:
        """``value`` without marks (``{% set %}`` blocks hold rendered text) and without undefined names."""
        if isinstance(value, jinja2.Undefined):
            str(value)  # raises UndefinedError: StrictUndefined
        if isinstance(value, str) and self._nonce in value:
            return self._marks.sub(lambda m: self._literals[int(m[1])], value)
        if isinstance(value, Mapping):
            return {self._plain(k): self._plain(v) for k, v in value.items()}
        if isinstance(value, list | tuple | Iterator):
            return [self._plain(v) for v in value]
        return value

    def fill(self, text: str) -> str:
        return guard.fill(text, self._nonce, self._literals, self._language)


def _raw(value: Any) -> Raw:
    if isinstance(value, Secret):
        raise TemplateError("a secret is never rendered into a file")
    return Raw(str(value))


def _explained(error: Exception, name: str) -> TemplateError:
    """The error of a template, with where it stands; ``error`` is whatever Jinja2 or an expression raised."""
    match error:
        case jinja2.TemplateNotFound():
            return TemplateError(f"there is no template {error.name or name}")
        case jinja2.TemplateSyntaxError():
            place = _place(error.filename, error.lineno, None)
            return TemplateError(f"template {error.name or name}: {error.message}", position=place)
        case TemplateError():
            error.position = error.position or _last_place(error)
            return error
        case jinja2.UndefinedError():
            hint = "the comment at the top of the template lists the names it is given"
            return TemplateError(f"template {name}: {error.message}", hint=hint, position=_last_place(error))
    return TemplateError(f"template {name}: {type(error).__name__}: {error}", position=_last_place(error))


def _last_place(error: Exception) -> Position | None:
    """Jinja2 rewrites tracebacks so that their frames name the template's own file and line."""
    undefined = re.search(r"'([A-Za-z_][A-Za-z0-9_]*)'(?: is undefined$|$)", str(error))
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename.endswith(".j2"):
            return _place(frame.filename, frame.lineno, undefined[1] if undefined else None)
    return None


def _place(file: str | None, line: int | None, word: str | None) -> Position | None:
    if not file or not line:
        return None
    path, column = Path(file), 1
    if word and path.is_file():
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        found = re.search(rf"\b{re.escape(word)}\b", lines[line - 1]) if line <= len(lines) else None
        column = found.start() + 1 if found else 1
    here = Path.cwd()
    shown = path.relative_to(here) if path.is_relative_to(here) else path
    return Position(str(shown), line, column)
