"""Where a value may stand in a template: in code, or in a comment that ends with its line. Never in a string.

``name = "{{ name }}";`` is the natural slip of everybody who knows Jinja2 from HTML. The value comes with quotes of
its own, which would close the template's quote, and its text would be read as code. So values first become marks, a
small scanner of the target language walks over the text, and a mark inside a string, a block comment or a word is an
error that says what to write instead.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import yaml

from nixops.errors import TemplateError
from nixops.render.literal import Language

# A mark is between two of Unicode's noncharacters, which are for such use and for no text; the nonce is random for
# every rendering, so that no text can forge one.
OPEN, CLOSE = "\ufdd0", "\ufdd1"


def mark(nonce: str, number: int) -> str:
    """The mark that stands for value ``number`` until :func:`fill` puts the literal there."""
    return f"{OPEN}{nonce}:{number}{CLOSE}"


def pattern(nonce: str) -> re.Pattern[str]:
    """Finds the marks of one rendering."""
    return re.compile(f"{OPEN}{nonce}:([0-9]+){CLOSE}")


def fill(text: str, nonce: str, literals: Mapping[int, str], language: Language) -> str:
    """``text`` with every mark replaced by its literal.

    :raises TemplateError: a mark stands where its literal would not be read as one, or a filter damaged it.
    """
    marks = pattern(nonce)
    if re.search(f"{OPEN}|{CLOSE}", marks.sub("", text)):
        raise TemplateError("a filter changed a value after it was written", hint="apply filters to the value itself")
    _SCANNERS[language](text, marks)
    return marks.sub(lambda m: literals[int(m[1])], text)


def _refuse(text: str, at: int, where: str) -> TemplateError:
    line = text.count("\n", 0, at) + 1
    return TemplateError(
        f"a value stands {where} (line {line} of what was rendered)",
        hint="write {{ value }} without quotes around it; join text with ~ inside the braces, or mark it with | raw",
    )


def _check_glue(text: str, match: re.Match[str]) -> None:
    before, after = text[match.start() - 1 : match.start()], text[match.end() : match.end() + 1]
    if re.match(rf"[\w{CLOSE}]", before) or re.match(rf"[\w{OPEN}]", after):
        raise _refuse(text, match.start(), "inside a word")


# -- Nix and HCL: one scanner, two sets of string rules ------------------------------------------------------------

_Mode = str  # "code", or the kind of string: its opening quote


def _scan(
    text: str,
    marks: re.Pattern[str],
    skip: re.Pattern[str],
    open_string: Callable[[str, int], tuple[_Mode, int] | None],
    in_string: Callable[[str, int, _Mode], tuple[str, int]],
    name: str,
) -> None:
    """Walk over ``text`` with a stack of modes.

    :param skip: a comment that ends with its line (``line`` group) or a block comment (``block`` group).
    :param open_string: at a position in code, the string that begins there and the length of its quote.
    :param in_string: at a position in a string: ``end``, ``code`` (an interpolation begins) or ``text``, and a length.
    """
    stack: list[tuple[_Mode, int]] = [("code", 0)]
    at = 0
    while at < len(text):
        mode, depth = stack[-1]
        if found := marks.match(text, at):
            if mode != "code":
                raise _refuse(text, at, f"inside a {name} string")
            _check_glue(text, found)
            at = found.end()
        elif mode != "code":
            what, length = in_string(text, at, mode)
            if what == "end":
                stack.pop()
            elif what == "code":
                stack.append(("code", 0))
            at += length
        elif comment := skip.match(text, at):
            if comment["block"] is not None and (found := marks.search(comment["block"])):
                raise _refuse(text, at, "inside a block comment")
            at = comment.end()
        elif opened := open_string(text, at):
            stack.append((opened[0], 0))
            at += opened[1]
        else:
            if text[at] == "{":
                stack[-1] = (mode, depth + 1)
            elif text[at] == "}" and depth:
                stack[-1] = (mode, depth - 1)
            elif text[at] == "}" and len(stack) > 1:
                stack.pop()
            at += 1


_NIX_SKIP = re.compile(r"(?P<line>#[^\r\n]*)|(?P<block>/\*.*?(?:\*/|\Z))", re.DOTALL)
_NIX_INDENTED = re.compile(r"''\$|'''|''\\.|\$\$|''|\$\{", re.DOTALL)


def _nix_open(text: str, at: int) -> tuple[_Mode, int] | None:
    if text[at] == '"':
        return '"', 1
    # A quote directly after a letter belongs to an identifier (x'').
    if text.startswith("''", at) and not (at and re.match(r"[\w']", text[at - 1])):
        return "''", 2
    return None


def _nix_string(text: str, at: int, mode: _Mode) -> tuple[str, int]:
    if mode == '"':
        if text[at] == "\\" or text.startswith("$$", at):
            return "text", 2
        if text.startswith("${", at):
            return "code", 2
        return ("end", 1) if text[at] == '"' else ("text", 1)
    match _NIX_INDENTED.match(text, at):
        case None:
            return "text", 1
        case found if found[0] == "''":
            return "end", 2
        case found:
            return ("code" if found[0] == "${" else "text"), len(found[0])


_HCL_SKIP = re.compile(r"(?P<line>(?:#|//)[^\n]*)|(?P<block>/\*.*?(?:\*/|\Z))", re.DOTALL)
_HCL_HEREDOC = re.compile(r"<<-?([A-Za-z_][\w-]*)\r?\n")


def _hcl_open(text: str, at: int) -> tuple[_Mode, int] | None:
    if text[at] == '"':
        return '"', 1
    found = _HCL_HEREDOC.match(text, at)
    # One character less: the end is looked for from the line's break on, and the body may be empty.
    return (found[1], len(found[0]) - 1) if found else None


def _hcl_string(text: str, at: int, mode: _Mode) -> tuple[str, int]:
    for escaped in ("$${", "%%{"):
        if text.startswith(escaped, at):
            return "text", 3
    if text.startswith(("${", "%{"), at):
        return "code", 2
    if mode == '"':
        if text[at] == "\\":
            return "text", 2
        return ("end", 1) if text[at] == '"' else ("text", 1)
    end = re.compile(rf"\n[ \t]*{re.escape(mode)}(?=\r?\n|\Z)").match(text, at)
    return ("end", len(end[0])) if end else ("text", 1)


def _scan_nix(text: str, marks: re.Pattern[str]) -> None:
    _scan(text, marks, _NIX_SKIP, _nix_open, _nix_string, "Nix")


def _scan_hcl(text: str, marks: re.Pattern[str]) -> None:
    _scan(text, marks, _HCL_SKIP, _hcl_open, _hcl_string, "HCL")


# -- YAML: its own parser tells -------------------------------------------------------------------------------


def _scan_yaml(text: str, marks: re.Pattern[str]) -> None:
    """A mark must be a whole plain scalar; one that the parser does not show stands in a comment."""
    token = re.compile(r"xX([0-9]+)Xx")
    plain = marks.sub(lambda m: f"xX{m.start()}Xx", text)
    starts = {m.start() for m in marks.finditer(text)}
    try:
        scalars = [e for e in yaml.parse(plain, Loader=yaml.SafeLoader) if isinstance(e, yaml.ScalarEvent)]
    except yaml.YAMLError as error:
        raise TemplateError("what was rendered is no YAML", detail=str(error)) from error
    for scalar in scalars:
        inside = [int(n) for n in token.findall(scalar.value) if int(n) in starts]
        if inside and (scalar.style or not token.fullmatch(scalar.value)):
            where = "inside a YAML string" if scalar.style else "inside a longer text"
            raise _refuse(text, inside[0], where)


_SCANNERS: dict[Language, Callable[[str, re.Pattern[str]], None]] = {
    Language.NIX: _scan_nix,
    Language.HCL: _scan_hcl,
    Language.YAML: _scan_yaml,
}
