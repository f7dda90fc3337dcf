"""Values as literals of Nix, HCL and YAML. Evaluating what is written gives the value back, for every value.

Every literal is a single line, so that it is also safe in a ``#`` comment. Accepted are ``str``, ``bool``, ``int``,
finite ``float``, ``None``, sequences and mappings with ``str`` keys, nested as deep as Python goes.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from enum import Enum

from nixops.errors import TemplateError
from nixops.secret import Secret


class Language(Enum):
    """What a rendered file is written in; the value is its name in messages."""

    NIX = "Nix"
    HCL = "HCL"
    YAML = "YAML"

    @classmethod
    def of_template(cls, name: str) -> Language:
        """The language that a template's file name stands for.

        :raises TemplateError: the name has none of the suffixes.
        """
        for suffix, language in _SUFFIXES.items():
            if name.endswith(suffix):
                return language
        raise TemplateError(
            f"template {name}: its name tells no target language", hint=f"end it with {', '.join(_SUFFIXES)}"
        )


_SUFFIXES = {
    ".nix.j2": Language.NIX,
    ".tf.j2": Language.HCL,
    ".yml.j2": Language.YAML,
    ".yaml.j2": Language.YAML,
}

# Words that cannot stand bare as an attribute's name. (`or` may, in some places and some versions.)
_NIX_KEYWORDS = frozenset(
    ("assert", "else", "if", "in", "inherit", "let", "or", "rec", "then", "with", "true", "false", "null")
)
_NIX_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_'-]*")
_PLAIN_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_NIX_MAX_INT = 2**63 - 1


def literal(value: object, language: Language) -> str:
    """``value`` as one line of ``language``.

    :raises TemplateError: the language has no literal for it (a NUL or a number too large in Nix, a lone
        surrogate anywhere), or it is of another type, a :class:`Secret` above all.
    """
    write_str, write_list, write_dict = _WRITERS[language]
    match value:
        case Secret():
            raise TemplateError("a secret is never rendered into a file")
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case str():
            return write_str(_checked_text(str.__str__(value), language))
        case int():
            return _int(int(value), language)
        case float():
            return _float(float(value), language)
        case Mapping():
            for key in value:
                if not isinstance(key, str):
                    raise TemplateError(f"a mapping's key {key!r} is no text: {language.value} has no literal for it")
            return write_dict({_checked_text(str.__str__(k), language): literal(v, language) for k, v in value.items()})
        case Sequence() if not isinstance(value, bytes | bytearray | memoryview):
            return write_list([literal(v, language) for v in value])
    raise TemplateError(f"a value of type {type(value).__name__} has no literal in {language.value}")


def attribute_path(parts: str | Sequence[str]) -> str:
    """A Nix attribute path, quoted where needed: ``gst_all_1.gstreamer``, ``services."a b"``.

    :param parts: its names, or one text with dots between them.
    """
    names = parts.split(".") if isinstance(parts, str) else parts
    return ".".join(_nix_name(_checked_text(n, Language.NIX)) for n in names)


def identifier(text: str) -> str:
    """``text``, if it is an identifier of Nix and HCL alike (letters, digits and underscores).

    :raises TemplateError: it is not.
    """
    if not _PLAIN_IDENTIFIER.fullmatch(text) or text in _NIX_KEYWORDS:
        raise TemplateError(f"{text!r} is no identifier", hint="use letters, digits and underscores")
    return str.__str__(text)


def _checked_text(text: str, language: Language) -> str:
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise TemplateError(f"{text!r} holds half a character (a lone surrogate): no file can hold it")
    if language is Language.NIX and "\0" in text:
        raise TemplateError(f"{text!r} holds a NUL character: a Nix string cannot")
    return text


def _int(value: int, language: Language) -> str:
    if language is not Language.NIX:
        return str(value)
    if not -_NIX_MAX_INT - 1 <= value <= _NIX_MAX_INT:
        raise TemplateError(f"{value} does not fit a Nix integer (64 bits)")
    if value == -_NIX_MAX_INT - 1:
        return f"(-{_NIX_MAX_INT} - 1)"  # its absolute value alone would not fit
    return str(value) if value >= 0 else f"({value})"  # `[ -1 ]` is a syntax error


def _float(value: float, language: Language) -> str:
    if not math.isfinite(value):
        raise TemplateError(f"{value} has no literal in {language.value}")
    if language is Language.NIX and 0 < abs(value) < sys.float_info.min:
        raise TemplateError(f"{value} is too small for a Nix float")
    text = repr(value)
    if "." not in text:  # 1e+22: neither Nix nor YAML 1.1 takes it for a float without the dot
        mantissa, _, exponent = text.partition("e")
        text = f"{mantissa}.0e{exponent}"
    return f"({text})" if language is Language.NIX and text.startswith("-") else text


def _nix_str(text: str) -> str:
    # Every dollar is escaped, not only those before a brace: no rule about "$$" to get wrong. A bare carriage
    # return would be read as a newline.
    escapes = {"\\": "\\\\", '"': '\\"', "$": "\\$", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
    return '"' + "".join(escapes.get(c, c) for c in text) + '"'


def _nix_name(text: str) -> str:
    return text if _NIX_IDENTIFIER.fullmatch(text) and text not in _NIX_KEYWORDS else _nix_str(text)


def _nix_list(items: list[str]) -> str:
    return f"[ {' '.join(items)} ]" if items else "[ ]"


def _nix_dict(items: dict[str, str]) -> str:
    return f"{{ {' '.join(f'{_nix_name(k)} = {v};' for k, v in items.items())} }}" if items else "{ }"


def _invisible(char: str) -> bool:
    """Control characters, line separators and others that a file should not hold as they are."""
    return char < " " or "\x7f" <= char <= "\x9f" or "\u2028" <= char <= "\u202e" or char in "\ufeff\ufffe\uffff"


def _hcl_str(text: str) -> str:
    # "$${" would be usual for "${", but "$$${" is then a puzzle; an escaped dollar never begins a template.
    # HCL normalises every string to NFC when it evaluates one: text that is not NFC comes back as its NFC.
    escapes = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"}
    out = [escapes.get(c) or (f"\\u{ord(c):04x}" if _invisible(c) else c) for c in text]
    for i, char in enumerate(text[:-1]):
        if char in "$%" and text[i + 1] == "{":
            out[i] = f"\\u{ord(char):04x}"
    return '"' + "".join(out) + '"'


def _hcl_dict(items: dict[str, str]) -> str:
    return f"{{ {', '.join(f'{_hcl_str(k)} = {v}' for k, v in items.items())} }}" if items else "{}"


def _yaml_str(text: str) -> str:
    # Always double quotes: no yes/no, null, 1e3, date, leading "@" or ": " to think of.
    escapes = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"}
    return '"' + "".join(escapes.get(c) or (f"\\u{ord(c):04x}" if _invisible(c) else c) for c in text) + '"'


def _yaml_dict(items: dict[str, str]) -> str:
    return f"{{{', '.join(f'{_yaml_str(k)}: {v}' for k, v in items.items())}}}"


def _brackets(items: list[str]) -> str:
    return f"[{', '.join(items)}]"


_Writers = tuple[Callable[[str], str], Callable[[list[str]], str], Callable[[dict[str, str]], str]]
_WRITERS: dict[Language, _Writers] = {
    Language.NIX: (_nix_str, _nix_list, _nix_dict),
    Language.HCL: (_hcl_str, _brackets, _hcl_dict),
    Language.YAML: (_yaml_str, _brackets, _yaml_dict),
}
